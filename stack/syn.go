package stack

import (
	"context"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv6"
	gstack "gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"
)

// maxHeld is how many SYNs are held at once. gVisor's own forwarder is usually
// given 10, which loses bursts.
const maxHeld = 4096

// heldAtLeast is how long a SYN is held even if others want its place: longer
// than the world needs for its answer, and no longer than a container waits that
// sends its SYN again, after 1 and 3 seconds.
const heldAtLeast = 2 * time.Second

// heldKey is a connection as the container sees it.
type heldKey struct{ src, dst netip.AddrPort }

// synHolder keeps the SYNs of connections that the container wants to open, from
// their arrival to the answer.
type synHolder struct {
	stack *Stack
	mu    sync.Mutex
	held  map[heldKey]*TCPRequest
	wg    sync.WaitGroup
	ctx   context.Context // ends with the stack
	now   func() time.Time
}

// TCPRequest is a connection that the container wants to open: its SYN is held
// back, unanswered, until one of Accept, Release and Reject answers it; after Release,
// Done ends the request. Retransmissions in the meantime are dropped, and the newest is the one held.
type TCPRequest struct {
	// Src is the container's end, Dst what it wants to reach.
	Src, Dst netip.AddrPort

	holder *synHolder
	ctx    context.Context
	cancel context.CancelFunc
	since  time.Time
	seq    uint32
	tos    uint8

	// holder.mu guards the following fields.
	ip       []byte // the newest SYN
	answered answer
	accepted chan acceptResult
}

// answer is what was decided about a request.
type answer uint8

const (
	unanswered answer = iota
	toStack           // Accept: retransmissions are gVisor's
	toKernel          // Release: retransmissions go back as well
	rejected          // Reject: retransmissions are dropped
)

type acceptResult struct {
	conn *Conn
	err  error
}

// maxHeldSYN is the longest SYN that is held, with its headers and the data of TCP
// Fast Open, unless the MTU is greater.
const maxHeldSYN = 4096

// handle takes a SYN from the reading goroutine. It returns false if the SYN is
// gVisor's.
func (h *synHolder) handle(p *packet, ip []byte) bool {
	kept, r := h.hold(p, ip)
	switch {
	case r == nil:
	case h.stack.cfg.TCP == nil:
		r.Reject(nil)
	default:
		h.stack.cfg.TCP(r)
	}
	return kept
}

// hold reports whether a SYN is kept from gVisor, and returns the request that it
// is the first SYN of.
func (h *synHolder) hold(p *packet, ip []byte) (kept bool, _ *TCPRequest) {
	key := heldKey{netip.AddrPortFrom(p.src, p.srcPort()), netip.AddrPortFrom(p.dst, p.dstPort())}
	seq := binary.BigEndian.Uint32(p.l4[4:])
	h.mu.Lock()
	defer h.mu.Unlock()
	if r := h.held[key]; r != nil {
		if r.seq == seq && len(ip) <= max(maxHeldSYN, h.stack.ep.mtu) {
			return h.retransmittedLocked(r, ip), nil
		}
		// The container gave up and reuses its port; what was dialled
		// for the old SYN is stale.
		h.endLocked(key, r)
	} else if h.stack.established(key) {
		return false, nil
	}
	// A segment put together of fragments may be of 64 KiB.
	if len(ip) > max(maxHeldSYN, h.stack.ep.mtu) || !h.makeRoomLocked() || h.ctx.Err() != nil {
		h.stack.stats.synDrop.Add(1)
		return true, nil
	}
	r := &TCPRequest{
		Src: key.src, Dst: key.dst, holder: h,
		since: h.now(), seq: seq, tos: p.tos, ip: slices.Clone(ip),
	}
	r.ctx, r.cancel = context.WithCancel(h.ctx)
	h.held[key] = r
	return true, r
}

// makeRoomLocked reports whether one more SYN may be held. Where there are too many,
// one that the world has not answered for long makes way for it: or else a
// container that has called many dead addresses could call nobody for as long as
// such dials last. A few are looked at, in the map's random order, for a flood must
// be cheap to refuse.
func (h *synHolder) makeRoomLocked() bool {
	if len(h.held) < maxHeld {
		return true
	}
	looks := 8
	for key, r := range h.held {
		if r.answered == unanswered && h.now().Sub(r.since) >= heldAtLeast {
			h.endLocked(key, r)
			return true
		}
		if looks--; looks == 0 {
			break
		}
	}
	return false
}

// retransmittedLocked takes another copy of a SYN that is held.
func (h *synHolder) retransmittedLocked(r *TCPRequest, ip []byte) bool {
	switch r.answered {
	case toStack:
		return false
	case toKernel:
		_ = h.stack.ep.writeBack(ip, r.Src.Addr().Is6())
	case unanswered:
		r.ip = append(r.ip[:0], ip...)
	}
	return true
}

func (h *synHolder) endLocked(key heldKey, r *TCPRequest) {
	if h.held[key] == r {
		delete(h.held, key)
	}
	r.cancel()
}

// Context ends when the answer is no longer wanted: the container reused the
// ports for another attempt, the request was ended, or the stack closed.
func (r *TCPRequest) Context() context.Context { return r.ctx }

// Done ends the request: the next SYN from the same ports is a new one. Accept and
// Reject imply it. After Release it says that the kernel has accepted the
// connection, or that it will not.
func (r *TCPRequest) Done() {
	r.holder.mu.Lock()
	defer r.holder.mu.Unlock()
	r.holder.endLocked(heldKey{r.Src, r.Dst}, r)
}

// decide records the answer, and returns the SYN to answer.
func (r *TCPRequest) decide(a answer) ([]byte, error) {
	h := r.holder
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.held[heldKey{r.Src, r.Dst}] != r {
		return nil, fmt.Errorf("answer connection %s to %s: %w", r.Src, r.Dst, net.ErrClosed)
	}
	r.answered = a
	return r.ip, nil
}

// Release gives the SYN back to the container's own kernel, by writing the frame
// into the device with its two MAC addresses swapped and nothing else changed:
// for the kernel path, where a transparent listener in the namespace takes it.
// So are its retransmissions, until Done. The error wraps [net.ErrClosed] where the
// request has ended.
func (r *TCPRequest) Release() error {
	ip, err := r.decide(toKernel)
	if err != nil {
		return err
	}
	return r.holder.stack.ep.writeBack(ip, r.Src.Addr().Is6())
}

// writeBack sends an IP packet of the container's back to it. Its transport
// checksum may be the partial one that the kernel gave us, so that it is left
// to be done again.
func (e *endpoint) writeBack(ip []byte, v6 bool) error {
	f := e.getHdr()
	defer e.putHdr(f)
	var p packet
	if err := p.parse(vnetHdr{}, ip); err != nil {
		return err
	}
	hdr := vnetHdr{flags: vnetNeedsCsum, csumStart: uint16(ethHdrLen + len(ip) - len(p.l4)), csumOffset: 16}
	hdr.encode(f.buf[:])
	e.putEth(f.buf[vnetHdrLen:], v6)
	binary.BigEndian.PutUint16(p.l4[16:], pseudoSum(p.src, p.dst, protoTCP, len(p.l4)))
	return e.write(append(f.iov[:0], f.buf[:vnetHdrLen+ethHdrLen], ip))
}

// Reject answers the SYN as the network would have that made the dial fail with
// err: ICMP unreachable for EHOSTUNREACH, ENETUNREACH, EACCES and EPERM, silence
// for ETIMEDOUT, and RST for ECONNREFUSED and anything else.
func (r *TCPRequest) Reject(err error) {
	defer r.Done()
	ip, decideErr := r.decide(rejected)
	if decideErr != nil {
		return
	}
	var p packet
	if p.parse(vnetHdr{}, ip) != nil {
		return
	}
	e := r.holder.stack.ep
	if silent(err) {
		return
	}
	if ie, ok := unreachable(err, p.v6); ok {
		_ = e.writeError(ipHdr{src: p.src, dst: p.dst, proto: protoTCP, hops: p.hops, tos: p.tos}, p.l4, ie)
		return
	}
	_ = e.writeReset(&p)
}

// writeReset refuses a SYN (RFC 9293 §3.10.7.1).
func (e *endpoint) writeReset(p *packet) error {
	var b [tcpHdrLen]byte
	copy(b[0:], p.l4[2:4])
	copy(b[2:], p.l4[0:2])
	dataLen := uint32(len(p.l4) - min(len(p.l4), int(p.l4[12]>>4)*4))
	binary.BigEndian.PutUint32(b[8:], binary.BigEndian.Uint32(p.l4[4:])+1+dataLen)
	b[12], b[13] = tcpHdrLen/4<<4, byte(header.TCPFlagRst|header.TCPFlagAck)
	sum := checksum.Checksum(b[:], pseudoSum(p.dst, p.src, protoTCP, len(b)))
	binary.BigEndian.PutUint16(b[16:], ^sum)
	return e.writeIP(ipHdr{src: p.dst, dst: p.src, proto: protoTCP}, b[:])
}

// Accept lets gVisor complete the handshake, and returns the connection once
// the container has acknowledged it; the caller closes it. The error is ctx's, or
// wraps [net.ErrClosed] where the request or the stack has ended.
func (r *TCPRequest) Accept(ctx context.Context) (*Conn, error) {
	defer r.Done()
	h := r.holder
	result := make(chan acceptResult, 1)
	h.mu.Lock()
	r.accepted = result
	h.mu.Unlock()
	ip, err := r.decide(toStack)
	if err != nil {
		return nil, err
	}
	h.stack.abortStale(heldKey{r.Src, r.Dst})
	h.stack.ep.inject(r.Src.Addr().Is6(), ip, nil)
	select {
	case res := <-result:
		return res.conn, res.err
	case <-ctx.Done():
		err = ctx.Err()
	case <-r.ctx.Done():
		err = net.ErrClosed
	}
	h.wg.Add(1)
	go h.discard(result)
	return nil, fmt.Errorf("accept connection %s to %s: %w", r.Src, r.Dst, err)
}

// discard ends a connection that came too late.
func (h *synHolder) discard(result <-chan acceptResult) {
	defer h.wg.Done()
	select {
	case res := <-result:
		if res.conn != nil {
			_ = res.conn.Abort()
		}
	case <-h.ctx.Done():
	}
}

// handshake is gVisor's callback for a SYN that inject gave it, on a goroutine of
// its own.
func (h *synHolder) handshake(fr *tcp.ForwarderRequest) {
	id := fr.ID()
	src := addrPort(id.RemoteAddress, id.RemotePort)
	dst := addrPort(id.LocalAddress, id.LocalPort)
	h.mu.Lock()
	var result chan acceptResult
	if r := h.held[heldKey{src, dst}]; r != nil {
		result, r.accepted = r.accepted, nil
	}
	h.mu.Unlock()
	if result == nil {
		fr.Complete(false)
		return
	}
	var wq waiter.Queue
	ep, terr := fr.CreateEndpoint(&wq)
	fr.Complete(false)
	if terr != nil {
		result <- acceptResult{err: &net.OpError{Op: "accept", Net: "tcp", Source: net.TCPAddrFromAddrPort(dst), Addr: net.TCPAddrFromAddrPort(src), Err: errno(terr)}}
		return
	}
	result <- acceptResult{conn: newConn(h.stack, ep, &wq, dst, src)}
}

// established reports whether gVisor has a live connection with these ends.
func (s *Stack) established(key heldKey) bool {
	ep := s.endpoint(key)
	return ep != nil && ep.EndpointState() != tcp.StateTimeWait
}

// abortStale ends what is left in gVisor of an earlier connection with these ends
// (TIME_WAIT), so that the SYN of a new one finds nobody there.
func (s *Stack) abortStale(key heldKey) {
	if ep := s.endpoint(key); ep != nil {
		ep.Abort()
	}
}

// endpoint returns gVisor's end of a connection, nil if there is none.
func (s *Stack) endpoint(key heldKey) *tcp.Endpoint {
	proto := ipv4.ProtocolNumber
	if key.src.Addr().Is6() {
		proto = ipv6.ProtocolNumber
	}
	id := gstack.TransportEndpointID{
		LocalAddress: tcpipAddr(key.dst.Addr()), LocalPort: key.dst.Port(),
		RemoteAddress: tcpipAddr(key.src.Addr()), RemotePort: key.src.Port(),
	}
	ep, _ := s.net.FindTransportEndpoint(proto, tcp.ProtocolNumber, id, nicID).(*tcp.Endpoint)
	return ep
}
