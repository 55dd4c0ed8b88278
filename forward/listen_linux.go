package forward

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/gofwd/gofwd/netnsutil"
)

// boundListener is one socket that listens for a rule. Whoever has it closes it.
type boundListener struct {
	// rule is narrowed to the one port that the socket is bound to, the
	// one that the kernel chose included.
	rule    Rule
	address netip.AddrPort // as of addr
	// Exactly one is not nil; unix too is for rules of TCP.
	tcp  *net.TCPListener
	unix *net.UnixListener
	udp  *net.UDPConn
	// shared lets other sockets of ours have the same port (SO_REUSEPORT).
	shared bool
	// free lets it be bound to an address that isn't there (IP_FREEBIND).
	free bool
	// ifindex is the interface that it is bound to, 0 if it is to none.
	ifindex int
}

// addr returns the address that the socket is bound to; [::] is that of a
// dual-stack socket too.
func (l *boundListener) addr() netip.AddrPort {
	var a netip.AddrPort
	if l.tcp != nil {
		a = l.tcp.Addr().(*net.TCPAddr).AddrPort()
	} else {
		a = l.udp.LocalAddr().(*net.UDPAddr).AddrPort()
	}
	return netip.AddrPortFrom(a.Addr().Unmap(), a.Port())
}

func (l *boundListener) Close() error {
	if l.udp != nil {
		return l.udp.Close()
	}
	return l.stream().Close()
}

// stream returns the listener of a rule of TCP.
func (l *boundListener) stream() streamListener {
	if l.unix != nil {
		return l.unix
	}
	return l.tcp
}

// binding is what became of a rule.
type binding struct {
	rule      Rule
	listeners []*boundListener
	// failed are the ports of a rule with Weak or Wait that could not be bound.
	failed []*Error
}

// binder makes listening sockets: for rules with Dir In in the host's network
// namespace, that is the thread's own, and with Dir Out on the loopback of ns.
type binder struct {
	ns             *netnsutil.NS
	noIPv4, noIPv6 bool // leave out a family
	freeBind       bool // of rules with Dir In
	// sockets are those that rules may name.
	sockets []Socket
	// makeRoom is asked when the port of r is in use, and reports whether it
	// may be bound now by a socket with SO_REUSEPORT; nil is never.
	makeRoom func(r Rule) bool
}

// bindAll binds all rules, or none: after an error nothing is left. The bindings
// are in the order of the rules. That of a rule with Auto is empty, its ports are
// bound one by one, with [binder.bindPort], as they are wanted.
//
// Two rules for free ports that differ only in their protocol get the same ones.
func (b *binder) bindAll(rules []Rule) (_ []binding, err error) {
	if err := b.checkFiles(rules); err != nil {
		return nil, err
	}
	bindings := make([]binding, len(rules))
	defer func() {
		if err == nil {
			return
		}
		for _, done := range bindings {
			closeAll(done.listeners)
		}
	}()
	for i := range rules {
		bindings[i].rule = rules[i]
	}
	for i, r := range rules {
		if r.Auto || len(bindings[i].listeners) > 0 {
			continue
		}
		together := []*binding{&bindings[i]}
		if j := freePortTwin(bindings, i); j > i {
			together = append(together, &bindings[j])
		}
		if err := b.bindRange(together); err != nil {
			return nil, err
		}
	}
	return bindings, nil
}

// spareFiles are the descriptors to leave for what is open for a moment only while
// ports are bound, and for a first few connections.
const spareFiles = 64

// checkFiles returns an error that wraps EMFILE if the rules have more ports than
// the process may open sockets: binding thousands only to close them again would
// take a while, and disturb those who have a use for them.
func (b *binder) checkFiles(rules []Rule) error {
	sockets := 0
	for _, r := range rules {
		addrs, err := b.addrs(r)
		if err == nil && r.Socket == "" && !r.Auto {
			sockets += r.TargetPorts.Len() * len(addrs)
		}
	}
	if sockets <= spareFiles {
		return nil
	}
	open, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return nil //nolint:nilerr // then the kernel says so, socket by socket
	}
	if left := maxFiles() - len(open) - spareFiles; sockets > left {
		return fmt.Errorf("bind ports: %d sockets are needed, and %d are allowed: %w", sockets, max(left, 0), unix.EMFILE)
	}
	return nil
}

// freePortTwin returns the index of the first rule after the i-th that still
// needs free ports and is like it but for the protocol, -1 if there is none.
func freePortTwin(bindings []binding, i int) int {
	want := bindings[i].rule
	if !want.free() {
		return -1
	}
	want.Proto = TCP + UDP - want.Proto
	for j := i + 1; j < len(bindings); j++ {
		if bindings[j].rule == want && len(bindings[j].listeners) == 0 {
			return j
		}
	}
	return -1
}

// bindRange binds each port of the rules, which have as many, and the same one
// for all rules.
func (b *binder) bindRange(bindings []*binding) error {
	first := bindings[0]
	rules := make([]Rule, len(bindings))
	for i := range first.rule.TargetPorts.Len() {
		for j, to := range bindings {
			rules[j] = to.rule.only(i)
		}
		listeners, err := b.bindPort(rules...)
		if err != nil {
			failed, ok := errors.AsType[*Error](err)
			later := first.rule.Wait && absent(err)
			if !ok || !first.rule.Weak && !later || exhausted(err) {
				return err
			}
			first.failed = append(first.failed, failed)
		}
		for _, l := range listeners {
			for _, to := range bindings {
				if to.rule.Proto == l.rule.Proto {
					to.listeners = append(to.listeners, l)
				}
			}
		}
	}
	if len(first.listeners) == 0 && len(first.failed) > 0 && !first.rule.Wait {
		return &Error{Op: "bind any of", Rule: first.rule, Err: first.failed[0].Err}
	}
	return nil
}

// bindPort binds rules of one port each, all of them or none, to the same port.
// If that is to be a free one the kernel chooses it for the first socket; where
// it is not free for the others, it chooses anew.
func (b *binder) bindPort(rules ...Rule) ([]*boundListener, error) {
	// Those that were no good stay bound meanwhile: the kernel goes through
	// the ports by no means at random, and would choose the same again.
	const attempts = 100
	var rejected []*boundListener
	defer func() { closeAll(rejected) }()
	free := rules[0].free()
	for {
		bound, err := b.tryPort(rules)
		if err == nil {
			return bound, nil
		}
		rejected = append(rejected, bound...)
		if free && len(bound) > 0 && len(rejected) < attempts && errors.Is(err, unix.EADDRINUSE) {
			continue
		}
		if !free && !err.Rule.Weak && err.Rule.Socket == "" && errors.Is(err, unix.EADDRINUSE) {
			err.Err = b.nameHolder(err)
		}
		return nil, err
	}
}

// tryPort is one attempt of bindPort. It returns what it has bound with an error
// too.
func (b *binder) tryPort(rules []Rule) (bound []*boundListener, _ *Error) {
	for _, r := range rules {
		if r.Socket != "" {
			adopted, err := b.adopt(r)
			bound = append(bound, adopted...)
			if err != nil {
				return bound, &Error{Op: "listen on", Rule: r, Err: err}
			}
			continue
		}
		addrs, err := b.addrs(r)
		if err != nil {
			return bound, &Error{Op: bindOp(r), Rule: r, Err: err}
		}
		var missing error
		found := false
		for _, addr := range addrs {
			at := r
			if len(bound) > 0 {
				at.Ports = bound[0].rule.Ports
			}
			l, err := b.listen(at, addr, at.Share)
			if errors.Is(err, unix.EADDRINUSE) && b.makeRoom != nil && b.makeRoom(at) {
				l, err = b.listen(at, addr, true)
			}
			switch {
			case err == nil:
				bound, found = append(bound, l), true
			case r.Dir == Out && noSuchFamily(err):
				missing = err // one of the loopback's two addresses is enough
			default:
				return bound, &Error{Op: bindOp(r), Rule: r, Err: err}
			}
		}
		if !found {
			return bound, &Error{Op: bindOp(r), Rule: r, Err: missing}
		}
	}
	return bound, nil
}

func bindOp(r Rule) string {
	if r.Dir == Out {
		return "bind container port"
	}
	return "bind host port"
}

// addrs returns the addresses that a rule needs sockets for, in the sense of
// [Rule].Addr.
func (b *binder) addrs(r Rule) ([]netip.Addr, error) {
	v4, v6 := netip.IPv4Unspecified(), netip.IPv6Unspecified()
	if r.Dir == Out {
		v4, v6 = loopbackOf(true), loopbackOf(false)
	}
	switch {
	case r.Addr.Is4() && b.noIPv4, r.Addr.Is6() && b.noIPv6:
		return nil, errors.New("this family of addresses is switched off")
	case r.Addr.IsValid():
		return []netip.Addr{r.Addr}, nil
	case b.noIPv6:
		return []netip.Addr{v4}, nil
	case b.noIPv4:
		return []netip.Addr{v6}, nil
	case r.Dir == Out:
		return []netip.Addr{v4, v6}, nil
	}
	return []netip.Addr{{}}, nil
}

// listen makes one socket, in the rule's namespace.
func (b *binder) listen(r Rule, addr netip.Addr, shared bool) (*boundListener, error) {
	l := &boundListener{rule: r, shared: shared}
	if r.Dir == In {
		l.free = b.freeBind
		return l, l.listenHere(addr)
	}
	return l, b.ns.Do(func() error { return l.listenHere(addr) })
}

// listenHere makes the socket, in the thread's namespace. For the zero Addr that
// is a dual-stack one, or an IPv4 one where the kernel has no IPv6.
func (l *boundListener) listenHere(addr netip.Addr) error {
	r := l.rule
	// Not net.ListenConfig's own keepalive, which costs each accept(2) four
	// system calls: accepted sockets inherit the listener's settings.
	lc := net.ListenConfig{KeepAlive: -1, Control: func(_, _ string, c syscall.RawConn) error {
		var err error
		ctlErr := c.Control(func(fd uintptr) { err = l.prepare(int(fd)) })
		return errors.Join(ctlErr, err)
	}}
	lc.SetMultipathTCP(false) // has neither splice(2) nor TCP_INFO

	family := ""
	bindTo := netip.AddrPortFrom(addr.WithZone(""), r.Ports.First) // the zone is the device, see prepare
	switch {
	case !addr.IsValid():
		bindTo = netip.AddrPortFrom(netip.IPv6Unspecified(), r.Ports.First) // without IPV6_V6ONLY
	case addr.Is4():
		family = "4"
	default:
		family = "6" // with IPV6_V6ONLY
	}
	err := l.open(&lc, family, bindTo)
	if errors.Is(err, unix.EAFNOSUPPORT) && !addr.IsValid() {
		err = l.open(&lc, "4", netip.AddrPortFrom(netip.IPv4Unspecified(), r.Ports.First))
	}
	if err != nil {
		return plainErr(err)
	}
	l.address = l.addr()
	l.ifindex = ifindex(r.device())
	bound := l.address.Port()
	l.rule.Ports = PortRange{bound, bound}
	return nil
}

// open makes the socket, binds it and listens. The backlog is Go's, that is
// net.core.somaxconn.
func (l *boundListener) open(lc *net.ListenConfig, family string, bindTo netip.AddrPort) error {
	if l.rule.Proto == UDP {
		c, err := lc.ListenPacket(context.Background(), "udp"+family, bindTo.String())
		if err == nil {
			l.udp = c.(*net.UDPConn)
		}
		return err
	}
	c, err := lc.Listen(context.Background(), "tcp"+family, bindTo.String())
	if err == nil {
		l.tcp = c.(*net.TCPListener)
	}
	return err
}

// prepare sets the options of a socket that is not bound yet. SO_REUSEADDR is
// Go's for TCP; with UDP it would let two sockets have the same port.
func (l *boundListener) prepare(fd int) error {
	// Without privilege since Linux 5.7, once per socket. A link-local
	// address needs it, or a scope id, which comes to the same (ipv6(7)).
	if dev := l.rule.device(); dev != "" {
		if err := unix.BindToDevice(fd, dev); err != nil {
			return fmt.Errorf("interface %q: %w", dev, err)
		}
	}
	if l.shared {
		if err := setOptions(fd, []option{{unix.SOL_SOCKET, unix.SO_REUSEPORT, 1}}); err != nil {
			return err
		}
	}
	if l.free {
		options := []option{{unix.SOL_IP, unix.IP_FREEBIND, 1}}
		if isV6(fd) {
			options = append(options, option{unix.SOL_IPV6, unix.IPV6_FREEBIND, 1})
		}
		if err := setOptions(fd, options); err != nil {
			return err
		}
	}
	if l.rule.Proto == TCP {
		if l.rule.Dir == Out || l.rule.Addr.IsLoopback() || l.rule.device() == "lo" {
			staysLocal(fd)
		}
		return prepareTCP(fd)
	}
	return prepareUDP(fd, udpListener)
}

// prepareTCP sets what accepted sockets inherit from a listener.
func prepareTCP(fd int) error {
	return setOptions(fd, append(keepAliveOptions(), option{unix.IPPROTO_TCP, unix.TCP_NODELAY, 1}))
}

// keepAliveOptions are those of keepAlive. TCP_USER_TIMEOUT is not among them: it
// would also end the connections of clients that are there but read nothing for
// as long (tcp_probe_timer in net/ipv4/tcp_timer.c), which no network does. A dead
// peer that owes us an acknowledgement is given up after tcp_retries2, some 15
// minutes.
func keepAliveOptions() []option {
	return []option{
		{unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1},
		{unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, int(keepAlive.Idle.Seconds())},
		{unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, int(keepAlive.Interval.Seconds())},
		{unix.IPPROTO_TCP, unix.TCP_KEEPCNT, keepAlive.Count},
	}
}

// ifindex returns the index that an interface of the host has now, 0 if there is
// none of that name.
func ifindex(name string) int {
	if name == "" {
		return 0
	}
	i, err := net.InterfaceByName(name)
	if err != nil {
		return 0
	}
	return i.Index
}

// setReusePort lets other sockets of ours be bound to the port of c, or no longer.
func setReusePort(c syscall.Conn, on bool) {
	value := 0
	if on {
		value = 1
	}
	if raw, err := c.SyscallConn(); err == nil {
		_ = raw.Control(func(fd uintptr) { _ = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEPORT, value) })
	}
}

type option struct{ level, name, value int }

func setOptions(fd int, options []option) error {
	for _, o := range options {
		if err := unix.SetsockoptInt(fd, o.level, o.name, o.value); err != nil {
			return fmt.Errorf("set socket option %d/%d: %w", o.level, o.name, err)
		}
	}
	return nil
}

// plainErr strips what package net wraps around an error of ours or the kernel's.
func plainErr(err error) error {
	if op, ok := errors.AsType[*net.OpError](err); ok {
		err = op.Err
	}
	if call, ok := errors.AsType[*os.SyscallError](err); ok {
		err = call.Err
	}
	return err
}

// noSuchFamily reports whether a loopback address can't be bound because the
// namespace has none of its family.
func noSuchFamily(err error) bool {
	return errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EADDRNOTAVAIL)
}

// absent reports whether the address or the interface to bind to isn't there.
func absent(err error) bool { return errors.Is(err, unix.EADDRNOTAVAIL) || errors.Is(err, unix.ENODEV) }

// exhausted reports whether the process or the system has run out of something,
// so that other ports fail as well.
func exhausted(err error) bool {
	for _, errno := range []error{unix.EMFILE, unix.ENFILE, unix.ENOMEM, unix.ENOBUFS, unix.ENOSPC} {
		if errors.Is(err, errno) {
			return true
		}
	}
	return false
}

func closeAll(listeners []*boundListener) {
	for _, l := range listeners {
		l.Close()
	}
}
