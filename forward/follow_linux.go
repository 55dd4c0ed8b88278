package forward

import (
	"errors"
	"maps"
	"net/netip"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/gofwd/gofwd/netnsutil"
)

// Rules with Auto follow the listeners of the other side, and those with Wait the
// host's addresses and interfaces: which of their ports are bound changes while
// they run. One goroutine does that for all of them; it ends with the Forwarder,
// and sleeps while there are no such rules.
//
// The kernel announces no listeners, so they are asked for (sock_diag(7)).
const (
	pollListeners = 100 * time.Millisecond
	// retryBusy is how long a port that something else has is left alone.
	retryBusy = time.Second
	// settle is how long changes of addresses and interfaces are collected
	// before they are looked at.
	settle = 50 * time.Millisecond
)

// follower is the goroutine's, but for wake.
type follower struct {
	wake   chan struct{} // nil until it runs; guarded by ruleSet.changing
	diags  [2]*netnsutil.SockDiag
	warned bool
}

// follow binds the ports of a rule that follows something, and goes on doing so.
// s.changing is locked.
func (s *ruleSet) follow(r *activeRule) {
	if !r.rule.Auto && !r.rule.Wait {
		return
	}
	if s.follower.wake == nil {
		if !s.tcp.enter() {
			return
		}
		s.follower.wake = make(chan struct{}, 1)
		go s.followLoop(s.follower.wake)
	}
	select {
	case s.follower.wake <- struct{}{}:
	default:
	}
}

func (s *ruleSet) followLoop(wake <-chan struct{}) {
	defer s.tcp.wg.Done()
	defer s.follower.close()
	watch, err := netnsutil.WatchHost(settle)
	if err != nil {
		s.log.Warn("addresses that appear are noticed late", "err", err)
	}
	defer watch.Close()
	changes := watch.Changes()
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-s.tcp.ctx.Done():
			return
		case <-wake:
		case _, ok := <-changes:
			if !ok {
				changes = nil // there will be no more
			}
		case <-timer.C:
		}
		if again := s.reconcile(); again > 0 {
			timer.Reset(again)
		}
	}
}

func (f *follower) close() {
	for _, d := range f.diags {
		if d != nil {
			d.Close()
		}
	}
}

// reconcile binds and closes what the rules that follow something ask for now. It
// returns when to look again, 0 if not before something happens.
func (s *ruleSet) reconcile() (again time.Duration) {
	s.changing.Lock()
	defer s.changing.Unlock()
	rules, _ := s.list()
	open := map[Dir]*[]netnsutil.Listener{}
	for _, r := range rules {
		if !r.rule.Auto && !r.rule.Wait {
			continue
		}
		var wanted map[uint16]bool
		if r.rule.Auto {
			if _, asked := open[r.rule.Dir]; !asked {
				open[r.rule.Dir] = s.listeners(r.rule.Dir)
			}
			again = pollListeners
			if open[r.rule.Dir] == nil {
				continue // not known just now: it stays as it is
			}
			wanted = s.wantedPorts(r.rule, *open[r.rule.Dir], rules)
		} else {
			wanted = allPorts(r.rule)
		}
		changed, failed := s.reconcileRule(r, wanted)
		if changed {
			s.events.forward(ForwardChanged, r)
		}
		if failed && again == 0 {
			again = retryBusy
		}
	}
	return again
}

// allPorts are the ports on the target side of a rule.
func allPorts(r Rule) map[uint16]bool {
	ports := make(map[uint16]bool, r.TargetPorts.Len())
	for i := range r.TargetPorts.Len() {
		ports[r.TargetPorts.First+uint16(i)] = true
	}
	return ports
}

// listeners returns the sockets that listen where rules of a direction lead: in
// the namespace, or on the host; nil if they can't be listed.
func (s *ruleSet) listeners(dir Dir) *[]netnsutil.Listener {
	f := &s.follower
	list, err := f.ask(dir, s.binder.ns)
	if err != nil && !f.warned {
		f.warned = true
		s.log.Warn("listeners can't be followed", "err", err)
	}
	if err == nil || errors.Is(err, netnsutil.ErrNoUDPDiag) {
		return &list
	}
	if d := f.diags[dir]; d != nil { // the rest of an answer may be in it
		d.Close()
		f.diags[dir] = nil
	}
	return nil
}

func (f *follower) ask(dir Dir, ns *netnsutil.NS) ([]netnsutil.Listener, error) {
	if f.diags[dir] == nil {
		if dir == Out {
			here, err := netnsutil.Current()
			if err != nil {
				return nil, err
			}
			defer here.Close()
			ns = here
		}
		d, err := ns.SockDiag()
		if err != nil {
			return nil, err
		}
		f.diags[dir] = d
	}
	return f.diags[dir].AppendListeners(nil)
}

// wantedPorts returns those ports on the target side of an Auto rule that have a
// listener which clients of the rule can reach. Ports that we listen on ourselves
// don't count: two rules would publish each other.
func (s *ruleSet) wantedPorts(r Rule, open []netnsutil.Listener, running []*activeRule) map[uint16]bool {
	wanted := make(map[uint16]bool)
	for _, l := range open {
		port := l.Addr.Port()
		if l.UDP == (r.Proto == UDP) && r.TargetPorts.First <= port && port <= r.TargetPorts.Last && s.reaches(r, l) {
			wanted[port] = true
		}
	}
	for _, other := range running {
		if other.rule.Dir != r.Dir && other.rule.Proto == r.Proto {
			for _, a := range other.addresses() {
				delete(wanted, a.Port())
			}
		}
	}
	return wanted
}

// reaches reports whether what comes by r to the port of l arrives there.
func (s *ruleSet) reaches(r Rule, l netnsutil.Listener) bool {
	at := l.Addr.Addr().Unmap().WithZone("")
	target := r.Target
	if r.Dir == Out && !target.IsValid() {
		return at.IsUnspecified() || at == loopbackOf(at.Is4()) // not 127.0.0.53
	}
	if !target.IsValid() {
		return !at.IsLoopback() || s.paths.addrs.loopbackToLoopback
	}
	dual := at == netip.IPv6Unspecified() && !l.V6Only
	return at == target || at.IsUnspecified() && at.Is4() == target.Is4() || dual
}

// reconcileRule binds the wanted ports of r, and closes the others.
func (s *ruleSet) reconcileRule(r *activeRule, wanted map[uint16]bool) (changed, failed bool) {
	have := make(map[uint16]bool)
	device := ifindex(r.rule.device())
	for _, b := range r.ports() {
		// A socket that was bound to an interface which has gone is deaf,
		// also when there is another of that name.
		if wanted[b.port] && b.ifindex == device {
			have[b.port] = true
			continue
		}
		s.unlistenPort(r, b.port)
		changed = true
	}
	now := time.Now()
	known := make(map[uint16]*Error)
	for _, f := range r.failures() {
		known[f.port] = f.err
		if !wanted[f.port] {
			r.forget(f.port)
		} else if now.Before(f.next) {
			have[f.port], failed = true, true
		}
	}
	for _, port := range slices.Sorted(maps.Keys(wanted)) {
		if have[port] {
			continue
		}
		if err := s.listenPort(r, port); err != nil {
			failed = true
			s.failPort(r, port, err, known[port])
			continue
		}
		changed = true
	}
	return changed, failed
}

// failPort remembers that a port could not be bound. Who has it is found out, and
// logged, once: that takes a look at every process.
func (s *ruleSet) failPort(r *activeRule, port uint16, err, before *Error) {
	f := failedPort{port: port, err: err}
	if !absent(err) { // of what is absent we are told when it comes
		f.next = time.Now().Add(retryBusy)
	}
	switch {
	case before != nil && errors.Is(err, unix.EADDRINUSE) && errors.Is(before, unix.EADDRINUSE):
		f.err = before
	case errors.Is(err, unix.EADDRINUSE):
		err.Err = s.binder.nameHolder(err)
	}
	r.fail(f)
	if before == nil {
		s.log.Warn("a port is left out for now", "err", err)
	}
}

// listenPort binds one port of r and puts it to work.
func (s *ruleSet) listenPort(r *activeRule, port uint16) *Error {
	one := r.rule.only(int(port - r.rule.TargetPorts.First))
	one.Weak = true // failPort names the holder
	listeners, err := s.binder.bindPort(one)
	if err != nil {
		if e, ok := errors.AsType[*Error](err); ok {
			return e
		}
		return &Error{Op: "bind host port", Rule: r.rule, Err: err}
	}
	r.forget(port)
	b := binding{rule: r.rule, listeners: listeners}
	if err := s.listenUDP([]*activeRule{r}, []binding{b}); err != nil {
		s.udp.unlistenPort(r, port)
		return &Error{Op: "watch", Rule: r.rule, Err: err}
	}
	r.bind(b)
	s.setReusePort(r, false) // groupRoom may have asked for it
	for _, l := range r.takeTCP() {
		s.tcp.listen(l.stream(), r, port)
	}
	s.log.Debug("port is published", "rule", r.rule, "port", port)
	return nil
}

// unlistenPort closes one port of r; its TCP connections go on.
func (s *ruleSet) unlistenPort(r *activeRule, port uint16) {
	s.tcp.unlistenPort(r, port)
	if s.udp != nil {
		s.udp.unlistenPort(r, port)
	}
	r.forget(port)
	s.log.Debug("port is no longer published", "rule", r.rule, "port", port)
}
