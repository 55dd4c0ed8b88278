package forward

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/gofwd/gofwd/netnsutil"
)

// serveIn starts a tellPeer server in ns whose listener is prepared by control.
func serveIn(t *testing.T, ns *netnsutil.NS, lc net.ListenConfig) (port uint16) {
	t.Helper()
	var ln net.Listener
	within(t, ns, func() {
		var err error
		ln, err = lc.Listen(context.Background(), "tcp", ":0")
		require.NoError(t, err)
	})
	var wg sync.WaitGroup
	wg.Go(func() { serveTellPeer(ln) })
	t.Cleanup(func() { ln.Close(); wg.Wait() })
	return ln.Addr().(*net.TCPAddr).AddrPort().Port()
}

func withOption(level, name, value int) net.ListenConfig {
	return net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) (err error) {
		ctlErr := c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), level, name, value) })
		if ctlErr != nil {
			return ctlErr
		}
		return err
	}}
}

func fromPort(t *testing.T, ns *netnsutil.NS, src, dst string) (string, error) {
	t.Helper()
	var c net.Conn
	var err error
	within(t, ns, func() {
		d := net.Dialer{Timeout: 5 * time.Second, LocalAddr: net.TCPAddrFromAddrPort(netip.MustParseAddrPort(src))}
		lc := withOption(unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
		d.Control = lc.Control
		c, err = d.Dial("tcp", dst)
	})
	if err != nil {
		return "", err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(5 * time.Second))
	b, err := io.ReadAll(c)
	return string(b), err
}

func publishTCP(host, target uint16) []Rule {
	return []Rule{{Proto: TCP, Ports: PortRange{host, host}, TargetPorts: PortRange{target, target}}}
}

// tapBytes returns what the tap of a namespace has carried, both ways.
func tapBytes(t *testing.T, ns *netnsutil.NS) (n int) {
	t.Helper()
	within(t, ns, func() {
		b, err := os.ReadFile("/proc/thread-self/net/dev")
		require.NoError(t, err)
		for line := range strings.Lines(string(b)) {
			if name, rest, ok := strings.Cut(strings.TrimSpace(line), ":"); ok && name == "tap0" {
				f := strings.Fields(rest)
				for _, i := range []int{0, 8} {
					v, err := strconv.Atoi(f[i])
					require.NoError(t, err)
					n += v
				}
			}
		}
	})
	return n
}

// A start that fails when the tap and its stack are there already is an error, and
// nothing else: the stack's reader has things to tell by then.
func TestStartFailsBehindTheStack(t *testing.T) {
	newLAN(t)
	for range 20 {
		_, err := Start(t.Context(), Config{NetNS: newNS(t), Datapath: Kernel, noHold: true})
		require.Error(t, err)
	}
}

// A server that sets a mark of its own is reached, since the rules that hold SYNs
// divert its replies too, and so is one whose listener speaks MPTCP.
func TestKernelPathServers(t *testing.T) {
	remote := newLAN(t)
	ns := newNS(t)
	marked := serveIn(t, ns, withOption(unix.SOL_SOCKET, unix.SO_MARK, 0x17))
	mptcp := net.ListenConfig{}
	mptcp.SetMultipathTCP(true)
	multi := serveIn(t, ns, mptcp)
	f, _ := start(t, Config{NetNS: ns, Datapath: Kernel, Rules: append(publishTCP(8080, marked), publishTCP(8081, multi)...)})
	for _, port := range []string{"8080", "8081"} {
		for _, host := range []string{host4, host6} {
			begin := time.Now()
			got, local, err := ask(t, remote, "tcp", net.JoinHostPort(host, port))
			require.NoError(t, err, port)
			require.Equal(t, local.String(), got)
			require.Less(t, time.Since(begin), time.Second)
		}
	}
	for _, r := range f.Status().Rules {
		require.Equal(t, Kernel, r.Path)
		require.Empty(t, r.Reason)
	}
}

// One client address and port hits two forwards to one server port, and comes
// again at once after it has closed: the address is kept in any case.
func TestKernelPathClientPortAgain(t *testing.T) {
	remote := newLAN(t)
	ns := newNS(t)
	port := tellPeer(t, ns, ":0")
	start(t, Config{NetNS: ns, Datapath: Kernel, Rules: append(publishTCP(8080, port), publishTCP(8081, port)...)})
	for _, addrs := range [][2]string{{remote4, host4}, {remote6, host6}} {
		src := net.JoinHostPort(addrs[0], "40000")
		for i := range 6 {
			got, err := fromPort(t, remote, src, net.JoinHostPort(addrs[1], fmt.Sprint(8080+i%2)))
			require.NoError(t, err)
			require.Equal(t, addrs[0], netip.MustParseAddrPort(got).Addr().String())
		}
	}
}

// No payload crosses the tap, in either direction.
func TestKernelPathLeavesTheTapAlone(t *testing.T) {
	remote := newLAN(t)
	ns := newNS(t)
	inside := echoServer(t, ns)
	outside := echoServer(t, remote)
	start(t, Config{NetNS: ns, Datapath: Kernel, Rules: publishTCP(8080, inside)})
	for _, tt := range []struct {
		from *netnsutil.NS
		dst  string
	}{
		{remote, net.JoinHostPort(host4, "8080")},
		{remote, net.JoinHostPort(host6, "8080")},
		{ns, at(remote4, outside)},
		{ns, at(remote6, outside)},
	} {
		before := tapBytes(t, ns)
		var c net.Conn
		var err error
		within(t, tt.from, func() { c, err = net.DialTimeout("tcp", tt.dst, 5*time.Second) })
		require.NoError(t, err)
		const size = 4 << 20
		go func() {
			c.Write(make([]byte, size))
			c.(*net.TCPConn).CloseWrite()
		}()
		n, err := io.Copy(io.Discard, c)
		require.NoError(t, err)
		require.EqualValues(t, size, n)
		c.Close()
		require.Less(t, tapBytes(t, ns)-before, 4096, tt.dst)
	}
}

// A namespace has one owner at a time, and the next one finds all in order. What
// is left by one that is killed, see netnsutil's TestKernelPathAfterKill.
func TestKernelPathOneOwnerAfterAnother(t *testing.T) {
	remote := newLAN(t)
	ns := newNS(t)
	port := tellPeer(t, ns, ":0")
	outside := tellPeer(t, remote, ":0")
	f, _ := start(t, Config{NetNS: ns, Datapath: Kernel, Rules: publishTCP(8080, port)})
	_, err := Start(t.Context(), Config{NetNS: ns, Datapath: Kernel, Network: Network{IfName: "tap1"}})
	require.ErrorIs(t, err, netnsutil.ErrKernelPathBusy, "the first one keeps it")
	_, _, err = ask(t, remote, "tcp", net.JoinHostPort(host4, "8080"))
	require.NoError(t, err)
	require.NoError(t, f.Close())
	start(t, Config{NetNS: ns, Datapath: Kernel, Rules: publishTCP(8080, port)})
	for _, dst := range []string{at(remote4, outside), at(remote6, outside)} {
		_, _, err = ask(t, ns, "tcp", dst)
		require.NoError(t, err)
	}
}

// A thousand connections at once, out of the namespace.
func TestHeldSYNsManyAtOnce(t *testing.T) {
	remote := newLAN(t)
	for _, cookies := range []string{"1", "2"} { // 2: for every connection
		t.Run("syncookies "+cookies, func(t *testing.T) {
			ns := newNS(t)
			within(t, ns, func() {
				require.NoError(t, os.WriteFile("/proc/sys/net/ipv4/tcp_syncookies", []byte(cookies), 0))
			})
			port := tellPeer(t, remote, ":0")
			start(t, Config{NetNS: ns, Datapath: Kernel})
			var wg sync.WaitGroup
			for i := range 1000 {
				wg.Go(func() {
					dst, want := at(remote4, port), host4
					if i%2 == 0 {
						dst, want = at(remote6, port), host6
					}
					got, _, err := ask(t, ns, "tcp", dst)
					if err != nil {
						t.Errorf("%s: %v", dst, err)
					} else if addr := netip.MustParseAddrPort(got).Addr().String(); addr != want {
						t.Errorf("seen as %s", addr)
					}
				})
			}
			wg.Wait()
		})
	}
}

// From one port of the container to many places at once.
func TestHeldSYNsFromOnePort(t *testing.T) {
	remote := newLAN(t)
	ns := newNS(t)
	start(t, Config{NetNS: ns, Datapath: Kernel})
	for range 5 {
		port := tellPeer(t, remote, ":0")
		got, err := fromPort(t, ns, "10.0.2.100:45000", at(remote4, port))
		require.NoError(t, err)
		require.Equal(t, host4, netip.MustParseAddrPort(got).Addr().String())
	}
}

// A destination that does not answer leaves the container's connect(2) without an
// answer, and holds nothing once the container has given up.
func TestHeldSYNBlackHole(t *testing.T) {
	remote := newLAN(t)
	within(t, remote, func() { ip(t, "addr add 203.0.113.99/24 dev lan0"); ip(t, "route add blackhole "+host4) })
	ns := newNS(t)
	f, _ := start(t, Config{NetNS: ns, Datapath: Kernel})
	var err error
	begin := time.Now()
	within(t, ns, func() { _, err = net.DialTimeout("tcp", "203.0.113.99:80", 1500*time.Millisecond) })
	var timeout net.Error
	require.ErrorAs(t, err, &timeout)
	require.True(t, timeout.Timeout(), "%v", err)
	require.GreaterOrEqual(t, time.Since(begin), 1500*time.Millisecond)
	require.EqualValues(t, 1, f.Status().Outbound.Total, "one dial, though the SYN was sent twice")
}

// Data in the SYN (TCP Fast Open) arrives once.
func TestHeldSYNFastOpen(t *testing.T) {
	remote := newLAN(t)
	ns := newNS(t)
	port := echoServer(t, remote)
	start(t, Config{NetNS: ns, Datapath: Kernel})
	for range 2 { // the second time with a cookie, if there were one to be had
		for _, dst := range []string{at(remote4, port), at(remote6, port)} {
			var c net.Conn
			var err error
			within(t, ns, func() {
				d := net.Dialer{Timeout: 5 * time.Second, Control: withOption(unix.IPPROTO_TCP, unix.TCP_FASTOPEN_CONNECT, 1).Control}
				c, err = d.Dial("tcp", dst)
			})
			require.NoError(t, err)
			c.SetDeadline(time.Now().Add(5 * time.Second))
			_, err = c.Write([]byte("early"))
			require.NoError(t, err)
			require.NoError(t, c.(*net.TCPConn).CloseWrite())
			got, err := io.ReadAll(c)
			require.NoError(t, err)
			require.Equal(t, "early", string(got))
			c.Close()
		}
	}
}

// The container's socket is gone when the dial has worked at last: the released
// SYN is never accepted, and the dialled connection ends. A close in the meantime
// does not wait for it.
func TestHeldSYNContainerGivesUp(t *testing.T) {
	remote := newLAN(t)
	ln := make(chan net.Listener, 1)
	within(t, remote, func() {
		ip(t, "route add blackhole "+host4) // its SYN-ACKs are lost
		l, err := net.Listen("tcp", remote4+":0")
		require.NoError(t, err)
		ln <- l
	})
	l := <-ln
	defer l.Close()
	ns := newNS(t)
	f, _ := start(t, Config{NetNS: ns, Datapath: Kernel})
	within(t, ns, func() {
		_, err := net.DialTimeout("tcp", l.Addr().String(), 300*time.Millisecond)
		require.Error(t, err)
	})
	require.EqualValues(t, 1, f.Status().Outbound.Active)
	within(t, remote, func() { ip(t, "route del blackhole "+host4) })

	c, err := l.Accept()
	require.NoError(t, err)
	defer c.Close()
	c.SetReadDeadline(time.Now().Add(2 * releaseTimeout))
	_, err = c.Read(make([]byte, 1))
	require.ErrorIs(t, err, syscall.ECONNRESET)
	require.Eventually(t, func() bool { return f.Status().Outbound.Active == 0 }, time.Second, 10*time.Millisecond)

	within(t, remote, func() { ip(t, "route add blackhole "+host4) })
	within(t, ns, func() {
		_, err := net.DialTimeout("tcp", l.Addr().String(), 100*time.Millisecond)
		require.Error(t, err)
	})
	begin := time.Now()
	require.NoError(t, f.Close())
	require.Less(t, time.Since(begin), time.Second)
}
