package forward

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"time"
)

// Change is one change of the forwards of a running [Forwarder]: all of it is
// made, or nothing.
type Change struct {
	// Add are rules to have from now on. One that is there already stays as
	// it is, and counts as added.
	Add []Rule
	// Remove are the ids of those to end.
	Remove []int
	// Replace ends all that are not in Add.
	Replace bool
	// Sockets are sockets for the rules of Add, besides those of Config. They
	// stay the caller's, who may close them when Change has returned.
	Sockets []Socket
	// Generation, if not 0, is the one that the change was made for; if the
	// rules have changed since, the error is [ErrGeneration].
	Generation uint64
	// Drain is how long the TCP connections of rules that end may go on;
	// after it, or at once if it is 0, they are reset. UDP flows end with
	// their rule.
	Drain time.Duration
}

// Socket is a socket that somebody else has made, and its name in [Rule].Socket:
// "systemd:web" or "fd:web" is named web. It listens, or is a bound UDP socket.
// Several sockets may have the same name.
type Socket struct {
	Name string
	File *os.File
}

// Changed is what became of a [Change].
type Changed struct {
	// Generation counts the changes since the start, from 1.
	Generation uint64 `json:"generation"`
	// Rules are those of Change.Add, in their order, and New the ids of those
	// that were not there before.
	Rules []RuleStatus `json:"forwards"`
	New   []int        `json:"new"`
}

var (
	// ErrNoForward is about an id that no forward has, or has any more.
	ErrNoForward = errors.New("no such forward")
	// ErrGeneration is about a [Change] for a set of rules that has changed.
	ErrGeneration = errors.New("the forwards have changed meanwhile")
)

// ConflictError is about a rule that overlaps one that runs, in the sense of
// [Overlaps].
type ConflictError struct {
	Rule Rule
	With RuleStatus
}

func (e *ConflictError) Error() string {
	return fmt.Sprintf("port rule %q overlaps forward %d, %q", e.Rule, e.With.ID, e.With.Rule)
}

// Add is [Forwarder.Change] for one more rule.
func (f *Forwarder) Add(r Rule) (RuleStatus, error) {
	changed, err := f.Change(Change{Add: []Rule{r}})
	if err != nil {
		return RuleStatus{}, err
	}
	return changed.Rules[0], nil
}

// Remove is [Forwarder.Change] for one rule less.
func (f *Forwarder) Remove(id int, drain time.Duration) error {
	_, err := f.Change(Change{Remove: []int{id}, Drain: drain})
	return err
}

// Change changes the rules, and returns when that is done: what was added takes
// connections, and what was removed does not. After an error everything is as it
// was; it is a [*ConflictError], an [*Error], one that wraps [ErrNoForward],
// [ErrGeneration] or [net.ErrClosed], or says what is wrong with a rule.
//
// No listener is closed that the change does not name, and where a rule gives
// way to one that listens on the same ports, only to lead elsewhere, not even
// that one: its clients notice nothing.
func (f *Forwarder) Change(c Change) (Changed, error) {
	if f.ctx.Err() != nil {
		return Changed{}, fmt.Errorf("change forwards: %w", net.ErrClosed)
	}
	return f.rules.change(c)
}

// ruleSet is the rules that run.
type ruleSet struct {
	// Immutable.
	binder binder
	paths  *paths
	tcp    *tcpEngine
	udp    *udpEngine // nil without UDP
	noTCP  bool
	log    *slog.Logger
	events *eventHub

	follower follower

	// changing is held for the whole of a change, and locked before mu.
	changing sync.Mutex

	mu         sync.Mutex // guards the following fields
	rules      []*activeRule
	lastID     int // guarded by changing
	generation uint64
}

// list returns the rules that run, which is a snapshot.
func (s *ruleSet) list() ([]*activeRule, uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.rules, s.generation
}

// plan is what a change comes to.
type plan struct {
	named []*activeRule // those of Change.Add, in their order
	stay  []*activeRule
	leave []*activeRule
	enter []*activeRule
	// takeover are those of enter that get the sockets of one of leave, and
	// join those that share them with another one, which stays or enters
	// before it.
	takeover, join map[*activeRule]*activeRule
	// roomMade says that sockets were bound beside those of leave.
	roomMade bool
}

func (s *ruleSet) change(c Change) (Changed, error) {
	s.changing.Lock()
	defer s.changing.Unlock()
	p, err := s.plan(c)
	if err != nil {
		return Changed{}, err
	}
	_, generation := s.list()
	if len(p.enter) > 0 || len(p.leave) > 0 || generation == 0 {
		if err := s.bind(p, c.Sockets); err != nil {
			for _, r := range p.enter {
				r.stop()
			}
			return Changed{}, err
		}
		s.commit(p, c.Drain)
	}
	_, generation = s.list()
	changed := Changed{Generation: generation, Rules: make([]RuleStatus, 0, len(p.named))}
	for _, r := range p.enter {
		changed.New = append(changed.New, r.id)
	}
	for _, r := range p.named {
		changed.Rules = append(changed.Rules, r.status())
	}
	return changed, nil
}

// plan finds out what c comes to, and whether it can.
func (s *ruleSet) plan(c Change) (*plan, error) {
	running, generation := s.list()
	if c.Generation != 0 && c.Generation != generation {
		return nil, fmt.Errorf("%w: they are at generation %d, not %d", ErrGeneration, generation, c.Generation)
	}
	if err := s.check(c.Add); err != nil {
		return nil, err
	}
	ids, remove := make(map[int]bool), make(map[int]bool)
	for _, r := range running {
		ids[r.id] = true
	}
	for _, id := range c.Remove {
		if !ids[id] {
			return nil, fmt.Errorf("forward %d: %w", id, ErrNoForward)
		}
		remove[id] = true
	}
	p := &plan{takeover: make(map[*activeRule]*activeRule), join: make(map[*activeRule]*activeRule)}
	have := make(map[Rule]*activeRule)
	wanted := make(map[Rule]bool)
	for _, rule := range c.Add {
		wanted[rule] = true
	}
	for _, r := range running {
		if remove[r.id] || c.Replace && !wanted[r.rule] {
			p.leave = append(p.leave, r)
		} else {
			p.stay = append(p.stay, r)
			have[r.rule] = r
		}
	}
	if err := conflict(c.Add, have, p.stay); err != nil {
		return nil, err
	}
	for _, rule := range c.Add {
		r := have[rule]
		if r == nil {
			s.lastID++
			r = newActiveRule(s.tcp.ctx, s.lastID, rule)
			r.setPath(s.paths.describe(rule))
			p.enter = append(p.enter, r)
		}
		p.named = append(p.named, r)
	}
	p.assignSockets(c.Sockets)
	return p, nil
}

// assignSockets finds those that enter that need no sockets of their own: not those
// for which one has come.
func (p *plan) assignSockets(sockets []Socket) {
	passed := func(r Rule) bool {
		return r.Socket != "" && slices.ContainsFunc(sockets, func(s Socket) bool { return "fd:"+s.Name == r.socketName() })
	}
	leave, share := make(map[Rule][]*activeRule), make(map[Rule]*activeRule)
	for _, r := range p.leave {
		leave[r.rule.listening()] = append(leave[r.rule.listening()], r)
	}
	for _, r := range p.stay {
		if r.rule.Share {
			share[r.rule.listening()] = r
		}
	}
	for _, r := range p.enter {
		if !r.rule.keepsListeners() {
			continue
		}
		at := r.rule.listening()
		if old := leave[at]; len(old) > 0 && r.rule.Proto == TCP && !passed(r.rule) {
			p.takeover[r], leave[at] = old[0], old[1:]
		} else if with := share[at]; with != nil {
			p.join[r] = with
		}
		if r.rule.Share {
			share[at] = r
		}
	}
}

// check says what is wrong with rules by themselves.
func (s *ruleSet) check(rules []Rule) error {
	if err := Validate(rules); err != nil {
		return err
	}
	for _, r := range rules {
		if r.Proto == TCP && s.noTCP || r.Proto == UDP && s.udp == nil {
			return &Error{Op: "forward", Rule: r, Err: fmt.Errorf("%s is switched off", r.Proto)}
		}
	}
	return nil
}

// conflict returns an error if one of add that we don't have overlaps one of those
// that stay.
func conflict(add []Rule, have map[Rule]*activeRule, stay []*activeRule) error {
	rules := make([]Rule, 0, len(stay)+len(add))
	for _, r := range stay {
		rules = append(rules, r.rule)
	}
	for _, r := range add {
		if have[r] == nil {
			rules = append(rules, r)
		}
	}
	if len(rules) == len(stay) {
		return nil
	}
	// Those that stay don't overlap each other, nor do those of add.
	if i, j, found := overlapping(rules); found {
		return &ConflictError{Rule: rules[j], With: stay[i].status()}
	}
	return nil
}

// listensFor reports whether old may be what has the port of r.
func (old *activeRule) listensFor(r Rule) bool {
	if !old.rule.free() {
		return Overlaps(r, old.rule)
	}
	return slices.ContainsFunc(old.addresses(), func(a netip.AddrPort) bool {
		at := old.rule
		at.Ports = PortRange{a.Port(), a.Port()}
		return Overlaps(r, at)
	})
}

// keepsListeners reports whether r has the same sockets from its beginning to its end.
func (r Rule) keepsListeners() bool { return !r.free() && !r.Auto && !r.Wait }

// listening returns r without what says where it leads.
func (r Rule) listening() Rule {
	r.Target, r.TargetPorts, r.TargetSocket = netip.Addr{}, PortRange{}, ""
	r.ProxyV2, r.Limits = false, Limits{}
	r.Socket = r.socketName()
	return r
}

// bind makes the listeners of those that enter, and puts those of UDP to work,
// which can fail. After an error nothing has changed.
func (s *ruleSet) bind(p *plan, sockets []Socket) error {
	var fresh []*activeRule
	var rules []Rule
	for _, r := range p.enter {
		if p.takeover[r] == nil && p.join[r] == nil {
			fresh = append(fresh, r)
			rules = append(rules, r.rule)
		}
	}
	b := s.binder
	b.sockets = append(slices.Clone(b.sockets), sockets...)
	// A port may be in use by what the change removes, and that has to go on
	// until all is bound.
	b.makeRoom = func(r Rule) (made bool) {
		for _, old := range p.leave {
			if old.listensFor(r) {
				s.setReusePort(old, true)
				made, p.roomMade = true, true
			}
		}
		if s.groupRoom(r) {
			made, p.roomMade = true, true
		}
		return made
	}
	bindings, err := b.bindAll(rules)
	if err == nil {
		if err = s.listenUDP(fresh, bindings); err != nil {
			for _, r := range fresh {
				if r.rule.Proto == UDP {
					s.udp.unlisten(r)
				}
			}
		}
	}
	if err != nil {
		for _, old := range p.leave {
			s.setReusePort(old, false)
		}
		return err
	}
	for i, r := range fresh {
		r.bind(bindings[i])
	}
	return nil
}

// groupRoom is binder.makeRoom for the port of a multicast group, which we have
// ourselves.
func (s *ruleSet) groupRoom(r Rule) bool {
	return r.Proto == UDP && r.Dir == In && s.udp != nil && s.udp.groups.usesPort(r.Ports.First)
}

// listenUDP puts the UDP sockets to work. If one can't be, all sockets are closed,
// and the caller takes back what is published.
func (s *ruleSet) listenUDP(rules []*activeRule, bindings []binding) (err error) {
	for i, b := range bindings {
		for _, l := range b.listeners {
			if l.udp != nil && err == nil {
				err = s.udp.listen(l.udp, rules[i], l.rule.TargetPorts.First)
			}
		}
	}
	if err == nil {
		return nil
	}
	for _, b := range bindings {
		closeAll(b.listeners)
	}
	return err
}

// commit makes a change that has all it needs true.
func (s *ruleSet) commit(p *plan, drain time.Duration) {
	for _, r := range p.enter {
		if old := p.takeover[r]; old != nil {
			r.takeOver(old)
			s.tcp.retarget(old, r)
			continue
		}
		if with := p.join[r]; with != nil {
			r.takeOver(with)
			if r.rule.Proto == TCP {
				s.tcp.join(with, r)
			} else {
				s.udp.join(with, r)
			}
			continue
		}
		for _, l := range r.takeTCP() {
			s.tcp.listen(l.stream(), r, l.rule.TargetPorts.First)
		}
	}
	s.mu.Lock()
	s.rules = append(slices.Clone(p.stay), p.enter...)
	s.generation++
	s.mu.Unlock()
	for _, r := range p.leave {
		if r.rule.Proto == TCP {
			s.tcp.unlisten(r)
		} else {
			s.udp.unlisten(r)
		}
		s.log.Debug("forward removed", "id", r.id, "rule", r.rule)
		s.events.forward(ForwardRemoved, r)
		s.drain(r, drain)
	}
	for _, r := range p.enter {
		if p.roomMade {
			s.setReusePort(r, false)
		}
		s.log.Debug("forward added", "id", r.id, "rule", r.rule)
		s.events.forward(ForwardAdded, r)
		for _, failed := range r.failures() {
			s.log.Warn("a port is left out", "err", failed.err)
		}
		s.follow(r)
		if r.rule.Idle > 0 && s.tcp.enter() {
			go s.tcp.idleLoop(r)
		}
	}
}

// setReusePort lets another socket of ours be bound to the ports of r, or no
// longer. The kernel looks at the option when the other one is bound, and doesn't
// mind that this one was bound without it (inet_csk_bind_conflict,
// udp_lib_lport_inuse).
func (s *ruleSet) setReusePort(r *activeRule, on bool) {
	if r.rule.Share {
		return // it has the option for good
	}
	s.tcp.listenersOf(r, func(l *tcpListener) { setReusePort(l, on) })
	if s.udp != nil {
		s.udp.setReusePort(r, on)
	}
}

// drain gives the connections of a rule that is removed some time to end.
func (s *ruleSet) drain(r *activeRule, after time.Duration) {
	if after <= 0 {
		r.stop()
		s.tcp.endRelays(r)
		return
	}
	if s.tcp.enter() {
		go s.drainLater(r, after)
	}
}

func (s *ruleSet) drainLater(r *activeRule, after time.Duration) {
	defer s.tcp.wg.Done()
	deadline := time.NewTimer(after)
	defer deadline.Stop()
	look := time.NewTicker(min(after, time.Second))
	defer look.Stop()
	// The first look is not at once: a connection may be accepted, and not yet
	// be counted.
	for waiting := true; waiting; {
		select {
		case <-look.C:
			waiting = r.active.Load() > 0
		case <-deadline.C:
			waiting = false
		case <-r.ctx.Done():
			waiting = false
		}
	}
	r.stop()
	s.tcp.endRelays(r)
}

// newActiveRule returns a rule without listeners. It ends with stop, or ctx.
func newActiveRule(ctx context.Context, id int, rule Rule) *activeRule {
	r := &activeRule{id: id, rule: rule, gate: newGate(rule.Limits)}
	r.ctx, r.stop = context.WithCancel(ctx)
	return r
}
