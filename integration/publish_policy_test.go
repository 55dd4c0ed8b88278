package integration

import (
	"net/netip"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// TestOutboundPolicy: what the container may not speak to, it is told by ICMP as by
// a router that filters; the rest is as it was.
func TestOutboundPolicy(t *testing.T) {
	t.Parallel()
	tp := newTopo(t)
	tp.attach(t, "--deny", "host", "--deny", "198.51.100.3", "--deny", "[2001:db8:1::3]:9", "--allow", "198.51.100.1:7")
	tp.client.serveWho(t, 9, ipv4.any, ipv6.any)
	tp.host.serveWho(t, 9, ipv4.any, ipv6.any)
	tp.host.serveWho(t, 7, ipv4.any)
	connect := func(a netip.Addr, port uint16) error {
		c, err := tp.ctr.tryTCP(netip.Addr{}, netip.AddrPortFrom(a, port), patience)
		if err == nil {
			c.Close()
		}
		return err
	}
	eachFamily(t, func(t *testing.T, f family) {
		require.NoError(t, connect(f.client, 9))
		// ICMP: administratively prohibited. IPv4 makes EHOSTUNREACH of it
		// (icmp_err_convert), IPv6 EACCES (icmpv6_err_convert).
		want := unix.EHOSTUNREACH
		if f.name == "IPv6" {
			want = unix.EACCES
		}
		begin := time.Now()
		for _, a := range []netip.Addr{f.client2, f.host, f.hostEth1, f.alias} {
			require.ErrorIs(t, connect(a, 9), want, "%s", a)
		}
		require.Less(t, time.Since(begin), 2*time.Second)
		c := tp.ctr.dialUDP(t, netip.Addr{}, netip.AddrPortFrom(f.client2, 9))
		_, err := c.Write([]byte("x"))
		require.NoError(t, err)
		_, err = c.Read(make([]byte, 10))
		require.ErrorIs(t, err, want)
	})
	require.NoError(t, connect(ipv4.host, 7), "allowed by name")
}
