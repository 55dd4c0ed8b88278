package forward

import (
	"bytes"
	"crypto/sha256"
	"io"
	"math/rand/v2"
	"net"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// tcpPair returns both ends of a TCP connection over the loopback.
func tcpPair(tb testing.TB) (a, b *net.TCPConn) {
	tb.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(tb, err)
	defer ln.Close()
	c, err := net.Dial("tcp", ln.Addr().String())
	require.NoError(tb, err)
	s, err := ln.Accept()
	require.NoError(tb, err)
	tb.Cleanup(func() { c.Close(); s.Close() })
	for _, c := range []net.Conn{c, s} {
		require.NoError(tb, c.SetDeadline(time.Now().Add(20*time.Second)))
	}
	return c.(*net.TCPConn), s.(*net.TCPConn)
}

// plainConn hides that a connection is a kernel socket, as one of the stack is
// none.
type plainConn struct{ flowConn }

func (c plainConn) Abort() error {
	abort(c.flowConn)
	return nil
}

// testRelay starts a relay and returns the far ends: the client's and the
// server's. Its own ends have no deadline but what the relay sets.
func testRelay(t *testing.T, wrap func(flowConn) flowConn) (client, server *net.TCPConn, r *relay, done chan struct{}) {
	client, outer := tcpPair(t)
	server, inner := tcpPair(t)
	outer.SetDeadline(time.Time{})
	inner.SetDeadline(time.Time{})
	r = &relay{outer: outer, inner: wrap(inner), counters: new(flowCounters), bufs: new(bufferPool)}
	done = make(chan struct{})
	go func() {
		defer close(done)
		r.run()
	}()
	t.Cleanup(func() {
		r.abort(endShutdown)
		<-done
	})
	return client, server, r, done
}

// eachKind runs a test with a namespace end that is a kernel socket, and with
// one that is not.
func eachKind(t *testing.T, test func(t *testing.T, wrap func(flowConn) flowConn)) {
	t.Run("socket", func(t *testing.T) { test(t, func(c flowConn) flowConn { return c }) })
	t.Run("plain", func(t *testing.T) { test(t, func(c flowConn) flowConn { return plainConn{c} }) })
}

func wait(t *testing.T, done <-chan struct{}) {
	t.Helper()
	select {
	case <-done:
	case <-time.After(10 * time.Second):
		require.FailNow(t, "the relay does not end")
	}
}

func TestRelayBothWays(t *testing.T) {
	eachKind(t, func(t *testing.T, wrap func(flowConn) flowConn) {
		client, server, r, done := testRelay(t, wrap)
		const size = 16 << 20
		sums := make(chan [32]byte, 4)
		send := func(c *net.TCPConn, seed uint64) {
			h := sha256.New()
			io.Copy(io.MultiWriter(c, h), io.LimitReader(rand.NewChaCha8([32]byte{byte(seed)}), size))
			c.CloseWrite()
			sums <- [32]byte(h.Sum(nil))
		}
		receive := func(c *net.TCPConn) [32]byte {
			h := sha256.New()
			io.Copy(h, c)
			return [32]byte(h.Sum(nil))
		}
		go send(client, 1)
		go func() { sums <- receive(server) }()
		require.Equal(t, <-sums, <-sums)
		go send(server, 2)
		go func() { sums <- receive(client) }()
		require.Equal(t, <-sums, <-sums)
		wait(t, done)
		require.Equal(t, endClosed, r.ending)
		require.EqualValues(t, size, r.in)
		require.EqualValues(t, size, r.out)
		require.EqualValues(t, size, r.counters.bytesIn.Load())
		require.EqualValues(t, size, r.counters.bytesOut.Load())
		require.Zero(t, r.bufs.lent.Load())
	})
}

func TestRelayHalfClose(t *testing.T) {
	eachKind(t, func(t *testing.T, wrap func(flowConn) flowConn) {
		for _, name := range []string{"client first", "server first"} {
			t.Run(name, func(t *testing.T) {
				first, second, r, done := testRelay(t, wrap)
				if strings.HasPrefix(name, "server") {
					first, second = second, first
				}
				_, err := first.Write([]byte("request"))
				require.NoError(t, err)
				require.NoError(t, first.CloseWrite())
				got, err := io.ReadAll(second) // ends with the FIN
				require.NoError(t, err)
				require.Equal(t, "request", string(got))
				for range 3 { // the other direction goes on
					time.Sleep(10 * time.Millisecond)
					_, err = second.Write([]byte("answer"))
					require.NoError(t, err)
				}
				require.NoError(t, second.Close())
				got, err = io.ReadAll(first)
				require.NoError(t, err)
				require.Equal(t, "answeransweranswer", string(got))
				wait(t, done)
				require.Equal(t, endClosed, r.ending)
			})
		}
	})
}

func TestRelayReset(t *testing.T) {
	eachKind(t, func(t *testing.T, wrap func(flowConn) flowConn) {
		for _, tt := range []struct{ name, ending string }{{"client", endOuter}, {"server", endInner}} {
			t.Run(tt.name, func(t *testing.T) {
				first, second, r, done := testRelay(t, wrap)
				if tt.name == "server" {
					first, second = second, first
				}
				abort(first)
				_, err := second.Read(make([]byte, 1))
				require.ErrorIs(t, err, syscall.ECONNRESET)
				wait(t, done)
				require.Equal(t, tt.ending, r.ending)
			})
		}
	})
}

// An end that has said FIN and then dies is noticed although nothing is written
// to it: the server need not work on for a client that is gone.
func TestRelayResetAfterFIN(t *testing.T) {
	for _, name := range []string{"client", "server"} {
		t.Run(name, func(t *testing.T) {
			first, second, _, done := testRelay(t, func(c flowConn) flowConn { return c })
			if name == "server" {
				first, second = second, first
			}
			require.NoError(t, first.CloseWrite())
			_, err := second.Read(make([]byte, 1))
			require.ErrorIs(t, err, io.EOF)
			time.Sleep(20 * time.Millisecond)
			abort(first)
			wait(t, done)
			_, err = second.Write([]byte("x"))
			if err == nil {
				_, err = second.Write([]byte("x"))
			}
			require.Error(t, err)
		})
	}
}

// A server that closes with data still to come answers it with RST; the client
// must get it, not be read from for ever.
func TestRelayCloseWhileClientSends(t *testing.T) {
	client, server, _, done := testRelay(t, func(c flowConn) flowConn { return c })
	require.NoError(t, server.Close())
	_, err := io.Copy(client, io.LimitReader(rand.NewChaCha8([32]byte{}), 64<<20))
	require.Error(t, err)
	wait(t, done)
}

// A socket that waits holds no buffer, also after a burst.
func TestRelayIdleHoldsNoBuffer(t *testing.T) {
	client, server, r, _ := testRelay(t, func(c flowConn) flowConn { return c })
	const burst = 4 << 20
	go client.Write(make([]byte, burst))
	_, err := io.ReadFull(server, make([]byte, burst))
	require.NoError(t, err)
	require.Eventually(t, func() bool { return r.bufs.lent.Load() == 0 }, 5*time.Second, time.Millisecond)
}

func TestBufferPoolBudget(t *testing.T) {
	var p bufferPool
	var bufs []*copyBuffer
	const largest = len(bufferSizes) - 1
	for range 2 * bufferBudget / bufferSizes[largest] {
		bufs = append(bufs, p.get(largest))
	}
	require.LessOrEqual(t, p.lent.Load(), int64(bufferBudget)+int64(len(bufs)*bufferSizes[0]))
	require.Equal(t, largest, bufs[0].class)
	require.Equal(t, 0, bufs[len(bufs)-1].class)
	for _, b := range bufs {
		p.put(b)
	}
	require.Zero(t, p.lent.Load())
	require.Equal(t, largest, p.get(largest).class)
}

func TestCopyBufferedSizes(t *testing.T) {
	src := &recordingReader{Reader: bytes.NewReader(make([]byte, 1<<20))}
	var bufs bufferPool
	var live flowCounters
	n, err := copyBuffered(io.Discard, &plainReader{src: src, bufs: &bufs}, &live.bytesIn, &bufs)
	require.NoError(t, err)
	require.EqualValues(t, 1<<20, n)
	require.Equal(t, bufferSizes[:], src.sizes[:3])
}

type recordingReader struct {
	io.Reader
	sizes []int
}

func (r *recordingReader) Read(b []byte) (int, error) {
	r.sizes = append(r.sizes, len(b))
	return r.Reader.Read(b)
}

func BenchmarkRelay(b *testing.B) {
	client, outer := tcpPair(b)
	server, inner := tcpPair(b)
	r := &relay{outer: outer, inner: inner, counters: new(flowCounters), bufs: new(bufferPool)}
	go r.run()
	buf := make([]byte, 128<<10)
	go io.Copy(io.Discard, server)
	b.SetBytes(int64(len(buf)))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := client.Write(buf); err != nil {
			b.Fatal(err)
		}
	}
	r.abort(endShutdown)
}
