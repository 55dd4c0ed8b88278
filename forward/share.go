package forward

import (
	"net/netip"
	"slices"
	"sync/atomic"
	"time"
)

// Rules with Share that listen on the same ports have the same sockets, as far as
// they are in one Forwarder. Clients are led to them in turn: connections of TCP,
// flows of UDP. A rule that goes takes no socket along, so that no client in a
// backlog is reset, which the kernel does where each has a socket of its own.

// tcpTarget is one port of a rule.
type tcpTarget struct {
	rule   *activeRule
	port   uint16       // on the target side
	failed atomic.Int64 // when it took no connection, in Unix nanoseconds
}

// fail says that t took no connection.
func (t *tcpTarget) fail() { t.failed.Store(time.Now().UnixNano()) }

// tcpTargets are where the connections of a listener lead, at least one.
type tcpTargets struct {
	list []*tcpTarget // immutable
	turn atomic.Uint32
}

// leadTo returns targets as a listener has them.
func leadTo(list ...*tcpTarget) *tcpTargets { return &tcpTargets{list: list} }

// of returns the target of a rule, nil if there is none.
func (t *tcpTargets) of(rule *activeRule) *tcpTarget {
	for _, x := range t.list {
		if x.rule == rule {
			return x
		}
	}
	return nil
}

// without returns the targets but that of a rule.
func (t *tcpTargets) without(rule *activeRule) []*tcpTarget {
	return slices.DeleteFunc(slices.Clone(t.list), func(x *tcpTarget) bool { return x.rule == rule })
}

// order returns the targets in the order in which the next client is to try them:
// each is the first in turn, but for those that have just failed.
func (t *tcpTargets) order() tcpTurns {
	if len(t.list) == 1 {
		return t.list
	}
	now := time.Now().UnixNano()
	order := make(tcpTurns, 0, len(t.list))
	var failed tcpTurns
	for _, x := range t.list {
		if now-x.failed.Load() < int64(retryFailed) {
			failed = append(failed, x)
		} else {
			order = append(order, x)
		}
	}
	if n := len(order); n > 0 {
		first := int(t.turn.Add(1)) % n
		order = append(order[first:n:n], order[:first]...)
	}
	return append(order, failed...)
}

// retryFailed is how long a target that took no connection is asked only if no
// other does.
const retryFailed = time.Second

// tcpTurns are the targets that a client has not tried yet, the next one first.
type tcpTurns []*tcpTarget

// admit takes out the next target that lets client in, and counts the client
// there; nil if none does.
func (q *tcpTurns) admit(client netip.Addr) *tcpTarget {
	for len(*q) > 0 {
		next := (*q)[0]
		*q = (*q)[1:]
		if next.rule.admit(client) {
			return next
		}
	}
	return nil
}

// begin is admit for a client that is new; it is counted as refused if it has to
// be.
func (q *tcpTurns) begin(client netip.Addr) *tcpTarget {
	first := (*q)[0]
	to := q.admit(client)
	if to == nil {
		first.rule.refused.Add(1)
	}
	return to
}

// udpTarget is one port of a rule.
type udpTarget struct {
	rule *activeRule
	port uint16 // on the target side
}

// ofRule reports whether rule is one of those that s listens for.
func (s *udpSocket) ofRule(rule *activeRule) bool {
	return slices.ContainsFunc(s.to, func(t udpTarget) bool { return t.rule == rule })
}

// listens reports whether s is a listener.
func (s *udpSocket) listens() bool { return len(s.to) > 0 }

// choose returns the target for a new client, in turn among those that let it in.
func (s *udpSocket) choose(client netip.Addr) (udpTarget, bool) {
	s.turn++
	for i := range s.to {
		t := s.to[(s.turn+i)%len(s.to)]
		if t.rule.gate.allows(client) {
			return t, true
		}
	}
	s.to[s.turn%len(s.to)].rule.refused.Add(1)
	return udpTarget{}, false
}
