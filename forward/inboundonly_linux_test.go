package forward

import (
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/gofwd/gofwd/netnsutil"
	"github.com/gofwd/gofwd/stack/stacktest"
)

// joinBridge gives ns a network, as a container on a bridge has it.
func joinBridge(t testing.TB, ns *netnsutil.NS, guest4, guest6 string) {
	t.Helper()
	require.NoError(t, ns.Do(func() error {
		ip(t, "link set lo up")
		ip(t, "link add eth0 type veth peer name eth1")
		ip(t, "link set eth0 up")
		ip(t, "link set eth1 up")
		ip(t, "addr add "+guest4+"/24 dev eth0")
		ip(t, "addr add "+guest6+"/64 dev eth0 nodad")
		ip(t, "route add default via 10.89.0.1")
		ip(t, "-6 route add default via fd00:89::1")
		return nil
	}))
}

// A container on a bridge sees its clients' addresses, without a tap, over TCP and
// UDP, and has everything as it was afterwards.
func TestForwarderInboundOnly(t *testing.T) {
	remote := newLAN(t)
	ns := newNS(t)
	const guest4, guest6, later4 = "10.89.0.2", "fd00:89::2", "10.90.0.3"
	joinBridge(t, ns, guest4, guest6)
	port := tellPeer(t, ns, ":0")
	ports := PortRange{port, port}
	f, _ := start(t, Config{NetNS: ns, InboundOnly: true, Rules: []Rule{
		{Proto: TCP, TargetPorts: ports}, {Proto: UDP, TargetPorts: ports},
	}})
	test := func(network, dst, source string) {
		t.Helper()
		from := remote
		if netip.MustParseAddr(dst).IsLoopback() {
			from = nil
		}
		rule := f.Status().Rules[0]
		if network == "udp" {
			rule = f.Status().Rules[1]
		}
		require.Equal(t, Kernel, rule.Path)
		answer, local, err := ask(t, from, network, at(dst, rule.Bound[0].Port()))
		require.NoError(t, err, "%s %s", network, dst)
		seen := netip.MustParseAddrPort(answer)
		require.Equal(t, netip.MustParseAddr(source), seen.Addr().Unmap(), "%s %s", network, dst)
		require.Equal(t, local.Port(), seen.Port())
	}
	for _, network := range []string{"tcp", "udp"} {
		test(network, host4, remote4)
		test(network, host6, remote6)
		test(network, "127.0.0.1", defaultAlias4.String())
		test(network, "::1", defaultAlias6.String())
	}

	// As podman network connect and disconnect do.
	within(t, ns, func() {
		ip(t, "addr add "+later4+"/24 dev eth0")
		ip(t, "addr del "+guest4+"/24 dev eth0")
	})
	require.NoError(t, f.Refresh())
	for _, network := range []string{"tcp", "udp"} {
		test(network, host4, remote4)
	}
	require.NoError(t, f.Close())
}

// A guest that has taken the container's addresses is not reached without a tap, and
// the status says so.
func TestForwarderInboundOnlyGuest(t *testing.T) {
	remote := newLAN(t)
	ns := newNS(t)
	joinBridge(t, ns, "10.89.0.2", "fd00:89::2")
	f, _ := start(t, Config{NetNS: ns, InboundOnly: true, Rules: []Rule{{Proto: TCP, TargetPorts: PortRange{80, 80}}}})
	stacktest.NewGuest(t, ns, "eth0")
	port := f.Status().Rules[0].Bound[0].Port()
	for _, host := range []string{host4, host6} {
		within(t, remote, func() {
			c, err := net.Dial("tcp", at(host, port))
			require.NoError(t, err)
			t.Cleanup(func() { c.Close() })
		})
	}
	require.Eventually(t, func() bool {
		return strings.Contains(f.Status().Rules[0].Reason, "reached by a tap only, and there is none")
	}, 10*time.Second, 10*time.Millisecond)
	require.Equal(t, Kernel, f.Status().Rules[0].Path)
}

// What the kernel path takes for the container's own addresses follows those that
// it has: a rule whose target comes later shows the client's address then.
func TestForwarderInboundOnlyTargetComes(t *testing.T) {
	remote := newLAN(t)
	ns := newNS(t)
	const first, later = "10.89.0.2", "10.90.0.3"
	within(t, ns, func() {
		ip(t, "link set lo up")
		ip(t, "link add eth0 type veth peer name eth1")
		ip(t, "link set eth0 up")
		ip(t, "link set eth1 up")
		ip(t, "addr add "+first+"/24 dev eth0")
		ip(t, "route add default via 10.89.0.1")
	})
	port := tellPeer(t, ns, ":0")
	f, _ := start(t, Config{NetNS: ns, InboundOnly: true, Rules: []Rule{{
		Proto: TCP, Addr: netip.MustParseAddr(host4), Ports: PortRange{8080, 8080},
		Target: netip.MustParseAddr(later), TargetPorts: PortRange{port, port},
	}}})
	require.Contains(t, f.Status().Rules[0].Reason, "not an address of the container")

	within(t, ns, func() { ip(t, "addr add "+later+"/24 dev eth0") })
	require.NoError(t, f.Refresh())
	require.Empty(t, f.Status().Rules[0].Reason)
	require.Equal(t, Kernel, f.Status().Rules[0].Path)
	answer, _, err := ask(t, remote, "tcp", at(host4, 8080))
	require.NoError(t, err)
	require.Equal(t, remote4, netip.MustParseAddrPort(answer).Addr().Unmap().String())

	within(t, ns, func() { ip(t, "addr del "+later+"/24 dev eth0") })
	require.NoError(t, f.Refresh())
	require.Contains(t, f.Status().Rules[0].Reason, "not an address of the container")
}

// A container that loses an address loses the connections to it at once, and those
// that were about to be made lead to what it has left.
func TestForwarderInboundOnlyAddressGoes(t *testing.T) {
	remote := newLAN(t)
	ns := newNS(t)
	const first, later = "10.89.0.2", "10.90.0.3"
	within(t, ns, func() {
		ip(t, "link set lo up")
		ip(t, "link add eth0 type veth peer name eth1")
		ip(t, "link set eth0 up")
		ip(t, "addr add "+first+"/24 dev eth0")
		ip(t, "route add default via 10.89.0.1")
	})
	silent := listenIn(t, ns)
	accepted := make(chan net.Conn, 1)
	var wg sync.WaitGroup
	t.Cleanup(wg.Wait)
	wg.Go(func() {
		if c, err := silent.Accept(); err == nil {
			accepted <- c
		}
	})
	port := tellPeer(t, ns, ":0")
	silentPort := silent.Addr().(*net.TCPAddr).AddrPort().Port()
	f, _ := start(t, Config{NetNS: ns, InboundOnly: true, Rules: []Rule{
		{Proto: TCP, Addr: netip.MustParseAddr(host4), Ports: PortRange{8080, 8080}, TargetPorts: PortRange{port, port}},
		{Proto: TCP, Addr: netip.MustParseAddr(host4), Ports: PortRange{8081, 8081}, TargetPorts: PortRange{silentPort, silentPort}},
	}})
	var open, coming net.Conn
	within(t, remote, func() { open = dialTest(t, "tcp", at(host4, 8081)) })
	t.Cleanup(func() { (<-accepted).Close() })
	require.Eventually(t, func() bool { return len(accepted) == 1 }, 5*time.Second, time.Millisecond)

	within(t, ns, func() {
		ip(t, "addr add "+later+"/24 dev eth0")
		ip(t, "addr del "+first+"/24 dev eth0")
	})
	within(t, remote, func() { coming = dialTest(t, "tcp", at(host4, 8080)) })
	coming.SetDeadline(time.Now().Add(100 * time.Millisecond))
	_, err := coming.Read(make([]byte, 1))
	require.ErrorIs(t, err, os.ErrDeadlineExceeded, "nobody answers at an address that is gone")

	require.NoError(t, f.Refresh())
	coming.SetDeadline(time.Now().Add(5 * time.Second))
	answer, err := io.ReadAll(coming)
	require.NoError(t, err)
	require.Equal(t, coming.LocalAddr().String(), netip.MustParseAddrPort(string(answer)).String())
	open.SetDeadline(time.Now().Add(5 * time.Second))
	_, err = open.Read(make([]byte, 1))
	require.ErrorIs(t, err, syscall.ECONNRESET)
}

func listenIn(t *testing.T, ns *netnsutil.NS) (ln net.Listener) {
	t.Helper()
	within(t, ns, func() {
		var err error
		ln, err = net.Listen("tcp", ":0")
		require.NoError(t, err)
	})
	t.Cleanup(func() { ln.Close() })
	return ln
}
