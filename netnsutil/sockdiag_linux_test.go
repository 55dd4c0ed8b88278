package netnsutil_test

import (
	"context"
	"net"
	"net/netip"
	"slices"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/gofwd/gofwd/netnsutil"
	"github.com/gofwd/gofwd/netnsutil/nstest"
)

func openSockDiag(t testing.TB, ns *netnsutil.NS) *netnsutil.SockDiag {
	t.Helper()
	d, err := ns.SockDiag()
	require.NoError(t, err)
	t.Cleanup(func() { d.Close() })
	return d
}

func listeners(t *testing.T, d *netnsutil.SockDiag) []netnsutil.Listener {
	t.Helper()
	list, err := d.AppendListeners(nil)
	require.NoError(t, err)
	return list
}

func TestSockDiag(t *testing.T) {
	ns := nstest.New(t)
	nstest.Veth(t, nstest.New(t), "p0", ns, "eth0 192.0.2.1/24 2001:db8::1/64")
	d := openSockDiag(t, ns)
	require.Empty(t, listeners(t, d))

	var closers []interface{ Close() error }
	var want []netnsutil.Listener
	port := uint16(8000)
	nstest.Do(t, ns, func() {
		for _, l := range []struct{ network, addr string }{
			{"tcp4", "0.0.0.0"},
			{"tcp4", "127.0.0.1"},
			{"tcp4", "192.0.2.1"},
			{"tcp6", "::"},
			{"tcp6", "::1"},
			{"tcp6", "2001:db8::1"},
			{"tcp", "::"},
			{"udp4", "0.0.0.0"},
			{"udp4", "192.0.2.1"},
			{"udp6", "::"},
			{"udp6", "2001:db8::1"},
			{"udp", "::"},
		} {
			port++
			at := netip.AddrPortFrom(netip.MustParseAddr(l.addr), port)
			both := l.network == "tcp" || l.network == "udp"
			udp := l.network[0] == 'u'
			// Go sets IPV6_V6ONLY unless the network is tcp or udp.
			lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
				if at.Addr().Is4() {
					return nil
				}
				return c.Control(func(fd uintptr) {
					only := 1
					if both {
						only = 0
					}
					_ = unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, only)
				})
			}}
			if udp {
				c, err := lc.ListenPacket(context.Background(), l.network, at.String())
				require.NoError(t, err)
				closers = append(closers, c)
			} else {
				c, err := lc.Listen(context.Background(), l.network, at.String())
				require.NoError(t, err)
				closers = append(closers, c)
			}
			want = append(want, netnsutil.Listener{UDP: udp, Addr: at, V6Only: at.Addr().Is6() && !both})
		}
		// What must not show: connected UDP, TCP connections, sockets that
		// are not bound.
		c, err := net.Dial("udp", "192.0.2.1:9")
		require.NoError(t, err)
		closers = append(closers, c)
		c, err = net.Dial("tcp", "127.0.0.1:8002")
		require.NoError(t, err)
		closers = append(closers, c)
		for _, kind := range []int{unix.SOCK_DGRAM, unix.SOCK_STREAM} {
			fd, err := unix.Socket(unix.AF_INET, kind|unix.SOCK_CLOEXEC, 0)
			require.NoError(t, err)
			defer unix.Close(fd)
		}
	})
	require.ElementsMatch(t, want, listeners(t, d))

	for _, c := range closers {
		require.NoError(t, c.Close())
	}
	require.Empty(t, listeners(t, d))
}

// Kernel: one socket can be asked for by its two ends, however it is bound; an
// IPv6 socket with IPv4 addresses by those.
func TestSockDiagConnecting(t *testing.T) {
	ns := nstest.New(t)
	nstest.Veth(t, nstest.New(t), "p0", ns, "eth0 192.0.2.1/24 2001:db8::1/64")
	d := openSockDiag(t, ns)
	for _, c := range []struct {
		name, local, remote string
		family              int
		device              bool
	}{
		{"IPv4", "192.0.2.1:4000", "192.0.2.9:80", unix.AF_INET, false},
		{"IPv4, bound to a device", "192.0.2.1:4001", "192.0.2.9:80", unix.AF_INET, true},
		{"IPv6", "[2001:db8::1]:4000", "[2001:db8::9]:80", unix.AF_INET6, false},
		{"IPv6, bound to a device", "[2001:db8::1]:4001", "[2001:db8::9]:80", unix.AF_INET6, true},
		{"IPv6 for IPv4", "192.0.2.1:4002", "192.0.2.9:80", unix.AF_INET6, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			local, remote := netip.MustParseAddrPort(c.local), netip.MustParseAddrPort(c.remote)
			ifindex := 0
			connecting := func() bool {
				yes, err := d.Connecting(ifindex, local, remote)
				require.NoError(t, err)
				return yes
			}
			fd := -1
			nstest.Do(t, ns, func() {
				ifi, err := net.InterfaceByName("eth0")
				require.NoError(t, err)
				ifindex = ifi.Index
				fd, err = unix.Socket(c.family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
				require.NoError(t, err)
				if c.device {
					require.NoError(t, unix.BindToDevice(fd, "eth0"))
				}
			})
			sockaddr := func(a netip.AddrPort) unix.Sockaddr {
				if c.family == unix.AF_INET {
					return &unix.SockaddrInet4{Port: int(a.Port()), Addr: a.Addr().As4()}
				}
				return &unix.SockaddrInet6{Port: int(a.Port()), Addr: a.Addr().As16()}
			}
			require.NoError(t, unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1))
			require.NoError(t, unix.Bind(fd, sockaddr(local)))
			require.False(t, connecting())
			require.ErrorIs(t, unix.Connect(fd, sockaddr(remote)), unix.EINPROGRESS)
			require.True(t, connecting())
			unix.Close(fd)
			require.False(t, connecting())
		})
	}

	// A listener on the port is not such a socket.
	nstest.Do(t, ns, func() {
		l, err := net.Listen("tcp4", "192.0.2.1:4000")
		require.NoError(t, err)
		t.Cleanup(func() { l.Close() })
	})
	yes, err := d.Connecting(0, netip.MustParseAddrPort("192.0.2.1:4000"), netip.MustParseAddrPort("192.0.2.9:80"))
	require.NoError(t, err)
	require.False(t, yes)
}

// The answer comes in many messages when there are many sockets, and buffers are
// used again.
func TestSockDiagMany(t *testing.T) {
	ns := nstest.New(t)
	d := openSockDiag(t, ns)
	const many = 900
	var want []netip.AddrPort
	nstest.Do(t, ns, func() {
		for range many {
			l, err := net.Listen("tcp4", "127.0.0.1:0")
			require.NoError(t, err)
			t.Cleanup(func() { l.Close() })
			want = append(want, l.Addr().(*net.TCPAddr).AddrPort())
		}
	})
	list, err := d.AppendListeners(make([]netnsutil.Listener, 0, many))
	require.NoError(t, err)
	var got []netip.AddrPort
	for _, l := range list {
		got = append(got, l.Addr)
	}
	order := func(a, b netip.AddrPort) int { return a.Compare(b) }
	slices.SortFunc(got, order)
	slices.SortFunc(want, order)
	require.Equal(t, want, got)
	require.Zero(t, testing.AllocsPerRun(10, func() {
		if list, err = d.AppendListeners(list[:0]); err != nil || len(list) != many {
			panic("wrong answer")
		}
	}))
}

func BenchmarkSockDiag(b *testing.B) {
	ns := nstest.New(b)
	d := openSockDiag(b, ns)
	nstest.Do(b, ns, func() {
		for range 10 {
			l, err := net.Listen("tcp", "127.0.0.1:0")
			require.NoError(b, err)
			b.Cleanup(func() { l.Close() })
		}
	})
	b.ReportAllocs()
	var list []netnsutil.Listener
	for b.Loop() {
		var err error
		if list, err = d.AppendListeners(list[:0]); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkSockDiagConnecting(b *testing.B) {
	d := openSockDiag(b, nstest.New(b))
	local, remote := netip.MustParseAddrPort("192.0.2.1:4000"), netip.MustParseAddrPort("192.0.2.9:80")
	b.ReportAllocs()
	for b.Loop() {
		if _, err := d.Connecting(0, local, remote); err != nil {
			b.Fatal(err)
		}
	}
}
