package forward

import (
	"net"
	"os"
	"runtime"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/gofwd/gofwd/netnsutil"
)

// watched is something with descriptors in the epoll set of a loop.
type watched interface {
	// ready is called on the loop's thread. tag is the descriptor's. Events
	// can be spurious: of one that has been read meanwhile, or of another that
	// had the tag.
	ready(l *spliceLoop, tag int, events uint32)
	// shutdown is called when the splicer closes: close what there is.
	shutdown(l *spliceLoop)
}

// spliceLoop is one thread of a splicer. Its fields belong to that thread, but
// for those that mu guards.
type spliceLoop struct {
	s     *splicer
	epfd  int
	wake  int // eventfd
	buf   [bufferSizeBulk]byte
	turns []*splicedFlow
	late  lateList
	bulk  bulkFlows
	slice timeSlice

	mu      sync.Mutex // guards the following fields
	slots   []watched
	free    []int32 // indexes of slots
	freed   []int32 // that are free when the events at hand are over
	calls   []func()
	stopped bool

	attaching sync.WaitGroup // to which nobody is added once stopped is set
}

func newSpliceLoop(s *splicer) (*spliceLoop, error) {
	epfd, wake, err := newEpoll()
	if err != nil {
		return nil, err
	}
	return &spliceLoop{s: s, epfd: epfd, wake: wake}, nil
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
		l.reuseSlots()
		l.takeTurns()
		l.late.expire()
		l.gather()
		if l.slice.turn(time.Now()) {
			runtime.Gosched()
		}
		if woken && l.runCalls() {
			return
		}
	}
}

// bulkFlows notices whether several flows of a loop move much.
type bulkFlows struct {
	last    int32 // slot of the flow that did last
	several bool  // since gather
}

func (b *bulkFlows) moved(slot int32) {
	b.several = b.several || slot != b.last
	b.last = slot
}

// gather lets others have the processor, if several flows move much: else the loop is
// woken for every few packets of each, and spends its time on that (bench,
// TCP/streams=8 and 32). Where nobody waits for the processor it costs one system
// call. A single flow is better off without: its sender and receiver keep pace.
func (l *spliceLoop) gather() {
	if l.bulk.several {
		l.bulk.several = false
		_, _, _ = unix.Syscall(unix.SYS_SCHED_YIELD, 0, 0, 0)
	}
}

// timeSlice ends the time slice of a busy loop before the Go runtime does. A processor
// (P) that has not changed its goroutine for 10 ms is one that the runtime's monitor
// takes away as often as it finds the goroutine in a system call, where the loop mostly
// is; and what it has had to do it looks for again after 20 µs, on a thread of its own
// (retake and sysmon in runtime/proc.go, Go 1.26): thousands of times a second, on the
// processor that the loop, the client or the server could use (bench, HTTP). To yield
// costs the wake-ups of two threads, since the loop is locked to its own.
type timeSlice struct {
	turns int
	begun time.Time
}

const (
	timeSliceMax = 5 * time.Millisecond
	// busyTurns is how many turns a slice has at least at whose end the loop yields:
	// one that sleeps between few turns is let alone.
	busyTurns = 8
)

// turn is called once a turn of the loop, and reports whether it should yield.
func (s *timeSlice) turn(now time.Time) (yield bool) {
	s.turns++
	if now.Sub(s.begun) < timeSliceMax {
		return false
	}
	yield = s.turns >= busyTurns
	*s = timeSlice{begun: now}
	return yield
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

func (l *spliceLoop) wakeUp() { wakeEpoll(l.wake) }

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
func (l *spliceLoop) attach(w watched, slot *int32, fd int, events uint32) error {
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
	err := l.watch(fd, events, s, 0)
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

// freeSlot ends the events of a slot, whose descriptors are closed. It has no next
// user before those of the same epoll_wait(2) are over, who would take them for its
// own.
func (l *spliceLoop) freeSlot(slot int32) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.slots[slot] = nil
	l.freed = append(l.freed, slot)
}

// reuseSlots makes what was freed free.
func (l *spliceLoop) reuseSlots() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.free = append(l.free, l.freed...)
	l.freed = l.freed[:0]
}

// passSlot makes a slot that of another.
func (l *spliceLoop) passSlot(slot int32, to watched) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.slots[slot] = to
}

// socketEvents are what is watched for on the sockets of flows. EPOLLERR and
// EPOLLHUP come in any case.
const socketEvents = unix.EPOLLIN | unix.EPOLLPRI | unix.EPOLLOUT | unix.EPOLLRDHUP | unix.EPOLLET&(1<<32-1)

// watch adds fd to the epoll set. close(2) removes it, if nobody else has the socket.
func (l *spliceLoop) watch(fd int, events uint32, slot int32, tag int) error {
	err := unix.EpollCtl(l.epfd, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: events, Fd: slot, Pad: int32(tag)})
	return os.NewSyscallError("epoll_ctl", err)
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
