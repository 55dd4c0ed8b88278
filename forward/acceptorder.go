package forward

import (
	"net/netip"
	"sync"
	"time"
)

// acceptOrder lets the connections of one client to one listener reach the container
// in the order in which they were accepted: some servers tell them apart by that
// (iperf3 --bidir does), and each is dialled by a goroutine of its own. It is for the
// tap path; on the kernel path [acceptor] sees to that.
//
// A connection waits for the one before it to be connected, but not for long: where
// the container does not answer, there is no order to keep.
type acceptOrder struct {
	mu   sync.Mutex
	last map[netip.Addr]*turn // the last one of each client that is under way
}

// turnWait is how long a connection waits for the one before it.
const turnWait = 100 * time.Millisecond

// turn is the place of a connection in the order.
type turn struct {
	of     *acceptOrder
	client netip.Addr
	before <-chan struct{} // nil: it is the first
	over   chan struct{}   // closed by done
}

// next gives a connection of client its place, behind all those before.
func (o *acceptOrder) next(client netip.Addr) *turn {
	o.mu.Lock()
	defer o.mu.Unlock()
	t := &turn{of: o, client: client, over: make(chan struct{})}
	if before := o.last[client]; before != nil {
		t.before = before.over
	}
	if o.last == nil {
		o.last = make(map[netip.Addr]*turn)
	}
	o.last[client] = t
	return t
}

// wait returns when it is the connection's turn.
func (t *turn) wait() {
	if t == nil || t.before == nil {
		return
	}
	select {
	case <-t.before:
		return
	default:
	}
	timer := time.NewTimer(turnWait)
	defer timer.Stop()
	select {
	case <-t.before:
	case <-timer.C:
	}
}

// done lets the next one have its turn. It may be called again.
func (t *turn) done() {
	if t == nil {
		return
	}
	t.of.mu.Lock()
	defer t.of.mu.Unlock()
	select {
	case <-t.over:
		return
	default:
	}
	close(t.over)
	if t.of.last[t.client] == t {
		delete(t.of.last, t.client)
	}
}
