package integration

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/gofwd/gofwd/netnsutil"
)

// The network of nearly every test, made anew for each so that tests run side by
// side. gofwd and all else on "host" are processes in namespace host.
//
//	far                  client                          host                          ctr
//	192.0.2.9  ──eth0─┐  ┌─ eth0 198.51.100.2, .3 ───── eth0 198.51.100.1, .11 ┐
//	2001:db8:9::9     │  │       2001:db8:1::2, ::3          2001:db8:1::1, ::11 ├ gofwd ── tap0 10.0.2.100
//	                  └─ far 192.0.2.1                                         │               fd67:…::100
//	                     │       2001:db8:9::1                                 │
//	                     └─ eth1 203.0.113.2 ──────── eth1 203.0.113.1         ┘
//	                             2001:db8:2::2             2001:db8:2::1
//
// The client is the host's default gateway, and forwards. Behind it lie, besides
// far, a prefix that swallows packets and one that is unreachable.
type topo struct {
	client, host, ctr *node
}

// family holds the addresses of the picture for one of IPv4 and IPv6.
type family struct {
	name            string
	client, client2 netip.Addr
	host, host2     netip.Addr // on eth0
	hostEth1        netip.Addr
	far             netip.Addr
	silent          netip.Addr // behind the client, packets to it vanish
	unreachable     netip.Addr // behind the client, which answers with ICMP unreachable
	unreachableErr  error      // what connect(2) makes of that: the client answers "no route" over IPv6
	noRoute         netip.Addr // the host itself has no route
	loopback        netip.Addr
	ctr, gw, dns    netip.Addr // DESIGN: the numbers of gofwd's own mode
	alias           netip.Addr
	any             netip.Addr
	flag            string // of curl, dig, ping, iperf3
}

var (
	ipv4 = family{
		name:   "IPv4",
		client: addr("198.51.100.2"), client2: addr("198.51.100.3"),
		host: addr("198.51.100.1"), host2: addr("198.51.100.11"), hostEth1: addr("203.0.113.1"),
		far: addr("192.0.2.9"), silent: addr("192.0.2.130"), unreachable: addr("192.0.2.70"),
		unreachableErr: unix.EHOSTUNREACH, noRoute: addr("192.0.2.200"),
		loopback: addr("127.0.0.1"),
		ctr:      addr("10.0.2.100"), gw: addr("10.0.2.2"), dns: addr("10.0.2.3"),
		alias: addr("169.254.1.2"),
		any:   addr("0.0.0.0"),
		flag:  "-4",
	}
	ipv6 = family{
		name:   "IPv6",
		client: addr("2001:db8:1::2"), client2: addr("2001:db8:1::3"),
		host: addr("2001:db8:1::1"), host2: addr("2001:db8:1::11"), hostEth1: addr("2001:db8:2::1"),
		far: addr("2001:db8:9::9"), silent: addr("2001:db8:b::1"), unreachable: addr("2001:db8:c::1"),
		unreachableErr: unix.ENETUNREACH, noRoute: addr("2001:db8:d::1"),
		loopback: addr("::1"),
		ctr:      addr("fd67:6f66:7764::100"), gw: addr("fd67:6f66:7764::2"), dns: addr("fd67:6f66:7764::3"),
		alias: addr("fd67:6f66:7764::1"),
		any:   addr("::"),
		flag:  "-6",
	}
)

func addr(s string) netip.Addr { return netip.MustParseAddr(s) }

// url puts IPv6 addresses in brackets.
func url(a netip.Addr, port uint16) string {
	return "http://" + netip.AddrPortFrom(a, port).String() + "/"
}

// eachFamily runs fn as a subtest for IPv4 and for IPv6.
func eachFamily(t *testing.T, fn func(t *testing.T, f family)) {
	for _, f := range []family{ipv4, ipv6} {
		t.Run(f.name, func(t *testing.T) { fn(t, f) })
	}
}

const (
	netnsDir   = "/run/netns"
	runtimeDir = "/run/user/0"
)

// newTopo makes the three hosts. gofwd is not running yet.
func newTopo(t *testing.T) *topo {
	t.Helper()
	tp := &topo{client: newNode(t, "client"), host: newNode(t, "host"), ctr: newNode(t, "ctr")}
	tp.host.ip(t, `
		link add eth0 type veth peer name eth0 netns `+tp.client.id+`
		link add eth1 type veth peer name eth1 netns `+tp.client.id)
	tp.host.ip(t, hostNetwork)
	tp.client.ip(t, `
		addr add 198.51.100.2/24 dev eth0
		addr add 198.51.100.3/24 dev eth0
		addr add 2001:db8:1::2/64 dev eth0 nodad
		addr add 2001:db8:1::3/64 dev eth0 nodad
		addr add 203.0.113.2/24 dev eth1
		addr add 2001:db8:2::2/64 dev eth1 nodad
		link set eth0 up
		link set eth1 up
		route add blackhole 192.0.2.128/26
		route add blackhole 2001:db8:b::/64
		route add unreachable 192.0.2.64/26
		route add unreachable 2001:db8:c::/64`)
	tp.client.sysctl(t, "net/ipv4/ip_forward", "1")
	tp.client.sysctl(t, "net/ipv6/conf/all/forwarding", "1")
	tp.settle(t)
	// The kernel rations ICMP errors; the tests ask for many in no time.
	tp.client.sysctl(t, "net/ipv4/icmp_ratelimit", "0")
	tp.client.sysctl(t, "net/ipv6/icmp/ratelimit", "0")
	return tp
}

// settle makes the carrier of new links known to IPv6. The kernel leaves that to a
// work queue that may rest for a second, but does it at once for a link that is
// looked at (linkwatch_sync_dev in rtnl_getlink, Linux 6.13).
func (tp *topo) settle(t *testing.T) {
	t.Helper()
	for _, n := range []*node{tp.host, tp.client} {
		n.ip(t, "link show dev eth0\nlink show dev eth1")
	}
}

// hostNetwork is the host's part of the picture, also for tests in which the
// network comes late.
const hostNetwork = `
	addr add 198.51.100.1/24 dev eth0
	addr add 198.51.100.11/24 dev eth0
	addr add 2001:db8:1::1/64 dev eth0 nodad
	addr add 2001:db8:1::11/64 dev eth0 nodad
	addr add 203.0.113.1/24 dev eth1
	addr add 2001:db8:2::1/64 dev eth1 nodad
	link set eth0 up
	link set eth1 up
	route add default via 198.51.100.2
	route add default via 2001:db8:1::2
	route add unreachable 192.0.2.192/26
	route add unreachable 2001:db8:d::/64`

// addFar puts one more host behind the client.
func (tp *topo) addFar(t *testing.T) *node {
	t.Helper()
	far := newNode(t, "far")
	tp.client.ip(t, `
		link add far type veth peer name eth0 netns `+far.id+`
		addr add 192.0.2.1/27 dev far
		addr add 2001:db8:9::1/64 dev far nodad
		link set far up`)
	far.ip(t, `
		addr add 192.0.2.9/27 dev eth0
		addr add 2001:db8:9::9/64 dev eth0 nodad
		link set eth0 up
		route add default via 192.0.2.1
		route add default via 2001:db8:9::1`)
	return far
}

// node is one host of the picture: a network namespace with a name.
type node struct {
	name string
	id   string // its file in netnsDir
	path string
	ns   *netnsutil.NS
}

var nodes atomic.Int64

// newNode makes a namespace with nothing but a loopback interface.
func newNode(t *testing.T, name string) *node {
	t.Helper()
	n := &node{name: name, id: fmt.Sprintf("%s%d", name, nodes.Add(1))}
	n.path = filepath.Join(netnsDir, n.id)
	ns, err := netnsutil.New()
	require.NoError(t, err)
	n.ns = ns
	t.Cleanup(func() { ns.Close() })
	// A name, as ip-netns(8) gives it.
	require.NoError(t, os.WriteFile(n.path, nil, 0o600))
	require.NoError(t, unix.Mount(fmt.Sprintf("/proc/self/fd/%d", ns.Fd()), n.path, "", unix.MS_BIND, ""))
	t.Cleanup(n.unname)
	// No waiting for duplicate address detection, also of link-local addresses.
	n.sysctl(t, "net/ipv6/conf/default/accept_dad", "0")
	n.sysctl(t, "net/ipv4/ping_group_range", "0 0")
	n.ip(t, "link set lo up")
	return n
}

// unname takes the namespace's name away, as ip netns delete does.
func (n *node) unname() {
	_ = unix.Unmount(n.path, unix.MNT_DETACH)
	_ = os.Remove(n.path)
}

// ip runs a script of ip(8) commands, one a line.
func (n *node) ip(t *testing.T, script string) {
	t.Helper()
	cmd := exec.Command("ip", "-batch", "-")
	cmd.Stdin = strings.NewReader(script)
	var out []byte
	err := n.ns.Do(func() (err error) {
		out, err = cmd.CombinedOutput()
		return err
	})
	require.NoError(t, err, "ip -batch in %s: %s\n%s", n.name, script, out)
}

// sysctl writes /proc/sys/KEY; the files under /proc/sys/net are those of the
// namespace of the thread that opens them.
func (n *node) sysctl(t *testing.T, key, value string) {
	t.Helper()
	err := n.ns.Do(func() error { return os.WriteFile("/proc/sys/"+key, []byte(value), 0) })
	require.NoError(t, err, "in %s", n.name)
}

// readProc reads a file of /proc/net as the namespace has it.
func (n *node) readProc(name string) string {
	var b []byte
	_ = n.ns.Do(func() (err error) {
		b, err = os.ReadFile("/proc/thread-self/net/" + name)
		return err
	})
	return string(b)
}

// eventually polls for what no descriptor can announce.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	require.Eventually(t, ok, patience, 5*time.Millisecond, what)
}

// patience is how long anything may take that is bound to happen.
const patience = 15 * time.Second

// waitPort blocks until there is a listener on the port; network is tcp or udp.
func (n *node) waitPort(t *testing.T, network string, port uint16) {
	t.Helper()
	eventually(t, fmt.Sprintf("no listener on %s port %d in %s", network, port, n.name), func() bool {
		return n.listening(network, port)
	})
}

// listening reports whether a socket is bound to the port.
func (n *node) listening(network string, port uint16) bool {
	// proc_net_tcp: "sl local_address rem_address st"; st 0A is LISTEN, and
	// 07 an unconnected UDP socket.
	state := map[string]string{"tcp": "0A", "udp": "07"}[network]
	for line := range strings.Lines(n.readProc(network) + n.readProc(network+"6")) {
		field := strings.Fields(line)
		if len(field) > 3 && field[3] == state && strings.HasSuffix(field[1], fmt.Sprintf(":%04X", port)) {
			return true
		}
	}
	return false
}

// listenTCP listens in the namespace; port 0 lets the kernel choose.
func (n *node) listenTCP(t *testing.T, a netip.Addr, port uint16) *net.TCPListener {
	t.Helper()
	var lc net.ListenConfig
	lc.SetMultipathTCP(false)
	var l net.Listener
	n.bind(t, func() (err error) {
		l, err = lc.Listen(context.Background(), "tcp"+network(a), netip.AddrPortFrom(a, port).String())
		return err
	})
	t.Cleanup(func() { l.Close() })
	return l.(*net.TCPListener)
}

// network is the suffix that keeps package net from making dual-stack sockets.
func network(a netip.Addr) string {
	if a.Is4() {
		return "4"
	}
	return "6"
}

// bind runs listen in the namespace, and once more while the port is in use: a
// program that another test has forked just now holds all our sockets until it
// calls execve(2), also those that we have closed since.
func (n *node) bind(t *testing.T, listen func() error) {
	t.Helper()
	var err error
	for range 200 {
		if err = n.ns.Do(listen); !errors.Is(err, unix.EADDRINUSE) {
			break
		}
		time.Sleep(5 * time.Millisecond)
	}
	require.NoError(t, err, "in %s", n.name)
}

// listenUDP binds a UDP socket in the namespace.
func (n *node) listenUDP(t *testing.T, a netip.Addr, port uint16) *net.UDPConn {
	t.Helper()
	var c *net.UDPConn
	n.bind(t, func() (err error) {
		c, err = net.ListenUDP("udp"+network(a), net.UDPAddrFromAddrPort(netip.AddrPortFrom(a, port)))
		return err
	})
	t.Cleanup(func() { c.Close() })
	return c
}

// tryTCP connects from the namespace, from address src if that is valid.
func (n *node) tryTCP(src netip.Addr, dst netip.AddrPort, timeout time.Duration) (*net.TCPConn, error) {
	d := net.Dialer{Timeout: timeout, KeepAlive: -1}
	if src.IsValid() {
		d.LocalAddr = net.TCPAddrFromAddrPort(netip.AddrPortFrom(src, 0))
	}
	d.SetMultipathTCP(false)
	var c net.Conn
	err := n.ns.Do(func() (err error) {
		c, err = d.Dial("tcp", dst.String())
		return err
	})
	if err != nil {
		return nil, err
	}
	return c.(*net.TCPConn), nil
}

// dialTCP is tryTCP for connections that are bound to work. They are closed at
// the end of the test, and all their reads and writes end with patience.
func (n *node) dialTCP(t *testing.T, src netip.Addr, dst netip.AddrPort) *net.TCPConn {
	t.Helper()
	c, err := n.tryTCP(src, dst, patience)
	require.NoError(t, err, "from %s", n.name)
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(2 * patience))
	return c
}

// dialUDP makes a connected UDP socket: the kernel drops whatever comes from
// another address than dst.
func (n *node) dialUDP(t *testing.T, src netip.Addr, dst netip.AddrPort) *net.UDPConn {
	t.Helper()
	var laddr *net.UDPAddr
	if src.IsValid() {
		laddr = net.UDPAddrFromAddrPort(netip.AddrPortFrom(src, 0))
	}
	var c *net.UDPConn
	err := n.ns.Do(func() (err error) {
		c, err = net.DialUDP("udp", laddr, net.UDPAddrFromAddrPort(dst))
		return err
	})
	require.NoError(t, err, "from %s", n.name)
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(patience))
	return c
}

// addrPort returns the address of a socket as netip has it, never 4in6.
func addrPort(a net.Addr) netip.AddrPort {
	var ap netip.AddrPort
	switch a := a.(type) {
	case *net.TCPAddr:
		ap = a.AddrPort()
	case *net.UDPAddr:
		ap = a.AddrPort()
	}
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
}
