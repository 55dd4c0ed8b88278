package stack

import (
	"encoding/binary"
	"errors"
	"net/netip"

	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
)

const (
	ethHdrLen = 14

	ethTypeIPv4 = 0x0800
	ethTypeARP  = 0x0806
	ethTypeIPv6 = 0x86dd

	protoICMP     = 1
	protoTCP      = 6
	protoUDP      = 17
	protoFragment = 44 // IPv6 fragment header
	protoICMPv6   = 58

	ip4HdrLen = 20
	ip6HdrLen = 40
	udpHdrLen = 8
	tcpHdrLen = 20
)

// maxExtensionHeaders bounds the walk along IPv6 extension headers; Linux sends
// one or two.
const maxExtensionHeaders = 8

var (
	errTruncated = errors.New("truncated packet")
	errMalformed = errors.New("malformed packet")
	errChecksum  = errors.New("wrong checksum")
)

// packet is a parsed IP packet from the container. It points into the frame
// buffer and is valid as long as that is.
type packet struct {
	vnet     vnetHdr
	ip       []byte // the IP packet, trimmed to its own length
	l4       []byte // transport header and payload
	src, dst netip.Addr
	v6       bool
	proto    uint8
	hops     uint8 // TTL or hop limit
	tos      uint8
	df       bool // must not be fragmented on its way

	// Of a fragment (frag is true): where l4 belongs in the whole, in
	// bytes, whether more follow, and the whole's identification.
	frag     bool
	more     bool
	fragOff  int
	fragID   uint32
	fragNext uint8 // protocol of the whole
}

// parse fills p from an IP packet that came with the virtio header vnet. It
// trusts no length that the container wrote.
func (p *packet) parse(vnet vnetHdr, b []byte) error {
	*p = packet{vnet: vnet}
	if len(b) == 0 {
		return errTruncated
	}
	switch b[0] >> 4 {
	case 4:
		return p.parse4(b)
	case 6:
		return p.parse6(b)
	}
	return errMalformed
}

func (p *packet) parse4(b []byte) error {
	if len(b) < ip4HdrLen {
		return errTruncated
	}
	hl, total := int(b[0]&0xf)*4, int(binary.BigEndian.Uint16(b[2:]))
	if hl < ip4HdrLen || total < hl || total > len(b) {
		return errMalformed
	}
	if checksum.Checksum(b[:hl], 0) != 0xffff {
		return errChecksum
	}
	p.ip, p.l4 = b[:total], b[hl:total]
	p.tos, p.hops, p.proto = b[1], b[8], b[9]
	p.src = netip.AddrFrom4([4]byte(b[12:16]))
	p.dst = netip.AddrFrom4([4]byte(b[16:20]))
	const dontFragment, moreFragments, offset = 0x4000, 0x2000, 0x1fff
	p.df = b[6]&(dontFragment>>8) != 0
	if f := binary.BigEndian.Uint16(b[6:]); f&(moreFragments|offset) != 0 {
		p.frag, p.more, p.fragOff = true, f&moreFragments != 0, int(f&offset)*8
		p.fragID, p.fragNext = uint32(binary.BigEndian.Uint16(b[4:])), p.proto
	}
	return nil
}

func (p *packet) parse6(b []byte) error {
	if len(b) < ip6HdrLen {
		return errTruncated
	}
	total := ip6HdrLen + int(binary.BigEndian.Uint16(b[4:]))
	if total > len(b) {
		return errMalformed // jumbograms (length 0, RFC 2675) included
	}
	p.v6, p.ip = true, b[:total]
	p.tos = b[0]<<4 | b[1]>>4
	p.hops = b[7]
	p.src = netip.AddrFrom16([16]byte(b[8:24]))
	p.dst = netip.AddrFrom16([16]byte(b[24:40]))
	next, rest := b[6], b[ip6HdrLen:total]
	for range maxExtensionHeaders {
		switch next {
		case 0, 43, 60: // hop-by-hop, routing, destination options
			if len(rest) < 8 || len(rest) < 8+int(rest[1])*8 {
				return errTruncated
			}
			next, rest = rest[0], rest[8+int(rest[1])*8:]
		case protoFragment:
			if len(rest) < 8 {
				return errTruncated
			}
			f := binary.BigEndian.Uint16(rest[2:])
			p.proto, p.l4 = rest[0], rest[8:]
			p.fragID, p.fragNext = binary.BigEndian.Uint32(rest[4:]), rest[0]
			p.frag, p.more, p.fragOff = true, f&1 != 0, int(f&^7)
			return nil
		default:
			p.proto, p.l4, p.df = next, rest, true
			return nil
		}
	}
	return errMalformed
}

// verify checks the transport checksum, unless the sender's kernel left it to
// be done (it then never left the machine) or has checked it.
func (p *packet) verify() error {
	if p.vnet.flags&(vnetNeedsCsum|vnetDataValid) != 0 {
		return nil
	}
	switch {
	case p.proto == protoUDP && !p.v6 && len(p.l4) >= udpHdrLen && p.l4[6]|p.l4[7] == 0:
		return nil // RFC 768: none was made
	case p.proto == protoICMP:
		if checksum.Checksum(p.l4, 0) != 0xffff {
			return errChecksum
		}
		return nil
	}
	if checksum.Checksum(p.l4, pseudoSum(p.src, p.dst, p.proto, len(p.l4))) != 0xffff {
		return errChecksum
	}
	return nil
}

// pseudoSum is the checksum of the pseudo header (RFC 768, RFC 8200 §8.1).
func pseudoSum(src, dst netip.Addr, proto uint8, length int) uint16 {
	var sum uint16
	if src.Is4() {
		s, d := src.As4(), dst.As4()
		sum = checksum.Checksum(d[:], checksum.Checksum(s[:], 0))
	} else {
		s, d := src.As16(), dst.As16()
		sum = checksum.Checksum(d[:], checksum.Checksum(s[:], 0))
	}
	sum = checksum.Combine(sum, uint16(proto))
	return checksum.Combine(sum, uint16(length))
}

// tcpFlags returns the flags of a TCP packet, and whether it is long enough to
// have any.
func (p *packet) tcpFlags() (header.TCPFlags, bool) {
	if len(p.l4) < tcpHdrLen {
		return 0, false
	}
	return header.TCPFlags(p.l4[13]), true
}

func (p *packet) srcPort() uint16 { return binary.BigEndian.Uint16(p.l4[0:]) }
func (p *packet) dstPort() uint16 { return binary.BigEndian.Uint16(p.l4[2:]) }
