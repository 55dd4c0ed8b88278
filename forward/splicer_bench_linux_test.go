package forward

import (
	"io"
	"net"
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// relayMeans are the ways to join two sockets of the kernel. Each returns at once
// or when the flow has ended.
func relayMeans(b *testing.B) map[string]func(outer, inner *net.TCPConn) {
	s, err := newSplicer(nil)
	require.NoError(b, err)
	b.Cleanup(s.close)
	var bufs bufferPool
	return map[string]func(outer, inner *net.TCPConn){
		// The splicer, as the kernel path uses it.
		"splicer": func(outer, inner *net.TCPConn) {
			ended := make(chan struct{})
			f := &splicedFlow{counters: &flowCounters{}, events: &eventHub{}, ended: func(*splicedFlow, string) { close(ended) }}
			require.True(b, s.splice(outer, inner, f))
			<-ended
		},
		// The standard library's splice(2).
		"io.Copy": func(outer, inner *net.TCPConn) {
			defer outer.Close()
			defer inner.Close()
			var wg sync.WaitGroup
			half := func(dst, src *net.TCPConn) {
				_, _ = io.Copy(dst, src)
				_ = dst.CloseWrite()
			}
			wg.Go(func() { half(outer, inner) })
			half(inner, outer)
			wg.Wait()
		},
		// The relay that other ends than the kernel's sockets have.
		"buffers": func(outer, inner *net.TCPConn) {
			r := &relay{outer: outer, inner: inner, counters: &flowCounters{}, bufs: &bufs}
			r.run()
		},
	}
}

// BenchmarkSplicer compares them: for bulk, and for requests and answers of 200
// bytes. Processor time is that of the whole process, whose two ends do the same each
// time; those of exchanges are threads that block, as in other processes, so that
// no means gains by sharing the Go scheduler with them.
//
//	go test ./forward -run - -bench Splicer -count 10 | benchstat -col /means -
func BenchmarkSplicer(b *testing.B) {
	outerLn, innerLn := listenBench(b), listenBench(b)
	dial := func(b *testing.B, ln net.Listener) (far, near *net.TCPConn) {
		c, err := net.Dial("tcp", ln.Addr().String())
		require.NoError(b, err)
		a, err := ln.Accept()
		require.NoError(b, err)
		return c.(*net.TCPConn), a.(*net.TCPConn)
	}
	for _, means := range []string{"splicer", "io.Copy", "buffers"} {
		b.Run("load=bulk/means="+means, func(b *testing.B) {
			relay := relayMeans(b)[means]
			outside, outer := dial(b, outerLn)
			inside, inner := dial(b, innerLn)
			var wg sync.WaitGroup
			wg.Go(func() { relay(outer, inner) })
			wg.Go(func() {
				_, _ = io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{inside}, make([]byte, 256<<10))
				inside.Close()
			})
			chunk := make([]byte, 1<<20)
			b.SetBytes(int64(len(chunk)))
			cpu := cpuNow()
			for b.Loop() {
				_, err := outside.Write(chunk)
				require.NoError(b, err)
			}
			outside.Close()
			wg.Wait()
			b.ReportMetric(float64(cpuNow()-cpu)/float64(b.N), "cpu-ns/op")
		})
		b.Run("load=exchange/means="+means, func(b *testing.B) {
			relay := relayMeans(b)[means]
			outside, outer := dial(b, outerLn)
			inside, inner := dial(b, innerLn)
			var wg sync.WaitGroup
			wg.Go(func() { relay(outer, inner) })
			client, server := blocking(b, outside), blocking(b, inside)
			wg.Go(func() {
				runtime.LockOSThread()
				defer runtime.UnlockOSThread()
				defer inside.Close()
				defer unix.Close(server)
				buf := make([]byte, 200)
				for {
					if n, err := unix.Read(server, buf); n <= 0 || err != nil {
						return
					}
					_, _ = unix.Write(server, buf)
				}
			})
			runtime.LockOSThread()
			defer runtime.UnlockOSThread()
			buf := make([]byte, 200)
			cpu := cpuNow()
			for b.Loop() {
				_, err := unix.Write(client, buf)
				require.NoError(b, err)
				n, err := unix.Read(client, buf)
				require.NoError(b, err)
				require.Equal(b, len(buf), n)
			}
			b.ReportMetric(float64(cpuNow()-cpu)/float64(b.N), "cpu-ns/op")
			unix.Close(client)
			outside.Close()
			wg.Wait()
		})
	}
}

// BenchmarkSplicerConnections is a new connection for each exchange, through a
// forward: accepted, connected and relayed by a thread of the splicer, or, since the
// forward has a limit that takes a relay, by goroutines.
func BenchmarkSplicerConnections(b *testing.B) {
	for _, tt := range []struct {
		means  string
		limits Limits
	}{
		{"splicer", Limits{}},
		{"goroutines", Limits{Idle: Duration(time.Minute)}},
	} {
		b.Run("means="+tt.means, func(b *testing.B) {
			ns := newNS(b)
			f, err := Start(b.Context(), Config{NetNS: ns, Datapath: Kernel, NoUDP: true, NoICMP: true, Rules: []Rule{
				{Proto: TCP, TargetPorts: PortRange{80, 80}, Limits: tt.limits},
			}})
			require.NoError(b, err)
			defer f.Close()
			var server int
			require.NoError(b, ns.Do(func() (err error) {
				server, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
				return err
			}))
			require.NoError(b, unix.Bind(server, &unix.SockaddrInet4{Port: 80}))
			require.NoError(b, unix.Listen(server, 128))
			var wg sync.WaitGroup
			wg.Go(func() {
				runtime.LockOSThread()
				defer runtime.UnlockOSThread()
				buf := make([]byte, 200)
				for {
					fd, _, err := unix.Accept4(server, unix.SOCK_CLOEXEC)
					if err != nil {
						return
					}
					_, _ = unix.Read(fd, buf)
					_, _ = unix.Write(fd, buf)
					unix.Close(fd)
				}
			})
			runtime.LockOSThread()
			defer runtime.UnlockOSThread()
			dst := &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}, Port: int(f.Status().Rules[0].Bound[0].Port())}
			buf := make([]byte, 200)
			cpu := cpuNow()
			for b.Loop() {
				fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
				require.NoError(b, err)
				require.NoError(b, unix.Connect(fd, dst))
				_, err = unix.Write(fd, buf)
				require.NoError(b, err)
				n, err := unix.Read(fd, buf)
				require.NoError(b, err)
				require.Equal(b, len(buf), n)
				unix.Close(fd)
			}
			b.ReportMetric(float64(cpuNow()-cpu)/float64(b.N), "cpu-ns/op")
			_ = unix.Shutdown(server, unix.SHUT_RDWR) // ends accept(2)
			wg.Wait()
			unix.Close(server)
		})
	}
}

// BenchmarkTransparentSocket is the part of a connection that a pool of sockets made
// ahead would do at another time.
func BenchmarkTransparentSocket(b *testing.B) {
	var fds [64]int // closed apart, as a connection closes them in any case
	cpu := int64(0)
	for i := 0; i < b.N; i += len(fds) {
		n := min(len(fds), b.N-i)
		before := cpuNow()
		for j := range n {
			fd, err := nsDialer{mark: 1}.open(true)
			require.NoError(b, err)
			fds[j] = fd
		}
		cpu += cpuNow() - before
		for _, fd := range fds[:n] {
			unix.Close(fd)
		}
	}
	b.ReportMetric(float64(cpu)/float64(b.N), "cpu-ns/op")
}

// blocking returns a descriptor of c of its own, outside of the Go runtime's poller.
func blocking(b *testing.B, c *net.TCPConn) int {
	fd, err := duplicate(c)
	require.NoError(b, err)
	require.NoError(b, unix.SetNonblock(fd, false))
	return fd
}

func listenBench(b *testing.B) net.Listener {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(b, err)
	b.Cleanup(func() { ln.Close() })
	return ln
}

// cpuNow is the processor time that the process has had, in nanoseconds.
func cpuNow() int64 {
	var u unix.Rusage
	_ = unix.Getrusage(unix.RUSAGE_SELF, &u)
	return u.Utime.Nano() + u.Stime.Nano()
}
