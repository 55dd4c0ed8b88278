package stack

import (
	"encoding/binary"
	"net/netip"

	"gvisor.dev/gvisor/pkg/tcpip/checksum"
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
	copy(reply[8:], gatewayMAC[:])
	copy(reply[14:], b[24:28])
	copy(reply[18:], b[8:18])
	_ = e.write(append(f.iov[:0], f.buf[:vnetHdrLen+ethHdrLen], reply[:]))
}

const (
	ndpSolicit   = 135
	ndpAdvertise = 136
)

// handleNDP answers a neighbour solicitation (RFC 4861 §7.2). One without a
// source is the container's duplicate address detection: silence is consent.
func (e *endpoint) handleNDP(p *packet) {
	const solicitLen = 24
	if p.l4[0] != ndpSolicit || len(p.l4) < solicitLen || p.hops != 255 || p.src.IsUnspecified() {
		return
	}
	target := netip.AddrFrom16([16]byte(p.l4[8:24]))
	if e.own[target] || target == p.src || target.IsMulticast() {
		return
	}
	const solicited, override = 0x40, 0x20
	reply := make([]byte, solicitLen+8)
	reply[0], reply[4] = ndpAdvertise, solicited|override
	copy(reply[8:], p.l4[8:24])
	reply[24], reply[25] = 2, 1 // target link-layer address, 8 bytes
	copy(reply[26:], gatewayMAC[:])
	sum := checksum.Checksum(reply, pseudoSum(target, p.src, protoICMPv6, len(reply)))
	binary.BigEndian.PutUint16(reply[2:], ^sum)
	_ = e.writeIP(ipHdr{src: target, dst: p.src, proto: protoICMPv6, hops: 255}, reply)
}
