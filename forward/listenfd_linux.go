package forward

import (
	"errors"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// listenFD is a listening socket in the epoll set of a loop, for the [watched] that
// embeds it. The loop closes it, so that it can't have a number in hand that means
// something else by then.
type listenFD struct {
	fd      int
	loop    *spliceLoop
	closing atomic.Bool
	closed  chan struct{} // closed when it is

	slot int32 // of the loop's thread; -1 if it is not there
}

// enter begins to accept on a loop. After an error the socket is the caller's.
func (d *listenFD) enter(l *spliceLoop, w watched) error {
	d.loop, d.closed = l, make(chan struct{})
	return l.attach(w, &d.slot, d.fd, unix.EPOLLIN)
}

// stop begins to stop that; the socket is closed when closed is. It may be called
// again.
func (d *listenFD) stop() {
	if !d.closing.Swap(true) {
		d.loop.do(d.leave) // or shutdown does
	}
}

// leave removes it from its loop, on that's thread, if it is there.
func (d *listenFD) leave() {
	if d.slot < 0 {
		return
	}
	// Who passed us the socket may have it still, and close(2) would leave it in
	// the set then.
	_ = unix.EpollCtl(d.loop.epfd, unix.EPOLL_CTL_DEL, d.fd, nil)
	d.loop.freeSlot(d.slot)
	d.slot = -1
	unix.Close(d.fd)
	close(d.closed)
}

func (d *listenFD) shutdown(*spliceLoop) { d.leave() }

// rawFD is a [syscall.RawConn] that can be controlled, but not waited for.
type rawFD int

// Control calls fn with the descriptor.
func (fd rawFD) Control(fn func(uintptr)) error { fn(uintptr(fd)); return nil }

// Read is not supported.
func (rawFD) Read(func(uintptr) bool) error { return errors.ErrUnsupported }

// Write is not supported.
func (rawFD) Write(func(uintptr) bool) error { return errors.ErrUnsupported }
