package forward

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand"
	"net"
	"runtime"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// splicedPair returns the two outer ends of a flow that s moves, and how it ended.
func splicedPair(t *testing.T, s *splicer, sndbuf int) (outside, inside *net.TCPConn, counters *flowCounters, ended chan string) {
	t.Helper()
	outside, inside, outer, inner := twoPairs(t, sndbuf)
	counters, ended = &flowCounters{}, make(chan string, 1)
	f := &splicedFlow{counters: counters, events: &eventHub{}, ended: func(_ *splicedFlow, how string) { ended <- how }}
	require.True(t, s.splice(outer, inner, f))
	return outside, inside, counters, ended
}

// twoPairs returns two connections: outer and inner are what a relay joins.
func twoPairs(t *testing.T, sndbuf int) (outside, inside, outer, inner *net.TCPConn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer l.Close()
	pair := func() (far, near *net.TCPConn) {
		c, err := net.Dial("tcp", l.Addr().String())
		require.NoError(t, err)
		a, err := l.Accept()
		require.NoError(t, err)
		if sndbuf > 0 {
			require.NoError(t, a.(*net.TCPConn).SetWriteBuffer(sndbuf))
		}
		return c.(*net.TCPConn), a.(*net.TCPConn)
	}
	outside, outer = pair()
	inside, inner = pair()
	t.Cleanup(func() { outside.Close(); inside.Close() })
	return outside, inside, outer, inner
}

// Flows that one loop has begun are spread over all as soon as they are bulk, and
// lose nothing on the way.
func TestSplicerSpreadsBulk(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(2)) // a loop for each
	s := newTestSplicer(t)
	require.Len(t, s.loops, 2)
	const flows, size = 4, 8 << 20
	first := s.loops[0]
	var wg sync.WaitGroup
	outsides := make([]*net.TCPConn, flows)
	for i := range flows {
		outside, inside, outer, inner := twoPairs(t, 0)
		outsides[i] = outside
		f := &splicedFlow{counters: &flowCounters{}, events: &eventHub{}, ended: func(*splicedFlow, string) {}}
		var err error
		f.fds[0], err = duplicate(outer)
		require.NoError(t, err)
		f.fds[1], err = duplicate(inner)
		require.NoError(t, err)
		require.NoError(t, errors.Join(outer.Close(), inner.Close()))
		require.True(t, first.do(func() { first.adopt(f) }))
		wg.Go(func() {
			n, err := io.CopyN(io.Discard, inside, size)
			if err != nil {
				t.Errorf("got %d bytes: %v", n, err)
			}
		})
	}
	require.Empty(t, s.loops[1].all())
	for _, c := range outsides {
		wg.Go(func() {
			if _, err := c.Write(make([]byte, size)); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	require.Len(t, first.all(), flows/2)
	require.Len(t, s.loops[1].all(), flows/2)
}

func newTestSplicer(t *testing.T) *splicer {
	t.Helper()
	s, err := newSplicer(nil)
	require.NoError(t, err)
	t.Cleanup(s.close)
	return s
}

// Every byte arrives, in both directions at once, in lots of all sizes, through
// small socket buffers, so that writes are short, and through large ones.
func TestSplicerMovesEveryByte(t *testing.T) {
	s := newTestSplicer(t)
	for _, sndbuf := range []int{0, 4096} {
		t.Run(fmt.Sprint(sndbuf), func(t *testing.T) {
			outside, inside, counters, ended := splicedPair(t, s, sndbuf)
			const size = 8 << 20
			var sums [4][32]byte
			var wg sync.WaitGroup
			send := func(c *net.TCPConn, seed int64, sum *[32]byte) {
				r := rand.New(rand.NewSource(seed))
				h := sha256.New()
				for left := size; left > 0; {
					b := make([]byte, min(left, 1+r.Intn(1<<r.Intn(19))))
					r.Read(b)
					h.Write(b)
					if _, err := c.Write(b); err != nil {
						t.Error(err)
						return
					}
					left -= len(b)
				}
				c.CloseWrite()
				h.Sum(sum[:0])
			}
			receive := func(c *net.TCPConn, sum *[32]byte) {
				h := sha256.New()
				if _, err := io.Copy(h, c); err != nil {
					t.Error(err)
				}
				h.Sum(sum[:0])
			}
			wg.Go(func() { send(outside, 1, &sums[0]) })
			wg.Go(func() { receive(inside, &sums[1]) })
			wg.Go(func() { send(inside, 2, &sums[2]) })
			wg.Go(func() { receive(outside, &sums[3]) })
			wg.Wait()
			require.Equal(t, sums[0], sums[1])
			require.Equal(t, sums[2], sums[3])
			require.Equal(t, endClosed, <-ended)
			require.EqualValues(t, size, counters.bytesIn.Load())
			require.EqualValues(t, size, counters.bytesOut.Load())
		})
	}
}

func TestSplicerHalfClose(t *testing.T) {
	s := newTestSplicer(t)
	outside, inside, _, ended := splicedPair(t, s, 0)
	require.NoError(t, outside.CloseWrite())
	_, err := inside.Read(make([]byte, 1))
	require.ErrorIs(t, err, io.EOF)
	for range 3 { // the other direction goes on
		_, err = inside.Write([]byte("x"))
		require.NoError(t, err)
		_, err = io.ReadFull(outside, make([]byte, 1))
		require.NoError(t, err)
	}
	select {
	case how := <-ended:
		t.Fatal(how)
	case <-time.After(20 * time.Millisecond):
	}
	require.NoError(t, inside.Close())
	_, err = outside.Read(make([]byte, 1))
	require.ErrorIs(t, err, io.EOF)
	require.Equal(t, endClosed, <-ended)
}

// RST is passed on as RST, also where one direction has ended already, and while
// nobody reads or writes.
func TestSplicerReset(t *testing.T) {
	s := newTestSplicer(t)
	for _, halfClosed := range []bool{false, true} {
		for _, side := range []int{0, 1} {
			outside, inside, _, ended := splicedPair(t, s, 0)
			ends := []*net.TCPConn{outside, inside}
			if halfClosed {
				require.NoError(t, ends[side].CloseWrite())
				_, err := ends[1-side].Read(make([]byte, 1))
				require.ErrorIs(t, err, io.EOF)
			}
			require.NoError(t, ends[side].SetLinger(0))
			require.NoError(t, ends[side].Close())
			require.Equal(t, endOf(side), <-ended)
			_, err := ends[1-side].Write([]byte("x"))
			if err == nil {
				_, err = ends[1-side].Read(make([]byte, 1))
			}
			require.True(t, errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE), "%v", err)
		}
	}
}

// A receiver that doesn't read holds a pipe, and when it is gone the pipe is too:
// the ration is shared with the user's other programs (pipe(7)).
func TestSplicerPipesAreRationed(t *testing.T) {
	s := newTestSplicer(t)
	var conns []*net.TCPConn
	for range 40 {
		outside, _, _, _ := splicedPair(t, s, 0)
		conns = append(conns, outside)
		outside.SetWriteDeadline(time.Now().Add(50 * time.Millisecond))
		buf := make([]byte, 1<<20)
		for {
			if _, err := outside.Write(buf); err != nil {
				break
			}
		}
	}
	s.pipes.mu.Lock()
	pages, limit := s.pipes.pages, s.pipes.limit
	s.pipes.mu.Unlock()
	require.Positive(t, pages)
	require.LessOrEqual(t, pages, limit)
	for _, c := range conns {
		c.SetLinger(0)
		c.Close()
	}
	require.Eventually(t, func() bool {
		s.pipes.mu.Lock()
		defer s.pipes.mu.Unlock()
		return s.pipes.pages <= keptPipes*pipePages+keptPipesBulk*pipePagesBulk
	}, 5*time.Second, 10*time.Millisecond)
}

// A flow that waits for its ends holds no pipe, whatever it has moved before.
func TestSplicerIdleFlowHoldsNoPipe(t *testing.T) {
	s := newTestSplicer(t)
	outside, inside, _, _ := splicedPair(t, s, 0)
	inside.SetDeadline(time.Now().Add(10 * time.Second))
	for _, size := range []int{20000, 4 << 20, 100, 20000} {
		var wg sync.WaitGroup
		wg.Go(func() { _, _ = outside.Write(make([]byte, size)) })
		_, err := io.ReadFull(inside, make([]byte, size))
		wg.Wait()
		require.NoError(t, err)
		require.Eventually(t, func() bool {
			p := &s.pipes
			p.mu.Lock()
			defer p.mu.Unlock()
			return p.pages == len(p.free)*pipePages+len(p.bulk)*pipePagesBulk
		}, 5*time.Second, time.Millisecond, "after %d bytes", size)
	}
}

// Without pipes, as when other programs of the user have taken all, bulk is copied,
// and what slow receivers leave over is bounded and accounted for.
func TestSplicerWithoutPipes(t *testing.T) {
	s := newTestSplicer(t)
	s.pipes.once.Do(func() {}) // a ration of none
	outside, inside, _, _ := splicedPair(t, s, 0)
	inside.SetDeadline(time.Now().Add(10 * time.Second))
	data := pattern(8 << 20)
	var wg sync.WaitGroup
	wg.Go(func() { _, _ = outside.Write(data) })
	got := make([]byte, len(data))
	_, err := io.ReadFull(inside, got[:1<<20])
	require.NoError(t, err)
	time.Sleep(50 * time.Millisecond) // a slow receiver
	require.LessOrEqual(t, s.pipes.rests.Load(), int64(bufferSizeBulk))
	_, err = io.ReadFull(inside, got[1<<20:])
	require.NoError(t, err)
	wg.Wait()
	require.Equal(t, data, got)
	require.Zero(t, s.pipes.pages)
	require.Eventually(t, func() bool { return s.pipes.rests.Load() == 0 }, 5*time.Second, time.Millisecond)

	stalled, gone, _, ended := splicedPair(t, s, 0)
	stalled.SetWriteDeadline(time.Now().Add(100 * time.Millisecond))
	for err = error(nil); err == nil; {
		_, err = stalled.Write(data)
	}
	require.Positive(t, s.pipes.rests.Load())
	gone.SetLinger(0)
	gone.Close()
	<-ended
	require.Zero(t, s.pipes.rests.Load())
}

// Neither read(2) nor splice(2) goes beyond urgent data at once: a short read before
// it does not say that nothing is left. The urgent byte itself is lost, as with every
// relay that does not ask for it.
func TestSplicerGoesOnAfterUrgentData(t *testing.T) {
	s := newTestSplicer(t)
	for _, size := range []int{3, 1 << 20} {
		outside, inside, _, _ := splicedPair(t, s, 0)
		inside.SetDeadline(time.Now().Add(10 * time.Second))
		part := pattern(size)
		fd, err := duplicate(outside)
		require.NoError(t, err)
		defer unix.Close(fd)
		var wg sync.WaitGroup
		wg.Go(func() {
			_, _ = outside.Write(part)
			_ = unix.Sendto(fd, []byte("!"), unix.MSG_OOB, nil)
			_, _ = outside.Write(part)
		})
		got := make([]byte, 2*size)
		_, err = io.ReadFull(inside, got)
		require.NoError(t, err, "of %d", size)
		require.Equal(t, append(part, part...), got)
		wg.Wait()
	}
}

// An accepted socket inherits the listener's options, so that none has to be set
// for each connection.
func TestKernelAcceptedSocketInheritsOptions(t *testing.T) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	require.NoError(t, err)
	defer unix.Close(fd)
	require.NoError(t, prepareTCP(fd))
	require.NoError(t, unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}))
	require.NoError(t, unix.Listen(fd, 1))
	at, err := unix.Getsockname(fd)
	require.NoError(t, err)
	c, err := net.Dial("tcp", addrPortOf(at).String())
	require.NoError(t, err)
	defer c.Close()
	a, _, err := unix.Accept4(fd, unix.SOCK_CLOEXEC)
	require.NoError(t, err)
	defer unix.Close(a)
	for _, o := range append(keepAliveOptions(), option{unix.IPPROTO_TCP, unix.TCP_NODELAY, 1}) {
		v, err := unix.GetsockoptInt(a, o.level, o.name)
		require.NoError(t, err)
		require.Equal(t, o.value, v, "option %d/%d", o.level, o.name)
	}
}

// What a short write leaves over is kept, and is no error.
func TestSplicedHalfShortWrite(t *testing.T) {
	socketPair := func() [2]int {
		fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
		require.NoError(t, err)
		t.Cleanup(func() { unix.Close(fds[0]); unix.Close(fds[1]) })
		return fds
	}
	src, dst := socketPair(), socketPair()
	require.NoError(t, unix.SetsockoptInt(dst[0], unix.SOL_SOCKET, unix.SO_SNDBUF, 4608))
	const size = bufferSize - 1 // not yet bulk
	_, err := unix.Write(src[0], make([]byte, size))
	require.NoError(t, err)

	var pipes pipePool
	h := splicedHalf{src: src[1], dst: dst[0]}
	received, drained := 0, make([]byte, size)
	for w, short := waits(0), 0; w != waitsRead; {
		var spliceErr *spliceError
		w, spliceErr = h.run(&pipes, make([]byte, bufferSize))
		require.Nil(t, spliceErr)
		if w == waitsWrite {
			short++
			require.NotEmpty(t, h.rest)
		} else {
			require.Positive(t, short)
		}
		n, err := unix.Read(dst[1], drained)
		require.NoError(t, err)
		received += n
	}
	require.Equal(t, size, received)
	require.Empty(t, h.rest)
}

// The loop gathers where several flows move much, and not for one.
func TestGathersForSeveralFlows(t *testing.T) {
	l := &spliceLoop{bulk: bulkFlows{last: 1}}
	for range 3 {
		l.bulk.moved(1)
	}
	require.False(t, l.bulk.several)
	l.bulk.moved(2)
	require.True(t, l.bulk.several)
	l.gather()
	l.bulk.moved(2)
	require.False(t, l.bulk.several)
}
