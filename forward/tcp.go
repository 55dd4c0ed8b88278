package forward

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// dialTimeout bounds how long a client waits for a container that doesn't
// answer: as long as Linux tries with tcp_syn_retries=4.
const dialTimeout = 31 * time.Second

// tcpEngine carries TCP, both ways: connections that its listeners accept, and
// those that the container begins (outbound.go). On the tap path each is a goroutine
// from accept to the end, and a second one while it is relayed; on the kernel path the
// splicer's threads carry it, without one (kernelin_linux.go, heldsyn_linux.go).
type tcpEngine struct {
	paths *paths
	dns   *nameservers
	// dialHost connects to dst in the host's namespace.
	dialHost func(ctx context.Context, dst netip.AddrPort) (flowConn, error)
	egress   *egress
	splicer  *splicer
	held     *heldSYNs // nil if what the container begins takes the tap
	// fromKernel reports whether a SYN can be held: it is that of a socket of
	// the namespace's kernel. guestSYNs counts those for which it was not.
	fromKernel func(src, dst netip.AddrPort) bool
	guestSYNs  atomic.Int64
	log        *slog.Logger
	events     *eventHub
	outbound   flowCounters // of connections that no rule made
	bufs       bufferPool

	ctx    context.Context // ends with close
	cancel context.CancelFunc
	wg     sync.WaitGroup

	mu        sync.Mutex // guards the following fields
	closed    bool
	listeners map[*tcpListener]struct{}
	ofRule    map[*activeRule][]*tcpListener // one with Share may be of several
	relays    map[*relay]struct{}
}

// newTCPEngine returns an engine that owns the splicer.
func newTCPEngine(p *paths, dns *nameservers, s *splicer, g *egress, log *slog.Logger) *tcpEngine {
	e := &tcpEngine{
		paths: p, dns: dns, dialHost: g.dialTCP, egress: g, splicer: s, log: log, events: new(eventHub),
		listeners: make(map[*tcpListener]struct{}), ofRule: make(map[*activeRule][]*tcpListener), relays: make(map[*relay]struct{}),
	}
	e.ctx, e.cancel = context.WithCancel(context.Background())
	return e
}

// streamListener is a socket that listens for a rule of TCP: a *net.TCPListener
// or a *net.UnixListener.
type streamListener interface {
	net.Listener
	syscall.Conn
}

// tcpListener is one port that is listened on, and where it leads.
type tcpListener struct {
	tcpSocket
	to atomic.Pointer[tcpTargets]
}

// tcpSocket is a [*net.TCPListener], or an [*acceptor].
type tcpSocket interface {
	io.Closer
	syscall.Conn
	Addr() net.Addr
}

// listen accepts connections from ln, which the engine owns, until unlisten or
// close.
func (e *tcpEngine) listen(ln streamListener, rule *activeRule, port uint16) {
	l := &tcpListener{tcpSocket: ln}
	l.to.Store(leadTo(&tcpTarget{rule: rule, port: port}))
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closed {
		ln.Close()
		return
	}
	e.listeners[l] = struct{}{}
	e.ofRule[rule] = append(e.ofRule[rule], l)
	if tcp, ok := ln.(*net.TCPListener); ok && rule.rule.Dir == In && e.paths.kernel != nil {
		if a, err := newAcceptor(e, tcp, &l.to); err == nil {
			l.tcpSocket = a
			return
		}
	}
	e.wg.Add(1)
	go e.acceptLoop(l, ln)
}

// listenersOf calls fn for each listener of rule.
func (e *tcpEngine) listenersOf(rule *activeRule, fn func(*tcpListener)) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, l := range e.ofRule[rule] {
		fn(l)
	}
}

// retarget makes the listeners of one rule those of another that listens on the
// same ports: clients notice nothing, not even those in the backlog.
func (e *tcpEngine) retarget(from, to *activeRule) {
	shift := to.rule.TargetPorts.First - from.rule.TargetPorts.First
	e.mu.Lock()
	defer e.mu.Unlock()
	e.ofRule[to] = e.ofRule[from]
	delete(e.ofRule, from)
	for _, l := range e.ofRule[to] {
		old := l.to.Load()
		next := &tcpTarget{rule: to, port: old.of(from).port + shift}
		l.to.Store(leadTo(append(old.without(from), next)...))
	}
}

// join makes the listeners of one rule also those of another that listens on the
// same ports.
func (e *tcpEngine) join(with, rule *activeRule) {
	shift := rule.rule.TargetPorts.First - with.rule.TargetPorts.First
	e.mu.Lock()
	defer e.mu.Unlock()
	e.ofRule[rule] = slices.Clone(e.ofRule[with])
	for _, l := range e.ofRule[rule] {
		old := l.to.Load()
		next := &tcpTarget{rule: rule, port: old.of(with).port + shift}
		l.to.Store(leadTo(append(slices.Clone(old.list), next)...))
	}
}

// unlisten closes the listeners of rule, but those that it shares; its connections
// go on.
func (e *tcpEngine) unlisten(rule *activeRule) {
	e.closeListeners(rule, func(*tcpListener) bool { return true })
}

// unlistenPort closes the listeners of one port of rule.
func (e *tcpEngine) unlistenPort(rule *activeRule, port uint16) {
	e.closeListeners(rule, func(l *tcpListener) bool { return l.to.Load().of(rule).port == port })
}

// closeListeners closes those listeners of rule that are chosen. To close one is
// to wait for its accept loop, which must not keep others waiting.
func (e *tcpEngine) closeListeners(rule *activeRule, chosen func(*tcpListener) bool) {
	var listeners, stay []*tcpListener
	e.mu.Lock()
	for _, l := range e.ofRule[rule] {
		if !chosen(l) {
			stay = append(stay, l)
		} else if others := l.to.Load().without(rule); len(others) > 0 {
			l.to.Store(leadTo(others...))
		} else {
			delete(e.listeners, l)
			listeners = append(listeners, l)
		}
	}
	if e.ofRule[rule] = stay; stay == nil {
		delete(e.ofRule, rule)
	}
	e.mu.Unlock()
	closeListeners(listeners)
}

// closeListeners closes some at a time: to wait for each by itself takes thousands
// longer, and the loops that serve connections have to get on meanwhile.
func closeListeners(listeners []*tcpListener) {
	for some := range slices.Chunk(listeners, 64) {
		for _, l := range some {
			if a, ok := l.tcpSocket.(*acceptor); ok {
				a.stop()
			}
		}
		for _, l := range some {
			l.Close()
		}
	}
}

// endRelays ends the connections of rule with RST.
func (e *tcpEngine) endRelays(rule *activeRule) {
	for _, r := range e.relaysOf(rule) {
		r.abort(endRemoved)
	}
	e.splicer.abort(func(f *splicedFlow) bool { return f.rule == rule }, endRemoved)
}

// acceptLoop accepts until the listener is closed. No other error ends it: what
// accept(2) reports is either about one connection or passes.
func (e *tcpEngine) acceptLoop(l *tcpListener, ln streamListener) {
	defer e.wg.Done()
	const minDelay, maxDelay = 5 * time.Millisecond, time.Second
	delay := minDelay
	var order acceptOrder
	for {
		c, err := ln.Accept()
		switch {
		case err == nil:
			delay = minDelay
			if e.enter() {
				go e.serve(l.to.Load().order(), c.(flowConn), order.next(clientOf(c).Addr()))
			} else {
				abort(c)
			}
		case errors.Is(err, net.ErrClosed):
			return
		default:
			// No more descriptors, or no memory: the clients wait in
			// the backlog.
			if delay == minDelay {
				e.log.Warn("connections have to wait", "forward", l.Addr(), "err", err)
			}
			select {
			case <-time.After(delay):
			case <-e.ctx.Done():
			}
			delay = min(2*delay, maxDelay)
		}
	}
}

// serve carries one accepted connection.
func (e *tcpEngine) serve(turns tcpTurns, c flowConn, turn *turn) {
	defer e.wg.Done()
	defer turn.done()
	to := turns.begin(clientOf(c).Addr())
	e.serveTurns(to, turns, c, turn, 0)
}

// serveTurns carries a connection that to has admitted, in the direction of the
// rule, or what is left of its turns, if to takes no connection. If nobody does, RST
// is the nearest to "refused" that there is: the handshake with the client is done.
// detour is for to, as for dialIn.
func (e *tcpEngine) serveTurns(to *tcpTarget, left tcpTurns, c flowConn, turn *turn, detour time.Duration) {
	for to != nil {
		served := false
		if to.rule.rule.Dir == Out {
			served = e.serveOut(to, c)
		} else {
			served = e.serveIn(to, c, len(left) == 0, turn, detour)
		}
		to.rule.end()
		if served {
			return
		}
		to.fail()
		to, detour = left.admit(clientOf(c).Addr()), 0
	}
	abort(c)
}

// serveIn carries a connection from the host into the namespace. It is false if
// there was no server to take it, who gets less time if it isn't the last that can.
func (e *tcpEngine) serveIn(to *tcpTarget, c flowConn, last bool, turn *turn, detour time.Duration) (served bool) {
	client := clientOf(c)
	patience := dialTimeout
	if !last {
		patience = lateAfter
	}
	ctx, cancel := context.WithTimeout(to.rule.ctx, patience)
	turn.wait()
	inner, r, err := e.paths.dialIn(ctx, to.rule, client, to.port, detour)
	cancel()
	turn.done()
	log := e.log.With("client", client, "forward", c.LocalAddr(), "path", r.path)
	if err != nil {
		log.Debug("connection refused", "err", err)
		return false
	}
	to.rule.served(client.Addr(), r.src.Addr())
	if to.rule.rule.ProxyV2 {
		if err := writeProxyHeader(inner, c); err != nil {
			abort(inner)
			log.Debug("connection refused", "err", err)
			return false
		}
	}
	flow := Flow{Proto: TCP, Dir: In, Forward: to.rule.id, Client: client, Server: r.dst, Path: r.path}
	if r.src != flow.Client {
		flow.Seen = r.src
	}
	e.relay(&relay{outer: c, inner: inner, rule: to.rule, counters: &to.rule.flowCounters, flow: flow},
		log.With("source", r.src, "server", r.dst))
	return true
}

// clientOf returns the address of the client. That of a UNIX socket is a process
// of the host, without an address or port.
func clientOf(c net.Conn) netip.AddrPort {
	if a, ok := c.RemoteAddr().(*net.TCPAddr); ok {
		return unmapped(a.AddrPort())
	}
	return netip.AddrPortFrom(loopbackOf(true), 0)
}

// relay runs r to its end and writes the connection log.
func (e *tcpEngine) relay(r *relay, log *slog.Logger) {
	r.bufs = &e.bufs
	r.flow.Started = time.Now()
	outer, ok1 := r.outer.(*net.TCPConn)
	inner, ok2 := r.inner.(*net.TCPConn)
	if ok1 && ok2 && !r.rule.watchesIdle() && e.splice(r, outer, inner, log) {
		return
	}
	e.mu.Lock()
	if e.closed || r.rule != nil && r.rule.ctx.Err() != nil {
		e.mu.Unlock()
		r.abort(endShutdown)
		return
	}
	e.relays[r] = struct{}{}
	e.mu.Unlock()

	e.events.flow(FlowOpened, r.flow)
	r.run()

	e.mu.Lock()
	delete(e.relays, r)
	e.mu.Unlock()
	closed := r.flow // which others may be reading, see flows
	closed.BytesIn, closed.BytesOut = r.in, r.out
	e.events.flow(FlowClosed, closed)
	log.Debug("connection ended", "in", r.in, "out", r.out, "duration", time.Since(r.flow.Started).Round(time.Millisecond), "how", r.ending)
}

// splice is relay for two sockets of the kernel. It is false if that can't be, and
// nothing has happened then.
func (e *tcpEngine) splice(r *relay, outer, inner *net.TCPConn, log *slog.Logger) bool {
	ending := make(chan string, 1)
	f := &splicedFlow{
		rule: r.rule, counters: r.counters, flow: r.flow, events: e.events,
		ended: func(_ *splicedFlow, how string) { ending <- how },
	}
	if !e.splicer.splice(outer, inner, f) {
		return false
	}
	how := <-ending
	log.Debug("connection ended", "in", f.in(), "out", f.out(), "duration", time.Since(r.flow.Started).Round(time.Millisecond), "how", how)
	return true
}

// enter counts a goroutine that close waits for; it is false after close.
func (e *tcpEngine) enter() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closed {
		return false
	}
	e.wg.Add(1)
	return true
}

// close closes the listeners, ends every connection with RST, and waits for all
// goroutines. It is idempotent.
func (e *tcpEngine) close() {
	e.mu.Lock()
	e.closed = true
	listeners, relays := e.listeners, e.relays
	e.listeners, e.relays = nil, nil
	clear(e.ofRule)
	e.mu.Unlock()
	e.cancel()
	closeListeners(slices.Collect(maps.Keys(listeners)))
	for r := range relays {
		r.abort(endShutdown)
	}
	e.splicer.close()
	e.wg.Wait()
}
