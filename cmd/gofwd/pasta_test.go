package main

import (
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/gofwd/gofwd/forward"
)

// parsePasta parses a command line of pasta, with no forwards unless there are
// some in it.
func parsePasta(line string) (*pasta, error) {
	p := newPasta()
	rest, err := getopt(p.options(), strings.Fields(line))
	if err != nil {
		return p, err
	}
	for i := range p.specs {
		if len(p.specs[i]) == 0 {
			p.specs[i] = []string{"none"}
		}
	}
	return p, p.complete(rest)
}

// Every option that pasta --help lists does something, or is refused by name.
func TestPastaOptions(t *testing.T) {
	addr, prefix := netip.MustParseAddr, netip.MustParsePrefix
	inTempDir := filepath.Join(t.TempDir(), "log")
	for _, tt := range []struct {
		option string
		want   func(t *testing.T, p *pasta)
	}{
		{"-d", func(t *testing.T, p *pasta) { require.Equal(t, "debug", p.o.logLevel) }},
		{"--trace", func(t *testing.T, p *pasta) { require.Equal(t, "debug", p.o.logLevel) }},
		{"-d -q", func(t *testing.T, p *pasta) { require.True(t, p.o.quiet) }},
		{"-q -d", func(t *testing.T, p *pasta) { require.False(t, p.o.quiet) }},
		{"-f", func(t *testing.T, p *pasta) { require.False(t, p.o.detach) }},
		{"-P /x/pid", func(t *testing.T, p *pasta) { require.Equal(t, "/x/pid", p.o.pidFile) }},
		{"-c /x/sock", func(t *testing.T, p *pasta) { require.Equal(t, "/x/sock", p.o.pestoSocket) }},
		{"-p cap", func(t *testing.T, p *pasta) { require.Equal(t, "cap", p.o.pcap) }},
		{"-f --log-file " + inTempDir + " --log-size 50000", func(t *testing.T, p *pasta) {
			require.Equal(t, int64(50000), p.logSize)
			b, err := os.ReadFile(inTempDir)
			require.NoError(t, err)
			require.Regexp(t, `^pasta .*: /.* \([0-9]+\)\n$`, string(b))
		}},
		{"-e --chroot-fallback", func(t *testing.T, p *pasta) { require.True(t, p.o.detach) }},
		{"--userns /proc/1/ns/user", func(t *testing.T, p *pasta) { require.Equal(t, "/proc/1/ns/user", p.o.userNS) }},
		{"--netns-only", func(t *testing.T, p *pasta) { require.True(t, p.o.netNSOnly) }},
		{"--no-netns-quit", func(t *testing.T, p *pasta) { require.True(t, p.o.config.IgnoreGone) }},
		{"--config-net", func(t *testing.T, p *pasta) { require.True(t, p.o.config.Network.CopyHost) }},
		{"-I eth7", func(t *testing.T, p *pasta) { require.Equal(t, "eth7", p.o.config.Network.IfName) }},
		{"", func(t *testing.T, p *pasta) { require.Equal(t, pastaMTU, p.o.config.Network.MTU) }},
		{"-m 1400", func(t *testing.T, p *pasta) { require.Equal(t, 1400, p.o.config.Network.MTU) }},
		{"-m 0", func(t *testing.T, p *pasta) { require.Zero(t, p.o.config.Network.MTU) }},
		{"-a 192.0.2.7 -a 2001:db8::7", func(t *testing.T, p *pasta) {
			require.Equal(t, []netip.Prefix{prefix("192.0.2.7/24"), prefix("2001:db8::7/64")}, p.o.config.Network.Addrs)
		}},
		{"-a 192.0.2.7/30", func(t *testing.T, p *pasta) {
			require.Equal(t, []netip.Prefix{prefix("192.0.2.7/30")}, p.o.config.Network.Addrs)
		}},
		{"-a 192.0.2.7 -n 255.255.0.0", func(t *testing.T, p *pasta) {
			require.Equal(t, []netip.Prefix{prefix("192.0.2.7/16")}, p.o.config.Network.Addrs)
		}},
		{"-a 10.0.2.100 -n 24 -g 10.0.2.2", func(t *testing.T, p *pasta) {
			require.Equal(t, []netip.Prefix{prefix("10.0.2.100/24")}, p.o.config.Network.Addrs)
			require.Equal(t, []netip.Addr{addr("10.0.2.2")}, p.o.config.Network.Gateways)
			require.Contains(t, p.o.config.Network.MapHostLoopback, addr("10.0.2.2"))
		}},
		{"-g 192.0.2.1 --no-map-gw", func(t *testing.T, p *pasta) { require.Empty(t, p.o.config.Network.MapHostLoopback) }},
		{"--map-host-loopback none", func(t *testing.T, p *pasta) { require.Empty(t, p.o.config.Network.MapHostLoopback) }},
		{"--map-host-loopback 192.0.2.3", func(t *testing.T, p *pasta) {
			require.Equal(t, []netip.Addr{addr("192.0.2.3")}, p.o.config.Network.MapHostLoopback)
		}},
		{"-i lo", func(t *testing.T, p *pasta) {
			require.Equal(t, "lo", p.o.config.Network.HostIfName)
			require.Equal(t, "lo", p.o.config.Network.IfName)
		}},
		{"-4", func(t *testing.T, p *pasta) { require.True(t, p.o.config.Network.NoIPv6) }},
		{"-6", func(t *testing.T, p *pasta) { require.True(t, p.o.config.Network.NoIPv4) }},
		{"-46", func(t *testing.T, p *pasta) { require.False(t, p.o.config.Network.NoIPv4) }},
		{"--dns-forward 169.254.1.1 --dns-host 127.0.0.53", func(t *testing.T, p *pasta) {
			require.Equal(t, []netip.Addr{addr("169.254.1.1")}, p.o.config.Network.DNS)
			require.Equal(t, []netip.Addr{addr("127.0.0.53")}, p.o.config.Network.Nameservers)
			require.False(t, p.o.config.Network.NoDNS)
		}},
		{"", func(t *testing.T, p *pasta) { require.True(t, p.o.config.Network.NoDNS) }},
		{"--map-guest-addr 169.254.1.2", func(t *testing.T, p *pasta) {
			require.Equal(t, []netip.Addr{addr("169.254.1.2")}, p.o.config.Network.HostAlias)
			require.False(t, p.o.config.Network.NoHostAlias)
		}},
		{"--map-guest-addr none", func(t *testing.T, p *pasta) { require.True(t, p.o.config.Network.NoHostAlias) }},
		{"-t 8080-8080:80-80 -t ::1/81 -u 127.0.0.1/53 -T 5432 -U 514", func(t *testing.T, p *pasta) {
			var rules []string
			for _, r := range p.o.config.Rules {
				rules = append(rules, r.String())
			}
			require.Equal(t, []string{"8080:80/tcp", "[::1]:81:81/tcp", "127.0.0.1:53:53/udp", "5432:5432/tcp,out", "514:514/udp,out"}, rules)
		}},
		{"--host-lo-to-ns-lo", func(t *testing.T, p *pasta) { require.True(t, p.o.config.HostLoopbackToNSLoopback) }},
		{"--no-splice", func(t *testing.T, p *pasta) { require.Equal(t, forward.Tap, p.o.config.Datapath) }},
		{"--no-tcp -t 80", func(t *testing.T, p *pasta) { require.Empty(t, p.o.config.Rules) }},
		{"--no-udp --no-icmp", func(t *testing.T, p *pasta) {
			require.True(t, p.o.config.NoUDP)
			require.True(t, p.o.config.NoICMP)
		}},
	} {
		t.Run(tt.option, func(t *testing.T) {
			p, err := parsePasta("--netns /x " + tt.option)
			require.NoError(t, err)
			tt.want(t, p)
		})
	}
}

func TestPastaErrors(t *testing.T) {
	for line, want := range map[string]string{
		"--map-guest":                    "option '--map-guest-addr' requires", // a prefix
		"--frobnicate":                   "unrecognized option '--frobnicate'",
		"--vhost-user":                   "is for passt mode only",
		"-t none -t 80":                  "-t none conflicts",
		"-t 0":                           `"0" is not a port`,
		"-t 80 -t 70-90":                 "overlap",
		"--log-size 10":                  "--log-size 10",
		"-m 70000":                       "--mtu 70000",
		"-i nosuch0":                     "nosuch0",
		"-a 1.2.3":                       "--address 1.2.3",
		"-a 192.0.2.1/33":                "--address 192.0.2.1/33",
		"-a 192.0.2.1/8 -n 8":            "redundant",
		"-a 192.0.2.1 -n 255.1.":         "--netmask 255.1.",
		"--userns x ls":                  "--userns needs",
		"--netns x 4242":                 "both --netns",
		"--no-copy-addrs":                "need --config-net",
		"--no-splice --host-lo-to-ns-lo": "incompatible",
	} {
		_, err := parsePasta(line)
		require.ErrorContains(t, err, want, line)
	}
}

func TestPastaTarget(t *testing.T) {
	p, err := parsePasta("-q 4242")
	require.NoError(t, err)
	require.Equal(t, 4242, p.o.pid)
	require.True(t, p.o.detach)

	p, err = parsePasta("-4 ls -l 3")
	require.NoError(t, err)
	require.Equal(t, []string{"ls", "-l", "3"}, p.command)
	require.False(t, p.o.detach)
}

func TestLogFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	l, err := openLogFile(path, 1000, true)
	require.NoError(t, err)
	line := strings.Repeat("x", 98) + "\n"
	for range 200 {
		_, err := l.Write([]byte(line))
		require.NoError(t, err)
	}
	_, err = l.Write([]byte("last\n"))
	require.NoError(t, err)
	b, err := os.ReadFile(path)
	require.NoError(t, err)
	require.LessOrEqual(t, len(b), 1000)
	require.GreaterOrEqual(t, len(b), 500)
	require.True(t, strings.HasPrefix(string(b), line))
	require.True(t, strings.HasSuffix(string(b), "\nlast\n"))
}
