package forward

import (
	"encoding/binary"
	"net/netip"
	"time"
)

// The life of a flow without traffic, as in the kernel's connection tracking
// (nf_conntrack_proto_udp.c): long for a stream, which is what has been seen more
// than once in both directions, short for everything else. Who asked a nameserver
// asks again after 5 s, and no more after 10 s (resolv.conf(5)).
const (
	udpQueryTimeout  = 10 * time.Second
	udpTimeout       = 30 * time.Second
	udpStreamTimeout = 120 * time.Second
)

// flow is the traffic between two UDP endpoints, one in the namespace and one
// outside. The engine's mutex guards it, but for the fields that never change.
type flow struct {
	// Immutable.
	guest, peer netip.AddrPort // the two endpoints, as the namespace sees them
	rule        *activeRule    // that it is of, nil if it is of none
	counters    *flowCounters  // of the rule, or of what is of none
	dialled     bool           // the container began it: peer is mapped by udpConfig.Destination
	// server is the nameserver that a flow of queries goes to: it ends when
	// every query has its answer. The zero Addr is another flow.
	server netip.Addr

	inside, host flowEnd

	unanswered int      // queries
	sent       [2]uint8 // datagrams by direction, counted up to 2
	seen       int64    // the tick of the last datagram
	list       *flowList
	prev, next *flow
}

// flowEnd is one side of a flow: the way to the endpoint on that side.
type flowEnd struct {
	sock   *udpSocket // nil on the inside is the tap
	remote sockaddr
	local  localAddr
}

// The directions, as indices of flow.sent.
const (
	inbound  = iota // into the namespace
	outbound        // out of it
)

// addrKey is an address and port, without pointers: maps of it are hashed in one
// go and not scanned by the garbage collector.
type addrKey [18]byte

func keyOf(a netip.AddrPort) (k addrKey) {
	*(*[16]byte)(k[:]) = a.Addr().As16()
	binary.BigEndian.PutUint16(k[16:], a.Port())
	return k
}

// tapKey is a flow as it shows on the tap, sockKey as it shows on a socket.
type (
	tapKey  struct{ guest, peer addrKey }
	sockKey struct {
		sock   int32
		remote sockaddr
	}
)

// flowTable finds flows by either side, and knows the one that was idle longest.
// It holds at most max flows. The engine's mutex guards it: one mutex, since the
// lookup under it takes a tenth of the system call that follows.
type flowTable struct {
	max    int
	byTap  map[tapKey]*flow
	bySock map[sockKey]*flow

	// The lists have the flow that was idle longest in front. They are ordered
	// by tick, not by datagram: a flow moves once a tick at most.
	queries, short, streams flowList

	removed func(*flow) // called for each flow that leaves
}

func newFlowTable(limit int, removed func(*flow)) flowTable {
	return flowTable{
		max:     limit,
		byTap:   make(map[tapKey]*flow),
		bySock:  make(map[sockKey]*flow),
		removed: removed,
	}
}

func (t *flowTable) len() int { return t.queries.n + t.short.n + t.streams.n }

// taken reports whether the tap already has a flow between guest and peer.
func (t *flowTable) taken(guest, peer netip.AddrPort) bool {
	return t.byTap[tapKey{keyOf(guest), keyOf(peer)}] != nil
}

// add enters f, whose keys must be free. If the table is full, the flow that was
// idle longest goes, and of two the one that is no stream: a burst of single
// datagrams never ends a conversation.
func (t *flowTable) add(f *flow, now int64) {
	for t.len() >= t.max {
		t.evict()
	}
	t.index(f, func(k tapKey) { t.byTap[k] = f }, func(k sockKey) { t.bySock[k] = f })
	f.seen = now
	if f.server.IsValid() {
		t.queries.push(f)
	} else {
		t.short.push(f)
	}
}

// evict removes the flow that can best be spared.
func (t *flowTable) evict() {
	f := t.short.front
	if q := t.queries.front; f == nil || q != nil && q.seen <= f.seen {
		f = q
	}
	if f == nil {
		f = t.streams.front
	}
	if f != nil {
		t.remove(f)
	}
}

// touch says that a datagram went in direction dir.
func (t *flowTable) touch(f *flow, dir int, now int64) {
	if f.sent[dir] < 2 {
		f.sent[dir]++
		if f.sent[inbound] == 2 && f.sent[outbound] == 2 && !f.server.IsValid() {
			t.streams.move(f)
		}
	}
	if f.seen != now {
		f.seen = now
		f.list.move(f)
	}
}

// expire removes at most limit flows whose time is over, and reports whether
// there may be more.
func (t *flowTable) expire(now int64, limit int) (more bool) {
	for ; limit > 0; limit-- {
		switch {
		case t.queries.idle(now) >= ticks(udpQueryTimeout):
			t.remove(t.queries.front)
		case t.short.idle(now) >= ticks(udpTimeout):
			t.remove(t.short.front)
		case t.streams.idle(now) >= ticks(udpStreamTimeout):
			t.remove(t.streams.front)
		default:
			return false
		}
	}
	return true
}

// remove takes f out of the table.
func (t *flowTable) remove(f *flow) {
	f.list.take(f)
	t.index(f, func(k tapKey) { delete(t.byTap, k) }, func(k sockKey) { delete(t.bySock, k) })
	t.removed(f)
}

// removeAll takes out every flow for which of is true.
func (t *flowTable) removeAll(of func(*flow) bool) {
	for _, l := range []*flowList{&t.queries, &t.short, &t.streams} {
		for f := l.front; f != nil; {
			next := f.next
			if of(f) {
				t.remove(f)
			}
			f = next
		}
	}
}

// index calls a function for each key of f: there are two.
func (t *flowTable) index(f *flow, tap func(tapKey), sock func(sockKey)) {
	if f.inside.sock == nil {
		tap(tapKey{keyOf(f.guest), keyOf(f.peer)})
	} else {
		sock(sockKey{f.inside.sock.id, f.inside.remote})
	}
	sock(sockKey{f.host.sock.id, f.host.remote})
}

// ticks is d in the unit of the table's clock, which is the second.
func ticks(d time.Duration) int64 { return int64(d / time.Second) }

// flowList is a doubly linked list of flows, through the flows themselves.
type flowList struct {
	front, back *flow
	n           int
}

func (l *flowList) push(f *flow) {
	f.list, f.prev, f.next = l, l.back, nil
	if l.back != nil {
		l.back.next = f
	} else {
		l.front = f
	}
	l.back = f
	l.n++
}

// move takes f from the list where it is to the back of l.
func (l *flowList) move(f *flow) {
	f.list.take(f)
	l.push(f)
}

func (l *flowList) take(f *flow) {
	if f.prev != nil {
		f.prev.next = f.next
	} else {
		l.front = f.next
	}
	if f.next != nil {
		f.next.prev = f.prev
	} else {
		l.back = f.prev
	}
	f.list, f.prev, f.next = nil, nil, nil
	l.n--
}

// idle returns for how long the front has been idle, -1 if there is none.
func (l *flowList) idle(now int64) int64 {
	if l.front == nil {
		return -1
	}
	return now - l.front.seen
}
