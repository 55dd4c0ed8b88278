package forward

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/gofwd/gofwd/netnsutil"
)

// say starts a TCP server in ns that says text to each client.
func say(t *testing.T, ns *netnsutil.NS, text string) (port uint16) {
	t.Helper()
	return serveTCP(t, ns, ":0", func(c net.Conn) {
		io.WriteString(c, text)
		c.Close()
	})
}

// serveTCP starts a TCP server in ns. Its connections end with the test.
func serveTCP(t *testing.T, ns *netnsutil.NS, addr string, serve func(net.Conn)) (port uint16) {
	t.Helper()
	var ln net.Listener
	within(t, ns, func() {
		var err error
		ln, err = net.Listen("tcp", addr)
		require.NoError(t, err)
	})
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			wg.Go(func() { serve(c) })
		}
	})
	t.Cleanup(func() { ln.Close(); wg.Wait() })
	return ln.Addr().(*net.TCPAddr).AddrPort().Port()
}

// hear connects and returns what the server says.
func hear(addr string) (string, error) {
	c, err := net.DialTimeout("tcp", addr, 5*time.Second)
	if err != nil {
		return "", err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(5 * time.Second))
	b, err := io.ReadAll(c)
	return string(b), err
}

func ids(rules []RuleStatus) (ids []int) {
	for _, r := range rules {
		ids = append(ids, r.ID)
	}
	return ids
}

func TestAddAndRemove(t *testing.T) {
	f, ns := start(t, Config{})
	require.Equal(t, uint64(1), f.Status().Generation)
	port := say(t, ns, "hello")

	_, err := hear("127.0.0.1:8080")
	require.ErrorIs(t, err, syscall.ECONNREFUSED)
	r := rule(fmt.Sprintf("8080:%d", port))
	added, err := f.Add(r)
	require.NoError(t, err)
	require.Equal(t, r, added.Rule)
	require.Equal(t, []netip.AddrPort{netip.MustParseAddrPort("[::]:8080")}, added.Bound)
	got, err := hear("127.0.0.1:8080")
	require.NoError(t, err)
	require.Equal(t, "hello", got)

	again, err := f.Add(r)
	require.NoError(t, err)
	require.Equal(t, added.ID, again.ID)
	require.Equal(t, uint64(2), f.Status().Generation, "nothing has changed")

	_, err = f.Add(rule(fmt.Sprintf("127.0.0.1:8080:%d", port)))
	var conflict *ConflictError
	require.ErrorAs(t, err, &conflict)
	require.Equal(t, added.ID, conflict.With.ID)
	require.ErrorContains(t, err, `port rule "127.0.0.1:8080:`)

	require.NoError(t, f.Remove(added.ID, 0))
	_, err = hear("127.0.0.1:8080")
	require.ErrorIs(t, err, syscall.ECONNREFUSED)
	require.ErrorIs(t, f.Remove(added.ID, 0), ErrNoForward)

	free, err := f.Add(rule("80/udp"))
	require.NoError(t, err)
	require.NotEqual(t, added.ID, free.ID, "an id is never used twice")
	require.NotZero(t, free.Bound[0].Port())

	require.NoError(t, f.Close())
	_, err = f.Add(r)
	require.ErrorIs(t, err, net.ErrClosed)
}

// A change that can't be made as a whole changes nothing.
func TestChangeIsAtomic(t *testing.T) {
	f, ns := start(t, Config{})
	port := say(t, ns, "hello")
	first, err := f.Change(Change{Add: []Rule{rule(fmt.Sprintf("8080:%d", port)), rule("8080:80/udp"), rule("127.0.0.1:8082:82")}})
	require.NoError(t, err)
	busy, err := net.Listen("tcp", "127.0.0.1:8081")
	require.NoError(t, err)
	defer busy.Close()
	before := f.Status()

	for _, c := range []Change{
		{Add: []Rule{rule("8090:90"), rule("8081:81")}},
		{Replace: true, Add: []Rule{rule("8080:80"), rule("8082:82"), rule("8081:81")}},
		{Add: []Rule{rule("8090:90")}, Remove: []int{first.Rules[0].ID, 999}},
		{Add: []Rule{rule("8090:90"), rule("8090:91")}},
		{Add: []Rule{rule("8090:90")}, Generation: before.Generation + 1},
	} {
		_, err := f.Change(c)
		require.Error(t, err, "%+v", c)
		after := f.Status()
		require.Equal(t, before.Generation, after.Generation)
		require.Equal(t, ids(before.Rules), ids(after.Rules))
		_, err = hear("127.0.0.1:8090")
		require.ErrorIs(t, err, syscall.ECONNREFUSED)
		got, err := hear("127.0.0.1:8080")
		require.NoError(t, err)
		require.Equal(t, "hello", got)
	}
	_, err = f.Add(rule("8081:81"))
	require.ErrorIs(t, err, syscall.EADDRINUSE)
	require.ErrorContains(t, err, fmt.Sprintf("(pid %d)", os.Getpid()))
	_, err = f.Change(Change{Replace: true, Generation: before.Generation + 1})
	require.ErrorIs(t, err, ErrGeneration)

	// Nobody else could take our port meanwhile, or can now.
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) (err error) {
		c.Control(func(fd uintptr) { err = setOptions(int(fd), []option{{syscall.SOL_SOCKET, 15 /* SO_REUSEPORT */, 1}}) })
		return err
	}}
	for _, network := range []string{"tcp", "udp"} {
		var c io.Closer
		if network == "tcp" {
			c, err = lc.Listen(t.Context(), network, ":8080")
		} else {
			c, err = lc.ListenPacket(t.Context(), network, ":8080")
		}
		require.ErrorIs(t, err, syscall.EADDRINUSE, "%s %v", network, c)
	}
}

// knock connects in tight loops, and counts.
type knock struct {
	stop  atomic.Bool
	wg    sync.WaitGroup
	total atomic.Int64
	err   atomic.Pointer[error]
}

func startKnocking(addr string, loops int, want func(string) bool) *knock {
	k := &knock{}
	for range loops {
		k.wg.Go(func() {
			for !k.stop.Load() {
				got, err := hear(addr)
				if err == nil && !want(got) {
					err = fmt.Errorf("the answer was %q", got)
				}
				if err != nil {
					k.err.CompareAndSwap(nil, &err)
					return
				}
				k.total.Add(1)
			}
		})
	}
	return k
}

func (k *knock) finish(t *testing.T) int64 {
	t.Helper()
	k.stop.Store(true)
	k.wg.Wait()
	if err := k.err.Load(); err != nil {
		require.NoError(t, *err, "after %d connections", k.total.Load())
	}
	return k.total.Load()
}

// Where the same ports are to lead elsewhere, no client is refused or reset.
func TestRetargetRefusesNobody(t *testing.T) {
	f, ns := start(t, Config{})
	blue, green := say(t, ns, "blue"), say(t, ns, "green")
	added, err := f.Add(rule(fmt.Sprintf("8080:%d", blue)))
	require.NoError(t, err)
	k := startKnocking("127.0.0.1:8080", 2, func(s string) bool { return s == "blue" || s == "green" })
	for i := range 20 {
		to := []uint16{green, blue}[i%2]
		changed, err := f.Change(Change{Replace: true, Add: []Rule{rule(fmt.Sprintf("8080:%d", to))}, Drain: 10 * time.Second})
		require.NoError(t, err)
		require.NotEqual(t, added.ID, changed.Rules[0].ID)
		require.Equal(t, added.Bound, changed.Rules[0].Bound)
		got, err := hear("127.0.0.1:8080")
		require.NoError(t, err)
		require.Equal(t, []string{"green", "blue"}[i%2], got, "the answer to the change comes after it is true")
		time.Sleep(20 * time.Millisecond)
	}
	require.Greater(t, k.finish(t), int64(20))
}

// The kernel lets a socket with SO_REUSEPORT bind to the port of one that got the
// option only afterwards, and that listens on other addresses; so that a forward
// can widen to every address, or narrow, without a moment in which nobody listens.
func TestWidenAndNarrow(t *testing.T) {
	for _, proto := range []string{"tcp", "udp"} {
		t.Run(proto, func(t *testing.T) {
			f, ns := start(t, Config{})
			port := tellPeer(t, ns, ":0")
			publish := func(listen string) Rule { return rule(fmt.Sprintf("%s8080:%d/%s", listen, port, proto)) }
			for _, listen := range []string{"127.0.0.1:", "", "0.0.0.0:", "", "127.0.0.1:", "127.0.0.2:"} {
				_, err := f.Change(Change{Replace: true, Add: []Rule{publish(listen)}})
				require.NoError(t, err, listen)
				require.Len(t, f.Status().Rules, 1)
				dst := "127.0.0.1:8080"
				if listen == "127.0.0.2:" {
					_, _, err := ask(t, nil, proto, dst)
					require.ErrorIs(t, err, syscall.ECONNREFUSED)
					dst = "127.0.0.2:8080"
				}
				_, _, err = ask(t, nil, proto, dst)
				require.NoError(t, err, listen)
			}
		})
	}
}

// The peers of a published UDP port see that port also after its rule has given
// way to another one for it.
func TestReplacedUDPRuleStaysPublished(t *testing.T) {
	routable(t)
	f, ns := start(t, Config{})
	peer := listenUDP(t, netip.AddrPortFrom(routable4, 0).String())
	var server *net.UDPConn
	within(t, ns, func() { server = listenUDP(t, "0.0.0.0:51820") })
	for _, options := range []string{"", ",allow=192.0.2.0/24", ""} {
		_, err := f.Change(Change{Replace: true, Add: []Rule{rule("8080:51820/udp" + options)}})
		require.NoError(t, err)
		send(t, server, addrOf(peer), "handshake")
		_, from := readFrom(t, peer)
		require.Equal(t, netip.AddrPortFrom(routable4, 8080), from)
	}
}

// A port that the kernel has chosen can be asked for by its number.
func TestChosenPortIsKept(t *testing.T) {
	ns := newNS(t)
	server := say(t, ns, "here")
	f, _ := start(t, Config{NetNS: ns, Rules: publishTCP(0, server)})
	bound := f.Status().Rules[0].Bound
	require.NotEmpty(t, bound)
	_, err := f.Change(Change{Replace: true, Add: publishTCP(bound[0].Port(), server)})
	require.NoError(t, err)
	got, err := hear(fmt.Sprintf("127.0.0.1:%d", bound[0].Port()))
	require.NoError(t, err)
	require.Equal(t, "here", got)
}

func TestDrain(t *testing.T) {
	f, ns := start(t, Config{})
	port := serveTCP(t, ns, ":0", func(c net.Conn) { io.Copy(c, c); c.Close() })
	r := rule(fmt.Sprintf("8080:%d", port))
	echo := func(c net.Conn) error {
		c.SetDeadline(time.Now().Add(5 * time.Second))
		if _, err := c.Write([]byte("x")); err != nil {
			return err
		}
		_, err := io.ReadFull(c, make([]byte, 1))
		return err
	}
	connect := func() (id int, c net.Conn) {
		added, err := f.Add(r)
		require.NoError(t, err)
		c, err = net.Dial("tcp", "127.0.0.1:8080")
		require.NoError(t, err)
		t.Cleanup(func() { c.Close() })
		require.NoError(t, echo(c))
		return added.ID, c
	}

	id, c := connect()
	require.NoError(t, f.Remove(id, 0))
	require.ErrorIs(t, echo(c), syscall.ECONNRESET)

	id, c = connect()
	require.NoError(t, f.Remove(id, 300*time.Millisecond))
	_, err := hear("127.0.0.1:8080")
	require.ErrorIs(t, err, syscall.ECONNREFUSED)
	require.NoError(t, echo(c))
	c.SetReadDeadline(time.Now().Add(5 * time.Second))
	_, err = c.Read(make([]byte, 1))
	require.ErrorIs(t, err, syscall.ECONNRESET)

	// Close doesn't wait for the end of a drain.
	id, _ = connect()
	require.NoError(t, f.Remove(id, time.Hour))
	require.NoError(t, f.Close())
}

// pesto's measured failure: changes of the rules refuse clients of others.
func TestChangesRefuseNobody(t *testing.T) {
	f, ns := start(t, Config{})
	port := say(t, ns, "hello")
	_, err := f.Add(rule(fmt.Sprintf("8080:%d", port)))
	require.NoError(t, err)
	k := startKnocking("127.0.0.1:8080", 4, func(s string) bool { return s == "hello" })
	const changes, within = 100, 1500 * time.Millisecond
	begin := time.Now()
	for i := range changes {
		set := []Rule{rule(fmt.Sprintf("8080:%d", port)), rule(fmt.Sprintf("%d:80", 9000+i)), rule("9500:95/udp")}
		_, err := f.Change(Change{Replace: true, Add: set})
		require.NoError(t, err)
		time.Sleep(time.Until(begin.Add(within * time.Duration(i+1) / changes)))
	}
	t.Logf("%d connections, none refused", k.finish(t))
}

func TestChangeConcurrently(t *testing.T) {
	f, _ := start(t, Config{})
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			for range 20 {
				added, err := f.Add(rule(fmt.Sprintf("%d:80", 9000+i%4)))
				if err != nil {
					t.Error(err)
					return
				}
				if err := f.Remove(added.ID, 0); err != nil && !errors.Is(err, ErrNoForward) {
					t.Error(err)
				}
				_ = f.Status()
			}
		})
	}
	wg.Wait()
	require.Empty(t, f.Status().Rules)
}
