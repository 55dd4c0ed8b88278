package forward

import (
	"time"

	"golang.org/x/sys/unix"
)

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
	f.flow.Started = time.Now()
	f.events.flow(FlowOpened, f.flow)
	if f.rule != nil && f.rule.ctx.Err() != nil { // abort did not see it yet
		f.end(l, true, endRemoved)
		return
	}
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
	if events&unix.EPOLLPRI != 0 {
		f.halves[side].urgent = true
	}
	if events&(unix.EPOLLOUT|gone) != 0 && f.wait[1-side] == waitsWrite {
		f.advance(l, 1-side)
	}
	if events&(unix.EPOLLIN|unix.EPOLLPRI|unix.EPOLLRDHUP|gone) != 0 && f.wait[side] == waitsRead && !f.dead {
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
		if f.settled && n >= muchAtOnce {
			l.bulk.moved(f.slot)
		}
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
	lasts := h.fills >= fillsForBulk || f.advances == advancesToLast
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

// muchAtOnce is what requests and responses do not move at once, as a rule.
const muchAtOnce = 4 << 10

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
