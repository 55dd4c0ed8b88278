package forward

import (
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
)

// activeRule is a [Rule] that runs: what was bound for it, and what went through
// it. Everything that carries flows of the rule counts here, while they run.
type activeRule struct {
	id   int
	rule Rule

	flowCounters

	mu     sync.Mutex // guards the following fields
	bound  []netip.AddrPort
	path   Datapath
	reason string // why path is not the best one
}

// flowCounters are the counters of a rule, or of all flows that no rule made.
// The zero value is ready.
type flowCounters struct {
	active   atomic.Int64 // flows that are open
	total    atomic.Int64 // flows there were, the open ones included
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

// addBound says that addr was bound for the rule.
func (r *activeRule) addBound(addr netip.AddrPort) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.bound = append(r.bound, addr)
}

// traffic returns a snapshot of the counters.
func (c *flowCounters) traffic() Traffic {
	return Traffic{
		Active:   c.active.Load(),
		Total:    c.total.Load(),
		BytesIn:  c.bytesIn.Load(),
		BytesOut: c.bytesOut.Load(),
	}
}

// status returns a snapshot of the rule.
func (r *activeRule) status() RuleStatus {
	r.mu.Lock()
	defer r.mu.Unlock()
	return RuleStatus{
		ID:      r.id,
		Rule:    r.rule,
		Bound:   slices.Clone(r.bound),
		Path:    r.path,
		Reason:  r.reason,
		Traffic: r.traffic(),
	}
}
