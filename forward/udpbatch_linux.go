package forward

import (
	"sync/atomic"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	// recvMsgs is how many messages one recvmmsg(2) takes.
	recvMsgs = 32
	// recvSlot is the room for one: the longest datagram, and the longest
	// that UDP_GRO makes of several. The odd 192 bytes spread the slots over
	// the sets of the caches, which 64 KiB apart they would share. Pages of
	// it that no datagram was long enough for are never touched.
	recvSlot = 64<<10 + 192
	// sendMsgs is how many messages one sendmmsg(2) sends.
	sendMsgs = 64
	// maxSegments is UDP_MAX_SEGMENTS of the oldest kernels that have
	// UDP_SEGMENT; since Linux 6.5 it is 128.
	maxSegments = 64
	// maxPayload is the longest payload over IPv4, super-frames included.
	maxPayload = 65535 - 20 - 8
	// sendArena is the room for payloads that are copied to be sent later.
	sendArena = 128 << 10
)

// datagrams returns how many a payload is; a segment of 0 is one.
func datagrams(length, segment int) int {
	if segment <= 0 || segment >= length {
		return 1
	}
	return (length + segment - 1) / segment
}

// mmsghdr is struct mmsghdr; Go pads it as C does, since Msghdr has pointers.
type mmsghdr struct {
	hdr unix.Msghdr
	len uint32
}

// recvBatch is what one recvmmsg(2) fills. One serves all sockets of a poller.
type recvBatch struct {
	msgs  [recvMsgs]mmsghdr
	iovs  [recvMsgs]unix.Iovec
	names [recvMsgs]sockaddr
	ctrl  [recvMsgs]cmsgBuf
	buf   []byte
	n     int // filled by the last call
}

func newRecvBatch() *recvBatch {
	b := &recvBatch{buf: make([]byte, recvMsgs*recvSlot), n: recvMsgs}
	for i := range b.msgs {
		b.iovs[i].Base = &b.buf[i*recvSlot]
		b.iovs[i].SetLen(recvSlot)
		h := &b.msgs[i].hdr
		h.Iov = &b.iovs[i]
		h.SetIovlen(1)
		h.Name = &b.names[i][0]
		h.Control = (*byte)(unsafe.Pointer(&b.ctrl[i]))
	}
	return b
}

// recv reads what is there from s, without blocking. No message is none: EAGAIN,
// or an error of an earlier datagram, which the error queue explains.
func (b *recvBatch) recv(s *udpSocket) int {
	for i := range b.n {
		h := &b.msgs[i].hdr
		b.names[i] = sockaddr{} // an IPv4 one leaves the end of an IPv6 one
		h.Namelen = uint32(len(b.names[i]))
		h.SetControllen(int(unsafe.Sizeof(b.ctrl[i])))
	}
	s.mu.RLock()
	defer s.mu.RUnlock()
	b.n = 0
	if s.fd < 0 {
		return 0
	}
	n, _, errno := unix.Syscall6(unix.SYS_RECVMMSG, uintptr(s.fd),
		uintptr(unsafe.Pointer(&b.msgs[0])), recvMsgs, unix.MSG_DONTWAIT, 0, 0)
	if errno == 0 {
		b.n = int(n)
	}
	return b.n
}

// message returns the i-th of the n messages that recv read.
func (b *recvBatch) message(i int, opt *recvOptions) (from *sockaddr, payload []byte) {
	m := &b.msgs[i]
	opt.parse(b.ctrl[i].bytes()[:int(m.hdr.Controllen)])
	return &b.names[i], b.buf[i*recvSlot:][:m.len]
}

// sendBatch gathers messages for one socket, and joins those for one flow into
// super-frames (UDP_SEGMENT): what is many datagrams for the world crosses the
// kernel as one.
type sendBatch struct {
	sock *udpSocket
	pin  bool // DF
	n    int
	used int // of arena

	meta  [sendMsgs]sendMeta
	msgs  [sendMsgs]mmsghdr
	iovs  [sendMsgs]unix.Iovec
	names [sendMsgs]sockaddr
	ctrl  [sendMsgs]cmsgBuf
	arena []byte
}

// sendMeta is what is to know about one message until it is sent.
type sendMeta struct {
	flow    *flow
	bytes   *atomic.Int64 // counts what was sent
	opt     sendOptions
	size    int  // of the payload
	segment int  // size of all its datagrams but the last
	count   int  // datagrams
	closed  bool // the last datagram was shorter
	lone    bool // nothing may be joined
}

// init prepares the batch, with an arena if payloads are to be copied.
func (b *sendBatch) init(arena int) {
	b.arena = make([]byte, arena)
	for i := range b.msgs {
		h := &b.msgs[i].hdr
		h.Iov = &b.iovs[i]
		h.SetIovlen(1)
		h.Name = &b.names[i][0]
		h.Control = (*byte)(unsafe.Pointer(&b.ctrl[i]))
	}
}

// fits reports whether the batch takes another message for s.
func (b *sendBatch) fits(s *udpSocket, pin bool, size int) bool {
	return b.n == 0 || b.sock == s && b.pin == pin && b.n < sendMsgs && b.used+size <= len(b.arena)
}

// add enters a message. Its payload is copied if it fits into the arena, else it
// must stay as it is until the batch is sent.
func (b *sendBatch) add(f *flow, end *flowEnd, opt sendOptions, pin bool, payload []byte, copied bool) *sendMeta {
	i := b.n
	b.n++
	b.sock, b.pin = end.sock, pin
	b.names[i] = end.remote
	m := &b.meta[i]
	*m = sendMeta{flow: f, bytes: &f.counters.bytesOut, opt: opt, size: len(payload), segment: opt.segment}
	m.opt.from = end.local
	if m.count = datagrams(len(payload), opt.segment); m.count > 1 {
		m.closed = len(payload)%opt.segment != 0
	} else {
		m.segment = len(payload)
	}
	if copied {
		copy(b.arena[b.used:], payload)
		payload = b.arena[b.used:][:len(payload):len(payload)]
		b.used += len(payload)
	} else {
		m.lone = true
	}
	b.iovs[i].Base = unsafe.SliceData(payload)
	b.iovs[i].SetLen(len(payload))
	return m
}

// join appends a datagram to the last message, if it may travel with it: UDP_SEGMENT
// cuts datagrams of one size, of which only the last may be shorter.
func (b *sendBatch) join(payload []byte) bool {
	m := &b.meta[b.n-1]
	size := len(payload)
	if m.closed || m.lone || size == 0 || size > m.segment || m.count >= maxSegments ||
		m.size+size > maxPayload || b.used+size > len(b.arena) {
		return false
	}
	copy(b.arena[b.used:], payload)
	b.used += size
	m.size += size
	m.count++
	m.closed = size < m.segment
	b.iovs[b.n-1].SetLen(m.size)
	return true
}

// payload returns the payload of message i.
func (b *sendBatch) payload(i int) []byte {
	return unsafe.Slice(b.iovs[i].Base, b.meta[i].size)
}

// pack writes the headers of message i.
func (b *sendBatch) pack(i int) {
	m, h := &b.meta[i], &b.msgs[i].hdr
	m.opt.segment = 0
	if m.count > 1 {
		m.opt.segment = m.segment
	}
	h.Namelen = b.names[i].len()
	h.SetControllen(m.opt.put(&b.ctrl[i], b.names[i].v4()))
}

// reset empties the batch, and lets go of what it points to.
func (b *sendBatch) reset() {
	clear(b.meta[:b.n])
	clear(b.iovs[:b.n])
	b.sock, b.n, b.used = nil, 0, 0
}

// send sends the messages from i to before end, and returns how many went. The
// socket is locked for reading and open.
func (b *sendBatch) send(i, end int) (int, syscall.Errno) {
	n, _, errno := unix.Syscall6(unix.SYS_SENDMMSG, uintptr(b.sock.fd),
		uintptr(unsafe.Pointer(&b.msgs[i])), uintptr(end-i), unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL, 0, 0)
	if errno != 0 {
		return 0, errno
	}
	return int(n), 0
}

// sendSplit sends message i datagram by datagram, where UDP_SEGMENT can't.
func (b *sendBatch) sendSplit(i int) syscall.Errno {
	m, h := &b.meta[i], b.msgs[i].hdr
	m.opt.segment = 0
	h.SetControllen(m.opt.put(&b.ctrl[i], b.names[i].v4()))
	var iov unix.Iovec
	h.Iov = &iov
	for p := b.payload(i); len(p) > 0; {
		n := min(m.segment, len(p))
		iov.Base = &p[0]
		iov.SetLen(n)
		p = p[n:]
		if err := b.sendOne(&h); err != 0 {
			return err
		}
	}
	return 0
}

func (b *sendBatch) sendOne(h *unix.Msghdr) (errno syscall.Errno) {
	for try := 0; try == 0 || again(errno, try-1); try++ {
		_, _, errno = unix.Syscall(unix.SYS_SENDMSG, uintptr(b.sock.fd),
			uintptr(unsafe.Pointer(h)), unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
	}
	return errno
}
