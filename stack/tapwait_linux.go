package stack

import (
	"errors"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// tapWait is how the reader of a tap waits for a frame: in one of two ways.
//
// Alone, in poll(2) itself: a frame wakes the thread that reads it, and nobody else.
// What the Go runtime does until it runs a goroutine takes as long as all that the
// kernel does for a datagram (bench, UDPRR).
//
// Parked, as other goroutines wait. A thread in a system call keeps its processor
// (P) for some time, and goroutines that have work lack it then (bench, TCPCRR on the
// tap). The runtime watches an epoll instance, in which the tap is only as long as
// the reader parks (they nest, epoll(7)): else each frame would wake one of the
// runtime's threads as well.
type tapWait struct {
	fd    int      // the tap's
	wake  int      // eventfd: ends a wait, for ever
	epoll *os.File // with wake, and the tap while it is watched
	raw   syscall.RawConn

	watched bool
	read    func() (int, error)
	readFn  func(uintptr) bool // in a field, so that parking allocates nothing
	n       int
	err     error
}

// newTapWait returns the wait for the tap fd, which is read by read.
func newTapWait(fd int, read func() (int, error)) (*tapWait, error) {
	epfd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("epoll_create1", err)
	}
	// os.NewFile gives only non-blocking descriptors to the runtime's poller.
	if err := unix.SetNonblock(epfd, true); err != nil {
		unix.Close(epfd)
		return nil, os.NewSyscallError("fcntl", err)
	}
	w := &tapWait{fd: fd, wake: -1, read: read, epoll: os.NewFile(uintptr(epfd), "epoll")}
	w.readFn = w.tryRead
	if w.wake, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK); err != nil {
		w.close()
		return nil, os.NewSyscallError("eventfd", err)
	}
	if w.raw, err = w.epoll.SyscallConn(); err == nil {
		err = w.ctl(unix.EPOLL_CTL_ADD, w.wake)
	}
	if err != nil {
		w.close()
		return nil, err
	}
	return w, nil
}

func (w *tapWait) ctl(op, fd int) error {
	var operr error
	err := w.raw.Control(func(epfd uintptr) {
		operr = unix.EpollCtl(int(epfd), op, fd, &unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(fd)})
	})
	if err != nil {
		return err
	}
	return os.NewSyscallError("epoll_ctl", operr)
}

// alone returns when there is a frame, after end, or for no reason.
func (w *tapWait) alone() {
	if w.watched && w.ctl(unix.EPOLL_CTL_DEL, w.fd) == nil {
		w.watched = false
	}
	_, _ = unix.Poll([]unix.PollFd{
		{Fd: int32(w.fd), Events: unix.POLLIN},
		{Fd: int32(w.wake), Events: unix.POLLIN},
	}, -1)
}

// parked reads as soon as there is a frame, or after end: as soon as read returns
// anything but EAGAIN. It tries before it waits, since the runtime forgets what was
// ready earlier.
func (w *tapWait) parked() (int, error) {
	if !w.watched {
		if err := w.ctl(unix.EPOLL_CTL_ADD, w.fd); err != nil {
			return 0, err
		}
		w.watched = true
	}
	if err := w.raw.Read(w.readFn); err != nil {
		return 0, err
	}
	return w.n, w.err
}

func (w *tapWait) tryRead(uintptr) bool {
	w.n, w.err = w.read()
	return !errors.Is(w.err, unix.EAGAIN)
}

// end ends a wait, and all later ones. It is for any goroutine, until close.
func (w *tapWait) end() {
	_, _ = unix.Write(w.wake, []byte{1, 0, 0, 0, 0, 0, 0, 0}) // eventfd(2): eight bytes, not all 0 or 0xff
}

// close frees what w has. Nobody waits any more.
func (w *tapWait) close() {
	w.epoll.Close()
	if w.wake >= 0 {
		unix.Close(w.wake)
	}
}
