package integration

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func pastaSelfConfigured(t *testing.T, tp *topo, p pastaProgram) { selfConfigured(t, tp, p) }

func pastaSelfConfiguredTap(t *testing.T, tp *topo, p pastaProgram) {
	selfConfigured(t, tp, p, "--no-splice")
}

// A container takes what DHCP says for IPv4, and an address of its own choice for
// IPv6 (SLAAC): both lead out, and published ports lead to both.
func selfConfigured(t *testing.T, tp *topo, p pastaProgram, opts ...string) {
	t.Helper()
	need(t, "udhcpc")
	tp.client.serveWho(t, 7000, ipv4.client2, ipv6.client2)
	tp.ctr.serveWho(t, 80, ipv4.any, ipv6.any)
	tp.barePasta(t, p, append(opts, "-t", "8080:80", "-u", "8080:80")...)
	link := tp.ctr.run(t, "ip", "-o", "link", "show", "eth0")
	require.Zero(t, link.code, link.stderr)
	require.Contains(t, link.stdout, "state DOWN")
	require.Contains(t, tp.ctr.run(t, "ip", "-o", "link", "show", "lo").stdout, "LOOPBACK,UP")

	// Nothing leads anywhere yet, and that is said at once.
	begun := time.Now()
	_, err := tp.host.who(t, "tcp", netip.Addr{}, netip.MustParseAddrPort("127.0.0.1:8080"))
	require.Error(t, err)
	require.True(t, p.real() || time.Since(begun) < patience/2, "by the tap, pasta waits")

	take := tp.ctr.run(t, "testdata/ask.sh", "take")
	require.Zero(t, take.code, take.stderr)
	require.Contains(t, take.stdout, "ip=198.51.100.1\n")
	eventually(t, "no address by router advertisement", func() bool {
		addrs := tp.ctr.run(t, "ip", "-o", "-6", "addr", "show", "dev", "eth0", "scope", "global").stdout
		return strings.Contains(addrs, "2001:db8:1:") && !strings.Contains(addrs, "tentative")
	})
	require.Contains(t, tp.ctr.run(t, "ip", "-6", "route").stdout, "default via fe80:")

	for _, proto := range []string{"tcp", "udp"} {
		requireWho(t, tp.ctr, proto, "198.51.100.3:7000")
		requireWho(t, tp.ctr, proto, "[2001:db8:1::3]:7000")
		for _, f := range []family{ipv4, ipv6} {
			var got seen
			eventually(t, f.name+" "+proto+" is not forwarded", func() (ok bool) {
				var err error
				got, err = tp.client.who(t, proto, f.client2, netip.AddrPortFrom(f.host, 8080))
				return err == nil
			})
			require.Equal(t, f.client2, got.by.Addr(), "%s: what the server sees", proto)
		}
	}
}
