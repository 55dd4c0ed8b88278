package main

import (
	"net/netip"
	"testing"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"github.com/stretchr/testify/require"

	"github.com/gofwd/gofwd/forward"
)

// parse parses args as run does.
func parse(args ...string) (*options, []string, error) {
	o := &options{}
	cmd := &cobra.Command{Use: "run"}
	own := pflag.NewFlagSet("", pflag.ContinueOnError)
	o.addTo(cmd, own)
	if err := cmd.ParseFlags(args); err != nil {
		return nil, nil, err
	}
	return o, cmd.Flags().Args(), o.complete()
}

func TestFlags(t *testing.T) {
	addr, prefix := netip.MustParseAddr, netip.MustParsePrefix
	defaults := func() forward.Config {
		return forward.Config{Datapath: forward.Auto, Network: forward.Network{IfName: "tap0", MTU: 1500}}
	}
	for _, tt := range []struct {
		args []string
		want func(*forward.Config)
		rest []string
	}{
		{nil, func(*forward.Config) {}, nil},
		{[]string{"--mtu", "9000", "--ifname=eth0", "--no-tcp", "--no-udp", "--no-icmp"}, func(c *forward.Config) {
			c.Network.MTU, c.Network.IfName = 9000, "eth0"
			c.NoTCP, c.NoUDP, c.NoICMP = true, true, true
		}, nil},
		{[]string{"--address", "192.0.2.1", "--address=2001:db8::1/48", "--gateway", "192.0.2.254"}, func(c *forward.Config) {
			c.Network.Addrs = []netip.Prefix{prefix("192.0.2.1/24"), prefix("2001:db8::1/48")}
			c.Network.Gateways = []netip.Addr{addr("192.0.2.254")}
		}, nil},
		{[]string{"-4"}, func(c *forward.Config) { c.Network.NoIPv6 = true }, nil},
		{[]string{"-6"}, func(c *forward.Config) { c.Network.NoIPv4 = true }, nil},
		{[]string{"--config-net", "--datapath", "kernel", "--host-lo-to-ns-lo"}, func(c *forward.Config) {
			c.Network.CopyHost, c.Datapath, c.HostLoopbackToNSLoopback = true, forward.Kernel, true
		}, nil},
		{[]string{"--host-alias", "none", "--map-host-loopback=10.0.2.4", "--map-host-loopback", "fd67:6f66:7764::4"}, func(c *forward.Config) {
			c.Network.NoHostAlias = true
			c.Network.MapHostLoopback = []netip.Addr{addr("10.0.2.4"), addr("fd67:6f66:7764::4")}
		}, nil},
		{[]string{"--dns", "none"}, func(c *forward.Config) { c.Network.NoDNS = true }, nil},
		// In the container's net only gofwd can answer, elsewhere it must not.
		{[]string{"--dns", "10.0.2.53", "--dns", "192.0.2.53"}, func(c *forward.Config) {
			c.Network.DNS = []netip.Addr{addr("10.0.2.53")}
		}, nil},
		{[]string{"--address", "192.0.2.1/24", "--dns", "192.0.2.53", "--dns-forward=169.254.1.1"}, func(c *forward.Config) {
			c.Network.Addrs = []netip.Prefix{prefix("192.0.2.1/24")}
			c.Network.DNS = []netip.Addr{addr("169.254.1.1"), addr("192.0.2.53")}
		}, nil},
		{[]string{"-p", "8080:80", "-p80/udp", "--publish=127.0.0.1:443:8443"}, func(c *forward.Config) {
			c.Rules = []forward.Rule{
				{Proto: forward.TCP, Ports: ports(8080), TargetPorts: ports(80)},
				{Proto: forward.UDP, TargetPorts: ports(80)},
				{Proto: forward.TCP, Addr: addr("127.0.0.1"), Ports: ports(443), TargetPorts: ports(8443)},
			}
		}, nil},
		{[]string{"-t", "8080:80", "-u53", "-T", "5432", "-U=123", "-t", "none"}, func(c *forward.Config) {
			c.Rules = []forward.Rule{
				{Proto: forward.TCP, Ports: ports(8080), TargetPorts: ports(80)},
				{Proto: forward.UDP, Ports: ports(53), TargetPorts: ports(53)},
				{Dir: forward.Out, Proto: forward.TCP, Ports: ports(5432), TargetPorts: ports(5432)},
				{Dir: forward.Out, Proto: forward.UDP, Ports: ports(123), TargetPorts: ports(123)},
			}
		}, nil},
		{[]string{"--multicast", "224.0.0.251%eth0,ff02::fb%eth0", "--multicast=239.255.255.250"}, func(c *forward.Config) {
			c.Multicast = []forward.Group{
				{Addr: addr("224.0.0.251"), Iface: "eth0"}, {Addr: addr("ff02::fb"), Iface: "eth0"}, {Addr: addr("239.255.255.250")},
			}
		}, nil},
		// The options of COMMAND are COMMAND's.
		{[]string{"-4", "--", "ls", "-l"}, func(c *forward.Config) { c.Network.NoIPv6 = true }, []string{"ls", "-l"}},
		{[]string{"ls", "-4", "--", "x"}, func(*forward.Config) {}, []string{"ls", "-4", "--", "x"}},
	} {
		o, rest, err := parse(tt.args...)
		require.NoError(t, err, "%q", tt.args)
		want := defaults()
		tt.want(&want)
		require.Equal(t, want, o.config, "%q", tt.args)
		if len(tt.rest) > 0 || len(rest) > 0 {
			require.Equal(t, tt.rest, rest, "%q", tt.args)
		}
	}
}

func ports(n uint16) forward.PortRange { return forward.PortRange{First: n, Last: n} }

func TestFlagsRefused(t *testing.T) {
	for _, tt := range []struct {
		args []string
		want string // in the message
	}{
		{[]string{"--address", "300.1.1.1"}, `"300.1.1.1"`},
		{[]string{"--address", "10.0.0.1/33"}, `"10.0.0.1/33"`},
		{[]string{"--address", "10.0.0.1", "--address", "10.0.0.2"}, "one of each family"},
		{[]string{"--gateway", "fe80::1%eth0"}, `"fe80::1%eth0"`},
		{[]string{"--gateway", "none"}, `"none"`},
		{[]string{"--host-alias", "x"}, `"x"`},
		{[]string{"--multicast", "224.0.0.251,192.0.2.1"}, `"192.0.2.1"`},
		{[]string{"--mtu", "67"}, "67"},
		{[]string{"--mtu", "65522"}, "65522"},
		{[]string{"--mtu", "big"}, `"big"`},
		{[]string{"--ifname", "a-name-too-long-"}, "a-name-too-long-"},
		{[]string{"--ifname="}, "--ifname"},
		{[]string{"-4", "-6"}, "--ipv4-only"},
		{[]string{"--datapath", "fast"}, `"fast"`},
		{[]string{"--log-level", "loud"}, `"loud"`},
		{[]string{"--log-format", "xml"}, `"xml"`},
		{[]string{"--name", "../x"}, `"../x"`},
		{[]string{"--dns", "none", "--dns", "10.0.2.3"}, "--dns none"},
		{[]string{"-p", "80:"}, `"80:"`},
		{[]string{"-p", "80:99999"}, `"99999"`},
		{[]string{"-t", "80-70"}, `"80-70"`},
		{[]string{"-T", "127.0.0.1/80"}, `127.0.0.1`},
		{[]string{"-p", "80:80", "-p", "127.0.0.1:80:81"}, "overlap"},
		{[]string{"--no-such-flag"}, "--no-such-flag"},
	} {
		_, _, err := parse(tt.args...)
		require.ErrorContains(t, err, tt.want, "%q", tt.args)
	}
}
