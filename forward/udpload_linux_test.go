package forward

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/gofwd/gofwd/stack"
)

// sink is a bound socket that nobody reads: datagrams to it are dropped by the
// kernel once its buffer is full.
func sink(t testing.TB, addr string) netip.AddrPort { return addrOf(listenUDP(t, addr)) }

func openFiles(t testing.TB) int {
	t.Helper()
	d, err := os.ReadDir("/proc/self/fd")
	require.NoError(t, err)
	return len(d)
}

// A burst of queries that nobody answers, each from a port of its own, as a
// resolver sends them, costs a bounded number of sockets, and little memory.
func TestUDPBurstIsBounded(t *testing.T) {
	const burst, limit = 50_000, 2000
	u := newUDPTest(t, func(c *udpConfig) { c.MaxFlows = limit })
	d := &stack.Datagram{Dst: sink(t, "127.0.0.1:0"), TTL: 64, Payload: []byte("query")}
	files := openFiles(t)
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	for i := range burst {
		guest := guest4
		if i >= 32768 {
			guest = guest.Next()
		}
		d.Src = netip.AddrPortFrom(guest, uint16(1024+i%32768))
		u.fromNamespace(d)
	}
	require.Equal(t, limit, u.flows.len())
	require.Len(t, u.sockets, limit)
	require.Len(t, u.bindings, limit)
	require.LessOrEqual(t, openFiles(t)-files, limit)
	runtime.GC()
	runtime.ReadMemStats(&after)
	perFlow := int64(after.HeapAlloc-before.HeapAlloc) / limit
	require.Less(t, perFlow, int64(2048))

	require.Equal(t, limit, u.pass(udpTimeout-time.Second))
	require.Zero(t, u.pass(time.Second))
	require.Empty(t, u.sockets)
	require.Empty(t, u.bindings)
	require.LessOrEqual(t, openFiles(t), files)
}

// A flow of one query and its answer ends with the answer, also if the resolver
// asks for A and AAAA from one port at once.
func TestUDPNameserverFlowsEndEarly(t *testing.T) {
	server := listenUDP(t, "127.0.0.1:0")
	u := newUDPTest(t, func(c *udpConfig) {
		c.Batched = true
		c.IsDNS = func(d netip.AddrPort) bool { return d.Addr().Is4() }
		c.Destination = func(netip.AddrPort) (netip.AddrPort, error) { return addrOf(server), nil }
	})
	d := &stack.Datagram{Src: netip.AddrPortFrom(guest4, 4000), Dst: netip.MustParseAddrPort("10.0.2.3:53"), TTL: 64}
	for _, q := range []string{"query A", "query B"} {
		d.Payload = []byte(q)
		u.fromNamespace(d)
	}
	u.idle()
	for _, q := range []string{"query A", "query B"} {
		require.Equal(t, 1, u.locked(u.flows.len))
		got, from := readFrom(t, server)
		require.Equal(t, q, got)
		send(t, server, from, "re: "+q)
		require.Equal(t, "re: "+q, u.recv().payload)
	}
	require.Zero(t, u.locked(u.flows.len))
	require.Zero(t, u.locked(func() int { return len(u.sockets) }))
}

// So it does where the kernel, on either side, has joined several of them.
func TestUDPNameserverFlowsOfJoinedDatagrams(t *testing.T) {
	server := listenUDP(t, "127.0.0.1:0")
	u := newUDPTest(t, func(c *udpConfig) {
		c.IsDNS = func(d netip.AddrPort) bool { return d.Addr().Is4() }
		c.Destination = func(netip.AddrPort) (netip.AddrPort, error) { return addrOf(server), nil }
	})
	d := &stack.Datagram{
		Src: netip.AddrPortFrom(guest4, 4000), Dst: netip.MustParseAddrPort("10.0.2.3:53"), TTL: 64,
		Payload: []byte("1st2nd3rd"), SegmentSize: 3,
	}
	u.fromNamespace(d)
	got, from := readFrom(t, server)
	require.Equal(t, "1st", got)
	send(t, server, from, "re: 1st")
	require.Equal(t, "re: 1st", u.recv().payload)
	require.Equal(t, 1, u.locked(u.flows.len))
	f := u.flows.byTap[tapKey{keyOf(d.Src), keyOf(d.Dst)}]
	u.flowIn(f.host.sock, &f.host.remote, localAddr{}, 2)
	require.Zero(t, u.locked(u.flows.len))
}

// A super-frame of IPv6 can be longer than one of IPv4; its datagrams arrive all the same.
func TestUDPSuperFrameToIPv4(t *testing.T) {
	server := listenUDP(t, "127.0.0.1:0")
	u := newUDPTest(t, func(c *udpConfig) {
		c.Destination = func(netip.AddrPort) (netip.AddrPort, error) { return addrOf(server), nil }
	})
	payload := bytes.Repeat([]byte("0123456789"), 6552)
	u.fromNamespace(&stack.Datagram{
		Src: netip.AddrPortFrom(guest6, 4000), Dst: netip.MustParseAddrPort("[fd67:6f66:7764::3]:53"), TTL: 64,
		Payload: payload, SegmentSize: 1200,
	})
	for len(payload) > 0 {
		got, _ := readFrom(t, server)
		require.Equal(t, string(payload[:len(got)]), got)
		payload = payload[len(got):]
	}
	require.Zero(t, u.dropped.Load())
	time.Sleep(20 * time.Millisecond)
	require.Empty(t, u.tap.errs, "the container is not told that anything was too long")
}

// A flow to port 53 of anybody else may be a VPN's: it is like any other.
func TestUDPPort53IsNotAlwaysDNS(t *testing.T) {
	server := listenUDP(t, "127.0.0.1:0")
	u := newUDPTest(t, func(c *udpConfig) {
		c.Destination = func(netip.AddrPort) (netip.AddrPort, error) { return addrOf(server), nil }
	})
	u.fromNamespace(&stack.Datagram{Src: netip.AddrPortFrom(guest4, 4000), Dst: netip.MustParseAddrPort("192.0.2.53:53"), TTL: 64})
	_, from := readFrom(t, server)
	for _, s := range []string{"1", "2", "3"} {
		send(t, server, from, s)
		require.Equal(t, s, u.recv().payload)
	}
}

// What becomes of a query decides which nameserver is asked next.
func TestUDPNameserverReports(t *testing.T) {
	type report struct {
		server   netip.Addr
		answered bool
	}
	reports := make(chan report, 10)
	server, closed := listenUDP(t, "127.0.0.1:0"), listenUDP(t, "127.0.0.2:0")
	closed.Close()
	dst := addrOf(server)
	u := newUDPTest(t, func(c *udpConfig) {
		c.IsDNS = func(netip.AddrPort) bool { return true }
		c.Nameserver = func(server netip.Addr, answered bool) { reports <- report{server, answered} }
		c.Destination = func(netip.AddrPort) (netip.AddrPort, error) { return dst, nil }
	})
	d := &stack.Datagram{Src: netip.AddrPortFrom(guest4, 4000), Dst: netip.MustParseAddrPort("10.0.2.3:53"), TTL: 64}

	u.fromNamespace(d)
	_, from := readFrom(t, server)
	send(t, server, from, "answer")
	require.Equal(t, report{dst.Addr(), true}, next(t, reports))
	u.recv()

	u.fromNamespace(d)
	require.Zero(t, u.pass(udpQueryTimeout))
	require.Equal(t, report{dst.Addr(), false}, next(t, reports), "silence")

	u.fromNamespace(d)
	u.pass(queryPatience)
	u.fromNamespace(d)
	require.Equal(t, report{dst.Addr(), false}, next(t, reports), "the container asks again")

	dst = addrOf(closed)
	d.Src = netip.AddrPortFrom(guest4, 4001)
	u.fromNamespace(d)
	require.Equal(t, report{dst.Addr(), false}, next(t, reports), "port unreachable")
	require.Equal(t, d.Dst, next(t, u.tap.errs).dst)
}

func (u *udpTest) locked(f func() int) int {
	u.udpEngine.mu.Lock()
	defer u.udpEngine.mu.Unlock()
	return f()
}

func TestUDPBroadcastAndMulticast(t *testing.T) {
	ifi := routable(t)
	join := func(c *net.UDPConn, level, name int, mreq any) {
		raw, err := c.SyscallConn()
		require.NoError(t, err)
		raw.Control(func(fd uintptr) {
			switch m := mreq.(type) {
			case *unix.IPMreqn:
				err = unix.SetsockoptIPMreqn(int(fd), level, name, m)
			case *unix.IPv6Mreq:
				err = unix.SetsockoptIPv6Mreq(int(fd), level, name, m)
			}
		})
		require.NoError(t, err)
	}
	group4, group6 := netip.MustParseAddr("239.1.2.3"), netip.MustParseAddr("ff15::1")
	server4, server6 := listenUDP(t, "0.0.0.0:0"), listenUDP(t, "[::]:0")
	join(server4, unix.SOL_IP, unix.IP_ADD_MEMBERSHIP, &unix.IPMreqn{Multiaddr: group4.As4(), Ifindex: int32(ifi.Index)})
	join(server6, unix.SOL_IPV6, unix.IPV6_JOIN_GROUP, &unix.IPv6Mreq{Multiaddr: group6.As16(), Interface: uint32(ifi.Index)})

	for _, c := range []struct {
		dst, guest netip.Addr
		server     *net.UDPConn
	}{
		{netip.MustParseAddr("127.255.255.255"), guest4, server4},
		{group4, guest4, server4},
		{group6, guest6, server6},
	} {
		t.Run(c.dst.String(), func(t *testing.T) {
			u := newUDPTest(t, nil)
			src := netip.AddrPortFrom(c.guest, 4000)
			u.fromNamespace(&stack.Datagram{
				Src: src, Dst: netip.AddrPortFrom(c.dst, addrOf(c.server).Port()), TTL: 64, Payload: []byte("who is there?"),
			})
			got, from := readFrom(t, c.server)
			require.Equal(t, "who is there?", got)
			send(t, c.server, from, "it is me")
			d := u.recv()
			require.Equal(t, "it is me", d.payload)
			require.Equal(t, src, d.dst)
			require.NotEqual(t, c.dst, d.src.Addr(), "the answer comes from whoever answers")
			u.reply(d, "hello")
			got, from2 := readFrom(t, c.server)
			require.Equal(t, "hello", got)
			require.Equal(t, from, from2)
		})
	}
}

// While a flood to a closed port is refused, answers to others by the same socket
// all arrive, and the container is told nothing wrong about them.
func TestUDPErrorsOfOthers(t *testing.T) {
	families(t, func(t *testing.T, lo, guest netip.Addr) {
		u := newUDPTest(t, func(c *udpConfig) { c.Batched = true })
		server := listenUDP(t, netip.AddrPortFrom(lo, 0).String())
		closed := listenUDP(t, netip.AddrPortFrom(lo, 0).String())
		dst := addrOf(closed)
		closed.Close()
		src := netip.AddrPortFrom(guest, 53)
		flood := &stack.Datagram{Src: src, Dst: dst, TTL: 64, Payload: pattern(1400)}
		answer := &stack.Datagram{Src: src, Dst: addrOf(server), TTL: 64, Payload: []byte("answer")}
		var flooding sync.WaitGroup
		ctx, stop := context.WithCancel(t.Context())
		defer stop() // else a failure would be one of the tests that follow, too
		flooding.Go(func() {
			for ctx.Err() == nil {
				u.fromNamespace(flood)
			}
		})
		for range 1000 {
			u.fromNamespace(answer)
			u.idle()
			got, _ := readFrom(t, server)
			require.Equal(t, "answer", got)
		}
		stop()
		flooding.Wait()
		u.close()
		require.Len(t, u.sockets, 0)
		for len(u.tap.errs) > 0 {
			require.Equal(t, dst, (<-u.tap.errs).dst)
		}
	})
}

// A rule of direction Out needs no tap: both its ends are sockets.
func TestUDPOutRule(t *testing.T) {
	families(t, func(t *testing.T, lo, _ netip.Addr) {
		u := newUDPTest(t, nil)
		server := listenUDP(t, netip.AddrPortFrom(lo, 0).String())
		bound, rule := u.publish(netip.AddrPortFrom(lo, 0).String(), Rule{Dir: Out, Proto: UDP}, addrOf(server).Port())
		for range 3 {
			c := listenUDP(t, netip.AddrPortFrom(lo, 0).String())
			payload := pattern(30_000)
			sendSegmented(t, c, bound, payload, 1000)
			var from netip.AddrPort
			for i := range 30 {
				var got string
				got, from = readFrom(t, server)
				require.Equal(t, string(payload[i*1000:][:1000]), got)
			}
			send(t, server, from, "answer")
			got, from := readFrom(t, c)
			require.Equal(t, "answer", got)
			require.Equal(t, bound, from)
		}
		require.EqualValues(t, 3, rule.active.Load())
		counted := func() bool { // just after it was sent
			return rule.bytesOut.Load() == 3*30_000 && rule.bytesIn.Load() == 3*int64(len("answer"))
		}
		require.Eventually(t, counted, time.Second, time.Millisecond)
		require.Zero(t, u.pass(udpTimeout))
		require.Len(t, u.sockets, 1)
	})
}

// An inbound flow can have a socket in the namespace as its inner end.
func TestUDPInsideSocket(t *testing.T) {
	server := listenUDP(t, "127.0.0.1:0")
	asked := make(chan [2]netip.AddrPort, 2)
	u := newUDPTest(t, func(c *udpConfig) {
		c.Inside = func(src, dst netip.AddrPort) (*net.UDPConn, error) {
			asked <- [2]netip.AddrPort{src, dst}
			return net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 9)})
		}
	})
	bound, _ := u.publish("127.0.0.1:0", Rule{Proto: UDP, Target: netip.MustParseAddr("127.0.0.1")}, addrOf(server).Port())
	c := listenUDP(t, "127.0.0.1:0")
	for range 2 {
		send(t, c, bound, "query")
		got, from := readFrom(t, server)
		require.Equal(t, "query", got)
		require.Equal(t, "127.0.0.9", from.Addr().String())
		send(t, server, from, "answer")
		got, from = readFrom(t, c)
		require.Equal(t, "answer", got)
		require.Equal(t, bound, from)
	}
	require.Equal(t, [2]netip.AddrPort{addrOf(c), addrOf(server)}, <-asked)
	require.Empty(t, asked, "once for a flow")
	require.Zero(t, u.pass(udpStreamTimeout))
	require.Len(t, u.sockets, 1, "the listener's")
}

func TestUDPCloseIsIdempotent(t *testing.T) {
	u := newUDPTest(t, nil)
	u.publish("127.0.0.1:0", Rule{Proto: UDP}, 53)
	u.fromNamespace(&stack.Datagram{Src: netip.AddrPortFrom(guest4, 1), Dst: sink(t, "127.0.0.1:0"), TTL: 64})
	u.close()
	u.close()
	require.Empty(t, u.sockets)
	require.Zero(t, u.flows.len())
	u.fromNamespace(&stack.Datagram{Src: netip.AddrPortFrom(guest4, 1), Dst: sink(t, "127.0.0.1:0"), TTL: 64})
	require.Empty(t, u.sockets)
	require.ErrorIs(t, u.listen(listenUDP(t, "127.0.0.1:0"), new(activeRule), 1), net.ErrClosed)
}

// Everything at once, with far more flows than the table holds, for the race
// detector and for descriptors that are closed under somebody's hands.
func TestUDPConcurrency(t *testing.T) {
	u := newUDPTest(t, func(c *udpConfig) { c.MaxFlows, c.Batched = 20, true })
	var echoed atomic.Int64
	u.tap.count = func(d *stack.Datagram) {
		if d.Dst.Port() == 53 {
			u.fromNamespace(&stack.Datagram{Src: d.Dst, Dst: d.Src, TTL: 64, Payload: d.Payload, SegmentSize: d.SegmentSize})
			u.idle()
		}
		echoed.Add(1)
	}
	echo := listenUDP(t, "127.0.0.1:0")
	var wg, echoing sync.WaitGroup
	echoing.Go(func() {
		for b := make([]byte, 2048); ; {
			n, from, err := echo.ReadFromUDPAddrPort(b)
			if err != nil {
				return
			}
			echo.WriteToUDPAddrPort(b[:n], from)
		}
	})
	stop := time.Now().Add(300 * time.Millisecond)
	for i := range 2 {
		bound, rule := u.publish("127.0.0.1:0", Rule{Proto: UDP}, 53)
		wg.Go(func() {
			rnd := rand.New(rand.NewPCG(uint64(i), 0))
			for time.Now().Before(stop) {
				c, err := net.Dial("udp", bound.String())
				require.NoError(t, err)
				for range 1 + rnd.IntN(4) {
					c.Write(make([]byte, rnd.IntN(1400)))
				}
				c.Close()
			}
			u.unlisten(rule)
		})
		wg.Go(func() {
			rnd := rand.New(rand.NewPCG(uint64(i), 1))
			for time.Now().Before(stop) {
				u.fromNamespace(&stack.Datagram{
					Src: netip.AddrPortFrom(guest4, uint16(10000+rnd.IntN(100))), Dst: addrOf(echo), TTL: 64,
					Payload: make([]byte, rnd.IntN(1400)),
				})
				if rnd.IntN(10) == 0 {
					u.idle()
				}
			}
		})
	}
	wg.Go(func() {
		for time.Now().Before(stop) {
			u.pass(10 * time.Second)
			time.Sleep(time.Millisecond)
		}
	})
	wg.Wait()
	require.NotZero(t, echoed.Load())
	u.close()
	echo.Close()
	echoing.Wait()
	require.Zero(t, u.cfg.Outbound.active.Load())
}

// No datagram allocates.
func TestUDPAllocations(t *testing.T) {
	u := newUDPTest(t, func(c *udpConfig) { c.Batched = true })
	arrived := make(chan struct{}, 1)
	u.tap.count = func(*stack.Datagram) { arrived <- struct{}{} }

	bound, _ := u.publish("127.0.0.1:0", Rule{Proto: UDP}, 53)
	c := listenUDP(t, "127.0.0.1:0")
	payload := pattern(1000)
	in := func() {
		c.WriteToUDPAddrPort(payload, bound)
		<-arrived
	}
	in() // makes the flow, and the worker's buffers
	require.Zero(t, testing.AllocsPerRun(1000, in))

	server := listenUDP(t, "127.0.0.1:0")
	b := make([]byte, 2000)
	d := &stack.Datagram{Src: netip.AddrPortFrom(guest4, 4000), Dst: addrOf(server), TTL: 63, TOS: 1, Payload: payload}
	out := func() {
		u.fromNamespace(d)
		u.fromNamespace(d)
		u.idle()
		server.ReadFromUDPAddrPort(b)
		server.ReadFromUDPAddrPort(b)
	}
	out()
	require.Zero(t, testing.AllocsPerRun(1000, out))
}

func BenchmarkUDPOut(b *testing.B) {
	for _, size := range []int{64, 512, 1472} {
		for _, batch := range []int{1, 64} {
			b.Run(fmt.Sprintf("size=%d/batch=%d", size, batch), func(b *testing.B) {
				u := newUDPTest(b, func(c *udpConfig) { c.Batched = batch > 1 })
				d := &stack.Datagram{Src: netip.AddrPortFrom(guest4, 4000), Dst: sink(b, "127.0.0.1:0"), TTL: 64, Payload: pattern(size)}
				b.SetBytes(int64(size))
				b.ReportAllocs()
				i := 0
				for b.Loop() {
					u.fromNamespace(d)
					if i++; i%batch == 0 {
						u.idle()
					}
				}
			})
		}
	}
	b.Run("superframe", func(b *testing.B) {
		u := newUDPTest(b, nil)
		d := &stack.Datagram{
			Src: netip.AddrPortFrom(guest4, 4000), Dst: sink(b, "127.0.0.1:0"), TTL: 64,
			Payload: pattern(1472 * 44), SegmentSize: 1472,
		}
		b.SetBytes(int64(len(d.Payload)))
		b.ReportAllocs()
		for b.Loop() {
			u.fromNamespace(d)
		}
	})
}

// BenchmarkUDPIn counts what arrives at the tap of what a flood of senders offers.
func BenchmarkUDPIn(b *testing.B) {
	for _, size := range []int{64, 512, 1472} {
		for _, segments := range []int{1, 40} {
			b.Run(fmt.Sprintf("size=%d/segments=%d", size, segments), func(b *testing.B) {
				u := newUDPTest(b, nil)
				var datagrams, frames atomic.Int64
				u.tap.count = func(d *stack.Datagram) {
					frames.Add(1)
					datagrams.Add(int64(len(d.Payload) / size))
				}
				bound, _ := u.publish("127.0.0.1:0", Rule{Proto: UDP}, 53)
				c := listenUDP(b, "127.0.0.1:0")
				payload := pattern(size * segments)
				b.SetBytes(int64(len(payload)))
				b.ReportAllocs()
				for b.Loop() {
					sendSegmented(b, c, bound, payload, size)
				}
				b.ReportMetric(float64(datagrams.Load())/b.Elapsed().Seconds(), "datagrams/s")
				b.ReportMetric(float64(datagrams.Load())/float64(frames.Load()), "datagrams/frame")
				b.ReportMetric(float64(datagrams.Load())/float64(b.N*segments), "arrived")
			})
		}
	}
}
