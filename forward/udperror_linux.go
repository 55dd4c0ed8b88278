package forward

import (
	"encoding/binary"
	"fmt"
	"math"
	"net/netip"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/gofwd/gofwd/stack"
)

// Types and codes of the ICMP errors that stand for an errno.
const (
	icmp4Unreachable      = 3 // RFC 792
	icmp4NetUnreachable   = 0
	icmp4HostUnreachable  = 1
	icmp4PortUnreachable  = 3
	icmp4FragNeeded       = 4
	icmp4AdminProhibited  = 13 // RFC 1812
	icmp6Unreachable      = 1  // RFC 4443
	icmp6NoRoute          = 0
	icmp6AdminProhibited  = 1
	icmp6AddrUnreachable  = 3
	icmp6PortUnreachable  = 4
	icmp6PacketTooBig     = 2
	ip6HeaderLongerThanV4 = 20
)

// icmpErrorOf returns the ICMP error that makes the container's kernel report
// errno; ok is false if there is none.
func icmpErrorOf(errno syscall.Errno, is4 bool) (e stack.ICMPError, ok bool) {
	switch errno {
	case syscall.ECONNREFUSED:
		return icmpError(is4, icmp4PortUnreachable, icmp6PortUnreachable), true
	case syscall.EHOSTUNREACH:
		return icmpError(is4, icmp4HostUnreachable, icmp6AddrUnreachable), true
	case syscall.ENETUNREACH:
		return icmpError(is4, icmp4NetUnreachable, icmp6NoRoute), true
	case syscall.EACCES:
		return icmpError(is4, icmp4AdminProhibited, icmp6AdminProhibited), true
	case syscall.EMSGSIZE:
		if is4 {
			return icmpError(is4, icmp4FragNeeded, 0), true
		}
		return stack.ICMPError{Type: icmp6PacketTooBig}, true
	}
	return e, false
}

func icmpError(is4 bool, code4, code6 uint8) stack.ICMPError {
	if is4 {
		return stack.ICMPError{Type: icmp4Unreachable, Code: code4}
	}
	return stack.ICMPError{Type: icmp6Unreachable, Code: code6}
}

// errorMessage is the room for one message of an error queue: the payload that
// the ICMP error quotes, and what it says.
type errorMessage struct {
	hdr  unix.Msghdr
	iov  unix.Iovec
	name sockaddr
	ctrl cmsgBuf
	buf  [548]byte // RFC 1812, §4.3.2.3: an ICMP error is at most 576 bytes
	d    stack.Datagram
}

// isErrorEvent reports whether an event says that there is an error to read.
func isErrorEvent(ev *unix.EpollEvent) bool { return ev.Events&unix.EPOLLERR != 0 }

// readErrors empties the error queue of s, and tells the container. The socket is
// good for other peers, and after ICMP errors even for the same one.
func (w *udpWorker) readErrors(s *udpSocket) {
	const atOnce = 256
	for range atOnce {
		n, ok := w.err.recv(s)
		if !ok {
			return
		}
		if ee, from, ok := w.err.parse(); ok {
			w.report(s, ee, from, w.err.buf[:n])
		}
	}
}

// recv reads one message without blocking. What it reads is removed from the
// socket's pending error too (sock_dequeue_err_skb); where there is no message, that
// error is fetched, or the socket would be ready for ever.
func (m *errorMessage) recv(s *udpSocket) (n int, ok bool) {
	m.name = sockaddr{} // as in recvBatch.recv
	m.iov.Base = &m.buf[0]
	m.iov.SetLen(len(m.buf))
	m.hdr = unix.Msghdr{
		Name:    &m.name[0],
		Namelen: uint32(len(m.name)),
		Iov:     &m.iov,
		Control: (*byte)(unsafe.Pointer(&m.ctrl)),
	}
	m.hdr.SetIovlen(1)
	m.hdr.SetControllen(int(unsafe.Sizeof(m.ctrl)))
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.fd < 0 {
		return 0, false
	}
	r, _, errno := unix.Syscall(unix.SYS_RECVMSG, uintptr(s.fd),
		uintptr(unsafe.Pointer(&m.hdr)), unix.MSG_ERRQUEUE|unix.MSG_DONTWAIT)
	if errno != 0 {
		_, _ = unix.GetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_ERROR)
		return 0, false
	}
	return int(r), true
}

// parse returns the error, and the address of who reports it, if that is known.
func (m *errorMessage) parse() (ee unix.SockExtendedErr, from netip.Addr, ok bool) {
	return parseError(m.ctrl.bytes()[:m.hdr.Controllen])
}

// parseError returns the error in the control data of a message from an error
// queue, and the address of who reports it, if that is known.
func parseError(ctrl []byte) (ee unix.SockExtendedErr, from netip.Addr, ok bool) {
	for b := ctrl; ; {
		level, typ, data, rest, more := nextCmsg(b)
		if !more {
			return ee, from, false
		}
		b = rest
		isErr := level == unix.SOL_IP && typ == unix.IP_RECVERR || level == unix.SOL_IPV6 && typ == unix.IPV6_RECVERR
		if !isErr || len(data) < int(unsafe.Sizeof(ee)) {
			continue
		}
		ee = unix.SockExtendedErr{
			Errno:  binary.NativeEndian.Uint32(data[0:]),
			Origin: data[4],
			Type:   data[5],
			Code:   data[6],
			Info:   binary.NativeEndian.Uint32(data[8:]),
		}
		var offender sockaddr // SO_EE_OFFENDER: it follows
		copy(offender[:], data[unsafe.Sizeof(ee):])
		return ee, offender.addrPort().Addr(), true
	}
}

// report tells the container of an error about a datagram of its own. quoted is
// what is left of the datagram's payload.
func (w *udpWorker) report(s *udpSocket, ee unix.SockExtendedErr, from netip.Addr, quoted []byte) {
	f := w.engine.flowOf(s, &w.err.name)
	if f == nil && ee.Origin == unix.SO_EE_ORIGIN_LOCAL {
		f = s.tooLong.Load()
		if f == nil || f.host.remote.addrPort().Addr() != w.err.name.addrPort().Addr() {
			return
		}
	}
	if f == nil || f.inside.sock != nil {
		return // a socket can't be told
	}
	if f.server.IsValid() {
		w.engine.cfg.Nameserver(f.server, false)
	}
	icmp, ok := translate(ee, w.err.name.v4(), f.guest.Addr().Is4())
	if !ok {
		return
	}
	// Where it is the destination that reports, the container knows that by another
	// name, perhaps: the zero Addr says so. From a loopback it would believe nothing.
	from = from.WithZone("")
	if from != w.err.name.addrPort().Addr().WithZone("") && !from.IsLoopback() && !from.IsUnspecified() &&
		from.Is4() == f.guest.Addr().Is4() {
		icmp.From = from
	}
	w.err.d = stack.Datagram{Src: f.guest, Dst: f.peer, Payload: quoted}
	_ = w.engine.cfg.Stack.WriteUDPError(&w.err.d, icmp)
}

// flowOf returns the flow of an endpoint on a socket, nil if there is none.
func (e *udpEngine) flowOf(s *udpSocket, remote *sockaddr) *flow {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.flows.bySock[sockKey{s.id, *remote}]
}

// translate puts an error of the host's family into the words of the container's:
// as it is where they are the same, by its errno where they are not (DNS) or where
// our own kernel is who reports.
func translate(ee unix.SockExtendedErr, host4, guest4 bool) (e stack.ICMPError, ok bool) {
	switch ee.Origin {
	case unix.SO_EE_ORIGIN_ICMP, unix.SO_EE_ORIGIN_ICMP6:
		if host4 == guest4 {
			return stack.ICMPError{Type: ee.Type, Code: ee.Code, Info: ee.Info}, true
		}
	case unix.SO_EE_ORIGIN_LOCAL:
	default:
		return e, false
	}
	if e, ok = icmpErrorOf(syscall.Errno(ee.Errno), guest4); !ok {
		return e, false
	}
	if ee.Errno == uint32(unix.EMSGSIZE) {
		e.Info = ee.Info
		switch {
		case host4 && !guest4:
			e.Info += ip6HeaderLongerThanV4
		case !host4 && guest4:
			e.Info -= ip6HeaderLongerThanV4
		}
	}
	return e, true
}

// segmentWorks reports whether UDP_SEGMENT may be used under a kernel release.
// Between commits b10b446ce7ad (Linux 7.0-rc1) and 78effd896eee and 5f17ae0f595a
// (7.1-rc5, 7.0.11), drivers that segment by NETIF_F_GSO_PARTIAL sent super-frames of
// equal datagrams with wrong lengths and checksums. No probe tells: loopback is
// not affected, and the device of a flow can change at any time. A distribution
// that has the fix under an older number loses speed only.
func segmentWorks(release string) bool {
	var major, minor, patch int
	rc := math.MaxInt
	_, _ = fmt.Sscanf(release, "%d.%d.%d-rc%d", &major, &minor, &patch, &rc)
	switch {
	case major != 7 || minor > 1:
		return true
	case minor == 0:
		return patch >= 11
	}
	return patch > 0 || rc >= 5
}

// kernelRelease returns the release of the running kernel, as uname(1) -r prints it.
func kernelRelease() string {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return ""
	}
	return unix.ByteSliceToString(u.Release[:])
}

// maxFiles returns how many descriptors the process may have.
func maxFiles() int {
	var l unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &l); err != nil {
		return 1024 // the default of most systems
	}
	return int(min(l.Cur, 1<<30))
}
