package forward

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/gofwd/gofwd/netnsutil"
	"github.com/gofwd/gofwd/stack"
)

// A namespace that has a network already, such as that of a container on a bridge,
// gets no tap: whatever comes in takes the kernel path, and what goes out is not
// ours.

// inboundNS is such a namespace.
type inboundNS struct {
	ns    *netnsutil.NS
	path  *kernelPath
	local localDialer
	addrs atomic.Pointer[[]netip.Addr] // the namespace's own, without loopback and link-local ones
	udp   *udpEngine                   // nil without UDP; set before the first client

	mu      sync.Mutex // guards the following fields
	clients map[netip.Addr]int
	ports   map[uint16]bool
}

func openInboundNS(ns *netnsutil.NS, log *slog.Logger) (*inboundNS, error) {
	if err := ns.Configure(netnsutil.Link{}); err != nil { // loopback, which all of it goes over
		return nil, err
	}
	path, err := openKernelPath(ns, log)
	if err != nil {
		return nil, err
	}
	in := &inboundNS{ns: ns, path: path, local: localDialer{ns}, clients: make(map[netip.Addr]int), ports: make(map[uint16]bool)}
	if err := in.refresh(); err != nil {
		path.close()
		return nil, err
	}
	return in, nil
}

// refresh reads the namespace's addresses.
func (in *inboundNS) refresh() error {
	prefixes, err := in.ns.Addrs()
	if err != nil {
		return err
	}
	var addrs []netip.Addr
	for _, p := range prefixes {
		if a := p.Addr(); !a.IsLoopback() && !a.IsLinkLocalUnicast() {
			addrs = append(addrs, a)
		}
	}
	in.addrs.Store(&addrs)
	if in.udp != nil {
		in.udp.endFlows(func(f *flow) bool { return f.inside.sock != nil && !slices.Contains(addrs, f.guest.Addr()) })
	}
	return nil
}

func (in *inboundNS) guests() []netip.Addr { return *in.addrs.Load() }

// listenUDP is udpConfig.Inside: a socket bound to src, which may be anybody's
// address, and connected to dst, so that the client may have another flow from the
// same port. Where the port is taken, it gets another one.
//
// Where there is a tap, UDP takes that. It keeps the client's address as well, costs
// the same for single datagrams and less for many, which it joins
// (BenchmarkUDPInbound), and a new client costs it neither a socket nor two changes of
// the namespace's routes.
func (in *inboundNS) listenUDP(src, dst netip.AddrPort) (*net.UDPConn, error) {
	if dst.Addr().IsLoopback() {
		return in.local.listenUDP(src, dst)
	}
	if err := in.admit(src.Addr(), dst); err != nil {
		return nil, err
	}
	var fd int
	err := in.ns.Do(func() (err error) {
		fd, err = transparentUDP(src, dst)
		if errors.Is(err, unix.EADDRINUSE) {
			fd, err = transparentUDP(netip.AddrPortFrom(src.Addr(), 0), dst)
		}
		return err
	})
	if err != nil {
		in.release(src.Addr())
		return nil, err
	}
	file := os.NewFile(uintptr(fd), "udp")
	defer file.Close() // net.FilePacketConn duplicates
	c, err := net.FilePacketConn(file)
	if err != nil {
		in.release(src.Addr())
		return nil, err
	}
	return c.(*net.UDPConn), nil
}

// transparentUDP makes a socket, on a thread in the namespace.
func transparentUDP(src, dst netip.AddrPort) (int, error) {
	family, transparent := unix.AF_INET6, option{unix.SOL_IPV6, unix.IPV6_TRANSPARENT, 1}
	if dst.Addr().Is4() {
		family, transparent = unix.AF_INET, option{unix.SOL_IP, unix.IP_TRANSPARENT, 1}
	}
	fd, err := unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, os.NewSyscallError("socket", err)
	}
	if err = setOptions(fd, []option{transparent, {unix.SOL_SOCKET, unix.SO_REUSEADDR, 1}}); err == nil {
		err = os.NewSyscallError("bind", unix.Bind(fd, toSockaddr(src)))
	}
	if err == nil {
		err = os.NewSyscallError("connect", unix.Connect(fd, toSockaddr(dst)))
	}
	if err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// admit sends the replies that a server at dst has for client to our sockets, and
// counts a flow of that client.
func (in *inboundNS) admit(client netip.Addr, dst netip.AddrPort) error {
	in.mu.Lock()
	if !in.ports[dst.Port()] {
		if err := in.path.AddUDPPort(dst.Port()); err != nil {
			in.mu.Unlock()
			return err
		}
		in.ports[dst.Port()] = true
	}
	evicted, err := in.path.AddUDPClient(client, dst.Addr())
	if err == nil {
		in.clients[client]++
	}
	in.mu.Unlock()
	if evicted.IsValid() {
		in.udp.endFlows(func(f *flow) bool { return f.inside.sock != nil && f.peer.Addr() == evicted })
	}
	return err
}

// released is udpConfig.Released.
func (in *inboundNS) released(src, dst netip.Addr) {
	if !dst.IsLoopback() { // else it was not admitted
		in.release(src)
	}
}

// release lets the client's routing go with its last flow.
func (in *inboundNS) release(client netip.Addr) {
	in.mu.Lock()
	defer in.mu.Unlock()
	if in.clients[client]--; in.clients[client] > 0 {
		return
	}
	delete(in.clients, client)
	_ = in.path.RemoveUDPClient(client) // at worst a route too many, until Close
}

// aliasDialer is for clients with a link-local address, which means nothing in the
// namespace: they get the host alias.
type aliasDialer struct {
	dialer
	addrs *hostMap
}

// DialTCP dials from the alias.
func (d aliasDialer) DialTCP(ctx context.Context, src, dst netip.AddrPort) (flowConn, error) {
	return d.dialer.DialTCP(ctx, netip.AddrPortFrom(d.addrs.aliasOf(dst.Addr().Is4()), src.Port()), dst)
}

// noTap is the tap of a UDP engine whose flows all have a socket in the namespace.
type noTap struct{}

var errNoTap = errors.New("there is no tap")

func (noTap) WriteUDP(*stack.Datagram) error                       { return errNoTap }
func (noTap) WriteUDPError(*stack.Datagram, stack.ICMPError) error { return errNoTap }

// startInbound is startStack without a stack.
func (f *Forwarder) startInbound() error {
	in, err := openInboundNS(f.cfg.NetNS, f.log)
	if err != nil {
		return fmt.Errorf("forward without a tap: %w", err)
	}
	f.inbound = in
	prefixes, err := f.cfg.NetNS.Addrs()
	if err != nil {
		return err
	}
	dns := newNameservers(nil)
	addrs := &hostMap{
		guest: in.guests(), guests: in.guests,
		alias:              []netip.Addr{defaultAlias4, defaultAlias6},
		loopbackToLoopback: f.cfg.HostLoopbackToNSLoopback,
		mainAddr:           netnsutil.MainAddr, nameserver: dns.next,
	}
	f.plan = &networkPlan{link: netnsutil.Link{Addrs: prefixes}, addrs: *addrs}
	kernel := in.path.dialer
	f.paths = &paths{
		addrs: addrs, kernel: kernel, local: in.local, tap: aliasDialer{kernel, addrs}, noTap: true,
		listener: in.path.listener, marksLost: true,
	}
	splicer, err := newSplicer(f.cfg.NetNS)
	if err != nil {
		return err
	}
	f.tcp = newTCPEngine(f.paths, dns, splicer, nil, f.log)
	f.tcp.events = &f.events
	if f.cfg.NoUDP {
		return nil
	}
	f.udp, err = newUDPEngine(udpConfig{
		Stack: noTap{}, Source: addrs.source, Destination: addrs.destination, Guest: addrs.guestOf,
		Inside: in.listenUDP, Released: in.released, LoopbackInside: addrs.loopbackToLoopback,
		MTU: maxMTU, Outbound: &f.tcp.outbound, Logger: f.log,
	})
	in.udp = f.udp
	return err
}

// Refresh reads the namespace's addresses again, with [Config].InboundOnly: new
// clients are sent to those, and rules with a target among them take the kernel
// path. Connections to an address that is gone end, since the kernel sends nothing
// from it; those that were on their way there are led anew. All others go on.
func (f *Forwarder) Refresh() error {
	if f.inbound == nil {
		return nil
	}
	before := f.inbound.guests()
	if err := f.inbound.refresh(); err != nil {
		return err
	}
	rules, _ := f.rules.list()
	for _, r := range rules {
		r.setPath(f.paths.describe(r.rule))
	}
	after := f.inbound.guests()
	f.tcp.endAt(func(server netip.Addr) bool {
		return slices.Contains(before, server) && !slices.Contains(after, server)
	})
	return nil
}

// endAt ends what leads to an address that is gone.
func (e *tcpEngine) endAt(gone func(netip.Addr) bool) {
	e.mu.Lock()
	relays := slices.Collect(maps.Keys(e.relays))
	e.mu.Unlock()
	for _, r := range relays {
		if gone(r.flow.Server.Addr()) {
			r.abort(endAddrGone)
		}
	}
	for _, l := range e.splicer.loops {
		l.do(func() { l.endAt(gone) })
	}
}

func (l *spliceLoop) endAt(gone func(netip.Addr) bool) {
	for _, w := range l.all() {
		switch w := w.(type) {
		case *splicedFlow:
			if !w.dead && gone(w.flow.Server.Addr()) {
				w.end(l, true, endAddrGone)
			}
		case *kernelConn:
			if len(w.routes) > 0 && gone(w.routes[0].dst.Addr()) {
				w.closeInner()
				w.lead(l)
			}
		}
	}
}
