package forward

import (
	"cmp"
	"fmt"
	"net"
	"os"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/gofwd/gofwd/netnsutil"
)

// splicer moves the bytes of flows whose two ends are sockets of the kernel. It
// has a few threads, each with an epoll set and, for the kernel path, in the
// container's namespace, where sockets can be made on the spot. A flow has no
// goroutine: from the event to the system call that answers it nothing is
// scheduled.
//
// What that gains over goroutines, BenchmarkSplicerConnections measures: half of the
// processor time of a short connection. Over io.Copy, which splices as well, there is
// nothing to gain for bulk (BenchmarkSplicer) but the user's ration of pipes: a
// flow holds one only while something waits in it.
//
// The other way to relay is [relay], for every pair of ends that are not both
// sockets of the kernel, and for what a loop does not do: a connection of the
// stack (the tap path), a UNIX socket, a PROXY header before the first byte, an
// idle limit. Where those end in two plain sockets after all, [tcpEngine.relay]
// gives them to the splicer, too. The two agree on what an end hears of the other,
// and on the words for how a flow ends.
type splicer struct {
	loops []*spliceLoop
	next  atomic.Uint32
	pipes pipePool
	wg    sync.WaitGroup

	mu      sync.Mutex // guards the following field
	reserve int        // a descriptor to give up when there is no other, -1 if none
}

// maxSpliceLoops is enough for 100 Gb/s.
const maxSpliceLoops = 8

// newSplicer starts the threads, in ns if that is not nil.
func newSplicer(ns *netnsutil.NS) (*splicer, error) {
	s := &splicer{reserve: reserveFD()}
	for range min(runtime.GOMAXPROCS(0), maxSpliceLoops) {
		l, err := newSpliceLoop(s)
		if err != nil {
			s.close()
			return nil, fmt.Errorf("start splicer: %w", err)
		}
		started := make(chan error)
		s.loops = append(s.loops, l)
		s.wg.Add(1)
		go l.run(ns, started)
		if err := <-started; err != nil {
			s.close()
			return nil, fmt.Errorf("start splicer: %w", err)
		}
	}
	return s, nil
}

// pick returns the loop for a new flow that comes from elsewhere.
func (s *splicer) pick() *spliceLoop {
	return s.loops[int(s.next.Add(1))%len(s.loops)]
}

// close ends all flows with RST, and waits for the threads. It is idempotent.
func (s *splicer) close() {
	for _, l := range s.loops {
		l.mu.Lock()
		if !l.stopped {
			l.stopped = true
			l.wakeUp()
		}
		l.mu.Unlock()
	}
	s.wg.Wait()
	s.pipes.close()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.reserve >= 0 {
		unix.Close(s.reserve)
		s.reserve = -1
	}
}

// refuse accepts a connection when there are no descriptors left, to end it with
// RST. It is false if there is not even one for that.
func (s *splicer) refuse(listener int) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.reserve < 0 {
		s.reserve = reserveFD()
		return false
	}
	unix.Close(s.reserve)
	fd, _, err := unix.Accept4(listener, unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC)
	if err == nil {
		closeSocket(fd, true)
	}
	s.reserve = reserveFD()
	return err == nil
}

func reserveFD() int {
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	if err != nil {
		return -1
	}
	return fd
}

// watched is something with descriptors in the epoll set of a loop.
type watched interface {
	// ready is called on the loop's thread. tag is the descriptor's. Events
	// can be stale or spurious: of a descriptor that was just closed, or of
	// one that has been read meanwhile.
	ready(l *spliceLoop, tag int, events uint32)
	// shutdown is called when the splicer closes: close what there is.
	shutdown(l *spliceLoop)
}

// spliceLoop is one thread of a splicer. Its fields belong to that thread, but
// for those that mu guards.
type spliceLoop struct {
	s    *splicer
	epfd int
	wake int // eventfd
	buf  [bufferSize]byte
	// shared are the slots of listening sockets, of which there may be tens of
	// thousands.
	shared map[*sharedFD]int32
	turns  []*splicedFlow
	late   lateList

	mu      sync.Mutex // guards the following fields
	slots   []watched
	free    []int32 // indexes of slots
	calls   []func()
	stopped bool

	attaching sync.WaitGroup // to which nobody is added once stopped is set
}

// wakeSlot stands for the eventfd in the epoll set.
const wakeSlot = -1

func newSpliceLoop(s *splicer) (*spliceLoop, error) {
	epfd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("epoll_create1", err)
	}
	wake, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		unix.Close(epfd)
		return nil, os.NewSyscallError("eventfd", err)
	}
	err = unix.EpollCtl(epfd, unix.EPOLL_CTL_ADD, wake, &unix.EpollEvent{Events: unix.EPOLLIN, Fd: wakeSlot})
	if err != nil {
		unix.Close(epfd)
		unix.Close(wake)
		return nil, os.NewSyscallError("epoll_ctl", err)
	}
	return &spliceLoop{s: s, epfd: epfd, wake: wake, shared: make(map[*sharedFD]int32)}, nil
}

// run is the loop's thread.
func (l *spliceLoop) run(ns *netnsutil.NS, started chan<- error) {
	defer l.s.wg.Done()
	defer func() {
		unix.Close(l.epfd)
		unix.Close(l.wake)
	}()
	loop := func() error {
		started <- nil
		l.loop()
		return nil
	}
	if ns == nil {
		_ = loop()
	} else if err := ns.Do(loop); err != nil {
		l.mu.Lock()
		l.stopped = true
		l.mu.Unlock()
		started <- err
	}
}

func (l *spliceLoop) loop() {
	var events [128]unix.EpollEvent
	for {
		n, err := unix.EpollWait(l.epfd, events[:], l.timeout())
		if err != nil && err != unix.EINTR {
			panic("epoll_wait: " + err.Error()) // the descriptor is ours, and open
		}
		woken := false
		for i := range max(n, 0) {
			if e := &events[i]; e.Fd == wakeSlot {
				woken = true
			} else if w := l.at(e.Fd); w != nil {
				w.ready(l, int(e.Pad), e.Events)
			}
		}
		l.takeTurns()
		l.late.expire()
		if woken && l.runCalls() {
			return
		}
	}
}

// timeout returns how long the loop may sleep, in milliseconds.
func (l *spliceLoop) timeout() int {
	switch {
	case len(l.turns) > 0:
		return 0
	case !l.late.empty():
		return int(lateGrain / time.Millisecond)
	}
	return -1
}

// do runs fn on the loop's thread, soon. It is false, and fn is not run, if the
// splicer is closed.
func (l *spliceLoop) do(fn func()) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.stopped {
		return false
	}
	if l.calls = append(l.calls, fn); len(l.calls) == 1 {
		l.wakeUp()
	}
	return true
}

func (l *spliceLoop) wakeUp() {
	_, _ = unix.Write(l.wake, []byte{1, 0, 0, 0, 0, 0, 0, 0}) // eventfd(2): eight bytes, not all 0 or 0xff
}

// runCalls runs what do was given, and reports whether that was the last: the
// splicer is closed then, and so is everything on the loop.
func (l *spliceLoop) runCalls() (stopped bool) {
	var counter [8]byte
	_, _ = unix.Read(l.wake, counter[:])
	l.mu.Lock()
	calls, stopped := l.calls, l.stopped
	l.calls = nil
	l.mu.Unlock()
	for _, fn := range calls {
		fn()
	}
	if stopped {
		l.attaching.Wait()
		for _, w := range l.all() {
			w.shutdown(l)
		}
	}
	return stopped
}

// attach adds a socket, with a slot of its own, which it stores before the first
// event. It is for any thread. After an error, which is [net.ErrClosed] if the
// splicer is, the socket is not in the set.
func (l *spliceLoop) attach(w watched, slot *int32, fd int) error {
	l.mu.Lock()
	if l.stopped {
		l.mu.Unlock()
		return net.ErrClosed
	}
	s := l.newSlotLocked(w)
	*slot = s
	l.attaching.Add(1)
	l.mu.Unlock()
	defer l.attaching.Done()
	err := l.watch(fd, socketEvents, s, 0)
	if err != nil {
		l.freeSlot(s)
	}
	return err
}

// at returns what a slot is of, nil if it is free.
func (l *spliceLoop) at(slot int32) watched {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.slots[slot]
}

// all returns what there is in slots.
func (l *spliceLoop) all() []watched {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.DeleteFunc(slices.Clone(l.slots), func(w watched) bool { return w == nil })
}

// newSlot returns a slot for w.
func (l *spliceLoop) newSlot(w watched) (slot int32) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.newSlotLocked(w)
}

func (l *spliceLoop) newSlotLocked(w watched) (slot int32) {
	if n := len(l.free); n > 0 {
		slot, l.free = l.free[n-1], l.free[:n-1]
		l.slots[slot] = w
		return slot
	}
	l.slots = append(l.slots, w)
	return int32(len(l.slots) - 1)
}

// freeSlot ends the events of a slot, whose descriptors are closed. Those of the
// same epoll_wait(2) that are still to come may meet the slot's next user, for
// whom they are spurious.
func (l *spliceLoop) freeSlot(slot int32) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.slots[slot] = nil
	l.free = append(l.free, slot)
}

// passSlot makes a slot that of another.
func (l *spliceLoop) passSlot(slot int32, to watched) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.slots[slot] = to
}

// socketEvents are what is watched for on the sockets of flows. EPOLLERR and
// EPOLLHUP come in any case.
const socketEvents = unix.EPOLLIN | unix.EPOLLOUT | unix.EPOLLRDHUP | unix.EPOLLET&(1<<32-1)

// watch adds fd to the epoll set. close(2) removes it.
func (l *spliceLoop) watch(fd int, events uint32, slot int32, tag int) error {
	err := unix.EpollCtl(l.epfd, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: events, Fd: slot, Pad: int32(tag)})
	return os.NewSyscallError("epoll_ctl", err)
}

// splicedFlow is a pair of connected, non-blocking TCP sockets that a splicer
// owns: side 0 is the host's, side 1 the namespace's. What one end says the other
// hears: FIN ends one direction, RST both.
type splicedFlow struct {
	rule     *activeRule // nil if no rule made it
	counters *flowCounters
	flow     Flow // Started is set by start
	events   *eventHub
	// ended is called once, on the loop's thread, after both sockets were
	// closed.
	ended func(f *splicedFlow, how string)

	fds    [2]int
	halves [2]splicedHalf // halves[i] reads side i
	wait   [2]waits
	slot   int32
	queued bool // for a turn
	// settled is set when it has turned out to last, and has its loop for good.
	settled  bool
	advances int
	dead     bool
}

// The bytes that went into the namespace, and out of it.
func (f *splicedFlow) in() int64  { return f.halves[0].moved }
func (f *splicedFlow) out() int64 { return f.halves[1].moved }

// start hands f over to the loop, on its thread. If its sockets are in the loop's
// epoll set already, slot is theirs and events are those that were seen.
func (f *splicedFlow) start(l *spliceLoop, events [2]uint32) {
	if f.rule != nil && f.rule.ctx.Err() != nil { // abort did not see it yet
		f.end(l, true, endRemoved)
		return
	}
	f.flow.Started = time.Now()
	f.events.flow(FlowOpened, f.flow)
	for side := range 2 {
		f.halves[side] = splicedHalf{src: f.fds[side], dst: f.fds[1-side]}
		f.wait[side] = waitsRead
	}
	for side := range 2 {
		if !f.dead {
			f.ready(l, side, events[side]&^unix.EPOLLOUT)
		}
	}
}

// adopt hands a flow over whose sockets are not in the epoll set yet.
func (l *spliceLoop) adopt(f *splicedFlow) {
	f.slot = l.newSlot(f)
	if f.start(l, [2]uint32{}); !f.dead {
		l.watchFlow(f)
	}
}

func (l *spliceLoop) watchFlow(f *splicedFlow) {
	for side, fd := range f.fds {
		if err := l.watch(fd, socketEvents, f.slot, side); err != nil {
			f.end(l, true, err.Error())
			return
		}
	}
}

// ready moves what can be moved.
func (f *splicedFlow) ready(l *spliceLoop, side int, events uint32) {
	if f.dead {
		return
	}
	const gone = unix.EPOLLERR | unix.EPOLLHUP
	if events&(unix.EPOLLRDHUP|gone) != 0 {
		f.halves[side].hup = true
	}
	if events&(unix.EPOLLOUT|gone) != 0 && f.wait[1-side] == waitsWrite {
		f.advance(l, 1-side)
	}
	if events&(unix.EPOLLIN|unix.EPOLLRDHUP|gone) != 0 && f.wait[side] == waitsRead && !f.dead {
		f.advance(l, side)
	}
	// A RST that nobody reads or writes into.
	if events&unix.EPOLLERR != 0 && !f.dead {
		if errno, err := unix.GetsockoptInt(f.fds[side], unix.SOL_SOCKET, unix.SO_ERROR); err == nil && errno != 0 {
			f.end(l, true, endOf(side))
		}
	}
}

// advance runs one half.
func (f *splicedFlow) advance(l *spliceLoop, side int) {
	h := &f.halves[side]
	before := h.moved
	h.last = f.wait[1-side] == waitsNone
	w, err := h.run(&l.s.pipes, l.buf[:])
	if n := h.moved - before; n > 0 {
		if side == 0 {
			f.counters.bytesIn.Add(n)
		} else {
			f.counters.bytesOut.Add(n)
		}
	}
	if err != nil {
		if err.dst {
			side = 1 - side
		}
		f.end(l, true, endOf(side))
		return
	}
	f.wait[side] = w
	f.advances++
	lasts := h.fills == fillsForBulk || f.advances == advancesToLast
	if (w == waitsTurn || lasts && !f.settled) && !f.queued {
		f.queued = true
		l.turns = append(l.turns, f)
	}
	if f.wait[0] == waitsNone && f.wait[1] == waitsNone {
		f.end(l, false, endClosed)
	}
}

// takeTurns lets the flows go on that have had to let others go first.
func (l *spliceLoop) takeTurns() {
	turns := l.turns
	l.turns = nil
	for _, f := range turns {
		f.queued = false
		if !f.dead && !f.settled {
			f.settled = true
			if to := l.s.pick(); to != l {
				l.pass(f, to)
				continue
			}
		}
		for side := range 2 {
			if !f.dead && f.wait[side] == waitsTurn {
				f.advance(l, side)
			}
		}
	}
}

// pass hands a flow to another loop. What lasts is spread over all of them: flows
// begin in the loop of their listener, and most are over before that would pay.
func (l *spliceLoop) pass(f *splicedFlow, to *spliceLoop) {
	for _, fd := range f.fds {
		_ = unix.EpollCtl(l.epfd, unix.EPOLL_CTL_DEL, fd, nil)
	}
	l.freeSlot(f.slot)
	if !to.do(func() { to.resume(f) }) {
		f.slot = l.newSlot(f)
		f.end(l, true, endShutdown)
	}
}

// resume lets a flow go on that another loop has begun: what its sockets are ready
// for is reported as they are added.
func (l *spliceLoop) resume(f *splicedFlow) {
	f.slot = l.newSlot(f)
	if f.rule != nil && f.rule.ctx.Err() != nil { // abort met it in neither loop
		f.end(l, true, endRemoved)
		return
	}
	if l.watchFlow(f); !f.dead && (f.wait[0] == waitsTurn || f.wait[1] == waitsTurn) {
		f.queued = true
		l.turns = append(l.turns, f)
	}
}

// advancesToLast is after how many turns of its halves a flow is one that lasts, as
// fillsForBulk is by its bytes: thirty requests and responses, say.
const advancesToLast = 64

// endOf is how a flow ends of which a side died.
func endOf(side int) string {
	if side == 0 {
		return endOuter
	}
	return endInner
}

// end closes both sockets, with RST if reset is set.
func (f *splicedFlow) end(l *spliceLoop, reset bool, how string) {
	f.dead = true
	for side, fd := range f.fds {
		f.halves[side].release(&l.s.pipes)
		closeSocket(fd, reset)
	}
	l.freeSlot(f.slot)
	f.flow.BytesIn, f.flow.BytesOut = f.in(), f.out()
	f.events.flow(FlowClosed, f.flow)
	f.ended(f, how)
}

func (f *splicedFlow) shutdown(l *spliceLoop) {
	if !f.dead {
		f.end(l, true, endShutdown)
	}
}

// closeSocket closes a TCP socket, with RST if reset is set (SO_LINGER with no
// time, socket(7)): no TIME_WAIT is left then.
func closeSocket(fd int, reset bool) {
	if reset {
		_ = unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
	}
	unix.Close(fd)
}

// abort ends the flows for which match is true with RST, soon.
func (s *splicer) abort(match func(*splicedFlow) bool, how string) {
	for _, l := range s.loops {
		l.do(func() {
			for _, w := range l.all() {
				if f, ok := w.(*splicedFlow); ok && !f.dead && match(f) {
					f.end(l, true, how)
				}
			}
		})
	}
}

// flows returns the flows of all loops.
func (s *splicer) flows() (flows []Flow) {
	lists := make(chan []Flow, len(s.loops))
	asked := 0
	for _, l := range s.loops {
		if l.do(func() { lists <- l.flows() }) {
			asked++
		}
	}
	for range asked {
		flows = append(flows, <-lists...)
	}
	return flows
}

// flows is for the loop's thread.
func (l *spliceLoop) flows() (flows []Flow) {
	for _, w := range l.all() {
		if f, ok := w.(*splicedFlow); ok && !f.dead {
			d := f.flow
			d.askFD(f.fds[0])
			flows = append(flows, d)
		}
	}
	return flows
}

// splice takes two connections over, and moves their bytes until both have
// ended. It is false if that is not possible; nothing has happened then.
func (s *splicer) splice(outer, inner *net.TCPConn, f *splicedFlow) bool {
	var err error
	if f.fds[0], err = duplicate(outer); err != nil {
		return false
	}
	if f.fds[1], err = duplicate(inner); err != nil {
		unix.Close(f.fds[0])
		return false
	}
	// The duplicates are not in the Go runtime's poller, and that is the point.
	outer.Close()
	inner.Close()
	if l := s.pick(); !l.do(func() { l.adopt(f) }) {
		closeSocket(f.fds[0], true)
		closeSocket(f.fds[1], true)
		f.ended(f, endShutdown)
	}
	return true
}

// duplicate returns another descriptor of a socket.
func duplicate(c syscall.Conn) (fd int, err error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return -1, err
	}
	ctlErr := raw.Control(func(from uintptr) { fd, err = unix.FcntlInt(from, unix.F_DUPFD_CLOEXEC, 0) })
	if err = cmp.Or(ctlErr, err); err != nil {
		return -1, os.NewSyscallError("fcntl", err)
	}
	return fd, nil
}

// late is something that is to be looked at if it takes too long.
type late struct {
	at         time.Time
	expired    func()
	prev, next *late // nil if it is in no list
}

// lateGrain is how precise the time of a late is.
const lateGrain = 50 * time.Millisecond

// lateAfter is when a late expires. It is the same for all, so that a list of
// them is in order.
const lateAfter = 250 * time.Millisecond

// lateList is a ring of lates, the first to expire first. The zero value is empty.
type lateList struct{ root late }

func (l *lateList) empty() bool { return l.root.next == nil || l.root.next == &l.root }

// add puts x at the end.
func (l *lateList) add(x *late) {
	if l.root.next == nil {
		l.root.next, l.root.prev = &l.root, &l.root
	}
	x.at = time.Now().Add(lateAfter)
	x.prev, x.next = l.root.prev, &l.root
	x.prev.next, x.next.prev = x, x
}

// remove takes x out. It may be out already.
func (x *late) remove() {
	if x.next != nil {
		x.prev.next, x.next.prev = x.next, x.prev
		x.prev, x.next = nil, nil
	}
}

// expire takes out what is due, and calls it.
func (l *lateList) expire() {
	for !l.empty() && !time.Now().Before(l.root.next.at) {
		x := l.root.next
		x.remove()
		x.expired()
	}
}
