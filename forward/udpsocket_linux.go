package forward

import (
	"net"
	"net/netip"
	"os"
	"strconv"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// udpBuffer is the size of the buffers of a UDP socket, in bytes: a burst at
// 10 Gb/s of 5 ms. The kernel cuts it to net.core.rmem_max and wmem_max, and charges
// only what is queued.
const udpBuffer = 7 << 20

// udpSocket is a UDP socket that is never connected: one serves all peers of an
// endpoint in the namespace, as a NAT with endpoint-independent mapping does
// (RFC 4787), so that STUN and hole punching work; and it outlives a change of the
// host's addresses, unlike one whose source address connect(2) has fixed.
//
// Four kinds have the same fields: listeners (to is set), the container's own ports
// on the host (binding is set), ears for multicast groups (joined is set), and ends
// of single flows in the namespace.
type udpSocket struct {
	// Immutable.
	id     int32
	v6     bool // an IPv6 socket, though it may carry IPv4
	inside bool // made in the namespace: what arrives here goes out
	egress bool // bound by it
	poll   *poller
	// Of a socket that has joined a group: the group, and the container's port.
	joined *joinedGroup
	port   uint16

	// The engine's mutex guards these.
	to      []udpTarget // of a listener: where it leads
	turn    int         // of the targets
	binding *bindingKey
	flows   int

	// mu is read-locked while fd is in use, and locked to close it.
	mu        sync.RWMutex
	fd        int                  // -1 once closed
	noSegment atomic.Bool          // UDP_SEGMENT failed: the device lacks checksum offload
	pinned    atomic.Bool          // datagrams leave with DF
	broadcast atomic.Bool          // SO_BROADCAST is set
	group     atomic.Bool          // has sent to a multicast or broadcast address: anyone may answer
	tooLong   atomic.Pointer[flow] // may have had EMSGSIZE
}

// adoptUDP takes the socket out of conn, and closes conn: its descriptor would
// wake the runtime's poller beside ours for every datagram.
func adoptUDP(conn *net.UDPConn) (int, error) {
	defer conn.Close()
	raw, err := conn.SyscallConn()
	if err != nil {
		return -1, err
	}
	var fd int
	var operr error
	if err := raw.Control(func(s uintptr) {
		fd, operr = unix.FcntlInt(s, unix.F_DUPFD_CLOEXEC, 0)
	}); err != nil {
		return -1, err
	}
	if operr != nil {
		return -1, os.NewSyscallError("fcntl", operr)
	}
	return fd, nil
}

// remote is ap, zone included, as the kernel names it on the socket.
func (s *udpSocket) remote(ap netip.AddrPort) sockaddr {
	a := sockaddrOf(ap, s.v6)
	if zone := ap.Addr().Zone(); zone != "" {
		a.setScope(zoneIndex(s.fd, zone))
	}
	return a
}

// zoneIndex returns the index of the interface that an IPv6 zone names, 0 if there
// is none. Any socket will do as fd.
func zoneIndex(fd int, zone string) uint32 {
	if req, err := unix.NewIfreq(zone); err == nil && unix.IoctlIfreq(fd, unix.SIOCGIFINDEX, req) == nil {
		return req.Uint32()
	}
	n, _ := strconv.ParseUint(zone, 10, 32)
	return uint32(n)
}

// udpUse is what a UDP socket is for; each use takes options beyond those before it.
type udpUse uint8

const (
	udpQueries  udpUse = iota // single datagrams
	udpStreams                // super-frames, too
	udpListener               // from whom an answer must leave by the address that was asked
)

// prepareUDP sets the options of a UDP socket. A listener is prepared before it is
// bound: what arrives before that lacks the address that it was sent to.
//
// With each datagram comes its traffic class. On an IPv6 socket the options of IPv4
// are for the IPv4 datagrams: their errors, their traffic class, and IP_PKTINFO
// because IPV6_RECVPKTINFO gives the address in the header, which may be a
// broadcast address.
func prepareUDP(fd int, use udpUse) error {
	v6 := isV6(fd)
	options := []option{{unix.SOL_IP, unix.IP_RECVERR, 1}, {unix.SOL_IP, unix.IP_RECVTOS, 1}}
	if v6 {
		options = append(options, option{unix.SOL_IPV6, unix.IPV6_RECVERR, 1}, option{unix.SOL_IPV6, unix.IPV6_RECVTCLASS, 1})
	}
	if use >= udpStreams {
		options = append(options, option{unix.SOL_SOCKET, unix.SO_RCVBUF, udpBuffer}, option{unix.SOL_SOCKET, unix.SO_SNDBUF, udpBuffer})
	}
	if use >= udpListener {
		// Without IP_MULTICAST_ALL groups that others on the host have
		// joined are not a listener's.
		options = append(options, option{unix.SOL_IP, unix.IP_PKTINFO, 1}, option{unix.SOL_IP, unix.IP_MULTICAST_ALL, 0})
		if v6 {
			options = append(options, option{unix.SOL_IPV6, unix.IPV6_RECVPKTINFO, 1}, option{unix.SOL_IPV6, unix.IPV6_MULTICAST_ALL, 0})
		}
	}
	if err := setOptions(fd, options); err != nil {
		return err
	}
	if use >= udpStreams {
		// Linux 5.0; without it datagrams come one by one.
		_ = unix.SetsockoptInt(fd, unix.SOL_UDP, unix.UDP_GRO, 1)
	}
	return nil
}

// pin sets DF on what is sent from now on, or leaves it to the kernel, which then
// fragments what is too long for the path.
func (s *udpSocket) pin(on bool) {
	if s.pinned.Load() == on {
		return
	}
	s.pinned.Store(on)
	v4, v6 := unix.IP_PMTUDISC_WANT, unix.IPV6_PMTUDISC_WANT
	if on {
		v4, v6 = unix.IP_PMTUDISC_DO, unix.IPV6_PMTUDISC_DO
	}
	_ = unix.SetsockoptInt(s.fd, unix.SOL_IP, unix.IP_MTU_DISCOVER, v4)
	if s.v6 {
		_ = unix.SetsockoptInt(s.fd, unix.SOL_IPV6, unix.IPV6_MTU_DISCOVER, v6)
	}
}

// allowBroadcast sets SO_BROADCAST, and reports whether it was not set before.
func (s *udpSocket) allowBroadcast() bool {
	if s.broadcast.Swap(true) {
		return false
	}
	return unix.SetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_BROADCAST, 1) == nil
}

// setReusePort lets another socket of ours have the same port, or no longer.
func (s *udpSocket) setReusePort(on bool) {
	value := 0
	if on {
		value = 1
	}
	_ = unix.SetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_REUSEPORT, value)
}

// bound returns the address of the socket, unmapped, and whether it takes IPv4 and
// IPv6.
func (s *udpSocket) bound() (addr netip.AddrPort, v4, v6 bool) {
	sa, err := unix.Getsockname(s.fd)
	if err != nil {
		return addr, false, false
	}
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port)), true, false
	case *unix.SockaddrInet6:
		addr = netip.AddrPortFrom(netip.AddrFrom16(sa.Addr).Unmap(), uint16(sa.Port))
		if addr.Addr().Is4() {
			return addr, true, false
		}
		only6, err := unix.GetsockoptInt(s.fd, unix.SOL_IPV6, unix.IPV6_V6ONLY)
		return addr, err == nil && only6 == 0 && addr.Addr().IsUnspecified(), true
	}
	return addr, false, false
}

// isV6 reports the family of a socket.
func isV6(fd int) bool {
	domain, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DOMAIN)
	return err == nil && domain == unix.AF_INET6
}

// close closes the socket, once whoever uses it is through.
func (s *udpSocket) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fd < 0 {
		return
	}
	_ = s.poll.remove(s.fd)
	_ = unix.Close(s.fd)
	s.fd = -1
}
