package netnsutil_test

import (
	"fmt"
	"net/netip"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/gofwd/gofwd/netnsutil"
	"github.com/gofwd/gofwd/netnsutil/nstest"
)

func prefixes(s ...string) (p []netip.Prefix) {
	for _, s := range s {
		p = append(p, netip.MustParsePrefix(s))
	}
	return p
}

// routes returns the routes of l in a form that can be read.
func routes(l netnsutil.Link) (s []string) {
	for _, r := range l.Routes {
		s = append(s, fmt.Sprint(r.Dst, " via ", r.Via))
	}
	slices.Sort(s)
	return s
}

// hostLink calls HostLink as if ns were the host's namespace.
func hostLink(t *testing.T, ns *netnsutil.NS) (link netnsutil.Link, err error) {
	t.Helper()
	require.NoError(t, ns.Do(func() error { link, err = netnsutil.HostLink(); return nil }))
	return link, err
}

func TestHostLink(t *testing.T) {
	host, router := nstest.New(t), nstest.New(t)
	_, err := hostLink(t, host)
	require.ErrorIs(t, err, netnsutil.ErrNoHostLink)

	nstest.Veth(t, router, "h0 192.0.2.1/24 2001:db8::1/64", host, "up0 192.0.2.10/24 2001:db8::10/64")
	_, err = hostLink(t, host)
	require.ErrorIs(t, err, netnsutil.ErrNoHostLink)

	// A second uplink with a worse route, and what a host has besides.
	nstest.Veth(t, router, "h1 198.51.100.1/24 2001:db8:1::1/64", host, "up1 198.51.100.10/24 2001:db8:1::10/64")
	for _, args := range [][]string{
		{"link", "set", "up0", "mtu", "1400"},
		{"-4", "route", "add", "default", "via", "192.0.2.1", "dev", "up0", "metric", "100"},
		{"-4", "route", "add", "default", "via", "192.0.2.2", "dev", "up0", "metric", "300"},
		{"-4", "route", "add", "default", "via", "198.51.100.1", "dev", "up1", "metric", "200"},
		{"-4", "route", "add", "203.0.113.0/24", "via", "192.0.2.7", "dev", "up0"},
		{"-4", "route", "add", "10.1.0.0/16", "dev", "up0"},
		{"-4", "route", "add", "10.2.0.0/16", "dev", "up1"},
		{"-4", "route", "add", "blackhole", "10.3.0.0/16"},
		{"-6", "route", "add", "default", "via", "fe80::1", "dev", "up1", "metric", "50"},
		{"-6", "route", "add", "default", "via", "2001:db8::1", "dev", "up0", "metric", "60"},
		{"-6", "route", "add", "2001:db8:f::/48", "via", "2001:db8:1::7", "dev", "up1"},
		{"-6", "addr", "add", "2001:db8:1::dead/64", "dev", "up1", "preferred_lft", "0"},
		{"-4", "addr", "add", "169.254.7.7/16", "dev", "up0"},
	} {
		nstest.Run(t, host, "ip", args...)
	}
	link, err := hostLink(t, host)
	require.NoError(t, err)
	require.Equal(t, "up0", link.Name)
	require.Equal(t, 1400, link.MTU)
	require.Equal(t, prefixes("192.0.2.10/24", "2001:db8:1::10/64"), link.Addrs)
	require.Equal(t, routes(nstest.Link(t, "x, 0.0.0.0/0 via 192.0.2.1, 203.0.113.0/24 via 192.0.2.7, 10.1.0.0/16,"+
		" ::/0 via fe80::1, 2001:db8:f::/48 via 2001:db8:1::7")), routes(link))

	// The copy can be made true, twice.
	guest := nstest.New(t)
	nstest.Veth(t, router, "g0", guest, "up0")
	require.NoError(t, guest.Configure(link))
	require.NoError(t, guest.Configure(link))
	copied, err := hostLink(t, guest)
	require.NoError(t, err)
	require.ElementsMatch(t, link.Addrs, copied.Addrs)
	require.Equal(t, routes(link), routes(copied))
	require.Equal(t, link.MTU, copied.MTU)
}

// Clouds give a host one address and a gateway outside of it.
func TestHostLinkGatewayOnLink(t *testing.T) {
	host, router := nstest.New(t), nstest.New(t)
	nstest.Veth(t, router, "h0 10.0.0.1/32", host, "up0 192.0.2.10/32 2001:db8::10/128, 0.0.0.0/0 via 10.0.0.1, ::/0 via 2001:db8:ff::1")
	link, err := hostLink(t, host)
	require.NoError(t, err)
	require.Equal(t, prefixes("192.0.2.10/32", "2001:db8::10/128"), link.Addrs)
	require.Equal(t, routes(nstest.Link(t, "x, 0.0.0.0/0 via 10.0.0.1, ::/0 via 2001:db8:ff::1")), routes(link))
}

func TestHostLinkMultipathAndPointToPoint(t *testing.T) {
	host, router := nstest.New(t), nstest.New(t)
	nstest.Veth(t, router, "h0", host, "up0 192.0.2.10/24")
	nstest.Veth(t, router, "h1", host, "up1 198.51.100.10/24")
	nstest.Run(t, host, "ip", "route", "add", "default", "nexthop", "via", "198.51.100.1", "dev", "up1", "nexthop", "via", "192.0.2.1", "dev", "up0")
	nstest.Run(t, host, "ip", "-6", "route", "add", "default", "dev", "up0")
	link, err := hostLink(t, host)
	require.NoError(t, err)
	require.Equal(t, "up1", link.Name)
	require.Equal(t, routes(nstest.Link(t, "x, 0.0.0.0/0 via 198.51.100.1, ::/0")), routes(link))
}

func TestLocalAddrsAndMainAddr(t *testing.T) {
	host, router := nstest.New(t), nstest.New(t)
	mainAddrs := func() (v4, v6 netip.Addr) {
		var ok4, ok6 bool
		nstest.Do(t, host, func() {
			v4, ok4 = netnsutil.MainAddr(false)
			v6, ok6 = netnsutil.MainAddr(true)
		})
		require.Equal(t, ok4, v4.IsValid())
		require.Equal(t, ok6, v6.IsValid())
		return v4, v6
	}
	v4, v6 := mainAddrs()
	require.False(t, v4.IsValid())
	require.False(t, v6.IsValid())

	nstest.Veth(t, router, "h0", host, "up0 192.0.2.10/24 2001:db8::10/64, 0.0.0.0/0 via 192.0.2.1, ::/0 via fe80::1")
	v4, v6 = mainAddrs()
	require.Equal(t, "192.0.2.10", v4.String())
	require.Equal(t, "2001:db8::10", v6.String())

	nstest.Do(t, host, func() {
		addrs, err := netnsutil.LocalAddrs()
		require.NoError(t, err)
		require.Subset(t, addrs, prefixes("127.0.0.1/8", "::1/128", "192.0.2.10/24", "2001:db8::10/64"))
		_, err = netnsutil.ReadLink("none")
		require.ErrorIs(t, err, os.ErrNotExist)
		link, err := netnsutil.ReadLink("up0")
		require.NoError(t, err)
		require.Equal(t, prefixes("192.0.2.10/24", "2001:db8::10/64"), link.Addrs)
	})
	// As behind a VPN: two halves instead of a default route.
	nstest.Run(t, host, "ip", "route", "del", "default")
	nstest.Veth(t, router, "h1", host, "vpn0 198.51.100.10/24, 0.0.0.0/1, 128.0.0.0/1")
	v4, _ = mainAddrs()
	require.Equal(t, "198.51.100.10", v4.String())
}

func TestWatchHost(t *testing.T) {
	host, router := nstest.New(t), nstest.New(t)
	var w *netnsutil.HostWatch
	require.NoError(t, host.Do(func() (err error) { w, err = netnsutil.WatchHost(0); return err }))
	defer w.Close()
	changed := func(within time.Duration) bool {
		select {
		case <-w.Changes():
			return true
		case <-time.After(within):
			return false
		}
	}
	settle := func() {
		for changed(200 * time.Millisecond) {
		}
	}
	require.False(t, changed(50*time.Millisecond))
	nstest.Veth(t, router, "h0", host, "up0 192.0.2.10/24")
	require.True(t, changed(5*time.Second))
	settle()
	for _, args := range [][]string{
		{"addr", "add", "192.0.2.11/24", "dev", "up0"},
		{"addr", "add", "2001:db8::1/64", "dev", "up0"},
		{"route", "add", "default", "via", "192.0.2.1"},
		{"route", "add", "2001:db8:1::/64", "dev", "up0"},
		{"link", "set", "up0", "down"},
	} {
		nstest.Run(t, host, "ip", args...)
		require.True(t, changed(5*time.Second), "ip %v", args)
		settle()
	}
	require.NoError(t, w.Close())
	_, open := <-w.Changes()
	require.False(t, open)
	require.NoError(t, w.Close())
}

// Changes that go on are told of as often as was asked for, and the last one is.
func TestWatchHostSettle(t *testing.T) {
	const settle = 200 * time.Millisecond
	host := nstest.New(t)
	var w *netnsutil.HostWatch
	require.NoError(t, host.Do(func() (err error) { w, err = netnsutil.WatchHost(settle); return err }))
	defer w.Close()
	var told, changes int
	for begun := time.Now(); time.Since(begun) < 5*settle; changes++ {
		nstest.Run(t, host, "ip", "link", "set", "lo", []string{"up", "down"}[changes%2])
		select {
		case <-w.Changes():
			told++
		case <-time.After(settle / 20):
		}
	}
	require.Greater(t, changes, 6)
	require.Positive(t, told, "not before they end")
	require.LessOrEqual(t, told, 5)
	nstest.Run(t, host, "ip", "link", "set", "lo", "up")
	told = 0
	for end := time.After(4 * settle); end != nil; {
		select {
		case <-w.Changes():
			told++
		case <-end:
			end = nil
		}
	}
	require.Positive(t, told, "of the last change")
	require.LessOrEqual(t, told, 3)

	var none *netnsutil.HostWatch
	require.Nil(t, none.Changes())
	require.NoError(t, none.Close())
}

func TestConfigure(t *testing.T) {
	ns, peer := nstest.New(t), nstest.New(t)
	nstest.Veth(t, peer, "p0", ns, "tap0")
	link := nstest.Link(t, "tap0 10.0.2.100/24 fd67:6f66:7764::100/64, 0.0.0.0/0 via 10.0.2.2, ::/0 via fd67:6f66:7764::2")
	link.MTU = 9000
	link.HardwareAddr = []byte{2, 0, 0, 0, 0, 7}
	link.Congestion = netnsutil.LocalCongestion
	require.NoError(t, ns.Configure(link))
	once := nstest.Run(t, ns, "ip", "addr", "show", "tap0") + nstest.Run(t, ns, "ip", "route") + nstest.Run(t, ns, "ip", "-6", "route")
	require.NoError(t, ns.Configure(link))
	require.Equal(t, once, nstest.Run(t, ns, "ip", "addr", "show", "tap0")+nstest.Run(t, ns, "ip", "route")+nstest.Run(t, ns, "ip", "-6", "route"))
	for _, s := range []string{
		"mtu 9000", "02:00:00:00:00:07", "inet 10.0.2.100/24 brd 10.0.2.255 scope global tap0",
		"inet6 fd67:6f66:7764::100/64 scope global nodad", "default via 10.0.2.2 dev tap0", "default via fd67:6f66:7764::2 dev tap0",
		"10.0.2.0/24 dev tap0 proto kernel scope link src 10.0.2.100 congctl reno",
	} {
		require.Contains(t, once, s)
	}
	require.NotContains(t, once, "tentative")
	require.NotContains(t, once, "onlink")
	require.Contains(t, nstest.Run(t, ns, "ip", "addr", "show", "lo"), "inet6 ::1/128")
}

// Kernel: of several addresses the source of a connection is the oldest in IPv4,
// and the youngest in IPv6.
func TestConfigureFirstAddressIsTheSource(t *testing.T) {
	ns, peer := nstest.New(t), nstest.New(t)
	nstest.Veth(t, peer, "p0", ns, "tap0")
	require.NoError(t, ns.Configure(nstest.Link(t, "tap0 10.0.2.100/24 10.0.2.7/24 10.0.2.200/24 fd67::100/64 fd67::7/64 fd67::200/64, 0.0.0.0/0 via 10.0.2.2, ::/0 via fd67::2")))
	for _, ipv6 := range []bool{false, true} {
		var main netip.Addr
		require.NoError(t, ns.Do(func() error {
			main, _ = netnsutil.MainAddr(ipv6)
			return nil
		}))
		require.Equal(t, map[bool]string{false: "10.0.2.100", true: "fd67::100"}[ipv6], main.String())
	}
}

// The route of another interface, which the kernel would replace, stays.
func TestConfigureLeavesOthersRoutes(t *testing.T) {
	ns, peer := nstest.New(t), nstest.New(t)
	nstest.Veth(t, peer, "p0", ns, "eth0")
	nstest.Veth(t, peer, "p1", ns, "tap0")
	require.NoError(t, ns.Configure(nstest.Link(t, "eth0 10.88.0.2/16 fd88::2/64, 0.0.0.0/0 via 10.88.0.1, ::/0 via fd88::1")))
	before := nstest.Run(t, ns, "ip", "route", "show", "default") + nstest.Run(t, ns, "ip", "-6", "route", "show", "default")
	for _, link := range []string{"tap0 10.0.2.100/24, 0.0.0.0/0 via 10.0.2.2", "tap0 fd67::100/64, ::/0 via fd67::2"} {
		require.ErrorIs(t, ns.Configure(nstest.Link(t, link)), netnsutil.ErrRouteTaken)
	}
	require.Equal(t, before, nstest.Run(t, ns, "ip", "route", "show", "default")+nstest.Run(t, ns, "ip", "-6", "route", "show", "default"))
}

func TestConfigureErrors(t *testing.T) {
	ns, peer := nstest.New(t), nstest.New(t)
	nstest.Veth(t, peer, "p0", ns, "tap0")
	for want, link := range map[string]netnsutil.Link{
		"find interface none: Link not found":                 {Name: "none"},
		"set MTU of interface tap0 to 100000: ":               {Name: "tap0", MTU: 100000},
		"set MAC address of interface tap0 to 01:00:00:00:00": {Name: "tap0", HardwareAddr: []byte{1, 0, 0, 0, 0, 0}},
		"add address ff02::7/128 to interface tap0: ":         nstest.Link(t, "tap0 10.0.0.1/8 ff02::7/128"),
		"add route to 10.0.0.0/8 by interface tap0: ":         nstest.Link(t, "tap0, 10.0.0.0/8 via 127.0.0.1"),
	} {
		err := ns.Configure(link)
		require.ErrorContains(t, err, "configure network namespace ", "%v", link)
		require.ErrorContains(t, err, want)
	}
}
