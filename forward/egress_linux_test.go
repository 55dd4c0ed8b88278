package forward

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/gofwd/gofwd/netnsutil"
)

// What the container begins has the address that was asked for, but not to the
// host itself, and leaves by the interface that was asked for.
func TestForwarderEgress(t *testing.T) { onBothPaths(t, testForwarderEgress) }

func testForwarderEgress(t *testing.T, path Datapath) {
	const other4, other6 = "203.0.113.11", "2001:db8:1::11"
	remote := newLAN(t)
	ip(t, "addr add "+other4+"/24 dev lan0")
	ip(t, "addr add "+other6+"/64 dev lan0 nodad preferred_lft 0")
	allowPing(t)
	// Whoever is not the other address gets no answer to a ping.
	within(t, remote, func() {
		ip(t, "route add blackhole "+host4)
		ip(t, "-6 route add blackhole "+host6)
	})
	port := tellPeer(t, remote, ":0")
	hostPort := tellPeer(t, nil, ":0")
	cfg := Config{Datapath: path, OutboundAddrs: addrs(other4, other6)}
	// A published port speaks by its listener otherwise.
	cfg.Rules = []Rule{{Proto: UDP, TargetPorts: PortRange{5000, 5000}}}
	f, ns := start(t, cfg)
	for _, network := range []string{"tcp", "udp"} {
		for _, tt := range []struct{ dst, want string }{
			{at(remote4, port), other4},
			{at(remote6, port), other6},
			{at("169.254.1.2", hostPort), host4},
			{at("fd67:6f66:7764::1", hostPort), host6},
		} {
			got, _, err := ask(t, ns, network, tt.dst)
			require.NoError(t, err, "%s %s", network, tt.dst)
			require.Equal(t, tt.want, netip.MustParseAddrPort(got).Addr().Unmap().String(), "%s %s", network, tt.dst)
		}
	}
	for _, dst := range []string{remote4, remote6, host4, host6} {
		out, ok := ping(t, ns, "-c 1 "+dst)
		require.True(t, ok, "%s: %s", dst, out)
	}
	require.NoError(t, f.Close())

	// Without the address there is no way out.
	cfg.NetNS, cfg.OutboundAddrs = newNS(t), addrs("203.0.113.12")
	_, ns = start(t, cfg)
	_, _, err := ask(t, ns, "tcp", at(remote4, port))
	require.ErrorIs(t, err, syscall.ENETUNREACH)
}

// newSecondLAN makes another link, lan1, where somebody else has the addresses of
// the first one's remote host. The host's own routing prefers the first one.
func newSecondLAN(t *testing.T) (remote *netnsutil.NS) {
	t.Helper()
	remote = newNS(t)
	ip(t, fmt.Sprintf("link add lan1 type veth peer name lan1 netns /proc/%d/fd/%d", os.Getpid(), remote.Fd()))
	up := func(addr4, addr6 string) {
		ip(t, "link set lan1 up")
		ip(t, "addr add "+addr4+"/24 dev lan1")
		ip(t, "addr add "+addr6+"/64 dev lan1 nodad")
	}
	up("203.0.113.20", "2001:db8:1::20")
	within(t, remote, func() { up(remote4, remote6) })
	return remote
}

func TestForwarderEgressInterface(t *testing.T) { onBothPaths(t, testForwarderEgressInterface) }

func testForwarderEgressInterface(t *testing.T, path Datapath) {
	newLAN(t)
	second := newSecondLAN(t)
	t.Cleanup(func() { ip(t, "link del lan1") })
	allowPing(t)
	port := tellPeer(t, second, ":0")
	hostPort := tellPeer(t, nil, ":0")
	_, ns := start(t, Config{Datapath: path, OutboundIf4: "lan1", OutboundIf6: "lan1"})
	for _, network := range []string{"tcp", "udp"} {
		for _, tt := range []struct{ dst, want string }{
			{at(remote4, port), "203.0.113.20"},
			{at(remote6, port), "2001:db8:1::20"},
			{at(host4, hostPort), host4},
			{at(host6, hostPort), host6},
		} {
			got, _, err := ask(t, ns, network, tt.dst)
			require.NoError(t, err, "%s %s", network, tt.dst)
			require.Equal(t, tt.want, netip.MustParseAddrPort(got).Addr().Unmap().String(), "%s %s", network, tt.dst)
		}
	}
	for _, dst := range []string{remote4, remote6, host4} {
		out, ok := ping(t, ns, "-c 1 "+dst)
		require.True(t, ok, "%s: %s", dst, out)
	}
}

// An interface that is made anew under its name has another index: what goes on from
// the same port of the container leaves by the new one, and so does what is new.
func TestForwarderEgressInterfaceMadeAnew(t *testing.T) {
	newLAN(t) // where a socket goes that is bound to no interface
	allowPing(t)
	f, ns := start(t, Config{OutboundIf4: "lan1", OutboundIf6: "lan1"})
	const port = 7000
	flows := map[string]net.Conn{}
	for _, dst := range []string{remote4, remote6} {
		within(t, ns, func() {
			c, err := net.Dial("udp", at(dst, port))
			require.NoError(t, err)
			flows[dst] = c
		})
		defer flows[dst].Close()
	}
	answered := func(dst string) bool {
		c := flows[dst]
		c.SetDeadline(time.Now().Add(50 * time.Millisecond))
		if _, err := c.Write([]byte("still there?")); err != nil {
			return false
		}
		_, err := c.Read(make([]byte, 100))
		return err == nil
	}
	pinged := func(dst string) bool { _, ok := ping(t, ns, "-c 1 -W 1 "+dst); return ok }
	for range 3 {
		tellPeer(t, newSecondLAN(t), fmt.Sprint(":", port))
		for dst := range flows {
			require.Eventually(t, func() bool { return answered(dst) }, 5*time.Second, time.Millisecond, "UDP to %s", dst)
			require.Eventually(t, func() bool { return pinged(dst) }, 5*time.Second, time.Millisecond, "ping to %s", dst)
			_, _, err := ask(t, ns, "tcp", at(dst, port))
			require.NoError(t, err, dst)
		}
		require.Empty(t, f.Status().Notes)
		ip(t, "link del lan1")
		for dst := range flows {
			require.False(t, answered(dst), "by the other interface: %s", dst)
		}
	}
}

func TestEgressConfig(t *testing.T) {
	for want, cfg := range map[string]Config{
		"second of its family":         {OutboundAddrs: addrs("192.0.2.1", "192.0.2.2")},
		"not the address of a host":    {OutboundAddrs: addrs("224.0.0.1")},
		"longer than":                  {OutboundIf6: strings.Repeat("x", 16)},
		"InboundOnly and LoopbackOnly": {InboundOnly: true, LoopbackOnly: true},
	} {
		cfg.NetNS = newNS(t)
		_, err := Start(t.Context(), cfg)
		require.ErrorContains(t, err, want)
	}
	g, err := newEgress(Config{OutboundAddrs: addrs("192.0.2.1")}, &hostAddrs{read: netnsutil.LocalAddrs})
	require.NoError(t, err)
	require.True(t, g.applies(netip.MustParseAddr("192.0.2.9")))
	require.False(t, g.applies(netip.MustParseAddr("2001:db8::9")), "another family")
	require.False(t, g.applies(netip.MustParseAddr("127.0.0.53")))
	require.False(t, (*egress)(nil).applies(netip.MustParseAddr("192.0.2.9")))
}

// With FreeBind a listener is there before its address.
func TestForwarderFreeBind(t *testing.T) {
	ns := newNS(t)
	port := tellPeer(t, ns, ":0")
	var rules []Rule
	for _, addr := range []string{"192.0.2.99", "2001:db8::99"} {
		for _, proto := range []Proto{TCP, UDP} {
			rules = append(rules, Rule{
				Proto: proto, Addr: netip.MustParseAddr(addr), Ports: PortRange{8080, 8080}, TargetPorts: PortRange{port, port},
			})
		}
	}
	_, err := Start(t.Context(), Config{NetNS: ns, Rules: rules})
	require.ErrorIs(t, err, syscall.EADDRNOTAVAIL)
	start(t, Config{NetNS: ns, Rules: rules, FreeBind: true})
	ip(t, "addr add 192.0.2.99/32 dev lo")
	ip(t, "addr add 2001:db8::99/128 dev lo nodad")
	t.Cleanup(func() {
		ip(t, "addr del 192.0.2.99/32 dev lo")
		ip(t, "addr del 2001:db8::99/128 dev lo")
	})
	for _, r := range rules {
		_, _, err := ask(t, nil, strings.ToLower(r.Proto.String()), at(r.Addr.String(), 8080))
		require.NoError(t, err, r)
	}
}

// With LoopbackOnly there is no interface but lo, and nobody else comes in.
func TestForwarderLoopbackOnly(t *testing.T) {
	remote := newLAN(t)
	ns := newNS(t)
	port := tellPeer(t, ns, "127.0.0.1:0")
	hostPort := tellPeer(t, nil, "127.0.0.1:0")
	f, _ := start(t, Config{NetNS: ns, LoopbackOnly: true, Rules: append(
		forEach(Rule{Ports: PortRange{8080, 8080}, TargetPorts: PortRange{port, port}}),
		forEach(Rule{Dir: Out, Ports: PortRange{9090, 9090}, TargetPorts: PortRange{hostPort, hostPort}})...,
	)})
	within(t, ns, func() {
		links, err := os.ReadFile("/proc/thread-self/net/dev")
		require.NoError(t, err)
		require.Equal(t, 3, strings.Count(string(links), "\n"), "lo alone: %s", links)
	})
	for _, network := range []string{"tcp", "udp"} {
		got, _, err := ask(t, nil, network, "127.0.0.1:8080")
		require.NoError(t, err, network)
		require.True(t, strings.HasPrefix(got, "127.0.0.1:"), got)
		got, _, err = ask(t, ns, network, "127.0.0.1:9090")
		require.NoError(t, err, network)
		require.True(t, strings.HasPrefix(got, "127.0.0.1:"), got)
	}
	_, _, err := ask(t, remote, "tcp", at(host4, 8080))
	require.ErrorIs(t, err, syscall.ECONNRESET)
	path, reason := f.Status().Rules[0].Path, f.Status().Rules[0].Reason
	require.Equal(t, Kernel, path)
	require.Contains(t, reason, "loopback")
}
