package forward

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"time"

	"github.com/gofwd/gofwd/netnsutil"
	"github.com/gofwd/gofwd/stack"
)

// Datapath says which of the two paths inbound and outbound TCP may take.
type Datapath string

// The data paths.
const (
	// Auto takes the best path that works for each forward.
	Auto Datapath = "auto"
	// Tap is the gVisor stack on a tap in the namespace.
	Tap Datapath = "tap"
	// Kernel is transparent kernel sockets in the namespace.
	Kernel Datapath = "kernel"
)

// Config says what to forward and how. NetNS is required; every other field
// has a zero value that works.
type Config struct {
	// NetNS is the container's network namespace. The caller closes it,
	// after Close.
	NetNS *netnsutil.NS
	// Rules are the forwards to begin with.
	Rules []Rule
	// Sockets are those that rules may name. The caller may close them after
	// Close.
	Sockets []Socket
	// Network numbers the namespace.
	Network Network
	// Datapath restricts the choice of path; "" is Auto.
	Datapath Datapath
	// Allow and Deny say what the container may speak to of its own accord:
	// what Allow names, and of the rest what Deny does not name; if there is
	// only Allow, nothing else. Both empty is everything. It is told "no" by
	// ICMP, and its nameserver is always allowed.
	Allow, Deny []Destination
	// OutboundAddrs are the host's addresses, at most one of each family, that
	// the world sees of what the container begins, and OutboundIf4 and
	// OutboundIf6 the host's interfaces by which that leaves (SO_BINDTODEVICE).
	// Empty is as the host's routing has it. What goes to the host itself is
	// none of it. They need not be there yet, and may go and come again: without
	// them nothing leaves.
	OutboundAddrs            []netip.Addr
	OutboundIf4, OutboundIf6 string
	// FreeBind lets rules listen on addresses that the host does not have
	// (IP_FREEBIND).
	FreeBind bool
	// HostLoopbackToNSLoopback sends connections from the host's loopback
	// to the namespace's loopback, with 127.0.0.1 or ::1 as their source.
	HostLoopbackToNSLoopback bool
	// InboundOnly is for a namespace that has a network: there is no tap, and
	// what comes in takes the kernel path. What is about the tap or about what the
	// container begins is of no matter then: Allow, Deny, Outbound*, Datapath,
	// Capture, and of Network all but NoIPv4 and NoIPv6. Multicast is an error.
	InboundOnly bool
	// LoopbackOnly forwards between the loopbacks alone, and clients there see
	// 127.0.0.1 or ::1: there is no tap, and Network is of no matter. What comes
	// from elsewhere is reset.
	LoopbackOnly bool
	// IgnoreGone keeps the Forwarder running when the path of NetNS leads to
	// it no longer.
	IgnoreGone bool
	// Multicast are the groups whose datagrams the container gets, with their
	// senders' addresses, on those ports on which it listens to them. What it
	// sends to them leaves by their interface.
	Multicast []Group
	// NoTCP, NoUDP and NoICMP forward nothing of that protocol.
	NoTCP, NoUDP, NoICMP bool
	// Capture, if not nil, is written every frame on the tap, in pcap
	// format. An error of it stops the capture, never the traffic. So that
	// TCP is on the tap, Auto means Tap then.
	Capture io.Writer
	// Logger takes what an operator must know, and at debug level every
	// connection; nil discards it.
	Logger *slog.Logger

	noHold bool // for tests: as if there were no nf_tables
}

// Forwarder is a running set of forwards.
//
//	Start ──► running ──► Close, or the namespace goes ──► closed
//	  └─ error: nothing is left                            Wait returns
type Forwarder struct {
	// Immutable after Start.
	cfg     Config
	log     *slog.Logger
	plan    *networkPlan
	egress  *egress // nil without
	paths   *paths
	rules   ruleSet
	events  eventHub
	notes   []string
	started time.Time

	kernel      *kernelPath // nil without
	stack       *stack.Stack
	stopCapture func() // nil without
	tcp         *tcpEngine
	udp         *udpEngine       // nil if NoUDP
	ping        *pinger          // nil if NoICMP
	groups      *listeningGroups // nil without
	inbound     *inboundNS       // nil without InboundOnly
	moves       *egressFollower  // nil without
	services    *services        // nil without
	guests      *guestAddrs      // nil unless the container configures itself

	ctx   context.Context // ends with Close
	close context.CancelFunc
	ended chan struct{} // closed when everything has ended
	err   error         // why; valid when ended is closed
}

// Start brings up everything that cfg asks for, or nothing. ctx bounds only the
// start; the caller closes the Forwarder. An error about a rule is an [*Error], or
// says what is wrong with it; others wrap the errno of what is not to be had, and
// [Hint] says what to do about it.
//
// The order is such that nothing is reachable before all of it works: tap,
// addresses, stack, listeners, and then the first connection is accepted.
func Start(ctx context.Context, cfg Config) (*Forwarder, error) {
	if cfg.NetNS == nil {
		return nil, errors.New("start forwarding: no network namespace is given")
	}
	f := &Forwarder{cfg: cfg, log: cfg.Logger, started: time.Now(), ended: make(chan struct{})}
	f.ctx, f.close = context.WithCancel(context.Background())
	if f.log == nil {
		f.log = slog.New(slog.DiscardHandler)
	}
	if err := f.start(ctx); err != nil {
		f.close()
		f.shutdown()
		return nil, err
	}
	go f.run()
	return f, nil
}

// start is Start, and leaves what it has made to shutdown.
func (f *Forwarder) start(ctx context.Context) error {
	rules, err := f.checkRules()
	if err != nil {
		return err
	}
	switch {
	case f.cfg.InboundOnly && f.cfg.LoopbackOnly:
		return errors.New("start forwarding: InboundOnly and LoopbackOnly exclude each other")
	case f.cfg.LoopbackOnly:
		if err := f.startLoopback(); err != nil {
			return err
		}
		return f.startRules(ctx, rules)
	case f.cfg.InboundOnly:
		if err := f.startInbound(); err != nil {
			return err
		}
		return f.startRules(ctx, rules)
	}
	noIPv6 := f.cfg.leaveOutIPv6()
	if f.plan, err = planNetwork(f.cfg.Network, f.readHost()); err != nil {
		return err
	}
	if f.notes = f.plan.notes; noIPv6 {
		f.notes = append(f.notes, "this kernel has no IPv6")
	}
	addrs, dns := f.plan.addrs, newNameservers(f.cfg.Network.Nameservers)
	addrs.loopbackToLoopback = f.cfg.HostLoopbackToNSLoopback
	local := &hostAddrs{read: netnsutil.LocalAddrs}
	if addrs.policy, err = newPolicy(f.cfg.Allow, f.cfg.Deny, local); err == nil {
		f.egress, err = newEgress(f.cfg, local)
	}
	if err != nil {
		return fmt.Errorf("start forwarding: %w", err)
	}
	if f.services, err = newServices(f.cfg.Network.Services, f.plan, f.log); err != nil {
		return fmt.Errorf("start forwarding: %w", err)
	}
	addrs.mainAddr, addrs.nameserver = netnsutil.MainAddr, dns.next
	if err := f.startStack(&addrs, dns); err != nil {
		return err
	}
	return f.startRules(ctx, rules)
}

// leaveOutIPv6 sets NoIPv6 on a kernel without IPv6, such as with ipv6.disable=1, if
// nobody has asked for an address of it.
func (cfg *Config) leaveOutIPv6() bool {
	n := &cfg.Network
	asked := slices.ContainsFunc(n.Addrs, func(p netip.Prefix) bool { return p.Addr().Is6() })
	if n.NoIPv4 || n.NoIPv6 || asked {
		return false
	}
	n.NoIPv6 = !kernelHasIPv6()
	return n.NoIPv6
}

// startRules binds the first rules.
func (f *Forwarder) startRules(ctx context.Context, rules []Rule) error {
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("start forwarding: %w", err)
	}
	f.rules = ruleSet{
		binder: binder{ns: f.cfg.NetNS, freeBind: f.cfg.FreeBind, sockets: f.cfg.Sockets, noIPv4: f.cfg.Network.NoIPv4, noIPv6: f.cfg.Network.NoIPv6},
		paths:  f.paths, tcp: f.tcp, udp: f.udp, noTCP: f.cfg.NoTCP, log: f.log, events: &f.events,
	}
	f.rules.binder.makeRoom = f.rules.groupRoom
	_, err := f.rules.change(Change{Add: rules})
	return err
}

// checkRules returns the rules that are to run, or says why they can't.
func (f *Forwarder) checkRules() ([]Rule, error) {
	switch f.cfg.Datapath {
	case "", Auto, Tap, Kernel:
	default:
		return nil, fmt.Errorf("start forwarding: datapath %q is none of auto, tap and kernel", f.cfg.Datapath)
	}
	if err := f.cfg.checkGroups(); err != nil {
		return nil, err
	}
	if err := Validate(f.cfg.Rules); err != nil {
		return nil, err
	}
	var rules []Rule
	for _, r := range f.cfg.Rules {
		if r.Proto == TCP && f.cfg.NoTCP || r.Proto == UDP && f.cfg.NoUDP {
			continue
		}
		rules = append(rules, r)
	}
	return rules, nil
}

// readHost returns what is known of the host's network, which may be nothing.
func (f *Forwarder) readHost() (host hostNetwork) {
	var err error
	if host.nets, err = netnsutil.LocalAddrs(); err != nil {
		f.log.Warn("the host's addresses are unknown", "err", err)
	}
	if f.cfg.Network.CopyHost {
		if name := f.cfg.Network.HostIfName; name != "" {
			host.main, err = netnsutil.ReadLink(name)
		} else {
			host.main, err = netnsutil.HostLink()
		}
		if err != nil && !errors.Is(err, netnsutil.ErrNoHostLink) {
			f.log.Warn("the host's network is unknown", "err", err)
		}
	}
	return host
}

// startStack makes the tap and all that carries what comes out of it.
func (f *Forwarder) startStack(addrs *hostMap, dns *nameservers) error {
	var dev stack.Device
	err := f.cfg.NetNS.Do(func() (err error) {
		dev, f.plan.link.HardwareAddr, err = stack.OpenTap(f.plan.link.Name, f.plan.link.MTU)
		return err
	})
	if err != nil {
		return err
	}
	if mac := f.cfg.Network.MAC; mac != nil {
		f.plan.link.HardwareAddr = mac
	}
	if f.cfg.Network.Unconfigured {
		if err := f.watchGuest(); err != nil {
			dev.Close()
			return err
		}
		addrs.guests = f.guests.list
	}
	f.paths = &paths{addrs: addrs}
	if err := f.openKernel(); err != nil {
		dev.Close()
		return err
	}
	cfg := stack.Config{
		Device: dev, Guest: addrs.guest, GuestMAC: f.plan.link.HardwareAddr,
		GatewayMAC: f.cfg.Network.GatewayMAC, NoNDP: f.cfg.Network.NoNDP, Logger: f.log,
	}
	// The callbacks run as soon as there is a stack, which the engines write
	// to: they wait for them. After an error there may be none to call.
	started, up := make(chan struct{}), false
	defer close(started)
	ready := func() bool { <-started; return up }
	if !f.cfg.NoTCP {
		cfg.TCP = func(r *stack.TCPRequest) {
			if ready() {
				f.tcp.fromNamespace(r)
			}
		}
	}
	if !f.cfg.NoUDP {
		cfg.UDP = func(d *stack.Datagram) {
			if ready() {
				f.udp.fromNamespace(d)
			}
		}
		cfg.Idle = func() {
			if ready() {
				f.udp.idle()
			}
		}
	}
	if !f.cfg.NoICMP {
		cfg.Echo = func(q *stack.Echo) {
			if ready() {
				f.ping.fromNamespace(q)
			}
		}
	}
	f.offerServices(&cfg, ready)
	if f.stack, err = stack.New(cfg); err != nil {
		dev.Close()
		return err
	}
	if err := f.startEngines(addrs, dns); err != nil {
		return err
	}
	up = true
	// Last, so that the engines and the capture get the first frame.
	if err := f.configure(); err != nil {
		return err
	}
	f.services.start()
	f.moves.start()
	return nil
}

// openKernel makes the kernel path, where it may be and can be had.
func (f *Forwarder) openKernel() error {
	if f.cfg.NoTCP {
		f.paths.noKernel = "TCP is switched off"
		return nil
	}
	if f.cfg.Datapath == Tap {
		f.paths.noKernel = "the tap path was asked for"
		return nil
	}
	if f.cfg.Capture != nil && f.cfg.Datapath != Kernel {
		f.paths.noKernel = "a capture sees only what crosses the tap"
		return nil
	}
	err := f.cfg.NetNS.Configure(netnsutil.Link{}) // loopback, which all of it goes over
	if err == nil {
		f.kernel, err = openKernelPath(f.cfg.NetNS, f.log)
	}
	switch {
	case err == nil:
		f.paths.kernel, f.paths.listener = f.kernel.dialer, f.kernel.listener
	case f.cfg.Datapath == Kernel:
		return err
	default:
		f.paths.noKernel = err.Error()
	}
	return nil
}

// holdSYNs lets what the container begins take the kernel path, too.
func (f *Forwarder) holdSYNs() (err error) {
	if f.kernel == nil {
		return nil
	}
	err = f.cfg.NetNS.Do(func() error {
		tap, err := net.InterfaceByName(f.plan.link.Name)
		if err == nil {
			f.kernel.tap, f.kernel.tapName = tap.Index, tap.Name
		}
		return err
	})
	if err == nil && f.cfg.noHold {
		err = errors.New("left out for a test")
	}
	if err == nil {
		f.tcp.fromKernel = f.kernel.connecting
		f.paths.behind, f.paths.isBehind = f.kernel.behind, f.kernel.isBehind
		f.tcp.held, err = newHeldSYNs(f.tcp, f.cfg.NetNS, f.kernel.KernelPath, f.plan.link.Name)
	}
	if err == nil {
		return nil
	}
	if f.cfg.Datapath == Kernel {
		return err
	}
	f.notes = append(f.notes, "connections that the container begins take the tap path: "+err.Error())
	// Without the rules that divert them, the replies of a server that sets a
	// mark of its own leave by the default route.
	f.paths.marksLost = true
	return nil
}

// startEngines starts what the stack's callbacks lead to.
func (f *Forwarder) startEngines(addrs *hostMap, dns *nameservers) (err error) {
	local := localDialer{f.cfg.NetNS}
	f.paths.tap, f.paths.local = tapDialer{f.stack}, local
	ns := f.cfg.NetNS
	if f.kernel == nil {
		ns = nil
	}
	splicer, err := newSplicer(ns)
	if err != nil {
		return err
	}
	if f.services != nil {
		f.services.link, f.services.mac = f.stack, f.stack.GatewayMAC()
	}
	f.tcp = newTCPEngine(f.paths, dns, splicer, f.egress, f.log)
	f.tcp.events = &f.events
	if err := f.holdSYNs(); err != nil {
		return err
	}
	f.moves = newEgressFollower(f.egress, f.rebindEgress, f.log)
	if !f.cfg.NoICMP {
		f.ping = newPinger(addrs, f.egress, f.stack, f.log)
	}
	if f.cfg.Capture != nil {
		f.stopCapture = f.stack.Capture(f.cfg.Capture)
	}
	if f.cfg.NoUDP {
		return nil
	}
	f.udp, err = newUDPEngine(udpConfig{
		Stack:          f.stack,
		Source:         addrs.source,
		Destination:    addrs.destination,
		IsDNS:          addrs.isDNS,
		Egress:         f.egress,
		Nameserver:     dns.report,
		Guest:          addrs.guestOf,
		Inside:         local.listenUDP,
		LoopbackInside: addrs.loopbackToLoopback,
		MTU:            f.plan.link.MTU,
		Batched:        true,
		Groups:         newJoinedGroups(f.cfg.Multicast),
		Local:          (&hostAddrs{read: netnsutil.LocalAddrs}).has,
		Outbound:       &f.tcp.outbound,
		Logger:         f.log,
	})
	if err != nil || f.udp.groups == nil {
		return err
	}
	addrs.zone = f.udp.groups.zone
	f.groups, err = startGroups(f.cfg.NetNS, f.udp, f.log)
	return err
}

// run waits for the end, and makes it.
func (f *Forwarder) run() {
	if f.cfg.IgnoreGone {
		<-f.ctx.Done()
	} else if err := f.cfg.NetNS.WaitGone(f.ctx); f.ctx.Err() == nil {
		f.err = err
	}
	f.shutdown()
	close(f.ended)
}

// shutdown ends what start has begun, in the order of [Forwarder.Close].
func (f *Forwarder) shutdown() {
	if f.tcp != nil {
		f.tcp.close()
	}
	if f.kernel != nil {
		if err := f.kernel.close(); err != nil {
			f.log.Warn("the namespace is not as it was", "err", err)
		}
	}
	if f.groups != nil {
		f.groups.close()
	}
	f.moves.close()
	if f.udp != nil {
		f.udp.close()
	}
	if f.ping != nil {
		f.ping.close()
	}
	f.services.close()
	f.guests.close()
	if f.stack != nil {
		f.stack.Close()
	}
	if f.stopCapture != nil {
		f.stopCapture() // after the last frame
	}
	if f.inbound != nil {
		if err := f.inbound.path.close(); err != nil {
			f.log.Warn("the namespace is not as it was", "err", err)
		}
	}
	f.events.close()
}

// Wait blocks until the Forwarder has ended, and returns why: nil after Close,
// or [netnsutil.ErrGone] when the namespace went away.
func (f *Forwarder) Wait() error {
	<-f.ended
	return f.err
}

// Close ends everything: listeners, then connections, then the stack, then the
// tap. It is idempotent, and returns when every goroutine has ended.
func (f *Forwarder) Close() error {
	f.close()
	<-f.ended
	return nil
}
