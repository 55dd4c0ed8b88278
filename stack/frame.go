package stack

import (
	"encoding/binary"
	"net/netip"

	"gvisor.dev/gvisor/pkg/tcpip/checksum"
)

// defaultTTL is that of Linux (net.ipv4.ip_default_ttl).
const defaultTTL = 64

// headroom is the space for the longest headers that we write: virtio, Ethernet,
// IPv6, IPv6 fragment, and a transport header of at most 20 bytes.
const headroom = vnetHdrLen + ethHdrLen + ip6HdrLen + 8 + 20

// frameHdr is the space for the headers of one frame on its way to the container,
// and for the slices of a gathering write. It is pooled: neither allocates.
type frameHdr struct {
	buf [headroom]byte
	iov [8][]byte
}

// ipHdrLen is the size of the IP header that puts addr on the wire.
func ipHdrLen(addr netip.Addr) int {
	if addr.Is4() {
		return ip4HdrLen
	}
	return ip6HdrLen
}

// putEth writes the Ethernet header of a frame to the container.
func (e *endpoint) putEth(b []byte, v6 bool) {
	guest := e.guest.Load()
	copy(b[0:6], guest[:])
	copy(b[6:12], e.mac[:])
	if v6 {
		binary.BigEndian.PutUint16(b[12:], ethTypeIPv6)
	} else {
		binary.BigEndian.PutUint16(b[12:], ethTypeIPv4)
	}
}

// putEthTo writes the Ethernet header of a frame with an IP packet to dst, which may
// be a multicast group (RFC 1112 §6.4, RFC 2464 §7).
func (e *endpoint) putEthTo(b []byte, dst netip.Addr) {
	e.putEth(b, dst.Is6())
	switch {
	case !dst.IsMulticast():
	case dst.Is4():
		a := dst.As4()
		copy(b, []byte{0x01, 0x00, 0x5e, a[1] & 0x7f, a[2], a[3]})
	default:
		a := dst.As16()
		copy(b, []byte{0x33, 0x33, a[12], a[13], a[14], a[15]})
	}
}

// ipHdr are the fields of an IP header that are not always the same.
type ipHdr struct {
	src, dst   netip.Addr
	proto      uint8
	hops, tos  uint8 // hops 0 is defaultTTL
	payloadLen int
	id         uint32 // of an IPv4 packet that may be or is fragmented
	fragOff    int    // in bytes
	more       bool
}

// putIP writes an IPv4 or IPv6 header, without the IPv6 fragment header, and
// returns its length.
func putIP(b []byte, h ipHdr) int {
	if h.hops == 0 {
		h.hops = defaultTTL
	}
	if h.src.Is4() {
		b[0], b[1] = 0x45, h.tos
		binary.BigEndian.PutUint16(b[2:], uint16(ip4HdrLen+h.payloadLen))
		binary.BigEndian.PutUint16(b[4:], uint16(h.id))
		frag := uint16(h.fragOff / 8)
		if h.more {
			frag |= 0x2000
		}
		binary.BigEndian.PutUint16(b[6:], frag)
		b[8], b[9] = h.hops, h.proto
		b[10], b[11] = 0, 0
		s, d := h.src.As4(), h.dst.As4()
		copy(b[12:], s[:])
		copy(b[16:], d[:])
		binary.BigEndian.PutUint16(b[10:], ^checksum.Checksum(b[:ip4HdrLen], 0))
		return ip4HdrLen
	}
	b[0], b[1], b[2], b[3] = 0x60|h.tos>>4, h.tos<<4, 0, 0
	binary.BigEndian.PutUint16(b[4:], uint16(h.payloadLen))
	b[6], b[7] = h.proto, h.hops
	s, d := h.src.As16(), h.dst.As16()
	copy(b[8:], s[:])
	copy(b[24:], d[:])
	return ip6HdrLen
}

// writeIP sends the container one IP packet whose transport header and payload
// are l4, checksum included. It is for what is rare: errors, echo replies.
func (e *endpoint) writeIP(h ipHdr, l4 []byte) error {
	h.payloadLen = len(l4)
	if ipHdrLen(h.src)+len(l4) > e.mtu {
		return e.writeFragments(h, l4)
	}
	f := e.getHdr()
	defer e.putHdr(f)
	clear(f.buf[:vnetHdrLen])
	e.putEthTo(f.buf[vnetHdrLen:], h.dst)
	n := vnetHdrLen + ethHdrLen
	n += putIP(f.buf[n:], h)
	return e.write(append(f.iov[:0], f.buf[:n], l4))
}

// writeFragments sends one packet that is longer than the MTU in pieces.
func (e *endpoint) writeFragments(h ipHdr, l4 []byte) error {
	f := e.getHdr()
	defer e.putHdr(f)
	clear(f.buf[:vnetHdrLen])
	v6 := h.src.Is6()
	e.putEthTo(f.buf[vnetHdrLen:], h.dst)
	h.id = e.fragID.Add(1)
	room := e.mtu - ip4HdrLen
	if v6 {
		room = e.mtu - ip6HdrLen - 8
	}
	room &^= 7 // offsets count 8 bytes
	for off := 0; off < len(l4); off += room {
		part := l4[off:min(off+room, len(l4))]
		h.fragOff, h.more, h.payloadLen = off, off+room < len(l4), len(part)
		n := vnetHdrLen + ethHdrLen
		if v6 {
			whole := h
			whole.proto, whole.payloadLen = protoFragment, len(part)+8
			n += putIP(f.buf[n:], whole)
			n += putFragment(f.buf[n:], h)
		} else {
			n += putIP(f.buf[n:], h)
		}
		if err := e.write(append(f.iov[:0], f.buf[:n], part)); err != nil {
			return err
		}
	}
	return nil
}

// putFragment writes the IPv6 fragment header (RFC 8200 §4.5).
func putFragment(b []byte, h ipHdr) int {
	b[0], b[1] = h.proto, 0
	off := uint16(h.fragOff)
	if h.more {
		off |= 1
	}
	binary.BigEndian.PutUint16(b[2:], off)
	binary.BigEndian.PutUint32(b[4:], h.id)
	return 8
}
