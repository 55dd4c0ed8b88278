package stack

import (
	"encoding/binary"
	"net/netip"
)

// Whatever address the container looks for on its link, it is behind us: the
// gateway, the resolver, and with copied routes the whole local network. gVisor
// would also answer for the container's own addresses, and so make it give them
// up as duplicates; these answers are few enough to make ourselves.

const arpLen = 28

// handleARP answers an ARP request (RFC 826), unless it is a probe or an
// announcement of the container's own (RFC 5227).
func (e *endpoint) handleARP(b []byte) {
	const ethernetIPv4Request = 0x0001_0800_06_04_0001
	if len(b) < arpLen || binary.BigEndian.Uint64(b) != ethernetIPv4Request {
		e.stats.unknown.Add(1)
		return
	}
	sender, target := netip.AddrFrom4([4]byte(b[14:18])), netip.AddrFrom4([4]byte(b[24:28]))
	if sender.IsUnspecified() || sender == target || e.own[target] {
		return
	}
	f := e.getHdr()
	defer e.putHdr(f)
	clear(f.buf[:vnetHdrLen])
	e.putEth(f.buf[vnetHdrLen:], false)
	binary.BigEndian.PutUint16(f.buf[vnetHdrLen+12:], ethTypeARP)
	var reply [arpLen]byte
	copy(reply[:], b[:6])
	reply[7] = 2 // reply
	copy(reply[8:], e.mac[:])
	copy(reply[14:], b[24:28])
	copy(reply[18:], b[8:18])
	_ = e.write(append(f.iov[:0], f.buf[:vnetHdrLen+ethHdrLen], reply[:]))
}

const (
	ndpRouterSolicit = 133
	ndpSolicit       = 135
	ndpAdvertise     = 136
)

// handleNDP answers a neighbour solicitation (RFC 4861 §7.2). One without a
// source is the container's duplicate address detection: silence is consent.
func (e *endpoint) handleNDP(p *packet) {
	const solicitLen = 24
	if e.noNDP || len(p.l4) < solicitLen || p.hops != 255 || p.src.IsUnspecified() {
		return
	}
	target := netip.AddrFrom16([16]byte(p.l4[8:24]))
	if e.own[target] || target == p.src || target.IsMulticast() {
		return
	}
	const router, solicited, override = 0x80, 0x40, 0x20
	reply := make([]byte, solicitLen+8)
	reply[0], reply[4] = ndpAdvertise, solicited|override
	if e.routerSolicit != nil {
		// Whose answer says that it is no router is none any more: its
		// default route goes (RFC 4861 §7.2.5).
		reply[4] |= router
	}
	copy(reply[8:], p.l4[8:24])
	reply[24], reply[25] = 2, 1 // target link-layer address, 8 bytes
	copy(reply[26:], e.mac[:])
	_ = e.writeNDP(target, p.src, reply)
}

// handleRouterSolicit passes on a router solicitation (RFC 4861 §6.2.6).
func (e *endpoint) handleRouterSolicit(p *packet) {
	if e.routerSolicit != nil && p.l4[1] == 0 && p.hops == 255 {
		e.routerSolicit(p.src)
	}
}

// WriteNDP sends a message of IPv6 neighbour discovery to the container, and fills
// in its checksum. It keeps message no longer than the call.
func (s *Stack) WriteNDP(from, to netip.Addr, message []byte) error {
	return s.ep.writeNDP(from, to, message)
}

func (e *endpoint) writeNDP(from, to netip.Addr, message []byte) error {
	putICMPSum(message, from, to)
	return e.writeIP(ipHdr{src: from, dst: to, proto: protoICMPv6, hops: 255}, message)
}
