package forward

import (
	"net/netip"
	"slices"
	"syscall"
)

// hostMap is the table of those addresses that are not the same thing on both
// sides of the namespace's border. Everything else passes as it is: a remote
// client keeps its address on the way in, and a destination its own on the way
// out.
//
// All addresses in it are unmapped and without zone.
type hostMap struct {
	guest    []netip.Addr        // the container's own
	guests   func() []netip.Addr // the same where it changes; nil where not
	gateways []netip.Addr        // ours: nothing listens there
	dns      []netip.Addr        // ours: the way to the host's nameservers
	alias    []netip.Addr        // the host's main address, as the container knows it
	loopback []netip.Addr        // the host's loopback, as the container knows it
	private  []netip.Prefix      // nets that we invented: only the container and we are there

	// loopbackToLoopback makes clients on the host's loopback clients on
	// the namespace's.
	loopbackToLoopback bool

	// zone returns the interface of the host on which an IPv6 link-local
	// neighbour was heard in a multicast group, "" if none was. Nil knows of
	// none.
	zone func(netip.Addr) string

	// policy may forbid destinations; our own nameserver it does not.
	policy *policy

	// mainAddr returns the host's main address of a family, the one that
	// it speaks to the world with, if it has one.
	mainAddr func(is6 bool) (netip.Addr, bool)
	// nameserver returns the nameserver of the host that is to be asked now.
	nameserver func() (netip.Addr, error)
}

// Source addresses of last resort, for a container that was given no alias.
var (
	defaultAlias4 = netip.AddrFrom4([4]byte{169, 254, 1, 2})
	defaultAlias6 = netip.MustParseAddr("fd67:6f66:7764::1")
)

// loopbackOf returns the loopback address of a family.
func loopbackOf(is4 bool) netip.Addr {
	if is4 {
		return netip.AddrFrom4([4]byte{127, 0, 0, 1})
	}
	return netip.IPv6Loopback()
}

// source returns the address that a server at target in the namespace sees of
// client:
//
//	a remote client, or a host process
//	that uses one of the host's addresses   its own address and port
//	that address is the container's too     the host alias
//	the host's loopback                     the host alias, or 127.0.0.1 and ::1
//	                                        if target is the namespace's loopback
//	any, and target of the other family     the alias of target's family
//
// The port is always the client's. A loopback source can't cross the tap: such
// a flow needs a socket that was made in the namespace.
func (m *hostMap) source(client netip.AddrPort, target netip.Addr) netip.AddrPort {
	addr := client.Addr().Unmap().WithZone("") // the namespace has other interfaces
	target = target.Unmap()
	switch {
	case addr.IsLoopback() && m.loopbackToLoopback && target.IsLoopback():
		addr = loopbackOf(target.Is4())
	case addr.IsLoopback(), addr.Is4() != target.Is4(), slices.Contains(m.ownAddrs(), addr):
		addr = m.aliasOf(target.Is4())
	}
	return netip.AddrPortFrom(addr, client.Port())
}

// aliasOf returns the host alias of a family.
func (m *hostMap) aliasOf(is4 bool) netip.Addr {
	if a, ok := ofFamily(m.alias, is4); ok {
		return a
	}
	if a, ok := ofFamily(m.gateways, is4); ok {
		return a
	}
	if is4 {
		return defaultAlias4
	}
	return defaultAlias6
}

// guestOf returns the container's address of a family, the zero Addr if it has
// none.
func (m *hostMap) guestOf(is4 bool) netip.Addr {
	a, _ := ofFamily(m.ownAddrs(), is4)
	return a
}

// ownAddrs returns the container's own addresses.
func (m *hostMap) ownAddrs() []netip.Addr {
	if m.guests != nil {
		return m.guests()
	}
	return m.guest
}

// destination returns where on the host's side a flow to dst, as the container
// addressed it, goes:
//
//	a DNS address, port 53 or 853      the host's nameserver, of either family
//	an address mapped to the loopback  127.0.0.1 or ::1
//	the host alias                     the host's main address
//	a link-local neighbour that was
//	heard in a multicast group         that neighbour
//	any loopback or unspecified one    nowhere
//	the rest of a net of our own       nowhere
//	anything else, the host's own      as it is
//	addresses and multicast included
//
// The first row that fits decides. Only the first two lead to the host's
// loopback. The error is an [syscall.Errno] that says what a router would:
// ECONNREFUSED where we are the host, EHOSTUNREACH where there is none.
func (m *hostMap) destination(dst netip.AddrPort) (netip.AddrPort, error) {
	to, err := m.translate(dst)
	if err == nil && !m.isDNS(dst) && !m.policy.allows(dst, to) {
		return netip.AddrPort{}, syscall.EACCES // ICMP: administratively prohibited
	}
	return to, err
}

// translate is destination without the policy.
func (m *hostMap) translate(dst netip.AddrPort) (netip.AddrPort, error) {
	addr, port := dst.Addr().Unmap().WithZone(""), dst.Port()
	switch {
	case m.isDNS(dst):
		server, err := m.nameserver()
		return netip.AddrPortFrom(server, port), err
	case slices.Contains(m.loopback, addr):
		return netip.AddrPortFrom(loopbackOf(addr.Is4()), port), nil
	case slices.Contains(m.alias, addr):
		host, ok := m.mainAddr(addr.Is6())
		if !ok || host.IsLoopback() {
			return netip.AddrPort{}, syscall.ENETUNREACH
		}
		return netip.AddrPortFrom(host, port), nil
	case slices.Contains(m.dns, addr), slices.Contains(m.gateways, addr) && m.invented(addr):
		return netip.AddrPort{}, syscall.ECONNREFUSED
	case m.zoneOf(addr) != "":
		return netip.AddrPortFrom(addr.WithZone(m.zoneOf(addr)), port), nil
	case addr.IsLoopback(), addr.IsUnspecified(), addr.IsInterfaceLocalMulticast(), m.invented(addr):
		// connect(2) to 0.0.0.0 or :: reaches the loopback, and ff01::/16
		// is the loopback of multicast (RFC 4291 2.7).
		return netip.AddrPort{}, syscall.EHOSTUNREACH
	}
	return netip.AddrPortFrom(addr, port), nil
}

// zoneOf is zone for any address.
func (m *hostMap) zoneOf(addr netip.Addr) string {
	if m.zone == nil || !addr.Is6() || !addr.IsLinkLocalUnicast() {
		return ""
	}
	return m.zone(addr)
}

// isDNS reports whether dst is where the container finds its resolver: DNS or
// DNS over TLS at a DNS address.
func (m *hostMap) isDNS(dst netip.AddrPort) bool {
	return slices.Contains(m.dns, dst.Addr().Unmap()) && (dst.Port() == 53 || dst.Port() == 853)
}

// invented reports whether addr is in a net that exists only between the
// container and us. Every IPv6 link-local address is: the link is our tap.
func (m *hostMap) invented(addr netip.Addr) bool {
	if addr.Is6() && addr.IsLinkLocalUnicast() {
		return true
	}
	return slices.ContainsFunc(m.private, func(p netip.Prefix) bool { return p.Contains(addr) })
}

// ours reports whether addr is an address that we ourselves answer for.
func (m *hostMap) ours(addr netip.Addr) bool {
	return slices.Contains(m.dns, addr) || slices.Contains(m.gateways, addr) && m.invented(addr)
}

// ofFamily returns the first address of a family.
func ofFamily(addrs []netip.Addr, is4 bool) (netip.Addr, bool) {
	i := slices.IndexFunc(addrs, func(a netip.Addr) bool { return a.Is4() == is4 })
	if i < 0 {
		return netip.Addr{}, false
	}
	return addrs[i], true
}
