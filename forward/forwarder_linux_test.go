package forward

import (
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/gofwd/gofwd/netnsutil"
)

// The host has a network with one other host in it.
const (
	host4, host6     = "203.0.113.10", "2001:db8:1::10"
	remote4, remote6 = "203.0.113.77", "2001:db8:1::77"
)

// newLAN gives the host an interface, and returns the other host on its link.
func newLAN(t *testing.T) *netnsutil.NS {
	t.Helper()
	remote := newNS(t)
	ip(t, fmt.Sprintf("link add lan0 type veth peer name lan0 netns /proc/%d/fd/%d", os.Getpid(), remote.Fd()))
	t.Cleanup(func() { ip(t, "link del lan0") })
	up := func(addr4, addr6 string) {
		ip(t, "link set lan0 up")
		ip(t, "addr add "+addr4+"/24 dev lan0")
		ip(t, "addr add "+addr6+"/64 dev lan0 nodad")
	}
	up(host4, host6)
	ip(t, "route add default via "+remote4)
	ip(t, "-6 route add default via "+remote6)
	require.NoError(t, remote.Do(func() error { up(remote4, remote6); return nil }))
	return remote
}

// start starts a Forwarder for a namespace of its own.
func start(t *testing.T, cfg Config) (*Forwarder, *netnsutil.NS) {
	t.Helper()
	if cfg.NetNS == nil {
		cfg.NetNS = newNS(t)
	}
	f, err := Start(t.Context(), cfg)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, f.Close()) })
	return f, cfg.NetNS
}

// onBothPaths runs a test with each of the two paths.
func onBothPaths(t *testing.T, test func(*testing.T, Datapath)) {
	for _, path := range []Datapath{Tap, Kernel} {
		t.Run(string(path), func(t *testing.T) { test(t, path) })
	}
}

// within runs fn in a namespace; nil is the tests' own.
func within(t *testing.T, ns *netnsutil.NS, fn func()) {
	t.Helper()
	if ns == nil {
		fn()
		return
	}
	require.NoError(t, ns.Do(func() error { fn(); return nil }))
}

// tellPeer starts a server in ns that tells each client its address. It takes
// TCP and UDP on one port.
func tellPeer(t *testing.T, ns *netnsutil.NS, addr string) (port uint16) {
	t.Helper()
	var ln net.Listener
	var pc net.PacketConn
	within(t, ns, func() {
		var err error
		// Without a family both wildcards are dual-stack to Go.
		family := map[string]string{"0.0.0.0:0": "4", "[::]:0": "6"}[addr]
		ln, err = net.Listen("tcp"+family, addr)
		require.NoError(t, err)
		pc, err = net.ListenPacket("udp"+family, ln.Addr().String())
		require.NoError(t, err)
	})
	var wg sync.WaitGroup
	t.Cleanup(func() {
		ln.Close()
		pc.Close()
		wg.Wait()
	})
	wg.Go(func() { serveTellPeer(ln) })
	wg.Go(func() {
		buf := make([]byte, 100)
		for {
			_, from, err := pc.ReadFrom(buf)
			if err != nil {
				return
			}
			pc.WriteTo([]byte(from.String()), from)
		}
	})
	return ln.Addr().(*net.TCPAddr).AddrPort().Port()
}

func serveTellPeer(ln net.Listener) {
	for {
		c, err := ln.Accept()
		if err != nil {
			return
		}
		fmt.Fprint(c, c.RemoteAddr())
		c.Close()
	}
}

// ask connects to a tellPeer server and returns what it said, and from where.
func ask(t *testing.T, ns *netnsutil.NS, network, dst string) (answer string, local netip.AddrPort, err error) {
	t.Helper()
	var c net.Conn
	within(t, ns, func() { c, err = net.DialTimeout(network, dst, 5*time.Second) })
	if err != nil {
		return "", local, err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(5 * time.Second))
	local = netip.MustParseAddrPort(c.LocalAddr().String())
	if strings.HasPrefix(network, "udp") {
		buf := make([]byte, 100)
		c.Write([]byte("who am I?"))
		n, err := c.Read(buf)
		return string(buf[:n]), local, err
	}
	b, err := io.ReadAll(c)
	return string(b), local, err
}

// The table of hostMap.source, as a server in the container sees it.
func TestForwarderSource(t *testing.T) { onBothPaths(t, testForwarderSource) }

func testForwarderSource(t *testing.T, path Datapath) {
	remote := newLAN(t)
	ns := newNS(t)
	port := tellPeer(t, ns, ":0")
	f, _ := start(t, Config{Datapath: path, NetNS: ns, Rules: forEach(Rule{Ports: PortRange{8080, 8080}, TargetPorts: PortRange{port, port}})})
	require.Equal(t, path, f.Status().Rules[0].Path)
	require.Equal(t, Tap, f.Status().Rules[1].Path, "UDP")

	for _, proto := range []string{"tcp", "udp"} {
		for _, tt := range []struct {
			name      string
			from      *netnsutil.NS
			dst, want string // want without port, "" is the client's own
		}{
			{"remote v4", remote, host4, ""},
			{"remote v6", remote, host6, ""},
			{"host's own address v4", nil, host4, ""},
			{"host's own address v6", nil, host6, ""},
			{"loopback v4", nil, "127.0.0.1", "169.254.1.2"},
			{"loopback v6", nil, "::1", "fd67:6f66:7764::1"},
		} {
			t.Run(proto+"/"+tt.name, func(t *testing.T) {
				got, local, err := ask(t, tt.from, proto, net.JoinHostPort(tt.dst, "8080"))
				require.NoError(t, err)
				want := local
				if tt.want != "" {
					want = netip.AddrPortFrom(netip.MustParseAddr(tt.want), local.Port())
				}
				require.Equal(t, want.String(), got)
			})
		}
	}
	require.Eventually(t, func() bool {
		tcp := f.Status().Rules[0]
		return tcp.Total == 6 && tcp.Active == 0 && tcp.BytesOut > 0
	}, 5*time.Second, 10*time.Millisecond)
}

// With --host-lo-to-ns-lo a client on the host's loopback is one on the
// namespace's. The server here has IPv4 only; an IPv6 client finds it all the same.
func TestForwarderLoopbackToLoopback(t *testing.T) { onBothPaths(t, testForwarderLoopbackToLoopback) }

func testForwarderLoopbackToLoopback(t *testing.T, path Datapath) {
	ns := newNS(t)
	port := tellPeer(t, ns, "127.0.0.1:0")
	_, _ = start(t, Config{Datapath: path, NetNS: ns, HostLoopbackToNSLoopback: true, Rules: forEach(Rule{
		Ports: PortRange{8080, 8080}, TargetPorts: PortRange{port, port},
	})})
	for _, tt := range []struct{ proto, dst string }{
		{"tcp", "127.0.0.1:8080"}, {"udp", "127.0.0.1:8080"}, {"tcp", "[::1]:8080"},
	} {
		got, _, err := ask(t, nil, tt.proto, tt.dst)
		require.NoError(t, err, tt)
		require.True(t, strings.HasPrefix(got, "127.0.0.1:"), "%v: %s", tt, got)
	}
}

// Where there is no server the log says so: no other way leads to the namespace's
// loopback, and its other family's address not being there is not the reason.
func TestForwarderLoopbackRefused(t *testing.T) { onBothPaths(t, testForwarderLoopbackRefused) }

func testForwarderLoopbackRefused(t *testing.T, path Datapath) {
	ns := newNS(t)
	var log syncBuffer
	rules := publishTCP(8080, 80)
	rules = append(rules, rules[0])
	rules[1].Ports, rules[1].ProxyV2 = PortRange{8081, 8081}, true // not relayed by a splice loop
	_, _ = start(t, Config{
		Datapath: path, NetNS: ns, HostLoopbackToNSLoopback: true, Rules: rules,
		Logger: slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug})),
	})
	within(t, ns, func() {
		ip(t, "addr del ::1/128 dev lo")
		ip(t, "-6 route add prohibit ::1")
	})
	for i, dst := range []string{"127.0.0.1:8080", "127.0.0.1:8081"} {
		if c, err := net.Dial("tcp", dst); err == nil { // else it was reset already
			_, err = c.Read(make([]byte, 1))
			require.Error(t, err)
			c.Close()
		}
		const refused = `msg="connection refused"`
		require.Eventually(t, func() bool { return strings.Count(log.String(), refused) > i }, 5*time.Second, 10*time.Millisecond)
	}
	for line := range strings.Lines(log.String()) {
		if strings.Contains(line, "refused") {
			require.Contains(t, line, "connect: connection refused\"")
		}
	}
}

// A server of the other family is reached, and sees the alias of its own.
func TestForwarderOtherFamily(t *testing.T) { onBothPaths(t, testForwarderOtherFamily) }

func testForwarderOtherFamily(t *testing.T, path Datapath) {
	remote := newLAN(t)
	ns := newNS(t)
	for _, tt := range []struct{ listen, dst, want, problem string }{
		{"0.0.0.0:0", host6, "169.254.1.2", "IPv6 clients are seen as 169.254.1.2: the server has no IPv6"},
		{"[::]:0", host4, "fd67:6f66:7764::1", "IPv4 clients are seen as fd67:6f66:7764::1: the server has no IPv4"},
	} {
		port := tellPeer(t, ns, tt.listen)
		f, _ := start(t, Config{Datapath: path, NetNS: ns, Rules: []Rule{{
			Proto: TCP, Ports: PortRange{8080, 8080}, TargetPorts: PortRange{port, port},
		}}})
		got, local, err := ask(t, remote, "tcp", net.JoinHostPort(tt.dst, "8080"))
		require.NoError(t, err)
		require.Equal(t, netip.AddrPortFrom(netip.MustParseAddr(tt.want), local.Port()).String(), got)
		require.Equal(t, []string{tt.problem}, f.Status().Rules[0].Problems)
		require.NoError(t, f.Close())
	}
}

// A closed port in the container resets the client at once: refusing is not
// possible any more.
func TestForwarderClosedPort(t *testing.T) { onBothPaths(t, testForwarderClosedPort) }

func testForwarderClosedPort(t *testing.T, path Datapath) {
	start(t, Config{Datapath: path, Rules: []Rule{{Proto: TCP, Ports: PortRange{8080, 8080}, TargetPorts: PortRange{9, 9}}}})
	begin := time.Now()
	_, _, err := ask(t, nil, "tcp", "127.0.0.1:8080")
	require.ErrorIs(t, err, syscall.ECONNRESET)
	require.Less(t, time.Since(begin), time.Second)
}

// What the container's connect(2) says is what the host's would have said.
func TestForwarderOutbound(t *testing.T) { onBothPaths(t, testForwarderOutbound) }

func testForwarderOutbound(t *testing.T, path Datapath) {
	remote := newLAN(t)
	ip(t, "route add blackhole 198.51.100.1")
	ip(t, "route add prohibit 198.51.100.2")
	ip(t, "route add unreachable 198.51.100.3")
	t.Cleanup(func() {
		ip(t, "route del blackhole 198.51.100.1")
		ip(t, "route del prohibit 198.51.100.2")
		ip(t, "route del unreachable 198.51.100.3")
	})
	port := tellPeer(t, remote, ":0")
	hostPort := tellPeer(t, nil, ":0")
	onLoopback := tellPeer(t, nil, "127.0.0.1:0")
	f, ns := start(t, Config{Datapath: path, Network: Network{MapHostLoopback: addrs("169.254.1.9")}})

	for _, tt := range []struct {
		name, proto, dst string
		want             string // what the server sees
		err              error
	}{
		{"tcp v4", "tcp", at(remote4, port), host4, nil},
		{"tcp v6", "tcp", at(remote6, port), host6, nil},
		{"udp v4", "udp", at(remote4, port), host4, nil},
		{"udp v6", "udp", at(remote6, port), host6, nil},
		{"tcp, host's own address", "tcp", at(host4, hostPort), host4, nil},
		{"tcp, alias v4", "tcp", at("169.254.1.2", hostPort), host4, nil},
		{"tcp, alias v6", "tcp", at("fd67:6f66:7764::1", hostPort), host6, nil},
		{"udp, alias v4", "udp", at("169.254.1.2", hostPort), host4, nil},
		{"tcp, mapped loopback", "tcp", at("169.254.1.9", onLoopback), "127.0.0.1", nil},
		{"udp, mapped loopback", "udp", at("169.254.1.9", onLoopback), "127.0.0.1", nil},
		{"tcp, alias is not the loopback", "tcp", at("169.254.1.2", onLoopback), "", syscall.ECONNREFUSED},
		{"tcp, gateway is not the loopback", "tcp", at("10.0.2.2", onLoopback), "", syscall.ECONNREFUSED},
		{"tcp, own loopback is the container's", "tcp", at("127.0.0.1", onLoopback), "", syscall.ECONNREFUSED},
		{"tcp, refused v4", "tcp", at(remote4, 9), "", syscall.ECONNREFUSED},
		{"tcp, refused v6", "tcp", at(remote6, 9), "", syscall.ECONNREFUSED},
		{"udp, refused v4", "udp", at(remote4, 9), "", syscall.ECONNREFUSED},
		{"udp, refused v6", "udp", at(remote6, 9), "", syscall.ECONNREFUSED},
		{"tcp, unreachable", "tcp", "198.51.100.3:80", "", syscall.EHOSTUNREACH},
		{"tcp, prohibited", "tcp", "198.51.100.2:80", "", syscall.EHOSTUNREACH}, // ICMP 13, see icmp_err_convert
		{"tcp, nobody of our net", "tcp", "10.0.2.77:80", "", syscall.EHOSTUNREACH},
	} {
		t.Run(tt.name, func(t *testing.T) {
			begin := time.Now()
			got, _, err := ask(t, ns, tt.proto, tt.dst)
			require.ErrorIs(t, err, tt.err)
			require.Less(t, time.Since(begin), 2*time.Second)
			if tt.err == nil {
				require.Equal(t, tt.want, netip.MustParseAddrPort(got).Addr().String())
			}
		})
	}
	require.NotZero(t, f.Status().Outbound.BytesIn)
}

// DNS goes to the host's nameserver, wherever that is, and follows resolv.conf.
// A nameserver that is out of order is passed over.
func TestForwarderDNS(t *testing.T) { onBothPaths(t, testForwarderDNS) }

func testForwarderDNS(t *testing.T, path Datapath) {
	newLAN(t)
	ip(t, "route add blackhole 198.51.100.1")
	t.Cleanup(func() { ip(t, "route del blackhole 198.51.100.1") })
	file := filepath.Join(t.TempDir(), "resolv.conf")
	set := func(text string) { require.NoError(t, os.WriteFile(file, []byte(text), 0o644)) }
	set("nameserver 127.0.0.53\n")
	require.NoError(t, unix.Mount(file, resolvConf, "", unix.MS_BIND, ""))
	t.Cleanup(func() { require.NoError(t, unix.Unmount(resolvConf, unix.MNT_DETACH)) })
	tellPeer(t, nil, "127.0.0.53:53")
	_, ns := start(t, Config{Datapath: path})

	for _, dst := range []string{"10.0.2.3:53", "[fd67:6f66:7764::3]:53"} {
		for _, proto := range []string{"tcp", "udp"} {
			got, _, err := ask(t, ns, proto, dst)
			require.NoError(t, err, "%s %s", proto, dst)
			require.Equal(t, "127.0.0.1", netip.MustParseAddrPort(got).Addr().String())
		}
	}
	_, _, err := ask(t, ns, "tcp", "10.0.2.3:80")
	require.ErrorIs(t, err, syscall.ECONNREFUSED)

	// Bind mounts don't follow a rename, so this is a rewrite in place.
	tellPeer(t, nil, host4+":53")
	set("nameserver " + remote4 + "\nnameserver " + host4 + "\n")
	time.Sleep(resolvConfAge)
	// remote4 refuses. Over UDP that's known only afterwards.
	_, _, err = ask(t, ns, "udp", "10.0.2.3:53")
	require.ErrorIs(t, err, syscall.ECONNREFUSED)
	for _, proto := range []string{"udp", "tcp"} {
		got, _, err := ask(t, ns, proto, "10.0.2.3:53")
		require.NoError(t, err, proto)
		require.Equal(t, host4, netip.MustParseAddrPort(got).Addr().String())
	}

	set("nameserver " + remote6 + "\nnameserver " + host4 + "\n")
	time.Sleep(resolvConfAge)
	got, _, err := ask(t, ns, "tcp", "10.0.2.3:53") // over TCP it's known at once
	require.NoError(t, err)
	require.Equal(t, host4, netip.MustParseAddrPort(got).Addr().String())

	// One that says nothing: the resolver asks again, by the same socket.
	set("nameserver 198.51.100.1\nnameserver " + host4 + "\n")
	time.Sleep(resolvConfAge)
	var c net.Conn
	within(t, ns, func() { c, err = net.Dial("udp", "10.0.2.3:53") })
	require.NoError(t, err)
	defer c.Close()
	c.Write([]byte("query"))
	time.Sleep(queryPatience + time.Second)
	c.Write([]byte("query"))
	c.SetReadDeadline(time.Now().Add(time.Second))
	_, err = c.Read(make([]byte, 100))
	require.NoError(t, err)
}

// -T and -U: the container's loopback leads to the host's.
func TestForwarderOut(t *testing.T) { onBothPaths(t, testForwarderOut) }

func testForwarderOut(t *testing.T, path Datapath) {
	port := tellPeer(t, nil, "127.0.0.1:0")
	f, ns := start(t, Config{Datapath: path, Rules: forEach(Rule{
		Dir: Out, Ports: PortRange{7070, 7070}, TargetPorts: PortRange{port, port},
	})})
	for _, proto := range []string{"tcp", "udp"} {
		got, _, err := ask(t, ns, proto, "127.0.0.1:7070")
		require.NoError(t, err, proto)
		require.Equal(t, "127.0.0.1", netip.MustParseAddrPort(got).Addr().String())
	}
	got, _, err := ask(t, ns, "tcp", "[::1]:7070") // IPv4 only on the host
	require.NoError(t, err)
	require.Equal(t, "127.0.0.1", netip.MustParseAddrPort(got).Addr().String())
	require.NoError(t, f.Close())

	start(t, Config{Datapath: path, NetNS: ns, Rules: []Rule{{Dir: Out, Proto: TCP, Ports: PortRange{7071, 7071}, TargetPorts: PortRange{9, 9}}}})
	_, _, err = ask(t, ns, "tcp", "127.0.0.1:7071")
	require.ErrorIs(t, err, syscall.ECONNRESET)
}

// After an error nothing is left: no tap, no listener, no goroutine.
func TestForwarderStartsWholeOrNotAtAll(t *testing.T) {
	onBothPaths(t, testForwarderStartsWholeOrNotAtAll)
}

func testForwarderStartsWholeOrNotAtAll(t *testing.T, path Datapath) {
	ns := newNS(t)
	taken, err := net.Listen("tcp", "127.0.0.1:8081")
	require.NoError(t, err)
	defer taken.Close()
	others := goleak.IgnoreCurrent()
	_, err = Start(t.Context(), Config{Datapath: path, NetNS: ns, Rules: []Rule{
		{Proto: TCP, Ports: PortRange{8080, 8080}, TargetPorts: PortRange{80, 80}},
		{Proto: TCP, Ports: PortRange{8081, 8081}, TargetPorts: PortRange{80, 80}},
	}})
	require.ErrorIs(t, err, syscall.EADDRINUSE)
	var onRule *Error
	require.ErrorAs(t, err, &onRule)
	_, err = net.Dial("tcp", "127.0.0.1:8080")
	require.ErrorIs(t, err, syscall.ECONNREFUSED)
	within(t, ns, func() {
		_, err := net.InterfaceByName("tap0")
		require.Error(t, err)
	})
	goleak.VerifyNone(t, others)
	start(t, Config{Datapath: path, NetNS: ns}) // and all is free
}

func TestForwarderClose(t *testing.T) { onBothPaths(t, testForwarderClose) }

func testForwarderClose(t *testing.T, path Datapath) {
	ns := newNS(t)
	port := tellPeer(t, ns, ":0")
	f, _ := start(t, Config{Datapath: path, NetNS: ns, Rules: []Rule{{Proto: TCP, Ports: PortRange{8080, 8080}, TargetPorts: PortRange{port, port}}}})
	require.NoError(t, f.Close())
	require.NoError(t, f.Close())
	require.NoError(t, f.Wait())
	_, err := net.Dial("tcp", "127.0.0.1:8080")
	require.ErrorIs(t, err, syscall.ECONNREFUSED)
	require.Len(t, f.Status().Rules, 1) // the last state stays
}

func TestForwarderNamespaceGone(t *testing.T) { onBothPaths(t, testForwarderNamespaceGone) }

func testForwarderNamespaceGone(t *testing.T, path Datapath) {
	file := filepath.Join(t.TempDir(), "ns")
	require.NoError(t, os.WriteFile(file, nil, 0o600))
	made := newNS(t)
	require.NoError(t, unix.Mount(fmt.Sprintf("/proc/self/fd/%d", made.Fd()), file, "", unix.MS_BIND, ""))
	ns, err := netnsutil.Open(file)
	require.NoError(t, err)
	defer ns.Close()
	f, _ := start(t, Config{Datapath: path, NetNS: ns})
	require.NoError(t, unix.Unmount(file, unix.MNT_DETACH))
	require.NoError(t, os.Remove(file))
	begin := time.Now()
	require.ErrorIs(t, f.Wait(), netnsutil.ErrGone)
	require.Less(t, time.Since(begin), time.Second)
}

// The container has the host's addresses and routes; the host is its alias.
func TestForwarderCopyHost(t *testing.T) { onBothPaths(t, testForwarderCopyHost) }

func testForwarderCopyHost(t *testing.T, path Datapath) {
	remote := newLAN(t)
	port := tellPeer(t, remote, ":0")
	ns := newNS(t)
	inside := tellPeer(t, ns, ":0")
	f, _ := start(t, Config{Datapath: path, NetNS: ns, Network: Network{CopyHost: true}, Rules: []Rule{
		{Proto: TCP, Ports: PortRange{8080, 8080}, TargetPorts: PortRange{inside, inside}},
	}})
	require.Equal(t, []netip.Prefix{netip.MustParsePrefix(host4 + "/24"), netip.MustParsePrefix(host6 + "/64")}, f.Status().Addrs)
	require.Equal(t, addrs(remote4, remote6), f.Status().Gateway)
	for _, dst := range []string{remote4, remote6} {
		_, _, err := ask(t, ns, "tcp", at(dst, port))
		require.NoError(t, err)
	}
	for dst, want := range map[string]string{host4: "169.254.1.2", host6: "fd67:6f66:7764::1"} {
		got, _, err := ask(t, nil, "tcp", at(dst, 8080))
		require.NoError(t, err)
		require.Equal(t, want, netip.MustParseAddrPort(got).Addr().String())
		got, local, err := ask(t, remote, "tcp", at(dst, 8080))
		require.NoError(t, err)
		require.Equal(t, local.String(), got)
	}
}

// at returns host:port.
func at(host string, port uint16) string {
	return netip.AddrPortFrom(netip.MustParseAddr(host), port).String()
}

// forEach returns r for TCP and for UDP.
func forEach(r Rule) []Rule {
	rules := []Rule{r, r}
	rules[0].Proto, rules[1].Proto = TCP, UDP
	return rules
}
