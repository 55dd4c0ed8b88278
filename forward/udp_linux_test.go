package forward

import (
	"fmt"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/gofwd/gofwd/stack"
)

// Addresses of the tests. The client and the world are on the loopback, under
// addresses that are not loopback ones to the engine.
var (
	guest4 = netip.MustParseAddr("10.0.2.100")
	guest6 = netip.MustParseAddr("fd67:6f66:7764::100")
	alias4 = netip.MustParseAddr("169.254.1.2")
	alias6 = netip.MustParseAddr("fd67:6f66:7764::1")
)

// fakeTap is the container's side of an engine: it keeps what was written to it,
// super-frames cut into datagrams.
type fakeTap struct {
	got   chan fakeDatagram
	errs  chan fakeError
	count func(*stack.Datagram) // replaces got
}

type fakeDatagram struct {
	src, dst netip.AddrPort
	tos      uint8
	payload  string
	frame    int // datagrams in the super-frame
}

type fakeError struct {
	src, dst netip.AddrPort
	payload  string
	icmp     stack.ICMPError
}

func (f *fakeTap) WriteUDP(d *stack.Datagram) error {
	if f.count != nil {
		f.count(d)
		return nil
	}
	parts := cut(d)
	for _, p := range parts {
		f.got <- fakeDatagram{d.Src, d.Dst, d.TOS, p, len(parts)}
	}
	return nil
}

func (f *fakeTap) WriteUDPError(d *stack.Datagram, e stack.ICMPError) error {
	select {
	case f.errs <- fakeError{d.Src, d.Dst, string(d.Payload), e}:
	default: // a test that does not read them
	}
	return nil
}

// cut returns the datagrams of d.
func cut(d *stack.Datagram) (parts []string) {
	p, size := d.Payload, d.SegmentSize
	if size <= 0 || len(p) == 0 {
		return []string{string(p)}
	}
	for ; len(p) > 0; p = p[min(size, len(p)):] {
		parts = append(parts, string(p[:min(size, len(p))]))
	}
	return parts
}

// udpTest is an engine with a fake tap and a clock that stands still.
type udpTest struct {
	*udpEngine
	t    testing.TB
	tap  *fakeTap
	mu   sync.Mutex
	time time.Time
}

func newUDPTest(t testing.TB, change func(*udpConfig)) *udpTest {
	u := &udpTest{
		t:    t,
		tap:  &fakeTap{got: make(chan fakeDatagram, 1<<16), errs: make(chan fakeError, 1<<10)},
		time: time.Unix(1e9, 0),
	}
	cfg := udpConfig{
		Stack:       u.tap,
		Source:      func(c netip.AddrPort, _ netip.Addr) netip.AddrPort { return c },
		Destination: func(d netip.AddrPort) (netip.AddrPort, error) { return d, nil },
		Guest: func(is4 bool) netip.Addr {
			if is4 {
				return guest4
			}
			return guest6
		},
		Now: u.now,
	}
	if change != nil {
		change(&cfg)
	}
	e, err := newUDPEngine(cfg)
	require.NoError(t, err)
	t.Cleanup(e.close)
	u.udpEngine = e
	return u
}

func (u *udpTest) now() time.Time {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.time
}

// pass moves the clock.
func (u *udpTest) pass(d time.Duration) (flows int) {
	u.mu.Lock()
	u.time = u.time.Add(d)
	u.mu.Unlock()
	return u.expire()
}

// recv returns the next datagram that reached the tap.
func (u *udpTest) recv() fakeDatagram {
	u.t.Helper()
	return next(u.t, u.tap.got)
}

func next[T any](t testing.TB, c chan T) T {
	t.Helper()
	select {
	case v := <-c:
		return v
	case <-time.After(5 * time.Second):
		require.FailNow(t, "nothing came within 5 s")
		panic("unreachable")
	}
}

// reply sends payload from the container to where d came from.
func (u *udpTest) reply(d fakeDatagram, payload string) {
	u.fromNamespace(&stack.Datagram{Src: d.dst, Dst: d.src, TTL: 64, Payload: []byte(payload)})
}

// publish publishes the container's port 53 on addr, and returns what was bound.
func (u *udpTest) publish(addr string, rule Rule, port uint16) (netip.AddrPort, *activeRule) {
	u.t.Helper()
	conn := listenUDP(u.t, addr)
	bound := conn.LocalAddr().(*net.UDPAddr).AddrPort()
	r := &activeRule{rule: rule}
	require.NoError(u.t, u.listen(conn, r, port))
	return netip.AddrPortFrom(bound.Addr().Unmap(), bound.Port()), r
}

// An error of a destination that has another name in the container is told by that
// name: from a loopback address the container's kernel would not believe it.
func TestUDPErrorOfATranslatedDestination(t *testing.T) {
	for _, to := range []string{"127.0.0.1:0", "[::1]:0"} {
		conn := listenUDP(t, to)
		closed := addrOf(conn)
		conn.Close()
		peer := netip.MustParseAddrPort("192.0.2.53:53")
		if closed.Addr().Is6() {
			peer = netip.MustParseAddrPort("[2001:db8::53]:53")
		}
		u := newUDPTest(t, func(c *udpConfig) {
			c.Destination = func(netip.AddrPort) (netip.AddrPort, error) { return closed, nil }
		})
		src := netip.AddrPortFrom(u.cfg.Guest(peer.Addr().Is4()), 5555)
		u.fromNamespace(&stack.Datagram{Src: src, Dst: peer, TTL: 64, Payload: []byte("question")})
		e := next(t, u.tap.errs)
		require.Equal(t, src, e.src)
		require.Equal(t, peer, e.dst)
		require.False(t, e.icmp.From.IsValid(), "%s", e.icmp.From)
	}
}

func listenUDP(t testing.TB, addr string) *net.UDPConn {
	t.Helper()
	conn, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.MustParseAddrPort(addr)))
	require.NoError(t, err)
	t.Cleanup(func() { conn.Close() })
	require.NoError(t, conn.SetDeadline(time.Now().Add(10*time.Second)))
	return conn
}

func addrOf(c *net.UDPConn) netip.AddrPort { return c.LocalAddr().(*net.UDPAddr).AddrPort() }

func readFrom(t testing.TB, c *net.UDPConn) (string, netip.AddrPort) {
	t.Helper()
	b := make([]byte, 65536)
	n, from, err := c.ReadFromUDPAddrPort(b)
	require.NoError(t, err)
	return string(b[:n]), netip.AddrPortFrom(from.Addr().Unmap(), from.Port())
}

func send(t testing.TB, c *net.UDPConn, to netip.AddrPort, payload string) {
	t.Helper()
	_, err := c.WriteToUDPAddrPort([]byte(payload), to)
	require.NoError(t, err)
}

func families(t *testing.T, test func(t *testing.T, loopback, guest netip.Addr)) {
	t.Run("IPv4", func(t *testing.T) { test(t, netip.MustParseAddr("127.0.0.1"), guest4) })
	t.Run("IPv6", func(t *testing.T) { test(t, netip.MustParseAddr("::1"), guest6) })
}

func TestUDPInbound(t *testing.T) {
	families(t, func(t *testing.T, lo, guest netip.Addr) {
		u := newUDPTest(t, nil)
		bound, rule := u.publish(netip.AddrPortFrom(lo, 0).String(), Rule{Proto: UDP}, 53)
		c := listenUDP(t, netip.AddrPortFrom(lo, 0).String())

		send(t, c, bound, "query")
		d := u.recv()
		require.Equal(t, addrOf(c), d.src)
		require.Equal(t, netip.AddrPortFrom(guest, 53), d.dst)
		require.Equal(t, "query", d.payload)
		u.reply(d, "answer")
		got, from := readFrom(t, c)
		require.Equal(t, "answer", got)
		require.Equal(t, bound, from)

		send(t, c, bound, "")
		require.Empty(t, u.recv().payload, "an empty datagram is one too")

		require.EqualValues(t, 1, rule.active.Load())
		counted := func() bool { // just after it was sent
			return rule.bytesIn.Load() == int64(len("query")) && rule.bytesOut.Load() == int64(len("answer"))
		}
		require.Eventually(t, counted, time.Second, time.Millisecond)
		u.unlisten(rule)
		require.Zero(t, rule.active.Load())
		require.Empty(t, u.sockets)
	})
}

func TestUDPDualStackListener(t *testing.T) {
	u := newUDPTest(t, nil)
	bound, _ := u.publish("[::]:0", Rule{Proto: UDP}, 53)
	for _, lo := range []string{"127.0.0.1", "127.0.0.2", "::1"} {
		addr := netip.MustParseAddr(lo)
		c := listenUDP(t, netip.AddrPortFrom(loopbackOf(addr.Is4()), 0).String())
		to := netip.AddrPortFrom(addr, bound.Port())
		send(t, c, to, lo)
		d := u.recv()
		require.Equal(t, addrOf(c), d.src, "unmapped")
		require.Equal(t, addr.Is4(), d.dst.Addr().Is4())
		u.reply(d, "re: "+lo)
		got, from := readFrom(t, c)
		require.Equal(t, "re: "+lo, got)
		require.Equal(t, to, from, "replies leave from the address that the client spoke to")
	}
}

func TestUDPOtherFamily(t *testing.T) {
	u := newUDPTest(t, func(c *udpConfig) {
		c.Guest = func(is4 bool) netip.Addr {
			if is4 {
				return guest4
			}
			return netip.Addr{}
		}
		c.Source = func(client netip.AddrPort, target netip.Addr) netip.AddrPort {
			return netip.AddrPortFrom(alias4, client.Port())
		}
	})
	bound, _ := u.publish("[::1]:0", Rule{Proto: UDP}, 53)
	c := listenUDP(t, "[::1]:0")
	send(t, c, bound, "query")
	d := u.recv()
	require.Equal(t, netip.AddrPortFrom(alias4, addrOf(c).Port()), d.src)
	require.Equal(t, netip.AddrPortFrom(guest4, 53), d.dst)
	u.reply(d, "answer")
	got, _ := readFrom(t, c)
	require.Equal(t, "answer", got)
}

// Two clients that look the same from inside must not get each other's answers.
func TestUDPClientsThatLookTheSame(t *testing.T) {
	u := newUDPTest(t, func(c *udpConfig) {
		c.Source = func(client netip.AddrPort, _ netip.Addr) netip.AddrPort {
			return netip.AddrPortFrom(alias4, client.Port())
		}
	})
	bound, _ := u.publish("127.0.0.1:0", Rule{Proto: UDP}, 53)
	c1 := listenUDP(t, "127.0.0.1:0")
	c2 := listenUDP(t, fmt.Sprintf("127.0.0.2:%d", addrOf(c1).Port()))
	send(t, c1, bound, "1")
	d1 := u.recv()
	send(t, c2, bound, "2")
	d2 := u.recv()
	require.Equal(t, alias4, d2.src.Addr())
	require.NotEqual(t, d1.src, d2.src)
	u.reply(d1, "re: 1")
	u.reply(d2, "re: 2")
	got, _ := readFrom(t, c1)
	require.Equal(t, "re: 1", got)
	got, _ = readFrom(t, c2)
	require.Equal(t, "re: 2", got)
}

func TestUDPOutbound(t *testing.T) {
	families(t, func(t *testing.T, lo, guest netip.Addr) {
		alias := netip.AddrPortFrom(alias4, 7)
		if lo.Is6() {
			alias = netip.AddrPortFrom(alias6, 7)
		}
		server := listenUDP(t, netip.AddrPortFrom(lo, 0).String())
		counters := new(flowCounters)
		u := newUDPTest(t, func(c *udpConfig) {
			c.Outbound = counters
			c.Destination = func(d netip.AddrPort) (netip.AddrPort, error) {
				if d == alias {
					d = addrOf(server)
				}
				return d, nil
			}
		})
		src := netip.AddrPortFrom(guest, 4000)
		u.fromNamespace(&stack.Datagram{Src: src, Dst: alias, TTL: 64, Payload: []byte("ping")})
		got, from := readFrom(t, server)
		require.Equal(t, "ping", got)
		send(t, server, from, "pong")
		d := u.recv()
		require.Equal(t, alias, d.src, "the reply is from the address that the container spoke to")
		require.Equal(t, src, d.dst)
		require.Equal(t, "pong", d.payload)
		require.EqualValues(t, 1, counters.active.Load())
		require.Eventually(t, func() bool { return counters.bytesIn.Load() == 4 }, time.Second, time.Millisecond)
		require.EqualValues(t, 4, counters.bytesOut.Load())

		t.Run("one socket for all peers", func(t *testing.T) {
			other := listenUDP(t, netip.AddrPortFrom(lo, 0).String())
			u.fromNamespace(&stack.Datagram{Src: src, Dst: addrOf(other), TTL: 64, Payload: []byte("ping")})
			_, from2 := readFrom(t, other)
			require.Equal(t, from, from2)
			require.Len(t, u.sockets, 1)
		})
		t.Run("strangers are dropped", func(t *testing.T) {
			stranger := listenUDP(t, netip.AddrPortFrom(lo, 0).String())
			send(t, stranger, from, "hello?")
			send(t, server, from, "after")
			require.Equal(t, "after", u.recv().payload)
		})
		t.Run("one destination under two addresses", func(t *testing.T) {
			u.fromNamespace(&stack.Datagram{Src: src, Dst: addrOf(server), TTL: 64, Payload: []byte("direct")})
			_, from2 := readFrom(t, server)
			require.NotEqual(t, from, from2)
			send(t, server, from2, "re: direct")
			require.Equal(t, addrOf(server), u.recv().src)
			send(t, server, from, "re: alias")
			require.Equal(t, alias, u.recv().src)
		})
	})
}

// A link-local address is nothing without its interface: that of a client, that of
// ours that the client spoke to, and that of a nameserver from a router's
// advertisement.
func TestUDPLinkLocal(t *testing.T) {
	routable(t)
	server := listenUDP(t, netip.AddrPortFrom(linkLocal, 0).String())
	u := newUDPTest(t, func(c *udpConfig) {
		c.Source = func(client netip.AddrPort, _ netip.Addr) netip.AddrPort {
			require.Empty(t, client.Addr().Zone())
			return client
		}
		c.Destination = func(netip.AddrPort) (netip.AddrPort, error) { return addrOf(server), nil }
	})
	bound, _ := u.publish("[::]:0", Rule{Proto: UDP}, 53)
	c := listenUDP(t, netip.AddrPortFrom(linkLocal, 0).String())
	to := netip.AddrPortFrom(linkLocal, bound.Port())
	send(t, c, to, "query")
	d := u.recv()
	require.Equal(t, linkLocal.WithZone(""), d.src.Addr())
	u.reply(d, "answer")
	got, from := readFrom(t, c)
	require.Equal(t, "answer", got)
	require.Equal(t, to, from)

	dns := &stack.Datagram{Src: netip.AddrPortFrom(guest4, 4000), Dst: netip.MustParseAddrPort("10.0.2.3:53"), TTL: 64, Payload: []byte("name?")}
	u.fromNamespace(dns)
	got, from = readFrom(t, server)
	require.Equal(t, "name?", got)
	send(t, server, from, "address")
	require.Equal(t, dns.Dst, u.recv().src)
}

// The peers of a published port see that port, whoever begins.
func TestUDPOutboundFromPublishedPort(t *testing.T) {
	families(t, func(t *testing.T, lo, guest netip.Addr) {
		routable(t)
		local := routable4
		if lo.Is6() {
			local = routable6
		}
		u := newUDPTest(t, nil)
		peer := listenUDP(t, netip.AddrPortFrom(local, 0).String())
		src := netip.AddrPortFrom(guest, 51820)
		out := &stack.Datagram{Src: src, Dst: addrOf(peer), TTL: 64, Payload: []byte("before")}
		u.fromNamespace(out)
		_, own := readFrom(t, peer)

		bound, rule := u.publish("[::]:0", Rule{Proto: UDP}, 51820)
		require.NotEqual(t, bound.Port(), own.Port())
		out.Payload = []byte("handshake")
		u.fromNamespace(out)
		got, from := readFrom(t, peer)
		require.Equal(t, "handshake", got)
		require.Equal(t, netip.AddrPortFrom(local, bound.Port()), from)
		send(t, peer, from, "response")
		d := u.recv()
		require.Equal(t, addrOf(peer), d.src)
		require.Equal(t, src, d.dst)
		require.EqualValues(t, 1, rule.total.Load())

		u.unlisten(rule)
		u.fromNamespace(out)
		_, from = readFrom(t, peer)
		require.NotEqual(t, bound.Port(), from.Port())
	})
}

func TestUDPDestinationErrors(t *testing.T) {
	var refuse error
	u := newUDPTest(t, func(c *udpConfig) {
		c.Destination = func(netip.AddrPort) (netip.AddrPort, error) { return netip.AddrPort{}, refuse }
	})
	for _, c := range []struct {
		err  error
		dst  string
		want stack.ICMPError
	}{
		{syscall.ECONNREFUSED, "10.0.2.3:5", stack.ICMPError{Type: 3, Code: 3}},
		{syscall.EHOSTUNREACH, "10.0.2.4:5", stack.ICMPError{Type: 3, Code: 1}},
		{syscall.ECONNREFUSED, "[fd00::1]:5", stack.ICMPError{Type: 1, Code: 4}},
		{syscall.EHOSTUNREACH, "[fd00::1]:5", stack.ICMPError{Type: 1, Code: 3}},
	} {
		refuse = c.err
		dst := netip.MustParseAddrPort(c.dst)
		src := netip.AddrPortFrom(guest4, 9)
		if dst.Addr().Is6() {
			src = netip.AddrPortFrom(guest6, 9)
		}
		u.fromNamespace(&stack.Datagram{Src: src, Dst: dst, TTL: 64, Payload: []byte("x")})
		require.Equal(t, fakeError{src, dst, "x", c.want}, next(t, u.tap.errs))
	}
	u.fromNamespace(&stack.Datagram{Src: netip.AddrPortFrom(guest4, 9), Dst: netip.MustParseAddrPort("224.0.0.1:5"), TTL: 1, Payload: []byte("x")})
	require.Empty(t, u.tap.errs, "no error about a multicast")
	require.Zero(t, u.flows.len())
}

// A destination that moves (another nameserver, another address of the host) is
// followed within a second.
func TestUDPDestinationMoves(t *testing.T) {
	s1, s2 := listenUDP(t, "127.0.0.1:0"), listenUDP(t, "127.0.0.1:0")
	dst := addrOf(s1)
	u := newUDPTest(t, func(c *udpConfig) {
		c.Destination = func(netip.AddrPort) (netip.AddrPort, error) { return dst, nil }
	})
	d := &stack.Datagram{
		Src: netip.AddrPortFrom(guest4, 4000), Dst: netip.MustParseAddrPort("10.0.2.3:53"),
		TTL: 64, Payload: []byte("query"),
	}
	u.fromNamespace(d)
	readFrom(t, s1)
	dst = addrOf(s2)
	u.pass(time.Second)
	u.fromNamespace(d)
	_, from := readFrom(t, s2)
	send(t, s2, from, "answer")
	require.Equal(t, d.Dst, u.recv().src)
}

func TestUDPErrorQueue(t *testing.T) {
	families(t, func(t *testing.T, lo, guest netip.Addr) {
		u := newUDPTest(t, nil)
		refused := stack.ICMPError{Type: 3, Code: 3} // from the destination
		if lo.Is6() {
			refused = stack.ICMPError{Type: 1, Code: 4}
		}
		server := listenUDP(t, netip.AddrPortFrom(lo, 0).String())
		closed := listenUDP(t, netip.AddrPortFrom(lo, 0).String())
		dst := addrOf(closed)
		closed.Close()
		src := netip.AddrPortFrom(guest, 4000)

		u.fromNamespace(&stack.Datagram{Src: src, Dst: dst, TTL: 64, Payload: []byte("knock")})
		require.Equal(t, fakeError{src, dst, "knock", refused}, next(t, u.tap.errs))

		// The same socket, at once: the error of one peer is not another's.
		u.fromNamespace(&stack.Datagram{Src: src, Dst: dst, TTL: 64, Payload: []byte("again")})
		u.fromNamespace(&stack.Datagram{Src: src, Dst: addrOf(server), TTL: 64, Payload: []byte("hello")})
		got, _ := readFrom(t, server)
		require.Equal(t, "hello", got)
		require.Equal(t, "again", next(t, u.tap.errs).payload)
		require.Len(t, u.sockets, 1)

		t.Run("listener", func(t *testing.T) {
			bound, _ := u.publish(netip.AddrPortFrom(lo, 0).String(), Rule{Proto: UDP}, 53)
			c := listenUDP(t, netip.AddrPortFrom(lo, 0).String())
			send(t, c, bound, "query")
			d := u.recv()
			c.Close()
			u.reply(d, "answer")
			require.Equal(t, fakeError{d.dst, d.src, "answer", refused}, next(t, u.tap.errs))
		})
	})
}

func TestUDPTimeToLiveAndTrafficClass(t *testing.T) {
	families(t, func(t *testing.T, lo, guest netip.Addr) {
		u := newUDPTest(t, nil)
		server := listenUDP(t, netip.AddrPortFrom(lo, 0).String())
		raw, err := server.SyscallConn()
		require.NoError(t, err)
		raw.Control(func(fd uintptr) {
			unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_RECVTTL, 1)
			unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_RECVTOS, 1)
			unix.SetsockoptInt(int(fd), unix.SOL_IPV6, unix.IPV6_RECVHOPLIMIT, 1)
			unix.SetsockoptInt(int(fd), unix.SOL_IPV6, unix.IPV6_RECVTCLASS, 1)
		})
		const tos = 0xb8 | 1 // EF, and ECN
		u.fromNamespace(&stack.Datagram{Src: netip.AddrPortFrom(guest, 4000), Dst: addrOf(server), TTL: 7, TOS: tos, Payload: []byte("x")})
		b, oob := make([]byte, 8), make([]byte, 256)
		_, n, _, from, err := server.ReadMsgUDPAddrPort(b, oob)
		require.NoError(t, err)
		ttl, class := 0, 0
		for rest := oob[:n]; ; {
			_, typ, data, more, ok := nextCmsg(rest)
			if !ok {
				break
			}
			switch rest = more; typ {
			case unix.IP_TTL, unix.IPV6_HOPLIMIT:
				ttl = int(data[0])
			case unix.IP_TOS, unix.IPV6_TCLASS:
				class = int(data[0])
			}
		}
		require.Equal(t, 7, ttl)
		require.Equal(t, tos, class)

		// And the other way, the traffic class: ECN is the end points' to see.
		raw.Control(func(fd uintptr) {
			unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_TOS, 2)
			unix.SetsockoptInt(int(fd), unix.SOL_IPV6, unix.IPV6_TCLASS, 2)
		})
		send(t, server, from, "y")
		require.EqualValues(t, 2, u.recv().tos)
	})
}
