package forward

import (
	"encoding/binary"
	"net/netip"
	"unsafe"

	"golang.org/x/sys/unix"
)

// sockaddr is a struct sockaddr_in or sockaddr_in6, byte for byte as the kernel
// writes it. Two of one socket are equal if they are the same endpoint: the kernel
// clears sin_zero and sin6_flowinfo, and sets sin6_scope_id only for link-local
// addresses (udp_recvmsg, udpv6_recvmsg).
type sockaddr [unix.SizeofSockaddrInet6]byte

// sockaddrOf is ap, whose zone is ignored, for a socket of either family: on an
// IPv6 socket an IPv4 address is mapped.
func sockaddrOf(ap netip.AddrPort, v6 bool) (a sockaddr) {
	binary.BigEndian.PutUint16(a[2:], ap.Port())
	if v6 {
		binary.NativeEndian.PutUint16(a[0:], unix.AF_INET6)
		*(*[16]byte)(a[8:]) = ap.Addr().As16()
		return a
	}
	binary.NativeEndian.PutUint16(a[0:], unix.AF_INET)
	*(*[4]byte)(a[4:]) = ap.Addr().Unmap().As4()
	return a
}

// setScope sets sin6_scope_id, the interface of a link-local address.
func (a *sockaddr) setScope(ifindex uint32) { binary.NativeEndian.PutUint32(a[24:], ifindex) }

func (a *sockaddr) scope() uint32 { return binary.NativeEndian.Uint32(a[24:]) }

func (a *sockaddr) family() int { return int(binary.NativeEndian.Uint16(a[:])) }

func (a *sockaddr) len() uint32 {
	if a.family() == unix.AF_INET {
		return unix.SizeofSockaddrInet4
	}
	return unix.SizeofSockaddrInet6
}

// addrPort returns the address without its zone, unmapped; the zero AddrPort if
// there is none.
func (a *sockaddr) addrPort() netip.AddrPort {
	port := binary.BigEndian.Uint16(a[2:])
	switch a.family() {
	case unix.AF_INET:
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte(a[4:8])), port)
	case unix.AF_INET6:
		return netip.AddrPortFrom(netip.AddrFrom16([16]byte(a[8:24])).Unmap(), port)
	}
	return netip.AddrPort{}
}

// v4 reports whether datagrams to a are IPv4, be the socket IPv6.
func (a *sockaddr) v4() bool {
	return a.family() == unix.AF_INET || [12]byte(a[8:20]) == v4Prefix
}

// v4Prefix begins an IPv4 address that is mapped into IPv6 (RFC 4291, §2.5.5.2).
var v4Prefix = [12]byte{10: 0xff, 11: 0xff}

// localAddr is the address of ours to which a datagram came, or from which one is
// to leave. The zero value lets the kernel choose.
type localAddr struct {
	addr [16]byte // IPv4 is mapped
	// ifindex is the interface, for a link-local address and for the way to a
	// multicast group only: for anything else it would override the routes.
	ifindex uint32
}

// local4 and local6 read struct in_pktinfo and in6_pktinfo. Replies to a datagram
// that was sent to a broadcast address leave from ipi_spec_dst (ip(7)), those to a
// multicast address from where the kernel chooses.
func local4(b []byte) (l localAddr) {
	*(*[12]byte)(l.addr[:]) = v4Prefix
	copy(l.addr[12:], b[4:8]) // ipi_spec_dst
	return l
}

func local6(b []byte) (l localAddr) {
	addr := netip.AddrFrom16([16]byte(b[:16]))
	if addr.IsMulticast() {
		return localAddr{}
	}
	l.addr = addr.As16()
	if addr.IsLinkLocalUnicast() {
		l.ifindex = binary.NativeEndian.Uint32(b[16:])
	}
	return l
}

// cmsgHeader is the size of a control message without data.
var cmsgHeader = unix.CmsgLen(0)

// cmsgBuf is the space for the control messages of one datagram, aligned as
// struct cmsghdr must be. The most that we send is 24+8+16 bytes of data with
// four headers; the most that we receive adds the other family's pktinfo.
type cmsgBuf [24]uint64

func (c *cmsgBuf) bytes() []byte {
	return unsafe.Slice((*byte)(unsafe.Pointer(c)), unsafe.Sizeof(*c))
}

// putCmsg begins a control message in b, and returns its data and its length.
func putCmsg(b []byte, level, typ int32, size int) (data []byte, space int) {
	h := (*unix.Cmsghdr)(unsafe.Pointer(&b[0]))
	h.Level, h.Type = level, typ
	h.SetLen(unix.CmsgLen(size))
	return b[cmsgHeader:][:size], unix.CmsgSpace(size)
}

func putCmsgInt(b []byte, level, typ int32, v int) (space int) {
	data, space := putCmsg(b, level, typ, 4)
	binary.NativeEndian.PutUint32(data, uint32(v))
	return space
}

// nextCmsg splits the first control message off b; ok is false at the end and at
// anything malformed.
func nextCmsg(b []byte) (level, typ int32, data, rest []byte, ok bool) {
	if len(b) < unix.SizeofCmsghdr {
		return 0, 0, nil, nil, false
	}
	h := (*unix.Cmsghdr)(unsafe.Pointer(&b[0]))
	n := int(h.Len)
	if n < cmsgHeader || n > len(b) {
		return 0, 0, nil, nil, false
	}
	data = b[cmsgHeader:n]
	return h.Level, h.Type, data, b[min(unix.CmsgSpace(len(data)), len(b)):], true
}

// sendOptions are what a datagram carries besides its payload and destination.
type sendOptions struct {
	from     localAddr
	ttl, tos uint8 // 0 is the socket's default
	segment  int   // UDP_SEGMENT; 0 is one datagram
}

// put writes the options as control messages and returns their length. Those of
// IPv4 are understood on an IPv6 socket too, if that is where the datagram goes
// (udpv6_sendmsg hands it to udp_sendmsg).
func (o *sendOptions) put(c *cmsgBuf, v4 bool) (n int) {
	b := c.bytes()
	if o.from != (localAddr{}) {
		if v4 {
			data, space := putCmsg(b, unix.SOL_IP, unix.IP_PKTINFO, unix.SizeofInet4Pktinfo)
			clear(data)
			binary.NativeEndian.PutUint32(data, o.from.ifindex)
			copy(data[4:8], o.from.addr[12:]) // ipi_spec_dst
			n += space
		} else {
			data, space := putCmsg(b, unix.SOL_IPV6, unix.IPV6_PKTINFO, unix.SizeofInet6Pktinfo)
			copy(data, o.from.addr[:])
			binary.NativeEndian.PutUint32(data[16:], o.from.ifindex)
			n += space
		}
	}
	level, ttl, tos := int32(unix.SOL_IPV6), int32(unix.IPV6_HOPLIMIT), int32(unix.IPV6_TCLASS)
	if v4 {
		level, ttl, tos = unix.SOL_IP, unix.IP_TTL, unix.IP_TOS
	}
	if o.ttl != 0 {
		n += putCmsgInt(b[n:], level, ttl, int(o.ttl))
	}
	if o.tos != 0 {
		n += putCmsgInt(b[n:], level, tos, int(o.tos))
	}
	if o.segment != 0 {
		data, space := putCmsg(b[n:], unix.SOL_UDP, unix.UDP_SEGMENT, 2)
		binary.NativeEndian.PutUint16(data, uint16(o.segment))
		n += space
	}
	return n
}

// recvOptions are what came with a datagram besides payload and source.
type recvOptions struct {
	to      localAddr // the zero value if unknown
	tos     uint8
	ttl     uint8 // 0 if unknown
	segment int   // UDP_GRO; 0 is one datagram
}

// parse reads the control messages in b.
func (o *recvOptions) parse(b []byte) {
	*o = recvOptions{}
	for {
		level, typ, data, rest, ok := nextCmsg(b)
		if !ok {
			return
		}
		b = rest
		switch {
		case level == unix.SOL_IP && typ == unix.IP_PKTINFO && len(data) >= unix.SizeofInet4Pktinfo:
			o.to = local4(data)
		case level == unix.SOL_IPV6 && typ == unix.IPV6_PKTINFO && len(data) >= unix.SizeofInet6Pktinfo:
			// For IPv4 on an IPv6 socket both kinds come, and this one
			// does not know about broadcasts.
			if l := local6(data); [12]byte(l.addr[:]) != v4Prefix {
				o.to = l
			}
		case level == unix.SOL_IP && typ == unix.IP_TOS && len(data) >= 1:
			o.tos = data[0]
		case level == unix.SOL_IPV6 && typ == unix.IPV6_TCLASS && len(data) >= 4:
			o.tos = uint8(binary.NativeEndian.Uint32(data))
		case (level == unix.SOL_IP && typ == unix.IP_TTL || level == unix.SOL_IPV6 && typ == unix.IPV6_HOPLIMIT) && len(data) >= 4:
			o.ttl = uint8(binary.NativeEndian.Uint32(data))
		case level == unix.SOL_UDP && typ == unix.UDP_GRO && len(data) >= 4:
			o.segment = int(binary.NativeEndian.Uint32(data))
		}
	}
}
