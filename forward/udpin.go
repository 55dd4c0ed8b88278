package forward

import (
	"math/rand/v2"
	"net"
	"net/netip"

	"github.com/gofwd/gofwd/stack"
)

// The way into the namespace, in the order of the path: a ready socket, its
// messages, the flow of each, the tap. What arrives on sockets in the namespace
// goes out the same way.

// readRounds bounds how often a worker reads one socket before it turns to the
// next.
const readRounds = 8

// udpWorker reads a share of the engine's sockets.
type udpWorker struct {
	engine *udpEngine
	poll   *poller

	// Of the goroutine in readLoop.
	recv *recvBatch
	opt  recvOptions
	last struct { // the flow of the last message, for the next one
		from sockaddr
		to   localAddr
		flow *flow
		end  flowEnd
	}
	tap   tapRun
	out   sendBatch // to sockets, straight from the buffers of recv
	err   errorMessage
	heard stack.Datagram // the last one of a group
}

func newUDPWorker(e *udpEngine) (*udpWorker, error) {
	p, err := newPoller()
	if err != nil {
		return nil, err
	}
	return &udpWorker{engine: e, poll: p}, nil
}

// readLoop reads the sockets until the poller is closed. The buffers are made with
// the first datagram: most workers of most containers never see one.
func (w *udpWorker) readLoop() {
	defer w.engine.wg.Done()
	for {
		events, err := w.poll.wait()
		if err != nil {
			return
		}
		if w.recv == nil {
			w.recv = newRecvBatch()
			w.tap.init(w.engine)
			w.out.init(0)
		}
		for i := range events {
			s := w.engine.socket(events[i].Fd)
			if s == nil {
				continue
			}
			if isErrorEvent(&events[i]) {
				w.readErrors(s)
			}
			w.read(s)
		}
	}
}

// socket returns the socket with that id, nil if it was closed meanwhile.
func (e *udpEngine) socket(id int32) *udpSocket {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.sockets[id]
}

// read reads what is there from s and sends it on.
func (w *udpWorker) read(s *udpSocket) {
	for range readRounds {
		n := w.recv.recv(s)
		for i := range n {
			w.forward(s, i)
		}
		w.tap.flush()
		w.engine.send(&w.out)
		w.last.flow = nil
		if n < recvMsgs {
			return
		}
	}
}

// forward sends message i on its way.
func (w *udpWorker) forward(s *udpSocket, i int) {
	from, payload := w.recv.message(i, &w.opt)
	if s.joined != nil {
		w.hear(s, from, payload)
		return
	}
	last := &w.last
	if last.flow == nil || last.from != *from || last.to != w.opt.to || last.flow.server.IsValid() {
		last.flow = nil
		f, end, ok := w.engine.flowIn(s, from, w.opt.to, datagrams(len(payload), w.opt.segment))
		if !ok {
			return
		}
		last.from, last.to, last.flow, last.end = *from, w.opt.to, f, end
	}
	if last.end.sock == nil {
		w.tap.add(last.flow, payload, &w.opt)
		return
	}
	if !w.out.fits(last.end.sock, false, 0) {
		w.engine.send(&w.out)
	}
	m := w.out.add(last.flow, &last.end, sendOptions{tos: w.opt.tos, segment: w.opt.segment}, false, payload, false)
	if !s.inside {
		m.bytes = &last.flow.counters.bytesIn
	}
}

// flowIn returns the flow of count datagrams that came from a socket, and its way on. A
// new flow is made if there is none and s is open to everyone.
func (e *udpEngine) flowIn(s *udpSocket, from *sockaddr, to localAddr, count int) (*flow, flowEnd, bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	f := e.flows.bySock[sockKey{s.id, *from}]
	if f == nil {
		if f = e.acceptLocked(s, from); f == nil {
			return nil, flowEnd{}, false
		}
	}
	dir, near, far := inbound, &f.host, f.inside
	if s.inside {
		dir, near, far = outbound, &f.inside, f.host
	}
	near.local = to
	e.flows.touch(f, dir, e.tick.Load())
	if f.server.IsValid() && dir == inbound {
		e.cfg.Nameserver(f.server, true)
		if f.unanswered -= count; f.unanswered <= 0 {
			e.flows.remove(f)
		}
	}
	return f, far, true
}

// acceptLocked begins a flow that somebody began on s, nil if it may not be.
func (e *udpEngine) acceptLocked(s *udpSocket, from *sockaddr) *flow {
	var f *flow
	client := from.addrPort()
	switch {
	case e.closed:
		return nil
	case s.listens() && s.inside:
		f = e.acceptInsideLocked(s, client, from)
	case s.listens():
		f = e.acceptClientLocked(s, client, from)
	case s.group.Load() && s.binding != nil:
		// An answer to a multicast comes from whoever has one.
		guest := s.binding.guest
		f = &flow{guest: guest, peer: e.cfg.Source(client, guest.Addr()), counters: e.cfg.Outbound}
	}
	if f == nil {
		return nil
	}
	if f.host.sock == nil {
		f.host = flowEnd{sock: s, remote: *from}
	}
	if f.inside.sock == nil && !e.freePeerLocked(f) {
		return nil
	}
	e.enterFlowLocked(f)
	return f
}

// acceptClientLocked begins a flow from a client of a published port. It unlocks
// e.mu while a socket is made in the namespace. Meanwhile the rule may end, and the
// container speak to that client by s.
func (e *udpEngine) acceptClientLocked(s *udpSocket, client netip.AddrPort, from *sockaddr) *flow {
	to, ok := s.choose(client.Addr())
	if !ok {
		return nil
	}
	guest := netip.AddrPortFrom(e.target(to.rule, client.Addr().Is4()), to.port)
	if e.cfg.LoopbackInside && client.Addr().IsLoopback() && !to.rule.rule.Target.IsValid() {
		guest = netip.AddrPortFrom(loopbackOf(client.Addr().Is4()), to.port)
	}
	if !guest.Addr().IsValid() {
		return nil
	}
	f := &flow{guest: guest, peer: e.cfg.Source(client, guest.Addr()), rule: to.rule, counters: &to.rule.flowCounters}
	if e.cfg.Inside == nil {
		return f
	}
	e.mu.Unlock()
	conn, err := e.cfg.Inside(f.peer, guest)
	e.mu.Lock()
	if err == nil && conn != nil {
		if f.inside, err = e.adoptInsideLocked(conn, guest); err != nil {
			e.released(f)
		}
	}
	if err != nil {
		e.log.Debug("no socket in the namespace", "client", client, "target", guest, "err", err)
		return nil
	}
	if e.closed || e.sockets[s.id] != s || !s.ofRule(to.rule) || e.flows.bySock[sockKey{s.id, *from}] != nil {
		if f.inside.sock != nil {
			e.closeSocketLocked(f.inside.sock)
			e.released(f)
		}
		return nil
	}
	return f
}

// adoptInsideLocked makes conn, a socket in the namespace, the way to guest.
func (e *udpEngine) adoptInsideLocked(conn *net.UDPConn, guest netip.AddrPort) (flowEnd, error) {
	fd, err := adoptUDP(conn)
	if err != nil {
		return flowEnd{}, err
	}
	s := &udpSocket{fd: fd, v6: isV6(fd), inside: true}
	if err := e.enterSocketLocked(s, udpStreams); err != nil {
		return flowEnd{}, err
	}
	return flowEnd{sock: s, remote: s.remote(guest)}, nil
}

// acceptInsideLocked begins a flow from a client in the namespace to the host's
// side of a rule of direction Out.
func (e *udpEngine) acceptInsideLocked(s *udpSocket, client netip.AddrPort, from *sockaddr) *flow {
	to, ok := s.choose(client.Addr())
	if !ok {
		return nil
	}
	dst := to.rule.rule.Target
	if !dst.IsValid() {
		dst = loopbackOf(client.Addr().Is4())
	}
	host, err := e.newSocketLocked(nil, dst.Is4(), e.cfg.Egress.applies(dst), udpStreams)
	if err != nil {
		e.log.Debug("no socket on the host", "client", client, "err", err)
		return nil
	}
	return &flow{
		guest:    client,
		rule:     to.rule,
		counters: &to.rule.flowCounters,
		inside:   flowEnd{sock: s, remote: *from},
		host:     flowEnd{sock: host, remote: host.remote(netip.AddrPortFrom(dst, to.port))},
	}
}

// freePeerLocked gives f another port of its peer, if the tap already has a flow
// between the two: two clients of the host's loopback can look the same from
// inside, and so can one client of two published ports.
func (e *udpEngine) freePeerLocked(f *flow) bool {
	const tries, first = 64, 1024
	for range tries {
		if !e.flows.taken(f.guest, f.peer) {
			return true
		}
		f.peer = netip.AddrPortFrom(f.peer.Addr(), uint16(first+rand.N(65536-first)))
	}
	return false
}

// tapRun joins datagrams of one flow for the tap into a super-frame (USO). The
// container's kernel takes it apart, if its receiver does not take it whole.
type tapRun struct {
	engine *udpEngine
	buf    []byte

	flow   *flow // nil is no datagram
	d      stack.Datagram
	size   int  // of each datagram but the last
	count  int  // of datagrams
	closed bool // the last one was shorter
	copied bool // into buf; a single message stays where it is
}

func (t *tapRun) init(e *udpEngine) {
	t.engine, t.buf = e, make([]byte, 0, maxPayload)
}

// add writes a datagram, or several if opt says so, or keeps them until flush.
func (t *tapRun) add(f *flow, payload []byte, opt *recvOptions) {
	size, count := len(payload), datagrams(len(payload), opt.segment)
	if count > 1 {
		size = opt.segment
	}
	if t.joins(f, size, count, len(payload), opt.tos) {
		if !t.copied {
			t.buf, t.copied = append(t.buf[:0], t.d.Payload...), true
		}
		t.buf = append(t.buf, payload...)
		t.d.Payload, t.d.SegmentSize = t.buf, t.size
	} else {
		t.flush()
		t.flow, t.size, t.count, t.copied = f, size, 0, false
		t.d = stack.Datagram{Src: f.peer, Dst: f.guest, TOS: opt.tos, Payload: payload}
		if count > 1 {
			t.d.SegmentSize = size
		}
	}
	t.count += count
	t.closed = len(payload) != count*t.size
}

func (t *tapRun) joins(f *flow, size, count, length int, tos uint8) bool {
	if t.flow != f || t.closed || tos != t.d.TOS || size == 0 {
		return false
	}
	return (size == t.size || size < t.size && count == 1) &&
		t.size <= t.engine.joinSize(f.guest.Addr()) &&
		t.count+count <= maxSegments && len(t.d.Payload)+length <= maxPayload
}

// flush writes what is left.
func (t *tapRun) flush() {
	if t.flow == nil {
		return
	}
	_ = t.engine.cfg.Stack.WriteUDP(&t.d) // the stack counts its errors
	t.flow.counters.bytesIn.Add(int64(len(t.d.Payload)))
	t.flow, t.d = nil, stack.Datagram{}
}

// joinSize is the longest datagram that crosses the tap in one piece.
func (e *udpEngine) joinSize(to netip.Addr) int {
	const udpHeader, ip4Header, ip6Header = 8, 20, 40
	if to.Is4() {
		return e.cfg.MTU - ip4Header - udpHeader
	}
	return e.cfg.MTU - ip6Header - udpHeader
}
