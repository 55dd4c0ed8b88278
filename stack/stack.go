package stack

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv6"
	gstack "gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
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
	// TCP is called for each connection that the container begins, on the
	// reading goroutine: it must not block. The request must end, then or
	// later, in one of its Accept (which does block), Reject, or Release and
	// Done. Nil rejects all.
	TCP func(*TCPRequest)
	// UDP is called for each datagram from the container, on the reading
	// goroutine: it must not block, nor keep the datagram. Nil drops all.
	UDP func(*Datagram)
	// GatewayMAC is our own MAC address on the link; nil is
	// 02:67:6f:66:77:64.
	GatewayMAC net.HardwareAddr
	// NoNDP answers no neighbour solicitation: the container's IPv6 has only
	// the neighbours that it was told of.
	NoNDP bool
	// RouterSolicit is called when the container looks for an IPv6 router,
	// under the same rules as UDP; from may be the unspecified address. Nil
	// drops all.
	RouterSolicit func(from netip.Addr)
	// Echo is called for each ICMP echo request from the container, under
	// the same rules as UDP. Nil drops all.
	Echo func(*Echo)
	// Idle is called on the reading goroutine when the device has no
	// further frame, before it waits for one, and after the first frame that
	// it has waited for: whoever gathers datagrams from UDP into batches sends
	// them now. It must not block. Nil is nothing to do.
	Idle func()
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
	// DontFragment is set on a datagram that left the container in one
	// piece and is to stay so: IPv4 with DF, IPv6 without a fragment
	// header. If a link is too narrow for it, the container is told.
	DontFragment bool
	// Checksummed asks WriteUDP for a complete checksum, which is otherwise
	// left to whoever reads the datagram: for DHCP clients, which read from
	// packet sockets, and some of which look at it (packet(7)).
	Checksummed bool
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

// nicID is the number of gVisor's only network interface.
const nicID = 1

// Stack is a running stack. Close ends it.
type Stack struct {
	cfg    Config
	ep     *endpoint
	net    *gstack.Stack
	syn    *synHolder
	stats  counters
	ctx    context.Context // ends with Close
	cancel context.CancelFunc

	mu    sync.Mutex
	conns map[*Conn]struct{} // nil after Close
}

// New starts a stack on cfg.Device. On error the device is still the caller's.
func New(cfg Config) (*Stack, error) {
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.Idle == nil {
		cfg.Idle = func() {}
	}
	s := &Stack{cfg: cfg, conns: make(map[*Conn]struct{})}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	s.syn = &synHolder{stack: s, held: make(map[heldKey]*TCPRequest), ctx: s.ctx, now: time.Now}
	s.ep = &endpoint{
		dev: cfg.Device, mtu: cfg.Device.MTU(), offloads: cfg.Device.Offloads(),
		own: make(map[netip.Addr]bool), log: cfg.Logger, stats: &s.stats,
		udp: cfg.UDP, echo: cfg.Echo, idle: cfg.Idle, syn: s.syn.handle,
		mac: defaultMAC, noNDP: cfg.NoNDP, routerSolicit: cfg.RouterSolicit,
	}
	copy(s.ep.mac[:], cfg.GatewayMAC)
	s.ep.capture.drops = &s.stats.captureDrop
	s.ep.frags.drops = &s.stats.fragments
	for _, a := range cfg.Guest {
		s.ep.own[a] = true
	}
	mac := [6]byte{}
	copy(mac[:], cfg.GuestMAC)
	s.ep.guest.Store(&mac)
	if err := s.configure(); err != nil {
		s.cancel()
		return nil, fmt.Errorf("start the stack: %w", err)
	}
	s.ep.wg.Add(1)
	go s.ep.readLoop()
	return s, nil
}

// configure makes gVisor's stack: IPv4, IPv6 and TCP on one interface that takes
// every address for its own. ARP, NDP and ICMP echo are answered by the endpoint.
func (s *Stack) configure() error {
	s.net = gstack.New(gstack.Options{
		NetworkProtocols: []gstack.NetworkProtocolFactory{
			ipv4.NewProtocol,
			// No duplicate address detection, router solicitation or
			// MLD: there is no link layer here, and no router but us.
			ipv6.NewProtocolWithOptions(ipv6.Options{}),
		},
		TransportProtocols: []gstack.TransportProtocolFactory{tcp.NewProtocol},
	})
	for _, opt := range tcpOptions {
		if err := s.net.SetTransportProtocolOption(tcp.ProtocolNumber, opt); err != nil {
			return errno(err)
		}
	}
	forwarder := tcp.NewForwarder(s.net, 0, maxHeld, s.syn.handshake)
	s.net.SetTransportProtocolHandler(tcp.ProtocolNumber, forwarder.HandlePacket)
	if err := s.net.CreateNIC(nicID, s.ep); err != nil {
		return errno(err)
	}
	if err := s.net.SetPromiscuousMode(nicID, true); err != nil {
		return errno(err)
	}
	if err := s.net.SetSpoofing(nicID, true); err != nil {
		return errno(err)
	}
	s.net.SetRouteTable([]tcpip.Route{
		{Destination: header.IPv4EmptySubnet, NIC: nicID},
		{Destination: header.IPv6EmptySubnet, NIC: nicID},
	})
	return nil
}

// Buffers of one connection. The link has no latency to speak of, so little has
// to be in flight; what a reader that stalls can hold is the maximum.
const (
	minBuffer     = 4 << 10
	defaultBuffer = 512 << 10
	maxBuffer     = 4 << 20
)

// tcpOptions are gVisor's options for TCP that differ from its defaults.
var tcpOptions = []tcpip.SettableTransportProtocolOption{
	// Off by default, on in every kernel since 1999.
	new(tcpip.TCPSACKEnabled(true)),
	&tcpip.TCPReceiveBufferSizeRangeOption{Min: minBuffer, Default: defaultBuffer, Max: maxBuffer},
	&tcpip.TCPSendBufferSizeRangeOption{Min: minBuffer, Default: defaultBuffer, Max: maxBuffer},
	// A buffer grows with what its flow needs, up to the maximum.
	new(tcpip.TCPModerateReceiveBufferOption(true)),
	// The link neither reorders nor delays segments, so that none turns up
	// from an earlier connection; 60 s would only keep the ports busy.
	new(tcpip.TCPTimeWaitTimeoutOption(time.Second)),
}

// GatewayMAC returns our own MAC address on the link.
func (s *Stack) GatewayMAC() net.HardwareAddr { return slices.Clone(s.ep.mac[:]) }

// track remembers an open connection for Close; it returns false if that has
// already been called.
func (s *Stack) track(c *Conn) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.conns == nil {
		return false
	}
	s.conns[c] = struct{}{}
	return true
}

func (s *Stack) untrack(c *Conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.conns, c)
}

// Close resets all connections, closes the device, and waits for every goroutine,
// the callbacks included. Close is idempotent.
func (s *Stack) Close() error {
	s.cancel()
	s.mu.Lock()
	conns := s.conns
	s.conns = nil
	s.mu.Unlock()
	for c := range conns {
		_ = c.Abort()
	}
	s.syn.wg.Wait()
	err := s.cfg.Device.Close()
	s.ep.wg.Wait()
	s.net.Close()
	s.net.Wait()
	return err
}

// tcpipAddr is gVisor's form of an address.
func tcpipAddr(a netip.Addr) tcpip.Address { return tcpip.AddrFromSlice(a.AsSlice()) }

// addrPort is the form that leaves the package.
func addrPort(a tcpip.Address, port uint16) netip.AddrPort {
	ip, _ := netip.AddrFromSlice(a.AsSlice())
	return netip.AddrPortFrom(ip, port)
}
