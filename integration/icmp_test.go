package integration

import (
	"errors"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// TestPing pings with the real ping: neighbours, a host behind a router, the
// host, and whom nobody answers for.
func TestPing(t *testing.T) {
	t.Parallel()
	need(t, "ping")
	tp := newTopo(t)
	tp.addFar(t)
	tp.attach(t)
	ping := func(t *testing.T, f family, dst netip.Addr, args ...string) result {
		t.Helper()
		argv := append([]string{"ping", f.flag, "-n", "-c", "3", "-i", "0.2", "-W", "2"}, args...)
		return tp.ctr.run(t, append(argv, dst.String())...)
	}
	eachFamily(t, func(t *testing.T, f family) {
		for _, dst := range []netip.Addr{f.client, f.client2, f.far, f.host, f.alias, f.gw} {
			r := ping(t, f, dst)
			require.Zero(t, r.code, "ping %s: %s%s", dst, r.stdout, r.stderr)
			require.Contains(t, r.stdout, "3 received", "ping %s", dst)
		}
		// Payloads of a size of their own, fragmented ones too.
		for _, size := range []string{"0", "1400", "3000"} {
			r := ping(t, f, f.client, "-s", size)
			require.Zero(t, r.code, "ping -s %s: %s%s", size, r.stdout, r.stderr)
		}
		r := ping(t, f, f.unreachable)
		require.NotZero(t, r.code)
		require.Regexp(t, `(?i)unreachable|no route`, r.stdout)
		r = ping(t, f, f.silent, "-W", "1")
		require.NotZero(t, r.code)
		require.NotRegexp(t, `(?i)unreachable|no route`, r.stdout)
		require.Contains(t, r.stdout, "100% packet loss")
	})
}

// TestUDPErrors: ICMP errors about the container's datagrams come back to the
// socket that sent them.
func TestUDPErrors(t *testing.T) {
	t.Parallel()
	tp := newTopo(t)
	tp.addFar(t)
	tp.attach(t)
	eachFamily(t, func(t *testing.T, f family) {
		for _, c := range []struct {
			name string
			dst  netip.Addr
			want error
		}{
			{"port unreachable, neighbour", f.client, unix.ECONNREFUSED},
			{"port unreachable, behind the router", f.far, unix.ECONNREFUSED},
			{"port unreachable, host", f.host, unix.ECONNREFUSED},
			{"host unreachable", f.unreachable, f.unreachableErr},
			{"no route on the host", f.noRoute, unix.EHOSTUNREACH},
		} {
			conn := tp.ctr.dialUDP(t, netip.Addr{}, netip.AddrPortFrom(c.dst, 9))
			// Unreachable hosts are news only to those who ask (ip(7)).
			err := setRecvErr(conn, f)
			require.NoError(t, err)
			for range 10 {
				if _, err = conn.Write([]byte("anybody?")); err != nil {
					break
				}
				conn.SetReadDeadline(time.Now().Add(300 * time.Millisecond))
				if _, err = conn.Read(make([]byte, 16)); !isTimeout(err) {
					break
				}
			}
			require.ErrorIs(t, err, c.want, "%s", c.name)
		}
	})
}

// TestPathMTU: a router between that takes smaller packets only. The container
// learns of it, and large datagrams arrive.
func TestPathMTU(t *testing.T) {
	t.Parallel()
	tp := newTopo(t)
	far := tp.addFar(t)
	tp.client.ip(t, "link set far mtu 1300")
	far.ip(t, "link set eth0 mtu 1300")
	tp.attach(t)
	eachFamily(t, func(t *testing.T, f family) {
		go echoUDP(far.listenUDP(t, f.far, 7000))
		conn := tp.ctr.dialUDP(t, netip.Addr{}, netip.AddrPortFrom(f.far, 7000))
		requireUDPEcho(t, conn, noise(30, 1400), "larger than the path's MTU")
		l := far.listenTCP(t, f.far, 7000)
		near, server := pair(t, tp.ctr, netip.AddrPortFrom(f.far, 7000), l)
		requireTransfer(t, near, server, noise(31, 1<<20))
		requireTransfer(t, server, near, noise(32, 1<<20))
	})
}

func setRecvErr(c *net.UDPConn, f family) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	level, option := unix.IPPROTO_IP, unix.IP_RECVERR
	if f.name == ipv6.name {
		level, option = unix.IPPROTO_IPV6, unix.IPV6_RECVERR
	}
	var soerr error
	err = raw.Control(func(fd uintptr) { soerr = unix.SetsockoptInt(int(fd), level, option, 1) })
	return errors.Join(err, soerr)
}

// TestTraceroute: the routers between are seen, by UDP and by ICMP probes.
func TestTraceroute(t *testing.T) {
	t.Parallel()
	need(t, "traceroute")
	tp := newTopo(t)
	tp.addFar(t)
	tp.attach(t)
	eachFamily(t, func(t *testing.T, f family) {
		for _, method := range []string{"-U", "-I"} {
			out := tp.ctr.output(t, "traceroute", f.flag, method, "-n", "-q", "2", "-w", "2", "-m", "6", f.far.String())
			var hops []string
			for line := range strings.Lines(out) {
				if field := strings.Fields(line); len(field) > 1 && strings.Trim(field[0], "0123456789") == "" {
					hops = append(hops, field[1])
				}
			}
			require.NotEmpty(t, hops, "%s", out)
			require.Equal(t, f.far.String(), hops[len(hops)-1], "%s", out)
			require.Contains(t, []string{f.client.String(), f.client2.String()}, hops[len(hops)-2], "%s", out)
			require.LessOrEqual(t, len(hops), 3, "%s", out)
		}
	})
}
