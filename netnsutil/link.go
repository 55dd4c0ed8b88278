package netnsutil

import (
	"net"
	"net/netip"
	"slices"
)

// Link is the description of one network interface in plain values: what
// [NS.Configure] makes true, and what [HostLink] read from the host.
type Link struct {
	Name string
	// MTU in bytes; 0 leaves the interface's as it is.
	MTU int
	// QueueLen is how many packets the interface keeps for who reads them; 0
	// leaves it as it is.
	QueueLen int
	// HardwareAddr is the interface's MAC address; nil leaves it as it is.
	HardwareAddr net.HardwareAddr
	// Addrs are set on the interface with their prefix length, without
	// duplicate address detection: nobody else is on the link. Of each
	// family the first is the one that connections come from.
	Addrs []netip.Prefix
	// Routes are added to the main table, through the interface, those to
	// gateways of other routes first. A gateway need not be in one of the
	// nets of Addrs.
	Routes []Route
	// Congestion is the congestion control of the connections by Routes and within
	// the nets of Addrs, whatever their sockets chose before connect(2); "" leaves it
	// to them.
	Congestion string
	// Down leaves the interface as it is but for MTU, MAC address and queue: it is
	// for somebody else to configure. Addrs and Routes are of no matter then.
	Down bool
}

// Route is one route through a [Link].
type Route struct {
	// Dst is the destination; 0.0.0.0/0 and ::/0 are the default routes.
	Dst netip.Prefix
	// Via is the gateway; the zero Addr says that Dst is on the link.
	Via netip.Addr
}

// inOrder returns the routes such that a route to a gateway precedes those that
// go by it: what is on the link comes first.
func (l Link) inOrder() []Route {
	routes := slices.Clone(l.Routes)
	slices.SortStableFunc(routes, func(a, b Route) int {
		switch {
		case a.Via.IsValid() == b.Via.IsValid():
			return 0
		case a.Via.IsValid():
			return 1
		default:
			return -1
		}
	})
	return routes
}

// reaches reports whether the kernel will find gateway on the link by the
// addresses there; else it must be told so (RTNH_F_ONLINK). No gateway needs
// no finding.
func (l Link) reaches(gateway netip.Addr) bool {
	return !gateway.IsValid() || gateway.IsLinkLocalUnicast() && gateway.Is6() ||
		slices.ContainsFunc(l.Addrs, func(p netip.Prefix) bool { return p.Contains(gateway) })
}
