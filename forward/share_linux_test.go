package forward

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/gofwd/gofwd/netnsutil"
)

// hearOften returns how often which answer came, of n.
func hearOften(t *testing.T, n int, addr string) map[string]int {
	t.Helper()
	heard := make(map[string]int)
	for range n {
		got, err := hear(addr)
		require.NoError(t, err)
		heard[got]++
	}
	return heard
}

// Clients of a shared port are led to its rules in turn, but to none that takes no
// connection.
func TestShareInTurn(t *testing.T) {
	onBothPaths(t, func(t *testing.T, path Datapath) {
		f, ns := start(t, Config{Datapath: path})
		a, b := say(t, ns, "a"), say(t, ns, "b")
		to := func(port uint16) Rule { return rule(fmt.Sprintf("8080:%d/tcp,share", port)) }
		changed, err := f.Change(Change{Add: []Rule{to(a), to(b), to(9)}})
		require.NoError(t, err)
		for _, r := range changed.Rules {
			require.Equal(t, []netip.AddrPort{netip.MustParseAddrPort("[::]:8080")}, r.Bound)
		}
		heard := hearOften(t, 30, "127.0.0.1:8080")
		require.InDelta(t, 15, heard["a"], 1, "%v", heard)
		require.InDelta(t, 15, heard["b"], 1, "%v", heard)

		late := say(t, ns, "late")
		changed, err = f.Change(Change{Replace: true, Add: []Rule{to(late), to(b)}, Drain: time.Second})
		require.NoError(t, err)
		require.Len(t, f.Status().Rules, 2)
		require.Equal(t, map[string]int{"late": 10, "b": 10}, hearOften(t, 20, "127.0.0.1:8080"))

		// Whose limit is reached leaves its turn to the others.
		full := to(b)
		full.Deny = "127.0.0.0/8"
		_, err = f.Change(Change{Replace: true, Add: []Rule{to(late), full}, Drain: time.Second})
		require.NoError(t, err)
		require.Equal(t, map[string]int{"late": 20}, hearOften(t, 20, "127.0.0.1:8080"))
		require.Zero(t, f.Status().Rules[1].Refused)
		_, err = f.Change(Change{Replace: true, Add: []Rule{full}})
		require.NoError(t, err)
		_, err = hear("127.0.0.1:8080")
		require.True(t, isReset(err), "%v", err)
		require.EqualValues(t, 1, f.Status().Rules[0].Refused)

		_, err = f.Change(Change{Add: []Rule{to(a), to(a)}})
		require.ErrorContains(t, err, "is given twice")
	})
}

// fullBacklog returns a port in ns whose server accepts nothing: the kernel drops
// the SYNs of further clients (tcp_conn_request in net/ipv4/tcp_input.c).
func fullBacklog(t *testing.T, ns *netnsutil.NS) (port uint16) {
	t.Helper()
	var fd int
	within(t, ns, func() {
		var err error
		fd, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		require.NoError(t, err)
		require.NoError(t, unix.Listen(fd, 0))
		sa, err := unix.Getsockname(fd)
		require.NoError(t, err)
		port = addrPortOf(sa).Port()
		dialTest(t, "tcp", fmt.Sprintf("127.0.0.1:%d", port))
	})
	t.Cleanup(func() { unix.Close(fd) })
	return port
}

// A server that goes away is taken out at once: one that refuses, and those that are
// silent, also since their host has gone.
func TestShareWithoutTheDead(t *testing.T) {
	f, ns := start(t, Config{})
	a := say(t, ns, "a")
	var going net.Listener
	within(t, ns, func() {
		var err error
		going, err = net.Listen("tcp", ":0")
		require.NoError(t, err)
	})
	go func() {
		for {
			c, err := going.Accept()
			if err != nil {
				return
			}
			io.WriteString(c, "going")
			c.Close()
		}
	}()
	_, err := f.Change(Change{Add: []Rule{
		rule(fmt.Sprintf("0.0.0.0:8080:%d/tcp,share", fullBacklog(t, ns))),
		rule(fmt.Sprintf("0.0.0.0:8080:%d/tcp,share", a)),
		rule(fmt.Sprintf("0.0.0.0:8080:%d/tcp,share", going.Addr().(*net.TCPAddr).Port)),
		rule("0.0.0.0:8080:203.0.113.2:80/tcp,share"),
	}})
	require.NoError(t, err)
	heard := hearOften(t, 20, "127.0.0.1:8080")
	require.InDelta(t, 10, heard["a"], 1, "%v", heard)
	going.Close()
	require.Equal(t, map[string]int{"a": 20}, hearOften(t, 20, "127.0.0.1:8080"))
}

// A rule that goes resets no client of the others, not even one that waits to be
// accepted.
func TestShareLosesNoClient(t *testing.T) {
	f, ns := start(t, Config{})
	a, b := say(t, ns, "a"), say(t, ns, "b")
	_, err := f.Add(rule(fmt.Sprintf("8080:%d/tcp,share", a)))
	require.NoError(t, err)
	k := startKnocking("127.0.0.1:8080", 2, func(s string) bool { return s == "a" || s == "b" })
	for range 20 {
		added, err := f.Add(rule(fmt.Sprintf("8080:%d/tcp,share", b)))
		require.NoError(t, err)
		time.Sleep(5 * time.Millisecond)
		require.NoError(t, f.Remove(added.ID, 5*time.Second))
	}
	require.Greater(t, k.finish(t), int64(20))
}

// A UDP flow stays where it is, and new ones are led in turn.
func TestShareUDP(t *testing.T) {
	for _, options := range []string{"", ",out"} {
		t.Run("options="+options, func(t *testing.T) {
			f, ns := start(t, Config{})
			to := ns
			if options != "" {
				to = nil
			}
			sayUDP := func(text string) (port uint16) {
				var c *net.UDPConn
				within(t, to, func() { c = listenUDP(t, "0.0.0.0:0") })
				go func() {
					for buf := make([]byte, 100); ; {
						_, client, err := c.ReadFromUDPAddrPort(buf)
						if err != nil {
							return
						}
						c.WriteToUDPAddrPort([]byte(text), client)
					}
				}()
				return addrOf(c).Port()
			}
			a, b := sayUDP("a"), sayUDP("b")
			share := func(port uint16) Rule { return rule(fmt.Sprintf("8080:%d/udp,share%s", port, options)) }
			changed, err := f.Change(Change{Add: []Rule{share(a), share(b)}})
			require.NoError(t, err)
			clients := ns
			if options == "" {
				clients = nil
			}
			dial := func() net.Conn {
				var c net.Conn
				within(t, clients, func() { c = dialTest(t, "udp", "127.0.0.1:8080") })
				return c
			}
			talk := func(c net.Conn) string {
				buf := make([]byte, 100)
				c.SetDeadline(time.Now().Add(5 * time.Second))
				c.Write([]byte("?"))
				n, err := c.Read(buf)
				require.NoError(t, err)
				return string(buf[:n])
			}
			heard := make(map[string]int)
			var flows []net.Conn
			for range 10 {
				c := dial()
				flows = append(flows, c)
				heard[talk(c)]++
			}
			require.Equal(t, map[string]int{"a": 5, "b": 5}, heard)
			for _, c := range flows {
				require.Equal(t, talk(c), talk(c))
			}
			require.NoError(t, f.Remove(changed.Rules[0].ID, 0))
			require.EqualValues(t, 5, f.Status().Rules[0].Active)
			for range 4 {
				require.Equal(t, "b", talk(dial()))
			}
			require.NoError(t, f.Remove(changed.Rules[1].ID, 0))
			c := dial()
			c.Write([]byte("?"))
			c.SetDeadline(time.Now().Add(5 * time.Second))
			_, err = c.Read(make([]byte, 1))
			require.ErrorContains(t, err, "refused")
		})
	}
}

// One port of the host for two rules, or two instances; one that goes is gone.
func TestShare(t *testing.T) {
	f, ns := start(t, Config{})
	a, b := say(t, ns, "a"), say(t, ns, "b")
	one, err := f.Add(rule(fmt.Sprintf("8080:%d/tcp,share", a)))
	require.NoError(t, err)
	_, err = f.Add(rule(fmt.Sprintf("8080:%d", b)))
	require.Error(t, err)
	_, err = f.Add(rule(fmt.Sprintf("8080:%d/tcp,share", b)))
	require.NoError(t, err)
	g, other := start(t, Config{Network: Network{IfName: "tap1"}, Rules: []Rule{rule("8080:80/tcp,share")}})
	serveTCP(t, other, ":80", func(c net.Conn) { io.WriteString(c, "c"); c.Close() })
	heard := func() map[string]int {
		n := make(map[string]int)
		for range 100 {
			got, err := hear("127.0.0.1:8080")
			require.NoError(t, err)
			n[got]++
		}
		return n
	}
	n := heard()
	require.Len(t, n, 3, "%v", n)
	require.NoError(t, f.Remove(one.ID, time.Second))
	require.NoError(t, g.Close())
	require.Equal(t, map[string]int{"b": 100}, heard())
}
