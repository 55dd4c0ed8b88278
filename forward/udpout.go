package forward

import (
	"errors"
	"net"
	"net/netip"
	"syscall"

	"github.com/gofwd/gofwd/stack"
)

// The way out of the namespace, in the order of the path: a datagram from the tap,
// its flow, the batch, the socket.

// joinBelow is the size from which a payload is sent where it lies rather than
// copied into a batch: two of them do not fit into one super-frame.
const joinBelow = maxPayload / 2

// fromNamespace sends a datagram that the container sent. It is called by the
// goroutine that reads the tap, and never blocks.
func (e *udpEngine) fromNamespace(d *stack.Datagram) {
	e.sendMu.Lock()
	defer e.sendMu.Unlock()
	b := &e.out
	if e.groups != nil && d.Dst.Addr().IsMulticast() {
		e.groups.remember(d)
	}
	if e.segment && e.joinLast(b, d) {
		return
	}
	f, end, err := e.flowOut(d)
	if err != nil {
		e.refuse(d, err)
		return
	}
	if e.cfg.Batched && len(d.Payload) < joinBelow {
		if !b.fits(end.sock, d.DontFragment, len(d.Payload)) {
			e.send(b)
		}
		m := b.add(f, &end, sendOptions{ttl: otherTTL(d), tos: d.TOS, segment: d.SegmentSize}, d.DontFragment, d.Payload, true)
		m.lone = f.server.IsValid() // each is counted
		return
	}
	e.send(b)
	b.add(f, &end, sendOptions{ttl: otherTTL(d), tos: d.TOS, segment: d.SegmentSize}, d.DontFragment, d.Payload, false)
	e.send(b)
}

// idle sends what fromNamespace has held back. It is called by the same goroutine,
// when the tap has no more to read.
func (e *udpEngine) idle() {
	e.sendMu.Lock()
	defer e.sendMu.Unlock()
	e.send(&e.out)
}

// joinLast joins d to the last message of the batch, if that is one of the same flow.
func (e *udpEngine) joinLast(b *sendBatch, d *stack.Datagram) bool {
	if b.n == 0 || d.SegmentSize != 0 {
		return false
	}
	m := &b.meta[b.n-1]
	return m.flow.guest == d.Src && m.flow.peer == d.Dst &&
		m.opt.ttl == otherTTL(d) && m.opt.tos == d.TOS && b.pin == d.DontFragment &&
		b.join(d.Payload)
}

// otherTTL returns the TTL with which d is to leave the host, 0 for the host's own
// default: the container's kernel left d at its default too. To a multicast group
// the default is 1, so there it must be said.
func otherTTL(d *stack.Datagram) uint8 {
	if d.TTL == defaultTTL && !d.Dst.Addr().IsMulticast() {
		return 0
	}
	return d.TTL
}

// defaultTTL is Linux's (net.ipv4.ip_default_ttl).
const defaultTTL = 64

// flowOut returns the flow of a datagram from the tap, and its way out. A new flow
// is made if there is none.
func (e *udpEngine) flowOut(d *stack.Datagram) (*flow, flowEnd, error) {
	key := tapKey{keyOf(d.Src), keyOf(d.Dst)}
	e.mu.Lock()
	defer e.mu.Unlock()
	f := e.flows.byTap[key]
	if f == nil || f.dialled && f.seen != e.tick.Load() {
		// Once a second also for a flow that is there: the nameserver or
		// the host's address may be another one by now.
		if f != nil {
			e.reportSilence(f)
		}
		var err error
		if f, err = e.dialLocked(d, key); err != nil {
			return nil, flowEnd{}, err
		}
	}
	if f.server.IsValid() {
		f.unanswered += datagrams(len(d.Payload), d.SegmentSize)
	}
	e.flows.touch(f, outbound, e.tick.Load())
	return f, f.host, nil
}

// dialLocked returns the flow of d, new or old, after it has asked for the
// destination: with e.mu unlocked.
func (e *udpEngine) dialLocked(d *stack.Datagram, key tapKey) (*flow, error) {
	e.mu.Unlock()
	dst, err := e.cfg.Destination(d.Dst)
	query := d.Dst.Port() == 53 && e.cfg.IsDNS(d.Dst)
	bound := err == nil && e.cfg.Egress.applies(dst.Addr())
	e.mu.Lock()
	f := e.flows.byTap[key]
	if f != nil && !f.dialled {
		return f, nil
	}
	if err != nil {
		return nil, err
	}
	if f != nil {
		if f.host.remote == f.host.sock.remote(dst) {
			return f, nil
		}
		e.flows.remove(f)
	}
	f = &flow{guest: d.Src, peer: d.Dst, counters: e.cfg.Outbound, dialled: true}
	use := udpStreams
	if query {
		f.server, use = dst.Addr(), udpQueries
	}
	s, via := e.groups.wayLocked(d.Src.Port(), dst)
	if s == nil {
		if s, err = e.socketLocked(d.Src, dst, bound && via == 0, use); err != nil {
			return nil, err
		}
	}
	if f.rule = e.publisherLocked(s, d.Src, dst.Addr().Is4()); f.rule != nil {
		f.counters = &f.rule.flowCounters
	}
	if dst.Addr().IsMulticast() {
		s.group.Store(true)
	}
	f.host = flowEnd{sock: s, remote: s.remote(dst), local: localAddr{ifindex: via}}
	e.enterFlowLocked(f)
	return f, nil
}

// socketLocked returns the socket that speaks for guest to dst: the listener that
// publishes guest, the socket that guest has already, or a new one. A listener is
// not bound to the egress.
func (e *udpEngine) socketLocked(guest, dst netip.AddrPort, bound bool, use udpUse) (*udpSocket, error) {
	if e.closed {
		return nil, net.ErrClosed
	}
	is4 := dst.Addr().Is4()
	key := bindingKey{guest, is4, bound}
	s := e.published[publishedKey{guest.Port(), is4}]
	if s == nil || e.publisherLocked(s, guest, is4) == nil || dst.Addr().IsLoopback() || bound {
		s = e.bindings[key]
	}
	if s == nil {
		return e.newSocketLocked(&key, is4, bound, use)
	}
	if e.flows.bySock[sockKey{s.id, s.remote(dst)}] != nil {
		// Two addresses of the container's world are one destination here;
		// a socket of its own tells the replies apart.
		return e.newSocketLocked(nil, is4, bound, use)
	}
	return s, nil
}

// publisherLocked returns the rule by which the listener s publishes guest, nil if
// there is none.
func (e *udpEngine) publisherLocked(s *udpSocket, guest netip.AddrPort, is4 bool) *activeRule {
	for _, t := range s.to {
		if t.port == guest.Port() && e.target(t.rule, is4) == guest.Addr() {
			return t.rule
		}
	}
	return nil
}

// newSocketLocked opens a socket for a binding, or for a single flow if key is nil;
// bound makes it one of the egress.
func (e *udpEngine) newSocketLocked(key *bindingKey, is4, bound bool, use udpUse) (*udpSocket, error) {
	fd, err := e.cfg.Egress.openUDP(is4, bound)
	if errors.Is(err, syscall.EMFILE) || errors.Is(err, syscall.ENFILE) {
		e.flows.evict()
		fd, err = e.cfg.Egress.openUDP(is4, bound)
	}
	if err != nil {
		return nil, err
	}
	s := &udpSocket{fd: fd, v6: !is4, egress: bound, binding: key}
	if err := e.enterSocketLocked(s, use); err != nil {
		return nil, err
	}
	if key != nil {
		e.bindings[*key] = s
	}
	return s, nil
}

// send sends a batch and empties it.
func (e *udpEngine) send(b *sendBatch) {
	if b.n == 0 {
		return
	}
	defer b.reset()
	s := b.sock
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.fd < 0 {
		return // the flow ended meanwhile
	}
	s.pin(b.pin)
	for i := range b.n {
		b.pack(i)
	}
	for i := 0; i < b.n; {
		i += e.sendSome(b, i)
	}
}

// sendSome sends messages from i on, and returns how many are dealt with: sent, or
// given up.
func (e *udpEngine) sendSome(b *sendBatch, i int) int {
	n, err := 1, syscall.Errno(0)
	tooLong := b.meta[i].size > maxPayload && b.names[i].v4() // as a super-frame can be that came over IPv6
	switch {
	case e.segment && !b.sock.noSegment.Load() && !tooLong:
		n, err = sendWhole(b, i, b.n)
	case b.meta[i].count > 1:
		b.sock.tooLong.Store(b.meta[i].flow)
		err = b.sendSplit(i)
	default:
		n, err = sendWhole(b, i, i+1)
	}
	if err != 0 {
		e.dropped.Add(1)
		e.unreachable(b, i, err)
		return 1
	}
	for k := i; k < i+n; k++ {
		b.meta[k].bytes.Add(int64(b.meta[k].size))
	}
	return n
}

const (
	// sendTries is how often a message is sent that meets an error which may be
	// that of another, or its own.
	sendTries = 16
	// refusedTries is the same for a refusal, which is always another's. Over
	// loopback, where IPv6 limits no ICMP errors, a flood to a closed port leaves
	// one at the socket most of the time.
	refusedTries = 128
)

// again reports whether a message that met err may go if it is sent once more. The
// kernel reports what an ICMP error stands for (icmp_err_convert) with whatever is
// sent next on the socket, be it to another peer, and that clears it; by then the
// next one may have come.
func again(err syscall.Errno, try int) bool {
	switch err {
	case syscall.ECONNREFUSED:
		return try < refusedTries
	case syscall.EHOSTUNREACH, syscall.ENETUNREACH, syscall.EHOSTDOWN, syscall.ENONET,
		syscall.ENOPROTOOPT, syscall.EOPNOTSUPP, syscall.EPROTO, syscall.EACCES:
		return try < sendTries
	case syscall.EMSGSIZE:
		return try < 1 // each try puts it into the error queue
	}
	return false
}

// sendWhole sends the messages from i to before end, and returns how many went.
func sendWhole(b *sendBatch, i, end int) (int, syscall.Errno) {
	s, m := b.sock, &b.meta[i]
	n, err := b.send(i, end)
	broadcast := false
	for try := 0; again(err, try); try++ {
		// If the datagram is too long, the error queue says so, over IPv4
		// without the destination's port (ip_local_error in
		// __ip_append_data). It can be read before we are here, but then it
		// will be said again.
		s.tooLong.Store(m.flow)
		broadcast = broadcast || err == syscall.EACCES && b.names[i].v4() && s.allowBroadcast()
		if n, err = b.send(i, end); err == 0 && broadcast {
			s.group.Store(true)
		}
	}
	if m.count == 1 || err == 0 || err == syscall.EAGAIN {
		return n, err
	}
	// Either the device has no checksum offload (EIO), or a segment does not
	// fit into the MTU (EINVAL, EMSGSIZE).
	if err == syscall.EIO {
		s.noSegment.Store(true)
	}
	s.tooLong.Store(m.flow)
	return 1, b.sendSplit(i)
}

// unreachable tells the container that message i was not sent, if a router would.
// EMSGSIZE is told by the error queue, which knows the MTU, and ECONNREFUSED is
// always another datagram's.
func (e *udpEngine) unreachable(b *sendBatch, i int, err syscall.Errno) {
	f := b.meta[i].flow
	if f.inside.sock != nil || err == syscall.EMSGSIZE || err == syscall.ECONNREFUSED {
		return
	}
	d := stack.Datagram{Src: f.guest, Dst: f.peer, Payload: b.payload(i)[:min(b.meta[i].segment, b.meta[i].size)]}
	e.refuse(&d, err)
}

// refuse answers a datagram with the ICMP error that stands for err, if one does.
func (e *udpEngine) refuse(d *stack.Datagram, err error) {
	errno, ok := errors.AsType[syscall.Errno](err)
	if !ok || d.Dst.Addr().IsMulticast() {
		return // RFC 1122, §3.2.2: no error about a multicast
	}
	if icmp, ok := icmpErrorOf(errno, d.Dst.Addr().Is4()); ok {
		_ = e.cfg.Stack.WriteUDPError(d, icmp)
	}
}
