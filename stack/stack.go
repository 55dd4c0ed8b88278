package stack

import (
	"log/slog"
	"net"
	"net/netip"
)

// Config says what a [Stack] is made of. Device is required.
type Config struct {
	// Device is the container's link. The stack owns and closes it.
	Device Device
	// GuestMAC is the container's MAC address. It is followed when the
	// container changes it.
	GuestMAC net.HardwareAddr
	// Guest are the container's own addresses: packets to them from the
	// container are never ours, and ARP and NDP never answer for them.
	Guest []netip.Addr
	// TCP is called for each connection that the container begins, on a
	// goroutine of its own; it must end in one of the request's Accept,
	// Release or Reject. Nil rejects all.
	TCP func(*TCPRequest)
	// UDP is called for each datagram from the container, on the reading
	// goroutine: it must not block, nor keep the datagram. Nil drops all.
	UDP func(*Datagram)
	// Echo is called for each ICMP echo request from the container, under
	// the same rules as UDP. Nil drops all.
	Echo func(*Echo)
	// Logger takes what an operator must know; nil discards it.
	Logger *slog.Logger
}

// Datagram is one UDP datagram between the container and the world, or several
// that travel together because the sender gave them to the kernel as one
// (UDP_SEGMENT).
type Datagram struct {
	Src, Dst netip.AddrPort
	// TTL is the hop limit with which it left the container; in the other
	// direction 0 means 64.
	TTL uint8
	// TOS is the traffic class, ECN bits included.
	TOS uint8
	// Payload is valid until the callback returns.
	Payload []byte
	// SegmentSize cuts Payload into datagrams of that size, the last one
	// may be shorter. 0 means that Payload is one datagram.
	SegmentSize int
}

// Echo is one ICMP or ICMPv6 echo request from the container, or the reply to
// one.
type Echo struct {
	Src, Dst netip.Addr
	ID, Seq  uint16
	// TTL is the hop limit with which the request left the container, or
	// that of the reply as the host saw it.
	TTL uint8
	// Payload is what follows the header; valid until the callback returns.
	Payload []byte
}

// Stack is a running stack. Close ends it.
type Stack struct{}

// New starts a stack on cfg.Device.
func New(cfg Config) (*Stack, error) { return &Stack{}, nil }

// WriteUDP sends a datagram to the container.
func (s *Stack) WriteUDP(d *Datagram) error { return nil }

// WriteEcho sends an echo reply to the container.
func (s *Stack) WriteEcho(e *Echo) error { return nil }

// Close closes the device and all connections, and waits for every goroutine.
func (s *Stack) Close() error { return nil }

// ICMPError is an error about a packet that the container sent, on its way back
// to it. Type, Code and Info are those of the ICMP of the packet's family, as
// the host's kernel reports them (IP_RECVERR, struct sock_extended_err).
type ICMPError struct {
	// From is the router or host that reports; the zero Addr is the
	// packet's destination.
	From       netip.Addr
	Type, Code uint8
	// Info is the MTU for "fragmentation needed" and "packet too big".
	Info uint32
}

// WriteUDPError tells the container what became of a datagram. d is the datagram
// as it left the container; its payload need not be complete.
func (s *Stack) WriteUDPError(d *Datagram, e ICMPError) error { return nil }

// WriteEchoError tells the container what became of an echo request.
func (s *Stack) WriteEchoError(q *Echo, e ICMPError) error { return nil }
