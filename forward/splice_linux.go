package forward

import (
	"errors"

	"golang.org/x/sys/unix"
)

// splicedHalf is one direction of a flow between two non-blocking TCP sockets.
// Its data is in one of three places: in the kernel's socket buffers, in a pipe,
// or, what a short write left over, in rest. A half that waits for its source
// holds neither pipe nor buffer.
//
// Small amounts are read and written: two system calls, no pipe. What fills the
// buffer is bulk, and goes by splice(2) as long as it keeps coming.
type splicedHalf struct {
	src, dst int
	pipe     *pipe
	rest     []byte
	bulk     bool // the last read filled the buffer
	fills    int  // how often in a row a small pipe was filled
	hup      bool // src has sent, or lost, its last byte (EPOLLRDHUP)
	urgent   bool // src has sent urgent data (EPOLLPRI)
	noPipe   bool // there was none to be had: more is copied at once
	last     bool // the other direction is done: close(2) will tell dst
	eof      bool // and it was read
	done     bool // and dst was told

	moved int64 // bytes that reached dst
}

// waits is what a half waits for.
type waits uint8

const (
	waitsRead  waits = iota + 1 // for src to be readable
	waitsWrite                  // for dst to be writable
	waitsTurn                   // for nothing: others should have their turn
	waitsNone                   // it is done
)

const (
	// bufferSize is how much is copied at once of the one buffer that all halves of
	// a thread share. Reads that fill it start splicing.
	bufferSize = 16 << 10
	// bufferSizeBulk is the whole of it, for bulk without a pipe.
	bufferSizeBulk = 256 << 10
	// maxRests is how many bytes of all flows may be left over for bulk to be copied so.
	maxRests = 16 << 20
	// spliceSize is the most that one splice(2) is asked to move.
	spliceSize = 1 << 20
	// A small pipe is taken for full from smallPipeFull bytes on: its slots may
	// be used up by then. What does that fillsForBulk times gets a big one.
	smallPipeFull = 32 << 10
	fillsForBulk  = 2
	// turnSize is how much a half moves before others get their turn.
	turnSize = 2 << 20
)

// spliceError is an error of one of the two sockets of a half.
type spliceError struct {
	err error
	dst bool // it is the half's destination that failed
}

func (e *spliceError) Error() string { return e.err.Error() }
func (e *spliceError) Unwrap() error { return e.err }

// run moves bytes from src to dst until one of them is not ready. buf is used
// during the call only. After an error both directions of the flow are lost.
func (h *splicedHalf) run(pipes *pipePool, buf []byte) (waits, *spliceError) {
	for end := h.moved + turnSize; h.moved < end; {
		w, err := h.step(pipes, buf)
		if w != 0 || err != nil {
			return w, err
		}
	}
	return waitsTurn, nil
}

// step does one thing. It returns what the half waits for then, 0 if it can go on.
func (h *splicedHalf) step(pipes *pipePool, buf []byte) (waits, *spliceError) {
	switch {
	case h.done:
		return waitsNone, nil
	case len(h.rest) > 0:
		return h.flush(pipes)
	case h.pipe != nil && h.pipe.n > 0:
		return h.drain()
	case h.eof:
		h.release(pipes)
		h.done = true
		if h.last {
			return waitsNone, nil
		}
		// ENOTCONN: dst was reset, as its own half will see.
		if err := unix.Shutdown(h.dst, unix.SHUT_WR); err != nil && err != unix.ENOTCONN {
			return 0, &spliceError{err, true}
		}
		return waitsNone, nil
	case h.bulk && !h.urgent:
		return h.fill(pipes)
	}
	h.release(pipes) // which is empty, and was for bulk
	return h.copy(pipes, buf)
}

// copy reads a buffer and writes it.
func (h *splicedHalf) copy(pipes *pipePool, buf []byte) (waits, *spliceError) {
	if !h.noPipe || pipes.rests.Load() > maxRests {
		buf = buf[:bufferSize]
	}
	n, err := read(h.src, buf)
	if err != nil {
		h.noPipe = false
		return waitsRead, unlessAgain(err, false)
	}
	if n == 0 {
		h.eof = true
		return 0, nil
	}
	h.bulk = n == len(buf) && !h.noPipe
	full := n == len(buf)
	m, err := write(h.dst, buf[:n])
	h.moved += int64(m)
	if m < n {
		h.rest = append([]byte(nil), buf[m:n]...)
		pipes.rests.Add(int64(len(h.rest)))
		return waitsWrite, unlessAgain(err, true)
	}
	if !full && !h.hup && !h.urgent {
		h.noPipe = false
		// Nothing is left: with edge-triggered events a short read is as
		// good as EAGAIN (epoll(7), question 9), but for a FIN, and before urgent
		// data, at which splice(2) stops for ever (tcp(7); telnet and FTP send it).
		return waitsRead, nil
	}
	return 0, nil
}

// flush writes what a short write left over.
func (h *splicedHalf) flush(pipes *pipePool) (waits, *spliceError) {
	n, err := write(h.dst, h.rest)
	h.moved += int64(n)
	pipes.rests.Add(int64(-n))
	if h.rest = h.rest[n:]; len(h.rest) > 0 {
		return waitsWrite, unlessAgain(err, true)
	}
	h.rest = nil
	return 0, nil
}

// fill moves from src into a pipe: a small one first, a big one for what fills
// that again and again.
func (h *splicedHalf) fill(pipes *pipePool) (waits, *spliceError) {
	if h.fills == fillsForBulk {
		h.release(pipes)
	}
	if h.pipe == nil {
		if h.pipe = pipes.get(h.fills >= fillsForBulk); h.pipe == nil {
			h.bulk, h.noPipe = false, true
			return 0, nil
		}
	}
	n, err := splice(h.src, h.pipe.w, spliceSize)
	if err != nil {
		h.release(pipes)
		return waitsRead, unlessAgain(err, false)
	}
	if n == 0 {
		h.eof = true
		return 0, nil
	}
	h.pipe.n = n
	h.bulk = n >= bufferSize
	if n >= smallPipeFull {
		h.fills++
	} else {
		h.fills = 0
	}
	return 0, nil
}

// drain moves from the pipe to dst.
func (h *splicedHalf) drain() (waits, *spliceError) {
	n, err := splice(h.pipe.r, h.dst, h.pipe.n)
	h.moved += int64(n)
	h.pipe.n -= n
	if err != nil {
		return waitsWrite, unlessAgain(err, true)
	}
	return 0, nil
}

// release gives the pipe back, and what was left over by a flow that ends.
func (h *splicedHalf) release(pipes *pipePool) {
	pipes.rests.Add(int64(-len(h.rest)))
	h.rest = nil
	if h.pipe != nil {
		pipes.put(h.pipe)
		h.pipe = nil
	}
}

// unlessAgain returns the error that err is for the flow. A short write is none.
func unlessAgain(err error, dst bool) *spliceError {
	if err == nil || errors.Is(err, unix.EAGAIN) {
		return nil
	}
	return &spliceError{err, dst}
}

func read(fd int, b []byte) (int, error) {
	for {
		n, err := unix.Read(fd, b)
		if err != unix.EINTR {
			return max(n, 0), err
		}
	}
}

// write sends with MSG_NOSIGNAL, which saves Go's runtime a SIGPIPE.
func write(fd int, b []byte) (int, error) {
	for {
		n, err := unix.SendmsgN(fd, b, nil, nil, unix.MSG_NOSIGNAL)
		if err != unix.EINTR {
			return max(n, 0), err
		}
	}
}

func splice(from, to, n int) (int, error) {
	for {
		m, err := unix.Splice(from, nil, to, nil, n, unix.SPLICE_F_NONBLOCK|unix.SPLICE_F_MOVE)
		if err != unix.EINTR {
			return max(int(m), 0), err
		}
	}
}
