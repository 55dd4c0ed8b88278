package forward

import (
	"bytes"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/gofwd/gofwd/netnsutil"
)

// The host has a network with one other host in it.
const (
	host4, host6     = "192.0.2.10", "2001:db8::10"
	remote4, remote6 = "192.0.2.77", "2001:db8::77"
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
		ln, err = net.Listen("tcp", addr)
		require.NoError(t, err)
		pc, err = net.ListenPacket("udp", ln.Addr().String())
		require.NoError(t, err)
	})
	var wg sync.WaitGroup
	t.Cleanup(func() {
		ln.Close()
		pc.Close()
		wg.Wait()
	})
	wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			fmt.Fprint(c, c.RemoteAddr())
			c.Close()
		}
	})
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
func TestForwarderSource(t *testing.T) {
	remote := newLAN(t)
	ns := newNS(t)
	port := tellPeer(t, ns, ":0")
	publish := func(s string) []Rule {
		rules, err := ParsePublish(s)
		require.NoError(t, err)
		return rules
	}
	spec := fmt.Sprintf("8080:%d", port)
	f, _ := start(t, Config{NetNS: ns, Rules: append(publish(spec+"/tcp"), publish(spec+"/udp")...)})
	require.Equal(t, Tap, f.Status().Rules[0].Path)

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

func TestForwarderSourceLoopbackToLoopback(t *testing.T) {
	ns := newNS(t)
	port := tellPeer(t, ns, "127.0.0.1:0")
	f, _ := start(t, Config{NetNS: ns, HostLoopbackToNSLoopback: true, Rules: []Rule{
		{Proto: TCP, Ports: PortRange{8080, 8080}, TargetPorts: PortRange{port, port}},
		{Proto: UDP, Ports: PortRange{8080, 8080}, TargetPorts: PortRange{port, port}},
	}})
	_ = f
	for _, proto := range []string{"tcp", "udp"} {
		for _, dst := range []string{"127.0.0.1:8080"} {
			got, _, err := ask(t, nil, proto, dst)
			require.NoError(t, err, "%s %s", proto, dst)
			require.True(t, netip.MustParseAddrPort(got).Addr().IsLoopback(), "%s %s: %s", proto, dst, got)
		}
	}
	// The server has IPv4 only.
	got, _, err := ask(t, nil, "tcp", "[::1]:8080")
	require.NoError(t, err)
	require.True(t, strings.HasPrefix(got, "127.0.0.1:"), got)
}

// testLog shows a logger's output with the test's.
func testLog(t *testing.T) *slog.Logger {
	return slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug}))
}

var _ = bytes.Equal
