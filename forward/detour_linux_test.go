package forward

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/gofwd/gofwd/netnsutil"
	"github.com/gofwd/gofwd/stack/stacktest"
)

// serveGuest starts a server in a guest that tells each client its address.
func serveGuest(t *testing.T, g *stacktest.Guest, port uint16) {
	t.Helper()
	ln, err := g.ListenTCP(port)
	require.NoError(t, err)
	pc, err := g.ListenUDP(port)
	require.NoError(t, err)
	var wg sync.WaitGroup
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
	t.Cleanup(func() { ln.Close(); pc.Close(); wg.Wait() })
}

func publishBoth(host, target uint16) []Rule {
	rules := publishTCP(host, target)
	udp := rules[0]
	udp.Proto = UDP
	return append(rules, udp)
}

// A guest with a network stack of its own at the container's address is reached,
// and reaches out, though everything is set up for the kernel path.
func TestGuestOnTheTap(t *testing.T) {
	remote := newLAN(t)
	ns := newNS(t)
	f, _ := start(t, Config{NetNS: ns, Rules: publishBoth(8080, 80)})
	require.Equal(t, Kernel, f.Status().Rules[0].Path)
	_, _, err := ask(t, remote, "tcp", net.JoinHostPort(host4, "8080"))
	require.ErrorIs(t, err, unix.ECONNRESET, "nobody is there")
	require.Equal(t, Kernel, f.Status().Rules[0].Path)

	guest := stacktest.NewGuest(t, ns, "tap0")
	serveGuest(t, guest, 80)
	for i, network := range []string{"tcp", "tcp", "udp"} {
		for _, host := range []string{host4, host6} {
			got, local, err := ask(t, remote, network, net.JoinHostPort(host, "8080"))
			require.NoError(t, err, "%s %s", network, host)
			require.Equal(t, local.Addr(), netip.MustParseAddrPort(got).Addr())
			if i > 0 { // the first is found to be silent, see dialDetour
				require.Equal(t, local.String(), got)
			}
		}
	}
	r := f.Status().Rules[0]
	require.Equal(t, Tap, r.Path)
	require.Contains(t, r.Reason, "a guest does")
	_, _, err = ask(t, remote, "tcp", net.JoinHostPort(host4, "8080"))
	require.NoError(t, err)

	// Its own connections, also while the kernel's are held.
	port := tellPeer(t, remote, ":0")
	for _, to := range []string{at(remote4, port), at(remote6, port)} {
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		c, err := guest.DialTCP(ctx, netip.MustParseAddrPort(to))
		cancel()
		require.NoError(t, err, to)
		got, err := io.ReadAll(c)
		require.NoError(t, err)
		require.Contains(t, []string{host4, host6}, netip.MustParseAddrPort(string(got)).Addr().String())
		c.Close()
	}
	require.Contains(t, fmt.Sprint(f.Status().Notes), "2 connections were not begun by the namespace's kernel")
}

// A port at which a guest has answered is the kernel's again when that listens.
func TestGuestGivesWayToTheKernel(t *testing.T) {
	remote := newLAN(t)
	ns := newNS(t)
	f, _ := start(t, Config{NetNS: ns, Rules: publishTCP(8080, 80)})
	f.paths.detours.add(80, detourGuest)
	f.paths.detours.mu.Lock()
	f.paths.detours.seen[80] = detour{kind: detourGuest, looked: time.Now().Add(-2 * detourAge)}
	f.paths.detours.mu.Unlock()
	f.rules.rules[0].takeDetour(Tap, "a guest")
	serveAt(t, ns, ":80")
	_, _, err := ask(t, remote, "tcp", net.JoinHostPort(host4, "8080"))
	require.NoError(t, err)
	r := f.Status().Rules[0]
	require.Equal(t, Kernel, r.Path)
	require.Empty(t, r.Reason)
	require.Zero(t, f.paths.detours.count.Load())
}

// serveAt is tellPeer on a port that is given.
func serveAt(t *testing.T, ns *netnsutil.NS, addr string) {
	t.Helper()
	var ln net.Listener
	within(t, ns, func() {
		var err error
		ln, err = net.Listen("tcp", addr)
		require.NoError(t, err)
	})
	var wg sync.WaitGroup
	wg.Go(func() { serveTellPeer(ln) })
	t.Cleanup(func() { ln.Close(); wg.Wait() })
}

// dockerRules are rules as Docker's, for its containers on br0 and their port 80.
const dockerRules = `
table inet docker {
	chain in {
		meta nfproto ipv4 dnat ip to 172.17.0.2
		meta nfproto ipv6 dnat ip6 to fd00:17::2
	}
	chain pre { type nat hook prerouting priority dstnat; fib daddr type local tcp dport 80 jump in; }
	chain out { type nat hook output priority -100; fib daddr type local tcp dport 80 jump in; }
	chain post { type nat hook postrouting priority srcnat; iifname br0 oifname tap0 masquerade; }
}`

// A container within the container, behind a router with NAT, as Docker makes it:
// its connections get out and it is reached, though no socket of the namespace's
// kernel is at either end.
func TestGuestBehindARouter(t *testing.T) {
	remote := newLAN(t)
	ns, nested := newNS(t), newNS(t)
	f, _ := start(t, Config{NetNS: ns, Rules: publishTCP(8080, 80)})
	within(t, ns, func() {
		ip(t, fmt.Sprintf("link add br0 type veth peer name eth0 netns /proc/%d/fd/%d", os.Getpid(), nested.Fd()))
		ip(t, "link set br0 up")
		ip(t, "addr add 172.17.0.1/16 dev br0")
		ip(t, "addr add fd00:17::1/64 dev br0 nodad")
		require.NoError(t, os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0))
		require.NoError(t, os.WriteFile("/proc/sys/net/ipv6/conf/all/forwarding", []byte("1"), 0))
		cmd := exec.Command("nft", "-f", "-")
		cmd.Stdin = strings.NewReader(dockerRules)
		out, err := cmd.CombinedOutput()
		require.NoError(t, err, "%s", out)
	})
	within(t, nested, func() {
		ip(t, "link set eth0 up")
		ip(t, "addr add 172.17.0.2/16 dev eth0")
		ip(t, "addr add fd00:17::2/64 dev eth0 nodad")
		ip(t, "route add default via 172.17.0.1")
		ip(t, "-6 route add default via fd00:17::1")
	})
	serveAt(t, nested, ":80")
	port := tellPeer(t, remote, ":0")
	for _, host := range [][2]string{{host4, remote4}, {host6, remote6}} {
		got, local, err := ask(t, remote, "tcp", net.JoinHostPort(host[0], "8080"))
		require.NoError(t, err, host)
		require.Equal(t, local.Addr(), netip.MustParseAddrPort(got).Addr())
		got, _, err = ask(t, nested, "tcp", at(host[1], port))
		require.NoError(t, err, host)
		require.Equal(t, host[0], netip.MustParseAddrPort(got).Addr().String())
	}
	require.Equal(t, Tap, f.Status().Rules[0].Path)
}

// A closed port costs the client no time, though the tap is asked, too.
func TestGuestIsNotThere(t *testing.T) {
	remote := newLAN(t)
	f, _ := start(t, Config{Rules: publishTCP(8080, 80)})
	for _, host := range []string{host4, host6} {
		begin := time.Now()
		_, _, err := ask(t, remote, "tcp", net.JoinHostPort(host, "8080"))
		require.ErrorIs(t, err, unix.ECONNRESET)
		require.Less(t, time.Since(begin), guestTimeout/2)
	}
	require.Empty(t, f.Status().Rules[0].Reason)
	require.Zero(t, f.paths.detours.count.Load())
}

// Kernel: a socket that is accepted from a listener with a mark of its own does
// not inherit that of the SYN (inet_request_mark in include/net/inet_sock.h).
// Without the rules that hold SYNs such a server takes the tap.
func TestServerWithMarkTakesTheTap(t *testing.T) {
	remote := newLAN(t)
	ns := newNS(t)
	port := serveIn(t, ns, withOption(unix.SOL_SOCKET, unix.SO_MARK, 0x17))
	f, _ := start(t, Config{NetNS: ns, noHold: true, Rules: append(publishTCP(8080, port),
		Rule{Proto: TCP, Ports: PortRange{8081, 8081}, TargetPorts: PortRange{port, port}, Limits: Limits{Idle: Duration(time.Minute)}})})
	for _, host := range []string{"8081", "8080"} { // of a goroutine first, which finds it by itself
		for _, h := range []string{host4, host6} {
			begin := time.Now()
			got, local, err := ask(t, remote, "tcp", net.JoinHostPort(h, host))
			require.NoError(t, err)
			require.Equal(t, local.Addr(), netip.MustParseAddrPort(got).Addr())
			require.Less(t, time.Since(begin), 2*time.Second)
		}
	}
	for _, r := range f.Status().Rules[1:] {
		require.Equal(t, Tap, r.Path)
		require.Contains(t, r.Reason, "SO_MARK 0x17")
	}
}

// The same found by the loop's thread.
func TestServerWithMarkIsSlow(t *testing.T) {
	remote := newLAN(t)
	ns := newNS(t)
	port := serveIn(t, ns, withOption(unix.SOL_SOCKET, unix.SO_MARK, 0x17))
	f, _ := start(t, Config{NetNS: ns, noHold: true, Rules: publishTCP(8080, port)})
	for _, h := range []string{host4, host6} {
		got, local, err := ask(t, remote, "tcp", net.JoinHostPort(h, "8080"))
		require.NoError(t, err)
		require.Equal(t, local.Addr(), netip.MustParseAddrPort(got).Addr())
	}
	r := f.Status().Rules[0]
	require.Equal(t, Tap, r.Path)
	require.Contains(t, r.Reason, "SO_MARK 0x17")
}

// Without a tap there is nothing to be done for such servers, and that is shown.
func TestDetoursNeedATap(t *testing.T) {
	remote := newLAN(t)
	ns := newNS(t)
	joinBridge(t, ns, "10.89.0.2", "fd00:89::2")
	marked := serveIn(t, ns, withOption(unix.SOL_SOCKET, unix.SO_MARK, 0x17))
	f, _ := start(t, Config{NetNS: ns, InboundOnly: true, Rules: append(publishTCP(8080, marked), publishTCP(8081, 80)...)})
	within(t, remote, func() {
		c, err := net.Dial("tcp", net.JoinHostPort(host4, "8080"))
		require.NoError(t, err)
		defer c.Close()
		require.Eventually(t, func() bool { return f.Status().Rules[0].Reason != "" }, 5*time.Second, 10*time.Millisecond)
	})
	require.Contains(t, f.Status().Rules[0].Reason, "there is no tap")
	_, _, err := ask(t, remote, "tcp", net.JoinHostPort(host4, "8081"))
	require.ErrorIs(t, err, unix.ECONNRESET)
	require.Contains(t, f.Status().Rules[1].Reason, "nobody listened on port 80")

	serveAt(t, ns, ":80")
	_, _, err = ask(t, remote, "tcp", net.JoinHostPort(host4, "8081"))
	require.NoError(t, err)
	require.Empty(t, f.Status().Rules[1].Reason)
}
