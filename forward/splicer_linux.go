package forward

import (
	"cmp"
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"

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

// maxSpliceLoops bounds the threads on machines with many processors.
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
// RST once refused has looked at it. It is false if there is not even one for that.
func (s *splicer) refuse(listener int, refused func(fd int, src netip.AddrPort)) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.reserve < 0 {
		s.reserve = reserveFD()
		return false
	}
	unix.Close(s.reserve)
	fd, sa, err := unix.Accept4(listener, unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC)
	if err == nil {
		refused(fd, addrPortOf(sa))
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
