package stack

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"gvisor.dev/gvisor/pkg/tcpip/checksum"
)

// maxL4 is the longest transport header and payload of a packet from or to addr.
// An IPv4 header counts in the packet's length, an IPv6 header does not.
func maxL4(addr netip.Addr) int {
	if addr.Is4() {
		return maxIPLen - 1 - ip4HdrLen
	}
	return maxIPLen - 1
}

var errTooLong = errors.New("datagram too long")

// handleUDP hands on a datagram, or a super-frame of them as it is.
func (e *endpoint) handleUDP(p *packet) {
	if len(p.l4) < udpHdrLen || e.udp == nil {
		e.stats.malformed.Add(1)
		return
	}
	length := int(binary.BigEndian.Uint16(p.l4[4:]))
	segment := 0
	if p.vnet.gsoType == vnetGSOUDPL4 {
		// The header's length is that of the super-frame, or 0 where it
		// does not fit.
		length, segment = len(p.l4), int(p.vnet.gsoSize)
	}
	if length < udpHdrLen || length > len(p.l4) || p.dstPort() == 0 {
		e.stats.malformed.Add(1)
		return
	}
	e.stats.rxDatagrams.Add(1)
	e.datagram = Datagram{
		Src:         netip.AddrPortFrom(p.src, p.srcPort()),
		Dst:         netip.AddrPortFrom(p.dst, p.dstPort()),
		TTL:         p.hops,
		TOS:         p.tos,
		Payload:     p.l4[udpHdrLen:length],
		SegmentSize: segment, DontFragment: p.df,
	}
	e.udp(&e.datagram)
}

// WriteUDP sends a datagram to the container, or several if d.SegmentSize is set:
// as one super-frame where the device segments UDP, else one by one. Longer ones
// than the MTU are fragmented. d.Src and d.Dst are of one family; d.Dst may be a
// multicast group.
func (s *Stack) WriteUDP(d *Datagram) error {
	if d.Src.Addr().Is4() != d.Dst.Addr().Is4() {
		return fmt.Errorf("write datagram from %s to %s: not of one family", d.Src, d.Dst)
	}
	return s.ep.writeUDP(d)
}

func (e *endpoint) writeUDP(d *Datagram) error {
	segment := d.SegmentSize
	if segment <= 0 || segment >= len(d.Payload) {
		return e.writeDatagrams(d, d.Payload, 0)
	}
	room := e.mtu - ipHdrLen(d.Src.Addr()) - udpHdrLen
	if e.offloads.USO && segment <= room && udpHdrLen+len(d.Payload) <= maxL4(d.Src.Addr()) {
		return e.writeDatagrams(d, d.Payload, segment)
	}
	for p := d.Payload; len(p) > 0; {
		n := min(segment, len(p))
		if err := e.writeDatagrams(d, p[:n], 0); err != nil {
			return err
		}
		p = p[n:]
	}
	return nil
}

// writeDatagrams writes one frame of one datagram, or of several if segment is
// not 0.
func (e *endpoint) writeDatagrams(d *Datagram, payload []byte, segment int) error {
	src, dst := d.Src.Addr(), d.Dst.Addr()
	length := udpHdrLen + len(payload)
	if length > maxL4(src) {
		return errTooLong
	}
	h := ipHdr{src: src, dst: dst, proto: protoUDP, hops: d.TTL, tos: d.TOS, payloadLen: length}
	sum := pseudoSum(src, dst, protoUDP, length)
	if segment == 0 && (d.Checksummed || ipHdrLen(src)+length > e.mtu) {
		l4 := make([]byte, length)
		putUDP(l4, d, length)
		copy(l4[udpHdrLen:], payload)
		binary.BigEndian.PutUint16(l4[6:], nonZero(^checksum.Checksum(l4, sum)))
		return e.writeIP(h, l4)
	}
	f := e.getHdr()
	defer e.putHdr(f)
	e.putEthTo(f.buf[vnetHdrLen:], dst)
	h.id = e.fragID.Add(1)
	n := vnetHdrLen + ethHdrLen
	n += putIP(f.buf[n:], h)
	vnet := vnetHdr{flags: vnetNeedsCsum, csumStart: uint16(n - vnetHdrLen), csumOffset: 6}
	if segment != 0 {
		vnet.gsoType, vnet.gsoSize = vnetGSOUDPL4, uint16(segment)
		vnet.hdrLen = uint16(n + udpHdrLen - vnetHdrLen)
	}
	vnet.encode(f.buf[:])
	putUDP(f.buf[n:], d, length)
	binary.BigEndian.PutUint16(f.buf[n+6:], sum)
	n += udpHdrLen
	return e.write(append(f.iov[:0], f.buf[:n], payload))
}

// putUDP writes a UDP header without its checksum.
func putUDP(b []byte, d *Datagram, length int) {
	binary.BigEndian.PutUint16(b[0:], d.Src.Port())
	binary.BigEndian.PutUint16(b[2:], d.Dst.Port())
	binary.BigEndian.PutUint16(b[4:], uint16(length))
	b[6], b[7] = 0, 0
}

// nonZero is sum, or its other spelling if it is 0, which would say that there is
// none (RFC 768).
func nonZero(sum uint16) uint16 {
	if sum == 0 {
		return 0xffff
	}
	return sum
}
