package forward

import (
	"cmp"
	"context"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Inbound TCP on the kernel path: accepted, connected and relayed on one thread
// of the splicer.
//
//	acceptor ─► accept(2) ─► paths.routes ─┬─► kernelConn: connect(2) in the namespace ─► splicedFlow
//	                                       └─► a goroutine of tcpEngine, for the tap

// acceptor is a listening socket whose connections one of the splicer's threads
// accepts, and connects: for a server of the namespace's own kernel connect(2) is the
// whole handshake. So a client's connections reach it in their order, by which some
// servers tell them apart (iperf3 --bidir). What lasts is then spread over all threads.
// It has the part of [net.TCPListener] that a [tcpListener] needs.
type acceptor struct {
	listenFD
	e      *tcpEngine
	to     *atomic.Pointer[tcpTargets]
	addr   net.Addr
	warned atomic.Int64 // when, in Unix seconds
}

// connecter is a dialer whose sockets are the kernel's: connect begins to connect
// one, on a thread in the namespace.
type connecter interface {
	connect(src, dst netip.AddrPort) (fd int, err error)
}

// acceptBatch is how many connections a loop accepts before it looks after the
// others that it has.
const acceptBatch = 32

// newAcceptor takes a listener over, unless there is an error.
func newAcceptor(e *tcpEngine, ln *net.TCPListener, to *atomic.Pointer[tcpTargets]) (*acceptor, error) {
	fd, err := duplicate(ln)
	if err != nil {
		return nil, err
	}
	a := &acceptor{listenFD: listenFD{fd: fd}, e: e, to: to, addr: ln.Addr()}
	if err := a.enter(e.splicer.pick(), a); err != nil {
		unix.Close(fd)
		return nil, err
	}
	ln.Close() // out of the Go runtime's poller
	return a, nil
}

// Close stops accepting, and waits for that: not on a loop's thread. It is
// idempotent.
func (a *acceptor) Close() error {
	a.stop()
	<-a.closed
	return nil
}

// Addr returns the address that is listened on.
func (a *acceptor) Addr() net.Addr { return a.addr }

// SyscallConn lets socket options be set.
func (a *acceptor) SyscallConn() (syscall.RawConn, error) { return rawFD(a.fd), nil }

// ready accepts.
func (a *acceptor) ready(l *spliceLoop, _ int, _ uint32) {
	for range acceptBatch {
		if a.closing.Load() || !a.accept(l) {
			return
		}
	}
}

// accept accepts one connection. It is false if there is none.
func (a *acceptor) accept(l *spliceLoop) (more bool) {
	fd, sa, err := unix.Accept4(a.fd, unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC)
	switch {
	case err == nil:
		a.serve(l, fd, addrPortOf(sa))
	case err == unix.EAGAIN:
		return false
	case exhausted(err):
		a.warn("connection refused", err)
		count := func(int, netip.AddrPort) { a.to.Load().list[0].rule.refused.Add(1) }
		if !l.s.refuse(a.fd, count) {
			time.Sleep(time.Millisecond) // the client waits in the backlog
			return false
		}
	default: // about one connection, which has gone already: accept(2)
	}
	return true
}

// warn logs that there is no room for connections, once a second at most.
func (a *acceptor) warn(msg string, err error) {
	now := time.Now().Unix()
	if last := a.warned.Load(); now != last && a.warned.CompareAndSwap(last, now) {
		a.e.log.Warn(msg, "forward", a.addr, "err", err, "hint", Hint(err))
	}
}

// serve takes an accepted connection to where it leads.
func (a *acceptor) serve(l *spliceLoop, fd int, client netip.AddrPort) {
	turns := a.to.Load().order()
	client = unmapped(client)
	to := turns.begin(client.Addr())
	if to == nil {
		closeSocket(fd, true)
		return
	}
	c := &kernelConn{a: a, to: to, left: turns, client: client, begun: time.Now(), inner: -1}
	c.flow = splicedFlow{events: a.e.events, ended: c.ended, fds: [2]int{fd, -1}}
	c.slow.expired = func() { c.isSlow(l) }
	c.slot = l.newSlot(c)
	if err := l.watch(fd, socketEvents, c.slot, 0); err != nil {
		c.fail(l, err)
		return
	}
	c.lead(l)
}

// kernelConn is an accepted connection on its way to the server.
type kernelConn struct {
	a      *acceptor
	to     *tcpTarget
	left   tcpTurns // the targets to try after it
	client netip.AddrPort
	begun  time.Time
	led    time.Time // to to
	routes []route   // that are left; the first is being tried
	route  route     // the one that led to the server
	why    error     // the first route was no good

	inner  int // socket that connects, -1 if none
	slot   int32
	events [2]uint32 // seen meanwhile
	slow   late
	flow   splicedFlow
}

// lead begins to lead c to its target.
func (c *kernelConn) lead(l *spliceLoop) {
	rule := c.to.rule
	c.led = time.Now()
	c.flow.rule, c.flow.counters = rule, &rule.flowCounters
	if rule.rule.ProxyV2 || rule.watchesIdle() {
		c.leave(l, 0) // for what a relay does, and a loop does not
		return
	}
	c.routes, c.why = c.a.e.paths.routes(rule.rule, c.client, c.to.port), nil
	c.try(l)
}

// giveUp leads c to the next target, or ends it if there is none.
func (c *kernelConn) giveUp(l *spliceLoop) {
	if errors.Is(c.why, unix.ECONNREFUSED) && c.a.e.paths.mayBeGuest(c.to.rule, c.client, c.to.port) {
		c.leave(l, guestTimeout)
		return
	}
	c.to.fail()
	if !c.elsewhere(l) {
		c.fail(l, cmp.Or(c.why, errNoAddress))
	}
}

// elsewhere leads c to the next target. It is false if there is none, and nothing
// has happened then.
func (c *kernelConn) elsewhere(l *spliceLoop) bool {
	next := c.left.admit(c.client.Addr())
	if next == nil {
		return false
	}
	c.closeInner()
	c.to.rule.end()
	c.to = next
	c.lead(l)
	return true
}

// try begins to connect by the next route.
func (c *kernelConn) try(l *spliceLoop) {
	for len(c.routes) > 0 {
		r := c.routes[0]
		d, ok := r.dialer.(connecter)
		if !ok {
			c.leave(l, 0)
			return
		}
		var err error
		if c.inner, err = d.connect(r.src, r.dst); err == nil {
			c.events[1] = 0
			if err = l.watch(c.inner, socketEvents, c.slot, 1); err == nil {
				l.late.add(&c.slow)
				return
			}
			closeSocket(c.inner, true)
			c.inner = -1
		}
		if exhausted(err) {
			c.a.warn("connection refused", err)
		}
		if !c.next(err) {
			break
		}
	}
	c.giveUp(l)
}

// next goes on to the next route, if that may lead to a server; err is why this one
// does not.
func (c *kernelConn) next(err error) bool {
	c.routes, c.why = c.routes[1:], cmp.Or(c.why, err)
	return errors.Is(err, unix.ECONNREFUSED)
}

// ready is called for either socket while the inner one connects.
func (c *kernelConn) ready(l *spliceLoop, side int, events uint32) {
	c.events[side] |= events
	const gone = unix.EPOLLERR | unix.EPOLLHUP
	switch {
	case side == 0 && events&gone != 0:
		if err := connectError(c.flow.fds[0]); err != nil { // the client did not wait
			c.fail(l, err)
		}
	case side == 1 && events&gone != 0:
		err := connectError(c.inner)
		if err == nil {
			return // stale, of the socket before
		}
		c.closeInner()
		if !c.next(err) {
			c.giveUp(l)
			return
		}
		c.try(l)
	case side == 1 && events&unix.EPOLLOUT != 0:
		if len(c.left) > 0 && c.to.rule.ctx.Err() != nil && c.elsewhere(l) {
			return // the rule was removed meanwhile
		}
		c.slow.remove()
		c.route, c.routes = c.routes[0], nil
		c.to.rule.endDetour()
		c.to.rule.served(c.client.Addr(), c.route.src.Addr())
		c.flow.fds[1], c.flow.slot = c.inner, c.slot
		c.flow.flow = Flow{
			Proto: TCP, Dir: In, Forward: c.to.rule.id, Client: c.client, Server: c.route.dst, Path: c.route.path,
		}
		if c.route.src != c.client {
			c.flow.flow.Seen = c.route.src
		}
		l.passSlot(c.slot, &c.flow)
		c.flow.start(l, c.events)
	}
}

// isSlow is called when connecting has taken some time, again and again.
func (c *kernelConn) isSlow(l *spliceLoop) {
	if time.Since(c.begun) > dialTimeout {
		c.fail(l, os.NewSyscallError("connect", unix.ETIMEDOUT))
		return
	}
	if c.to.rule.ctx.Err() != nil { // it was removed
		if !c.elsewhere(l) {
			c.fail(l, net.ErrClosed)
		}
		return
	}
	if c.a.e.paths.isElsewhere(c.to.rule, c.routes[0], time.Since(c.led)) {
		c.leave(l, dialTimeout)
		return
	}
	if len(c.left) > 0 {
		c.to.fail()
		if c.elsewhere(l) {
			return
		}
	}
	l.late.add(&c.slow)
}

// leave hands the client's connection to a goroutine, for a path that is not
// ours; detour as for dialIn.
func (c *kernelConn) leave(l *spliceLoop, detour time.Duration) {
	c.closeInner()
	l.freeSlot(c.slot)
	fd := c.flow.fds[0]
	_ = unix.EpollCtl(l.epfd, unix.EPOLL_CTL_DEL, fd, nil)
	if !c.a.e.enter() {
		closeSocket(fd, true)
		c.to.rule.end()
		return
	}
	go c.a.e.serveLeft(c.to, c.left, fd, detour)
}

func (c *kernelConn) closeInner() {
	c.slow.remove()
	if c.inner >= 0 {
		closeSocket(c.inner, true)
		c.inner = -1
	}
}

// fail ends it. The handshake with the client is done: RST is the nearest to
// "refused" that there is.
func (c *kernelConn) fail(l *spliceLoop, err error) {
	c.closeInner()
	closeSocket(c.flow.fds[0], true)
	l.freeSlot(c.slot)
	c.to.rule.end()
	if c.debug() {
		c.log().Debug("connection refused", "err", err)
	}
}

func (c *kernelConn) shutdown(l *spliceLoop) { c.fail(l, net.ErrClosed) }

// ended is the end of the flow.
func (c *kernelConn) ended(f *splicedFlow, how string) {
	c.to.rule.end()
	if c.debug() {
		c.log().Debug("connection ended", "source", c.route.src, "server", c.route.dst, "in", f.in(), "out", f.out(),
			"duration", time.Since(c.begun).Round(time.Millisecond), "how", how)
	}
}

func (c *kernelConn) debug() bool {
	return c.a.e.log.Enabled(context.Background(), slog.LevelDebug)
}

func (c *kernelConn) log() *slog.Logger {
	return c.a.e.log.With("client", c.client, "forward", c.a.addr, "path", Kernel)
}

// serveLeft is [tcpEngine.serveTurns] for a connection that a loop has accepted.
func (e *tcpEngine) serveLeft(to *tcpTarget, left tcpTurns, fd int, detour time.Duration) {
	defer e.wg.Done()
	file := os.NewFile(uintptr(fd), "tcp")
	c, err := net.FileConn(file)
	if err != nil { // no descriptors: RST, as for those that were not accepted
		_ = unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
		to.rule.refused.Add(1)
	}
	file.Close()
	if err != nil {
		to.rule.end()
		e.log.Warn("connection refused", "err", err)
		return
	}
	e.serveTurns(to, left, c.(*net.TCPConn), nil, detour)
}

// addrPortOf returns the address of a TCP peer.
func addrPortOf(sa unix.Sockaddr) netip.AddrPort {
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port))
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(sa.Addr), uint16(sa.Port))
	}
	return netip.AddrPort{}
}
