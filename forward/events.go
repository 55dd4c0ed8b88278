package forward

import (
	"sync"
	"sync/atomic"
	"time"
)

// EventType says what an [Event] is about.
type EventType string

// The types of events.
const (
	ForwardAdded   EventType = "forward-added"   // Forward takes connections
	ForwardRemoved EventType = "forward-removed" // Forward takes none any more
	ForwardChanged EventType = "forward-changed" // other ports of Forward are bound than before
	FlowOpened     EventType = "flow-opened"     // Flow, of TCP, is connected at both ends
	FlowClosed     EventType = "flow-closed"     // Flow, of TCP, has ended
	EventsLost     EventType = "events-lost"     // the subscriber was too slow
)

// Event is something that happened.
type Event struct {
	Time time.Time `json:"time"`
	Type EventType `json:"type"`
	// Forward is set for the events of forwards, Flow for those of flows.
	Forward *RuleStatus `json:"forward,omitempty"`
	Flow    *Flow       `json:"flow,omitempty"`
	// Lost counts the events that are missing in its place.
	Lost int64 `json:"lost,omitempty"`
}

// Subscription delivers events from [Forwarder.Subscribe] on.
type Subscription struct {
	hub  *eventHub
	c    chan Event
	lost int64 // after the last one in c; guarded by the hub's mu
}

// eventQueue is how many events wait for a subscriber, some 100 KB.
const eventQueue = 1024

// Subscribe returns what happens from now on. The caller closes it.
func (f *Forwarder) Subscribe() *Subscription { return f.events.subscribe() }

// C returns the channel of events. It is closed by Close, and when the Forwarder
// has ended. It holds a thousand events for a slow receiver; in place of those that
// are too many there is one of type [EventsLost] before the next one.
func (s *Subscription) C() <-chan Event { return s.c }

// Lost returns how many events were dropped after the last one that C delivered, and
// forgets them; 0 while C holds more. It is for those who would not like to be told
// with the next event only.
func (s *Subscription) Lost() (n int64) {
	s.hub.mu.Lock()
	defer s.hub.mu.Unlock()
	if len(s.c) == 0 {
		n, s.lost = s.lost, 0
	}
	return n
}

// Close ends the subscription. It is idempotent.
func (s *Subscription) Close() {
	s.hub.mu.Lock()
	defer s.hub.mu.Unlock()
	if s.hub.subs[s] {
		delete(s.hub.subs, s)
		s.hub.n.Add(-1)
		close(s.c)
	}
}

// eventHub hands events to subscribers. It never blocks. The zero value is ready.
type eventHub struct {
	n atomic.Int32 // subscribers, for a look without the mutex

	mu     sync.Mutex // guards the following fields
	subs   map[*Subscription]bool
	closed bool
}

func (h *eventHub) subscribe() *Subscription {
	h.mu.Lock()
	defer h.mu.Unlock()
	s := &Subscription{hub: h, c: make(chan Event, eventQueue)}
	if h.closed {
		close(s.c)
		return s
	}
	if h.subs == nil {
		h.subs = make(map[*Subscription]bool)
	}
	h.subs[s] = true
	h.n.Add(1)
	return s
}

func (h *eventHub) close() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.closed = true
	for s := range h.subs {
		close(s.c)
	}
	h.subs = nil
	h.n.Store(0)
}

// forward tells of a forward, if anybody listens.
func (h *eventHub) forward(what EventType, r *activeRule) {
	if h.n.Load() > 0 {
		s := r.status()
		h.publish(Event{Time: time.Now(), Type: what, Forward: &s})
	}
}

// flow tells of a TCP flow, if anybody listens.
func (h *eventHub) flow(what EventType, f Flow) {
	if h.n.Load() > 0 {
		h.publish(Event{Time: time.Now(), Type: what, Flow: &f})
	}
}

func (h *eventHub) publish(e Event) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for s := range h.subs {
		if s.lost == 0 || s.put(Event{Time: e.Time, Type: EventsLost, Lost: s.lost}) {
			s.lost = 0
		}
		if s.lost > 0 || !s.put(e) {
			s.lost++
		}
	}
}

// put is false if there is no room.
func (s *Subscription) put(e Event) bool {
	select {
	case s.c <- e:
		return true
	default:
		return false
	}
}
