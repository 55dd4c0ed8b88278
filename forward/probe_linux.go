package forward

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/gofwd/gofwd/netnsutil"
	"github.com/gofwd/gofwd/stack"
)

// Ability is one thing that a path needs of the kernel or of our privileges.
type Ability struct {
	// Name is short: "tap", "mark", "tproxy".
	Name string `json:"name"`
	// For says what needs it.
	For string `json:"for"`
	OK  bool   `json:"ok"`
	// Reason says why it is not to be had, Cost what is lost by that, and
	// Remedy what can be done; "" where it is.
	Reason string `json:"reason,omitempty"`
	Cost   string `json:"cost,omitempty"`
	Remedy string `json:"remedy,omitempty"`
}

// Probe finds out what can be had in a network namespace, by doing it; nothing is
// left behind. ns is best an empty one, made for the purpose: [netnsutil.New].
func Probe(ctx context.Context, ns *netnsutil.NS) []Ability {
	p := &prober{}
	p.tap(ns)
	p.sockets(ns)
	p.add("sysctl", "kernel path", ns.Do(func() error {
		f, err := os.OpenFile("/proc/sys/net/ipv4/tcp_fwmark_accept", os.O_RDWR, 0)
		if err == nil {
			f.Close()
		}
		return err
	}), costKernel, "mount /proc/sys writable where gofwd runs")
	if err := ns.Configure(netnsutil.Link{}); err != nil {
		p.add("loopback", "kernel path", err, costKernel, "")
	}
	k, err := ns.OpenKernelPath()
	p.add("rule", "kernel path", err, costKernel, "the kernel needs CONFIG_IP_MULTIPLE_TABLES")
	if err == nil {
		p.add("connect", "kernel path", tryKernelPath(ctx, ns, k.Mark()), costKernel, "")
		k.Close()
	}
	errNFT, errTProxy := ns.ProbeNFT()
	p.add("nft", "kernel path, outbound", errNFT, costOutbound, "as root: modprobe nf_tables nft_fib_inet")
	p.add("tproxy", "kernel path, outbound", errTProxy, costOutbound, "as root: modprobe nft_tproxy")
	return p.list
}

// What is lost without.
const (
	costTap      = "nothing works but gofwd attach --inbound-only"
	costKernel   = "TCP takes the tap path, at a fraction of the speed"
	costOutbound = "TCP that the container begins takes the tap path"
)

type prober struct{ list []Ability }

func (p *prober) add(name, use string, err error, cost, remedy string) {
	a := Ability{Name: name, For: use, OK: err == nil}
	if err != nil {
		a.Reason, a.Cost, a.Remedy = err.Error(), cost, remedy
		if hint := Hint(err); hint != "" {
			a.Remedy = hint
		}
	}
	p.list = append(p.list, a)
}

// tap makes a tap.
func (p *prober) tap(ns *netnsutil.NS) {
	var dev stack.Device
	err := ns.Do(func() (err error) {
		dev, _, err = stack.OpenTap("gofwd-probe", defaultMTU)
		return err
	})
	p.add("tap", "tap path, UDP, ping", err, costTap, "")
	if err != nil {
		return
	}
	defer dev.Close()
	offloads := dev.Offloads()
	missing := func(has bool) error {
		if has {
			return nil
		}
		return errors.New("the kernel's tap does not take it")
	}
	p.add("tap TSO", "tap path", missing(offloads.TSO), "TCP on the tap path goes packet by packet", "")
	p.add("tap USO", "UDP", missing(offloads.USO), "UDP goes datagram by datagram", "Linux 6.2 has it")
}

// sockets makes a socket as the kernel path does.
func (p *prober) sockets(ns *netnsutil.NS) {
	for _, o := range []struct {
		name   string
		option option
	}{
		{"mark", option{unix.SOL_SOCKET, unix.SO_MARK, 1}},
		{"transparent", option{unix.SOL_IP, unix.IP_TRANSPARENT, 1}},
	} {
		err := ns.Do(func() error {
			fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				return os.NewSyscallError("socket", err)
			}
			defer unix.Close(fd)
			return setOptions(fd, []option{o.option})
		})
		p.add(o.name, "kernel path", err, costKernel, "gofwd needs CAP_NET_ADMIN over the container's user namespace")
	}
}

// tryKernelPath connects to a server in ns from somebody else's address, and
// checks that the server sees that one.
func tryKernelPath(ctx context.Context, ns *netnsutil.NS, mark uint32) error {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	var l net.Listener
	err := ns.Do(func() (err error) {
		l, err = net.Listen("tcp4", "127.0.0.1:0")
		return err
	})
	if err != nil {
		return err
	}
	defer l.Close()
	src := netip.MustParseAddrPort("192.0.2.7:40000") // RFC 5737
	c, err := nsDialer{ns: ns, mark: mark}.DialTCP(ctx, src, l.Addr().(*net.TCPAddr).AddrPort())
	if err != nil {
		return err
	}
	defer c.Close()
	s, err := l.Accept()
	if err != nil {
		return err
	}
	defer s.Close()
	if s.RemoteAddr().String() != src.String() {
		return fmt.Errorf("the server saw %s instead of %s", s.RemoteAddr(), src)
	}
	return nil
}

// kernelHasIPv6 reports whether there are IPv6 sockets.
func kernelHasIPv6() bool {
	fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err == nil {
		unix.Close(fd)
	}
	return !errors.Is(err, unix.EAFNOSUPPORT)
}
