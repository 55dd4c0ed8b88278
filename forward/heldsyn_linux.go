package forward

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/gofwd/gofwd/netnsutil"
	"github.com/gofwd/gofwd/stack"
)

// Outbound TCP on the kernel path. The container's SYN leaves by the tap and is
// held by the stack, as on the tap path; nothing after it does:
//
//	SYN ─► tap ─► stack holds it ─► heldSYNs.serve: connect(2) on the host ─┬─► refused: RST or ICMP to the tap
//	                                                                        └─► connected: the SYN goes back into the tap
//	the namespace's kernel diverts it to a listener of ours ─► accept(2) ─► paired with the dialled socket ─► splicedFlow
//
// The stack's reading thread begins to connect, and one loop of the splicer does all
// the rest: there is no goroutine, and one thread wakes another once.
//
// The listener's handshake is the kernel's own, with all its options. The accepted
// socket has the destination as its own address, which is how the two are paired.
// What diverts the packets are netnsutil's nftables rules, see
// [netnsutil.KernelPath.HoldSYN].
type heldSYNs struct {
	e         *tcpEngine
	loop      *spliceLoop
	listeners []*heldListener
	released  map[flowKey]*heldSYN // of the loop's thread
}

// flowKey is a connection as the container sees it.
type flowKey struct{ src, dst netip.AddrPort }

// releaseTimeout is how long a dialled socket waits for its SYN to be accepted.
// As a rule that is done before the SYN's write(2) ends (see release), or it never
// happens since the container gave up.
const releaseTimeout = 3 * time.Second

// heldBacklog is the backlog of the listeners, cut to net.core.somaxconn of the
// namespace (listen(2)): 4096 since Linux 5.4.
const heldBacklog = 1 << 16

// newHeldSYNs makes the listeners, in a namespace whose tap is there, and diverts
// to them.
func newHeldSYNs(e *tcpEngine, ns *netnsutil.NS, k *netnsutil.KernelPath, tap string) (*heldSYNs, error) {
	h := &heldSYNs{e: e, loop: e.splicer.loops[0], released: make(map[flowKey]*heldSYN)}
	var addrs []netip.AddrPort
	err := ns.Do(func() error {
		for _, is4 := range []bool{true, false} {
			if is4 && !k.IPv4() || !is4 && !k.IPv6() {
				continue
			}
			fd, err := listenTransparent(loopbackOf(is4), k.Mark())
			if err != nil {
				return err
			}
			h.listeners = append(h.listeners, &heldListener{listenFD: listenFD{fd: fd}, h: h, is4: is4})
			sa, err := unix.Getsockname(fd)
			if err != nil {
				return os.NewSyscallError("getsockname", err)
			}
			addrs = append(addrs, addrPortOf(sa))
		}
		return nil
	})
	if err == nil {
		err = k.HoldSYN(tap, addrs...)
	}
	if err != nil {
		for _, hl := range h.listeners {
			unix.Close(hl.fd)
		}
		return nil, fmt.Errorf("hold back the container's SYNs: %w", err)
	}
	for i, hl := range h.listeners {
		if err := hl.enter(h.loop, hl); err != nil {
			for _, rest := range h.listeners[i:] {
				unix.Close(rest.fd) // the others go with the splicer
			}
			return nil, fmt.Errorf("hold back the container's SYNs: %w", err)
		}
	}
	return h, nil
}

// listenTransparent makes a listener in the thread's namespace for connections to
// any address. On the wildcard address it would be in the way of clients that use
// its port as their own.
func listenTransparent(addr netip.Addr, mark uint32) (fd int, err error) {
	family, level, transparent := unix.AF_INET6, unix.SOL_IPV6, unix.IPV6_TRANSPARENT
	if addr.Is4() {
		family, level, transparent = unix.AF_INET, unix.SOL_IP, unix.IP_TRANSPARENT
	}
	if fd, err = unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP); err != nil {
		return -1, os.NewSyscallError("socket", err)
	}
	// Accepted sockets inherit all of them.
	err = setOptions(fd, []option{
		{level, transparent, 1},
		{unix.SOL_SOCKET, unix.SO_MARK, int(mark)},
		{unix.IPPROTO_TCP, unix.TCP_NODELAY, 1},
	})
	if err == nil {
		err = os.NewSyscallError("bind", unix.Bind(fd, toSockaddr(netip.AddrPortFrom(addr, 0))))
	}
	staysLocal(fd)
	// What is accepted has the port that the container called as its own, and
	// would keep the container from listening on it; so it does if the
	// container's server lacks the option, too, and wants every address: see
	// TestContainerBindsAPortOfOurSockets. Not before bind, which would take a
	// port then that others have.
	if err == nil {
		err = setOptions(fd, []option{{unix.SOL_SOCKET, unix.SO_REUSEADDR, 1}})
	}
	if err == nil {
		err = os.NewSyscallError("listen", unix.Listen(fd, heldBacklog))
	}
	if err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// heldSYN is one connection, from the SYN to its end.
type heldSYN struct {
	h     *heldSYNs
	r     *stack.TCPRequest
	begun time.Time
	stop  func() bool // the request's context matters no longer

	attached atomic.Bool // to the loop

	// Of the loop's thread.
	state  heldState
	slot   int32
	events uint32        // seen at the dialled socket
	slow   late          // released, but not accepted
	waited time.Duration // since it was released, about
	flow   splicedFlow   // fds[0] is the dialled socket
}

// heldState is how far a connection of the container's has come:
//
//	heldDialing ─► heldReleased ─► heldEnded: the flow goes on
//	     └───────────────┴───────► heldEnded: refused, or given up
type heldState uint8

const (
	heldDialing heldState = iota
	heldReleased
	heldEnded
)

// serve begins to carry a connection of the container's. It is the stack's
// callback, and does not block.
func (h *heldSYNs) serve(r *stack.TCPRequest) {
	c := &heldSYN{h: h, r: r, begun: time.Now()}
	c.flow = splicedFlow{
		counters: &h.e.outbound, events: h.e.events, ended: c.ended, fds: [2]int{-1, -1},
		flow: Flow{Proto: TCP, Dir: Out, Client: r.Src, Server: r.Dst, Path: Kernel},
	}
	c.slow.expired = c.isSlow
	c.stop = context.AfterFunc(r.Context(), c.giveUp)
	h.e.outbound.begin()
	addrs := h.e.paths.addrs
	if addrs.isDNS(r.Dst) {
		if !h.e.enter() {
			c.refuse(unix.ECONNREFUSED)
			return
		}
		go c.dialDNS()
		return
	}
	to, err := addrs.destination(r.Dst)
	if err == nil {
		c.flow.fds[0], err = h.e.egress.connectTCP(to)
	}
	if err != nil {
		c.refuse(err)
		return
	}
	c.attach()
}

// dialDNS dials a DNS address to the end: it leads to one of several nameservers.
func (c *heldSYN) dialDNS() {
	defer c.h.e.wg.Done()
	ctx, cancel := context.WithCancel(c.r.Context())
	defer cancel()
	defer context.AfterFunc(c.h.e.ctx, cancel)()
	outer, err := c.h.e.dialOut(ctx, c.r.Dst)
	if err == nil {
		c.flow.fds[0], err = duplicate(outer.(*net.TCPConn))
		outer.Close()
	}
	if err != nil {
		c.refuse(err)
		return
	}
	c.attach()
}

// attach lets the loop wait for the dial.
func (c *heldSYN) attach() {
	if err := c.h.loop.attach(c, &c.slot, c.flow.fds[0], socketEvents); err != nil {
		unix.Close(c.flow.fds[0])
		c.refuse(err)
		return
	}
	c.attached.Store(true)
	if c.r.Context().Err() != nil { // and giveUp was too early
		c.giveUp()
	}
}

// ready is called when the dial has come to something, and for what the dialled
// socket sees until it is part of the flow.
func (c *heldSYN) ready(l *spliceLoop, _ int, events uint32) {
	c.events |= events
	if c.state != heldDialing {
		return
	}
	if events&(unix.EPOLLERR|unix.EPOLLHUP) != 0 {
		if err := connectError(c.flow.fds[0]); err != nil {
			c.endDial(l, err)
			return
		}
	}
	if events&unix.EPOLLOUT != 0 {
		c.release(l)
	}
}

// endDial ends a dial that came to nothing.
func (c *heldSYN) endDial(l *spliceLoop, err error) {
	c.state = heldEnded
	l.freeSlot(c.slot)
	unix.Close(c.flow.fds[0])
	c.refuse(err)
}

// refuse tells the container.
func (c *heldSYN) refuse(err error) {
	c.stop()
	c.h.e.outbound.end()
	c.r.Reject(err)
	if c.debug() {
		c.log().Debug("outbound connection refused", "err", err)
	}
}

// release gives the SYN back to the container's kernel. Over loopback the
// handshake is done before that returns, as a rule.
func (c *heldSYN) release(l *spliceLoop) {
	if c.r.Context().Err() != nil { // a newer SYN has its ports
		c.drop(l)
		return
	}
	h := c.h
	if old := h.released[c.key()]; old != nil { // the container has reused its port before we noticed
		old.drop(l)
	}
	c.state = heldReleased
	h.released[c.key()] = c
	l.late.add(&c.slow)
	if err := c.r.Release(); err != nil {
		c.drop(l)
		return
	}
	for _, hl := range h.listeners {
		if hl.is4 == c.r.Src.Addr().Is4() {
			hl.accept(l)
		}
	}
}

func (c *heldSYN) key() flowKey { return flowKey{c.r.Src, c.r.Dst} }

// isSlow is called when nothing was accepted for some time.
func (c *heldSYN) isSlow() {
	if c.waited += lateAfter; c.waited < releaseTimeout {
		c.h.loop.late.add(&c.slow)
	} else {
		c.drop(c.h.loop)
	}
}

// giveUp ends a connection that the container has given up.
func (c *heldSYN) giveUp() {
	if !c.attached.Load() {
		return
	}
	c.h.loop.do(func() {
		if c.state != heldEnded {
			c.drop(c.h.loop)
		}
	})
}

// drop closes the dialled socket.
func (c *heldSYN) drop(l *spliceLoop) {
	c.leave()
	l.freeSlot(c.slot)
	closeSocket(c.flow.fds[0], true)
	c.h.e.outbound.end()
	if c.debug() {
		c.log().Debug("outbound connection given up")
	}
}

// leave ends the request.
func (c *heldSYN) leave() {
	if c.state == heldReleased {
		delete(c.h.released, c.key())
		c.slow.remove()
	}
	c.state = heldEnded
	c.stop()
	c.r.Done()
}

func (c *heldSYN) shutdown(l *spliceLoop) {
	if c.state == heldDialing {
		c.endDial(l, unix.ECONNREFUSED)
	} else {
		c.drop(l)
	}
}

// accepted pairs c with the socket that the kernel made of its SYN.
func (c *heldSYN) accepted(l *spliceLoop, fd int) {
	c.leave()
	f := &c.flow
	f.fds[1], f.slot = fd, c.slot
	l.passSlot(c.slot, f)
	if f.start(l, [2]uint32{c.events, 0}); f.dead {
		return
	}
	if err := l.watch(fd, socketEvents, f.slot, 1); err != nil {
		f.end(l, true, err.Error())
	}
}

// ended is the end of the flow.
func (c *heldSYN) ended(f *splicedFlow, how string) {
	c.h.e.outbound.end()
	if c.debug() {
		c.log().Debug("connection ended", "in", f.in(), "out", f.out(),
			"duration", time.Since(c.begun).Round(time.Millisecond), "how", how)
	}
}

func (c *heldSYN) debug() bool {
	return c.h.e.log.Enabled(context.Background(), slog.LevelDebug)
}

func (c *heldSYN) log() *slog.Logger {
	return c.h.e.log.With("client", c.r.Src, "to", c.r.Dst, "path", Kernel)
}

// heldListener is a listener to which SYNs are diverted.
type heldListener struct {
	listenFD
	h   *heldSYNs
	is4 bool
}

// ready accepts what was not there yet when its SYN had been released.
func (hl *heldListener) ready(l *spliceLoop, _ int, _ uint32) {
	for range acceptBatch {
		if !hl.accept(l) {
			return
		}
	}
}

// accept accepts one connection, and is false if there is none.
func (hl *heldListener) accept(l *spliceLoop) bool {
	fd, sa, err := unix.Accept4(hl.fd, unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC)
	switch {
	case err == nil:
		hl.pair(l, fd, addrPortOf(sa))
	case errors.Is(err, unix.EAGAIN):
		return false
	case exhausted(err):
		refused := func(fd int, src netip.AddrPort) {
			if c := hl.find(fd, src); c != nil {
				c.drop(l) // its dialled socket is a descriptor for the next one
			}
		}
		if !l.s.refuse(hl.fd, refused) {
			time.Sleep(time.Millisecond)
			return false
		}
	}
	return true
}

// pair gives an accepted socket to the connection that it is of.
func (hl *heldListener) pair(l *spliceLoop, fd int, src netip.AddrPort) {
	if c := hl.find(fd, src); c != nil {
		c.accepted(l, fd)
	} else {
		closeSocket(fd, true) // too late
	}
}

// find returns the connection that an accepted socket is of, nil if it is over.
func (hl *heldListener) find(fd int, src netip.AddrPort) *heldSYN {
	sa, err := unix.Getsockname(fd)
	if err != nil {
		return nil
	}
	return hl.h.released[flowKey{src, addrPortOf(sa)}]
}
