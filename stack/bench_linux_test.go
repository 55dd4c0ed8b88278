package stack

import (
	"context"
	"io"
	"net"
	"net/netip"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/require"
)

// tcpPair is two connected kernel sockets on the host's loopback.
func tcpPair(t testing.TB) (a, b *net.TCPConn) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer l.Close()
	c, err := net.Dial("tcp", l.Addr().String())
	require.NoError(t, err)
	d, err := l.Accept()
	require.NoError(t, err)
	t.Cleanup(func() { c.Close(); d.Close() })
	return c.(*net.TCPConn), d.(*net.TCPConn)
}

// BenchmarkTapStream moves bytes from one kernel socket on the host over the tap
// to another in the namespace, and back.
func BenchmarkTapStream(b *testing.B) {
	for _, f := range families {
		for _, c := range []struct {
			mtu int
			dir string
		}{{1500, "in"}, {1500, "out"}, {65520, "in"}, {65520, "out"}} {
			b.Run(f.name+"/"+itoa(c.mtu)+"/"+c.dir, func(b *testing.B) {
				ns, s := newTapStack(b, Config{}, c.mtu)
				l, addr := listen(b, ns, f.guest)
				conn, err := s.DialTCP(context.Background(), netip.AddrPortFrom(f.client, 0), addr)
				require.NoError(b, err)
				inside, err := l.Accept()
				require.NoError(b, err)
				outside, host := tcpPair(b)
				raw, err := host.SyscallConn()
				require.NoError(b, err)
				var live atomic.Int64
				src, dst := net.Conn(outside), inside
				if c.dir == "in" {
					go func() { conn.CopyFrom(raw, &live); conn.Close() }()
				} else {
					src, dst = inside, outside
					go func() { conn.CopyTo(raw, &live); host.Close() }()
				}
				go func() {
					buf := make([]byte, 128<<10)
					for {
						if _, err := src.Write(buf); err != nil {
							return
						}
					}
				}()
				buf := make([]byte, 128<<10)
				b.SetBytes(int64(len(buf)))
				b.ReportAllocs()
				for b.Loop() {
					_, err := io.ReadFull(dst, buf)
					require.NoError(b, err)
				}
				src.Close()
				dst.Close()
				conn.Abort()
			})
		}
	}
}
