package forward

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"slices"
	"sync"
	"syscall"

	"github.com/gofwd/gofwd/stack"
)

// flowConn is either end of a TCP flow: a host socket, a transparent socket in
// the namespace, or a connection of the stack.
type flowConn interface {
	net.Conn
	CloseRead() error
	CloseWrite() error
}

// dialer is a way into the namespace: it connects to dst there with src as the
// address that the server sees.
type dialer interface {
	DialTCP(ctx context.Context, src, dst netip.AddrPort) (flowConn, error)
}

// tapDialer is the path by the stack at the far end of the tap.
type tapDialer struct{ stack *stack.Stack }

// DialTCP is [stack.Stack.DialTCP].
func (d tapDialer) DialTCP(ctx context.Context, src, dst netip.AddrPort) (flowConn, error) {
	c, err := d.stack.DialTCP(ctx, src, dst)
	if err != nil {
		return nil, err // no typed nil
	}
	return c, nil
}

// paths are the ways into the namespace, and the choice between them.
type paths struct {
	addrs *hostMap
	// tap is the stack at the far end of the tap. With noTap there is none,
	// and tap is for the clients that kernel can't serve as they are.
	tap   dialer
	noTap bool
	// kernel is transparent sockets in the namespace; nil where there can
	// be none, and noKernel says why.
	kernel   dialer
	noKernel string
	// listener returns the mark (SO_MARK) of the socket of the namespace's
	// kernel that listens at an address, and whether there is one; nil
	// without kernel. See netnsutil.SockDiag.
	listener func(netip.AddrPort) (mark uint32, ok bool)
	// marksLost says that no reply comes back to kernel of a server with a
	// mark.
	marksLost bool
	detours   detours
	// behind is transparent sockets in the namespace that lead to hosts
	// behind it, such as containers on a bridge; nil where there can be none,
	// and isBehind tells their addresses.
	behind   dialer
	isBehind func(netip.Addr) bool
	targets  targetsBehind
	// local is ordinary sockets in the namespace, for its loopback: no
	// packet to or from 127.0.0.1 may cross the tap. It takes no source.
	local dialer
}

// route is one way for one flow.
type route struct {
	path     Datapath
	dialer   dialer
	src, dst netip.AddrPort
	behind   bool // dialer is that of paths
}

// targetsBehind are the targets of rules that are hosts behind the namespace. The
// zero value is empty.
type targetsBehind struct {
	mu   sync.Mutex // guards the following field
	seen map[netip.Addr]bool
}

// set notes whether addr is behind.
func (t *targetsBehind) set(addr netip.Addr, behind bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	switch {
	case !behind:
		delete(t.seen, addr)
	case t.seen == nil:
		t.seen = map[netip.Addr]bool{addr: true}
	default:
		t.seen[addr] = true
	}
}

func (t *targetsBehind) has(addr netip.Addr) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.seen[addr]
}

// routes chooses the path, the source and the destination for a new inbound
// flow of rule, from client to port in the namespace. The first route is the
// one to take; where nothing listens at its end, a server of the other family
// may at that of the second.
func (p *paths) routes(rule Rule, client netip.AddrPort, port uint16) []route {
	var targets []netip.Addr
	is4 := client.Addr().Unmap().Is4()
	switch {
	case rule.Target.IsValid():
		targets = []netip.Addr{rule.Target.Unmap()}
	case p.leadsToLoopback(rule, client):
		targets = []netip.Addr{loopbackOf(is4), loopbackOf(!is4)}
	default:
		targets = []netip.Addr{p.addrs.guestOf(is4), p.addrs.guestOf(!is4)}
	}
	var routes []route
	for _, target := range targets {
		if !target.IsValid() {
			continue
		}
		r := route{src: p.addrs.source(client, target), dst: netip.AddrPortFrom(target, port)}
		switch {
		case target.IsLoopback():
			r.path, r.dialer = Kernel, p.local
		case p.kernelReaches(r):
			r.path, r.dialer = Kernel, p.kernel
		case p.targets.has(target) && !hasScope(r.src.Addr()):
			r.path, r.dialer, r.behind = Kernel, p.behind, true
		case p.tap == nil:
			continue
		default:
			r.path, r.dialer = Tap, p.tap
			if p.noTap {
				r.path = Kernel
			}
		}
		routes = append(routes, r)
	}
	return routes
}

// leadsToLoopback reports whether rule leads client to the namespace's loopback.
func (p *paths) leadsToLoopback(rule Rule, client netip.AddrPort) bool {
	if rule.Target.IsValid() {
		return rule.Target.IsLoopback()
	}
	return p.addrs.loopbackToLoopback && client.Addr().Unmap().IsLoopback()
}

// kernelReaches reports whether the kernel path is one for a route. What is marked
// stays in the namespace, so it leads only to the namespace's own addresses.
func (p *paths) kernelReaches(r route) bool {
	return p.kernel != nil && slices.Contains(p.addrs.ownAddrs(), r.dst.Addr()) &&
		!hasScope(r.src.Addr()) &&
		(p.noTap || !p.detours.has(r.dst, p.listener))
}

// hasScope reports whether addr means something only together with the link that
// it was seen on; as seen from the namespace, that is the tap.
func hasScope(addr netip.Addr) bool { return addr.Is6() && addr.IsLinkLocalUnicast() }

// describe returns the path that the flows of rule take, and why it is not the
// best one.
func (p *paths) describe(rule Rule) (Datapath, string) {
	switch {
	case rule.Dir == Out:
		return Kernel, ""
	case rule.Proto == UDP && !p.noTap:
		return Tap, ""
	case p.tap == nil && p.noTap:
		return Kernel, "clients on the host's loopback alone are forwarded"
	case rule.Target.IsValid() && rule.Target.Unmap().IsLoopback():
		return Kernel, "the namespace's loopback sees every client as " + loopbackOf(rule.Target.Unmap().Is4()).String()
	case p.kernel == nil:
		return Tap, p.noKernel
	case p.leadsBehind(rule):
		return Kernel, ""
	case rule.Target.IsValid() && !slices.Contains(p.addrs.ownAddrs(), rule.Target.Unmap()):
		path, reason := Tap, rule.Target.String()+" is not an address of the container itself"
		if p.noTap {
			path, reason = Kernel, reason+", and sees the host alias"
		}
		return path, reason
	}
	return Kernel, ""
}

// leadsBehind finds out whether the target of a rule is a host behind the
// namespace. That is asked when the rule is made, since for Podman's network of all
// bridges a container's is there before its ports are published.
func (p *paths) leadsBehind(rule Rule) bool {
	target := rule.Target.Unmap()
	if p.behind == nil || !target.IsValid() {
		return false
	}
	behind := !slices.Contains(p.addrs.ownAddrs(), target) && p.isBehind(target)
	p.targets.set(target, behind)
	return behind
}

var errNoAddress = errors.New("the container has no address that fits")

// dial connects a new inbound flow by the first of its routes that has a server
// at its end, and returns that route. The error is that of the first route.
func dial(ctx context.Context, routes []route) (flowConn, route, error) {
	first := errNoAddress
	for i, r := range routes {
		c, err := r.dial(ctx)
		if err == nil {
			return c, r, nil
		}
		if i == 0 {
			first = err
		}
		if !errors.Is(err, syscall.ECONNREFUSED) {
			break
		}
	}
	return nil, route{}, first
}

// dial connects. A client whose port is taken, since it uses the same for two
// forwards to one server, keeps its address and gets another port.
func (r route) dial(ctx context.Context) (flowConn, error) {
	c, err := r.dialer.DialTCP(ctx, r.src, r.dst)
	if errors.Is(err, syscall.EADDRINUSE) || errors.Is(err, syscall.EADDRNOTAVAIL) {
		return r.dialer.DialTCP(ctx, netip.AddrPortFrom(r.src.Addr(), 0), r.dst)
	}
	return c, err
}
