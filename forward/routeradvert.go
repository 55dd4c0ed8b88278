package forward

import (
	"encoding/binary"
	"net/netip"
)

// allNodes is everybody on the link.
var allNodes = netip.IPv6LinkLocalAllNodes()

// Numbers of RFC 4861 §4.2 and §4.6, and of RFC 8106 §5.
const (
	ndpRouterAdvert = 134

	ndpOptSourceLinkAddr = 1
	ndpOptPrefix         = 3
	ndpOptMTU            = 5
	ndpOptDNS            = 25
	ndpOptSearch         = 31

	advertManaged    = 0x80 // there is DHCPv6
	prefixOnLink     = 0x80
	prefixAutonomous = 0x40
)

// routerAdvert returns a router advertisement without its checksum. The hop limit
// is left to the container.
func (s *services) routerAdvert() []byte {
	b := make([]byte, 16, 256)
	b[0] = ndpRouterAdvert
	if s.DHCPv6 {
		b[5] |= advertManaged
	}
	binary.BigEndian.PutUint16(b[6:], 1<<16-1) // the router's lifetime in seconds: the longest

	b = append(b, ndpOptPrefix, 4, 64, prefixOnLink|prefixAutonomous)
	b = binary.BigEndian.AppendUint32(b, infinite) // valid
	b = binary.BigEndian.AppendUint32(b, infinite) // preferred
	b = append(b, 0, 0, 0, 0)
	b = append(b, netip.PrefixFrom(s.addr6.Addr(), 64).Masked().Addr().AsSlice()...)

	b = append(b, ndpOptSourceLinkAddr, 1)
	b = append(b, s.mac...)
	if s.mtu != 0 {
		b = append(b, ndpOptMTU, 1, 0, 0)
		b = binary.BigEndian.AppendUint32(b, uint32(s.mtu))
	}
	if len(s.dns6) > 0 {
		b = append(b, ndpOptDNS, byte(1+2*len(s.dns6)), 0, 0)
		b = binary.BigEndian.AppendUint32(b, infinite)
		for _, a := range s.dns6 {
			b = append(b, a.AsSlice()...)
		}
	}
	if len(s.search) > 0 {
		padded := (len(s.search) + 7) &^ 7
		b = append(b, ndpOptSearch, byte(1+padded/8), 0, 0)
		b = binary.BigEndian.AppendUint32(b, infinite)
		b = append(b, s.search...)
		b = append(b, make([]byte, padded-len(s.search))...)
	}
	return b
}
