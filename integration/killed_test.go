package integration

import (
	"net/netip"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// TestKilledLeavesOneSet: a gofwd that is killed leaves its rules in the namespace;
// the next one has exactly one set of them, and takes all of it back when it ends.
// What other programs have there, alike as it may be, nobody touches.
func TestKilledLeavesOneSet(t *testing.T) {
	t.Parallel()
	need(t, "nft")
	for _, c := range []struct {
		name  string
		ready func(*topo)
		opts  []string
	}{
		{"tap", func(*topo) {}, nil},
		{"inbound only", func(tp *topo) {
			tp.ctr.ip(t, `
				link add eth0 type veth peer name eth1
				link set eth0 up
				link set eth1 up
				addr add 10.0.2.100/24 dev eth0
				addr add fd67:6f66:7764::100/64 dev eth0 nodad
				route add default via 10.0.2.2
				route add default via fd67:6f66:7764::2`)
		}, []string{"--inbound-only"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			tp := newTopo(t)
			tp.ctr.ip(t, "link set lo up")
			c.ready(tp)
			tp.ctr.serveWho(t, 80, ipv4.any, ipv6.any)
			// The marks and tables that gofwd would take first, and more.
			tp.ctr.ip(t, `
				rule add fwmark 0x4000000/0xc000000 lookup 26479
				route add local default dev lo table 26479
				rule add ipproto udp sport 80 lookup 26480
				route add local 192.0.2.9/32 dev lo table 26480`)
			tp.ctr.output(t, "ip", "-6", "rule", "add", "fwmark", "0x4000000/0xc000000", "lookup", "26479")
			tp.ctr.output(t, "ip", "-6", "route", "add", "local", "default", "dev", "lo", "table", "26479")
			tp.ctr.output(t, "nft", `table inet gofwd2 { chain out { type route hook output priority mangle; meta mark 0x6000000 counter; }; }`)
			state := func() string { return sameEachTime(tp.ctr.output(t, "sh", "-c", netState)) }
			before := state()
			ask := func() {
				t.Helper()
				for _, f := range []family{ipv4, ipv6} {
					for _, network := range []string{"tcp", "udp"} {
						got, err := tp.client.who(t, network, f.client, netip.AddrPortFrom(f.host, 8080))
						require.NoError(t, err, "%s %s", f.name, network)
						require.Equal(t, f.client, got.by.Addr())
					}
				}
			}
			opts := append([]string{"-p", "8080:80", "-p", "8080:80/udp"}, c.opts...)
			g := tp.attach(t, opts...)
			once := state()
			require.NotEqual(t, before, once)
			for range 2 {
				ask()
				g.signal(unix.SIGKILL)
				g.exit(t, 3*time.Second)
				g = tp.attach(t, opts...)
				require.Equal(t, once, state())
			}
			ask()
			g.signal(unix.SIGTERM)
			require.Zero(t, g.exit(t, 3*time.Second))
			require.Equal(t, before, state())
		})
	}
}

// sameEachTime takes out of a netState what is by chance: the port that tproxy leads
// to, the index of the tap, and what follows from its MAC address.
func sameEachTime(state string) string {
	for _, re := range []string{`tproxy ip6? to \S+:\d+`, `(?m)^\d+: `, `fe80::[0-9a-f:]+`} {
		state = regexp.MustCompile(re).ReplaceAllStringFunc(state, func(s string) string {
			return strings.TrimRight(s, "0123456789abcdef: ")
		})
	}
	return state
}
