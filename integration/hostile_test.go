package integration

import (
	"context"
	"encoding/binary"
	"math/rand/v2"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// hostileBound is the memory that a container may make gofwd take, whatever it
// sends: resident bytes above those of an idle gofwd.
const hostileBound = 256 << 20

// raw sends Ethernet frames of our own making out of the container's tap.
type raw struct {
	fd        int
	mac, gw   net.HardwareAddr // the tap's, and that of gofwd's side
	src, src6 netip.Addr
}

// newRaw opens a packet socket in the container (packet(7)).
func newRaw(t *testing.T, tp *topo) *raw {
	t.Helper()
	r := &raw{src: ipv4.ctr, src6: ipv6.ctr}
	err := tp.ctr.ns.Do(func() error {
		tap, err := net.InterfaceByName("tap0")
		if err != nil {
			return err
		}
		r.mac = tap.HardwareAddr
		if r.fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0); err != nil {
			return err
		}
		return unix.Bind(r.fd, &unix.SockaddrLinklayer{Protocol: 0, Ifindex: tap.Index})
	})
	require.NoError(t, err)
	t.Cleanup(func() { unix.Close(r.fd) })
	// The gateway's address is in the neighbour table once it was spoken to.
	tp.ctr.tryTCP(netip.Addr{}, netip.AddrPortFrom(ipv4.gw, 9), time.Second)
	out := tp.ctr.output(t, "sh", "-c", "ip -4 neigh show "+ipv4.gw.String()+" | sed 's/.*lladdr \\([^ ]*\\).*/\\1/'")
	r.gw, err = net.ParseMAC(out[:17])
	require.NoError(t, err, "%q", out)
	return r
}

// send ignores errors: a full queue of the tap drops the frame, as floods have it.
func (r *raw) send(frame []byte) { _, _ = unix.Write(r.fd, frame) }

// eth puts an Ethernet header before an IP packet.
func (r *raw) eth(dst net.HardwareAddr, etherType uint16, packet []byte) []byte {
	frame := append(append([]byte{}, dst...), r.mac...)
	return append(binary.BigEndian.AppendUint16(frame, etherType), packet...)
}

// ip4 is an IPv4 packet; frag is the field of flags and fragment offset.
func (r *raw) ip4(dst netip.Addr, proto byte, id, frag uint16, payload []byte) []byte {
	h := make([]byte, 20, 20+len(payload))
	h[0], h[8], h[9] = 0x45, 64, proto
	binary.BigEndian.PutUint16(h[2:], uint16(20+len(payload)))
	binary.BigEndian.PutUint16(h[4:], id)
	binary.BigEndian.PutUint16(h[6:], frag)
	copy(h[12:], r.src.AsSlice())
	copy(h[16:], dst.AsSlice())
	binary.BigEndian.PutUint16(h[10:], ^sum(h))
	return append(h, payload...)
}

func (r *raw) ip6(dst netip.Addr, next byte, payload []byte) []byte {
	h := make([]byte, 40, 40+len(payload))
	h[0], h[6], h[7] = 0x60, next, 64
	binary.BigEndian.PutUint16(h[4:], uint16(len(payload)))
	copy(h[8:], r.src6.AsSlice())
	copy(h[24:], dst.AsSlice())
	return append(h, payload...)
}

// sum is the Internet checksum (RFC 1071), not yet inverted.
func sum(parts ...[]byte) uint16 {
	var s uint32
	for _, b := range parts {
		for i := 0; i < len(b); i += 2 {
			w := uint32(b[i]) << 8
			if i+1 < len(b) {
				w |= uint32(b[i+1])
			}
			s += w
		}
	}
	for s > 0xffff {
		s = s>>16 + s&0xffff
	}
	return uint16(s)
}

// l4sum is the checksum of TCP or UDP, with its pseudo header.
func l4sum(src, dst netip.Addr, proto byte, segment []byte) uint16 {
	pseudo := append(src.AsSlice(), dst.AsSlice()...)
	pseudo = binary.BigEndian.AppendUint32(pseudo, uint32(len(segment)))
	pseudo = binary.BigEndian.AppendUint32(pseudo, uint32(proto))
	return ^sum(pseudo, segment)
}

func (r *raw) from(dst netip.Addr) netip.Addr {
	if dst.Is4() {
		return r.src
	}
	return r.src6
}

// syn is the segment that begins a connection.
func (r *raw) syn(sport uint16, dst netip.AddrPort, seq uint32) []byte {
	h := make([]byte, 20)
	binary.BigEndian.PutUint16(h, sport)
	binary.BigEndian.PutUint16(h[2:], dst.Port())
	binary.BigEndian.PutUint32(h[4:], seq)
	h[12], h[13] = 5<<4, 2 // SYN
	binary.BigEndian.PutUint16(h[14:], 64240)
	binary.BigEndian.PutUint16(h[16:], l4sum(r.from(dst.Addr()), dst.Addr(), unix.IPPROTO_TCP, h))
	return h
}

func (r *raw) udp(sport uint16, dst netip.AddrPort, payload []byte) []byte {
	h := make([]byte, 8, 8+len(payload))
	binary.BigEndian.PutUint16(h, sport)
	binary.BigEndian.PutUint16(h[2:], dst.Port())
	binary.BigEndian.PutUint16(h[4:], uint16(8+len(payload)))
	h = append(h, payload...)
	binary.BigEndian.PutUint16(h[6:], l4sum(r.from(dst.Addr()), dst.Addr(), unix.IPPROTO_UDP, h))
	return h
}

// packet is an IP packet of either family around a segment.
func (r *raw) packet(dst netip.Addr, proto byte, segment []byte) (etherType uint16, packet []byte) {
	if dst.Is4() {
		return unix.ETH_P_IP, r.ip4(dst, proto, uint16(rand.Uint32()), 0, segment)
	}
	return unix.ETH_P_IPV6, r.ip6(dst, proto, segment)
}

// requireWorks checks that a container's network is whole: TCP and UDP, in and
// out, both families.
func (tp *topo) requireWorks(t *testing.T) {
	t.Helper()
	for _, f := range []family{ipv4, ipv6} {
		for _, proto := range []string{"tcp", "udp"} {
			got, err := tp.client.who(t, proto, f.client, netip.AddrPortFrom(f.host, 8080))
			require.NoError(t, err, "%s %s in", f.name, proto)
			require.Equal(t, f.client, got.by.Addr())
			_, err = tp.ctr.who(t, proto, netip.Addr{}, netip.AddrPortFrom(f.client, 7000))
			require.NoError(t, err, "%s %s out", f.name, proto)
		}
	}
}

// newHostileTopo has servers for requireWorks.
func newHostileTopo(t *testing.T) (*topo, *gofwd) {
	t.Helper()
	tp := newTopo(t)
	g := tp.attach(t, "-p", "8080:80", "-p", "8080:80/udp", "-p", "8081:81", "--log-level", "info")
	tp.ctr.serveWho(t, 80, ipv4.any, ipv6.any)
	tp.client.serveWho(t, 7000, ipv4.client, ipv6.client)
	tp.requireWorks(t)
	return tp, g
}

// TestForeignMAC: a frame to somebody else's MAC address. It stops the reader of
// gVisor's own link endpoint for good; ours goes on.
func TestForeignMAC(t *testing.T) {
	t.Parallel()
	tp, g := newHostileTopo(t)
	r := newRaw(t, tp)
	for _, mac := range []string{"02:11:22:33:44:55", "ff:ff:ff:ff:ff:ff", "01:00:5e:00:00:01", "33:33:00:00:00:01", "00:00:00:00:00:00"} {
		dst, err := net.ParseMAC(mac)
		require.NoError(t, err)
		for _, to := range []netip.Addr{ipv4.client, ipv6.client} {
			etherType, packet := r.packet(to, unix.IPPROTO_TCP, r.syn(4000, netip.AddrPortFrom(to, 7000), 1))
			for range 100 {
				r.send(r.eth(dst, etherType, packet))
			}
		}
	}
	tp.requireWorks(t)
	require.True(t, g.running())
}

// TestMalformedFrames: frames cut short at every length, lengths and offsets that
// lie, wrong checksums, unknown protocols, noise.
func TestMalformedFrames(t *testing.T) {
	t.Parallel()
	tp, g := newHostileTopo(t)
	r := newRaw(t, tp)
	idle := g.rss(t)
	rnd := rand.New(rand.NewPCG(1, 2))
	var whole [][]byte
	for _, dst := range []netip.Addr{ipv4.client, ipv6.client, ipv4.gw, ipv6.gw, ipv4.dns, ipv6.dns} {
		icmp := byte(unix.IPPROTO_ICMP)
		if dst.Is6() {
			icmp = unix.IPPROTO_ICMPV6
		}
		for _, l4 := range []struct {
			proto   byte
			segment []byte
		}{
			{unix.IPPROTO_TCP, r.syn(4001, netip.AddrPortFrom(dst, 7000), 1)},
			{unix.IPPROTO_UDP, r.udp(4002, netip.AddrPortFrom(dst, 53), noise(9, 64))},
			{icmp, append([]byte{8, 0, 0, 0, 0, 1, 0, 1}, noise(10, 56)...)},
			{icmp, append([]byte{135, 0, 0, 0, 0, 0, 0, 0}, dst.AsSlice()...)}, // NDP solicitation
			{132, noise(11, 40)}, // SCTP
			{0, noise(12, 40)},   // IPv6 hop by hop
			{43, noise(13, 40)},  // IPv6 routing
			{44, noise(14, 40)},  // IPv6 fragment
			{60, noise(15, 40)},  // IPv6 destination options
		} {
			etherType, packet := r.packet(dst, l4.proto, l4.segment)
			whole = append(whole, r.eth(r.gw, etherType, packet))
		}
	}
	whole = append(whole,
		r.eth(r.gw, unix.ETH_P_ARP, noise(16, 28)),
		r.eth(r.gw, unix.ETH_P_8021Q, noise(17, 60)),
		r.eth(r.gw, 0xffff, noise(18, 60)))
	for _, frame := range whole {
		for n := 14; n <= len(frame); n++ { // shorter ones the packet socket refuses
			r.send(frame[:n])
		}
		for range 300 {
			mutant := append([]byte{}, frame...)
			for range 1 + rnd.IntN(4) {
				mutant[14+rnd.IntN(len(mutant)-14)] = byte(rnd.Uint32())
			}
			r.send(mutant)
		}
	}
	for range 3000 {
		frame := r.eth(r.gw, []uint16{unix.ETH_P_IP, unix.ETH_P_IPV6, unix.ETH_P_ARP}[rnd.IntN(3)], noise(rnd.Uint64(), rnd.IntN(1500)))
		r.send(frame)
	}
	tp.requireWorks(t)
	require.True(t, g.running())
	require.Less(t, g.rss(t)-idle, int64(hostileBound))
}

// TestFloods: floods of SYNs, datagrams, pings and fragments. While each runs, a
// second container's transfer goes on; gofwd's memory is bounded; and the
// flooding container's own network is whole again when it ends.
func TestFloods(t *testing.T) {
	const frames = 60_000
	for _, flood := range []struct {
		name  string
		frame func(r *raw, i uint32) []byte
	}{
		{"SYNs to a closed port", func(r *raw, i uint32) []byte {
			dst := netip.AddrPortFrom(ipv4.client, 9)
			return r.eth(r.gw, unix.ETH_P_IP, r.ip4(dst.Addr(), unix.IPPROTO_TCP, uint16(i), 0, r.syn(uint16(i), dst, i)))
		}},
		{"SYNs to silence", func(r *raw, i uint32) []byte {
			dst := netip.AddrPortFrom(addr("192.0.2.128").Next(), uint16(i>>16)+1)
			return r.eth(r.gw, unix.ETH_P_IP, r.ip4(dst.Addr(), unix.IPPROTO_TCP, uint16(i), 0, r.syn(uint16(i), dst, i)))
		}},
		{"SYNs to an open port, never acknowledged", func(r *raw, i uint32) []byte {
			dst := netip.AddrPortFrom(ipv6.client, 7000)
			return r.eth(r.gw, unix.ETH_P_IPV6, r.ip6(dst.Addr(), unix.IPPROTO_TCP, r.syn(uint16(i), dst, i)))
		}},
		{"datagrams from many ports", func(r *raw, i uint32) []byte {
			dst := netip.AddrPortFrom(ipv4.client, uint16(20000+i>>16))
			return r.eth(r.gw, unix.ETH_P_IP, r.ip4(dst.Addr(), unix.IPPROTO_UDP, uint16(i), 0, r.udp(uint16(i), dst, make([]byte, 32))))
		}},
		{"datagrams to many addresses", func(r *raw, i uint32) []byte {
			a := ipv6.silent.As16()
			binary.BigEndian.PutUint32(a[12:], i)
			dst := netip.AddrPortFrom(netip.AddrFrom16(a), 9)
			return r.eth(r.gw, unix.ETH_P_IPV6, r.ip6(dst.Addr(), unix.IPPROTO_UDP, r.udp(uint16(i), dst, make([]byte, 1200))))
		}},
		{"pings", func(r *raw, i uint32) []byte {
			echo := []byte{8, 0, 0, 0, byte(i >> 8), byte(i), byte(i >> 24), byte(i >> 16)}
			binary.BigEndian.PutUint16(echo[2:], ^sum(echo))
			return r.eth(r.gw, unix.ETH_P_IP, r.ip4(ipv4.client, unix.IPPROTO_ICMP, uint16(i), 0, echo))
		}},
		{"first fragments", func(r *raw, i uint32) []byte {
			segment := r.udp(uint16(i), netip.AddrPortFrom(ipv4.client, 9), make([]byte, 1400))
			return r.eth(r.gw, unix.ETH_P_IP, r.ip4(ipv4.client, unix.IPPROTO_UDP, uint16(i), 0x2000, segment)) // MF
		}},
		{"last fragments", func(r *raw, i uint32) []byte {
			return r.eth(r.gw, unix.ETH_P_IP, r.ip4(ipv4.client, unix.IPPROTO_UDP, uint16(i), 0x1f00, make([]byte, 1400)))
		}},
		{"IPv6 fragments", func(r *raw, i uint32) []byte {
			fragment := make([]byte, 8+1400)
			fragment[0], fragment[3] = unix.IPPROTO_UDP, 1 // MF
			binary.BigEndian.PutUint32(fragment[4:], i)
			return r.eth(r.gw, unix.ETH_P_IPV6, r.ip6(ipv6.client, unix.IPPROTO_FRAGMENT, fragment))
		}},
		{"ARP and neighbour solicitations", func(r *raw, i uint32) []byte {
			arp := append([]byte{0, 1, 8, 0, 6, 4, 0, 1}, r.mac...)
			arp = append(append(arp, r.src.AsSlice()...), 0, 0, 0, 0, 0, 0)
			arp = append(arp, 10, 0, byte(i>>8), byte(i))
			return r.eth(net.HardwareAddr{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}, unix.ETH_P_ARP, arp)
		}},
	} {
		t.Run(flood.name, func(t *testing.T) {
			tp, g := newHostileTopo(t)
			victim, _ := newHostileTopo(t)
			r := newRaw(t, tp)
			idle := g.rss(t)

			ctx, cancel := context.WithCancel(t.Context())
			var flooding sync.WaitGroup
			flooding.Go(func() {
				for i := range uint32(frames) {
					if ctx.Err() != nil {
						return
					}
					r.send(flood.frame(r, i))
				}
			})
			var watching sync.WaitGroup
			var most int64
			watching.Go(func() {
				for ctx.Err() == nil {
					most = max(most, g.rss(t)-idle)
					time.Sleep(20 * time.Millisecond)
				}
			})
			victim.requireWorks(t)
			l := victim.ctr.listenTCP(t, ipv4.any, 81)
			client, server := pair(t, victim.client, netip.AddrPortFrom(ipv4.host, 8081), l)
			requireTransfer(t, client, server, noise(20, 8<<20))
			requireTransfer(t, server, client, noise(21, 8<<20))
			flooding.Wait()
			cancel()
			watching.Wait()
			t.Logf("%d MiB above idle", most>>20)
			require.Less(t, most, int64(hostileBound))
			require.True(t, g.running())
			victim.requireWorks(t)
			tp.requireWorks(t)
		})
	}
}
