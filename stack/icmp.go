package stack

import (
	"encoding/binary"
	"net/netip"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
)

const (
	icmpHdrLen = 8

	icmpEchoReply    = 0
	icmpUnreachable  = 3
	icmpEcho         = 8
	icmp6Unreachable = 1
	icmp6TooBig      = 2
	icmp6Echo        = 128
	icmp6EchoReply   = 129

	icmpCodeHost       = 1  // host unreachable
	icmpCodeNet        = 0  // net unreachable, and ICMPv6 no route
	icmpCodeProhibited = 13 // communication administratively prohibited
	icmp6CodeAddress   = 3  // address unreachable
	icmp6CodeProhibit  = 1
)

// handleICMP takes echo requests out, and gives errors to gVisor, which knows
// the TCP connections that they are about.
func (e *endpoint) handleICMP(p *packet, view *buffer.View) (kept bool) {
	if len(p.l4) < icmpHdrLen {
		e.stats.malformed.Add(1)
		return false
	}
	switch p.l4[0] {
	case icmpEcho:
		e.handleEcho(p)
	case icmpUnreachable:
		return e.inject(false, p.ip, view)
	default:
		e.stats.unknown.Add(1)
	}
	return false
}

func (e *endpoint) handleICMPv6(p *packet, view *buffer.View) (kept bool) {
	if len(p.l4) < icmpHdrLen {
		e.stats.malformed.Add(1)
		return false
	}
	switch p.l4[0] {
	case icmp6Echo:
		e.handleEcho(p)
	case icmp6Unreachable, icmp6TooBig:
		return e.inject(true, p.ip, view)
	case ndpSolicit:
		e.handleNDP(p)
	case ndpRouterSolicit:
		e.handleRouterSolicit(p)
	default:
		e.stats.unknown.Add(1)
	}
	return false
}

func (e *endpoint) handleEcho(p *packet) {
	if e.echo == nil {
		return
	}
	e.ping = Echo{
		Src: p.src, Dst: p.dst, TTL: p.hops,
		ID:      binary.BigEndian.Uint16(p.l4[4:]),
		Seq:     binary.BigEndian.Uint16(p.l4[6:]),
		Payload: p.l4[icmpHdrLen:],
	}
	e.echo(&e.ping)
}

// echoMessage writes an echo request or reply.
func echoMessage(q *Echo, request bool) []byte {
	b := make([]byte, icmpHdrLen+len(q.Payload))
	v6 := q.Dst.Is6()
	switch {
	case v6 && request:
		b[0] = icmp6Echo
	case v6:
		b[0] = icmp6EchoReply
	case request:
		b[0] = icmpEcho
	default:
		b[0] = icmpEchoReply
	}
	binary.BigEndian.PutUint16(b[4:], q.ID)
	binary.BigEndian.PutUint16(b[6:], q.Seq)
	copy(b[icmpHdrLen:], q.Payload)
	putICMPSum(b, q.Src, q.Dst)
	return b
}

// putICMPSum writes the checksum of an ICMP or ICMPv6 message.
func putICMPSum(b []byte, src, dst netip.Addr) {
	b[2], b[3] = 0, 0
	var sum uint16
	if src.Is6() {
		sum = pseudoSum(src, dst, protoICMPv6, len(b))
	}
	binary.BigEndian.PutUint16(b[2:], ^checksum.Checksum(b, sum))
}

// icmpProto is the protocol number of ICMP in addr's family.
func icmpProto(addr netip.Addr) uint8 {
	if addr.Is6() {
		return protoICMPv6
	}
	return protoICMP
}

// WriteEcho sends an echo reply to the container.
func (s *Stack) WriteEcho(q *Echo) error {
	return s.ep.writeIP(ipHdr{src: q.Src, dst: q.Dst, proto: icmpProto(q.Src), hops: q.TTL}, echoMessage(q, false))
}

// WriteUDPError tells the container what became of a datagram. d is the datagram
// as it left the container; its payload need not be complete.
func (s *Stack) WriteUDPError(d *Datagram, ie ICMPError) error {
	l4 := make([]byte, udpHdrLen, udpHdrLen+len(d.Payload))
	putUDP(l4, d, udpHdrLen+len(d.Payload))
	l4 = append(l4, d.Payload...)
	return s.ep.writeError(ipHdr{src: d.Src.Addr(), dst: d.Dst.Addr(), proto: protoUDP, hops: d.TTL, tos: d.TOS}, l4, ie)
}

// WriteEchoError tells the container what became of an echo request.
func (s *Stack) WriteEchoError(q *Echo, ie ICMPError) error {
	return s.ep.writeError(ipHdr{src: q.Src, dst: q.Dst, proto: icmpProto(q.Src), hops: q.TTL}, echoMessage(q, true), ie)
}

// writeError sends an ICMP error about a packet with header h and content l4.
func (e *endpoint) writeError(h ipHdr, l4 []byte, ie ICMPError) error {
	// As much of the packet as fits the smallest MTU: RFC 1812 §4.3.2.3,
	// RFC 4443 §3.1.
	limit := 576 - ip4HdrLen - icmpHdrLen
	if h.src.Is6() {
		limit = 1280 - ip6HdrLen - icmpHdrLen
	}
	from := ie.From
	if !from.IsValid() || from.Is4() != h.src.Is4() {
		from = h.dst
	}
	h.payloadLen = len(l4)
	var hdr [ip6HdrLen]byte
	n := putIP(hdr[:], h)
	b := make([]byte, icmpHdrLen, icmpHdrLen+n+len(l4))
	b[0], b[1] = ie.Type, ie.Code
	switch {
	case h.src.Is6() && ie.Type == icmp6TooBig:
		binary.BigEndian.PutUint32(b[4:], ie.Info)
	case h.src.Is4() && ie.Type == icmpUnreachable && ie.Code == 4:
		binary.BigEndian.PutUint16(b[6:], uint16(ie.Info))
	}
	b = append(b, hdr[:n]...)
	b = append(b, l4...)
	b = b[:min(len(b), icmpHdrLen+limit)]
	putICMPSum(b, from, h.src)
	return e.writeIP(ipHdr{src: from, dst: h.src, proto: icmpProto(h.src)}, b)
}
