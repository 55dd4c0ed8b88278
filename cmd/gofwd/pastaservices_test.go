package main

import (
	"net/netip"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/gofwd/gofwd/forward"
)

func TestPastaServices(t *testing.T) {
	addr := netip.MustParseAddr
	all := forward.Services{DHCP: true, DHCPv6: true, RouterAdvert: true}
	with := func(change func(*forward.Services)) forward.Services {
		s := all
		change(&s)
		return s
	}
	for options, want := range map[string]forward.Services{
		"":                                      all,
		"--config-net":                          with(func(s *forward.Services) { s.RouterAdvert = false }),
		"--no-dhcp":                             with(func(s *forward.Services) { s.DHCP = false }),
		"--no-dhcpv6":                           with(func(s *forward.Services) { s.DHCPv6 = false }),
		"--no-ra":                               with(func(s *forward.Services) { s.RouterAdvert = false }),
		"--no-ndp":                              with(func(s *forward.Services) { s.RouterAdvert = false }),
		"-m 0":                                  with(func(s *forward.Services) { s.NoMTU = true }),
		"-D 192.0.2.53":                         all, // not told without --dhcp-dns
		"-S a.test":                             all,
		"-H me":                                 with(func(s *forward.Services) { s.Hostname = "me" }),
		"--fqdn me.test":                        with(func(s *forward.Services) { s.FQDN = "me.test" }),
		"--dhcp-dns -D 192.0.2.53 -D ::1":       with(func(s *forward.Services) { s.DNS = []netip.Addr{addr("192.0.2.53"), addr("::1")} }),
		"--dhcp-dns -D 192.0.2.53 -D none":      all,
		"--dhcp-search --search=a.test -S b":    with(func(s *forward.Services) { s.Search = []string{"a.test", "b"} }),
		"--dhcp-search --search=a.test -S none": all,
	} {
		p, err := parsePasta("--netns /x " + options)
		require.NoError(t, err, options)
		require.Equal(t, want, p.o.config.Network.Services, options)
	}
	p, err := parsePasta("--netns /x -M 02:00:00:00:00:01 --ns-mac-addr 02:00:00:00:00:02 --no-icmp")
	require.NoError(t, err)
	network := p.o.config.Network
	require.Equal(t, "02:00:00:00:00:01", network.GatewayMAC.String())
	require.Equal(t, "02:00:00:00:00:02", network.MAC.String())
	require.True(t, network.NoNDP)
	require.True(t, network.Unconfigured)
}

func TestParseResolvConf(t *testing.T) {
	addr := netip.MustParseAddr
	r := parseResolvConf("# nameserver 192.0.2.1\nnameserver 127.0.0.53\nnameserver ::1\nnameserver fe80::1%eth0\n" +
		"nameserver nonsense\nnameserver\nnameserver 192.0.2.2\ndomain old.test\nsearch . a.test. b.test\noptions edns0\n")
	require.Equal(t, []netip.Addr{addr("127.0.0.53"), addr("::1"), addr("192.0.2.2")}, r.servers)
	require.Equal(t, []string{"a.test", "b.test"}, r.search)

	// The host's loopback is not the container's.
	p := newPasta()
	require.Equal(t, []netip.Addr{addr("192.0.2.2")}, p.reachable(r.servers))
	p.o.config.Network.MapHostLoopback = []netip.Addr{addr("192.0.2.9"), addr("2001:db8::9")}
	require.Equal(t, []netip.Addr{addr("192.0.2.9"), addr("2001:db8::9"), addr("192.0.2.2")}, p.reachable(r.servers))
	p.o.config.Network.DNS = []netip.Addr{addr("169.254.1.1")}
	require.Equal(t, []netip.Addr{addr("169.254.1.1"), addr("2001:db8::9"), addr("192.0.2.2")}, p.reachable(r.servers))
}
