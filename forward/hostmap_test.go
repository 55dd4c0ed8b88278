package forward

import (
	"net/netip"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
)

// testHostMap is a container that is numbered as by default, on a host with the
// main addresses 192.0.2.10 and 2001:db8::10.
func testHostMap() *hostMap {
	return &hostMap{
		guest:    addrs("10.0.2.100", "fd67:6f66:7764::100"),
		gateways: addrs("10.0.2.2", "fd67:6f66:7764::2"),
		dns:      addrs("10.0.2.3", "fd67:6f66:7764::3"),
		alias:    addrs("169.254.1.2", "fd67:6f66:7764::1"),
		private:  []netip.Prefix{netip.MustParsePrefix("10.0.2.0/24"), netip.MustParsePrefix("fd67:6f66:7764::/64")},
		mainAddr: func(is6 bool) (netip.Addr, bool) {
			if is6 {
				return netip.MustParseAddr("2001:db8::10"), true
			}
			return netip.MustParseAddr("192.0.2.10"), true
		},
		nameserver: func() (netip.Addr, error) { return netip.MustParseAddr("127.0.0.53"), nil },
	}
}

func addrs(s ...string) []netip.Addr {
	var out []netip.Addr
	for _, a := range s {
		out = append(out, netip.MustParseAddr(a))
	}
	return out
}

func TestHostMapSource(t *testing.T) {
	plain := testHostMap()
	loopback := testHostMap()
	loopback.loopbackToLoopback = true
	copied := testHostMap() // as CopyHost: the container owns the host's addresses
	copied.guest = addrs("192.0.2.10", "2001:db8::10")
	copied.private = nil
	noAlias := testHostMap()
	noAlias.alias = nil
	nothing := &hostMap{}

	const guest4, guest6 = "10.0.2.100", "fd67:6f66:7764::100"
	for _, tt := range []struct {
		name                 string
		m                    *hostMap
		client, target, want string
	}{
		{"remote v4", plain, "203.0.113.7:4444", guest4, "203.0.113.7:4444"},
		{"remote v6", plain, "[2001:db8::7]:4444", guest6, "[2001:db8::7]:4444"},
		{"remote v4, dual-stack listener", plain, "[::ffff:203.0.113.7]:4444", guest4, "203.0.113.7:4444"},
		{"remote v6, link-local", plain, "[fe80::7%eth0]:4444", guest6, "[fe80::7]:4444"},
		{"remote in the container's net", plain, "10.0.2.15:4444", guest4, "10.0.2.15:4444"},
		{"remote with the container's own address", plain, "10.0.2.100:4444", guest4, "169.254.1.2:4444"},
		{"host's own address v4", plain, "192.0.2.10:4444", guest4, "192.0.2.10:4444"},
		{"host's own address v6", plain, "[2001:db8::10]:4444", guest6, "[2001:db8::10]:4444"},
		{"host's own address v4, owned by both", copied, "192.0.2.10:4444", "192.0.2.10", "169.254.1.2:4444"},
		{"host's own address v6, owned by both", copied, "[2001:db8::10]:4444", "2001:db8::10", "[fd67:6f66:7764::1]:4444"},
		{"another of the host's addresses", copied, "192.0.2.11:4444", "192.0.2.10", "192.0.2.11:4444"},
		{"loopback v4", plain, "127.0.0.1:4444", guest4, "169.254.1.2:4444"},
		{"loopback v4, all of 127/8", plain, "127.9.9.9:4444", guest4, "169.254.1.2:4444"},
		{"loopback v4, mapped", plain, "[::ffff:127.0.0.1]:4444", guest4, "169.254.1.2:4444"},
		{"loopback v6", plain, "[::1]:4444", guest6, "[fd67:6f66:7764::1]:4444"},
		{"loopback v4 to loopback", loopback, "127.0.0.1:4444", "127.0.0.1", "127.0.0.1:4444"},
		{"loopback v6 to loopback", loopback, "[::1]:4444", "::1", "[::1]:4444"},
		{"loopback v6 to loopback v4", loopback, "[::1]:4444", "127.0.0.1", "127.0.0.1:4444"},
		{"loopback to an explicit target", loopback, "127.0.0.1:4444", "10.0.2.101", "169.254.1.2:4444"},
		{"loopback to loopback, not asked for", plain, "127.0.0.1:4444", "127.0.0.1", "169.254.1.2:4444"},
		{"remote v4 to v6-only", plain, "203.0.113.7:4444", guest6, "[fd67:6f66:7764::1]:4444"},
		{"remote v6 to v4-only", plain, "[2001:db8::7]:4444", guest4, "169.254.1.2:4444"},
		{"loopback without alias", noAlias, "127.0.0.1:4444", guest4, "10.0.2.2:4444"},
		{"loopback without anything", nothing, "[::1]:4444", guest6, "[fd67:6f66:7764::1]:4444"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got := tt.m.source(netip.MustParseAddrPort(tt.client), netip.MustParseAddr(tt.target))
			require.Equal(t, tt.want, got.String())
		})
	}
}

func TestHostMapDestination(t *testing.T) {
	plain := testHostMap()
	opened := testHostMap()
	opened.loopback = addrs("169.254.1.9", "fd67:6f66:7764::9")
	gateway := testHostMap() // pasta's --map-gw
	gateway.loopback = addrs("10.0.2.2")
	copied := testHostMap()
	copied.private = nil
	copied.gateways = addrs("192.0.2.1")
	copied.dns = addrs("169.254.1.1")
	offline := testHostMap()
	offline.mainAddr = func(bool) (netip.Addr, bool) { return netip.Addr{}, false }

	for _, tt := range []struct {
		name      string
		m         *hostMap
		dst, want string
		err       error
	}{
		{"world v4", plain, "198.51.100.1:443", "198.51.100.1:443", nil},
		{"world v6", plain, "[2001:db8:1::1]:443", "[2001:db8:1::1]:443", nil},
		{"world, mapped", plain, "[::ffff:198.51.100.1]:443", "198.51.100.1:443", nil},
		{"host's own address", plain, "192.0.2.10:22", "192.0.2.10:22", nil},
		{"dns", plain, "10.0.2.3:53", "127.0.0.53:53", nil},
		{"dns over tls", plain, "10.0.2.3:853", "127.0.0.53:853", nil},
		{"dns v6 to a v4 nameserver", plain, "[fd67:6f66:7764::3]:53", "127.0.0.53:53", nil},
		{"dns address, other port", plain, "10.0.2.3:80", "", syscall.ECONNREFUSED},
		{"alias v4", plain, "169.254.1.2:22", "192.0.2.10:22", nil},
		{"alias v6", plain, "[fd67:6f66:7764::1]:22", "[2001:db8::10]:22", nil},
		{"alias of a host without network", offline, "169.254.1.2:22", "", syscall.ENETUNREACH},
		{"mapped loopback v4", opened, "169.254.1.9:631", "127.0.0.1:631", nil},
		{"mapped loopback v6", opened, "[fd67:6f66:7764::9]:631", "[::1]:631", nil},
		{"loopback mapped to the gateway", gateway, "10.0.2.2:631", "127.0.0.1:631", nil},
		{"gateway", plain, "10.0.2.2:80", "", syscall.ECONNREFUSED},
		{"rest of our net v4", plain, "10.0.2.77:80", "", syscall.EHOSTUNREACH},
		{"rest of our net v6", plain, "[fd67:6f66:7764::77]:80", "", syscall.EHOSTUNREACH},
		{"the container itself", plain, "10.0.2.100:80", "", syscall.EHOSTUNREACH},
		{"link-local v6", plain, "[fe80::1]:80", "", syscall.EHOSTUNREACH},
		{"copied: the real gateway", copied, "192.0.2.1:80", "192.0.2.1:80", nil},
		{"copied: a neighbour", copied, "192.0.2.77:80", "192.0.2.77:80", nil},
		{"copied: dns", copied, "169.254.1.1:53", "127.0.0.53:53", nil},
		{"multicast v4", plain, "224.0.0.251:5353", "224.0.0.251:5353", nil},
		{"multicast v6", plain, "[ff02::fb]:5353", "[ff02::fb]:5353", nil},
		{"multicast to oneself", plain, "[ff01::1]:5353", "", syscall.EHOSTUNREACH},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := tt.m.destination(netip.MustParseAddrPort(tt.dst))
			require.ErrorIs(t, err, tt.err)
			if tt.err == nil {
				require.Equal(t, tt.want, got.String())
			}
		})
	}
}

// Nothing that a container can write into an IP header leads to the host's
// loopback, unless an address was mapped to it or it is a DNS address.
func TestHostLoopbackIsClosed(t *testing.T) {
	m := testHostMap()
	for _, s := range []string{
		"0.0.0.0", "127.0.0.1", "127.0.0.53", "127.255.255.255",
		"::", "::1", "::ffff:0.0.0.0", "::ffff:127.0.0.1", "::ffff:127.9.9.9",
	} {
		for _, port := range []uint16{0, 22, 53, 853, 65535} {
			got, err := m.destination(netip.AddrPortFrom(netip.MustParseAddr(s), port))
			require.ErrorIs(t, err, syscall.EHOSTUNREACH, "%s leads to %s", s, got)
		}
	}
	// Not even where the host's main address is asked for.
	m.mainAddr = func(is6 bool) (netip.Addr, bool) { return loopbackOf(!is6), true }
	for _, alias := range m.alias {
		got, err := m.destination(netip.AddrPortFrom(alias, 22))
		require.Error(t, err, "%s leads to %s", alias, got)
	}
}

func FuzzHostMapDestination(f *testing.F) {
	for _, s := range []string{"0.0.0.0", "127.0.0.1", "::", "::1", "::ffff:127.0.0.1", "10.0.2.2", "fe80::1"} {
		f.Add(netip.MustParseAddr(s).AsSlice(), uint16(22))
	}
	m := testHostMap()
	f.Fuzz(func(t *testing.T, ip []byte, port uint16) {
		addr, ok := netip.AddrFromSlice(ip)
		if !ok || addr == m.dns[0] || addr == m.dns[1] {
			return
		}
		got, err := m.destination(netip.AddrPortFrom(addr, port))
		if err != nil {
			return
		}
		require.False(t, got.Addr().IsLoopback() || got.Addr().IsUnspecified() || got.Addr().Is4In6(), "%s leads to %s", addr, got)
	})
}
