package main

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/gofwd/gofwd/netnsutil"
)

// The addresses, of the documentation prefixes (RFC 5737, RFC 3849). They are
// the same in every site, since no two sites are connected. The client is not
// the host's gateway: pasta gives that address a meaning of its own.
var (
	hostAddr    = [2]netip.Prefix{netip.MustParsePrefix("198.51.100.1/24"), netip.MustParsePrefix("2001:db8:1::1/64")}
	clientAddr  = [2]netip.Prefix{netip.MustParsePrefix("198.51.100.3/24"), netip.MustParsePrefix("2001:db8:1::3/64")}
	gatewayAddr = [2]netip.Prefix{netip.MustParsePrefix("198.51.100.2/24"), netip.MustParsePrefix("2001:db8:1::2/64")}
	loopbacks   = [2]netip.Addr{netip.MustParseAddr("127.0.0.1"), netip.MustParseAddr("::1")}
)

// family is the index of IP version 4 or 6 in the tables above.
func family(ip int) int { return (ip - 4) / 2 }

// namespace is a network namespace with a name, at /run/netns/NAME of the run's
// own mount namespace.
type namespace struct {
	name string
	ns   *netnsutil.NS
	path string // "" where it belongs to somebody else
}

// newNamespace makes a namespace whose loopback is up.
func newNamespace(name string) (*namespace, error) {
	ns, err := netnsutil.New()
	if err != nil {
		return nil, err
	}
	n := &namespace{name: name, ns: ns, path: filepath.Join("/run/netns", name)}
	if err := n.setUp(); err != nil {
		n.close()
		return nil, fmt.Errorf("set up namespace %s: %w", name, err)
	}
	return n, nil
}

func (n *namespace) setUp() error {
	if err := os.WriteFile(n.path, nil, 0o444); err != nil {
		return err
	}
	if err := unix.Mount(fmt.Sprintf("/proc/self/fd/%d", n.ns.Fd()), n.path, "", unix.MS_BIND, ""); err != nil {
		return os.NewSyscallError("mount", err)
	}
	return n.ns.Configure(netnsutil.Link{})
}

// do runs fn on a thread in the namespace.
func (n *namespace) do(fn func() error) error { return n.ns.Do(fn) }

func (n *namespace) close() {
	if n.path != "" {
		// The mount fails to go only where setUp failed to make it.
		_ = unix.Unmount(n.path, unix.MNT_DETACH)
		os.Remove(n.path)
	}
	n.ns.Close()
}

// sysctl is one setting of a namespace, by its path under /proc/sys.
type sysctl struct{ name, value string }

// setSysctls sets what a bed asks for, beside the ephemeral ports: thousands of
// connections a second would use up the default range, and hit TIME_WAIT, in
// the native row first.
func (n *namespace) setSysctls(more []sysctl) error {
	all := append([]sysctl{
		{"net/ipv4/ip_local_port_range", "10000 65535"},
		{"net/ipv4/tcp_tw_reuse", "1"},
	}, more...)
	return n.do(func() error {
		for _, s := range all {
			if err := os.WriteFile(filepath.Join("/proc/sys", s.name), []byte(s.value), 0); err != nil {
				return fmt.Errorf("set sysctl in %s: %w", n.name, err)
			}
		}
		return nil
	})
}

// tapBytes returns how many bytes have gone over the interfaces of the
// namespace, both ways, the loopback left out.
func (n *namespace) tapBytes() (bytes uint64, mtu int, err error) {
	err = n.do(func() error {
		links, err := netlink.LinkList()
		if err != nil {
			return fmt.Errorf("list interfaces: %w", err)
		}
		for _, l := range links {
			if a := l.Attrs(); a.Flags&net.FlagLoopback == 0 && a.Flags&net.FlagUp != 0 {
				bytes += a.Statistics.RxBytes + a.Statistics.TxBytes
				mtu = a.MTU
			}
		}
		return nil
	})
	return bytes, mtu, err
}

// connect joins client and host by a veth pair and gives both their addresses:
//
//	client                                  host
//	198.51.100.3, .2  2001:db8:1::3, ::2 ── eth0 veth eth0 ── 198.51.100.1  2001:db8:1::1
//	                                        default routes via .2 and ::2, which is the client
func connect(client, host *namespace) error {
	clientLink := netnsutil.Link{Name: "eth0", MTU: 1500, Addrs: slices.Concat(clientAddr[:], gatewayAddr[:])}
	hostLink := netnsutil.Link{Name: "eth0", MTU: 1500, Addrs: hostAddr[:]}
	for i, any := range []string{"0.0.0.0/0", "::/0"} {
		route := netnsutil.Route{Dst: netip.MustParsePrefix(any), Via: gatewayAddr[i].Addr()}
		hostLink.Routes = append(hostLink.Routes, route)
	}
	return netnsutil.Veth(host.ns, hostLink, client.ns, clientLink)
}

// ask connects from the namespace, sends a question, and returns the beginning
// of the answer. The load server's questions are [askEcho] and [askSource].
func (n *namespace) ask(network string, addr netip.AddrPort, question string) (string, error) {
	const timeout = time.Second
	var conn net.Conn
	err := n.do(func() (err error) {
		conn, err = net.DialTimeout(network, addr.String(), timeout)
		return err
	})
	if err != nil {
		return "", err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(timeout)); err != nil {
		return "", err
	}
	if _, err := conn.Write([]byte(question)); err != nil {
		return "", err
	}
	buf := make([]byte, 128)
	got, err := conn.Read(buf)
	return string(buf[:got]), err
}
