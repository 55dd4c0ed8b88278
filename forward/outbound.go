package forward

import (
	"context"
	"net"
	"net/netip"
	"slices"
	"syscall"
	"time"

	"github.com/gofwd/gofwd/stack"
)

// request is a connection that the container wants to open on the tap path, its
// SYN held until it is answered: see [stack.TCPRequest].
type request struct {
	src, dst netip.AddrPort
	ctx      context.Context
	accept   func(context.Context) (flowConn, error)
	reject   func(error)
}

// fromNamespace is the stack's callback for TCP. It does not block.
func (e *tcpEngine) fromNamespace(r *stack.TCPRequest) {
	if e.held != nil {
		if e.fromKernel(r.Src, r.Dst) {
			e.held.serve(r)
			return
		}
		e.guestSYNs.Add(1)
	}
	go e.serveRequest(request{
		src: r.Src, dst: r.Dst, ctx: r.Context(), reject: r.Reject,
		accept: func(ctx context.Context) (flowConn, error) {
			c, err := r.Accept(ctx)
			if err != nil {
				return nil, err // no typed nil
			}
			return c, nil
		},
	})
}

// serveRequest carries a connection from the namespace to the world on the tap
// path: it dials first, and answers the container as the dial was answered.
func (e *tcpEngine) serveRequest(r request) {
	if !e.enter() {
		r.reject(syscall.ECONNREFUSED)
		return
	}
	defer e.wg.Done()
	e.outbound.begin()
	defer e.outbound.end()
	ctx, cancel := context.WithCancel(r.ctx)
	defer cancel()
	defer context.AfterFunc(e.ctx, cancel)()

	log := e.log.With("client", r.src, "to", r.dst)
	outer, err := e.dialOut(ctx, r.dst)
	if err != nil {
		r.reject(err)
		log.Debug("outbound connection refused", "err", err)
		return
	}
	inner, err := r.accept(ctx)
	if err != nil {
		abort(outer)
		log.Debug("outbound connection given up", "err", err)
		return
	}
	flow := Flow{Proto: TCP, Dir: Out, Client: r.src, Server: r.dst, Path: Tap}
	e.relay(&relay{outer: outer, inner: inner, counters: &e.outbound, flow: flow}, log.With("path", Tap))
}

// dialOut dials what the container knows as dst. A nameserver that can't be
// reached is passed over for the next, until all were tried.
func (e *tcpEngine) dialOut(ctx context.Context, dst netip.AddrPort) (flowConn, error) {
	addrs := e.paths.addrs
	for tried := []netip.Addr(nil); ; {
		to, err := addrs.destination(dst)
		if err != nil {
			return nil, err
		}
		c, err := e.dialHost(ctx, to)
		if !addrs.isDNS(dst) || ctx.Err() != nil {
			return c, err
		}
		if dst.Port() == 53 { // that there is no DNS over TLS says nothing about DNS
			e.dns.report(to.Addr(), err == nil)
		}
		if tried = append(tried, to.Addr()); err == nil {
			return c, nil
		}
		if next, noNext := e.dns.next(); noNext != nil || slices.Contains(tried, next) {
			return nil, err
		}
	}
}

// serveOut carries a connection from the namespace's loopback to the host's. It is
// false if there was no server to take it.
func (e *tcpEngine) serveOut(to *tcpTarget, c flowConn) (served bool) {
	client := clientOf(c)
	log := e.log.With("client", client, "forward", c.LocalAddr(), "path", Kernel)
	outer, err := e.dialRule(to, client)
	if err != nil {
		log.Debug("connection refused", "err", err)
		return false
	}
	flow := Flow{Proto: TCP, Dir: Out, Forward: to.rule.id, Client: client, Server: remoteAddr(outer), Path: Kernel}
	e.relay(&relay{outer: outer, inner: c, rule: to.rule, counters: &to.rule.flowCounters, flow: flow}, log)
	return true
}

// dialRule dials where a rule out of the container leads.
func (e *tcpEngine) dialRule(to *tcpTarget, client netip.AddrPort) (flowConn, error) {
	path := to.rule.rule.TargetSocket
	if path == "" {
		return e.dialLoopback(to.rule.ctx, to.rule.rule.Target, client.Addr().Is4(), to.port)
	}
	ctx, cancel := context.WithTimeout(to.rule.ctx, dialTimeout)
	defer cancel()
	c, err := new(net.Dialer).DialContext(ctx, "unix", path)
	if err != nil {
		return nil, err
	}
	return c.(*net.UnixConn), nil
}

// dialLoopback dials target on the host; its loopback where target is zero, of
// the client's family first.
func (e *tcpEngine) dialLoopback(ctx context.Context, target netip.Addr, is4 bool, port uint16) (flowConn, error) {
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	if target.IsValid() {
		return e.dialHost(ctx, netip.AddrPortFrom(target, port))
	}
	c, err := e.dialHost(ctx, netip.AddrPortFrom(loopbackOf(is4), port))
	if err != nil {
		if other, err := e.dialHost(ctx, netip.AddrPortFrom(loopbackOf(!is4), port)); err == nil {
			return other, nil
		}
	}
	return c, err
}

// keepAlive finds peers that have gone without a word, within four minutes: soon
// enough not to collect them, and rarely enough not to keep a radio awake.
var keepAlive = net.KeepAliveConfig{Enable: true, Idle: 2 * time.Minute, Interval: 30 * time.Second, Count: 4}
