package forward

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// activeRule is a [Rule] that runs: what was bound for it, and what went through
// it. Everything that carries flows of the rule counts here, while they run.
type activeRule struct {
	// Immutable.
	id   int
	rule Rule
	ctx  context.Context // ends when its connections have to
	stop context.CancelFunc

	flowCounters

	gate     gate
	detoured atomic.Bool // detour is set

	mu     sync.Mutex // guards the following fields
	bound  []boundPort
	failed []failedPort
	tcp    []*boundListener // not yet in use
	path   Datapath
	reason string // why path is not the best one
	detour pathReason
	// seenAs is the address that a server without IPv6 saw of clients of IPv6,
	// and one without IPv4 of those of IPv4; zero if there were none.
	seenAs [2]netip.Addr
}

// pathReason is a path, and why it is not the best one.
type pathReason struct {
	path   Datapath
	reason string
}

// boundPort is a socket that listens for a rule.
type boundPort struct {
	port    uint16 // on the target side
	address netip.AddrPort
	ifindex int // of the interface that it is bound to, 0 for none
}

// failedPort is a port that could not be bound.
type failedPort struct {
	port uint16 // on the target side
	err  *Error
	next time.Time // when to try again
}

// flowCounters are the counters of a rule, or of all flows that no rule made.
// The zero value is ready.
type flowCounters struct {
	active   atomic.Int64 // flows that are open
	total    atomic.Int64 // flows there were, the open ones included
	refused  atomic.Int64 // by a limit of the rule
	bytesIn  atomic.Int64 // bytes of payload into the namespace
	bytesOut atomic.Int64 // bytes of payload out of it
}

// begin counts a flow, end uncounts it.
func (c *flowCounters) begin() {
	c.active.Add(1)
	c.total.Add(1)
}

func (c *flowCounters) end() { c.active.Add(-1) }

// setPath says which way the rule's flows take, and why not a better one.
func (r *activeRule) setPath(path Datapath, reason string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.path, r.reason = path, reason
}

// takeDetour says that the server of the last flow was not where it was expected,
// and what became of the flow; endDetour that it was.
func (r *activeRule) takeDetour(path Datapath, reason string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.detour = pathReason{path, reason}
	r.detoured.Store(true)
}

func (r *activeRule) endDetour() {
	if r.detoured.Load() {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.detoured.Store(false)
	}
}

// bind says what was bound for the rule. UDP sockets are in use already, and
// closed for us.
func (r *activeRule) bind(b binding) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, failed := range b.failed {
		r.failed = append(r.failed, failedPort{port: failed.Rule.TargetPorts.First, err: failed})
	}
	for _, l := range b.listeners {
		r.bound = append(r.bound, boundPort{l.rule.TargetPorts.First, l.address, l.ifindex})
		if l.udp == nil {
			r.tcp = append(r.tcp, l)
		}
	}
}

// served says that a client was seen as another address by a server of the rule.
// What is of interest is a server that lacks the client's family.
func (r *activeRule) served(client, seen netip.Addr) {
	family := 0
	if client.Unmap().Is4() {
		family = 1
	}
	if seen.Is4() == (family == 1) {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.seenAs[family] = seen
}

// takeTCP returns the TCP listeners that are not yet in use.
func (r *activeRule) takeTCP() []*boundListener {
	r.mu.Lock()
	defer r.mu.Unlock()
	tcp := r.tcp
	r.tcp = nil
	return tcp
}

// takeOver gives r what was bound for old, which may keep it.
func (r *activeRule) takeOver(old *activeRule) {
	old.mu.Lock()
	bound, failed := slices.Clone(old.bound), slices.Clone(old.failed)
	old.mu.Unlock()
	r.mu.Lock()
	defer r.mu.Unlock()
	r.bound, r.failed = bound, failed
}

// failures returns the ports that could not be bound.
func (r *activeRule) failures() []failedPort {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.failed)
}

// traffic returns a snapshot of the counters.
func (c *flowCounters) traffic() Traffic {
	return Traffic{
		Active:   c.active.Load(),
		Total:    c.total.Load(),
		Refused:  c.refused.Load(),
		BytesIn:  c.bytesIn.Load(),
		BytesOut: c.bytesOut.Load(),
	}
}

// status returns a snapshot of the rule.
func (r *activeRule) status() RuleStatus {
	r.mu.Lock()
	defer r.mu.Unlock()
	var problems []string
	for _, failed := range r.failed {
		problems = append(problems, failed.err.Error())
	}
	bound := []netip.AddrPort{} // in JSON [], not null
	for _, b := range r.bound {
		if b.address.IsValid() {
			bound = append(bound, b.address)
		}
	}
	for i, family := range []string{"IPv6", "IPv4"} {
		if r.seenAs[i].IsValid() {
			problems = append(problems, fmt.Sprintf("%s clients are seen as %s: the server has no %[1]s", family, r.seenAs[i]))
		}
	}
	path := pathReason{r.path, r.reason}
	if r.detoured.Load() {
		path = r.detour
	}
	return RuleStatus{
		ID:       r.id,
		Rule:     r.rule,
		Problems: problems,
		Bound:    bound,
		Path:     path.path,
		Reason:   path.reason,
		Traffic:  r.traffic(),
	}
}

// ports returns what is bound.
func (r *activeRule) ports() []boundPort {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.bound)
}

// addresses returns the addresses that are bound.
func (r *activeRule) addresses() []netip.AddrPort { return r.status().Bound }

// forget forgets that a port was bound, or could not be.
func (r *activeRule) forget(port uint16) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.bound = slices.DeleteFunc(r.bound, func(b boundPort) bool { return b.port == port })
	r.failed = slices.DeleteFunc(r.failed, func(f failedPort) bool { return f.port == port })
}

// fail remembers that a port could not be bound.
func (r *activeRule) fail(f failedPort) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.failed = append(slices.DeleteFunc(r.failed, func(old failedPort) bool { return old.port == f.port }), f)
}

// Traffic is how many flows there are and were, and the bytes of payload that
// they moved.
type Traffic struct {
	Active int64 `json:"active"`
	Total  int64 `json:"total"`
	// Refused counts what a limit of the forward refused, or for want of
	// descriptors, which is not in Total.
	Refused int64 `json:"refused,omitempty"`
	// BytesIn went into the namespace, BytesOut came out of it.
	BytesIn  int64 `json:"bytes_in"`
	BytesOut int64 `json:"bytes_out"`
}

// RuleStatus is a forward and how it fares.
type RuleStatus struct {
	ID   int  `json:"id"`
	Rule Rule `json:"rule"`
	// Bound are the host addresses that were bound, the free port that
	// was chosen included.
	Bound []netip.AddrPort `json:"bound"`
	// Path is the way that its connections take, and Reason says why it is
	// not the best one; "" where it is.
	Path   Datapath `json:"path"`
	Reason string   `json:"reason,omitempty"`
	// Problems are the ports that could not be bound, and why, and clients
	// whose address the server can't see, since it lacks their family.
	Problems []string `json:"problems,omitempty"`
	Traffic
}

// Status is what a Forwarder is and does, for people and for JSON.
type Status struct {
	NetNS   string         `json:"netns"`
	IfName  string         `json:"ifname"`
	MTU     int            `json:"mtu"`
	Addrs   []netip.Prefix `json:"addrs"`
	Gateway []netip.Addr   `json:"gateways"`
	DNS     []netip.Addr   `json:"dns"`
	Alias   []netip.Addr   `json:"host_alias"`
	Started time.Time      `json:"started"`
	// Generation counts the changes of the rules, from 1; see [Change].
	Generation uint64       `json:"generation"`
	Rules      []RuleStatus `json:"forwards"`
	// Outbound is what the container began itself, and what it heard in
	// multicast groups.
	Outbound Traffic `json:"outbound"`
	// Groups are those of [Config].Multicast.
	Groups []GroupStatus `json:"multicast,omitempty"`
	// Notes are sentences an operator should read: abilities that are
	// missing and what to do about it.
	Notes []string `json:"notes,omitempty"`
}

// Status returns a snapshot.
func (f *Forwarder) Status() Status {
	s := Status{
		NetNS:    f.cfg.NetNS.String(),
		IfName:   f.plan.link.Name,
		MTU:      f.plan.link.MTU,
		Addrs:    f.plan.link.Addrs,
		Gateway:  f.plan.addrs.gateways,
		DNS:      f.plan.addrs.dns,
		Alias:    f.plan.addrs.alias,
		Started:  f.started,
		Outbound: f.tcp.outbound.traffic(),
		Notes:    slices.Clone(f.notes),
	}
	rules, generation := f.rules.list()
	s.Generation, s.Rules = generation, make([]RuleStatus, 0, len(rules))
	for _, r := range rules {
		s.Rules = append(s.Rules, r.status())
	}
	if f.groups != nil {
		s.Groups = f.groups.status()
	}
	if n := f.tcp.guestSYNs.Load(); n > 0 {
		s.Notes = append(s.Notes, fmt.Sprintf("%d connections were not begun by the namespace's kernel, "+
			"but by a guest in it or behind it: they took the tap path", n))
	}
	kernel := f.kernel
	if f.inbound != nil {
		kernel = f.inbound.path
	}
	if kernel != nil {
		if note := kernel.note(); note != "" {
			s.Notes = append(s.Notes, note)
		}
	}
	if f.ping != nil {
		if note := f.ping.note(); note != "" {
			s.Notes = append(s.Notes, note)
		}
	}
	return s
}
