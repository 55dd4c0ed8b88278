package forward

import (
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"strconv"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/gofwd/gofwd/stack"
)

// pingGroupRange is the sysctl that says which groups may use ping sockets
// (icmp(7)).
const pingGroupRange = "net.ipv4.ping_group_range"

// pinger carries the container's pings into the world, by the kernel's
// unprivileged ICMP sockets (icmp(7)): one for each family and egress, since the
// kernel gives each socket an identifier of its own and has 16 bits of sequence
// number to tell requests apart by. What the container had in their place is kept until
// the answer comes, or until pingsInFlight later requests.
type pinger struct {
	addrs  *hostMap
	egress *egress // nil is none
	out    echoWriter
	log    *slog.Logger

	wg sync.WaitGroup

	mu      sync.Mutex // guards the following fields
	closed  bool
	sockets map[pingKey]*pingSocket
	tried   time.Time // when sockets were last found missing
	err     error     // why, of the last try
}

// pingKey is what a ping socket is for.
type pingKey struct{ is4, bound bool }

// echoWriter is the way back to the container.
type echoWriter interface {
	WriteEcho(*stack.Echo) error
	WriteEchoError(*stack.Echo, stack.ICMPError) error
}

const (
	// pingsInFlight is how many requests of a family may wait for their
	// answers: 8,000 a second with half a second on the way. A power of two.
	pingsInFlight = 4096
	// pingRetry is how often a missing socket is tried again.
	pingRetry = 5 * time.Second
	// pingBuffer holds the largest IP packet.
	pingBuffer = 64 << 10
)

// newPinger returns a pinger that works as far as it is allowed to; note says
// what is forbidden.
func newPinger(addrs *hostMap, g *egress, out echoWriter, log *slog.Logger) *pinger {
	p := &pinger{addrs: addrs, egress: g, out: out, log: log, sockets: make(map[pingKey]*pingSocket)}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.openLocked()
	return p
}

// openLocked opens the sockets that are missing.
func (p *pinger) openLocked() {
	want := []pingKey{{is4: true}, {is4: false}}
	for _, is4 := range []bool{true, false} {
		if p.egress.covers(is4) {
			want = append(want, pingKey{is4, true})
		}
	}
	if p.closed || len(p.sockets) == len(want) || time.Since(p.tried) < pingRetry {
		return
	}
	p.tried, p.err = time.Now(), nil
	for _, key := range want {
		if p.sockets[key] != nil {
			continue
		}
		s, err := openPingSocket(p, key)
		switch {
		case err == nil:
			p.sockets[key] = s
			p.wg.Add(1)
			go s.receiveLoop()
		case p.err == nil && (key.is4 || !errors.Is(err, unix.EAFNOSUPPORT)):
			p.err = err
		}
	}
}

// note says why ping does not work and what to do, "" if it works.
func (p *pinger) note() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.openLocked()
	switch {
	case p.err == nil:
		return ""
	case errors.Is(p.err, unix.EACCES):
		return "the container cannot ping: " + pingGroupRange + ` forbids it to this user; as root: sysctl -w ` + pingGroupRange + `="0 2147483647"`
	}
	return "the container cannot ping: " + p.err.Error()
}

// fromNamespace is the stack's callback for echo requests: it never blocks.
func (p *pinger) fromNamespace(q *stack.Echo) {
	if p.addrs.ours(q.Dst) {
		p.answer(&stack.Echo{Src: q.Dst, Dst: q.Src, ID: q.ID, Seq: q.Seq, TTL: defaultTTL, Payload: q.Payload})
		return
	}
	to, err := p.addrs.destination(netip.AddrPortFrom(q.Dst, 0))
	if err == nil {
		err = p.send(q, to.Addr())
	}
	if errno, ok := errors.AsType[syscall.Errno](err); ok {
		if e, ok := icmpErrorOf(errno, q.Dst.Is4()); ok {
			p.fail(q, e)
		}
	}
}

// send sends q to the address that it is to go to.
func (p *pinger) send(q *stack.Echo, to netip.Addr) error {
	key := pingKey{to.Is4(), p.egress.applies(to)}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.openLocked()
	s := p.sockets[key]
	if s == nil {
		return nil // the network's silence, and a note in the status
	}
	return s.sendLocked(q, to)
}

// rebind closes the socket of a family that is bound to the egress; the next ping
// opens another.
func (p *pinger) rebind(is4 bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	key := pingKey{is4, true}
	if s := p.sockets[key]; s != nil {
		s.file.Close()
		delete(p.sockets, key)
	}
	p.tried = time.Time{}
}

func (p *pinger) answer(e *stack.Echo) {
	if err := p.out.WriteEcho(e); err != nil && !errors.Is(err, net.ErrClosed) {
		p.log.Debug("ping: write the reply", "err", err)
	}
}

func (p *pinger) fail(q *stack.Echo, e stack.ICMPError) {
	if err := p.out.WriteEchoError(q, e); err != nil && !errors.Is(err, net.ErrClosed) {
		p.log.Debug("ping: write the error", "err", err)
	}
}

// close closes the sockets and waits for their goroutines.
func (p *pinger) close() {
	p.mu.Lock()
	p.closed = true
	for _, s := range p.sockets {
		s.file.Close()
	}
	clear(p.sockets)
	p.mu.Unlock()
	p.wg.Wait()
}

// pingSocket is a ping socket. The pinger's mutex guards the
// fields that change.
type pingSocket struct {
	p    *pinger
	file *os.File
	raw  syscall.RawConn
	is4  bool

	ttl  int
	seq  uint16
	sent [pingsInFlight]pingSent // by sequence number, modulo
}

// pingSent is a request on its way.
type pingSent struct {
	src, dst netip.Addr // as the container has them
	to       netip.Addr // where it went
	id, seq  uint16     // as the container has them
	ttl      uint8
	ourSeq   uint16
	open     bool
}

func openPingSocket(p *pinger, key pingKey) (*pingSocket, error) {
	family, proto := unix.AF_INET6, unix.IPPROTO_ICMPV6
	if key.is4 {
		family, proto = unix.AF_INET, unix.IPPROTO_ICMP
	}
	fd, err := unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, proto)
	if err != nil {
		return nil, fmt.Errorf("open ping socket: %w", os.NewSyscallError("socket", err))
	}
	level, options := unix.IPPROTO_IP, []int{unix.IP_RECVERR, unix.IP_RECVTTL}
	if family == unix.AF_INET6 {
		level, options = unix.IPPROTO_IPV6, []int{unix.IPV6_RECVERR, unix.IPV6_RECVHOPLIMIT}
	}
	for _, o := range options {
		if err := unix.SetsockoptInt(fd, level, o, 1); err != nil {
			unix.Close(fd)
			return nil, fmt.Errorf("open ping socket: %w", os.NewSyscallError("setsockopt", err))
		}
	}
	if key.bound {
		if err := p.egress.bind(fd, key.is4); err != nil {
			unix.Close(fd)
			return nil, fmt.Errorf("open ping socket: %w", err)
		}
	}
	s := &pingSocket{p: p, file: os.NewFile(uintptr(fd), "ping"), is4: key.is4}
	if s.raw, err = s.file.SyscallConn(); err != nil {
		s.file.Close()
		return nil, err
	}
	return s, nil
}

// sendLocked sends q to the address to, and remembers it.
func (s *pingSocket) sendLocked(q *stack.Echo, to netip.Addr) error {
	s.seq++
	s.sent[s.seq%pingsInFlight] = pingSent{
		src: q.Src, dst: q.Dst, to: to.WithZone(""), id: q.ID, seq: q.Seq, ttl: q.TTL, ourSeq: s.seq, open: true,
	}
	// Type 8 or 128, code 0; checksum and identifier are the kernel's.
	msg := make([]byte, 8, 8+len(q.Payload))
	msg[0] = 128
	if s.is4 {
		msg[0] = 8
	}
	binary.BigEndian.PutUint16(msg[6:], s.seq)
	msg = append(msg, q.Payload...)
	var err error
	ctlErr := s.raw.Control(func(fd uintptr) {
		if err = s.setTTLLocked(int(fd), int(q.TTL)); err != nil {
			return
		}
		// The error may be that of an earlier request, to whomever, and with
		// its return it is cleared (sock_alloc_send_skb): once more.
		for range 2 {
			err = unix.Sendto(int(fd), msg, unix.MSG_DONTWAIT, toSockaddr(netip.AddrPortFrom(to, 0)))
			if err == nil {
				return
			}
		}
	})
	return errors.Join(ctlErr, err)
}

// setTTLLocked sets the hop limit of what is sent next. It could travel with the
// request, but IPv6 ping sockets take it so only since Linux 5.19.
func (s *pingSocket) setTTLLocked(fd, ttl int) error {
	if ttl == s.ttl || ttl == 0 {
		return nil
	}
	s.ttl = ttl
	if s.is4 {
		return os.NewSyscallError("setsockopt", unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_TTL, ttl))
	}
	return os.NewSyscallError("setsockopt", unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_UNICAST_HOPS, ttl))
}

// receiveLoop takes replies and errors until the socket is closed.
func (s *pingSocket) receiveLoop() {
	defer s.p.wg.Done()
	buf, oob := make([]byte, pingBuffer), make([]byte, 512)
	for {
		var n, oobn, flags int
		var from unix.Sockaddr
		var err error
		rawErr := s.raw.Read(func(fd uintptr) bool {
			// An error in the queue makes the socket readable, too, and
			// the next call fail with it unless it is taken first.
			n, oobn, flags, from, err = unix.Recvmsg(int(fd), buf, oob, unix.MSG_ERRQUEUE|unix.MSG_DONTWAIT)
			if err != nil {
				n, oobn, flags, from, err = unix.Recvmsg(int(fd), buf, oob, unix.MSG_DONTWAIT)
			}
			return !errors.Is(err, unix.EAGAIN)
		})
		switch {
		case rawErr != nil:
			return // closed
		case err != nil:
			// The error of an earlier send: it is in the queue as well.
		case flags&unix.MSG_ERRQUEUE != 0:
			s.receiveError(buf[:n], oob[:oobn])
		default:
			s.receiveReply(buf[:n], oob[:oobn], from)
		}
	}
}

// receiveReply passes on a reply. msg is the ICMP message.
func (s *pingSocket) receiveReply(msg, oob []byte, from unix.Sockaddr) {
	if len(msg) < 8 || msg[0] != 0 && msg[0] != 129 {
		return
	}
	sent, ok := s.take(binary.BigEndian.Uint16(msg[6:]))
	if !ok || sent.to != fromSockaddr(from) {
		return
	}
	s.p.answer(&stack.Echo{
		Src: sent.dst, Dst: sent.src, ID: sent.id, Seq: sent.seq, TTL: hopLimit(oob), Payload: msg[8:],
	})
}

// receiveError passes on what IP_RECVERR says about a request, of which msg is
// the beginning (ip(7), ping_err in net/ipv4/ping.c).
func (s *pingSocket) receiveError(msg, oob []byte) {
	ee, from, ok := parseError(oob)
	if !ok || len(msg) < 8 {
		return
	}
	sent, ok := s.take(binary.BigEndian.Uint16(msg[6:]))
	if !ok {
		return
	}
	e, ok := translate(ee, s.is4, sent.dst.Is4())
	if !ok {
		return
	}
	// As the container knows it: the zero Addr is the destination.
	if from = from.WithZone(""); from != sent.to && !from.IsUnspecified() {
		e.From = from
	}
	s.p.fail(&stack.Echo{
		Src: sent.src, Dst: sent.dst, ID: sent.id, Seq: sent.seq, TTL: sent.ttl, Payload: msg[8:],
	}, e)
}

// take finds the request with our sequence number. It stays, since the network
// may duplicate answers, as ping(8) would like to show.
func (s *pingSocket) take(seq uint16) (pingSent, bool) {
	s.p.mu.Lock()
	defer s.p.mu.Unlock()
	sent := s.sent[seq%pingsInFlight]
	return sent, sent.open && sent.ourSeq == seq
}

// hopLimit returns the TTL or hop limit in a message's control data, 64 if there
// is none.
func hopLimit(oob []byte) uint8 {
	for {
		level, typ, data, rest, ok := nextCmsg(oob)
		if !ok {
			return 64
		}
		v4 := level == unix.SOL_IP && typ == unix.IP_TTL
		v6 := level == unix.SOL_IPV6 && typ == unix.IPV6_HOPLIMIT
		if (v4 || v6) && len(data) >= 4 {
			return uint8(binary.NativeEndian.Uint32(data))
		}
		oob = rest
	}
}

// fromSockaddr returns the address in sa, without zone.
func fromSockaddr(sa unix.Sockaddr) netip.Addr {
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrFrom4(sa.Addr)
	case *unix.SockaddrInet6:
		return netip.AddrFrom16(sa.Addr).Unmap()
	}
	return netip.Addr{}
}

// toSockaddr returns addr for the kernel. A zone must be the number of an interface.
func toSockaddr(addr netip.AddrPort) unix.Sockaddr {
	if addr.Addr().Is4() {
		return &unix.SockaddrInet4{Addr: addr.Addr().As4(), Port: int(addr.Port())}
	}
	zone, _ := strconv.ParseUint(addr.Addr().Zone(), 10, 32)
	return &unix.SockaddrInet6{Addr: addr.Addr().As16(), Port: int(addr.Port()), ZoneId: uint32(zone)}
}
