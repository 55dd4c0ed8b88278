package forward

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// Group is a multicast group of the host's network that the container takes part
// in.
type Group struct {
	// Addr is the group, without a zone.
	Addr netip.Addr `json:"group"`
	// Iface is the interface of the host where it is; "" is that of the host's
	// default route.
	Iface string `json:"iface,omitempty"`
}

// ParseGroup parses GROUP[%IFACE].
func ParseGroup(s string) (g Group, err error) {
	addr, iface, named := strings.Cut(s, "%")
	if g.Addr, err = netip.ParseAddr(addr); err != nil {
		return g, fmt.Errorf("multicast group %q: %q is not an IP address", s, addr)
	}
	if named && iface == "" {
		return g, fmt.Errorf("multicast group %q: no interface follows the %%", s)
	}
	g.Iface = iface
	return g, g.check()
}

// String returns what ParseGroup parses.
func (g Group) String() string {
	if g.Iface == "" {
		return g.Addr.String()
	}
	return g.Addr.String() + "%" + g.Iface
}

func (g Group) check() error {
	switch {
	case !g.Addr.IsMulticast() || g.Addr.Zone() != "" || g.Addr.Is4In6():
		return fmt.Errorf("multicast group %q: %s is not a multicast address", g, g.Addr)
	case g.Addr.IsInterfaceLocalMulticast():
		return fmt.Errorf("multicast group %q: it never leaves the host's loopback (RFC 4291, 2.7)", g)
	case g.Iface != "" && !validIface(g.Iface):
		return fmt.Errorf("multicast group %q: %q is not an interface", g, g.Iface)
	}
	return nil
}

// GroupStatus is a group and how it fares.
type GroupStatus struct {
	Group
	// Ports are those ports of the container on which it gets the group's
	// datagrams just now.
	Ports []uint16 `json:"ports"`
	// Problem says what is in the way; "" is nothing.
	Problem string `json:"problem,omitempty"`
}

// checkGroups says why cfg.Multicast can't be had.
func (cfg *Config) checkGroups() error {
	for i, g := range cfg.Multicast {
		err := g.check()
		switch {
		case err != nil:
		case slices.Contains(cfg.Multicast[:i], g):
			err = fmt.Errorf("multicast group %q is given twice", g)
		case cfg.NoUDP:
			err = fmt.Errorf("multicast group %q: UDP is switched off", g)
		case cfg.InboundOnly:
			err = fmt.Errorf("multicast group %q: the namespace has a network of its own, and no tap", g)
		case g.Addr.Is4() && cfg.Network.NoIPv4, g.Addr.Is6() && cfg.Network.NoIPv6:
			err = fmt.Errorf("multicast group %q: the container has no address of this family", g)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// errNoDefaultRoute is why a group without Iface can't be joined.
var errNoDefaultRoute = errors.New("the host has no default route: name an interface")
