package stack

import (
	"bytes"
	"net/netip"
	"testing"

	"github.com/stretchr/testify/require"
	"gvisor.dev/gvisor/pkg/buffer"
)

// FuzzFrame gives the endpoint any frame at all, as a hostile container can.
func FuzzFrame(f *testing.F) {
	in, out := netip.AddrPortFrom(guest4, 1000), netip.AddrPortFrom(client4, 2000)
	in6, out6 := netip.AddrPortFrom(guest6, 1000), netip.AddrPortFrom(client6, 2000)
	for _, ip := range [][]byte{
		udpPacket(in, out, []byte("v4")), udpPacket(in6, out6, []byte("v6")),
		synPacket(in, out, 1), synPacket(in6, out6, 1),
	} {
		frame := make([]byte, vnetHdrLen+ethHdrLen)
		copy(frame[vnetHdrLen:], defaultMAC[:])
		frame[vnetHdrLen+12] = 8
		if ip[0]>>4 == 6 {
			frame[vnetHdrLen+12], frame[vnetHdrLen+13] = 0x86, 0xdd
		}
		f.Add(append(frame, ip...))
	}
	dev, _ := Pipe(1500, Offloads{})
	e := newWire(f, Config{
		Device: blackHole{dev},
		UDP:    func(d *Datagram) { _ = bytes.Count(d.Payload, nil) },
		Echo:   func(q *Echo) { _ = bytes.Count(q.Payload, nil) },
		TCP:    func(r *TCPRequest) { r.Reject(nil) },

		RouterSolicit: func(netip.Addr) {},
	}).s.ep
	const headLen = vnetHdrLen + ethHdrLen
	f.Fuzz(func(_ *testing.T, frame []byte) {
		if len(frame) < headLen || len(frame) > headLen+maxIPLen {
			return
		}
		view := buffer.NewViewWithData(frame[headLen:])
		if !e.receive(frame[:headLen], view, len(frame)-headLen) {
			view.Release()
		}
	})
}

// FuzzFragments cuts a datagram in pieces at any places and any order: it comes
// out whole, or not at all.
func FuzzFragments(f *testing.F) {
	f.Add([]byte{1, 2, 3}, uint8(2))
	f.Add([]byte{0, 0, 9, 1}, uint8(1))
	f.Fuzz(func(t *testing.T, moves []byte, unit uint8) {
		payload := bytes.Repeat([]byte("01234567"), 64)
		size := (int(unit)%16 + 1) * 8
		var parts []packet
		for off := 0; off < len(payload); off += size {
			part := payload[off:min(off+size, len(payload))]
			parts = append(parts, packet{src: guest4, dst: client4, proto: protoUDP, fragNext: protoUDP, frag: true, fragOff: off, more: off+size < len(payload), l4: part})
		}
		for i, m := range moves {
			a, b := i%len(parts), int(m)%len(parts)
			parts[a], parts[b] = parts[b], parts[a]
		}
		r := reassembly{drops: &new(counters).fragments}
		for i, p := range parts {
			whole := r.add(&p)
			require.Equal(t, i == len(parts)-1, whole)
			if whole {
				require.Equal(t, payload, p.l4)
			}
		}
		require.Zero(t, r.bytes)
		require.Empty(t, r.byKey)
	})
}
