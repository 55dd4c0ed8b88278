package netnsutil

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// The kernel path lets an ordinary socket in a namespace speak with somebody
// else's address, and hear what is sent to that address. Three things in the
// namespace make the packets come back to the socket instead of leaving:
//
//	ip rule add fwmark LOOP/MASK lookup TABLE     what carries the mark ...
//	ip route add local default dev lo table TABLE ... is for this machine,
//	sysctl tcp_fwmark_accept=1, fwmark_reflect=1  and replies carry it too
//
// A transparent socket (IP_TRANSPARENT, SO_MARK) bound to a client's address
// connects to the server over lo. The server's socket inherits the mark from
// the SYN (tcp_fwmark_accept, Linux 3.15), and so does the RST of a closed port
// (fwmark_reflect), so every reply meets the same rule, is local, and is
// delivered to the transparent socket. For connections that the container
// begins see kernelpathnft_linux.go.
//
// Mark, table and priority are not fixed: bits and numbers that nobody in the
// namespace uses are looked for. What we made is known by its protocol number
// (FRA_PROTOCOL, RTA_PROTOCOL), so that the leftovers of a process that was
// killed are found and removed, and nothing else is.
const (
	// kernelPathProto marks our rules and routes. Numbers above
	// RTPROT_STATIC are not interpreted by the kernel (rtnetlink(7)); this
	// one is not in iproute2's rt_protos.
	kernelPathProto = 103
	// firstTable is where the search for a free routing table begins.
	firstTable = 26479
	// lastPriority is the lowest precedence our rules are given; they must
	// come before every rule that could route marked packets elsewhere.
	lastPriority = 100
	// metricBase plus the sysctls as they were found is the metric of our
	// local route: the note that lets the next start after kill -9 put back
	// what the first one found.
	metricBase = 1000
	// ownerName is the abstract socket that says that a namespace has a
	// kernel path and its process lives (unix(7): such names belong to the
	// network namespace, and vanish with the socket).
	ownerName = "@gofwd-kernel-path"
)

// LocalCongestion is the congestion control for connections that do not leave the
// machine, which every kernel has and every user may choose. There is no congestion
// over lo, and one that paces (bbr, which a namespace inherits from the host) spends
// more time on timers and small bursts than the copying takes (bench, cc=default).
// A socket that paced once does so for good (sk_pacing_status), so it must be chosen
// before the handshake: by a socket option, that of the listener or before connect(2);
// for sockets of the container's own programs by the route (RTAX_CC_ALGO, Linux 4.0),
// of the SYN or of the SYN-ACK.
const LocalCongestion = "reno"

// ErrKernelPathBusy says that another process runs a kernel path in the
// namespace.
var ErrKernelPathBusy = errors.New("another gofwd runs the kernel path of this namespace")

// KernelPath is the routing of the kernel path in one namespace: what
// [NS.OpenKernelPath] programmed and Close takes back. Its methods may be called
// at the same time.
type KernelPath struct {
	// Immutable after OpenKernelPath.
	ns       *NS
	h        *netlink.Handle
	nft      *nftables.Conn
	owner    int // descriptor of the abstract socket
	families []int
	lo       int // interface index
	marks    marks
	table    int // the local default route
	priority int
	sysctls  []*sysctl

	mu          sync.Mutex // guards what follows
	wanted      nftRules
	loaded      map[string]int // rules of our table, by chain; nil without one
	acceptLocal *sysctl        // of the tap
	udp         udpRoutes
	tap         int // interface index; 0 without ServeBehind
	guard       *guard
	closed      bool
}

// OpenKernelPath programs the namespace for transparent sockets, IPv4 and IPv6
// as far as the namespace has them, and verifies the result. Leftovers of a
// process that was killed are replaced. It needs CAP_NET_ADMIN over the user
// namespace that owns the network namespace, to enter it CAP_SYS_ADMIN, and
// afterwards only the former. The error wraps [ErrKernelPathBusy] or the errno
// of what is not to be had; nothing is left then. ns must stay open until Close.
func (ns *NS) OpenKernelPath() (*KernelPath, error) {
	k := &KernelPath{ns: ns, owner: -1}
	if err := k.open(); err != nil {
		k.Close()
		return nil, fmt.Errorf("open kernel path: %w", err)
	}
	return k, nil
}

// Mark is the SO_MARK of transparent sockets.
func (k *KernelPath) Mark() uint32 { return k.marks.loop }

// IPv4 reports whether the namespace takes transparent IPv4 sockets.
func (k *KernelPath) IPv4() bool { return k.has(unix.AF_INET) }

// IPv6 reports whether the namespace takes transparent IPv6 sockets.
func (k *KernelPath) IPv6() bool { return k.has(unix.AF_INET6) }

func (k *KernelPath) has(family int) bool { return slices.Contains(k.families, family) }

func (k *KernelPath) open() (err error) {
	if err := k.own(); err != nil {
		return err
	}
	// Not netlink.NewHandleAt, which leaves the thread in the namespace when it
	// may not go back.
	err = k.ns.Do(func() (err error) {
		k.h, err = netlink.NewHandle(unix.NETLINK_ROUTE)
		return err
	})
	if err != nil {
		return fmt.Errorf("open netlink: %w", err)
	}
	// One lasting connection: later, the process may not enter the
	// namespace any more.
	nft, err := k.ns.openNFT()
	if err == nil { // without nf_tables there is still the inbound half
		k.nft = nft
	}
	lo, err := k.h.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("find lo: %w", err)
	}
	k.lo = lo.Attrs().Index
	if lo.Attrs().Flags&net.FlagUp == 0 { // routes over it would be accepted, and lead nowhere
		return fmt.Errorf("use lo: %w", unix.ENETDOWN)
	}

	was, found, err := k.removeLeftovers()
	if err != nil {
		return err
	}
	if err := k.openSysctls(was, found); err != nil {
		return err
	}
	if err := k.chooseNumbers(); err != nil {
		return err
	}
	return k.program()
}

// own binds the abstract socket that tells other processes to keep off.
func (k *KernelPath) own() error {
	return k.ns.Do(func() error {
		fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return os.NewSyscallError("socket", err)
		}
		err = unix.Bind(fd, &unix.SockaddrUnix{Name: ownerName})
		if err != nil {
			unix.Close(fd)
			if errors.Is(err, unix.EADDRINUSE) {
				return ErrKernelPathBusy
			}
			return os.NewSyscallError("bind", err)
		}
		k.owner = fd
		return nil
	})
}

// removeLeftovers deletes what an earlier process left, and returns the
// sysctls that it had found; found is false where there is nothing.
func (k *KernelPath) removeLeftovers() (was uint, found bool, err error) {
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		routes, err := k.ownRoutes(family)
		if err != nil {
			return 0, false, err
		}
		for _, r := range routes {
			if m := r.Priority - metricBase; isDefault(r.Dst) && m >= 0 && m < 1<<len(sysctlPaths) {
				was, found = uint(m), true
			}
		}
		if err := k.flush(family); err != nil {
			return 0, false, err
		}
	}
	// A namespace without nf_tables has no table of ours either.
	_ = k.deleteTable()
	return was, found, nil
}

// chooseNumbers finds mark bits, a table and a priority that nobody uses.
func (k *KernelPath) chooseNumbers() error {
	used := map[int]bool{}
	var bits markUse
	k.priority = lastPriority
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		rules, err := again(func() ([]netlink.Rule, error) { return k.h.RuleList(family) })
		if err != nil && !errors.Is(err, unix.EAFNOSUPPORT) { // IPv6 is not there
			return fmt.Errorf("list rules: %w", err)
		}
		for _, r := range rules {
			used[r.Table] = true
			if r.Mark != 0 || r.Mask != nil {
				mask := ^uint32(0)
				if r.Mask != nil {
					mask = *r.Mask
				}
				bits.add(r.Mark, mask)
			}
			// Ours comes before all others but the local table's at 0.
			// If there is no room in between, 0 it is: a rule is put
			// behind those of its own priority.
			if r.Priority > 0 && r.Priority <= k.priority {
				k.priority = r.Priority - 1
			}
		}
		routes, err := again(func() ([]netlink.Route, error) {
			return k.h.RouteListFiltered(family, &netlink.Route{Table: unix.RT_TABLE_UNSPEC}, netlink.RT_FILTER_TABLE)
		})
		if err != nil && !errors.Is(err, unix.EAFNOSUPPORT) {
			return fmt.Errorf("list routes: %w", err)
		}
		for _, r := range routes {
			used[r.Table] = true
		}
	}
	k.scanNFT(&bits)
	var ok bool
	if k.marks, ok = bits.free(); !ok {
		return errors.New("find mark: every mark bit is in use")
	}
	k.table = firstTable
	for used[k.table] || used[k.table+1] {
		k.table += 2
	}
	k.udp.table = k.table + 1
	return nil
}

// program adds routes, rules and sysctls, in an order in which a crash leaves
// nothing that cannot be recognised.
func (k *KernelPath) program() error {
	var firstErr error
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		err := k.programFamily(family)
		if err != nil {
			// A disabled family refuses the route (EACCES for IPv6 by
			// disable_ipv6, EAFNOSUPPORT without it).
			if firstErr == nil {
				firstErr = err
			}
			if err := k.flush(family); err != nil {
				return err
			}
			continue
		}
		k.families = append(k.families, family)
	}
	if len(k.families) == 0 {
		return firstErr
	}
	for _, s := range k.sysctls {
		if err := s.set(); err != nil {
			return err
		}
	}
	for _, family := range k.families {
		if err := k.verify(family); err != nil {
			return err
		}
	}
	return nil
}

func (k *KernelPath) programFamily(family int) error {
	if err := k.h.RouteAdd(k.localRoute(family)); err != nil {
		return fmt.Errorf("add local route: %w", err)
	}
	if err := k.h.RuleAdd(k.markRule(family)); err != nil {
		return fmt.Errorf("add rule: %w", err)
	}
	return nil
}

func (k *KernelPath) markRule(family int) *netlink.Rule {
	r := netlink.NewRule()
	r.Family = family
	r.Priority = k.priority
	r.Mark, r.Mask = k.marks.loop, &k.marks.mask
	r.Table = k.table
	r.Protocol = kernelPathProto
	return r
}

func (k *KernelPath) localRoute(family int) *netlink.Route {
	metric := metricBase
	for i, s := range k.sysctls {
		if s.was {
			metric |= 1 << i
		}
	}
	return &netlink.Route{
		Family:    family,
		LinkIndex: k.lo,
		Dst:       defaultNet(family),
		Type:      unix.RTN_LOCAL,
		Scope:     netlink.Scope(unix.RT_SCOPE_HOST),
		Table:     k.table,
		Priority:  metric,
		Protocol:  kernelPathProto,
		Congctl:   LocalCongestion,
	}
}

// verify asks the kernel where a marked packet to the outside would go.
func (k *KernelPath) verify(family int) error {
	dst := netip.MustParseAddr("192.0.2.1") // TEST-NET-1, RFC 5737
	if family == unix.AF_INET6 {
		dst = netip.MustParseAddr("2001:db8::1") // RFC 3849
	}
	routes, err := k.h.RouteGetWithOptions(dst.AsSlice(), &netlink.RouteGetOptions{Mark: k.marks.loop})
	if err != nil {
		return fmt.Errorf("verify rule: %w", err)
	}
	if len(routes) != 1 || routes[0].Type != unix.RTN_LOCAL {
		return fmt.Errorf("verify rule: a packet to %s with mark %#x is not local: another rule comes first", dst, k.marks.loop)
	}
	return nil
}

// Close removes what was added and restores the sysctls. It is idempotent, and
// needs no more than CAP_NET_ADMIN. Sockets that were made for the path must be
// closed before: what they send would leave by the default route.
func (k *KernelPath) Close() error {
	k.mu.Lock()
	wasClosed := k.closed
	k.closed = true
	k.mu.Unlock()
	if wasClosed {
		return nil
	}
	if k.guard != nil {
		k.guard.end()
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	var errs []error
	if k.loaded != nil {
		errs = append(errs, k.deleteTable())
	}
	// The sysctls before the route, which is the note of what they were.
	for _, s := range k.sysctls {
		errs = append(errs, s.restore())
	}
	if k.acceptLocal != nil {
		_ = k.acceptLocal.restore() // gone where the tap is gone
	}
	if k.h != nil {
		for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
			errs = append(errs, k.flush(family))
		}
		k.h.Close()
	}
	if k.nft != nil {
		errs = append(errs, k.nft.CloseLasting())
	}
	if k.owner >= 0 {
		errs = append(errs, os.NewSyscallError("close", unix.Close(k.owner)))
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("close kernel path: %w", err)
	}
	return nil
}

// flush deletes the rules and routes of a family that carry our protocol
// number.
func (k *KernelPath) flush(family int) error {
	rules, err := again(func() ([]netlink.Rule, error) { return k.h.RuleList(family) })
	if err != nil && !errors.Is(err, unix.EAFNOSUPPORT) {
		return fmt.Errorf("list rules: %w", err)
	}
	for _, r := range rules {
		if r.Protocol != kernelPathProto {
			continue
		}
		r.Family = family // not filled in by the dump
		if err := k.h.RuleDel(&r); err != nil && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("delete rule: %w", err)
		}
	}
	routes, err := k.ownRoutes(family)
	if err != nil {
		return err
	}
	for _, r := range routes {
		if err := k.h.RouteDel(&r); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("delete route: %w", err)
		}
	}
	return nil
}

// ownRoutes lists the routes of all tables that carry our protocol number.
func (k *KernelPath) ownRoutes(family int) ([]netlink.Route, error) {
	routes, err := again(func() ([]netlink.Route, error) {
		return k.h.RouteListFiltered(family,
			&netlink.Route{Table: unix.RT_TABLE_UNSPEC, Protocol: kernelPathProto, Type: unix.RTN_LOCAL},
			netlink.RT_FILTER_TABLE|netlink.RT_FILTER_PROTOCOL|netlink.RT_FILTER_TYPE)
	})
	if err != nil && !errors.Is(err, unix.EAFNOSUPPORT) {
		return nil, fmt.Errorf("list routes: %w", err)
	}
	return routes, nil
}

// again repeats a dump that a change in the meantime made inconsistent
// (NLM_F_DUMP_INTR).
func again[T any](dump func() ([]T, error)) ([]T, error) {
	for range 10 {
		if list, err := dump(); !errors.Is(err, netlink.ErrDumpInterrupted) {
			return list, err
		}
	}
	return dump()
}

func defaultNet(family int) *net.IPNet {
	if family == unix.AF_INET {
		return &net.IPNet{IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)}
	}
	return &net.IPNet{IP: net.IPv6zero, Mask: net.CIDRMask(0, 128)}
}

func isDefault(n *net.IPNet) bool {
	if n == nil {
		return true
	}
	ones, _ := n.Mask.Size()
	return ones == 0
}
