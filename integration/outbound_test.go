package integration

import (
	"errors"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

func isOneOf(err error, targets ...error) bool {
	return slices.ContainsFunc(targets, func(target error) bool { return errors.Is(err, target) })
}

// TestOutbound: the world sees the host's address, and the container reaches the
// client, a host behind it, and the host itself.
func TestOutbound(t *testing.T) {
	t.Parallel()
	tp := newTopo(t)
	far := tp.addFar(t)
	tp.attach(t)
	eachFamily(t, func(t *testing.T, f family) {
		for _, c := range []struct {
			server *node
			at     netip.Addr
			source []netip.Addr
		}{
			{tp.client, f.client, []netip.Addr{f.host, f.host2}},
			{tp.client, f.client2, []netip.Addr{f.host, f.host2}},
			{far, f.far, []netip.Addr{f.host, f.host2}},
			{tp.host, f.host, []netip.Addr{f.host}},
			{tp.host, f.hostEth1, []netip.Addr{f.hostEth1}},
		} {
			c.server.serveWho(t, 7000, c.at)
			for _, proto := range []string{"tcp", "udp"} {
				got, err := tp.ctr.who(t, proto, netip.Addr{}, netip.AddrPortFrom(c.at, 7000))
				require.NoError(t, err, "%s to %s", proto, c.at)
				require.Contains(t, c.source, got.by.Addr(), "%s to %s", proto, c.at)
			}
		}
	})
}

// TestOutboundErrors: what the network says to gofwd's dial is what the
// container's connect(2) says, and as soon.
func TestOutboundErrors(t *testing.T) {
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
			{"closed port of a neighbour", f.client, unix.ECONNREFUSED},
			{"closed port behind the router", f.far, unix.ECONNREFUSED},
			{"closed port of the host", f.host, unix.ECONNREFUSED},
			{"closed port of the host alias", f.alias, unix.ECONNREFUSED},
			{"a router says unreachable", f.unreachable, f.unreachableErr},
			{"no route on the host", f.noRoute, unix.EHOSTUNREACH},
		} {
			begin := time.Now()
			_, err := tp.ctr.tryTCP(netip.Addr{}, netip.AddrPortFrom(c.dst, 9), patience)
			require.ErrorIs(t, err, c.want, "%s", c.name)
			// Linux itself needs a second attempt where ICMP arrives
			// while the socket is in use by connect(2), which happens
			// on a link without any delay (tcp_v6_err: sk_err_soft).
			require.Less(t, time.Since(begin), 3*time.Second, "%s", c.name)
		}
	})
}

// TestOutboundSilence: a dial that hangs leaves the container's SYN unanswered,
// and gofwd dials once however often the container repeats it.
func TestOutboundSilence(t *testing.T) {
	t.Parallel()
	tp := newTopo(t)
	tp.attach(t)
	eachFamily(t, func(t *testing.T, f family) {
		dialling := func() int {
			n := 0
			for line := range strings.Lines(tp.host.readProc("tcp") + tp.host.readProc("tcp6")) {
				if field := strings.Fields(line); len(field) > 3 && field[3] == "02" { // SYN_SENT
					n++
				}
			}
			return n
		}
		before := dialling()
		_, err := tp.ctr.tryTCP(netip.Addr{}, netip.AddrPortFrom(f.silent, 9), 3500*time.Millisecond) // three SYNs
		require.True(t, isTimeout(err), "%v", err)
		require.Equal(t, before+1, dialling())
	})
}

// TestOutboundAfterFailure: the same port of the container, refused before, gets
// through once there is a listener.
func TestOutboundAfterFailure(t *testing.T) {
	t.Parallel()
	tp := newTopo(t)
	tp.attach(t)
	eachFamily(t, func(t *testing.T, f family) {
		dst := netip.AddrPortFrom(f.client, 7000)
		for range 3 {
			_, err := tp.ctr.tryTCP(netip.Addr{}, dst, patience)
			require.ErrorIs(t, err, unix.ECONNREFUSED)
		}
		go greet(tp.client.listenTCP(t, f.client, 7000), "now")
		tp.ctr.requireGreeting(t, dst, "now")
	})
}

// TestNoProtocol: --no-tcp, --no-udp and --no-icmp forward nothing of the kind.
func TestNoProtocol(t *testing.T) {
	t.Parallel()
	need(t, "ping")
	for _, c := range []struct {
		opt            string
		tcp, udp, icmp bool
	}{
		{"--no-tcp", false, true, true},
		{"--no-udp", true, false, true},
		{"--no-icmp", true, true, false},
	} {
		t.Run(c.opt, func(t *testing.T) {
			t.Parallel()
			tp := newTopo(t)
			tp.attach(t, c.opt)
			eachFamily(t, func(t *testing.T, f family) {
				tp.client.serveWho(t, 7000, f.client)
				dst := netip.AddrPortFrom(f.client, 7000)
				conn, err := tp.ctr.tryTCP(netip.Addr{}, dst, 2*time.Second)
				require.Equal(t, c.tcp, err == nil, "TCP: %v", err)
				if err == nil {
					conn.Close()
				}
				require.Equal(t, c.udp, udpAnswers(tp.ctr, t, dst) == nil, "UDP")
				r := tp.ctr.run(t, "ping", f.flag, "-n", "-c", "2", "-i", "0.2", "-W", "1", f.client.String())
				require.Equal(t, c.icmp, r.code == 0, "ping: %s", r.stdout)
			})
		})
	}
}

// TestOutboundFrom: the world sees the address that gofwd was given, and what is
// given an interface leaves by it.
func TestOutboundFrom(t *testing.T) {
	t.Parallel()
	tp := newTopo(t)
	tp.host.ip(t, `
		route add default via 203.0.113.2 dev eth1 metric 5000
		route add default via 2001:db8:2::2 dev eth1 metric 5000`)
	second := newNode(t, "ctr")
	tp.host.startGofwd(t, second.id, "attach", "--netns", second.path, "--outbound-if4", "eth1", "--outbound-if6", "eth1")
	tp.attach(t, "--outbound", "198.51.100.11", "--outbound", "2001:db8:1::11")
	tp.client.serveWho(t, 7000, ipv4.client, ipv6.client)
	tp.host.serveWho(t, 7001, ipv4.host, ipv6.host)
	eachFamily(t, func(t *testing.T, f family) {
		for _, proto := range []string{"tcp", "udp"} {
			for ctr, source := range map[*node]netip.Addr{tp.ctr: f.host2, second: f.hostEth1} {
				require.Equal(t, source, requireWho(t, ctr, proto, netip.AddrPortFrom(f.client, 7000).String()).by.Addr(), proto)
				require.Equal(t, f.host, requireWho(t, ctr, proto, netip.AddrPortFrom(f.host, 7001).String()).by.Addr(), "%s to the host", proto)
			}
		}
	})
	requireOneLine(t, tp.host.runCmd(t, gofwdCmd("attach", "--netns", tp.ctr.path, "--outbound", "198.51.100.1", "--outbound", "198.51.100.2")),
		2, "only one of each family")
}
