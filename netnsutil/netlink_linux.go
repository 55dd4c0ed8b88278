package netnsutil

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Configure brings up loopback in ns, and then makes link true: MTU, queue, MAC
// address, addresses, up, routes. The interface must exist; an empty link.Name
// is none, so that the zero Link brings up loopback alone. Addresses and routes
// that the namespace has besides are left alone, and doing it again changes
// nothing.
//
// A route that another interface has already, with the same metric, is
// [ErrRouteTaken].
//
// The addresses are usable at once: there is no duplicate address detection on
// the interface. Neither does it take router advertisements.
func (ns *NS) Configure(link Link) error {
	err := ns.Do(func() error {
		h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		if err != nil {
			return err
		}
		defer h.Close()
		if err := linkUp(h, "lo"); err != nil || link.Name == "" {
			return err
		}
		return configureLink(h, link)
	})
	if err != nil {
		return fmt.Errorf("configure network namespace %s: %w", ns, err)
	}
	return nil
}

func linkUp(h *netlink.Handle, name string) error {
	l, err := h.LinkByName(name)
	if err == nil {
		err = h.LinkSetUp(l)
	}
	if err != nil {
		return fmt.Errorf("bring up interface %s: %w", name, err)
	}
	return nil
}

func configureLink(h *netlink.Handle, link Link) error {
	l, err := h.LinkByName(link.Name)
	if err != nil {
		return fmt.Errorf("find interface %s: %w", link.Name, err)
	}
	if !link.Down {
		hasIPv6 := slices.ContainsFunc(link.Addrs, func(p netip.Prefix) bool { return p.Addr().Is6() })
		setIPv6Conf(link.Name, hasIPv6)
	}
	if link.MTU != 0 {
		if err := h.LinkSetMTU(l, link.MTU); err != nil {
			return fmt.Errorf("set MTU of interface %s to %d: %w", link.Name, link.MTU, err)
		}
	}
	if link.QueueLen != 0 {
		if err := h.LinkSetTxQLen(l, link.QueueLen); err != nil {
			return fmt.Errorf("set queue length of interface %s to %d: %w", link.Name, link.QueueLen, err)
		}
	}
	if link.HardwareAddr != nil {
		if err := h.LinkSetHardwareAddr(l, link.HardwareAddr); err != nil {
			return fmt.Errorf("set MAC address of interface %s to %s: %w", link.Name, link.HardwareAddr, err)
		}
	}
	if link.Down {
		return nil
	}
	if err := linkUp(h, link.Name); err != nil {
		return err
	}
	for _, p := range link.addrsInOrder() {
		addr := &netlink.Addr{IPNet: ipNet(p)}
		if p.Addr().Is6() {
			addr.Flags = unix.IFA_F_NODAD
		}
		if err := h.AddrReplace(l, addr); err != nil {
			return fmt.Errorf("add address %s to interface %s: %w", p, link.Name, err)
		}
	}
	if err := link.congestConnected(h, l.Attrs().Index); err != nil {
		return err
	}
	for _, r := range link.inOrder() {
		route := &netlink.Route{LinkIndex: l.Attrs().Index, Dst: ipNet(r.Dst), Congctl: link.Congestion}
		if r.Via.IsValid() {
			route.Gw = r.Via.AsSlice()
		} else if r.Dst.Addr().Is4() {
			route.Scope = netlink.SCOPE_LINK
		}
		if !link.reaches(r.Via) {
			route.Flags = int(netlink.FLAG_ONLINK)
		}
		if err := setRoute(h, route); err != nil {
			return fmt.Errorf("add route to %s by interface %s: %w", r.Dst, link.Name, err)
		}
	}
	for _, p := range link.Addrs {
		if p.Addr().Is6() {
			awaitLocal(h, p.Addr())
		}
	}
	return nil
}

// congestConnected puts Congestion into the routes that the kernel has made for the
// nets of the addresses, each for the first address in it.
func (link Link) congestConnected(h *netlink.Handle, index int) error {
	if link.Congestion == "" {
		return nil
	}
	var done []netip.Prefix
	for _, p := range link.addrsInOrder() {
		if p.IsSingleIP() || slices.Contains(done, p.Masked()) {
			continue
		}
		done = append(done, p.Masked())
		route := &netlink.Route{LinkIndex: index, Dst: ipNet(p.Masked()), Protocol: unix.RTPROT_KERNEL, Congctl: link.Congestion}
		if p.Addr().Is4() {
			route.Scope, route.Src = netlink.SCOPE_LINK, p.Addr().AsSlice()
		} else {
			route.Priority = 256 // IP6_RT_PRIO_ADDRCONF
		}
		if err := setRoute(h, route); err != nil && !errors.Is(err, ErrRouteTaken) {
			return fmt.Errorf("set congestion control of the route to %s by interface %s: %w", p.Masked(), link.Name, err)
		}
	}
	return nil
}

// ErrRouteTaken says that another interface of the namespace has a route to the same
// destination, of the same metric.
var ErrRouteTaken = errors.New("another interface has such a route")

// setRoute adds a route, or replaces that of the same interface. The kernel would
// replace that of another interface as well: the error wraps ErrRouteTaken.
func setRoute(h *netlink.Handle, route *netlink.Route) error {
	err := h.RouteAdd(route)
	if !errors.Is(err, unix.EEXIST) {
		return err
	}
	family, metric := unix.AF_INET, route.Priority
	if len(route.Dst.IP) == net.IPv6len {
		if family = unix.AF_INET6; metric == 0 {
			metric = 1024 // IP6_RT_PRIO_USER
		}
	}
	routes, err := again(func() ([]netlink.Route, error) {
		return h.RouteListFiltered(family, &netlink.Route{Dst: route.Dst}, netlink.RT_FILTER_DST)
	})
	if err != nil {
		return err
	}
	for _, r := range routes {
		if r.LinkIndex != route.LinkIndex && r.Priority == metric {
			return fmt.Errorf("%w: number %d", ErrRouteTaken, r.LinkIndex)
		}
	}
	return h.RouteReplace(route)
}

// addrsInOrder returns the addresses in the order in which to add them, so that
// the first of each family is the one that the kernel prefers as a source: of
// equally good ones it takes the oldest in IPv4, and the youngest in IPv6
// (ipv6_link_dev_addr in net/ipv6/addrconf.c puts it first).
func (link Link) addrsInOrder() []netip.Prefix {
	var addrs []netip.Prefix
	for _, p := range link.Addrs {
		if p.Addr().Is4() {
			addrs = append(addrs, p)
		}
	}
	for _, p := range slices.Backward(link.Addrs) {
		if p.Addr().Is6() {
			addrs = append(addrs, p)
		}
	}
	return addrs
}

// awaitLocal waits until the kernel takes packets to an IPv6 address of the
// namespace. Even without duplicate address detection the local route to a new
// one is the work of a kernel thread (addrconf_dad_work), some milliseconds
// later; what arrives before is dropped. It gives up after a second.
func awaitLocal(h *netlink.Handle, addr netip.Addr) {
	for deadline := time.Now().Add(time.Second); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		routes, err := h.RouteGet(addr.AsSlice())
		if err == nil && len(routes) > 0 && routes[0].Type == unix.RTN_LOCAL {
			return
		}
	}
}

// setIPv6Conf sets the interface's IPv6 knobs (kernel's ip-sysctl.rst); /proc/sys
// shows the namespace of the thread that opens a file. It does what it can: in a
// kernel without IPv6 there is nothing to do, and where /proc is mounted
// read-only either the address cannot be added, which gets reported, or all that
// is lost is a second until the link-local address can be used.
func setIPv6Conf(ifname string, enable bool) {
	conf := []struct{ name, value string }{
		{"accept_ra", "0"}, {"autoconf", "0"}, {"accept_dad", "0"},
	}
	if enable {
		conf = append(conf, struct{ name, value string }{"disable_ipv6", "0"})
	}
	for _, c := range conf {
		// Not os.WriteFile: it would make the file.
		f, err := os.OpenFile(filepath.Join("/proc/sys/net/ipv6/conf", ifname, c.name), os.O_WRONLY, 0)
		if err != nil {
			continue
		}
		_, _ = f.WriteString(c.value)
		f.Close()
	}
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// prefix converts n; the zero Prefix is none. The netlink package has IPv4
// addresses of 16 bytes as well.
func prefix(n *net.IPNet) netip.Prefix {
	if n == nil {
		return netip.Prefix{}
	}
	addr, _ := netip.AddrFromSlice(n.IP)
	bits, _ := n.Mask.Size()
	return netip.PrefixFrom(addr.Unmap(), bits)
}

// dump calls list until the kernel's tables did not change meanwhile
// (NLM_F_DUMP_INTR), or for so long that any answer will do.
func dump[T any](list func() ([]T, error)) ([]T, error) {
	for range 10 {
		if l, err := list(); !errors.Is(err, netlink.ErrDumpInterrupted) {
			return l, err
		}
	}
	l, err := list()
	if errors.Is(err, netlink.ErrDumpInterrupted) {
		err = nil
	}
	return l, err
}
