// Package stacktest gives tests a container that does not use the kernel's
// sockets. It is for tests only.
package stacktest

import (
	"context"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/link/fdbased"
	"gvisor.dev/gvisor/pkg/tcpip/network/arp"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv6"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"

	"github.com/gofwd/gofwd/netnsutil"
)

const nic = 1

// Guest is a network stack of its own on an interface of a namespace, as the
// sentry of gVisor is: it has taken the interface's addresses, and speaks on a
// packet socket (runsc/sandbox/network.go, --network=sandbox).
type Guest struct{ s *stack.Stack }

// NewGuest takes the addresses of an interface in ns away from the kernel, and
// begins to answer for them. It ends with the test.
func NewGuest(tb testing.TB, ns *netnsutil.NS, ifname string) *Guest {
	tb.Helper()
	g := &Guest{s: stack.New(stack.Options{
		NetworkProtocols:   []stack.NetworkProtocolFactory{arp.NewProtocol, ipv4.NewProtocol, ipv6.NewProtocol},
		TransportProtocols: []stack.TransportProtocolFactory{tcp.NewProtocol, udp.NewProtocol},
		HandleLocal:        true,
	})}
	require.NoError(tb, ns.Do(func() error { return g.attach(tb, ifname) }))
	return g
}

// attach moves the interface from the kernel to the guest.
func (g *Guest) attach(tb testing.TB, ifname string) error {
	ifi, err := net.InterfaceByName(ifname)
	if err != nil {
		return err
	}
	link, err := netnsutil.ReadLink(ifname)
	if err != nil {
		return err
	}
	fd, err := packetSocket(ifi.Index)
	if err != nil {
		return err
	}
	ep, err := fdbased.New(&fdbased.Options{
		FDs: []int{fd}, MTU: uint32(ifi.MTU), EthernetHeader: true, Address: tcpip.LinkAddress(ifi.HardwareAddr),
		// What a tap's other end leaves to the network card is unfinished on
		// a packet socket, too.
		RXChecksumOffload: true, PacketDispatchMode: fdbased.RecvMMsg,
		ProcessorsPerChannel: 1, // more leave goroutines behind
	})
	if err != nil {
		unix.Close(fd)
		return err
	}
	tb.Cleanup(func() {
		ep.Attach(nil) // ends its goroutines
		g.s.Destroy()
		unix.Close(fd)
	})
	if out, err := exec.Command("ip", "addr", "flush", "dev", ifname).CombinedOutput(); err != nil {
		return fmt.Errorf("take the addresses of %s: %w: %s", ifname, err, out)
	}
	if err := g.s.CreateNIC(nic, ep); err != nil {
		return fmt.Errorf("make network interface: %v", err)
	}
	for _, p := range link.Addrs {
		protocol := ipv4.ProtocolNumber
		if p.Addr().Is6() {
			protocol = ipv6.ProtocolNumber
		}
		addr := tcpip.AddressWithPrefix{Address: address(p.Addr()), PrefixLen: p.Bits()}
		err := g.s.AddProtocolAddress(nic, tcpip.ProtocolAddress{Protocol: protocol, AddressWithPrefix: addr}, stack.AddressProperties{})
		if err != nil {
			return fmt.Errorf("add address: %v", err)
		}
		g.s.AddRoute(tcpip.Route{Destination: addr.Subnet(), NIC: nic})
	}
	for _, r := range link.Routes {
		if r.Dst.Bits() == 0 && r.Via.IsValid() {
			g.s.AddRoute(tcpip.Route{Destination: subnet(r.Dst), Gateway: address(r.Via), NIC: nic})
		}
	}
	return nil
}

// packetSocket makes a socket that sees every packet of an interface.
func packetSocket(ifindex int) (int, error) {
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return -1, os.NewSyscallError("socket", err)
	}
	all := binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, unix.ETH_P_ALL))
	if err := unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: ifindex}); err != nil {
		unix.Close(fd)
		return -1, os.NewSyscallError("bind", err)
	}
	return fd, nil
}

func address(a netip.Addr) tcpip.Address { return tcpip.AddrFromSlice(a.AsSlice()) }

func subnet(p netip.Prefix) tcpip.Subnet {
	return tcpip.AddressWithPrefix{Address: address(p.Addr()), PrefixLen: p.Bits()}.Subnet()
}

// ListenTCP is net.Listen in the guest, for every address.
func (g *Guest) ListenTCP(port uint16) (net.Listener, error) {
	ln, err := gonet.ListenTCP(g.s, tcpip.FullAddress{Port: port}, ipv6.ProtocolNumber)
	if err != nil {
		return nil, err // no typed nil
	}
	return ln, nil
}

// DialTCP is net.Dial in the guest.
func (g *Guest) DialTCP(ctx context.Context, dst netip.AddrPort) (net.Conn, error) {
	to := tcpip.FullAddress{Addr: address(dst.Addr()), Port: dst.Port()}
	protocol := ipv6.ProtocolNumber
	if dst.Addr().Is4() {
		protocol = ipv4.ProtocolNumber
	}
	c, err := gonet.DialContextTCP(ctx, g.s, to, protocol)
	if err != nil {
		return nil, err // no typed nil
	}
	return c, nil
}

// ListenUDP is net.ListenPacket in the guest, for every address.
func (g *Guest) ListenUDP(port uint16) (net.PacketConn, error) {
	c, err := gonet.DialUDP(g.s, &tcpip.FullAddress{Port: port}, nil, ipv6.ProtocolNumber)
	if err != nil {
		return nil, err // no typed nil
	}
	return c, nil
}
