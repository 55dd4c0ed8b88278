package forward

import (
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Pipes are what splice(2) moves data through, and they are rationed: all pipes
// of a user together may have pipe-user-pages-soft pages (64 MiB by default),
// then his programs get pipes of two pages, whichever program it was that took
// the others (pipe(7)). So a flow holds a pipe only while data waits in it, and
// this process takes no more than half of the ration; what finds no pipe is
// copied instead.
const (
	// pipePages is what a pipe has from the start (PIPE_DEF_BUFFERS). A page
	// here is a slot that takes one fragment of a socket buffer: up to
	// 32 KiB from a local sender, 1.4 KiB from some network cards.
	pipePages = 16
	// pipePagesBulk is what a flow is given that fills a pipe again and
	// again: 1 MiB, pipe-max-size.
	pipePagesBulk = 256
)

// pipe is a pipe(2), empty unless a half of a flow holds it.
type pipe struct {
	r, w  int
	pages int
	n     int // bytes that wait in it
}

// pipePool hands out pipes within the ration. The zero value is ready.
type pipePool struct {
	once  sync.Once
	limit int          // pages
	rests atomic.Int64 // bytes that short writes left over, instead of in a pipe

	mu      sync.Mutex // guards the following fields
	refused time.Time  // when the kernel gave none last
	pages   int        // of all pipes, handed out or not
	free    []*pipe    // empty, of pipePages
	bulk    []*pipe    // empty, of pipePagesBulk
}

// How many empty pipes are kept. A flow needs one only while its receiver is slower
// than its sender, or for the time of two system calls. What is kept is missing in the
// ration of the user's other programs, and of those of us that serve other containers.
const (
	keptPipes     = 8
	keptPipesBulk = 2
)

// get returns an empty pipe, for bulk a big one if the ration allows; nil if
// there is none to be had.
func (p *pipePool) get(bulk bool) *pipe {
	p.once.Do(func() { p.limit = pipeRation() })
	p.mu.Lock()
	defer p.mu.Unlock()
	if bulk {
		if n := len(p.bulk); n > 0 {
			x := p.bulk[n-1]
			p.bulk = p.bulk[:n-1]
			return x
		}
		// Big pipes take half of what we have, so that there are small
		// ones for the many.
		if p.pages+pipePagesBulk <= p.limit/2 && time.Since(p.refused) > refusedPause {
			return p.makeLocked(pipePagesBulk)
		}
	}
	if n := len(p.free); n > 0 {
		x := p.free[n-1]
		p.free = p.free[:n-1]
		return x
	}
	if p.pages+pipePages <= p.limit && time.Since(p.refused) > refusedPause {
		return p.makeLocked(pipePages)
	}
	return nil
}

// refusedPause is how long the kernel is not asked for pipes after it gave none.
const refusedPause = 100 * time.Millisecond

func (p *pipePool) makeLocked(pages int) *pipe {
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_NONBLOCK|unix.O_CLOEXEC); err != nil {
		return nil // no descriptors: what is copied needs none
	}
	x := &pipe{r: fds[0], w: fds[1], pages: pipePages}
	// Where the user's ration is used up, by whomever, the pipe has two slots:
	// splicing two fragments at a time takes longer than copying.
	if size, err := unix.FcntlInt(uintptr(x.w), unix.F_GETPIPE_SZ, 0); err != nil || size < pipePages*os.Getpagesize() {
		unix.Close(x.r)
		unix.Close(x.w)
		p.refused = time.Now()
		return nil
	}
	if pages > pipePages {
		// EPERM says that the user's other programs have used his ration.
		if _, err := unix.FcntlInt(uintptr(x.w), unix.F_SETPIPE_SZ, pages*os.Getpagesize()); err == nil {
			x.pages = pages
		}
	}
	p.pages += x.pages
	return x
}

// put takes x back; one that is not empty is closed.
func (p *pipePool) put(x *pipe) {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case x.n > 0:
		p.closeLocked(x)
	case x.pages == pipePagesBulk && len(p.bulk) < keptPipesBulk:
		p.bulk = append(p.bulk, x)
	case x.pages == pipePages && len(p.free) < keptPipes:
		p.free = append(p.free, x)
	default:
		p.closeLocked(x)
	}
}

func (p *pipePool) closeLocked(x *pipe) {
	unix.Close(x.r)
	unix.Close(x.w)
	p.pages -= x.pages
}

// close closes the pipes that nobody holds.
func (p *pipePool) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, x := range append(p.free, p.bulk...) {
		p.closeLocked(x)
	}
	p.free, p.bulk = nil, nil
}

// pipeRation returns how many pages of pipes this process may have: half of
// what its user may.
func pipeRation() int {
	b, err := os.ReadFile("/proc/sys/fs/pipe-user-pages-soft")
	if err != nil {
		return 1 << 13
	}
	soft, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil || soft == 0 { // 0 is no limit
		return 1 << 13
	}
	return soft / 2
}
