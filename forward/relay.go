package forward

import (
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/gofwd/gofwd/stack"
)

// A relay joins the two ends of a TCP flow: outer is on the host's side, inner
// on the namespace's. What one end says, the other hears:
//
//	FIN      the other end's write side is shut; the other direction goes on
//	RST      the other end is reset, unless both directions wait for it to read
//	silence  keepalive of the host's socket ends it as if by RST
//
// Each direction is a goroutine, and copies with the best means that its two
// ends have in common: see copyHalf. After the FIN of an end its goroutine
// waits for a RST, which would otherwise be noticed only by the next write.
//
// It is for the tap path and all else that is not two sockets of the kernel: see
// [splicer].
type relay struct {
	outer, inner flowConn
	rule         *activeRule   // nil if no rule made it
	counters     *flowCounters // of the rule, counted live
	bufs         *bufferPool
	flow         Flow

	in, out int64        // bytes moved; valid when run has returned
	open    atomic.Int32 // directions that still copy
	once    sync.Once    // guards the following field
	ending  string
}

// How a relay ends, for the connection log.
const (
	endClosed   = "closed"           // both ends said FIN
	endOuter    = "reset by outside" // the host's side said RST, or died
	endInner    = "reset by inside"  // the namespace's side did
	endShutdown = "shutdown"         // the forwarder was closed
	endIdle     = "idle"             // for as long as the rule allows
	endRemoved  = "forward removed"  // the rule is gone, its time to drain too
	endAddrGone = "address gone"     // the container has lost the server's, see Refresh
)

// run relays until both directions have ended, and closes both ends.
func (r *relay) run() {
	r.open.Store(2)
	done := make(chan struct{})
	go r.runOut(done)
	r.in = r.half(r.inner, r.outer, &r.counters.bytesIn, endOuter, endInner)
	<-done
	r.finish(endClosed)
	r.outer.Close()
	r.inner.Close()
}

// runOut is the direction out of the namespace.
func (r *relay) runOut(done chan<- struct{}) {
	defer close(done)
	r.out = r.half(r.outer, r.inner, &r.counters.bytesOut, endInner, endOuter)
}

// half is one direction, to its very end. It returns the bytes moved.
func (r *relay) half(dst, src flowConn, live *atomic.Int64, srcDied, dstDied string) int64 {
	n, err := copyHalf(dst, src, live, r.bufs)
	if err == nil {
		err = dst.CloseWrite()
	}
	switch {
	case err != nil:
	case r.open.Add(-1) == 0:
		// The other direction, if it waits for a RST, does so on dst.
		_ = dst.SetReadDeadline(time.Unix(1, 0))
	default:
		err = awaitReset(src)
	}
	if err != nil {
		if isWrite(err) {
			srcDied = dstDied
		}
		r.abort(srcDied)
	}
	return n
}

// abort ends both directions at once, with RST to both ends. The first ending
// given is the one that is kept.
func (r *relay) abort(ending string) {
	r.finish(ending)
	abort(r.outer)
	abort(r.inner)
}

func (r *relay) finish(ending string) {
	r.once.Do(func() { r.ending = ending })
}

// abort closes c with RST where c can do that: a kernel socket, by lingering
// for no time (socket(7), tcp_disconnect), and a connection of the stack.
func abort(c net.Conn) {
	switch c := c.(type) {
	case interface{ Abort() error }:
		_ = c.Abort()
	case interface{ SetLinger(int) error }:
		_ = c.SetLinger(0)
		c.(net.Conn).Close()
	default:
		c.Close()
	}
}

// isWrite reports whether err is of the end that was written to.
func isWrite(err error) bool {
	var op *net.OpError
	return errors.As(err, &op) && (op.Op == "write" || op.Op == "close")
}

// copyHalf copies src to dst until src says FIN, counting in live what was
// written, and returns the count. Here is the choice of means: a connection of
// the stack moves its own buffers from and to a socket, everything else goes
// through buffers of ours.
func copyHalf(dst, src flowConn, live *atomic.Int64, bufs *bufferPool) (int64, error) {
	if tap, ok := src.(*stack.Conn); ok {
		if raw, ok := rawConn(dst); ok {
			return tap.CopyTo(raw, live)
		}
	}
	if raw, ok := rawConn(src); ok {
		if tap, ok := dst.(*stack.Conn); ok {
			return tap.CopyFrom(raw, live)
		}
		return copyBuffered(dst, newSocketReader(raw, bufs), live, bufs)
	}
	return copyBuffered(dst, &plainReader{src: src, bufs: bufs}, live, bufs)
}

// rawConn returns the kernel socket under c, if there is one.
func rawConn(c flowConn) (syscall.RawConn, bool) {
	sc, ok := c.(syscall.Conn)
	if !ok {
		return nil, false
	}
	raw, err := sc.SyscallConn()
	return raw, err == nil
}

// bufferReader reads into a buffer that it borrows.
type bufferReader interface {
	// next waits for data, and returns n bytes in a buffer of about the
	// class given, which the caller gives back; or, with an error, no
	// buffer. The error is io.EOF at the end.
	next(class int) (buf *copyBuffer, n int, err error)
}

// copyBuffered copies through buffers: larger ones after one that came full,
// smaller ones after one that would have fitted in less.
func copyBuffered(dst io.Writer, src bufferReader, live *atomic.Int64, bufs *bufferPool) (int64, error) {
	var total int64
	for class := 0; ; {
		buf, n, err := src.next(class)
		if errors.Is(err, io.EOF) {
			return total, nil
		}
		if err != nil {
			return total, err
		}
		switch class = buf.class; {
		case n == len(buf.data) && class < len(bufferSizes)-1:
			class++
		case class > 0 && n <= bufferSizes[class-1]:
			class--
		}
		n, err = dst.Write(buf.data[:n])
		bufs.put(buf)
		total += int64(n)
		live.Add(int64(n))
		if err != nil {
			return total, err
		}
	}
}

// socketReader reads a kernel socket. It reads inside the poller's callback, so
// that a socket that has nothing to read holds no buffer.
type socketReader struct {
	raw  syscall.RawConn
	bufs *bufferPool

	// Of the read under way; here, so that the callback is made only once.
	callback func(fd uintptr) bool
	class, n int
	buf      *copyBuffer
	err      error
}

func newSocketReader(raw syscall.RawConn, bufs *bufferPool) *socketReader {
	r := &socketReader{raw: raw, bufs: bufs}
	r.callback = r.read
	return r
}

// read reads once, and is false if there was nothing to read.
func (r *socketReader) read(fd uintptr) bool {
	r.buf = r.bufs.get(r.class)
	for {
		r.n, r.err = syscall.Read(int(fd), r.buf.data)
		if !errors.Is(r.err, syscall.EINTR) {
			break
		}
	}
	if r.n <= 0 {
		r.bufs.put(r.buf)
	}
	return !errors.Is(r.err, syscall.EAGAIN)
}

func (r *socketReader) next(class int) (*copyBuffer, int, error) {
	r.class = class
	if err := r.raw.Read(r.callback); err != nil {
		return nil, 0, err
	}
	switch {
	case r.err != nil:
		return nil, 0, r.err
	case r.n == 0:
		return nil, 0, io.EOF
	}
	return r.buf, r.n, nil
}

// plainReader reads anything, and holds a buffer while it waits.
type plainReader struct {
	src  io.Reader
	bufs *bufferPool
}

func (r *plainReader) next(class int) (*copyBuffer, int, error) {
	buf := r.bufs.get(class)
	for {
		n, err := r.src.Read(buf.data)
		if n > 0 {
			return buf, n, nil // err comes again with the next Read
		}
		if err != nil {
			r.bufs.put(buf)
			return nil, 0, err
		}
	}
}

// awaitReset waits until c, which has said FIN, says RST, and returns that; or
// until its read deadline passes or it is closed, which is nil. It returns at
// once where c can't be watched.
func awaitReset(c flowConn) (reset error) {
	if c, ok := c.(interface{ AwaitReset() error }); ok {
		return c.AwaitReset()
	}
	raw, ok := rawConn(c)
	if !ok {
		return nil
	}
	// The poller wakes its reader for EPOLLERR, too.
	_ = raw.Read(func(fd uintptr) bool {
		errno, err := syscall.GetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_ERROR)
		if err == nil && errno != 0 {
			reset = syscall.Errno(errno)
		}
		return reset != nil
	})
	return reset
}

// bufferSizes are the classes of copy buffers. 4 KiB hold most requests; the
// stack gains up to 256 KiB, by a factor of two over 32 KiB.
var bufferSizes = [...]int{4 << 10, 32 << 10, 256 << 10}

// bufferBudget bounds what the buffers of all flows together hold, but for the
// smallest, which everyone gets: an end that doesn't read pins a buffer.
const bufferBudget = 64 << 20

// copyBuffer is a buffer of a [bufferPool].
type copyBuffer struct {
	class int
	data  []byte
}

// bufferPool lends copy buffers. The zero value is ready.
type bufferPool struct {
	pools [len(bufferSizes)]sync.Pool
	lent  atomic.Int64 // bytes
}

// get lends a buffer of a class, or of a smaller one where that would exceed
// the budget.
func (p *bufferPool) get(class int) *copyBuffer {
	for class > 0 && p.lent.Load()+int64(bufferSizes[class]) > bufferBudget {
		class--
	}
	p.lent.Add(int64(bufferSizes[class]))
	if b, ok := p.pools[class].Get().(*copyBuffer); ok {
		return b
	}
	return &copyBuffer{class: class, data: make([]byte, bufferSizes[class])}
}

// put takes a buffer back.
func (p *bufferPool) put(b *copyBuffer) {
	p.lent.Add(-int64(len(b.data)))
	p.pools[b.class].Put(b)
}
