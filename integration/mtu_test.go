package integration

import (
	"net"
	"net/netip"
	"strconv"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// TestMTU: the tap path carries everything at any MTU of the tap: TCP and UDP both
// ways, and pings that have to be fragmented.
func TestMTU(t *testing.T) {
	t.Parallel()
	need(t, "ping")
	for _, mtu := range []int{1280, 1500, 9000, 65520} {
		t.Run(strconv.Itoa(mtu), func(t *testing.T) {
			t.Parallel()
			tp := newTopo(t)
			tp.attach(t, "--datapath", "tap", "--mtu", strconv.Itoa(mtu), "-p", "8080:80", "-p", "5300:53/udp")
			eachFamily(t, func(t *testing.T, f family) {
				for _, c := range []struct {
					from, to    *node
					listen, dst netip.AddrPort
					udp         uint16
				}{
					{tp.client, tp.ctr, netip.AddrPortFrom(f.any, 80), netip.AddrPortFrom(f.host, 8080), 5300},
					{tp.ctr, tp.client, netip.AddrPortFrom(f.client, 81), netip.AddrPortFrom(f.client, 81), 54},
				} {
					l := c.to.listenTCP(t, c.listen.Addr(), c.listen.Port())
					near, far := pair(t, c.from, c.dst, l)
					requireTransfer(t, near, far, noise(1, 4<<20))
					requireTransfer(t, far, near, noise(2, 4<<20))
					port := uint16(54)
					if c.to == tp.ctr {
						port = 53
					}
					go echoUDP(c.to.listenUDP(t, c.listen.Addr(), port))
					for _, size := range []int{1, mtu - 48, mtu - 47, mtu - 27, 20_000} {
						conn := c.from.dialUDP(t, netip.Addr{}, netip.AddrPortFrom(c.dst.Addr(), c.udp))
						requireUDPEcho(t, conn, noise(uint64(size), size), strconv.Itoa(size))
					}
				}
				r := tp.ctr.run(t, "ping", f.flag, "-n", "-c", "2", "-i", "0.2", "-W", "2", "-s", "4000", f.client.String())
				require.Zero(t, r.code, "%s%s", r.stdout, r.stderr)
			})
		})
	}
}

// TestSleepingReceiver: one side does not read for a second, on the tap path. The
// other is held up when the buffers on the way are full, which are not large, and
// all of it arrives in the end.
func TestSleepingReceiver(t *testing.T) {
	t.Parallel()
	tp := newTopo(t)
	g := tp.attach(t, "--datapath", "tap", "-p", "8080:80")
	l := tp.ctr.listenTCP(t, ipv4.any, 80)
	out := tp.client.listenTCP(t, ipv4.client, 81)
	idle := g.rss(t)
	const size = 256 << 20
	for _, c := range []struct {
		name string
		pair func() (near, far *net.TCPConn)
	}{
		{"in", func() (*net.TCPConn, *net.TCPConn) { return pair(t, tp.client, netip.AddrPortFrom(ipv4.host, 8080), l) }},
		{"out", func() (*net.TCPConn, *net.TCPConn) { return pair(t, tp.ctr, netip.AddrPortFrom(ipv4.client, 81), out) }},
	} {
		near, far := c.pair()
		for _, way := range [][2]*net.TCPConn{{near, far}, {far, near}} {
			require.NoError(t, way[0].SetWriteDeadline(time.Now().Add(time.Second)))
			sent, err := way[0].Write(make([]byte, size))
			require.True(t, isTimeout(err), "%s: %d of %d bytes were taken by nobody", c.name, sent, size)
			require.Less(t, g.rss(t)-idle, int64(64<<20), c.name)
			require.NoError(t, way[0].SetWriteDeadline(time.Time{}))
			requireRead(t, way[1], sent)
			requireEcho(t, way[0], way[1])
		}
	}
}

// requireRead reads n bytes.
func requireRead(t *testing.T, c *net.TCPConn, n int) {
	t.Helper()
	buf := make([]byte, 1<<20)
	for n > 0 {
		got, err := c.Read(buf[:min(n, len(buf))])
		require.NoError(t, err)
		n -= got
	}
}
