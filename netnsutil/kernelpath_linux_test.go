package netnsutil

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// newTestNS makes a namespace with lo up.
func newTestNS(t *testing.T) (*NS, *netlink.Handle) {
	t.Helper()
	ns, err := New()
	require.NoError(t, err)
	h, err := netlink.NewHandleAt(netns.NsHandle(ns.Fd()), unix.NETLINK_ROUTE)
	require.NoError(t, err)
	t.Cleanup(func() { h.Close(); ns.Close() })
	lo, err := h.LinkByName("lo")
	require.NoError(t, err)
	require.NoError(t, h.LinkSetUp(lo))
	return ns, h
}

// addNowhere gives the namespace addresses and a default route of both families
// on an interface that leads nowhere.
func addNowhere(t *testing.T, h *netlink.Handle) {
	t.Helper()
	require.NoError(t, h.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "nowhere"}, PeerName: "end"}))
	end, err := h.LinkByName("end")
	require.NoError(t, err)
	require.NoError(t, h.LinkSetUp(end))
	l, err := h.LinkByName("nowhere")
	require.NoError(t, err)
	require.NoError(t, h.LinkSetUp(l))
	for _, a := range []string{"10.0.2.100/24", "fd67::100/64"} {
		addr, err := netlink.ParseAddr(a)
		require.NoError(t, err)
		addr.Flags = unix.IFA_F_NODAD
		require.NoError(t, h.AddrAdd(l, addr))
	}
	for _, gw := range []string{"10.0.2.2", "fd67::2"} {
		require.NoError(t, h.RouteAdd(&netlink.Route{LinkIndex: l.Attrs().Index, Gw: net.ParseIP(gw)}))
	}
}

// netState is everything in a namespace that a kernel path may touch.
func netState(t *testing.T, ns *NS, h *netlink.Handle) []string {
	t.Helper()
	var s []string
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		rules, err := h.RuleList(family)
		require.NoError(t, err)
		for _, r := range rules {
			s = append(s, fmt.Sprintf("rule %d %+v proto %d", family, r, r.Protocol))
		}
		routes, err := h.RouteListFiltered(family, &netlink.Route{}, netlink.RT_FILTER_TABLE)
		require.NoError(t, err)
		for _, r := range routes {
			if r.Protocol == unix.RTPROT_KERNEL {
				continue // of new IPv6 addresses and links, whenever it gets round to them
			}
			s = append(s, fmt.Sprintf("route %v table %d proto %d", r, r.Table, r.Protocol))
		}
	}
	for _, path := range sysctlPaths {
		s = append(s, path+"="+readSysctl(t, ns, path))
	}
	c, err := nftables.New(nftables.WithNetNSFd(ns.Fd()))
	require.NoError(t, err)
	chains, err := c.ListChains()
	require.NoError(t, err)
	for _, ch := range chains {
		rules, err := c.GetRules(ch.Table, ch)
		require.NoError(t, err)
		s = append(s, fmt.Sprintf("nft %s %s %d rules", ch.Table.Name, ch.Name, len(rules)))
	}
	slices.Sort(s)
	return s
}

func readSysctl(t *testing.T, ns *NS, path string) string {
	t.Helper()
	var b []byte
	require.NoError(t, ns.Do(func() (err error) {
		b, err = os.ReadFile("/proc/sys/net/" + path)
		return err
	}))
	return strings.TrimSpace(string(b))
}

// abandon leaves the namespace as a process does that is killed: descriptors
// are closed, and nothing is taken back.
func abandon(k *KernelPath) {
	unix.Close(k.owner)
	k.h.Close()
	k.nft.CloseLasting()
	for _, s := range k.sysctls {
		s.file.Close()
	}
}

func TestKernelPathCloseLeavesNothing(t *testing.T) {
	ns, h := newTestNS(t)
	addNowhere(t, h)
	before := netState(t, ns, h)

	k, err := ns.OpenKernelPath()
	require.NoError(t, err)
	require.True(t, k.IPv4())
	require.True(t, k.IPv6())
	require.NoError(t, k.HoldSYN("nowhere", netip.MustParseAddrPort("127.0.0.1:1"), netip.MustParseAddrPort("[::1]:1")))
	require.NoError(t, k.AddUDPPort(53))
	_, err = k.AddUDPClient(netip.MustParseAddr("203.0.113.7"), netip.MustParseAddr("10.0.2.100"))
	require.NoError(t, err)
	require.NotEqual(t, before, netState(t, ns, h))
	require.Equal(t, "1", readSysctl(t, ns, "ipv4/conf/nowhere/accept_local"))

	require.NoError(t, k.Close())
	require.Equal(t, before, netState(t, ns, h))
	require.Equal(t, "0", readSysctl(t, ns, "ipv4/conf/nowhere/accept_local"))
	require.NoError(t, k.Close(), "idempotent")
}

func TestKernelPathAfterKill(t *testing.T) {
	ns, h := newTestNS(t)
	addNowhere(t, h)
	before := netState(t, ns, h)
	open := func() *KernelPath {
		k, err := ns.OpenKernelPath()
		require.NoError(t, err)
		require.NoError(t, k.HoldSYN("nowhere", netip.MustParseAddrPort("127.0.0.1:1"), netip.MustParseAddrPort("[::1]:1")))
		require.NoError(t, k.AddUDPPort(53))
		return k
	}

	k := open()
	once := netState(t, ns, h)
	_, err := k.AddUDPClient(netip.MustParseAddr("2001:db8::7"), netip.MustParseAddr("fd67::100"))
	require.NoError(t, err)
	abandon(k)

	k = open()
	require.Equal(t, once, netState(t, ns, h), "exactly one set of rules, and the clients forgotten")
	abandon(k)
	k = open()
	require.NoError(t, k.Close())
	require.Equal(t, before, netState(t, ns, h), "the sysctls are what the first process found")
}

func TestKernelPathKeepsSysctlThatWasOn(t *testing.T) {
	ns, h := newTestNS(t)
	require.NoError(t, ns.Do(func() error {
		return os.WriteFile("/proc/sys/net/ipv4/tcp_fwmark_accept", []byte("1"), 0)
	}))
	before := netState(t, ns, h)
	k, err := ns.OpenKernelPath()
	require.NoError(t, err)
	abandon(k)
	k, err = ns.OpenKernelPath()
	require.NoError(t, err)
	require.NoError(t, k.Close())
	require.Equal(t, before, netState(t, ns, h))
}

func TestKernelPathLeavesOthersAlone(t *testing.T) {
	ns, h := newTestNS(t)
	addNowhere(t, h)
	// Another program uses the bits, the table and the priority that we
	// would take, the bits also in a rule of nftables.
	rule := netlink.NewRule()
	mask := uint32(0x0c000000)
	rule.Family, rule.Priority, rule.Mark, rule.Mask, rule.Table = unix.AF_INET6, 50, 0x04000000, &mask, firstTable
	require.NoError(t, h.RuleAdd(rule))
	wg := netlink.NewRule() // as wg-quick has it
	wg.Family, wg.Priority, wg.Mark, wg.Invert, wg.Table = unix.AF_INET, 32764, 51820, true, 51820
	require.NoError(t, h.RuleAdd(wg))
	require.NoError(t, h.RouteAdd(&netlink.Route{
		Family: unix.AF_INET, Type: unix.RTN_BLACKHOLE, Table: firstTable + 3,
		Dst: &net.IPNet{IP: net.IPv4(198, 51, 100, 0), Mask: net.CIDRMask(24, 32)},
	}))
	c, err := nftables.New(nftables.WithNetNSFd(ns.Fd()))
	require.NoError(t, err)
	table := c.AddTable(&nftables.Table{Name: "gofwd2", Family: nftables.TableFamilyINet})
	chain := c.AddChain(&nftables.Chain{Name: "c", Table: table})
	c.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: marks{mask: 0x03000000}.set(0x01000000)})
	c.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: append(
		(&marks{mask: 0x30000000}).match(expr.CmpOpEq, 0x10000000), &expr.Counter{})})
	require.NoError(t, c.Flush())
	before := netState(t, ns, h)

	k, err := ns.OpenKernelPath()
	require.NoError(t, err)
	require.Equal(t, uint32(0xc0000000), k.marks.mask)
	require.Equal(t, firstTable+4, k.table)
	require.Less(t, k.priority, 50)
	after := netState(t, ns, h)
	for _, line := range before {
		if !strings.HasPrefix(line, "ipv") { // the sysctls
			require.Contains(t, after, line)
		}
	}
	require.NoError(t, k.Close())
	require.Equal(t, before, netState(t, ns, h))
}

func TestKernelPathHasOneOwner(t *testing.T) {
	ns, _ := newTestNS(t)
	k, err := ns.OpenKernelPath()
	require.NoError(t, err)
	_, err = ns.OpenKernelPath()
	require.ErrorIs(t, err, ErrKernelPathBusy)
	require.NoError(t, k.verify(unix.AF_INET), "the first one is unharmed")
	require.NoError(t, k.Close())
	k, err = ns.OpenKernelPath()
	require.NoError(t, err)
	require.NoError(t, k.Close())
}

func TestKernelPathWithoutIPv6(t *testing.T) {
	ns, h := newTestNS(t)
	require.NoError(t, ns.Do(func() error {
		return os.WriteFile("/proc/sys/net/ipv6/conf/all/disable_ipv6", []byte("1"), 0)
	}))
	before := netState(t, ns, h)
	k, err := ns.OpenKernelPath()
	require.NoError(t, err)
	require.True(t, k.IPv4())
	require.False(t, k.IPv6())
	require.NoError(t, k.Close())
	require.Equal(t, before, netState(t, ns, h))
}

func TestKernelPathNeedsLoopback(t *testing.T) {
	ns, h := newTestNS(t)
	lo, err := h.LinkByName("lo")
	require.NoError(t, err)
	require.NoError(t, h.LinkSetDown(lo))
	before := netState(t, ns, h)
	_, err = ns.OpenKernelPath()
	require.ErrorIs(t, err, unix.ENETDOWN)
	require.Equal(t, before, netState(t, ns, h))
}

func TestProbeNFTLeavesNothing(t *testing.T) {
	ns, h := newTestNS(t)
	before := netState(t, ns, h)
	errNFT, errTProxy := ns.ProbeNFT()
	require.NoError(t, errNFT)
	require.NoError(t, errTProxy)
	require.Equal(t, before, netState(t, ns, h))
}

func TestUDPClientsAreCappedOldestFirst(t *testing.T) {
	ns, h := newTestNS(t)
	addNowhere(t, h)
	k, err := ns.OpenKernelPath()
	require.NoError(t, err)
	defer k.Close()
	server := netip.MustParseAddr("10.0.2.100")
	client := func(i int) netip.Addr { return netip.AddrFrom4([4]byte{203, 0, byte(i >> 8), byte(i)}) }
	for i := range maxUDPClients {
		evicted, err := k.AddUDPClient(client(i), server)
		require.NoError(t, err)
		require.False(t, evicted.IsValid())
	}
	evicted, err := k.AddUDPClient(client(0), server) // used again
	require.NoError(t, err)
	require.False(t, evicted.IsValid())
	evicted, err = k.AddUDPClient(client(maxUDPClients), server)
	require.NoError(t, err)
	require.Equal(t, client(1), evicted)

	require.NoError(t, k.RemoveUDPClient(client(5)))
	require.NoError(t, k.RemoveUDPClient(client(5)))
	routes, err := h.RouteListFiltered(unix.AF_INET, &netlink.Route{Table: k.udp.table}, netlink.RT_FILTER_TABLE)
	require.NoError(t, err)
	require.Len(t, routes, maxUDPClients-1)
}

func TestMarkUse(t *testing.T) {
	var u markUse
	m, ok := u.free()
	require.True(t, ok)
	require.Equal(t, marks{mask: 0x0c000000, loop: 0x04000000, tap: 0x08000000}, m)
	u.add(0xca6c, ^uint32(0)) // wg-quick
	m, ok = u.free()
	require.True(t, ok)
	require.Equal(t, uint32(0x0c000000), m.mask)
	u.add(0, 0xffff0000) // Calico
	m, ok = u.free()
	require.True(t, ok)
	require.Zero(t, m.mask&(0xffff0000|0xca6c))
	u.add(0, 0x7fffffff)
	u.add(0, 0xfffffffe)
	_, ok = u.free()
	require.False(t, ok)
}

// --- The kernel's behaviours that the kernel path rests on ---

type family struct {
	name                 string
	client, server, loop netip.Addr
	level, transparent   int
}

var families = []family{
	{
		name: "IPv4", client: netip.MustParseAddr("203.0.113.7"), server: netip.MustParseAddr("10.0.2.100"), loop: netip.MustParseAddr("127.0.0.1"),
		level: unix.SOL_IP, transparent: unix.IP_TRANSPARENT,
	},
	{
		name: "IPv6", client: netip.MustParseAddr("2001:db8::7"), server: netip.MustParseAddr("fd67::100"), loop: netip.MustParseAddr("::1"),
		level: unix.SOL_IPV6, transparent: unix.IPV6_TRANSPARENT,
	},
}

// dialAs connects from client's address with a transparent socket.
func dialAs(ns *NS, f family, mark uint32, network string, client, server netip.AddrPort) (net.Conn, error) {
	var c net.Conn
	err := ns.Do(func() (err error) {
		d := net.Dialer{Timeout: 300 * time.Millisecond, Control: func(_, _ string, rc syscall.RawConn) error {
			return errors.Join(rc.Control(func(fd uintptr) {
				unix.SetsockoptInt(int(fd), f.level, f.transparent, 1)
				unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
				unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, int(mark))
			}))
		}}
		if network == "tcp" {
			d.LocalAddr = net.TCPAddrFromAddrPort(client)
		} else {
			d.LocalAddr = net.UDPAddrFromAddrPort(client)
		}
		c, err = d.DialContext(context.Background(), network, server.String())
		return err
	})
	return c, err
}

func listenIn(t *testing.T, ns *NS, addr string, mark int) net.Listener {
	t.Helper()
	var l net.Listener
	require.NoError(t, ns.Do(func() (err error) {
		lc := net.ListenConfig{Control: func(_, _ string, rc syscall.RawConn) error {
			return rc.Control(func(fd uintptr) {
				if mark != 0 {
					unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, mark)
				}
			})
		}}
		l, err = lc.Listen(context.Background(), "tcp", addr)
		return err
	}))
	t.Cleanup(func() { l.Close() })
	return l
}

// The accepted socket inherits the mark of the SYN (tcp_fwmark_accept), which
// takes its replies to the transparent socket: both ends see the addresses that
// were asked for. Servers on the wildcard, on an address and on loopback.
func TestKernelAcceptedSocketInheritsMark(t *testing.T) {
	for _, f := range families {
		t.Run(f.name, func(t *testing.T) {
			ns, h := newTestNS(t)
			addNowhere(t, h)
			k, err := ns.OpenKernelPath()
			require.NoError(t, err)
			defer k.Close()
			for _, listen := range []string{"[::]:8080", netip.AddrPortFrom(f.server, 8081).String(), netip.AddrPortFrom(f.loop, 8082).String()} {
				l := listenIn(t, ns, listen, 0)
				dst := netip.MustParseAddrPort(l.Addr().String())
				if dst.Addr().IsUnspecified() {
					dst = netip.AddrPortFrom(f.server, dst.Port())
				}
				c, err := dialAs(ns, f, k.Mark(), "tcp", netip.AddrPortFrom(f.client, 40000), dst)
				require.NoError(t, err, listen)
				s, err := l.Accept()
				require.NoError(t, err)
				require.Equal(t, netip.AddrPortFrom(f.client, 40000).String(), s.RemoteAddr().String())
				rc, err := s.(*net.TCPConn).SyscallConn()
				require.NoError(t, err)
				rc.Control(func(fd uintptr) {
					mark, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK)
					require.NoError(t, err)
					require.Equal(t, k.Mark(), uint32(mark))
				})
				s.Close()
				c.Close()
			}
		})
	}
}

// The route of the SYN-ACK gives the accepted socket its congestion control
// (RTAX_CC_ALGO), so that the container's servers do not pace what goes over lo.
func TestKernelRouteGivesAcceptedSocketItsCongestionControl(t *testing.T) {
	for _, f := range families {
		t.Run(f.name, func(t *testing.T) {
			ns, h := newTestNS(t)
			addNowhere(t, h)
			const setting = "/proc/sys/net/ipv4/tcp_congestion_control"
			require.NoError(t, ns.Do(func() error {
				allowed, err := os.ReadFile("/proc/sys/net/ipv4/tcp_allowed_congestion_control")
				if err != nil {
					return err
				}
				others := slices.DeleteFunc(strings.Fields(string(allowed)), func(s string) bool { return s == LocalCongestion })
				require.NotEmpty(t, others, "a namespace may have nothing but %s", LocalCongestion)
				return os.WriteFile(setting, []byte(others[0]), 0)
			}))
			k, err := ns.OpenKernelPath()
			require.NoError(t, err)
			defer k.Close()
			l := listenIn(t, ns, "[::]:8080", 0)
			for _, by := range []struct {
				mark   uint32
				client netip.Addr
				want   string
			}{
				{k.Mark(), f.client, LocalCongestion},
				{0, f.server, readSysctl(t, ns, "ipv4/tcp_congestion_control")}, // not by that route
			} {
				// The local route of an IPv6 address comes a little after its link's carrier.
				var c net.Conn
				require.Eventually(t, func() bool {
					c, err = dialAs(ns, f, by.mark, "tcp", netip.AddrPortFrom(by.client, 40000), netip.AddrPortFrom(f.server, 8080))
					return err == nil
				}, 10*time.Second, 10*time.Millisecond)
				s, err := l.Accept()
				require.NoError(t, err)
				rc, err := s.(*net.TCPConn).SyscallConn()
				require.NoError(t, err)
				require.NoError(t, rc.Control(func(fd uintptr) {
					name, err := unix.GetsockoptString(int(fd), unix.IPPROTO_TCP, unix.TCP_CONGESTION)
					require.NoError(t, err)
					require.Equal(t, by.want, name)
				}))
				s.Close()
				c.Close()
			}
		})
	}
}

// The RST of a closed port carries the mark of the SYN (fwmark_reflect) and
// comes back as well; without, a closed port would be a time-out.
func TestKernelResetReflectsMark(t *testing.T) {
	for _, f := range families {
		t.Run(f.name, func(t *testing.T) {
			ns, h := newTestNS(t)
			addNowhere(t, h)
			k, err := ns.OpenKernelPath()
			require.NoError(t, err)
			defer k.Close()
			start := time.Now()
			_, err = dialAs(ns, f, k.Mark(), "tcp", netip.AddrPortFrom(f.client, 40000), netip.AddrPortFrom(f.server, 9))
			require.ErrorIs(t, err, unix.ECONNREFUSED)
			require.Less(t, time.Since(start), 200*time.Millisecond)
		})
	}
}

// A listener with a mark of its own hands on that one instead of the SYN's: its
// replies leave by the default route, and the connection times out.
func TestKernelListenerWithOwnMarkInheritsNone(t *testing.T) {
	for _, f := range families {
		t.Run(f.name, func(t *testing.T) {
			ns, h := newTestNS(t)
			addNowhere(t, h)
			k, err := ns.OpenKernelPath()
			require.NoError(t, err)
			defer k.Close()
			listenIn(t, ns, netip.AddrPortFrom(f.server, 8080).String(), 0x17)
			_, err = dialAs(ns, f, k.Mark(), "tcp", netip.AddrPortFrom(f.client, 40000), netip.AddrPortFrom(f.server, 8080))
			var timeout net.Error
			require.ErrorAs(t, err, &timeout)
			require.True(t, timeout.Timeout())
		})
	}
}

// A rule by source port and a local route by client take a UDP server's replies
// to the transparent socket; those to others go the way they always went.
func TestKernelLocalRouteForUDPReplies(t *testing.T) {
	for _, f := range families {
		t.Run(f.name, func(t *testing.T) {
			ns, h := newTestNS(t)
			addNowhere(t, h)
			k, err := ns.OpenKernelPath()
			require.NoError(t, err)
			defer k.Close()
			var server net.PacketConn
			require.NoError(t, ns.Do(func() (err error) {
				server, err = net.ListenPacket("udp", "[::]:5353")
				return err
			}))
			defer server.Close()
			require.NoError(t, k.AddUDPPort(5353))
			require.NoError(t, k.AddUDPPort(5353), "twice is no error")
			_, err = k.AddUDPClient(f.client, f.server)
			require.NoError(t, err)

			c, err := dialAs(ns, f, k.Mark(), "udp", netip.AddrPortFrom(f.client, 40000), netip.AddrPortFrom(f.server, 5353))
			require.NoError(t, err)
			defer c.Close()
			_, err = c.Write([]byte("ask"))
			require.NoError(t, err)
			buf := make([]byte, 10)
			require.NoError(t, server.SetDeadline(time.Now().Add(5*time.Second)))
			n, from, err := server.ReadFrom(buf)
			require.NoError(t, err)
			require.Equal(t, "ask", string(buf[:n]))
			require.Equal(t, netip.AddrPortFrom(f.client, 40000).String(), from.String())
			_, err = server.WriteTo([]byte("answer"), from)
			require.NoError(t, err)
			require.NoError(t, c.SetDeadline(time.Now().Add(5*time.Second)))
			n, err = c.Read(buf)
			require.NoError(t, err)
			require.Equal(t, "answer", string(buf[:n]))

			server.Close() // frees its port for the question below
			local := func(dst netip.Addr, port uint16) bool { return routesToLo(t, ns, f, dst, port) }
			require.True(t, local(f.client, 5353))
			require.False(t, local(f.client.Next(), 5353), "another client")
			require.False(t, local(f.client, 5354), "another port")
			require.NoError(t, k.RemoveUDPClient(f.client))
			require.False(t, local(f.client, 5353))
		})
	}
}

// routesToLo reports whether UDP from port to dst is delivered in the namespace.
func routesToLo(t *testing.T, ns *NS, f family, dst netip.Addr, port uint16) bool {
	t.Helper()
	var to, from net.Conn
	to, err := dialAs(ns, f, 0, "udp", netip.AddrPortFrom(dst, 9), netip.AddrPortFrom(f.server, port))
	require.NoError(t, err)
	defer to.Close()
	require.NoError(t, ns.Do(func() (err error) {
		d := net.Dialer{LocalAddr: &net.UDPAddr{Port: int(port)}}
		from, err = d.Dial("udp", netip.AddrPortFrom(dst, 9).String())
		return err
	}))
	defer from.Close()
	_, err = from.Write([]byte("hello"))
	require.NoError(t, err)
	require.NoError(t, to.SetDeadline(time.Now().Add(100*time.Millisecond)))
	_, err = to.Read(make([]byte, 10))
	return err == nil
}
