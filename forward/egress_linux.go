package forward

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/gofwd/gofwd/netnsutil"
)

// egress is by which of the host's addresses and interfaces it leaves what the
// container begins; nil leaves that to the host's routing. What goes to the host
// itself goes over its loopback, by no interface, and is none of it.
type egress struct {
	addrs    []netip.Addr // at most one of each family
	if4, if6 string       // "" is any
	local    *hostAddrs
}

// newEgress returns the egress of a Config.
func newEgress(cfg Config, local *hostAddrs) (*egress, error) {
	if len(cfg.OutboundAddrs) == 0 && cfg.OutboundIf4 == "" && cfg.OutboundIf6 == "" {
		return nil, nil
	}
	var seen [2]bool
	for _, a := range cfg.OutboundAddrs {
		family := 0
		if a.Is4() {
			family = 1
		}
		switch {
		case !a.IsValid() || a.Is4In6() || a.Zone() != "" || a.IsUnspecified() || a.IsMulticast():
			return nil, fmt.Errorf("outbound address %s is not the address of a host", a)
		case seen[family]:
			return nil, fmt.Errorf("outbound address %s is the second of its family", a)
		}
		seen[family] = true
	}
	for _, name := range []string{cfg.OutboundIf4, cfg.OutboundIf6} {
		if len(name) >= unix.IFNAMSIZ {
			return nil, fmt.Errorf("outbound interface %q is longer than %d bytes", name, unix.IFNAMSIZ-1)
		}
	}
	return &egress{addrs: cfg.OutboundAddrs, if4: cfg.OutboundIf4, if6: cfg.OutboundIf6, local: local}, nil
}

// of returns the address and the interface for a family, if there are any.
func (g *egress) of(is4 bool) (addr netip.Addr, device string) {
	addr, _ = ofFamily(g.addrs, is4)
	if is4 {
		return addr, g.if4
	}
	return addr, g.if6
}

// applies reports whether a socket that speaks to dst is to be bound.
func (g *egress) applies(dst netip.Addr) bool {
	return g.covers(dst.Is4()) && !dst.IsLoopback() && !g.local.has(dst)
}

// covers reports whether there is an address or an interface for a family.
func (g *egress) covers(is4 bool) bool {
	if g == nil {
		return false
	}
	addr, device := g.of(is4)
	return addr.IsValid() || device != ""
}

// bind binds a new socket for a family. Where the host does not have the address
// or the interface, the network is unreachable, as it is to the host itself after
// its address has gone.
func (g *egress) bind(fd int, is4 bool) error {
	addr, device := g.of(is4)
	if device != "" {
		// Without privilege since Linux 5.7, once per socket.
		if err := unix.BindToDevice(fd, device); err != nil {
			return egressError("interface "+device, err)
		}
	}
	if !addr.IsValid() {
		return nil
	}
	// For TCP connect(2) chooses the port, and needs only the whole 4-tuple to
	// be free (ip(7)); for others it means nothing.
	_ = unix.SetsockoptInt(fd, unix.SOL_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1)
	if err := unix.Bind(fd, toSockaddr(netip.AddrPortFrom(addr, 0))); err != nil {
		return egressError("address "+addr.String(), err)
	}
	return nil
}

// egressFollower moves on when an interface of the egress is made anew under the
// same name. A socket is bound to the index that it had (socket(7)), and to be bound
// again it would need CAP_NET_RAW (sock_bindtoindex_locked).
type egressFollower struct {
	// Immutable.
	egress *egress
	watch  *netnsutil.HostWatch // nil if it can't be watched
	moved  func(is4 bool)       // is to close the sockets that are bound
	wg     sync.WaitGroup

	index4, index6 int // the goroutine's
}

// newEgressFollower returns a follower of g, which may be nil; it follows from here
// on, and calls moved after start.
func newEgressFollower(g *egress, moved func(is4 bool), log *slog.Logger) *egressFollower {
	if g == nil || g.if4 == "" && g.if6 == "" {
		return nil
	}
	f := &egressFollower{egress: g, moved: moved}
	var err error
	if f.watch, err = netnsutil.WatchHost(settle); err != nil {
		log.Warn("an outbound interface that is made anew is not noticed", "err", err)
	}
	f.index4, f.index6 = ifindex(g.if4), ifindex(g.if6)
	return f
}

// start may be called on nil.
func (f *egressFollower) start() {
	if f != nil && f.watch != nil {
		f.wg.Add(1)
		go f.loop()
	}
}

func (f *egressFollower) loop() {
	defer f.wg.Done()
	for range f.watch.Changes() {
		f.look(f.egress.if4, &f.index4, true)
		f.look(f.egress.if6, &f.index6, false)
	}
}

// look says so if an interface has not the index that it had.
func (f *egressFollower) look(name string, had *int, is4 bool) {
	if has := ifindex(name); has != *had {
		*had = has
		f.moved(is4)
	}
}

// close returns when the goroutine has ended. It is idempotent, and may be called on
// nil.
func (f *egressFollower) close() {
	if f != nil {
		f.watch.Close()
		f.wg.Wait()
	}
}

// rebindEgress closes the sockets of a family that are bound by the egress; the next
// datagram opens others.
func (f *Forwarder) rebindEgress(is4 bool) {
	if f.ping != nil {
		f.ping.rebind(is4)
	}
	if f.udp != nil {
		f.udp.endFlows(func(f *flow) bool { return f.host.sock.egress && f.host.sock.v6 != is4 })
	}
}

func egressError(what string, err error) error {
	if errors.Is(err, unix.EADDRNOTAVAIL) || errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("outbound %s: %w: %w", what, unix.ENETUNREACH, err)
	}
	return fmt.Errorf("outbound %s: %w", what, err)
}

// prepareTCP readies a socket that is to connect to dst.
func (g *egress) prepareTCP(fd int, dst netip.Addr) error {
	if dst.IsLoopback() {
		staysLocal(fd)
	}
	if !g.applies(dst) {
		return nil
	}
	return g.bind(fd, dst.Is4())
}

// dialTCP connects to dst from the thread's own network namespace, the host's.
func (g *egress) dialTCP(ctx context.Context, dst netip.AddrPort) (flowConn, error) {
	d := net.Dialer{KeepAliveConfig: keepAlive}
	d.Control = func(_, _ string, c syscall.RawConn) error {
		var err error
		ctlErr := c.Control(func(fd uintptr) { err = g.prepareTCP(int(fd), dst.Addr()) })
		return errors.Join(ctlErr, err)
	}
	// Not DialTCP, which takes no source address for 0.0.0.0, and binds to that.
	c, err := d.DialContext(ctx, "tcp", dst.String())
	if err != nil {
		return nil, err
	}
	return c.(*net.TCPConn), nil
}

// connectTCP begins to connect to dst, like dialTCP.
func (g *egress) connectTCP(dst netip.AddrPort) (fd int, err error) {
	if fd, err = openTCP(dst.Addr().Is4()); err != nil {
		return -1, err
	}
	if err = g.prepareTCP(fd, dst.Addr()); err == nil {
		err = setOptions(fd, keepAliveOptions())
	}
	if err == nil {
		err = beginConnect(fd, dst)
	}
	if err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// openUDP makes a socket of the host for datagrams of one family, bound or not.
func (g *egress) openUDP(is4, bound bool) (int, error) {
	domain := unix.AF_INET6
	if is4 {
		domain = unix.AF_INET
	}
	fd, err := unix.Socket(domain, unix.SOCK_DGRAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, os.NewSyscallError("socket", err)
	}
	if bound {
		if err := g.bind(fd, is4); err != nil {
			unix.Close(fd)
			return -1, err
		}
	}
	return fd, nil
}
