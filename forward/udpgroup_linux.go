package forward

import (
	"errors"
	"fmt"
	"hash/maphash"
	"net"
	"net/netip"
	"os"
	"strconv"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/gofwd/gofwd/stack"
)

// Multicast groups: the engine's part. Which ports there are, and on which
// interface, multicast_linux.go decides.
//
// A UDP socket hears one port, so a group has a socket for each. It is bound to the
// group rather than to all addresses: the port may well be that of a program on the
// host (avahi's 5353), which goes on hearing all it did. What the socket hears goes
// to the tap without a flow: what answers makes one.
//
// The container's own datagrams to a group leave by the group's interface, and by
// the socket of the port that they came from if there is one: an answer of mDNS
// must come from port 5353 (RFC 6762 §6). What the host's other members of the
// group hear of them (IP_MULTICAST_LOOP), so do our sockets; that echo is dropped.

// joinedGroup is a Group at work. Its fields but the Group are written by the goroutine
// of listeningGroups alone, under the engine's mutex; others read them under that.
type joinedGroup struct {
	Group
	ifindex int // where it is joined; 0 is nowhere
	sockets map[uint16]*udpSocket
}

// udpGroups are the groups of an engine. Nil is none.
type udpGroups struct {
	engine *udpEngine
	all    []*joinedGroup // immutable

	mu     sync.Mutex // guards the following fields
	seed   maphash.Seed
	echoes []said                // by hash
	scopes map[netip.Addr]uint32 // of link-local senders
}

// said is a datagram that the container sent to a group, and when.
type said struct {
	hash uint64
	at   int64
}

const (
	// echoSlots is for how many datagrams an echo is known. It comes as soon as
	// they are sent, which is in batches of up to 64 super-frames of up to 64
	// datagrams.
	echoSlots = sendMsgs * maxSegments
	// echoAge is how old a datagram of an echo may be, in seconds.
	echoAge = 2
	// maxScopes bounds what is known of link-local senders.
	maxScopes = 1024
)

func newUDPGroups(e *udpEngine, groups []*joinedGroup) *udpGroups {
	if len(groups) == 0 {
		return nil
	}
	return &udpGroups{
		engine: e, all: groups, seed: maphash.MakeSeed(),
		echoes: make([]said, echoSlots), scopes: make(map[netip.Addr]uint32),
	}
}

// wayLocked returns how a datagram of the container's from its port to dst leaves:
// by which socket, nil for any, and which interface, 0 for the kernel's choice. The
// first of several interfaces that the group was joined on is taken.
func (u *udpGroups) wayLocked(port uint16, dst netip.AddrPort) (*udpSocket, uint32) {
	if u == nil {
		return nil, 0
	}
	for _, g := range u.all {
		if g.Addr != dst.Addr() || g.ifindex == 0 {
			continue
		}
		s := g.sockets[port]
		if s != nil && u.engine.flows.bySock[sockKey{s.id, s.remote(dst)}] != nil {
			s = nil // that of another address of the container's
		}
		return s, uint32(g.ifindex)
	}
	return nil, 0
}

// remember keeps what the container sends to a group.
func (u *udpGroups) remember(d *stack.Datagram) {
	u.mu.Lock()
	defer u.mu.Unlock()
	now, p := u.engine.now(), d.Payload
	for {
		n := len(p)
		if d.SegmentSize > 0 {
			n = min(n, d.SegmentSize)
		}
		h := u.hash(d.Dst, p[:n])
		u.echoes[h%echoSlots] = said{h, now}
		if p = p[n:]; len(p) == 0 {
			return
		}
	}
}

// isEcho reports whether the container has just sent that very datagram.
func (u *udpGroups) isEcho(sender netip.Addr, to netip.AddrPort, payload []byte) bool {
	h := u.hash(to, payload)
	u.mu.Lock()
	e := u.echoes[h%echoSlots]
	u.mu.Unlock()
	return e.hash == h && u.engine.now()-e.at <= echoAge && u.engine.cfg.Local(sender)
}

func (u *udpGroups) hash(to netip.AddrPort, payload []byte) uint64 {
	return maphash.Bytes(u.seed, payload) ^ maphash.Comparable(u.seed, keyOf(to))
}

// learn remembers on which interface a link-local sender is.
func (u *udpGroups) learn(sender netip.Addr, ifindex uint32) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if _, known := u.scopes[sender]; !known && len(u.scopes) == maxScopes {
		clear(u.scopes) // they will be heard again
	}
	u.scopes[sender] = ifindex
}

// zone is hostMap.zone.
func (u *udpGroups) zone(sender netip.Addr) string {
	if u == nil {
		return ""
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	if ifindex := u.scopes[sender]; ifindex != 0 {
		return strconv.Itoa(int(ifindex))
	}
	return ""
}

// hear hands on what a group's socket heard.
func (w *udpWorker) hear(s *udpSocket, from *sockaddr, payload []byte) {
	u, sender := w.engine.groups, from.addrPort()
	to := netip.AddrPortFrom(s.joined.Addr, s.port)
	if a := sender.Addr(); a.Is6() && a.IsLinkLocalUnicast() {
		u.learn(a, from.scope())
	}
	w.heard = stack.Datagram{Src: w.engine.cfg.Source(sender, to.Addr()), Dst: to, TTL: w.opt.ttl, TOS: w.opt.tos}
	for {
		// Several in one: network cards join them, and the kernel returns to us in
		// one piece what we have sent so.
		n := len(payload)
		if w.opt.segment > 0 {
			n = min(n, w.opt.segment)
		}
		w.heard.Payload, payload = payload[:n], payload[n:]
		if !u.isEcho(sender.Addr(), to, w.heard.Payload) {
			_ = w.engine.cfg.Stack.WriteUDP(&w.heard) // the stack counts its errors
			w.engine.cfg.Outbound.bytesIn.Add(int64(n))
		}
		if len(payload) == 0 {
			break
		}
	}
	w.heard = stack.Datagram{}
}

// join hears a group on a port of the container, from now on.
func (u *udpGroups) join(g *joinedGroup, port uint16) error {
	e := u.engine
	e.mu.Lock()
	defer e.mu.Unlock()
	fd, err := openGroup(g, port)
	if errors.Is(err, unix.EADDRINUSE) {
		// Our own listeners are no reason not to.
		defer e.shareLocked(port)()
		fd, err = openGroup(g, port)
	}
	if err != nil {
		return err
	}
	s := &udpSocket{fd: fd, v6: g.Addr.Is6(), joined: g, port: port}
	if err := e.enterSocketLocked(s, udpListener); err != nil {
		return err
	}
	g.sockets[port] = s
	u.reroute(g)
	return nil
}

// reroute ends the flows to a group: the next datagram takes the best way.
func (u *udpGroups) reroute(g *joinedGroup) {
	u.engine.flows.removeAll(func(f *flow) bool { return f.peer.Addr() == g.Addr })
}

// leave ends what join began.
func (u *udpGroups) leave(g *joinedGroup, port uint16) {
	u.engine.mu.Lock()
	defer u.engine.mu.Unlock()
	u.reroute(g)
	if s := g.sockets[port]; s != nil && s.fd >= 0 {
		u.engine.closeSocketLocked(s)
	}
	delete(g.sockets, port)
}

// move leaves a group on all ports, to join it on another interface.
func (u *udpGroups) move(g *joinedGroup, ifindex int) {
	for _, port := range u.ports(g) {
		u.leave(g, port)
	}
	u.engine.mu.Lock()
	defer u.engine.mu.Unlock()
	g.ifindex = ifindex
	u.reroute(g)
}

// ports returns the ports on which a group is heard.
func (u *udpGroups) ports(g *joinedGroup) []uint16 {
	u.engine.mu.Lock()
	defer u.engine.mu.Unlock()
	ports := make([]uint16, 0, len(g.sockets))
	for port := range g.sockets {
		ports = append(ports, port)
	}
	return ports
}

// usesPort reports whether a group is heard on a port.
func (u *udpGroups) usesPort(port uint16) bool {
	if u == nil {
		return false
	}
	u.engine.mu.Lock()
	defer u.engine.mu.Unlock()
	for _, g := range u.all {
		if g.sockets[port] != nil {
			return true
		}
	}
	return false
}

// shareLocked lets a group's socket have the port of a listener of ours, until the
// function that it returns is called.
func (e *udpEngine) shareLocked(port uint16) (done func()) {
	var sharing []*udpSocket
	for _, s := range e.sockets {
		if !s.listens() || s.inside || s.to[0].rule.rule.Share {
			continue
		}
		if bound, _, _ := s.bound(); bound.Port() == port {
			s.setReusePort(true)
			sharing = append(sharing, s)
		}
	}
	return func() {
		for _, s := range sharing {
			s.setReusePort(false)
		}
	}
}

// openGroup makes a socket that has joined g on its interface, and is bound to the
// group and port. Others may have the port too, as is the custom for multicast; all
// of them hear it (__udp4_lib_mcast_deliver).
func openGroup(g *joinedGroup, port uint16) (int, error) {
	fd, err := (*egress)(nil).openUDP(g.Addr.Is4(), false)
	if err != nil {
		return -1, err
	}
	if err := prepareGroup(fd, g, port); err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

func prepareGroup(fd int, g *joinedGroup, port uint16) error {
	options := []option{{unix.SOL_SOCKET, unix.SO_REUSEADDR, 1}, {unix.SOL_SOCKET, unix.SO_REUSEPORT, 1}}
	if g.Addr.Is4() {
		options = append(options, option{unix.SOL_IP, unix.IP_RECVTTL, 1})
	} else {
		options = append(options, option{unix.SOL_IPV6, unix.IPV6_V6ONLY, 1}, option{unix.SOL_IPV6, unix.IPV6_RECVHOPLIMIT, 1})
	}
	if err := setOptions(fd, options); err != nil {
		return err
	}
	ifi, err := net.InterfaceByIndex(g.ifindex)
	if err != nil {
		return unix.ENODEV
	}
	if err := unix.BindToDevice(fd, ifi.Name); err != nil {
		return os.NewSyscallError("SO_BINDTODEVICE", err)
	}
	var name unix.Sockaddr
	if g.Addr.Is4() {
		name = &unix.SockaddrInet4{Addr: g.Addr.As4(), Port: int(port)}
		err = unix.SetsockoptIPMreqn(fd, unix.SOL_IP, unix.IP_ADD_MEMBERSHIP,
			&unix.IPMreqn{Multiaddr: g.Addr.As4(), Ifindex: int32(g.ifindex)})
	} else {
		name = &unix.SockaddrInet6{Addr: g.Addr.As16(), Port: int(port), ZoneId: uint32(g.ifindex)}
		err = unix.SetsockoptIPv6Mreq(fd, unix.SOL_IPV6, unix.IPV6_JOIN_GROUP,
			&unix.IPv6Mreq{Multiaddr: g.Addr.As16(), Interface: uint32(g.ifindex)})
	}
	if err != nil {
		return fmt.Errorf("join on %s: %w", ifi.Name, err)
	}
	return os.NewSyscallError("bind", unix.Bind(fd, name))
}
