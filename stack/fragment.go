package stack

import (
	"net/netip"
	"slices"
	"sync/atomic"
	"time"
)

// Limits of reassembly: a container that sends only fragments costs this much
// and no more. 30 s is Linux's net.ipv4.ipfrag_time.
const (
	maxFragmentBytes = 4 << 20
	maxPartials      = 1024
	maxFragments     = 128 // pieces of one packet; 64 KiB at MTU 576 are 119
	fragmentTimeout  = 30 * time.Second
)

// fragmentKey says which packet a fragment is of (RFC 791, RFC 8200 §4.5).
type fragmentKey struct {
	src, dst netip.Addr
	id       uint32
	proto    uint8
}

// partial is a packet of which some fragments are here.
type partial struct {
	key      fragmentKey
	pieces   []piece // by offset, without overlap
	bytes    int     // held
	total    int     // of the whole, 0 until the last piece came
	deadline time.Time
	hops     uint8
	tos      uint8
}

type piece struct {
	off  int
	data []byte
}

// reassembly puts the container's fragments together. It belongs to the reading
// goroutine; drops is required.
type reassembly struct {
	byKey map[fragmentKey]*partial
	order []*partial // oldest first
	bytes int
	now   func() time.Time // nil is time.Now
	drops *atomic.Uint64
}

// add takes a fragment. When it completes its packet, add turns p into the whole
// and returns true.
func (r *reassembly) add(p *packet) bool {
	now := time.Now
	if r.now != nil {
		now = r.now
	}
	r.expire(now())
	// All but the last are multiples of 8, none reaches past the longest
	// packet ("ping of death"), and none is empty.
	if len(p.l4) == 0 || p.more && len(p.l4)%8 != 0 || p.fragOff+len(p.l4) > maxL4(p.src) {
		r.drops.Add(1)
		return false
	}
	key := fragmentKey{p.src, p.dst, p.fragID, p.fragNext}
	w := r.byKey[key]
	if w == nil {
		w = &partial{key: key, deadline: now().Add(fragmentTimeout), hops: p.hops, tos: p.tos}
		if r.byKey == nil {
			r.byKey = make(map[fragmentKey]*partial)
		}
		r.byKey[key] = w
		r.order = append(r.order, w)
	}
	if !w.insert(p) {
		// Overlapping fragments discard the packet (RFC 5722); Linux does
		// so for IPv4 as well.
		r.remove(w)
		return false
	}
	r.bytes += len(p.l4)
	if w.total != 0 && w.bytes == w.total {
		r.remove(w)
		w.whole(p)
		return true
	}
	for r.bytes > maxFragmentBytes || len(r.order) > maxPartials {
		r.remove(r.order[0])
	}
	return false
}

// insert adds a piece; it returns false if the packet cannot be put together any
// more.
func (w *partial) insert(p *packet) bool {
	off, end := p.fragOff, p.fragOff+len(p.l4)
	switch {
	case len(w.pieces) == maxFragments:
		return false
	case !p.more && w.total != 0 && w.total != end, w.total != 0 && end > w.total:
		return false
	}
	i, found := slices.BinarySearchFunc(w.pieces, off, func(x piece, off int) int { return x.off - off })
	switch {
	case found,
		i > 0 && w.pieces[i-1].off+len(w.pieces[i-1].data) > off,
		i < len(w.pieces) && end > w.pieces[i].off,
		!p.more && i < len(w.pieces):
		return false
	}
	if !p.more {
		w.total = end
	}
	w.pieces = slices.Insert(w.pieces, i, piece{off, slices.Clone(p.l4)})
	w.bytes += len(p.l4)
	return true
}

// whole makes p the packet that the pieces are, with a plain IP header.
func (w *partial) whole(p *packet) {
	n := ipHdrLen(p.src)
	b := make([]byte, n, n+w.total)
	h := ipHdr{src: p.src, dst: p.dst, proto: w.key.proto, hops: w.hops, tos: w.tos, payloadLen: w.total}
	putIP(b, h)
	for _, x := range w.pieces {
		b = append(b, x.data...)
	}
	*p = packet{ip: b, l4: b[n:], src: p.src, dst: p.dst, v6: p.v6, proto: w.key.proto, hops: w.hops, tos: w.tos}
}

func (r *reassembly) remove(w *partial) {
	delete(r.byKey, w.key)
	r.bytes -= w.bytes
	if i := slices.Index(r.order, w); i >= 0 {
		r.order = slices.Delete(r.order, i, i+1)
	}
	if w.total == 0 || w.bytes != w.total {
		r.drops.Add(1)
	}
}

func (r *reassembly) expire(now time.Time) {
	for len(r.order) > 0 && now.After(r.order[0].deadline) {
		r.remove(r.order[0])
	}
}
