package forward

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/gofwd/gofwd/stack"
)

// sendSegmented sends payload as one super-frame.
func sendSegmented(t testing.TB, c *net.UDPConn, to netip.AddrPort, payload []byte, size int) {
	t.Helper()
	var ctrl cmsgBuf
	opt := sendOptions{segment: size}
	n := opt.put(&ctrl, true)
	_, _, err := c.WriteMsgUDPAddrPort(payload, ctrl.bytes()[:n], to)
	require.NoError(t, err)
}

// pattern is n bytes that tell where they were.
func pattern(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i ^ i>>8)
	}
	return b
}

// What the engine relies on: a super-frame reaches a plain socket as datagrams, and
// a socket with UDP_GRO whole, with the size of its segments.
func TestKernelSegmentsUDP(t *testing.T) {
	families(t, func(t *testing.T, lo, _ netip.Addr) {
		from := listenUDP(t, netip.AddrPortFrom(lo, 0).String())
		payload := pattern(10*1000 + 1)

		plain := listenUDP(t, netip.AddrPortFrom(lo, 0).String())
		sendSegmented(t, from, addrOf(plain), payload, 1000)
		var got []byte
		for i := range 11 {
			p, _ := readFrom(t, plain)
			require.Len(t, p, min(1000, len(payload)-i*1000))
			got = append(got, p...)
		}
		require.Equal(t, payload, got)

		whole := listenUDP(t, netip.AddrPortFrom(lo, 0).String())
		raw, err := whole.SyscallConn()
		require.NoError(t, err)
		raw.Control(func(fd uintptr) {
			require.NoError(t, unix.SetsockoptInt(int(fd), unix.SOL_UDP, unix.UDP_GRO, 1))
		})
		sendSegmented(t, from, addrOf(whole), payload, 1000)
		b, oob := make([]byte, 65536), make([]byte, 128)
		n, oobn, _, _, err := whole.ReadMsgUDPAddrPort(b, oob)
		require.NoError(t, err)
		require.Equal(t, payload, b[:n])
		var opt recvOptions
		opt.parse(oob[:oobn])
		require.Equal(t, 1000, opt.segment)
	})
}

// What goes in as super-frames and single datagrams comes out as the same
// datagrams, in the same order, whatever is joined on the way.
func TestUDPOutboundKeepsDatagrams(t *testing.T) {
	for _, batched := range []bool{false, true} {
		for _, segment := range []bool{false, true} {
			t.Run(fmt.Sprintf("batched=%t,segment=%t", batched, segment), func(t *testing.T) {
				u := newUDPTest(t, func(c *udpConfig) { c.Batched = batched })
				u.segment = segment
				var server [3]*net.UDPConn
				for i := range server {
					server[i] = listenUDP(t, []string{"127.0.0.1:0", "[::1]:0", "127.0.0.1:0"}[i])
				}
				rnd := rand.New(rand.NewPCG(1, 2))
				for range 200 {
					var want [3][]string
					for range 1 + rnd.IntN(8) {
						i := rnd.IntN(3)
						d := stack.Datagram{
							Src: netip.AddrPortFrom(guest4, 4000), Dst: addrOf(server[i]), TTL: 64,
							DontFragment: rnd.IntN(2) == 0,
							Payload:      pattern(rnd.IntN(1000)),
						}
						if i == 1 {
							d.Src = netip.AddrPortFrom(guest6, 4000)
						}
						switch rnd.IntN(3) {
						case 0:
							d.Payload = d.Payload[:min(len(d.Payload), 100)]
						case 1:
							d.SegmentSize = 1 + rnd.IntN(1300)
							d.Payload = pattern(min(d.SegmentSize*(1+rnd.IntN(40)), 40000))
						}
						want[i] = append(want[i], cut(&d)...)
						u.fromNamespace(&d)
						clear(d.Payload) // it is the caller's again
					}
					u.idle()
					for i := range server {
						for _, w := range want[i] {
							got, _ := readFrom(t, server[i])
							require.Equal(t, w, got)
						}
					}
				}
				require.Zero(t, u.dropped.Load())
			})
		}
	}
}

func TestUDPInboundKeepsDatagrams(t *testing.T) {
	families(t, func(t *testing.T, lo, _ netip.Addr) {
		u := newUDPTest(t, nil)
		bound, _ := u.publish(netip.AddrPortFrom(lo, 0).String(), Rule{Proto: UDP}, 53)
		client := [2]*net.UDPConn{}
		for i := range client {
			client[i] = listenUDP(t, netip.AddrPortFrom(lo, 0).String())
		}
		rnd := rand.New(rand.NewPCG(3, 4))
		for range 300 {
			want := map[netip.AddrPort][]string{}
			total := 0
			for range 1 + rnd.IntN(8) {
				c := client[rnd.IntN(2)]
				payload, size := pattern(rnd.IntN(2000)), 0
				if rnd.IntN(3) == 0 {
					size = 1 + rnd.IntN(1300)
					payload = pattern(size*rnd.IntN(40) + 1)
				}
				d := stack.Datagram{Payload: payload, SegmentSize: size}
				want[addrOf(c)] = append(want[addrOf(c)], cut(&d)...)
				total += len(cut(&d))
				sendSegmented(t, c, bound, payload, size)
			}
			for range total {
				d := u.recv()
				require.Equal(t, want[d.src][0], d.payload)
				want[d.src] = want[d.src][1:]
			}
		}
		require.Empty(t, u.tap.got)
	})
}

// Datagrams that wait together cross the tap together.
func TestUDPInboundJoins(t *testing.T) {
	u := newUDPTest(t, nil)
	conn, c := listenUDP(t, "127.0.0.1:0"), listenUDP(t, "127.0.0.1:0")
	big := strings.Repeat("b", 1473) // one byte more than the tap's MTU takes
	for range 8 {
		send(t, c, addrOf(conn), "small")
	}
	for range 8 {
		send(t, c, addrOf(conn), big)
	}
	send(t, c, addrOf(conn), "last")
	require.NoError(t, u.listen(conn, &activeRule{rule: Rule{Proto: UDP}}, 53))
	for range 8 {
		require.Equal(t, 8, u.recv().frame)
	}
	for range 8 {
		require.Equal(t, 1, u.recv().frame)
	}
	require.Equal(t, 1, u.recv().frame)
}

func TestUDPOutboundJoins(t *testing.T) {
	u := newUDPTest(t, func(c *udpConfig) { c.Batched = true })
	server := listenUDP(t, "127.0.0.1:0")
	raw, err := server.SyscallConn()
	require.NoError(t, err)
	raw.Control(func(fd uintptr) { unix.SetsockoptInt(int(fd), unix.SOL_UDP, unix.UDP_GRO, 1) })
	d := &stack.Datagram{Src: netip.AddrPortFrom(guest4, 4000), Dst: addrOf(server), TTL: 64, Payload: []byte("same size")}
	for range 100 {
		u.fromNamespace(d)
	}
	u.idle()
	for _, n := range []int{maxSegments, 100 - maxSegments} {
		got, _ := readFrom(t, server)
		require.Equal(t, strings.Repeat("same size", n), got)
	}
}

func TestUDPNarrowPath(t *testing.T) {
	families(t, func(t *testing.T, lo, guest netip.Addr) {
		const mtu = 1300
		setLoopbackMTU(t, "1300")
		u := newUDPTest(t, nil)
		server := listenUDP(t, netip.AddrPortFrom(lo, 0).String())
		d := &stack.Datagram{Src: netip.AddrPortFrom(guest, 4000), Dst: addrOf(server), TTL: 64, Payload: pattern(1400)}

		u.fromNamespace(d)
		got, _ := readFrom(t, server)
		require.Equal(t, string(d.Payload), got, "fragmented")

		d.Payload, d.SegmentSize = pattern(14000), 1400
		u.fromNamespace(d)
		for range 10 {
			got, _ := readFrom(t, server)
			require.Len(t, got, 1400, "taken apart and fragmented")
		}

		d.DontFragment = true
		want := stack.ICMPError{Type: 3, Code: 4, Info: mtu}
		if lo.Is6() {
			want = stack.ICMPError{Type: 2, Code: 0, Info: mtu}
		}
		for _, d.SegmentSize = range []int{1400, 0} {
			d.Payload = d.Payload[:1400*max(1, d.SegmentSize/140)]
			u.fromNamespace(d)
			e := next(t, u.tap.errs)
			e.icmp.From = netip.Addr{}
			require.Equal(t, want, e.icmp)
			require.Equal(t, d.Src, e.src)
			require.Equal(t, d.Dst, e.dst)
		}
		d.Payload = d.Payload[:1200]
		u.fromNamespace(d)
		got, _ = readFrom(t, server)
		require.Len(t, got, 1200)
	})
}

func FuzzControlMessages(f *testing.F) {
	var c cmsgBuf
	opt := sendOptions{from: localAddr{addr: [16]byte{1, 15: 2}, ifindex: 3}, ttl: 4, tos: 5, segment: 6}
	n := opt.put(&c, false)
	f.Add(bytes.Clone(c.bytes()[:n]))
	n = opt.put(&c, true)
	f.Add(bytes.Clone(c.bytes()[:n]))
	f.Fuzz(func(t *testing.T, b []byte) {
		var opt recvOptions
		var c cmsgBuf
		n := copy(c.bytes(), b)
		opt.parse(c.bytes()[:n])
		var total int
		for rest := c.bytes()[:n]; ; {
			_, _, data, more, ok := nextCmsg(rest)
			if !ok {
				break
			}
			require.Less(t, len(more), len(rest))
			total += len(data)
			rest = more
		}
		require.LessOrEqual(t, total, n)
	})
}

// One batch serves sockets of both families: what is left of a longer address is
// no part of a shorter one.
func TestRecvBatchServesBothFamilies(t *testing.T) {
	b := newRecvBatch()
	for _, lo := range []string{"[::1]:0", "127.0.0.1:0", "[::1]:0"} {
		from, to := listenUDP(t, lo), listenUDP(t, lo)
		fd, err := adoptUDP(to)
		require.NoError(t, err)
		s := &udpSocket{fd: fd, v6: isV6(fd)}
		t.Cleanup(func() { unix.Close(fd) })
		sa, err := unix.Getsockname(fd)
		require.NoError(t, err)
		_, err = from.WriteToUDPAddrPort([]byte("x"), netip.AddrPortFrom(addrOf(from).Addr(), portOf(sa)))
		require.NoError(t, err)
		require.Eventually(t, func() bool { return b.recv(s) == 1 }, time.Second, time.Millisecond)
		var opt recvOptions
		name, _ := b.message(0, &opt)
		require.Equal(t, sockaddrOf(addrOf(from), s.v6), *name, "%s", lo)
	}
}

func portOf(sa unix.Sockaddr) uint16 {
	if sa, ok := sa.(*unix.SockaddrInet6); ok {
		return uint16(sa.Port)
	}
	return uint16(sa.(*unix.SockaddrInet4).Port)
}

func TestSockaddrRoundTrip(t *testing.T) {
	for _, s := range []string{"192.0.2.1:53", "[2001:db8::1]:65535", "[::]:1"} {
		ap := netip.MustParseAddrPort(s)
		a := sockaddrOf(ap, true)
		require.Equal(t, ap, a.addrPort())
		require.Equal(t, ap.Addr().Is4(), a.v4())
		if ap.Addr().Is4() {
			a = sockaddrOf(ap, false)
			require.Equal(t, ap, a.addrPort())
			require.True(t, a.v4())
		}
	}
	require.False(t, new(sockaddr).addrPort().IsValid())
}

func TestSegmentWorks(t *testing.T) {
	for release, works := range map[string]bool{
		"5.10.0-8-amd64":     true,
		"6.18.44":            true,
		"7.0.0-14-generic":   false,
		"7.0.10-arch1-1":     false,
		"7.0.11-arch1-1":     true,
		"7.1.0-rc4":          false,
		"7.1.0-rc5-amd64":    true,
		"7.1.0-rc10":         true,
		"7.1.0":              true,
		"7.1.3-200.fc44":     true,
		"7.2.0-rc1":          true,
		"":                   true,
		"microsoft-standard": true,
	} {
		require.Equal(t, works, segmentWorks(release), release)
	}
}

// A batch serves sockets of both families: of an IPv6 sender nothing is left in
// the name of the IPv4 one that comes next.
func TestRecvBatchBothFamilies(t *testing.T) {
	b := newRecvBatch()
	for _, lo := range []string{"[::1]:0", "127.0.0.1:0", "[::1]:0"} {
		to, from := listenUDP(t, lo), listenUDP(t, lo)
		_, err := from.WriteToUDPAddrPort([]byte("x"), addrOf(to))
		require.NoError(t, err)
		fd, err := adoptUDP(to)
		require.NoError(t, err)
		s := &udpSocket{fd: fd, v6: isV6(fd)}
		require.Eventually(t, func() bool { return b.recv(s) == 1 }, time.Second, time.Millisecond)
		name, _ := b.message(0, new(recvOptions))
		require.Equal(t, sockaddrOf(addrOf(from), s.v6), *name)
		require.NoError(t, unix.Close(fd))
	}
}
