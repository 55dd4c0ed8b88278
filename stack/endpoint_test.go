package stack

import (
	"bytes"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	gstack "gvisor.dev/gvisor/pkg/tcpip/stack"
)

var guestMAC = [6]byte{0x02, 1, 2, 3, 4, 5}

// wire is the container's end of a cable whose other end is a stack.
type wire struct {
	t   testing.TB
	dev Device
	s   *Stack

	group [6]byte // the only MAC address besides the guest's
}

func newWire(t testing.TB, cfg Config) *wire {
	before := goleak.IgnoreCurrent()
	ours, theirs := Pipe(1500, Offloads{Checksum: true, TSO: true, USO: true})
	if cfg.Device == nil {
		cfg.Device = ours
	}
	cfg.GuestMAC = guestMAC[:]
	cfg.Guest = []netip.Addr{guest4, guest6}
	s, err := New(cfg)
	require.NoError(t, err)
	t.Cleanup(func() {
		require.NoError(t, s.Close())
		goleak.VerifyNone(t, before)
	})
	return &wire{t: t, dev: theirs, s: s}
}

// send sends a frame of the container's.
func (w *wire) send(vnet vnetHdr, dst [6]byte, ethType uint16, payload []byte) {
	b := make([]byte, vnetHdrLen+ethHdrLen, vnetHdrLen+ethHdrLen+len(payload))
	vnet.encode(b)
	copy(b[vnetHdrLen:], dst[:])
	copy(b[vnetHdrLen+6:], guestMAC[:])
	binary.BigEndian.PutUint16(b[vnetHdrLen+12:], ethType)
	require.NoError(w.t, w.dev.Write([][]byte{append(b, payload...)}))
}

func (w *wire) sendIP(vnet vnetHdr, ip []byte) {
	w.send(vnet, defaultMAC, ethTypeOf(ip), ip)
}

func ethTypeOf(ip []byte) uint16 {
	if ip[0]>>4 == 6 {
		return ethTypeIPv6
	}
	return ethTypeIPv4
}

// receive returns the next frame to the container: its virtio header, its
// EtherType, and the rest.
func (w *wire) receive() (vnetHdr, uint16, []byte) {
	b := make([]byte, 1<<17)
	type result struct {
		n   int
		err error
	}
	c := make(chan result, 1)
	go func() { n, err := w.dev.Read([][]byte{b}, func() bool { return false }); c <- result{n, err} }()
	select {
	case r := <-c:
		require.NoError(w.t, r.err)
		var h vnetHdr
		h.decode(b)
		f := b[vnetHdrLen:r.n]
		if to := [6]byte(f); to != guestMAC {
			require.Equal(w.t, w.group, to)
		}
		return h, binary.BigEndian.Uint16(f[12:]), f[ethHdrLen:]
	case <-time.After(5 * time.Second):
		w.t.Fatal("no frame came")
		panic("unreachable")
	}
}

func udpPacket(src, dst netip.AddrPort, payload []byte) []byte {
	b := make([]byte, ip6HdrLen+udpHdrLen+len(payload))
	n := putIP(b, ipHdr{src: src.Addr(), dst: dst.Addr(), proto: protoUDP, payloadLen: udpHdrLen + len(payload)})
	l4 := b[n : n+udpHdrLen+len(payload)]
	putUDP(l4, &Datagram{Src: src, Dst: dst}, len(l4))
	copy(l4[udpHdrLen:], payload)
	sum := checksum.Checksum(l4, pseudoSum(src.Addr(), dst.Addr(), protoUDP, len(l4)))
	binary.BigEndian.PutUint16(l4[6:], nonZero(^sum))
	return b[:n+len(l4)]
}

// collect is a Config.UDP that keeps copies.
type collect struct {
	mu  sync.Mutex
	got []Datagram
	c   chan struct{}
}

func newCollect() *collect { return &collect{c: make(chan struct{}, 1000)} }

func (k *collect) take(d *Datagram) {
	k.mu.Lock()
	defer k.mu.Unlock()
	cp := *d
	cp.Payload = bytes.Clone(d.Payload)
	k.got = append(k.got, cp)
	k.c <- struct{}{}
}

func (k *collect) next(t testing.TB) Datagram {
	select {
	case <-k.c:
	case <-time.After(5 * time.Second):
		t.Fatal("no datagram came")
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	d := k.got[0]
	k.got = k.got[1:]
	return d
}

// gVisor's fdbased endpoint stops reading for good at the first frame to a unicast
// address that is not its own: one packet, and the container has no network.
func TestForeignMACDoesNotEndTheLink(t *testing.T) {
	k := newCollect()
	w := newWire(t, Config{UDP: k.take})
	src, dst := netip.AddrPortFrom(guest4, 1000), netip.AddrPortFrom(client4, 2000)
	w.send(vnetHdr{}, [6]byte{0x02, 0xde, 0xad, 0xbe, 0xef, 0x99}, ethTypeIPv4, udpPacket(src, dst, []byte("to somebody else")))
	w.sendIP(vnetHdr{}, udpPacket(src, dst, []byte("to us")))
	require.Equal(t, "to us", string(k.next(t).Payload))
	require.EqualValues(t, 1, w.s.Stats().ForeignMAC)
}

// A wrapper that hides GSOEndpoint makes gVisor send segment by segment, without
// a word.
func TestGSOIsVisibleToGVisor(t *testing.T) {
	w := newWire(t, Config{})
	var ep gstack.LinkEndpoint = w.s.ep
	gso, ok := ep.(gstack.GSOEndpoint)
	require.True(t, ok)
	require.Equal(t, gstack.HostGSOSupported, gso.SupportedGSO())
	require.Greater(t, int(gso.GSOMaxSize()), 60000)
}

func TestARP(t *testing.T) {
	w := newWire(t, Config{})
	request := func(sender, target netip.Addr) []byte {
		b := []byte{0, 1, 8, 0, 6, 4, 0, 1}
		b = append(b, guestMAC[:]...)
		b = append(b, sender.AsSlice()...)
		b = append(b, make([]byte, 6)...)
		return append(b, target.AsSlice()...)
	}
	broadcast := [6]byte{255, 255, 255, 255, 255, 255}
	// Probes and announcements of its own address (RFC 5227), a question for
	// it, and half a request go unanswered: the next answer is to the last.
	w.send(vnetHdr{}, broadcast, ethTypeARP, request(netip.IPv4Unspecified(), guest4))
	w.send(vnetHdr{}, broadcast, ethTypeARP, request(guest4, guest4))
	w.send(vnetHdr{}, broadcast, ethTypeARP, request(netip.MustParseAddr("10.0.2.9"), guest4))
	w.send(vnetHdr{}, broadcast, ethTypeARP, request(guest4, client4)[:20])
	gateway := netip.MustParseAddr("10.0.2.2")
	w.send(vnetHdr{}, broadcast, ethTypeARP, request(guest4, gateway))
	_, ethType, b := w.receive()
	require.EqualValues(t, ethTypeARP, ethType)
	want := []byte{0, 1, 8, 0, 6, 4, 0, 2}
	want = append(want, defaultMAC[:]...)
	want = append(want, gateway.AsSlice()...)
	want = append(want, guestMAC[:]...)
	require.Equal(t, append(want, guest4.AsSlice()...), b)
}

func TestNDP(t *testing.T) {
	w := newWire(t, Config{RouterSolicit: func(netip.Addr) {}})
	solicit := func(src, target netip.Addr) []byte {
		l4 := make([]byte, 32)
		l4[0], l4[24], l4[25] = ndpSolicit, 1, 1
		copy(l4[8:], target.AsSlice())
		copy(l4[26:], guestMAC[:])
		dst := netip.MustParseAddr("ff02::1:ff00:2")
		putICMPSum(l4, src, dst)
		b := make([]byte, ip6HdrLen)
		putIP(b, ipHdr{src: src, dst: dst, proto: protoICMPv6, hops: 255, payloadLen: len(l4)})
		return append(b, l4...)
	}
	gateway := netip.MustParseAddr("fd67:6f66:7764::2")
	w.sendIP(vnetHdr{}, solicit(netip.IPv6Unspecified(), gateway)) // duplicate address detection
	w.sendIP(vnetHdr{}, solicit(gateway, guest6))
	w.sendIP(vnetHdr{}, solicit(guest6, gateway))
	_, _, b := w.receive()
	var p packet
	require.NoError(t, p.parse(vnetHdr{}, b))
	require.NoError(t, p.verify())
	require.Equal(t, gateway, p.src)
	require.Equal(t, guest6, p.dst)
	require.EqualValues(t, ndpAdvertise, p.l4[0])
	require.EqualValues(t, 0xe0, p.l4[4], "a router, solicited, override")
	require.Equal(t, defaultMAC[:], p.l4[26:32])
}

// What a container that configures itself needs of the link: its solicitation is
// passed on, and the answer has our MAC address, and a whole checksum where a
// packet socket looks at that.
func TestServicesOnTheLink(t *testing.T) {
	mac := [6]byte{2, 1, 2, 3, 4, 5}
	solicited := make(chan netip.Addr, 8)
	w := newWire(t, Config{
		GatewayMAC: mac[:], NoNDP: true,
		RouterSolicit: func(from netip.Addr) { solicited <- from },
	})
	require.Equal(t, mac[:], []byte(w.s.GatewayMAC()))
	link, router := netip.MustParseAddr("fe80::5"), netip.MustParseAddr("fe80::1")
	ndp := func(kind, hops uint8, src netip.Addr) []byte {
		l4 := make([]byte, 24)
		l4[0] = kind
		copy(l4[8:], router.AsSlice())
		dst := netip.MustParseAddr("ff02::2")
		putICMPSum(l4, src, dst)
		b := make([]byte, ip6HdrLen)
		putIP(b, ipHdr{src: src, dst: dst, proto: protoICMPv6, hops: hops, payloadLen: len(l4)})
		return append(b, l4...)
	}
	toRouters := [6]byte{0x33, 0x33, 0, 0, 0, 2}
	w.send(vnetHdr{}, toRouters, ethTypeIPv6, ndp(ndpSolicit, 255, link)) // unanswered: NoNDP
	w.send(vnetHdr{}, toRouters, ethTypeIPv6, ndp(ndpRouterSolicit, 64, guest6))
	w.send(vnetHdr{}, toRouters, ethTypeIPv6, ndp(ndpRouterSolicit, 255, link))
	require.Equal(t, link, <-solicited, "not the one that came over a router")

	require.NoError(t, w.s.WriteNDP(router, link, make([]byte, 16)))
	_, _, b := w.receive()
	var p packet
	require.NoError(t, p.parse(vnetHdr{}, b))
	require.NoError(t, p.verify())
	require.EqualValues(t, 255, p.hops)

	require.NoError(t, w.s.WriteUDP(&Datagram{
		Src: netip.AddrPortFrom(client4, 67), Dst: netip.MustParseAddrPort("255.255.255.255:68"),
		Payload: []byte("lease"), Checksummed: true,
	}))
	h, _, b := w.receive()
	require.Zero(t, h.flags&vnetNeedsCsum)
	require.NoError(t, p.parse(h, b))
	require.NotZero(t, p.l4[6]|p.l4[7])
	require.NoError(t, p.verify())
}

func TestUDPBothWays(t *testing.T) {
	k := newCollect()
	w := newWire(t, Config{UDP: k.take})
	for _, f := range families {
		in, out := netip.AddrPortFrom(f.guest, 1000), netip.AddrPortFrom(f.client, 2000)
		w.sendIP(vnetHdr{}, udpPacket(in, out, []byte("question")))
		d := k.next(t)
		require.Equal(t, in, d.Src)
		require.Equal(t, out, d.Dst)
		require.Equal(t, "question", string(d.Payload))

		require.NoError(t, w.s.WriteUDP(&Datagram{Src: out, Dst: in, Payload: []byte("answer"), TOS: 0x12}))
		vnet, _, b := w.receive()
		var p packet
		require.NoError(t, p.parse(vnet, b))
		require.Equal(t, out.Addr(), p.src)
		require.EqualValues(t, 0x12, p.tos)
		require.Equal(t, "answer", string(p.l4[udpHdrLen:]))
		// What the kernel finishes is what gVisor computes in full.
		require.EqualValues(t, vnetNeedsCsum, vnet.flags)
		binary.BigEndian.PutUint16(p.l4[6:], ^checksum.Checksum(p.l4, 0))
		p.vnet = vnetHdr{}
		require.NoError(t, p.verify())
	}
}

// A datagram to a group is in frames to the group, in fragments too.
func TestUDPToGroup(t *testing.T) {
	w := newWire(t, Config{})
	for _, c := range []struct {
		group, client string
		mac           [6]byte
	}{
		{"239.129.2.3", "192.0.2.1", [6]byte{0x01, 0x00, 0x5e, 0x01, 0x02, 0x03}}, // RFC 1112: 23 bits
		{"ff02::1:fffb", "fe80::1", [6]byte{0x33, 0x33, 0x00, 0x01, 0xff, 0xfb}},
	} {
		w.group = c.mac
		d := Datagram{
			Src: netip.AddrPortFrom(netip.MustParseAddr(c.client), 1000), Dst: netip.AddrPortFrom(netip.MustParseAddr(c.group), 5353),
			TTL: 1, Payload: make([]byte, 2000),
		}
		for _, size := range []int{10, 2000} {
			d.Payload = d.Payload[:size]
			require.NoError(t, w.s.WriteUDP(&d))
			for got := 0; got < size; {
				vnet, _, b := w.receive()
				var p packet
				require.NoError(t, p.parse(vnet, b))
				require.Equal(t, d.Dst.Addr(), p.dst)
				require.Equal(t, d.Src.Addr(), p.src)
				require.EqualValues(t, 1, p.hops)
				got += len(p.l4)
			}
		}
	}
}

func TestUDPSuperFrame(t *testing.T) {
	k := newCollect()
	w := newWire(t, Config{UDP: k.take})
	in, out := netip.AddrPortFrom(guest6, 1000), netip.AddrPortFrom(client6, 2000)
	payload := bytes.Repeat([]byte("0123456789"), 500)
	w.sendIP(vnetHdr{flags: vnetNeedsCsum, gsoType: vnetGSOUDPL4, gsoSize: 1200}, udpPacket(in, out, payload))
	d := k.next(t)
	require.Equal(t, 1200, d.SegmentSize)
	require.Equal(t, payload, d.Payload)

	require.NoError(t, w.s.WriteUDP(&Datagram{Src: out, Dst: in, Payload: payload, SegmentSize: 1200}))
	vnet, _, b := w.receive()
	require.EqualValues(t, vnetGSOUDPL4, vnet.gsoType)
	require.EqualValues(t, 1200, vnet.gsoSize)
	require.Equal(t, payload, b[ip6HdrLen+udpHdrLen:])

	// What came over IPv6 can be too long for one of IPv4.
	payload = bytes.Repeat([]byte("0123456789"), 6552)
	in, out = netip.AddrPortFrom(guest4, 1000), netip.AddrPortFrom(client4, 2000)
	require.NoError(t, w.s.WriteUDP(&Datagram{Src: out, Dst: in, Payload: payload, SegmentSize: 1200}))
	for len(payload) > 0 {
		_, _, b := w.receive()
		b = b[ip4HdrLen+udpHdrLen:]
		require.Equal(t, payload[:len(b)], b)
		payload = payload[len(b):]
	}
}

// What goes in as fragments comes out as the datagram, in any order, and the
// other way round.
func TestFragments(t *testing.T) {
	k := newCollect()
	w := newWire(t, Config{UDP: k.take})
	for _, f := range families {
		in, out := netip.AddrPortFrom(f.guest, 1000), netip.AddrPortFrom(f.client, 2000)
		payload := bytes.Repeat([]byte("fragment"), 1000)
		require.NoError(t, w.s.WriteUDP(&Datagram{Src: out, Dst: in, Payload: payload}))
		var frames [][]byte
		for size := 0; size < len(payload)+udpHdrLen; {
			_, _, b := w.receive()
			require.LessOrEqual(t, len(b), 1500)
			var p packet
			require.NoError(t, p.parse(vnetHdr{}, b))
			require.True(t, p.frag)
			size += len(p.l4)
			// Turn it round: it now is the container's.
			frames = append(frames, turn(b))
		}
		require.Len(t, frames, 6)
		for _, i := range []int{3, 0, 5, 1, 4, 2} {
			w.sendIP(vnetHdr{}, frames[i])
		}
		d := k.next(t)
		require.Equal(t, payload, d.Payload)
		require.Equal(t, in.Addr(), d.Src.Addr())
	}
}

func TestLongestDatagrams(t *testing.T) {
	k := newCollect()
	w := newWire(t, Config{UDP: k.take})
	for _, f := range families {
		in, out := netip.AddrPortFrom(f.guest, 1000), netip.AddrPortFrom(f.client, 2000)
		payload := make([]byte, maxL4(f.guest)-udpHdrLen)
		rand.Read(payload)
		require.NoError(t, w.s.WriteUDP(&Datagram{Src: out, Dst: in, Payload: payload}))
		for size := 0; size < len(payload)+udpHdrLen; {
			_, _, b := w.receive()
			var p packet
			require.NoError(t, p.parse(vnetHdr{}, b))
			size += len(p.l4)
			w.sendIP(vnetHdr{}, turn(b))
		}
		require.Equal(t, payload, k.next(t).Payload)
		require.Error(t, w.s.WriteUDP(&Datagram{Src: out, Dst: in, Payload: append(payload, 0)}))
	}
}

// turn exchanges source and destination of an IP packet, which leaves its
// checksums right.
func turn(b []byte) []byte {
	b = bytes.Clone(b)
	off, n := 12, 4
	if b[0]>>4 == 6 {
		off, n = 8, 16
	}
	src := bytes.Clone(b[off : off+n])
	copy(b[off:], b[off+n:off+2*n])
	copy(b[off+n:], src)
	return b
}

func TestFragmentsAreBounded(t *testing.T) {
	k := newCollect()
	w := newWire(t, Config{UDP: k.take})
	drops := &w.s.stats.fragments
	r := reassembly{drops: drops}
	now := time.Unix(0, 0)
	r.now = func() time.Time { return now }
	p := packet{src: guest4, dst: client4, frag: true, more: true, fragOff: 8, l4: make([]byte, 1400)}
	for i := range 100_000 {
		p.fragID = uint32(i)
		require.False(t, r.add(&p))
	}
	require.LessOrEqual(t, r.bytes, maxFragmentBytes)
	require.LessOrEqual(t, len(r.order), maxPartials)
	require.Len(t, r.byKey, len(r.order))
	now = now.Add(fragmentTimeout + time.Second)
	p.fragID++
	r.add(&p)
	require.Len(t, r.order, 1)
}

func TestOverlappingFragmentsAreDropped(t *testing.T) {
	r := reassembly{drops: &new(counters).fragments}
	add := func(off, n int, more bool) bool {
		return r.add(&packet{src: guest6, dst: client6, v6: true, frag: true, more: more, fragOff: off, l4: make([]byte, n)})
	}
	require.False(t, add(0, 16, true))
	require.False(t, add(8, 16, false))
	require.Empty(t, r.order) // RFC 5722
	require.False(t, add(16, 8, false))
	require.True(t, add(0, 16, true))
}

func synPacket(src, dst netip.AddrPort, seq uint32) []byte {
	b := make([]byte, ip6HdrLen+tcpHdrLen)
	n := putIP(b, ipHdr{src: src.Addr(), dst: dst.Addr(), proto: protoTCP, payloadLen: tcpHdrLen})
	l4 := b[n : n+tcpHdrLen]
	binary.BigEndian.PutUint16(l4[0:], src.Port())
	binary.BigEndian.PutUint16(l4[2:], dst.Port())
	binary.BigEndian.PutUint32(l4[4:], seq)
	l4[12], l4[13] = 5<<4, 2
	binary.BigEndian.PutUint16(l4[14:], 65535)
	binary.BigEndian.PutUint16(l4[16:], ^checksum.Checksum(l4, pseudoSum(src.Addr(), dst.Addr(), protoTCP, tcpHdrLen)))
	return b[:n+tcpHdrLen]
}

func TestSYNIsHeld(t *testing.T) {
	requests := make(chan *TCPRequest, 10)
	w := newWire(t, Config{TCP: func(r *TCPRequest) { requests <- r }})
	for _, f := range families {
		src, dst := netip.AddrPortFrom(f.guest, 1000), netip.AddrPortFrom(f.client, 80)
		w.sendIP(vnetHdr{}, synPacket(src, dst, 1))
		first := <-requests
		require.Equal(t, src, first.Src)
		require.Equal(t, dst, first.Dst)
		// A retransmission is the same request, another sequence number a
		// new one, which makes the first pointless.
		w.sendIP(vnetHdr{}, synPacket(src, dst, 1))
		w.sendIP(vnetHdr{}, synPacket(src, dst, 2))
		second := <-requests
		<-first.Context().Done()
		require.NoError(t, second.Context().Err())
		require.ErrorIs(t, first.Release(), net.ErrClosed)

		// Released, it comes back as it was, addresses not exchanged.
		require.NoError(t, second.Release())
		vnet, _, b := w.receive()
		require.EqualValues(t, vnetNeedsCsum, vnet.flags)
		var p packet
		require.NoError(t, p.parse(vnet, b))
		require.Equal(t, src.Addr(), p.src)
		require.EqualValues(t, 2, binary.BigEndian.Uint32(p.l4[4:]))
		// And so does its retransmission, until it is done with.
		w.sendIP(vnetHdr{}, synPacket(src, dst, 2))
		_, _, b = w.receive()
		require.NoError(t, p.parse(vnet, b))
		second.Done()
		w.sendIP(vnetHdr{}, synPacket(src, dst, 2))
		third := <-requests
		third.Reject(nil)
		_, _, b = w.receive()
		require.NoError(t, p.parse(vnetHdr{}, b))
		require.NoError(t, p.verify())
		require.EqualValues(t, 0x14, p.l4[13]) // RST, ACK
		require.EqualValues(t, 3, binary.BigEndian.Uint32(p.l4[8:]))
	}
	require.Empty(t, requests)
}

// gVisor's forwarder is usually given room for 10 half-open connections, which
// loses most of a burst.
func TestSYNBurst(t *testing.T) {
	requests, late := make(chan *TCPRequest, 1000), make(chan *TCPRequest, 1)
	w := newWire(t, Config{TCP: func(r *TCPRequest) {
		to := requests
		if r.Dst.Port() == 82 {
			to = late
		}
		select {
		case to <- r:
		default:
		}
	}})
	for i := range 1000 {
		w.sendIP(vnetHdr{}, synPacket(netip.AddrPortFrom(guest4, uint16(1000+i)), netip.AddrPortFrom(client4, 80), 1))
	}
	for range 1000 {
		<-requests
	}
	require.Zero(t, w.s.Stats().SYNs)
	// A flood stops at the limit, and memory with it.
	for i := range 60000 {
		if i%1000 == 0 {
			time.Sleep(time.Millisecond) // the pipe is no longer than a tap's queue
		}
		w.sendIP(vnetHdr{}, synPacket(netip.AddrPortFrom(guest4, uint16(i)), netip.AddrPortFrom(client4, 81), 1))
	}
	require.Eventually(t, func() bool { return w.s.Stats().SYNs > 0 }, 5*time.Second, time.Millisecond)
	// But those that the world does not answer make way, later on.
	w.s.syn.mu.Lock()
	require.Len(t, w.s.syn.held, maxHeld)
	w.s.syn.now = func() time.Time { return time.Now().Add(heldAtLeast) }
	w.s.syn.mu.Unlock()
	require.Eventually(t, func() bool {
		w.sendIP(vnetHdr{}, synPacket(netip.AddrPortFrom(guest4, 1000), netip.AddrPortFrom(client4, 82), 1))
		return len(late) > 0
	}, 5*time.Second, 10*time.Millisecond, "dropped")
	w.s.syn.mu.Lock()
	defer w.s.syn.mu.Unlock()
	require.Len(t, w.s.syn.held, maxHeld)
}

func TestMalformedFramesCostNothing(t *testing.T) {
	k := newCollect()
	w := newWire(t, Config{UDP: k.take})
	src, dst := netip.AddrPortFrom(guest4, 1000), netip.AddrPortFrom(client4, 2000)
	good := udpPacket(src, dst, []byte("good"))
	for n := range len(good) {
		w.sendIP(vnetHdr{}, good[:max(n, 1)])
	}
	for i := range good {
		bad := bytes.Clone(good)
		bad[i] ^= 0x55
		w.send(vnetHdr{}, defaultMAC, ethTypeIPv4, bad)
	}
	w.sendIP(vnetHdr{}, good)
	require.Equal(t, "good", string(k.next(t).Payload))
	require.Empty(t, k.got)
}

func TestICMPErrors(t *testing.T) {
	w := newWire(t, Config{})
	for _, f := range families {
		in, out := netip.AddrPortFrom(f.guest, 1000), netip.AddrPortFrom(f.client, 2000)
		router := netip.MustParseAddr("192.0.2.1")
		typ, proto := uint8(11), uint8(protoICMP)
		if f.guest.Is6() {
			router, typ, proto = netip.MustParseAddr("2001:db8::1"), 3, protoICMPv6
		}
		q := Datagram{Src: in, Dst: out, TTL: 3, Payload: []byte("probe")}
		require.NoError(t, w.s.WriteUDPError(&q, ICMPError{From: router, Type: typ}))
		_, _, b := w.receive()
		var p packet
		require.NoError(t, p.parse(vnetHdr{}, b))
		require.NoError(t, p.verify())
		require.Equal(t, router, p.src)
		require.Equal(t, proto, p.proto)
		require.Equal(t, typ, p.l4[0])
		var quoted packet
		require.NoError(t, quoted.parse(vnetHdr{}, bytes.Clone(p.l4[icmpHdrLen:])))
		require.Equal(t, in.Addr(), quoted.src)
		require.Equal(t, out.Port(), quoted.dstPort())
		require.EqualValues(t, 3, quoted.hops)
	}
}

func TestEcho(t *testing.T) {
	got := make(chan Echo, 1)
	w := newWire(t, Config{Echo: func(q *Echo) {
		c := *q
		c.Payload = bytes.Clone(q.Payload)
		got <- c
	}})
	for _, f := range families {
		q := Echo{Src: f.guest, Dst: f.client, ID: 7, Seq: 8, Payload: []byte("ping")}
		l4 := echoMessage(&q, true)
		b := make([]byte, ipHdrLen(f.guest))
		putIP(b, ipHdr{src: q.Src, dst: q.Dst, proto: icmpProto(q.Src), hops: 5, payloadLen: len(l4)})
		w.sendIP(vnetHdr{}, append(b, l4...))
		r := <-got
		q.TTL = 5
		require.Equal(t, q, r)

		require.NoError(t, w.s.WriteEcho(&Echo{Src: q.Dst, Dst: q.Src, ID: 7, Seq: 8, TTL: 50, Payload: q.Payload}))
		_, _, b = w.receive()
		var p packet
		require.NoError(t, p.parse(vnetHdr{}, b))
		require.NoError(t, p.verify())
		require.EqualValues(t, 50, p.hops)
		require.Equal(t, "ping", string(p.l4[icmpHdrLen:]))
	}
}

type fullDisk struct{ left int }

func (w *fullDisk) Write(b []byte) (int, error) {
	if w.left -= len(b); w.left < 0 {
		return 0, errors.New("no space left on device")
	}
	return len(b), nil
}

func TestCaptureThatFailsLeavesTheTrafficAlone(t *testing.T) {
	var log bytes.Buffer
	k := newCollect()
	w := newWire(t, Config{UDP: k.take, Logger: slog.New(slog.NewTextHandler(&log, nil))})
	stop := w.s.Capture(&fullDisk{left: 200})
	for range 100 {
		w.sendIP(vnetHdr{}, udpPacket(netip.AddrPortFrom(guest4, 1), netip.AddrPortFrom(client4, 2), []byte("x")))
		k.next(t)
	}
	stop()
	require.Contains(t, log.String(), "no space left on device")
}

func TestCapture(t *testing.T) {
	k := newCollect()
	w := newWire(t, Config{UDP: k.take})
	var out bytes.Buffer
	stop := w.s.Capture(&out)
	b := udpPacket(netip.AddrPortFrom(guest4, 1), netip.AddrPortFrom(client4, 2), []byte("seen"))
	w.sendIP(vnetHdr{}, b)
	k.next(t)
	stop()
	require.Len(t, out.Bytes(), 24+16+ethHdrLen+len(b))
	require.Equal(t, b, out.Bytes()[24+16+ethHdrLen:])
}

// The inner loops allocate nothing for UDP.
func TestUDPDoesNotAllocate(t *testing.T) {
	n := 0
	dev, _ := Pipe(1500, Offloads{})
	e := newWire(t, Config{Device: blackHole{dev}, UDP: func(*Datagram) { n++ }}).s.ep
	for _, f := range families {
		in, out := netip.AddrPortFrom(f.guest, 1000), netip.AddrPortFrom(f.client, 2000)
		b := udpPacket(in, out, make([]byte, 1000))
		d := &Datagram{Src: out, Dst: in, Payload: make([]byte, 1000)}
		view := buffer.NewViewWithData(b)
		require.Zero(t, testing.AllocsPerRun(1000, func() {
			_ = e.writeUDP(d)
			head := e.getHdr()
			copy(head.buf[vnetHdrLen:], defaultMAC[:])
			copy(head.buf[vnetHdrLen+6:], guestMAC[:])
			binary.BigEndian.PutUint16(head.buf[vnetHdrLen+12:], ethTypeOf(b))
			e.receive(head.buf[:vnetHdrLen+ethHdrLen], view, len(b))
			clear(head.buf[:])
			e.putHdr(head)
		}), f.name)
	}
	require.NotZero(t, n)
}

type blackHole struct{ Device }

func (blackHole) Write([][]byte) error { return nil }
