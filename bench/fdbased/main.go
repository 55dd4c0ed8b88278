// Command fdbased forwards TCP between the host and a container by gVisor's
// netstack on a plain tap, with nothing but gVisor's stock parts: the link
// endpoint fdbased, the TCP forwarder with its usual ten connections under way,
// io.Copy. It is what gofwd's own link endpoint is measured against, and no
// more than that needs: IPv4, TCP, one container.
package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"runtime/debug"
	"strconv"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/link/fdbased"
	"gvisor.dev/gvisor/pkg/tcpip/network/arp"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"

	"github.com/gofwd/gofwd/netnsutil"
)

const nic = 1

var (
	guest   = netip.MustParseAddr("10.0.2.100")
	gateway = netip.MustParseAddr("10.0.2.2")
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "fdbased:", err)
		os.Exit(1)
	}
}

func run() error {
	var ports []string
	path := flag.String("netns", "", "the container's network namespace")
	mtu := flag.Uint("mtu", 1500, "MTU of the tap")
	version := flag.Bool("version", false, "print gVisor's version and exit")
	flag.Func("p", "publish this TCP port; may be repeated", func(p string) error { ports = append(ports, p); return nil })
	flag.Parse()
	if *version {
		fmt.Println("gvisor", gvisorVersion())
		return nil
	}
	ns, err := netnsutil.Open(*path)
	if err != nil {
		return err
	}
	var tap int
	if err := ns.Do(func() (err error) { tap, err = openTap(); return err }); err != nil {
		return err
	}
	link := netnsutil.Link{
		Name: "tap0", MTU: int(*mtu), Addrs: []netip.Prefix{netip.PrefixFrom(guest, 24)},
		Routes: []netnsutil.Route{{Dst: netip.MustParsePrefix("0.0.0.0/0"), Via: gateway}},
	}
	if err := ns.Configure(link); err != nil {
		return err
	}
	s, err := newStack(tap, uint32(*mtu))
	if err != nil {
		return err
	}
	errc := make(chan error)
	for _, port := range ports {
		l, err := net.Listen("tcp4", ":"+port)
		if err != nil {
			return err
		}
		go publish(s, l.(*net.TCPListener), errc)
	}
	return <-errc
}

func gvisorVersion() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	for _, dep := range info.Deps {
		if dep.Path == "gvisor.dev/gvisor" {
			return dep.Version
		}
	}
	return "unknown"
}

// openTap makes tap0 in the namespace of the calling thread.
func openTap() (int, error) {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return 0, fmt.Errorf("open /dev/net/tun: %w", err)
	}
	ifr, err := unix.NewIfreq("tap0")
	if err != nil {
		return 0, err
	}
	ifr.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr); err != nil {
		return 0, fmt.Errorf("make tap: %w", os.NewSyscallError("ioctl", err))
	}
	return fd, nil
}

func newStack(tap int, mtu uint32) (*stack.Stack, error) {
	s := stack.New(stack.Options{
		NetworkProtocols:   []stack.NetworkProtocolFactory{ipv4.NewProtocol, arp.NewProtocol},
		TransportProtocols: []stack.TransportProtocolFactory{tcp.NewProtocol},
	})
	link, err := fdbased.New(&fdbased.Options{
		FDs: []int{tap}, MTU: mtu, EthernetHeader: true,
		Address: tcpip.LinkAddress([]byte{0x02, 0, 0, 0, 0, 0x02}),
	})
	if err != nil {
		return nil, fmt.Errorf("make link endpoint: %w", err)
	}
	if err := s.CreateNIC(nic, link); err != nil {
		return nil, fmt.Errorf("make network interface: %v", err)
	}
	address := tcpip.ProtocolAddress{
		Protocol:          ipv4.ProtocolNumber,
		AddressWithPrefix: tcpip.AddrFrom4(gateway.As4()).WithPrefix(),
	}
	if err := s.AddProtocolAddress(nic, address, stack.AddressProperties{}); err != nil {
		return nil, fmt.Errorf("add address: %v", err)
	}
	// The stack answers for every address, and speaks with every one.
	s.SetPromiscuousMode(nic, true)
	s.SetSpoofing(nic, true)
	subnet := tcpip.AddressWithPrefix{Address: tcpip.AddrFrom4(guest.As4()), PrefixLen: 24}.Subnet()
	s.SetRouteTable([]tcpip.Route{{Destination: subnet, NIC: nic}, {Destination: header.IPv4EmptySubnet, NIC: nic}})
	forwarder := tcp.NewForwarder(s, 0, 10, accept)
	s.SetTransportProtocolHandler(tcp.ProtocolNumber, forwarder.HandlePacket)
	return s, nil
}

// accept takes a connection from the container and dials where it goes.
func accept(r *tcp.ForwarderRequest) {
	id := r.ID()
	to := net.JoinHostPort(id.LocalAddress.String(), strconv.Itoa(int(id.LocalPort)))
	host, err := net.Dial("tcp4", to)
	if err != nil {
		r.Complete(true) // RST
		return
	}
	var wq waiter.Queue
	ep, tcpErr := r.CreateEndpoint(&wq)
	r.Complete(false)
	if tcpErr != nil {
		host.Close()
		return
	}
	relay(gonet.NewTCPConn(&wq, ep), host.(*net.TCPConn))
}

// publish forwards the connections of a host listener into the container, with
// the client's address as their source.
func publish(s *stack.Stack, l *net.TCPListener, errc chan<- error) {
	for {
		host, err := l.AcceptTCP()
		if err != nil {
			errc <- err
			return
		}
		go forward(s, host, l.Addr().(*net.TCPAddr).Port)
	}
}

func forward(s *stack.Stack, host *net.TCPConn, port int) {
	from := host.RemoteAddr().(*net.TCPAddr).AddrPort()
	if from.Addr().IsLoopback() {
		from = netip.AddrPortFrom(gateway, from.Port())
	}
	conn, err := gonet.DialTCPWithBind(context.Background(), s,
		tcpip.FullAddress{NIC: nic, Addr: tcpip.AddrFrom4(from.Addr().As4()), Port: from.Port()},
		tcpip.FullAddress{NIC: nic, Addr: tcpip.AddrFrom4(guest.As4()), Port: uint16(port)}, ipv4.ProtocolNumber)
	if err != nil {
		host.Close()
		return
	}
	relay(conn, host)
}

// relay copies both ways until both have ended.
func relay(a *gonet.TCPConn, b *net.TCPConn) {
	defer a.Close()
	defer b.Close()
	done := make(chan struct{})
	go copyToHost(b, a, done)
	_, _ = io.Copy(a, b) // whatever ended it, the other direction may go on
	_ = a.CloseWrite()
	<-done
}

func copyToHost(b *net.TCPConn, a *gonet.TCPConn, done chan<- struct{}) {
	_, _ = io.Copy(b, a)
	_ = b.CloseWrite()
	close(done)
}
