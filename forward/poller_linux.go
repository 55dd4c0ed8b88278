package forward

import (
	"net"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// poller waits for many sockets at once. The waiting thread sits in epoll_wait(2)
// itself rather than in the Go runtime's poller: a datagram wakes who reads it, and
// nobody else.
type poller struct {
	wake   int // eventfd: close ends the wait
	events [64]unix.EpollEvent

	waitMu sync.Mutex // held while waiting; close waits for it
	mu     sync.Mutex // guards epfd, which nobody closes while waitMu is held
	epfd   int        // -1 once closed
}

func newPoller() (*poller, error) {
	epfd, wake, err := newEpoll()
	if err != nil {
		return nil, err
	}
	return &poller{epfd: epfd, wake: wake}, nil
}

// newEpoll returns an epoll instance, and an eventfd in it that is reported as
// wakeSlot.
func newEpoll() (epfd, wake int, err error) {
	if epfd, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
		return -1, -1, os.NewSyscallError("epoll_create1", err)
	}
	if wake, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK); err != nil {
		unix.Close(epfd)
		return -1, -1, os.NewSyscallError("eventfd", err)
	}
	err = unix.EpollCtl(epfd, unix.EPOLL_CTL_ADD, wake, &unix.EpollEvent{Events: unix.EPOLLIN, Fd: wakeSlot})
	if err != nil {
		unix.Close(epfd)
		unix.Close(wake)
		return -1, -1, os.NewSyscallError("epoll_ctl", err)
	}
	return epfd, wake, nil
}

// wakeSlot stands for the eventfd in an epoll set.
const wakeSlot = -1

// wakeEpoll ends the wait of who waits for the eventfd.
func wakeEpoll(wake int) {
	_, _ = unix.Write(wake, []byte{1, 0, 0, 0, 0, 0, 0, 0}) // eventfd(2): eight bytes, not all 0 or 0xff
}

// add watches fd for input and errors; wait reports it as id, until remove.
func (p *poller) add(fd int, id int32) error {
	return p.ctl(unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: unix.EPOLLIN, Fd: id})
}

// remove ends the watch. It comes before the close of fd: a copy of fd that a
// child holds between fork and exec would keep the watch alive.
func (p *poller) remove(fd int) error { return p.ctl(unix.EPOLL_CTL_DEL, fd, nil) }

func (p *poller) ctl(op, fd int, ev *unix.EpollEvent) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.epfd < 0 {
		return net.ErrClosed
	}
	return os.NewSyscallError("epoll_ctl", unix.EpollCtl(p.epfd, op, fd, ev))
}

// wait returns what is ready, valid until the next call: in each event Fd is the
// id. After close it returns [net.ErrClosed], also a call that was blocked.
func (p *poller) wait() ([]unix.EpollEvent, error) {
	p.waitMu.Lock()
	defer p.waitMu.Unlock()
	for {
		p.mu.Lock()
		epfd := p.epfd
		p.mu.Unlock()
		if epfd < 0 {
			return nil, net.ErrClosed
		}
		switch n, err := unix.EpollWait(epfd, p.events[:], -1); {
		case err == unix.EINTR:
		case err != nil:
			return nil, os.NewSyscallError("epoll_wait", err)
		case n != 1 || p.events[0].Fd != wakeSlot:
			return p.events[:n], nil
		}
	}
}

// close waits for a wait that it interrupts.
func (p *poller) close() {
	p.mu.Lock()
	epfd := p.epfd
	p.epfd = -1
	p.mu.Unlock()
	if epfd < 0 {
		return
	}
	wakeEpoll(p.wake)
	p.waitMu.Lock()
	defer p.waitMu.Unlock()
	unix.Close(epfd)
	unix.Close(p.wake)
}
