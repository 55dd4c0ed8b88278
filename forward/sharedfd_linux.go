package forward

import (
	"errors"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// sharedFD is a listening socket in the epoll sets of several loops of a splicer, for
// the [watched] that embeds it. The last loop to leave it closes it, so that no
// other can have a number in hand that means something else by then.
type sharedFD struct {
	fd      int
	closing atomic.Bool
	loops   atomic.Int32  // that have it
	closed  chan struct{} // closed when it is
}

// share begins to accept on some loops.
func (d *sharedFD) share(loops []*spliceLoop, w watched) {
	d.closed = make(chan struct{})
	d.loops.Store(int32(len(loops)))
	for _, l := range loops {
		if !l.do(func() { d.enter(l, w) }) {
			d.left()
		}
	}
}

// unshare begins to end that; the socket is closed when closed is. It may be called
// again.
func (d *sharedFD) unshare(s *splicer) {
	if d.closing.Swap(true) {
		return
	}
	for _, l := range s.loops {
		l.do(func() { d.leave(l) })
	}
}

// enter adds it to a loop. Of the loops that wait, one is woken for a connection
// (EPOLLEXCLUSIVE).
func (d *sharedFD) enter(l *spliceLoop, w watched) {
	slot := l.newSlot(w)
	if err := l.watch(d.fd, unix.EPOLLIN|unix.EPOLLEXCLUSIVE, slot, 0); err != nil {
		l.freeSlot(slot)
		d.left()
		return
	}
	l.shared[d] = slot
}

// leave removes it from a loop, if it is there.
func (d *sharedFD) leave(l *spliceLoop) {
	slot, there := l.shared[d]
	if !there {
		return
	}
	delete(l.shared, d)
	_ = unix.EpollCtl(l.epfd, unix.EPOLL_CTL_DEL, d.fd, nil)
	l.freeSlot(slot)
	d.left()
}

func (d *sharedFD) left() {
	if d.loops.Add(-1) == 0 {
		unix.Close(d.fd)
		close(d.closed)
	}
}

// rawFD is a [syscall.RawConn] that can be controlled, but not waited for.
type rawFD int

// Control calls fn with the descriptor.
func (fd rawFD) Control(fn func(uintptr)) error { fn(uintptr(fd)); return nil }

// Read is not supported.
func (rawFD) Read(func(uintptr) bool) error { return errors.ErrUnsupported }

// Write is not supported.
func (rawFD) Write(func(uintptr) bool) error { return errors.ErrUnsupported }
