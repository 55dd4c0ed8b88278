package forward

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/gofwd/gofwd/netnsutil"
)

// Outbound TCP on the kernel path. The container's SYN leaves by the tap and is
// held by the stack, as on the tap path; nothing after it does:
//
//	SYN ─► tap ─► stack holds it ─► heldSYNs.serve: dial on the host ─┬─► refused: RST or ICMP to the tap
//	                                                                  └─► connected: the SYN goes back into the tap
//	the namespace's kernel diverts it to a listener of ours ─► accept(2) ─► paired with the dialled socket ─► splicedFlow
//
// The listener's handshake is the kernel's own, with all its options. The accepted
// socket has the destination as its own address, which is how the two are paired.
// What diverts the packets are netnsutil's nftables rules, see
// [netnsutil.KernelPath.HoldSYN].
type heldSYNs struct {
	e         *tcpEngine
	listeners []*heldListener

	mu       sync.Mutex // guards the following field
	released map[flowKey]*heldSYN
}

// flowKey is a connection as the container sees it.
type flowKey struct{ src, dst netip.AddrPort }

// releaseTimeout is how long a dialled socket waits for its SYN to be accepted.
// That takes microseconds, or never happens since the container gave up.
const releaseTimeout = 3 * time.Second

// heldBacklog is the backlog of the listeners, cut to net.core.somaxconn of the
// namespace (listen(2)): 4096 since Linux 5.4.
const heldBacklog = 1 << 16

// newHeldSYNs makes the listeners, in a namespace whose tap is there, and diverts
// to them.
func newHeldSYNs(e *tcpEngine, ns *netnsutil.NS, k *netnsutil.KernelPath, tap string) (*heldSYNs, error) {
	h := &heldSYNs{e: e, released: make(map[flowKey]*heldSYN)}
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
			h.listeners = append(h.listeners, &heldListener{sharedFD: sharedFD{fd: fd}, h: h})
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
	for _, hl := range h.listeners {
		hl.share(e.splicer, hl)
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
	// What is accepted has the port that the container called as its own, and
	// would keep the container from listening on it. Not before bind, which
	// would take a port then that others have.
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
	r     request
	l     *spliceLoop
	begun time.Time

	// Of the loop's thread.
	slot    int32
	dialing bool

	flow  splicedFlow // fds[0] is the dialled socket
	timer *time.Timer // since it was released; h.mu guards it
	done  chan struct{}
}

// serve carries a connection of the container's as far as its handshake. It
// returns when that is over, and the SYN must be held no longer.
func (h *heldSYNs) serve(r request) {
	c := &heldSYN{h: h, r: r, l: h.e.splicer.pick(), begun: time.Now(), done: make(chan struct{})}
	c.flow = splicedFlow{
		counters: &h.e.outbound, events: h.e.events, ended: c.ended, fds: [2]int{-1, -1},
		flow: Flow{Proto: TCP, Dir: Out, Client: r.src, Server: r.dst, Path: Kernel},
	}
	h.e.outbound.begin()
	if err := c.dial(); err != nil {
		c.refuse(err)
		return
	}
	select {
	case <-c.done:
	case <-r.ctx.Done():
		c.giveUp()
	case <-h.e.ctx.Done():
		c.giveUp()
	}
}

// dial begins to dial on the host. A DNS address leads to one of several
// nameservers, and is dialled to the end.
func (c *heldSYN) dial() error {
	e := c.h.e
	if e.paths.addrs.isDNS(c.r.dst) {
		outer, err := e.dialOut(c.r.ctx, c.r.dst)
		if err != nil {
			return err
		}
		defer outer.Close()
		if c.flow.fds[0], err = duplicate(outer.(*net.TCPConn)); err != nil {
			return err
		}
		c.release()
		return nil
	}
	to, err := e.paths.addrs.destination(c.r.dst)
	if err != nil {
		return err
	}
	if c.flow.fds[0], err = e.egress.connectTCP(to); err != nil {
		return err
	}
	if !c.l.do(c.watchDial) {
		unix.Close(c.flow.fds[0])
		return unix.ECONNREFUSED
	}
	return nil
}

// watchDial waits for the dial on the loop.
func (c *heldSYN) watchDial() {
	c.slot = c.l.newSlot(c)
	c.dialing = true
	if err := c.l.watch(c.flow.fds[0], socketEvents, c.slot, 0); err != nil {
		c.endDial(err)
	}
}

// ready is called when the dial has come to something.
func (c *heldSYN) ready(_ *spliceLoop, _ int, events uint32) {
	switch {
	case events&(unix.EPOLLERR|unix.EPOLLHUP) != 0:
		if err := connectError(c.flow.fds[0]); err != nil {
			c.endDial(err)
		}
	case events&unix.EPOLLOUT != 0:
		// The loop that accepts will take the socket.
		_ = unix.EpollCtl(c.l.epfd, unix.EPOLL_CTL_DEL, c.flow.fds[0], nil)
		c.leaveLoop()
		c.release()
	}
}

func (c *heldSYN) leaveLoop() {
	c.dialing = false
	c.l.freeSlot(c.slot)
}

// endDial ends a dial that came to nothing.
func (c *heldSYN) endDial(err error) {
	c.leaveLoop()
	unix.Close(c.flow.fds[0])
	c.refuse(err)
	close(c.done)
}

func (c *heldSYN) shutdown(*spliceLoop) { c.endDial(unix.ECONNREFUSED) }

// refuse tells the container.
func (c *heldSYN) refuse(err error) {
	c.h.e.outbound.end()
	c.r.reject(err)
	if c.debug() {
		c.log().Debug("outbound connection refused", "err", err)
	}
}

// release gives the SYN back to the container's kernel.
func (c *heldSYN) release() {
	h, key := c.h, flowKey{c.r.src, c.r.dst}
	h.mu.Lock()
	old := h.released[key]
	h.released[key] = c
	c.timer = time.AfterFunc(releaseTimeout, c.giveUp)
	h.mu.Unlock()
	if old != nil { // the container has reused its port before we noticed
		old.drop()
	}
	if err := c.r.release(); err != nil {
		c.giveUp()
	}
}

// take returns the released connection with a key, and forgets it.
func (h *heldSYNs) take(key flowKey) *heldSYN {
	h.mu.Lock()
	defer h.mu.Unlock()
	c := h.released[key]
	if c != nil {
		delete(h.released, key)
		c.timer.Stop()
	}
	return c
}

// giveUp ends a connection whose handshake the container does not complete.
func (c *heldSYN) giveUp() {
	if c.forget() {
		c.drop()
		return
	}
	c.l.do(func() {
		switch {
		case c.dialing:
			c.leaveLoop()
			c.drop()
		case c.forget():
			c.drop()
		}
	})
}

// forget is true if c was released and not accepted, and nobody else will end it.
func (c *heldSYN) forget() bool {
	h, key := c.h, flowKey{c.r.src, c.r.dst}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.released[key] != c {
		return false
	}
	delete(h.released, key)
	c.timer.Stop()
	return true
}

// drop closes the dialled socket.
func (c *heldSYN) drop() {
	closeSocket(c.flow.fds[0], true)
	c.h.e.outbound.end()
	close(c.done)
	if c.debug() {
		c.log().Debug("outbound connection given up")
	}
}

// accepted pairs c with the socket that the kernel made of its SYN.
func (c *heldSYN) accepted(l *spliceLoop, fd int) {
	c.flow.fds[1] = fd
	close(c.done)
	l.adopt(&c.flow)
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
	return c.h.e.log.With("client", c.r.src, "to", c.r.dst, "path", Kernel)
}

// heldListener is a listener to which SYNs are diverted.
type heldListener struct {
	sharedFD
	h *heldSYNs
}

// ready accepts.
func (hl *heldListener) ready(l *spliceLoop, _ int, _ uint32) {
	for range acceptBatch {
		fd, sa, err := unix.Accept4(hl.fd, unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC)
		switch {
		case err == nil:
			hl.pair(l, fd, addrPortOf(sa))
		case errors.Is(err, unix.EAGAIN):
			return
		case exhausted(err):
			if !l.s.refuse(hl.fd) {
				time.Sleep(time.Millisecond)
				return
			}
		}
	}
}

// pair finds the dialled socket for an accepted one.
func (hl *heldListener) pair(l *spliceLoop, fd int, src netip.AddrPort) {
	sa, err := unix.Getsockname(fd)
	if err != nil {
		closeSocket(fd, true)
		return
	}
	if c := hl.h.take(flowKey{src, addrPortOf(sa)}); c != nil {
		c.accepted(l, fd)
		return
	}
	closeSocket(fd, true) // too late
}

func (hl *heldListener) shutdown(l *spliceLoop) { hl.leave(l) }
