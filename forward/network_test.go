package forward

import (
	"net/netip"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/gofwd/gofwd/netnsutil"
)

func prefixes(s ...string) []netip.Prefix {
	var out []netip.Prefix
	for _, p := range s {
		out = append(out, netip.MustParsePrefix(p))
	}
	return out
}

func linkRoute(dst, via string) netnsutil.Route {
	r := netnsutil.Route{Dst: netip.MustParsePrefix(dst)}
	if via != "" {
		r.Via = netip.MustParseAddr(via)
	}
	return r
}

func TestPlanNetwork(t *testing.T) {
	lan := hostNetwork{
		nets: prefixes("127.0.0.1/8", "::1/128", "192.0.2.10/24", "2001:db8::10/64"),
		main: netnsutil.Link{
			Name: "eth0", MTU: 9000, Addrs: prefixes("192.0.2.10/24", "192.0.2.11/24", "2001:db8::10/64"),
			Routes: []netnsutil.Route{linkRoute("0.0.0.0/0", "192.0.2.1"), linkRoute("10.9.0.0/16", "192.0.2.2"), linkRoute("::/0", "fe80::1")},
		},
	}
	v4 := hostNetwork{nets: lan.nets[2:3], main: netnsutil.Link{
		Addrs: lan.main.Addrs[:1], Routes: lan.main.Routes[:1],
	}}
	defaults := []netnsutil.Route{linkRoute("0.0.0.0/0", "10.0.2.2"), linkRoute("::/0", "fd67:6f66:7764::2")}

	type want struct {
		addrs, private             []netip.Prefix
		gateways, dns, alias, open []netip.Addr
		routes                     []netnsutil.Route
		notes                      int
	}
	private := want{
		addrs:    prefixes("10.0.2.100/24", "fd67:6f66:7764::100/64"),
		private:  prefixes("10.0.2.0/24", "fd67:6f66:7764::/64"),
		gateways: addrs("10.0.2.2", "fd67:6f66:7764::2"),
		dns:      addrs("10.0.2.3", "fd67:6f66:7764::3"),
		alias:    addrs("169.254.1.2", "fd67:6f66:7764::1"),
		routes:   defaults,
	}
	with := func(change func(*want)) want {
		w := private
		change(&w)
		return w
	}
	for _, tt := range []struct {
		name string
		cfg  Network
		host hostNetwork
		want want
	}{
		{"default", Network{}, lan, private},
		{"host without network", Network{}, hostNetwork{}, private},
		{
			"host is in the net already",
			Network{},
			hostNetwork{nets: prefixes("10.0.2.15/24", "10.0.3.1/30", "fd67:6f66:7764::100/64")},
			want{
				addrs:    prefixes("10.0.4.100/24", "fd67:6f66:7764:1::100/64"),
				private:  prefixes("10.0.4.0/24", "fd67:6f66:7764:1::/64"),
				gateways: addrs("10.0.4.2", "fd67:6f66:7764:1::2"),
				dns:      addrs("10.0.4.3", "fd67:6f66:7764:1::3"),
				alias:    private.alias,
				routes:   []netnsutil.Route{linkRoute("0.0.0.0/0", "10.0.4.2"), linkRoute("::/0", "fd67:6f66:7764:1::2")},
			},
		},
		{"IPv4 only", Network{NoIPv6: true}, lan, want{
			addrs: private.addrs[:1], private: private.private[:1], gateways: private.gateways[:1], dns: private.dns[:1],
			alias: private.alias[:1], routes: defaults[:1],
		}},
		{"IPv6 only", Network{NoIPv4: true}, lan, want{
			addrs: private.addrs[1:], private: private.private[1:], gateways: private.gateways[1:], dns: private.dns[1:],
			alias: private.alias[1:], routes: defaults[1:],
		}},
		{
			"own address",
			Network{Addrs: prefixes("172.30.0.2/16")},
			lan,
			with(func(w *want) {
				w.addrs = prefixes("172.30.0.2/16", "fd67:6f66:7764::100/64")
				w.private = prefixes("172.30.0.0/16", "fd67:6f66:7764::/64")
				w.gateways = addrs("172.30.0.3", "fd67:6f66:7764::2")
				w.dns = addrs("172.30.0.4", "fd67:6f66:7764::3")
				w.routes = []netnsutil.Route{linkRoute("0.0.0.0/0", "172.30.0.3"), defaults[1]}
			}),
		},
		{
			"small net",
			Network{Addrs: prefixes("172.30.0.2/29"), NoIPv6: true},
			lan,
			want{
				addrs: prefixes("172.30.0.2/29"), private: prefixes("172.30.0.0/29"),
				gateways: addrs("172.30.0.3"), dns: addrs("172.30.0.4"), alias: private.alias[:1],
				routes: []netnsutil.Route{linkRoute("0.0.0.0/0", "172.30.0.3")},
			},
		},
		{
			"net of two, without room for DNS",
			Network{Addrs: prefixes("172.30.0.1/30"), NoIPv6: true},
			lan,
			want{
				addrs: prefixes("172.30.0.1/30"), private: prefixes("172.30.0.0/30"),
				gateways: addrs("172.30.0.2"), dns: addrs("169.254.1.1"), alias: private.alias[:1],
				routes: []netnsutil.Route{linkRoute("0.0.0.0/0", "172.30.0.2")},
			},
		},
		{
			"single address, gateway elsewhere",
			Network{
				Addrs: prefixes("172.30.0.1/32"), Gateways: addrs("169.254.7.7"), NoIPv6: true,
			},
			lan,
			want{
				addrs: prefixes("172.30.0.1/32"), private: prefixes("172.30.0.1/32"),
				gateways: addrs("169.254.7.7"), dns: addrs("169.254.1.1"), alias: private.alias[:1],
				routes: []netnsutil.Route{linkRoute("0.0.0.0/0", "169.254.7.7")},
			},
		},
		{
			"address of the host's own net: its neighbours are real",
			Network{Addrs: prefixes("192.0.2.50/24"), Gateways: addrs("192.0.2.1"), NoIPv6: true},
			lan,
			want{
				addrs: prefixes("192.0.2.50/24"), gateways: addrs("192.0.2.1"), dns: addrs("169.254.1.1"), alias: private.alias[:1],
				routes: []netnsutil.Route{linkRoute("0.0.0.0/0", "192.0.2.1")},
			},
		},
		{
			"special addresses",
			Network{
				DNS: addrs("169.254.1.1", "10.0.2.53"), HostAlias: addrs("10.0.2.9"), MapHostLoopback: addrs("10.0.2.2", "fd00::7"),
			},
			lan,
			with(func(w *want) {
				w.dns = addrs("169.254.1.1", "10.0.2.53", "fd67:6f66:7764::3")
				w.alias = addrs("10.0.2.9", "fd67:6f66:7764::1")
				w.open = addrs("10.0.2.2", "fd00::7")
			}),
		},
		{"no special addresses", Network{NoDNS: true, NoHostAlias: true}, lan, with(func(w *want) { w.dns, w.alias = nil, nil })},
		{
			"the host's addresses",
			Network{CopyHost: true},
			lan,
			want{
				addrs:    lan.main.Addrs,
				gateways: addrs("192.0.2.1", "fe80::1"),
				dns:      addrs("169.254.1.1", "fd67:6f66:7764::3"),
				alias:    private.alias,
				routes:   lan.main.Routes,
			},
		},
		{
			"the host's addresses, of one family",
			Network{CopyHost: true},
			v4,
			want{
				addrs: v4.main.Addrs, gateways: addrs("192.0.2.1"), dns: addrs("169.254.1.1"),
				alias: private.alias[:1], routes: v4.main.Routes,
			},
		},
		{
			"the host's addresses, but another gateway",
			Network{CopyHost: true, Gateways: addrs("192.0.2.99")},
			v4,
			want{
				addrs: v4.main.Addrs, gateways: addrs("192.0.2.99"), dns: addrs("169.254.1.1"),
				alias: private.alias[:1], routes: []netnsutil.Route{linkRoute("0.0.0.0/0", "192.0.2.99")},
			},
		},
		{
			"the host's addresses, no default route",
			Network{CopyHost: true, NoIPv6: true},
			hostNetwork{main: netnsutil.Link{Addrs: prefixes("192.0.2.10/24")}},
			want{
				addrs: prefixes("192.0.2.10/24"), gateways: addrs("192.0.2.2"), dns: addrs("169.254.1.1"), alias: private.alias[:1],
				routes: []netnsutil.Route{linkRoute("0.0.0.0/0", "192.0.2.2")},
			},
		},
		{
			"an address of its own, and the host's routes",
			Network{CopyHost: true, Addrs: prefixes("192.0.2.50/24")},
			v4,
			want{
				addrs:    prefixes("192.0.2.50/24"),
				gateways: addrs("192.0.2.1"),
				dns:      addrs("169.254.1.1"),
				alias:    private.alias[:1],
				routes:   v4.main.Routes,
			},
		},
		{"a host without addresses to copy", Network{CopyHost: true}, hostNetwork{}, with(func(w *want) { w.notes = 1 })},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p, err := planNetwork(tt.cfg, tt.host)
			require.NoError(t, err)
			require.Equal(t, "tap0", p.link.Name)
			require.Equal(t, 1500, p.link.MTU)
			require.Equal(t, tt.want, want{
				addrs: p.link.Addrs, private: p.addrs.private, gateways: p.addrs.gateways, dns: p.addrs.dns,
				alias: p.addrs.alias, open: p.addrs.loopback, routes: p.link.Routes, notes: len(p.notes),
			})
		})
	}
}

func TestPlanNetworkErrors(t *testing.T) {
	for _, tt := range []struct {
		cfg  Network
		want string
	}{
		{Network{NoIPv4: true, NoIPv6: true}, "number the container: neither IPv4 nor IPv6 is wanted"},
		{Network{MTU: 1000}, "number the container: MTU 1000 is not between 1280 and 65521"},
		{Network{MTU: 70000}, "number the container: MTU 70000 is not between 1280 and 65521"},
		{Network{MTU: 60, NoIPv6: true}, "number the container: MTU 60 is not between 68 and 65521"},
		{Network{Addrs: prefixes("127.0.0.1/8")}, "number the container: address 127.0.0.1 is not the address of a host"},
		{Network{Addrs: prefixes("10.0.0.1/24", "10.0.0.2/24")}, "number the container: address 10.0.0.2 is the second of its family"},
		{Network{Addrs: make([]netip.Prefix, 1)}, "number the container: address without prefix length"},
		{Network{Addrs: prefixes("10.0.0.1/32")}, "number the container: the net of 10.0.0.1/32 has no room for a gateway: give one"},
		{Network{Addrs: prefixes("10.0.0.1/24"), Gateways: addrs("10.0.0.1")}, "number the container: gateway 10.0.0.1 is the container's own address"},
		{Network{Gateways: addrs("0.0.0.0")}, "number the container: gateway 0.0.0.0 is not the address of a host"},
		{Network{DNS: addrs("224.0.0.1")}, "number the container: DNS address 224.0.0.1 is not the address of a host"},
		{Network{HostAlias: addrs("fe80::1%eth0")}, "number the container: host alias fe80::1%eth0 is not the address of a host"},
		{Network{MapHostLoopback: addrs("::1")}, "number the container: address mapped to the host's loopback ::1 is not the address of a host"},
	} {
		_, err := planNetwork(tt.cfg, hostNetwork{})
		require.EqualError(t, err, tt.want)
	}
}
