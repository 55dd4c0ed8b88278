package forward

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// The kernel path leads to servers that are sockets of the namespace's kernel, and
// let it choose the way back. Some are not, and are found out when a client asks
// for them: the kernel refuses the client, or does not answer. What all of them
// have in common is that the tap reaches them, so that is tried; no list of kinds
// is kept to choose by, only one of reasons to show.
//
// Such a server takes the tap path from then on, until it is looked at again; a host
// behind the namespace, to which the kernel path is silent, does for good.
type detourKind uint8

const (
	// A server with a mark of its own (SO_MARK): its replies leave by the
	// tap, unless the rules that hold SYNs divert them.
	detourMark detourKind = iota
	// A guest with a network stack of its own, at the namespace's address or
	// behind it: gVisor, which takes the address away and reads the tap by a
	// packet socket; Kata, to whose machine the packets are redirected; a
	// container in the container.
	detourGuest
	// There is a listener, and it is not what answers: a NAT in the namespace
	// leads elsewhere, as Docker's does past its proxy.
	detourNAT
)

// detours are the ports of the namespace whose servers are off the kernel path: of
// a guest, in both families. The zero value is empty.
type detours struct {
	count atomic.Int32 // len(seen)
	mu    sync.Mutex   // guards the following field
	seen  map[uint16]detour
}

type detour struct {
	kind   detourKind
	looked time.Time
}

const (
	// detourAge is how long a server is believed to be what it was. To look
	// is cheap; a NAT is found by waiting only, and believed longer.
	detourAge    = 5 * time.Second
	detourAgeNAT = time.Minute
	// silentAfter is when the kernel path to a listener is given up: when a
	// second SYN got no answer either (after 1 s, RFC 6298).
	silentAfter = 1250 * time.Millisecond
	// guestTimeout is how long a guest may take to answer a SYN. One that is
	// there does so at once, or after a retransmission.
	guestTimeout = 3 * time.Second
)

// has reports whether the server at addr is off the path. It looks anew for those
// that were some time ago; listener as in paths.
func (d *detours) has(addr netip.AddrPort, listener func(netip.AddrPort) (uint32, bool)) bool {
	if d.count.Load() == 0 {
		return false
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	x, ok := d.seen[addr.Port()]
	age := detourAge
	if x.kind == detourNAT {
		age = detourAgeNAT
	}
	if !ok || time.Since(x.looked) < age {
		return ok
	}
	mark, listens := listener(addr)
	if x.kind == detourGuest && !listens || x.kind == detourMark && mark != 0 {
		x.looked = time.Now()
		d.seen[addr.Port()] = x
		return true
	}
	delete(d.seen, addr.Port())
	d.count.Add(-1)
	return false
}

func (d *detours) add(port uint16, kind detourKind) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.seen == nil {
		d.seen = make(map[uint16]detour)
	}
	if _, ok := d.seen[port]; !ok {
		d.count.Add(1)
	}
	d.seen[port] = detour{kind: kind, looked: time.Now()}
}

// isElsewhere is asked while the server at the end of a kernel route does not
// answer. It is true if it is not the kernel path that it should be asked by.
func (p *paths) isElsewhere(rule *activeRule, r route, waited time.Duration) bool {
	if r.dst.Addr().IsLoopback() {
		return false
	}
	if r.behind {
		return waited > silentAfter
	}
	mark, listens := p.listener(r.dst)
	if p.noTap {
		switch {
		case !listens: // an address that a guest has taken is silent, it refuses nobody
			rule.takeDetour(Kernel, reasonNoTap(r.dst.Port()))
		case mark != 0:
			rule.takeDetour(Kernel, reasonMark(r.dst.Port(), mark)+", so that no reply comes back, and there is no tap")
		}
		return false
	}
	return !listens || p.marksLost && mark != 0 || waited > silentAfter
}

// mayBeGuest is asked when the namespace's kernel has refused a client. It is true if
// there may be a server all the same.
func (p *paths) mayBeGuest(rule *activeRule, client netip.AddrPort, port uint16) bool {
	if p.kernel == nil || p.leadsToLoopback(rule.rule, client) || p.targets.has(rule.rule.Target.Unmap()) {
		return false
	}
	if p.noTap {
		rule.takeDetour(Kernel, reasonNoTap(port))
		return false
	}
	return true
}

// dialIn connects a new inbound flow of rule, by the kernel path where that leads to
// a server, else by the tap. With a detour it is known not to, and that is the timeout
// of dialDetour.
func (p *paths) dialIn(ctx context.Context, rule *activeRule, client netip.AddrPort, port uint16, detour time.Duration) (flowConn, route, error) {
	routes := p.routes(rule.rule, client, port)
	if detour != 0 {
		return p.dialDetour(ctx, rule, routes, detour)
	}
	patience := dialTimeout
	if p.kernel != nil && !p.noTap && len(routes) > 0 && routes[0].path == Kernel && !routes[0].dst.Addr().IsLoopback() {
		patience = silentAfter
	}
	first, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	c, r, err := dial(first, routes)
	switch {
	case err == nil && r.path == Kernel:
		rule.endDetour()
	case errors.Is(err, syscall.ECONNREFUSED) && p.mayBeGuest(rule, client, port):
		return p.dialDetour(ctx, rule, routes, guestTimeout)
	case err != nil && patience == silentAfter && first.Err() != nil && ctx.Err() == nil:
		return p.dialDetour(ctx, rule, routes, dialTimeout)
	case p.noTap && first.Err() != nil && ctx.Err() == nil && len(routes) > 0 && routes[0].path == Kernel:
		p.isElsewhere(rule, routes[0], patience) // it cannot be helped, but told
	}
	return c, r, err
}

// dialDetour tries the tap where the kernel path did not lead to a server, and says
// why that was if it does.
//
// timeout is dialTimeout if the kernel path is silent, and guestTimeout if it is
// not.
func (p *paths) dialDetour(ctx context.Context, rule *activeRule, routes []route, timeout time.Duration) (flowConn, route, error) {
	var byTap []route
	for _, r := range routes {
		if timeout == dialTimeout {
			// From another port: connection tracking in the namespace
			// remembers the SYN on the kernel path, and another one
			// is out of its window (tcp_in_window in
			// net/netfilter/nf_conntrack_proto_tcp.c).
			r.src = netip.AddrPortFrom(r.src.Addr(), 0)
		}
		r.path, r.dialer = Tap, p.tap
		byTap = append(byTap, r)
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	c, r, err := dial(ctx, byTap)
	if err != nil {
		return nil, r, err
	}
	port := r.dst.Port()
	if r.behind {
		p.targets.set(r.dst.Addr(), false)
		rule.takeDetour(Tap, fmt.Sprintf("the kernel path to %s is silent: a filter in the namespace?", r.dst.Addr()))
		return c, r, nil
	}
	switch mark, listens := p.listener(r.dst); {
	case !listens:
		p.detours.add(port, detourGuest)
		rule.takeDetour(Tap, fmt.Sprintf("no socket of the namespace's kernel listens on port %d, but a guest does", port))
	case p.marksLost && mark != 0:
		p.detours.add(port, detourMark)
		rule.takeDetour(Tap, reasonMark(port, mark))
	case timeout == dialTimeout: // else it has just begun to listen
		p.detours.add(port, detourNAT)
		rule.takeDetour(Tap, fmt.Sprintf("the kernel path to port %d is silent: a NAT in the namespace?", port))
	}
	return c, r, nil
}

func reasonNoTap(port uint16) string {
	return fmt.Sprintf("nobody listened on port %d when the last client came; "+
		"a guest with a network stack of its own can be reached by a tap only, and there is none", port)
}

func reasonMark(port uint16, mark uint32) string {
	return fmt.Sprintf("the server on port %d sets a mark of its own (SO_MARK %#x)", port, mark)
}
