package integration

import (
	"io"
	"net"
	"net/netip"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// connPair makes the two ends of a connection through gofwd: near is whoever
// connected.
type connPair func(t *testing.T) (near, far *net.TCPConn)

// eachWay runs fn over connections into the container and out of it.
func (tp *topo) eachWay(t *testing.T, fn func(t *testing.T, connect connPair)) {
	eachFamily(t, func(t *testing.T, f family) {
		t.Run("inbound", func(t *testing.T) {
			l := tp.ctr.listenTCP(t, f.any, 80)
			fn(t, func(t *testing.T) (near, far *net.TCPConn) {
				return pair(t, tp.client, netip.AddrPortFrom(f.host, 8080), l)
			})
		})
		t.Run("inbound from loopback", func(t *testing.T) {
			l := tp.ctr.listenTCP(t, f.any, 80)
			fn(t, func(t *testing.T) (near, far *net.TCPConn) {
				return pair(t, tp.host, netip.AddrPortFrom(f.loopback, 8080), l)
			})
		})
		t.Run("outbound", func(t *testing.T) {
			l := tp.client.listenTCP(t, f.client, 81)
			fn(t, func(t *testing.T) (near, far *net.TCPConn) {
				return pair(t, tp.ctr, netip.AddrPortFrom(f.client, 81), l)
			})
		})
		t.Run("container loopback", func(t *testing.T) {
			l := tp.host.listenTCP(t, f.loopback, 7000)
			fn(t, func(t *testing.T) (near, far *net.TCPConn) {
				return pair(t, tp.ctr, netip.AddrPortFrom(f.loopback, 7000), l)
			})
		})
	})
}

// TestHalfClose: each side may say that it is done and still receive all that the
// other has to say.
func TestHalfClose(t *testing.T) {
	t.Parallel()
	tp := newTopo(t)
	tp.attach(t, "-p", "8080:80", "-T", "7000")
	question, answer := noise(3, 100<<10), noise(4, 3<<20)
	tp.eachWay(t, func(t *testing.T, connect connPair) {
		near, far := connect(t)
		requireTransfer(t, near, far, question) // ends with a FIN
		requireTransfer(t, far, near, answer)

		near, far = connect(t)
		requireTransfer(t, far, near, question)
		requireTransfer(t, near, far, answer)

		// FINs of both sides with nothing said at all.
		near, far = connect(t)
		require.NoError(t, near.CloseWrite())
		requireEOF(t, far)
		require.NoError(t, far.CloseWrite())
		requireEOF(t, near)
	})
}

// TestReset: a reset of one side is a reset for the other, not an end of file.
func TestReset(t *testing.T) {
	t.Parallel()
	tp := newTopo(t)
	tp.attach(t, "-p", "8080:80", "-T", "7000")
	tp.eachWay(t, func(t *testing.T, connect connPair) {
		for _, first := range []string{"near", "far"} {
			for _, halfClosed := range []bool{false, true} {
				aborts, sees := connect(t)
				if first == "far" {
					aborts, sees = sees, aborts
				}
				requireEcho(t, aborts, sees)
				if halfClosed {
					require.NoError(t, sees.CloseWrite())
					requireEOF(t, aborts)
				}
				require.NoError(t, aborts.SetLinger(0)) // close sends RST (tcp(7))
				require.NoError(t, aborts.Close())
				requireReset(t, sees)
			}
		}
	})
}

// TestCloseUnread: a side that closes with unread bytes in its socket resets the
// connection (RFC 2525, 2.17), and the other side learns of it while it is
// sending.
func TestCloseUnread(t *testing.T) {
	t.Parallel()
	tp := newTopo(t)
	tp.attach(t, "-p", "8080:80", "-T", "7000")
	tp.eachWay(t, func(t *testing.T, connect connPair) {
		for _, swap := range []bool{false, true} {
			closes, sends := connect(t)
			if swap {
				closes, sends = sends, closes
			}
			_, err := sends.Write(noise(5, 64<<10))
			require.NoError(t, err)
			_, err = io.ReadFull(closes, make([]byte, 1))
			require.NoError(t, err)
			require.NoError(t, closes.Close())
			for err == nil {
				_, err = sends.Write(noise(6, 64<<10))
			}
			require.True(t, isOneOf(err, unix.ECONNRESET, unix.EPIPE), "%v", err)
		}
	})
}

// TestKilledServer: a server that is killed takes its connections with it at
// once.
func TestKilledServer(t *testing.T) {
	t.Parallel()
	need(t, "socat")
	tp := newTopo(t)
	tp.attach(t, "-p", "8080:80")
	eachFamily(t, func(t *testing.T, f family) {
		v := f.flag[1:]
		server := tp.ctr.start(t, "socat", "TCP"+v+"-LISTEN:80,reuseaddr", "PIPE")
		tp.ctr.waitPort(t, "tcp", 80)
		c := tp.client.dialTCP(t, netip.Addr{}, netip.AddrPortFrom(f.host, 8080))
		_, err := c.Write([]byte("ping"))
		require.NoError(t, err)
		_, err = io.ReadFull(c, make([]byte, 4))
		require.NoError(t, err)
		server.signal(unix.SIGKILL)
		requireEOF(t, c)
	})
}
