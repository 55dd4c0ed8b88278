package forward

import (
	"errors"
	"net"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// sharedFD is a listening socket in the epoll sets of all loops of a splicer, for
// the [watched] that embeds it. The last loop to leave it closes it, so that no
// other can have a number in hand that means something else by then.
type sharedFD struct {
	fd      int
	closing atomic.Bool
	loops   atomic.Int32  // that have it
	closed  chan struct{} // closed when it is
}

// share begins to accept on all loops.
func (d *sharedFD) share(s *splicer, w watched) {
	d.closed = make(chan struct{})
	d.loops.Store(int32(len(s.loops)))
	for _, l := range s.loops {
		if !l.do(func() { d.enter(l, w) }) {
			d.left()
		}
	}
}

// unshare ends that, and returns when the socket is closed. No loop may wait for
// the caller.
func (d *sharedFD) unshare(s *splicer, w watched) error {
	if d.closing.Swap(true) {
		return net.ErrClosed
	}
	for _, l := range s.loops {
		l.do(func() { d.leave(l, w) })
	}
	<-d.closed
	return nil
}

// enter adds it to a loop. Of the loops that wait, one is woken for a connection
// (EPOLLEXCLUSIVE).
func (d *sharedFD) enter(l *spliceLoop, w watched) {
	slot := l.newSlot(w)
	if err := l.watch(d.fd, unix.EPOLLIN|unix.EPOLLEXCLUSIVE, slot, 0); err != nil {
		l.freeSlot(slot)
		d.left()
	}
}

// leave removes it from a loop, if it is there.
func (d *sharedFD) leave(l *spliceLoop, w watched) {
	for slot := range l.slots {
		if l.slots[slot] == w {
			_ = unix.EpollCtl(l.epfd, unix.EPOLL_CTL_DEL, d.fd, nil)
			l.freeSlot(int32(slot))
			d.left()
			return
		}
	}
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
