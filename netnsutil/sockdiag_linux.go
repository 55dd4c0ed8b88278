package netnsutil

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Listener is a socket that waits for peers: a listening TCP socket, or a UDP
// socket that is bound and not connected.
type Listener struct {
	UDP bool
	// Addr is the address that it is bound to; :: of a socket that is not
	// V6Only takes IPv4 as well.
	Addr netip.AddrPort
	// V6Only is set for IPv6 sockets without IPv4 (IPV6_V6ONLY).
	V6Only bool
	// Mark is the socket's SO_MARK, as far as the caller may see it: with
	// CAP_NET_ADMIN over the namespace.
	Mark uint32
}

// SockDiag lists the listeners in a network namespace, by sock_diag(7). It is
// made by [NS.SockDiag]; one goroutine may use it at a time.
type SockDiag struct {
	fd  int
	req inetDiagReq
	buf []byte
}

// SockDiag opens a socket in ns to ask for its listeners. It stays in ns, and
// works without any privilege. The caller closes it.
func (ns *NS) SockDiag() (*SockDiag, error) {
	fd := -1
	err := ns.Do(func() (err error) {
		fd, err = unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_SOCK_DIAG)
		return os.NewSyscallError("socket", err)
	})
	if err != nil {
		return nil, fmt.Errorf("list sockets: %w", err)
	}
	// Of the size of the kernel's own dump buffer.
	return &SockDiag{fd: fd, buf: make([]byte, 32<<10)}, nil
}

// Close closes the socket.
func (d *SockDiag) Close() error { return unix.Close(d.fd) }

// ErrNoUDPDiag is about a kernel that does not list UDP sockets: its module udp_diag is
// missing.
var ErrNoUDPDiag = errors.New("list UDP sockets: kernel module udp_diag is missing")

// AppendListeners appends the namespace's listeners to list, in no order, and
// returns it. It allocates only what list lacks. With [ErrNoUDPDiag] those of TCP are
// all there.
func (d *SockDiag) AppendListeners(list []Listener) ([]Listener, error) {
	for _, q := range [...]struct {
		proto, family uint8
		state         uint32
	}{
		{unix.IPPROTO_TCP, unix.AF_INET, tcpListen},
		{unix.IPPROTO_TCP, unix.AF_INET6, tcpListen},
		{unix.IPPROTO_UDP, unix.AF_INET, tcpClose},
		{unix.IPPROTO_UDP, unix.AF_INET6, tcpClose},
	} {
		var err error
		list, err = d.dump(list, q.proto, q.family, 1<<q.state)
		switch {
		case err == nil:
		case !errors.Is(err, unix.ENOENT):
			return list, fmt.Errorf("list sockets: %w", err)
		case q.proto == unix.IPPROTO_UDP:
			return list, ErrNoUDPDiag
		default:
			return list, fmt.Errorf("list sockets: %w (kernel module tcp_diag is missing)", err)
		}
	}
	return list, nil
}

// States of sockets, linux/tcp_states.h. UDP has two: a connected socket is
// established, any other closed.
const (
	tcpSynSent = 2
	tcpClose   = 7
	tcpListen  = 10
)

// Connecting reports whether a TCP socket in the namespace is in connect(2): from
// local to remote, through the interface with that index. It asks for the one
// socket, which takes no longer where there are many.
func (d *SockDiag) Connecting(ifindex int, local, remote netip.AddrPort) (bool, error) {
	// The kernel's own lookup, which knows an IPv6 socket with IPv4 addresses
	// by those (inet_diag_find_one_icsk in net/ipv4/inet_diag.c). If there is no
	// such socket, it is a listener that is found.
	id := inetDiagSockID{iface: uint32(ifindex), cookie: [2]uint32{^uint32(0), ^uint32(0)}} // INET_DIAG_NOCOOKIE
	binary.BigEndian.PutUint16(id.sport[:], local.Port())
	binary.BigEndian.PutUint16(id.dport[:], remote.Port())
	copy(id.src[:], local.Addr().AsSlice())
	copy(id.dst[:], remote.Addr().AsSlice())
	family := uint8(unix.AF_INET6)
	if local.Addr().Is4() {
		family = unix.AF_INET
	}
	state, err := d.stateOf(family, id)
	if errors.Is(err, unix.ENOENT) { // no socket
		return false, nil
	} else if err != nil {
		return false, fmt.Errorf("look for a socket: %w", err)
	}
	return state == tcpSynSent, nil
}

// stateOf returns the state of the TCP socket with an ID.
func (d *SockDiag) stateOf(family uint8, id inetDiagSockID) (state uint8, err error) {
	if err := d.ask(unix.NLM_F_REQUEST, inetDiagReq{family: family, protocol: unix.IPPROTO_TCP, states: ^uint32(0), id: id}); err != nil {
		return 0, err
	}
	for {
		n, err := d.read()
		if err != nil {
			return 0, err
		}
		if state, ok, err := parseState(d.buf[:n], d.req.Seq); ok || err != nil {
			return state, err
		}
	}
}

// parseState parses the answer in b to request seq, and is not ok if it is none.
func parseState(b []byte, seq uint32) (state uint8, ok bool, err error) {
	kind, msg, _, ours, err := nextMessage(b, seq)
	switch {
	case err != nil || !ours:
		return 0, false, err
	case kind == unix.NLMSG_ERROR:
		return 0, false, parseErrno(msg)
	case kind != unix.SOCK_DIAG_BY_FAMILY || len(msg) < 2:
		return 0, false, errDiagMessage
	}
	return msg[1], true, nil
}

// inetDiagReq is struct inet_diag_req_v2 of linux/inet_diag.h, behind its header.
type inetDiagReq struct {
	unix.NlMsghdr
	family, protocol, ext, pad uint8
	states                     uint32
	id                         inetDiagSockID
}

// inetDiagSockID is struct inet_diag_sockid; ports and addresses are in network
// byte order.
type inetDiagSockID struct {
	sport, dport [2]byte
	src, dst     [16]byte
	iface        uint32
	cookie       [2]uint32
}

// inetDiagMsg is struct inet_diag_msg.
type inetDiagMsg struct {
	family, state, timer, retrans uint8
	id                            inetDiagSockID
	expires, rqueue, wqueue, uid  uint32
	inode                         uint32
}

// Attributes that the kernel adds unasked, linux/inet_diag.h.
const (
	inetDiagV6Only = 11 // INET_DIAG_SKV6ONLY, one byte, of IPv6 sockets in the states asked for here
	inetDiagMark   = 15 // INET_DIAG_MARK, 32 bits, since Linux 4.10
)

// dump appends the sockets of one protocol and family that are in states.
func (d *SockDiag) dump(list []Listener, proto, family uint8, states uint32) ([]Listener, error) {
	if err := d.ask(unix.NLM_F_REQUEST|unix.NLM_F_DUMP, inetDiagReq{family: family, protocol: proto, states: states}); err != nil {
		return list, err
	}
	for {
		n, err := d.read()
		if err != nil {
			return list, err
		}
		var done bool
		if list, done, err = parseListeners(list, d.buf[:n], d.req.Seq, proto == unix.IPPROTO_UDP); done || err != nil {
			return list, err
		}
	}
}

// ask sends a request, whose header it fills in.
func (d *SockDiag) ask(flags uint16, req inetDiagReq) error {
	req.NlMsghdr = unix.NlMsghdr{
		Len:  uint32(unsafe.Sizeof(req)),
		Type: unix.SOCK_DIAG_BY_FAMILY, Flags: flags, Seq: d.req.Seq + 1,
	}
	d.req = req
	_, err := unix.Write(d.fd, unsafe.Slice((*byte)(unsafe.Pointer(&d.req)), d.req.Len))
	return os.NewSyscallError("write", err)
}

// read reads into d.buf.
func (d *SockDiag) read() (int, error) {
	for {
		n, err := unix.Read(d.fd, d.buf)
		if !errors.Is(err, unix.EINTR) {
			return n, os.NewSyscallError("read", err)
		}
	}
}

var errDiagMessage = errors.New("malformed message from the kernel")

// parseListeners parses the messages in b that answer request seq, and reports
// whether the answer is complete.
func parseListeners(list []Listener, b []byte, seq uint32, udp bool) (_ []Listener, done bool, err error) {
	for len(b) > 0 {
		kind, msg, rest, ours, err := nextMessage(b, seq)
		if err != nil {
			return list, true, err
		}
		b = rest
		switch {
		case !ours: // the rest of a dump that was given up
		case kind == unix.NLMSG_DONE:
			return list, true, nil
		case kind == unix.NLMSG_ERROR:
			return list, true, parseErrno(msg)
		case kind == unix.SOCK_DIAG_BY_FAMILY:
			l, ok := parseListener(msg)
			if !ok {
				return list, true, errDiagMessage
			}
			l.UDP = udp
			if l.Addr.Port() != 0 {
				list = append(list, l)
			}
		}
	}
	return list, false, nil
}

// nextMessage returns the payload of the first message in b, whether it answers
// request seq, and what follows it.
func nextMessage(b []byte, seq uint32) (kind uint16, msg, rest []byte, ours bool, err error) {
	if len(b) < unix.SizeofNlMsghdr {
		return 0, nil, nil, false, errDiagMessage
	}
	size := int(binary.NativeEndian.Uint32(b))
	if size < unix.SizeofNlMsghdr || size > len(b) {
		return 0, nil, nil, false, errDiagMessage
	}
	kind, ours = binary.NativeEndian.Uint16(b[4:]), binary.NativeEndian.Uint32(b[8:]) == seq
	return kind, b[unix.SizeofNlMsghdr:size], b[min((size+3)&^3, len(b)):], ours, nil
}

// parseErrno parses a struct nlmsgerr.
func parseErrno(msg []byte) error {
	if len(msg) < 4 {
		return errDiagMessage
	}
	return unix.Errno(-int32(binary.NativeEndian.Uint32(msg)))
}

// parseListener parses one struct inet_diag_msg with its attributes.
func parseListener(b []byte) (l Listener, ok bool) {
	const size = int(unsafe.Sizeof(inetDiagMsg{}))
	if len(b) < size {
		return l, false
	}
	var msg inetDiagMsg
	copy(unsafe.Slice((*byte)(unsafe.Pointer(&msg)), size), b)
	addr := netip.AddrFrom16(msg.id.src).Unmap()
	if msg.family == unix.AF_INET {
		addr = netip.AddrFrom4([4]byte(msg.id.src[:4]))
	}
	l.Addr = netip.AddrPortFrom(addr, binary.BigEndian.Uint16(msg.id.sport[:]))
	for b = b[size:]; len(b) >= unix.SizeofNlAttr; {
		n := int(binary.NativeEndian.Uint16(b))
		if n < unix.SizeofNlAttr || n > len(b) {
			return l, false
		}
		switch value := b[unix.SizeofNlAttr:n]; binary.NativeEndian.Uint16(b[2:]) {
		case inetDiagV6Only:
			l.V6Only = len(value) > 0 && value[0] != 0
		case inetDiagMark:
			if len(value) >= 4 {
				l.Mark = binary.NativeEndian.Uint32(value)
			}
		}
		b = b[min((n+3)&^3, len(b)):]
	}
	return l, true
}
