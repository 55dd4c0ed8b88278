package forward

import (
	"errors"
	"net"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// poller waits for many sockets at once: an epoll instance whose own descriptor
// sits in the Go runtime's poller (epoll instances nest, epoll(7)). One goroutine
// in wait serves thousands of sockets, and costs no thread.
//
// The runtime watches edge-triggered, the poller level-triggered: wait parks only
// after it has seen that nothing is ready, so no edge is missed.
type poller struct {
	file *os.File
	raw  syscall.RawConn

	// Of the waiting goroutine; the function in a field, so that waiting
	// allocates nothing.
	waitFn func(fd uintptr) bool
	events [64]unix.EpollEvent
	ready  int
	err    error
}

func newPoller() (*poller, error) {
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("epoll_create1", err)
	}
	// os.NewFile gives only non-blocking descriptors to the runtime's poller.
	if err := unix.SetNonblock(fd, true); err != nil {
		unix.Close(fd)
		return nil, os.NewSyscallError("fcntl", err)
	}
	p := &poller{file: os.NewFile(uintptr(fd), "epoll")}
	if p.raw, err = p.file.SyscallConn(); err != nil {
		p.file.Close()
		return nil, err
	}
	p.waitFn = p.tryWait
	return p, nil
}

// add watches fd for input and errors; wait reports it as id, until remove.
func (p *poller) add(fd int, id uint32) error {
	ev := unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(id)}
	return p.ctl(unix.EPOLL_CTL_ADD, fd, &ev)
}

// remove ends the watch. It comes before the close of fd: a copy of fd that a
// child holds between fork and exec would keep the watch alive.
func (p *poller) remove(fd int) error {
	return p.ctl(unix.EPOLL_CTL_DEL, fd, nil)
}

func (p *poller) ctl(op, fd int, ev *unix.EpollEvent) error {
	var operr error
	err := p.raw.Control(func(ep uintptr) { operr = unix.EpollCtl(int(ep), op, fd, ev) })
	if err == nil {
		err = os.NewSyscallError("epoll_ctl", operr)
	}
	return err
}

// wait returns what is ready, valid until the next call: in each event Fd is the
// id. After close it returns [net.ErrClosed], also a call that was blocked.
func (p *poller) wait() ([]unix.EpollEvent, error) {
	if err := p.raw.Read(p.waitFn); err != nil {
		if errors.Is(err, os.ErrClosed) {
			err = net.ErrClosed
		}
		return nil, err
	}
	return p.events[:p.ready], p.err
}

func (p *poller) tryWait(ep uintptr) bool {
	for {
		n, err := unix.EpollWait(int(ep), p.events[:], 0)
		if err == unix.EINTR {
			continue
		}
		p.ready, p.err = max(n, 0), os.NewSyscallError("epoll_wait", err)
		return n != 0
	}
}

func (p *poller) close() error { return p.file.Close() }
