package forward

import (
	"fmt"
	"net"
	"net/netip"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/gofwd/gofwd/netnsutil"
	"github.com/gofwd/gofwd/stack"
)

// tapTest is an engine between the test's host and a real tap in a namespace.
type tapTest struct {
	*udpEngine
	t  testing.TB
	ns *netnsutil.NS
}

func newTapTest(t testing.TB, mtu int) *tapTest {
	ns := newNS(t)
	cfg := stack.Config{Guest: []netip.Addr{guest4, guest6}}
	var mac net.HardwareAddr
	require.NoError(t, ns.Do(func() (err error) {
		cfg.Device, mac, err = stack.OpenTap("tap0", mtu)
		return err
	}))
	cfg.GuestMAC = mac
	u := &tapTest{t: t, ns: ns}
	ready := make(chan struct{})
	cfg.UDP = func(d *stack.Datagram) { <-ready; u.fromNamespace(d) }
	cfg.Idle = func() { <-ready; u.idle() }
	s, err := stack.New(cfg)
	require.NoError(t, err)
	u.udpEngine, err = newUDPEngine(udpConfig{
		Stack:       s,
		MTU:         mtu,
		Batched:     true,
		Source:      func(c netip.AddrPort, _ netip.Addr) netip.AddrPort { return c },
		Destination: func(d netip.AddrPort) (netip.AddrPort, error) { return d, nil },
		Guest: func(is4 bool) netip.Addr {
			if is4 {
				return guest4
			}
			return guest6
		},
	})
	require.NoError(t, err)
	close(ready)
	t.Cleanup(func() {
		u.close()
		require.NoError(t, s.Close())
	})
	require.NoError(t, ns.Configure(netnsutil.Link{
		Name: "tap0", MTU: mtu, HardwareAddr: mac,
		Addrs: []netip.Prefix{netip.PrefixFrom(guest4, 24), netip.PrefixFrom(guest6, 64)},
		Routes: []netnsutil.Route{
			{Dst: netip.MustParsePrefix("0.0.0.0/0"), Via: netip.MustParseAddr("10.0.2.2")},
			{Dst: netip.MustParsePrefix("::/0"), Via: netip.MustParseAddr("fd67:6f66:7764::2")},
		},
	}))
	return u
}

// guestSocket is a UDP socket of the container.
func (u *tapTest) guestSocket(addr netip.AddrPort) (c *net.UDPConn) {
	u.t.Helper()
	require.NoError(u.t, u.ns.Do(func() error {
		c = listenUDP(u.t, addr.String())
		return nil
	}))
	return c
}

// setGRO lets c receive super-frames whole.
func setGRO(t testing.TB, c *net.UDPConn) {
	raw, err := c.SyscallConn()
	require.NoError(t, err)
	require.NoError(t, raw.Control(func(fd uintptr) {
		err = unix.SetsockoptInt(int(fd), unix.SOL_UDP, unix.UDP_GRO, 1)
	}))
	require.NoError(t, err)
}

// readSegmented reads one datagram, or a super-frame with the size of its parts.
func readSegmented(t testing.TB, c *net.UDPConn) (payload []byte, size int, from netip.AddrPort) {
	b, oob := make([]byte, 65536), make([]byte, 128)
	n, oobn, _, from, err := c.ReadMsgUDPAddrPort(b, oob)
	require.NoError(t, err)
	var opt recvOptions
	opt.parse(oob[:oobn])
	return b[:n], opt.segment, netip.AddrPortFrom(from.Addr().Unmap(), from.Port())
}

// The super-frames of a QUIC server in the container, and those of its clients,
// pass unsplit, through a real tap.
func TestUDPSuperFramesThroughTap(t *testing.T) {
	for _, mtu := range []int{1280, 1500, 9000, 65520} {
		t.Run(fmt.Sprint(mtu), func(t *testing.T) {
			families(t, func(t *testing.T, _, guest netip.Addr) {
				routable(t)
				host := routable4
				if guest.Is6() {
					host = routable6
				}
				u := newTapTest(t, mtu)
				server := u.guestSocket(netip.AddrPortFrom(guest, 443))
				conn := listenUDP(t, netip.AddrPortFrom(host, 0).String())
				bound := addrOf(conn)
				require.NoError(t, u.listen(conn, &activeRule{rule: Rule{Proto: UDP}}, 443))
				client := listenUDP(t, netip.AddrPortFrom(host, 0).String())
				setGRO(t, server)
				setGRO(t, client)

				payload := pattern(20*1200 + 7)
				sendSegmented(t, client, bound, payload, 1200)
				got, size, from := readSegmented(t, server)
				require.Equal(t, payload, got)
				require.Equal(t, 1200, size)
				require.Equal(t, addrOf(client), from)
				sendSegmented(t, server, from, payload, 1100)
				got, size, from = readSegmented(t, client)
				require.Equal(t, payload, got)
				require.Equal(t, 1100, size)
				require.Equal(t, bound, from)

				// One datagram that the tap carries in fragments, or not.
				payload = pattern(20_000)
				_, err := client.WriteToUDPAddrPort(payload, bound)
				require.NoError(t, err)
				got, _, from = readSegmented(t, server)
				require.Equal(t, payload, got)
				_, err = server.WriteToUDPAddrPort(payload, from)
				require.NoError(t, err)
				got, _, _ = readSegmented(t, client)
				require.Equal(t, payload, got)
			})
		})
	}
}

// The container's own kernel learns what is wrong with a destination.
func TestUDPErrorsThroughTap(t *testing.T) {
	families(t, func(t *testing.T, _, guest netip.Addr) {
		routable(t)
		host := routable4
		if guest.Is6() {
			host = routable6
		}
		u := newTapTest(t, 1500)
		closed := listenUDP(t, netip.AddrPortFrom(host, 0).String())
		to := addrOf(closed)
		closed.Close()
		var c net.Conn
		require.NoError(t, u.ns.Do(func() (err error) {
			c, err = net.Dial("udp", to.String())
			return err
		}))
		defer c.Close()
		_, err := c.Write([]byte("knock"))
		require.NoError(t, err)
		require.NoError(t, c.SetReadDeadline(time.Now().Add(5*time.Second)))
		_, err = c.Read(make([]byte, 1))
		require.ErrorIs(t, err, unix.ECONNREFUSED)
	})
}

// BenchmarkUDPTap moves datagrams through a real tap, as fast as one sender offers
// them, and counts those that the receiver's kernel took.
func BenchmarkUDPTap(b *testing.B) {
	for _, dir := range []string{"in", "out"} {
		for _, size := range []int{64, 512, 1472} {
			for _, segments := range []int{1, 40} {
				b.Run(fmt.Sprintf("%s/size=%d/segments=%d", dir, size, segments), func(b *testing.B) {
					benchmarkTap(b, dir == "out", size, segments)
				})
			}
		}
	}
}

func benchmarkTap(b *testing.B, out bool, size, segments int) {
	routable(b)
	host := netip.AddrPortFrom(routable4, 0).String()
	u := newTapTest(b, 1500)
	server := u.guestSocket(netip.AddrPortFrom(guest4, 443))
	conn := listenUDP(b, host)
	to := addrOf(conn)
	require.NoError(b, u.listen(conn, &activeRule{rule: Rule{Proto: UDP}}, 443))
	client := listenUDP(b, host)
	send(b, client, to, "hello")
	_, from := readFrom(b, server)
	sender, receiver := client, server
	if out {
		sender, receiver, to = server, client, from
	}
	receiver.SetReadBuffer(4 << 20)
	receiver.SetDeadline(time.Time{})
	sender.SetDeadline(time.Time{})
	setGRO(b, receiver)
	var arrived, reads atomic.Int64
	done := make(chan struct{})
	go func() {
		defer close(done)
		buf := make([]byte, 65536)
		for {
			n, err := receiver.Read(buf)
			if err != nil {
				return
			}
			reads.Add(1)
			arrived.Add(int64(n / size))
		}
	}()
	payload := pattern(size * segments)
	b.SetBytes(int64(len(payload)))
	for b.Loop() {
		sendSegmented(b, sender, to, payload, size)
	}
	b.StopTimer()
	n := float64(arrived.Load())
	b.ReportMetric(n/b.Elapsed().Seconds(), "arrived/s")
	b.ReportMetric(n/float64(b.N*segments), "arrived")
	b.ReportMetric(n/float64(reads.Load()), "datagrams/read")
	receiver.Close()
	<-done
}

// BenchmarkUDPRoundTrip is one query and its answer at a time.
func BenchmarkUDPRoundTrip(b *testing.B) {
	routable(b)
	host := netip.AddrPortFrom(routable4, 0).String()
	u := newTapTest(b, 1500)
	server := u.guestSocket(netip.AddrPortFrom(guest4, 443))
	conn := listenUDP(b, host)
	to := addrOf(conn)
	require.NoError(b, u.listen(conn, &activeRule{rule: Rule{Proto: UDP}}, 443))
	client := listenUDP(b, host)
	client.SetDeadline(time.Time{})
	server.SetDeadline(time.Time{})
	done := make(chan struct{})
	go func() {
		defer close(done)
		for buf := make([]byte, 2048); ; {
			n, from, err := server.ReadFromUDPAddrPort(buf)
			if err != nil {
				return
			}
			server.WriteToUDPAddrPort(buf[:n], from)
		}
	}()
	buf := make([]byte, 64)
	b.ReportAllocs()
	for b.Loop() {
		client.WriteToUDPAddrPort(buf, to)
		client.ReadFromUDPAddrPort(buf)
	}
	server.Close()
	<-done
}
