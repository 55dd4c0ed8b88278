package forward

import (
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/gofwd/gofwd/netnsutil"
	"github.com/gofwd/gofwd/netnsutil/nstest"
)

// newBehind makes a host behind the namespace, at 10.89.0.3 and fd89::3.
func newBehind(t *testing.T, ns *netnsutil.NS) *netnsutil.NS {
	t.Helper()
	behind := newNS(t)
	nstest.Veth(t, ns, "bridge 10.89.0.1/24 fd89::1/64", behind, "eth0 10.89.0.3/24 fd89::3/64")
	within(t, behind, func() {
		ip(t, "route add default via 10.89.0.1")
		ip(t, "-6 route add default via fd89::1")
	})
	within(t, ns, func() {
		require.NoError(t, os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0))
		require.NoError(t, os.WriteFile("/proc/sys/net/ipv6/conf/all/forwarding", []byte("1"), 0))
	})
	return behind
}

// publishBehind publishes a port of that host, of each family.
func publishBehind(host, target uint16) []Rule {
	rules := append(publishTCP(host, target), publishTCP(host, target)...)
	rules[0].Addr, rules[0].Target = netip.IPv4Unspecified(), netip.MustParseAddr("10.89.0.3")
	rules[1].Addr, rules[1].Target = netip.IPv6Unspecified(), netip.MustParseAddr("fd89::3")
	return rules
}

// A rule that leads to a host behind the namespace takes the kernel path, and the
// server sees the client.
func TestTargetBehind(t *testing.T) {
	remote, ns := newLAN(t), newNS(t)
	behind := newBehind(t, ns)
	port := tellPeer(t, behind, ":0")
	f, _ := start(t, Config{NetNS: ns})
	rules := append(publishBehind(8080, port), publishBehind(8081, 9)...)
	_, err := f.Change(Change{Add: rules})
	require.NoError(t, err)
	for _, r := range f.Status().Rules {
		require.Equal(t, Kernel, r.Path, r.Reason)
		require.Empty(t, r.Reason)
	}
	before := tapBytes(t, ns)
	for _, host := range []string{host4, host6} {
		for range 3 {
			got, local, err := ask(t, remote, "tcp", net.JoinHostPort(host, "8080"))
			require.NoError(t, err)
			require.Equal(t, local.String(), got)
		}
		_, _, err := ask(t, remote, "tcp", net.JoinHostPort(host, "8081"))
		require.ErrorIs(t, err, unix.ECONNRESET, "nobody listens")
	}
	require.Less(t, tapBytes(t, ns)-before, 1000, "nothing but what IPv6 says by itself")

	// From the host itself the client is the alias, and its replies find back.
	for host, alias := range map[string]string{"127.0.0.1": "169.254.1.2", "::1": "fd67:6f66:7764::1"} {
		got, _, err := ask(t, nil, "tcp", net.JoinHostPort(host, "8080"))
		require.NoError(t, err)
		require.Equal(t, alias, netip.MustParseAddrPort(got).Addr().String())
	}
}

// Where a filter in the namespace keeps the kernel path silent, the tap serves.
func TestTargetBehindFilter(t *testing.T) {
	remote, ns := newLAN(t), newNS(t)
	behind := newBehind(t, ns)
	port := tellPeer(t, behind, ":0")
	within(t, ns, func() {
		cmd := exec.Command("nft", "-f", "-")
		cmd.Stdin = strings.NewReader(`table inet filter { chain in { type filter hook input priority 0; iifname "bridge" meta l4proto tcp drop; }; }`)
		out, err := cmd.CombinedOutput()
		require.NoError(t, err, "%s", out)
	})
	f, _ := start(t, Config{NetNS: ns, Rules: publishBehind(8080, port)})
	require.Equal(t, Kernel, f.Status().Rules[0].Path)
	for _, host := range []string{host4, host6} {
		for range 2 {
			got, local, err := ask(t, remote, "tcp", net.JoinHostPort(host, "8080"))
			require.NoError(t, err)
			require.Equal(t, local.Addr(), netip.MustParseAddrPort(got).Addr())
		}
	}
	r := f.Status().Rules[0]
	require.Equal(t, Tap, r.Path)
	require.Contains(t, r.Reason, "10.89.0.3 is silent")
}
