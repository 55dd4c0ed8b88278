package forward

import (
	"fmt"
	"log/slog"
	"math"
	"net"
	"net/netip"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/gofwd/gofwd/stack"
)

// UDP: theory of operation.
//
//	                 into the namespace (udpin.go)
//	client ─► listener ─► recvmmsg, GRO ─► flow ─► joined ─► Stack.WriteUDP ─► tap
//	                                        │ └─► socket made in the namespace
//	world  ◄─ socket ◄─ sendmmsg, GSO ◄─ joined ◄─ flow ◄─ Config.UDP ◄─ tap
//	                 out of the namespace (udpout.go)
//
// A flow is two endpoints, one in the namespace and one outside, and one entry in
// a table (udpflow.go) that both directions look up. No flow has a goroutine or a
// buffer. The sockets belong to endpoints rather than to flows, and are never
// connected: a listener serves all clients of a published port, and one socket of
// the host all peers of a port of the container. If that port is published, it is
// the listener itself, so that the peers of a WireGuard or BitTorrent node see the
// port that it announces.
//
// Multicasts are not of a flow on their way in (multicast_linux.go): a group's
// sockets hand on what they hear, to the group.
//
// A few workers, each a thread with a poller and one set of buffers, read all
// sockets. The goroutine that reads the tap sends in the other direction, and
// never blocks: what a socket does not take at once is dropped, as a router does.
//
// Datagrams of one flow that follow each other are joined into super-frames, in
// both directions, as long as there are more to read: a system call costs about as
// much for one datagram as for sixty-four (bench, UDP beside UDPGSO). Super-frames
// that arrive as such are passed on whole. What a receiver sees is the datagrams that were sent.
//
// Errors: a socket's error queue (udperror_linux.go) says which destination an
// ICMP error is about, and the container is told in the same words. Sockets go on
// after any error.

// udpConfig says what a UDP engine works with. Stack, Source, Destination and
// Guest are required.
type udpConfig struct {
	// Stack is the way to the tap.
	Stack interface {
		WriteUDP(*stack.Datagram) error
		WriteUDPError(*stack.Datagram, stack.ICMPError) error
	}
	// Source returns the address that target in the namespace sees of a client.
	Source func(client netip.AddrPort, target netip.Addr) netip.AddrPort
	// Destination returns where a datagram to dst goes; its error is an errno.
	Destination func(dst netip.AddrPort) (netip.AddrPort, error)
	// IsDNS reports whether dst is a DNS address of the container, and
	// Nameserver is told whether the nameserver behind it answered a query to
	// port 53. Nameserver must not block. Nil is no such address, and nobody to
	// tell.
	IsDNS      func(dst netip.AddrPort) bool
	Nameserver func(server netip.Addr, answered bool)
	// Egress binds the sockets of the host; nil binds none.
	Egress *egress
	// Guest returns the container's address of a family, the zero Addr if it
	// has none.
	Guest func(is4 bool) netip.Addr
	// Inside returns a socket in the namespace for an inbound flow that is not
	// to cross the tap, bound to src, the address that dst is to see. A nil
	// socket, and a nil Inside, is the tap. The engine closes the socket.
	Inside func(src, dst netip.AddrPort) (*net.UDPConn, error)
	// Released is told when the engine has closed such a socket, of Inside with
	// these addresses. It must not block, or call the engine. Nil tells nobody.
	Released func(src, dst netip.Addr)
	// LoopbackInside sends clients on the host's loopback to the namespace's,
	// unless their rule says where to; Inside is then required.
	LoopbackInside bool
	// Groups are the multicast groups that the container takes part in, and
	// Local reports whether an address is one of the host's own; it may be nil
	// without Groups.
	Groups []*joinedGroup
	Local  func(netip.Addr) bool
	// MTU of the tap; 0 is 1500. Longer datagrams are not joined.
	MTU int
	// MaxFlows bounds memory, sockets and ports of the host; 0 is 16384, or a
	// half of RLIMIT_NOFILE if that is less.
	MaxFlows int
	// Batched says that idle is called whenever the tap has nothing more to
	// read: only then may fromNamespace hold datagrams back.
	Batched bool
	// Outbound counts the flows that no rule made; nil counts for nobody.
	Outbound *flowCounters
	// Now is the clock; nil is time.Now.
	Now func() time.Time
	// Logger takes what an operator must know; nil discards it.
	Logger *slog.Logger
}

// udpEngine carries all UDP of a namespace.
type udpEngine struct {
	cfg     udpConfig // immutable, defaults filled in
	log     *slog.Logger
	workers []*udpWorker
	began   time.Time
	segment bool       // UDP_SEGMENT may be used
	groups  *udpGroups // nil without
	done    chan struct{}
	busy    chan struct{} // the table is no longer empty
	wg      sync.WaitGroup

	// tick is the clock of the table, in seconds. It stands still while the
	// table is empty.
	tick    atomic.Int64
	dropped atomic.Int64 // datagrams that a socket did not take

	sendMu sync.Mutex // guards out: of the goroutine that reads the tap
	out    sendBatch

	// mu guards the following fields, the table's flows included. It comes
	// before the mutex of a udpSocket.
	mu        sync.Mutex
	flows     flowTable
	sockets   map[int32]*udpSocket
	lastID    int32
	bindings  map[bindingKey]*udpSocket
	published map[publishedKey]*udpSocket
	closed    bool
}

// bindingKey names a port of the container: the socket of the host that speaks for
// it, to destinations of one family.
type bindingKey struct {
	guest netip.AddrPort
	is4   bool
	bound bool // by the egress
}

// publishedKey finds the listener of a port of the container.
type publishedKey struct {
	port uint16
	is4  bool
}

// defaultMaxFlows bounds what one container takes of the host's ephemeral ports,
// of which there are 28,232 by default (ip_local_port_range).
const defaultMaxFlows = 16384

// newUDPEngine starts an engine without listeners; close ends it.
func newUDPEngine(cfg udpConfig) (*udpEngine, error) {
	if cfg.MTU == 0 {
		cfg.MTU = 1500
	}
	if cfg.MaxFlows == 0 {
		cfg.MaxFlows = min(defaultMaxFlows, maxFiles()/2)
	}
	if cfg.Nameserver == nil {
		cfg.Nameserver = func(netip.Addr, bool) {}
	}
	if cfg.Outbound == nil {
		cfg.Outbound = new(flowCounters)
	}
	if cfg.IsDNS == nil {
		cfg.IsDNS = func(netip.AddrPort) bool { return false }
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	e := &udpEngine{
		cfg:       cfg,
		log:       cfg.Logger,
		began:     cfg.Now(),
		segment:   segmentWorks(kernelRelease()),
		done:      make(chan struct{}),
		busy:      make(chan struct{}, 1),
		sockets:   make(map[int32]*udpSocket),
		bindings:  make(map[bindingKey]*udpSocket),
		published: make(map[publishedKey]*udpSocket),
	}
	e.flows = newFlowTable(cfg.MaxFlows, e.removed)
	e.groups = newUDPGroups(e, cfg.Groups)
	e.out.init(sendArena)
	// Two, so that a stream in holds up no answer to one out; more than four
	// would wait for the tap.
	for range min(max(runtime.GOMAXPROCS(0), 2), 4) {
		w, err := newUDPWorker(e)
		if err != nil {
			e.close()
			return nil, fmt.Errorf("start UDP: %w", err)
		}
		e.workers = append(e.workers, w)
		e.wg.Add(1)
		go w.readLoop()
	}
	e.wg.Add(1)
	go e.expireLoop()
	return e, nil
}

// close closes all sockets, listeners included, and returns when every goroutine
// has ended. It is idempotent.
func (e *udpEngine) close() {
	e.mu.Lock()
	if e.closed {
		e.mu.Unlock()
		e.wg.Wait()
		return
	}
	e.closed = true
	e.flows.removeAll(func(*flow) bool { return true })
	for _, s := range e.sockets {
		e.closeSocketLocked(s)
	}
	e.mu.Unlock()
	close(e.done)
	for _, w := range e.workers {
		w.poll.close()
	}
	e.wg.Wait()
}

// listen serves one port of rule with conn, whose place on the target's side is
// targetPort. conn is a socket of the host, or of the namespace for a rule of
// direction Out. The engine owns conn from now on, also if it returns an error.
func (e *udpEngine) listen(conn *net.UDPConn, rule *activeRule, targetPort uint16) error {
	name := conn.LocalAddr()
	fd, err := adoptUDP(conn)
	if err != nil {
		return fmt.Errorf("take over UDP socket %s: %w", name, err)
	}
	s := &udpSocket{fd: fd, v6: isV6(fd), inside: rule.rule.Dir == Out, to: []udpTarget{{rule, targetPort}}}
	e.mu.Lock()
	defer e.mu.Unlock()
	if err := e.enterSocketLocked(s, udpListener); err != nil {
		return fmt.Errorf("watch UDP socket %s: %w", name, err)
	}
	e.publishLocked(s)
	return nil
}

// join makes the listeners of one rule also those of another that listens on the
// same ports.
func (e *udpEngine) join(with, rule *activeRule) {
	e.mu.Lock()
	defer e.mu.Unlock()
	shift := rule.rule.TargetPorts.First - with.rule.TargetPorts.First
	for _, s := range e.sockets {
		for _, t := range s.to {
			if t.rule == with {
				s.to = append(s.to, udpTarget{rule, t.port + shift})
				e.publishLocked(s)
				break
			}
		}
	}
}

// unlisten closes the listeners of rule, but those that it shares, and ends its
// flows.
func (e *udpEngine) unlisten(rule *activeRule) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.flows.removeAll(func(f *flow) bool { return f.rule == rule })
	e.unlistenLocked(func(t udpTarget) bool { return t.rule == rule })
}

// unlistenPort is unlisten for one port of a rule that shares none.
func (e *udpEngine) unlistenPort(rule *activeRule, port uint16) {
	e.mu.Lock()
	defer e.mu.Unlock()
	gone := udpTarget{rule, port}
	of := func(s *udpSocket) bool { return s != nil && slices.Contains(s.to, gone) }
	e.flows.removeAll(func(f *flow) bool { return of(f.host.sock) || of(f.inside.sock) })
	e.unlistenLocked(func(t udpTarget) bool { return t == gone })
}

// unlistenLocked takes the targets that are gone from the listeners, and closes
// those that are left without any. What they published may be published by another
// from now on: where one rule replaces another, both have listened for a moment.
func (e *udpEngine) unlistenLocked(gone func(udpTarget) bool) {
	before := len(e.published)
	for _, s := range e.sockets {
		if !slices.ContainsFunc(s.to, gone) {
			continue
		}
		e.unpublishLocked(s)
		if slices.ContainsFunc(s.to, func(t udpTarget) bool { return !gone(t) }) {
			s.to = slices.DeleteFunc(s.to, gone)
		} else {
			e.closeSocketLocked(s)
		}
	}
	if len(e.published) == before {
		return
	}
	for _, s := range e.sockets {
		if s.listens() {
			e.publishLocked(s)
		}
	}
}

// endFlows ends those flows for which end says so.
func (e *udpEngine) endFlows(end func(*flow) bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.flows.removeAll(end)
}

// setReusePort lets other sockets of ours be bound to the ports of rule, or no
// longer.
func (e *udpEngine) setReusePort(rule *activeRule, on bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, s := range e.sockets {
		if s.ofRule(rule) {
			s.setReusePort(on)
		}
	}
}

// publishLocked lets the container's own datagrams leave by the listener s, if it
// can reach any peer. What left by another socket until now starts anew.
func (e *udpEngine) publishLocked(s *udpSocket) {
	bound, v4, v6 := s.bound()
	if s.inside || s.to[0].rule.rule.device() != "" || bound.Addr().IsLoopback() {
		return
	}
	for _, t := range s.to {
		for _, is4 := range []bool{true, false} {
			key := publishedKey{t.port, is4}
			if is4 && !v4 || !is4 && !v6 || e.published[key] != nil {
				continue
			}
			e.published[key] = s
			b := e.bindings[bindingKey{netip.AddrPortFrom(e.target(t.rule, is4), t.port), is4, false}]
			if b != nil {
				e.flows.removeAll(func(f *flow) bool { return f.host.sock == b })
			}
		}
	}
}

// unpublishLocked undoes publishLocked.
func (e *udpEngine) unpublishLocked(s *udpSocket) {
	for _, t := range s.to {
		for _, is4 := range []bool{true, false} {
			if key := (publishedKey{t.port, is4}); e.published[key] == s {
				delete(e.published, key)
			}
		}
	}
}

// target returns the address in the namespace where clients of a family are sent:
// that of the rule, else the container's own, of the other family if it has none
// of this one.
func (e *udpEngine) target(rule *activeRule, is4 bool) netip.Addr {
	if t := rule.rule.Target; t.IsValid() {
		return t.Unmap()
	}
	if g := e.cfg.Guest(is4); g.IsValid() {
		return g
	}
	return e.cfg.Guest(!is4)
}

// enterSocketLocked makes s known to the engine and to a worker, or closes it.
func (e *udpEngine) enterSocketLocked(s *udpSocket, use udpUse) error {
	for taken := true; taken; taken = e.sockets[e.lastID] != nil {
		e.lastID = (e.lastID + 1) & math.MaxInt32
	}
	s.id = e.lastID
	s.poll = e.workers[int(s.id)%len(e.workers)].poll
	err := prepareUDP(s.fd, use)
	switch {
	case e.closed:
		err = net.ErrClosed
	case err == nil:
		err = s.poll.add(s.fd, s.id)
	}
	if err != nil {
		s.close()
		return err
	}
	e.sockets[s.id] = s
	return nil
}

func (e *udpEngine) closeSocketLocked(s *udpSocket) {
	delete(e.sockets, s.id)
	if s.binding != nil && e.bindings[*s.binding] == s {
		delete(e.bindings, *s.binding)
	}
	e.unpublishLocked(s)
	s.close()
}

// enterFlowLocked adds a flow. Its sockets are counted first: to make room the
// table may remove the last other flow of one of them.
func (e *udpEngine) enterFlowLocked(f *flow) {
	for _, s := range []*udpSocket{f.host.sock, f.inside.sock} {
		if s != nil {
			s.flows++
		}
	}
	if e.flows.len() == 0 {
		e.tick.Store(e.now())
		select {
		case e.busy <- struct{}{}:
		default:
		}
	}
	e.flows.add(f, e.tick.Load())
	f.counters.begin()
}

// released says that the socket that f had, or was to have, in the namespace is gone.
func (e *udpEngine) released(f *flow) {
	if e.cfg.Released != nil {
		e.cfg.Released(f.peer.Addr(), f.guest.Addr())
	}
}

// removed is called by the table for a flow that left it, with e.mu locked. A
// socket that is for nothing else goes with its last flow.
func (e *udpEngine) removed(f *flow) {
	f.counters.end()
	e.reportSilence(f)
	for _, s := range []*udpSocket{f.host.sock, f.inside.sock} {
		if s == nil {
			continue
		}
		if s.flows--; s.flows == 0 && !s.listens() && s.joined == nil {
			if s.inside {
				e.released(f)
			}
			e.closeSocketLocked(s)
		}
	}
}

// queryPatience is how long a nameserver may take before it counts as one that
// does not answer. Resolvers ask again after five seconds (resolv.conf(5)).
const queryPatience = 3 * time.Second

// reportSilence says so if the nameserver of f owes an answer for too long.
func (e *udpEngine) reportSilence(f *flow) {
	if f.unanswered > 0 && e.tick.Load()-f.seen >= ticks(queryPatience) {
		e.cfg.Nameserver(f.server, false)
	}
}

// now is the engine's clock, in seconds. The host's may be set meanwhile.
func (e *udpEngine) now() int64 { return int64(e.cfg.Now().Sub(e.began)/time.Second) + 1 }

// expireLoop moves the clock and removes what was idle for too long, as long as
// there are flows; an engine without any uses no processor time.
func (e *udpEngine) expireLoop() {
	defer e.wg.Done()
	for {
		select {
		case <-e.done:
			return
		case <-e.busy:
		}
		if !e.expireWhileBusy() {
			return
		}
	}
}

func (e *udpEngine) expireWhileBusy() bool {
	ticker := time.NewTicker(time.Second)
	defer ticker.Stop()
	for e.expire() > 0 {
		select {
		case <-e.done:
			return false
		case <-ticker.C:
		}
	}
	return true
}

// expire removes the flows whose time is over, and returns how many are left. It
// gives way to traffic in between: each may close a socket.
func (e *udpEngine) expire() int {
	const atOnce = 64
	e.tick.Store(e.now())
	for {
		e.mu.Lock()
		more := e.flows.expire(e.tick.Load(), atOnce)
		left := e.flows.len()
		e.mu.Unlock()
		if !more {
			return left
		}
	}
}
