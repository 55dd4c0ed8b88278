package netnsutil

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// What follows is about the host: the network namespace that the process runs
// in, and not that of any NS.

// ErrNoHostLink is returned by [HostLink] for a host that has no default route,
// and so no interface worth copying.
var ErrNoHostLink = errors.New("the host has no interface with a default route")

// HostLink describes the host's main interface for a copy of it in a namespace:
// name, MTU, and for each family the addresses and the main table's routes of
// the interface with that family's best default route. That may be two
// interfaces, name and MTU are then those of IPv4's. Link-local and deprecated
// addresses are left out, and so are the routes that follow from the addresses.
// The error is [ErrNoHostLink] where neither family has a default route.
func HostLink() (Link, error) { return hostLink(0) }

// ReadLink is [HostLink] for the interface of the given name, which need not have
// a default route. The error is [os.ErrNotExist] where there is no such interface.
func ReadLink(name string) (Link, error) {
	l, err := netlink.LinkByName(name)
	if _, missing := errors.AsType[netlink.LinkNotFoundError](err); missing {
		err = os.ErrNotExist
	}
	if err != nil {
		return Link{}, fmt.Errorf("read the host's interface %s: %w", name, err)
	}
	return hostLink(l.Attrs().Index)
}

// hostLink reads interface index, or if that is 0, the main one.
func hostLink(index int) (Link, error) {
	wanted := index
	var link Link
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		routes, err := mainRoutes(family)
		if err != nil {
			return Link{}, fmt.Errorf("read the host's routes: %w", err)
		}
		i := slices.IndexFunc(routes, func(r hostRoute) bool { return r.Dst.Bits() == 0 })
		switch {
		case wanted != 0:
		case i < 0:
			continue
		default:
			index = routes[i].ifindex
		}
		l, err := netlink.LinkByIndex(index)
		if err != nil {
			return Link{}, fmt.Errorf("read the host's interface %d: %w", index, err)
		}
		if link.Name == "" {
			link.Name, link.MTU = l.Attrs().Name, l.Attrs().MTU
		}
		addrs, err := dump(func() ([]netlink.Addr, error) { return netlink.AddrList(l, family) })
		if err != nil {
			return Link{}, fmt.Errorf("read the addresses of the host's interface %s: %w", l.Attrs().Name, err)
		}
		link.addHost(addrs, routes, index)
	}
	if link.Name == "" {
		return Link{}, ErrNoHostLink
	}
	return link, nil
}

// addHost adds addresses of one family, and the routes by interface index.
func (l *Link) addHost(addrs []netlink.Addr, routes []hostRoute, index int) {
	const unfit = unix.IFA_F_DEPRECATED | unix.IFA_F_TENTATIVE | unix.IFA_F_DADFAILED
	for _, a := range addrs {
		p := prefix(a.IPNet)
		if p.IsValid() && !p.Addr().IsLinkLocalUnicast() && a.Flags&unfit == 0 {
			l.Addrs = append(l.Addrs, p)
		}
	}
	for _, r := range routes {
		follows := !r.Via.IsValid() && slices.ContainsFunc(l.Addrs, func(p netip.Prefix) bool { return p.Masked() == r.Dst })
		// Of several to the same net the best is copied.
		again := slices.ContainsFunc(l.Routes, func(have Route) bool { return have.Dst == r.Dst })
		if r.ifindex == index && !follows && !again && !r.Dst.Addr().IsLinkLocalUnicast() {
			l.Routes = append(l.Routes, r.Route)
		}
	}
}

// hostRoute is a route of the host, by one of its interfaces.
type hostRoute struct {
	Route
	ifindex  int
	priority int
}

// mainRoutes returns the unicast routes of the main table that can be used, the
// best first. A route with several next hops counts once for each.
func mainRoutes(family int) ([]hostRoute, error) {
	list, err := dump(func() ([]netlink.Route, error) { return netlink.RouteList(nil, family) })
	if err != nil {
		return nil, err
	}
	var routes []hostRoute
	for _, r := range list {
		dst := prefix(r.Dst)
		hops := r.MultiPath
		if len(hops) == 0 {
			hops = []*netlink.NexthopInfo{{LinkIndex: r.LinkIndex, Gw: r.Gw, Flags: r.Flags}}
		}
		for _, hop := range hops {
			if r.Type != unix.RTN_UNICAST || hop.LinkIndex == 0 || hop.Flags&unix.RTNH_F_DEAD != 0 {
				continue
			}
			// A gateway of the other family (RTA_VIA) is left out; in the
			// namespace anything on the link is the gateway.
			via, _ := netip.AddrFromSlice(hop.Gw)
			routes = append(routes, hostRoute{Route{Dst: dst, Via: via}, hop.LinkIndex, r.Priority})
		}
	}
	slices.SortStableFunc(routes, func(a, b hostRoute) int { return cmp.Compare(a.priority, b.priority) })
	return routes, nil
}

// Addrs returns the addresses of all interfaces in ns, as [LocalAddrs] does for
// the host.
func (ns *NS) Addrs() (prefixes []netip.Prefix, err error) {
	err = ns.Do(func() error {
		prefixes, err = LocalAddrs()
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("network namespace %s: %w", ns, err)
	}
	return prefixes, nil
}

// LocalAddrs returns the addresses of all of the host's interfaces, loopback and
// link-local ones included.
func LocalAddrs() ([]netip.Prefix, error) {
	addrs, err := dump(func() ([]netlink.Addr, error) { return netlink.AddrList(nil, unix.AF_UNSPEC) })
	if err != nil {
		return nil, fmt.Errorf("read addresses: %w", err)
	}
	prefixes := make([]netip.Prefix, 0, len(addrs))
	for _, a := range addrs {
		if p := prefix(a.IPNet); p.IsValid() {
			prefixes = append(prefixes, p)
		}
	}
	return prefixes, nil
}

// Two addresses that are as far away as any: root name servers (A, of
// root-servers.org). A host that reaches the Internet by 0.0.0.0/1 and
// 128.0.0.0/1, as behind a VPN, has no default route but a way to them.
var (
	farIPv4 = netip.MustParseAddr("198.41.0.4")
	farIPv6 = netip.MustParseAddr("2001:503:ba3e::2:30")
)

// MainAddr returns the address that the host shows to the world, IPv6 or IPv4:
// the source address of its default route, as the kernel chooses it. No packet
// is sent. It reports false where there is none.
func MainAddr(ipv6 bool) (netip.Addr, bool) {
	far := farIPv4
	if ipv6 {
		far = farIPv6
	}
	routes, err := netlink.RouteGet(far.AsSlice())
	if err != nil || len(routes) == 0 { // ENETUNREACH and relatives
		return netip.Addr{}, false
	}
	addr, ok := netip.AddrFromSlice(routes[0].Src)
	return addr, ok && !addr.IsLoopback()
}

// HostWatch tells when the host's network changes. It is made by [WatchHost].
type HostWatch struct {
	sock    *os.File
	settle  time.Duration
	changes chan struct{}
	done    chan struct{}
}

// WatchHost starts to watch addresses, routes and interfaces of the host. Changes
// come in bursts: those within settle of the first are one, which is told then; 0
// tells of each at once. The caller closes the watch.
func WatchHost(settle time.Duration) (*HostWatch, error) {
	sock, err := netlinkGroups(unix.NETLINK_ROUTE, unix.RTMGRP_LINK|unix.RTMGRP_IPV4_IFADDR|unix.RTMGRP_IPV6_IFADDR|
		unix.RTMGRP_IPV4_ROUTE|unix.RTMGRP_IPV6_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("watch the host's network: %w", err)
	}
	w := &HostWatch{sock: sock, settle: settle, changes: make(chan struct{}, 1), done: make(chan struct{})}
	go w.receive()
	return w, nil
}

// Changes returns a channel that yields after a change. Changes that come while
// nobody receives are one. It is closed by Close. Of a nil HostWatch it is nil:
// there are never any.
func (w *HostWatch) Changes() <-chan struct{} {
	if w == nil {
		return nil
	}
	return w.changes
}

// Close ends the watch. It is idempotent, and may be called on nil.
func (w *HostWatch) Close() error {
	if w == nil {
		return nil
	}
	err := w.sock.Close()
	<-w.done
	if errors.Is(err, os.ErrClosed) {
		return nil
	}
	return err
}

func (w *HostWatch) receive() {
	defer close(w.done)
	defer close(w.changes)
	for skipMessage(w.sock) {
		if w.settle > 0 {
			_ = w.sock.SetReadDeadline(time.Now().Add(w.settle))
			for skipMessage(w.sock) {
			}
			_ = w.sock.SetReadDeadline(time.Time{}) // an error is that of the next read
		}
		select {
		case w.changes <- struct{}{}:
		default:
		}
	}
}

// netlinkGroups opens a socket of the thread's namespace that hears of what happens
// in multicast groups; group n is bit n-1 (netlink(7)).
func netlinkGroups(protocol int, groups uint32) (*os.File, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, protocol)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: groups}); err != nil {
		unix.Close(fd)
		return nil, os.NewSyscallError("bind", err)
	}
	return os.NewFile(uintptr(fd), "netlink"), nil
}

// skipMessage takes a message, and reports whether there was one.
func skipMessage(sock *os.File) bool {
	_, ok := readMessage(sock, make([]byte, 1))
	return ok
}

// readMessage takes a message, the first bytes of it into buf, and reports whether
// there was one. None of its bytes say that there were more messages than would fit.
func readMessage(sock *os.File, buf []byte) (n int, ok bool) {
	n, err := sock.Read(buf)
	if errors.Is(err, unix.ENOBUFS) {
		return 0, true
	}
	return n, err == nil
}
