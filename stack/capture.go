package stack

import (
	"bufio"
	"encoding/binary"
	"io"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// captureQueue is how many frames may wait for a slow writer.
	captureQueue = 512
	// captureSnap is the longest frame that is kept; none is longer.
	captureSnap = 1 << 18
)

// capture copies the frames of a link to a writer in pcap format
// (draft-ietf-opsawg-pcap). It never holds up the link: frames that the writer
// is too slow for are counted and left out, and a writer that fails ends the
// capture. A super-frame is one packet, and a checksum that is left to the
// container's kernel is not yet right.
type capture struct {
	run   atomic.Pointer[captureRun]
	drops *atomic.Uint64
}

type captureRun struct {
	mu     sync.Mutex // guards queue against close
	closed bool
	queue  chan captured
	done   chan struct{}
	pool   sync.Pool
}

type captured struct {
	when time.Time
	data []byte
}

// Capture writes every frame of the link to w from now on, until stop is called
// or w fails; a failure is logged. stop returns when w will not be used again.
// Only one capture runs at a time: another ends the first.
func (s *Stack) Capture(w io.Writer) (stop func()) {
	r := &captureRun{queue: make(chan captured, captureQueue), done: make(chan struct{})}
	go r.writeLoop(w, s.ep.log)
	if old := s.ep.capture.run.Swap(r); old != nil {
		old.stop()
	}
	return func() {
		s.ep.capture.run.CompareAndSwap(r, nil)
		r.stop()
	}
}

func (r *captureRun) stop() {
	r.mu.Lock()
	if !r.closed {
		r.closed = true
		close(r.queue)
	}
	r.mu.Unlock()
	<-r.done
}

// read takes the first n bytes of a frame that was scattered over bufs.
func (c *capture) read(bufs [][]byte, n int) {
	if r := c.run.Load(); r != nil && n > vnetHdrLen {
		c.put(r, bufs, n-vnetHdrLen)
	}
}

// frame takes a frame that is about to be written.
func (c *capture) frame(iov [][]byte) {
	if r := c.run.Load(); r != nil {
		c.put(r, iov, captureSnap)
	}
}

// put queues at most n bytes of a frame, without its virtio header.
func (c *capture) put(r *captureRun, bufs [][]byte, n int) {
	data, _ := r.pool.Get().([]byte)
	data = data[:0]
	skip := vnetHdrLen
	for _, b := range bufs {
		b = b[min(skip, len(b)):]
		skip = 0
		b = b[:min(len(b), n-len(data))]
		data = append(data, b...)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return
	}
	select {
	case r.queue <- captured{time.Now(), data}:
	default:
		c.drops.Add(1)
	}
}

func (r *captureRun) writeLoop(w io.Writer, log *slog.Logger) {
	defer close(r.done)
	buf := bufio.NewWriterSize(w, 1<<18)
	if err := r.writeAll(buf); err != nil {
		log.Warn("capture stopped, the traffic goes on", "err", err)
		r.mu.Lock()
		r.closed = true
		r.mu.Unlock()
	}
}

func (r *captureRun) writeAll(w *bufio.Writer) error {
	const magicNanoseconds, linkTypeEthernet = 0xa1b23c4d, 1
	var h [24]byte
	ne := binary.NativeEndian
	ne.PutUint32(h[0:], magicNanoseconds)
	ne.PutUint16(h[4:], 2)
	ne.PutUint16(h[6:], 4)
	ne.PutUint32(h[16:], captureSnap)
	ne.PutUint32(h[20:], linkTypeEthernet)
	if _, err := w.Write(h[:]); err != nil {
		return err
	}
	if err := w.Flush(); err != nil {
		return err
	}
	for f := range r.queue {
		ne.PutUint32(h[0:], uint32(f.when.Unix()))
		ne.PutUint32(h[4:], uint32(f.when.Nanosecond()))
		ne.PutUint32(h[8:], uint32(len(f.data)))
		ne.PutUint32(h[12:], uint32(len(f.data)))
		if _, err := w.Write(h[:16]); err != nil {
			return err
		}
		if _, err := w.Write(f.data); err != nil {
			return err
		}
		r.pool.Put(f.data) //nolint:staticcheck // a slice header's allocation, while capturing only
		if len(r.queue) == 0 {
			if err := w.Flush(); err != nil {
				return err
			}
		}
	}
	return w.Flush()
}
