package forward

import (
	"net/netip"
)

// Proto is a transport protocol.
type Proto uint8

// The protocols that can be forwarded.
const (
	TCP Proto = iota + 1
	UDP
)

// Dir is the direction of a forward. The zero value is In.
type Dir uint8

const (
	// In is from the host into the namespace: -p, -t, -u.
	In Dir = iota
	// Out is from the namespace's loopback to the host's loopback: -T, -U.
	Out
)

// PortRange is the ports First to Last, both included. The zero value is no
// port: as the Ports of a [Rule] it asks for free ones.
type PortRange struct{ First, Last uint16 }

// Rule is one forward: a range of ports on the listening side, and where they go.
type Rule struct {
	Dir   Dir
	Proto Proto
	// Addr is the address to listen on. The zero Addr is every address of
	// both families, 0.0.0.0 every IPv4 address, :: every IPv6 address.
	Addr netip.Addr
	// Iface binds the listener to one interface (SO_BINDTODEVICE); ""
	// does not.
	Iface string
	// Ports are the ports to listen on; zero lets the kernel choose.
	Ports PortRange
	// Target is the address in the namespace; the zero Addr is the
	// container's own of the client's family, or its loopback (Out: the
	// host's loopback).
	Target netip.Addr
	// TargetPorts is as long as Ports.
	TargetPorts PortRange
	// Weak makes a port that cannot be bound a warning; it is an error
	// only if none of the rule's ports can.
	Weak bool
	// Auto publishes only those ports that have a listener on the target
	// side, and follows them.
	Auto bool
}
