package netnsutil

import (
	"net"
	"net/netip"
)

// Link is the description of one network interface in plain values: what
// [NS.Configure] makes true, and what [HostLink] read from the host.
type Link struct {
	Name string
	// MTU in bytes; 0 leaves the interface's as it is.
	MTU int
	// HardwareAddr is the interface's MAC address; nil leaves it as it is.
	HardwareAddr net.HardwareAddr
	// Addrs are set on the interface with their prefix length, without
	// duplicate address detection: nobody else is on the link.
	Addrs []netip.Prefix
	// Routes are added to the main table, through the interface.
	Routes []Route
}

// Route is one route through a [Link].
type Route struct {
	// Dst is the destination; 0.0.0.0/0 and ::/0 are the default routes.
	Dst netip.Prefix
	// Via is the gateway; the zero Addr says that Dst is on the link.
	Via netip.Addr
}
