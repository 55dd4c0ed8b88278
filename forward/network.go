package forward

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/gofwd/gofwd/netnsutil"
	"github.com/gofwd/gofwd/stack"
)

// Network is how the namespace is numbered, and what its special addresses mean.
type Network struct {
	// IfName is the tap's name; "" is tap0.
	IfName string
	// MTU of the tap in bytes; 0 is 1500.
	MTU int
	// MAC is the tap's MAC address, nil is the kernel's choice; GatewayMAC is
	// ours on the other side of it, nil is 02:67:6f:66:77:64.
	MAC, GatewayMAC net.HardwareAddr
	// NoIPv4 and NoIPv6 leave out a family.
	NoIPv4, NoIPv6 bool
	// Addrs are the container's addresses, at most one of each family; a
	// family without one gets 10.0.2.100/24 (the next free 10.0.N.0/24
	// where the host is in 10.0.2.0/24) and fd67:6f66:7764::100/64.
	Addrs []netip.Prefix
	// Gateways are the default gateways; the default is host 2 of the net.
	Gateways []netip.Addr
	// DNS are the addresses at which the container finds its resolver; the
	// default is host 3 of the net. Port 53 and 853 of them lead to the
	// host's own nameservers.
	DNS []netip.Addr
	// Nameservers are asked instead of the host's own.
	Nameservers []netip.Addr
	// NoDNS forwards no DNS address.
	NoDNS bool
	// CopyHost copies addresses and routes of the host's main interface
	// instead, as --config-net of pasta(1).
	CopyHost bool
	// HostIfName is that interface; "" is that of the default route.
	HostIfName string
	// HostAlias are the addresses under which the container reaches the
	// host's main address, and sees it; the default is 169.254.1.2 and
	// fd67:6f66:7764::1. NoHostAlias is none.
	HostAlias   []netip.Addr
	NoHostAlias bool
	// MapHostLoopback are addresses under which the container reaches the
	// host's loopback; the default is none.
	MapHostLoopback []netip.Addr
	// Services tell the container all this, if it asks.
	Services Services
	// Unconfigured leaves the tap down and without addresses, for a container
	// that configures itself. Forwards lead to an address above, or where the
	// container has taken others, to one of those; until then, to none.
	Unconfigured bool
	// NoNDP answers no IPv6 neighbour discovery, so that there is no IPv6
	// unless the container knows our MAC address.
	NoNDP bool
}

const (
	defaultIfName = "tap0"
	defaultMTU    = 1500
	minMTU4       = 68    // RFC 791
	minMTU6       = 1280  // RFC 8200; below, Linux has no IPv6 on an interface
	maxMTU        = 65521 // 65535 less the Ethernet header, see tun_net_init in drivers/net/tun.c
)

// familyNumbers are the numbers of one family that are used where none are given.
type familyNumbers struct {
	is4 bool
	// net returns the n-th net to number a container in, and first is the
	// first that is tried.
	net   func(n byte) netip.Prefix
	first byte
	guest byte // the container's place in it
	alias netip.Addr
	// dns is for a container that has addresses of the host's net, where
	// nothing is ours to take.
	dns netip.Addr
}

// numbersOf returns the numbers of a family: in IPv4 those that users of
// slirp4netns and RootlessKit know.
func numbersOf(is4 bool) familyNumbers {
	if is4 {
		return familyNumbers{
			is4: true,
			net: func(n byte) netip.Prefix {
				return netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 0, n, 0}), 24)
			},
			first: 2, guest: 100, alias: defaultAlias4,
			dns: netip.AddrFrom4([4]byte{169, 254, 1, 1}), // as Podman tells pasta
		}
	}
	return familyNumbers{
		net: func(n byte) netip.Prefix {
			a := [16]byte{0xfd, 0x67, 0x6f, 0x66, 0x77, 0x64, 0, n}
			return netip.PrefixFrom(netip.AddrFrom16(a), 64)
		},
		first: 0, guest: 0, alias: defaultAlias6,
		dns: netip.MustParseAddr("fd67:6f66:7764::3"),
	}
}

// hostNetwork is what of the host's network matters for the container's numbers.
type hostNetwork struct {
	// main is the interface of the default route; zero if there is none.
	main netnsutil.Link
	// nets are the nets that the host is in.
	nets []netip.Prefix
}

// networkPlan is how the container is numbered.
type networkPlan struct {
	link  netnsutil.Link
	addrs hostMap // without its functions
	notes []string
}

// planNetwork fills in what cfg leaves open. It is an error if cfg asks for what
// can't be.
func planNetwork(cfg Network, host hostNetwork) (*networkPlan, error) {
	if cfg.NoIPv4 && cfg.NoIPv6 {
		return nil, errors.New("number the container: neither IPv4 nor IPv6 is wanted")
	}
	p := &networkPlan{link: netnsutil.Link{
		Name: cfg.IfName, MTU: cfg.MTU, QueueLen: stack.TapQueueLen,
		Congestion: netnsutil.LocalCongestion, // the tap ends on this machine
	}}
	if p.link.Name == "" {
		p.link.Name = defaultIfName
	}
	if p.link.MTU == 0 {
		p.link.MTU = defaultMTU
	}
	least := minMTU6
	if cfg.NoIPv6 {
		least = minMTU4
	}
	if p.link.MTU < least || p.link.MTU > maxMTU {
		return nil, fmt.Errorf("number the container: MTU %d is not between %d and %d", p.link.MTU, least, maxMTU)
	}
	if err := checkNetwork(cfg); err != nil {
		return nil, fmt.Errorf("number the container: %w", err)
	}
	if cfg.CopyHost && len(host.main.Addrs) == 0 {
		cfg.CopyHost = false
		p.notes = append(p.notes, "the host has no network to copy: the container has private addresses")
	}
	for _, is4 := range []bool{true, false} {
		if is4 && cfg.NoIPv4 || !is4 && cfg.NoIPv6 {
			continue
		}
		if err := p.addFamily(cfg, host, numbersOf(is4)); err != nil {
			return nil, fmt.Errorf("number the container: %w", err)
		}
	}
	return p, nil
}

// checkNetwork refuses addresses that are none of a host, and two of a family
// where there may be one.
func checkNetwork(cfg Network) error {
	for _, mac := range []net.HardwareAddr{cfg.MAC, cfg.GatewayMAC} {
		if mac != nil && (len(mac) != 6 || mac[0]&1 != 0) {
			return fmt.Errorf("MAC address %s is not that of a host", mac)
		}
	}
	var own []netip.Addr
	for _, p := range cfg.Addrs {
		if !p.IsValid() {
			return errors.New("address without prefix length")
		}
		own = append(own, p.Addr())
	}
	for _, list := range []struct {
		what  string
		addrs []netip.Addr
		many  bool
	}{
		{"address", own, false},
		{"gateway", cfg.Gateways, false},
		{"DNS address", cfg.DNS, true},
		{"host alias", cfg.HostAlias, true},
		{"address mapped to the host's loopback", cfg.MapHostLoopback, true},
	} {
		var seen [2]bool
		for _, a := range list.addrs {
			family := 0
			if a.Is4() {
				family = 1
			}
			switch {
			case !a.IsValid() || a.Is4In6() || a.Zone() != "" || a.IsUnspecified() || a.IsMulticast() || a.IsLoopback():
				return fmt.Errorf("%s %s is not the address of a host", list.what, a)
			case seen[family] && !list.many:
				return fmt.Errorf("%s %s is the second of its family", list.what, a)
			case list.what != "address" && slices.Contains(own, a):
				return fmt.Errorf("%s %s is the container's own address", list.what, a)
			}
			seen[family] = true
		}
	}
	return nil
}

// addFamily numbers one family.
func (p *networkPlan) addFamily(cfg Network, host hostNetwork, numbers familyNumbers) error {
	explicit := prefixesOf(cfg.Addrs, numbers.is4)
	own, private := explicit, true
	switch {
	case len(explicit) > 0:
		// A net that the host is in as well has real neighbours.
		private = !overlapsAny(explicit[0], host.nets)
	case cfg.CopyHost:
		own, private = prefixesOf(host.main.Addrs, numbers.is4), false
		if len(own) == 0 {
			return nil // the host has none of this family
		}
	default:
		own = []netip.Prefix{numbers.free(host.nets)}
	}
	p.link.Addrs = append(p.link.Addrs, own...)
	for _, prefix := range own {
		p.addrs.guest = append(p.addrs.guest, prefix.Addr())
		if private {
			p.addrs.private = append(p.addrs.private, prefix.Masked())
		}
	}

	gateway, ok := ofFamily(cfg.Gateways, numbers.is4)
	copyRoutes := cfg.CopyHost && !ok && slices.ContainsFunc(host.main.Routes, func(r netnsutil.Route) bool {
		return r.Dst == anyPrefix(numbers.is4)
	})
	if !ok && !copyRoutes {
		if gateway, ok = place(own[0], own[0].Addr()); !ok {
			return fmt.Errorf("the net of %s has no room for a gateway: give one", own[0])
		}
	}
	p.addRoutes(gateway, copyRoutes, host.main.Routes, numbers.is4)

	if !cfg.NoDNS {
		dns := addrsOf(cfg.DNS, numbers.is4)
		if len(dns) == 0 && private {
			if a, ok := place(own[0], own[0].Addr(), gateway); ok {
				dns = []netip.Addr{a}
			}
		}
		if len(dns) == 0 {
			dns = []netip.Addr{numbers.dns}
		}
		p.addrs.dns = append(p.addrs.dns, dns...)
	}
	if !cfg.NoHostAlias {
		alias := addrsOf(cfg.HostAlias, numbers.is4)
		if len(alias) == 0 {
			alias = []netip.Addr{numbers.alias}
		}
		p.addrs.alias = append(p.addrs.alias, alias...)
	}
	p.addrs.loopback = append(p.addrs.loopback, addrsOf(cfg.MapHostLoopback, numbers.is4)...)
	return nil
}

// addRoutes gives the container its default route: by gateway, or, where that is
// not valid, all that the host has.
func (p *networkPlan) addRoutes(gateway netip.Addr, copied bool, host []netnsutil.Route, is4 bool) {
	if copied {
		for _, r := range host {
			isDefault := r.Dst.Bits() == 0
			if r.Dst.Addr().Is4() != is4 || isDefault && gateway.IsValid() {
				continue
			}
			p.link.Routes = append(p.link.Routes, r)
			if isDefault && r.Via.IsValid() {
				p.addrs.gateways = append(p.addrs.gateways, r.Via)
			}
		}
	}
	if gateway.IsValid() {
		p.addrs.gateways = append(p.addrs.gateways, gateway)
		p.link.Routes = append(p.link.Routes, netnsutil.Route{Dst: anyPrefix(is4), Via: gateway})
	}
}

// free returns the container's place in the first of the nets that the host is
// not in.
func (f familyNumbers) free(taken []netip.Prefix) netip.Prefix {
	n := f.first
	for n < 255 && overlapsAny(f.net(n), taken) {
		n++
	}
	net := f.net(n)
	if f.is4 {
		a := net.Addr().As4()
		a[3] = f.guest
		return netip.PrefixFrom(netip.AddrFrom4(a), net.Bits())
	}
	a := net.Addr().As16()
	a[14], a[15] = 1, f.guest // ::100
	return netip.PrefixFrom(netip.AddrFrom16(a), net.Bits())
}

// place returns the first address of a net that is free for us: host 2, 3, and so
// on, or 1. In IPv4 the last address of the net is its broadcast address.
func place(prefix netip.Prefix, taken ...netip.Addr) (netip.Addr, bool) {
	base := prefix.Masked().Addr()
	first := base.Next()
	a := first
	for range 4 {
		a = a.Next()
		usable := prefix.Contains(a) && (a.Is6() || prefix.Contains(a.Next()))
		if usable && !slices.Contains(taken, a) {
			return a, true
		}
	}
	return first, prefix.Contains(first) && !slices.Contains(taken, first)
}

func overlapsAny(p netip.Prefix, nets []netip.Prefix) bool {
	return slices.ContainsFunc(nets, p.Overlaps)
}

func anyPrefix(is4 bool) netip.Prefix {
	if is4 {
		return netip.PrefixFrom(netip.IPv4Unspecified(), 0)
	}
	return netip.PrefixFrom(netip.IPv6Unspecified(), 0)
}

// prefixesOf returns the prefixes of a family that are not link-local in IPv6:
// those the kernel makes by itself.
func prefixesOf(prefixes []netip.Prefix, is4 bool) []netip.Prefix {
	return slices.DeleteFunc(slices.Clone(prefixes), func(p netip.Prefix) bool {
		return p.Addr().Is4() != is4 || !is4 && p.Addr().IsLinkLocalUnicast()
	})
}

func addrsOf(addrs []netip.Addr, is4 bool) []netip.Addr {
	return slices.DeleteFunc(slices.Clone(addrs), func(a netip.Addr) bool { return a.Is4() != is4 })
}
