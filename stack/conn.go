package stack

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"syscall"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv6"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"
)

// Conn is a TCP connection with the container, with gVisor at our end. Its
// methods may be called at the same time; a blocked Read or Write ends with
// [net.ErrClosed] when the connection is closed, with ECONNRESET when the
// container resets it, and with [os.ErrDeadlineExceeded] at its deadline.
type Conn struct {
	ep            tcpip.Endpoint
	wq            *waiter.Queue
	local, remote netip.AddrPort

	readable, writable    waiter.Entry
	readableC, writableC  <-chan struct{}
	readLimit, writeLimit deadline
	closed                chan struct{}
	closeOnce             sync.Once
	stack                 *Stack
}

var _ net.Conn = (*Conn)(nil)

// newConn wraps an endpoint whose handshake is done; local is our end.
func newConn(s *Stack, ep tcpip.Endpoint, wq *waiter.Queue, local, remote netip.AddrPort) *Conn {
	c := &Conn{ep: ep, wq: wq, local: local, remote: remote, closed: make(chan struct{}), stack: s}
	const gone = waiter.EventHUp | waiter.EventErr
	var readable, writable chan struct{}
	c.readable, readable = waiter.NewChannelEntry(waiter.ReadableEvents | gone)
	c.writable, writable = waiter.NewChannelEntry(waiter.WritableEvents | gone)
	c.readableC, c.writableC = readable, writable
	wq.EventRegister(&c.readable)
	wq.EventRegister(&c.writable)
	if !s.track(c) {
		_ = c.Abort()
	}
	return c
}

// DialTCP connects to dst in the namespace with src as the address that the
// container sees; src need not be ours, and port 0 lets the stack choose one.
// The error is a [net.OpError] around the errno that connect(2) would give:
// ECONNREFUSED, EHOSTUNREACH, ETIMEDOUT, EADDRINUSE.
func (s *Stack) DialTCP(ctx context.Context, src, dst netip.AddrPort) (*Conn, error) {
	c, err := s.dialTCP(ctx, src, dst)
	if err != nil {
		return nil, &net.OpError{Op: "dial", Net: "tcp", Source: net.TCPAddrFromAddrPort(src), Addr: net.TCPAddrFromAddrPort(dst), Err: err}
	}
	return c, nil
}

func (s *Stack) dialTCP(ctx context.Context, src, dst netip.AddrPort) (*Conn, error) {
	if src.Addr().Is4() != dst.Addr().Is4() {
		return nil, syscall.EAFNOSUPPORT
	}
	proto := ipv4.ProtocolNumber
	if dst.Addr().Is6() {
		proto = ipv6.ProtocolNumber
	}
	var wq waiter.Queue
	ep, terr := s.net.NewEndpoint(tcp.ProtocolNumber, proto, &wq)
	if terr != nil {
		return nil, errno(terr)
	}
	// One client port may have connections to several ports of the container:
	// to gVisor this option says that only the 4-tuple must be unique.
	ep.SocketOptions().SetReuseAddress(true)
	if terr := ep.Bind(tcpip.FullAddress{NIC: nicID, Addr: tcpipAddr(src.Addr()), Port: src.Port()}); terr != nil {
		ep.Close()
		return nil, errno(terr)
	}
	connected, done := waiter.NewChannelEntry(waiter.WritableEvents | waiter.EventHUp | waiter.EventErr)
	wq.EventRegister(&connected)
	defer wq.EventUnregister(&connected)
	terr = ep.Connect(tcpip.FullAddress{NIC: nicID, Addr: tcpipAddr(dst.Addr()), Port: dst.Port()})
	if _, started := terr.(*tcpip.ErrConnectStarted); started {
		select {
		case <-done:
			terr = ep.LastError()
		case <-ctx.Done():
			ep.Abort()
			return nil, ctx.Err()
		case <-s.ctx.Done():
			ep.Abort()
			return nil, net.ErrClosed
		}
	}
	if terr != nil {
		ep.Close()
		return nil, errno(terr)
	}
	local, terr := ep.GetLocalAddress()
	if terr != nil {
		ep.Close()
		return nil, errno(terr)
	}
	return newConn(s, ep, &wq, netip.AddrPortFrom(src.Addr(), local.Port), dst), nil
}

// Read reads what the container sent.
func (c *Conn) Read(b []byte) (int, error) {
	if len(b) == 0 {
		return 0, nil
	}
	w := tcpip.SliceWriter(b)
	n, err := c.readInto(&w)
	if err != nil && !errors.Is(err, io.EOF) {
		err = c.opError("read", err)
	}
	return n, err
}

// readInto waits for data and lets gVisor write it to w, as much as w takes.
func (c *Conn) readInto(w io.Writer) (int, error) {
	for {
		res, terr := c.ep.Read(w, tcpip.ReadOptions{})
		switch terr.(type) {
		case nil:
			return res.Count, nil
		case *tcpip.ErrClosedForReceive:
			return 0, io.EOF
		case *tcpip.ErrBadBuffer:
			return 0, errShortWrite
		case *tcpip.ErrWouldBlock:
		default:
			return 0, errno(terr)
		}
		if err := c.wait(c.readableC, &c.readLimit); err != nil {
			return 0, err
		}
	}
}

// errShortWrite says that the writer that readInto was given took nothing.
var errShortWrite = errors.New("nothing was taken")

// Write sends b to the container.
func (c *Conn) Write(b []byte) (int, error) {
	done := 0
	for done < len(b) {
		var r bytes.Reader
		r.Reset(b[done:])
		n, err := c.writeFrom(&r)
		done += n
		if err != nil {
			return done, c.opError("write", err)
		}
	}
	return done, nil
}

// writeFrom waits for room and lets gVisor read from p, as much as there is room
// for.
func (c *Conn) writeFrom(p tcpip.Payloader) (int, error) {
	for {
		n, terr := c.ep.Write(p, tcpip.WriteOptions{})
		if _, block := terr.(*tcpip.ErrWouldBlock); !block {
			return int(n), errno(terr)
		}
		if err := c.wait(c.writableC, &c.writeLimit); err != nil {
			return 0, err
		}
	}
}

// wait blocks until gVisor calls, or until there is no sense in waiting.
func (c *Conn) wait(event <-chan struct{}, limit *deadline) error {
	select {
	case <-event:
		return nil
	case <-c.closed:
		return net.ErrClosed
	case <-limit.wait():
		return os.ErrDeadlineExceeded
	}
}

// AwaitReset waits, after the container's FIN, until its RST, and returns
// ECONNRESET; or nil when the connection has ended otherwise, also by its read
// deadline.
func (c *Conn) AwaitReset() error {
	for {
		switch tcp.EndpointState(c.ep.State()) {
		case tcp.StateError:
			return syscall.ECONNRESET
		case tcp.StateClose:
			// A RST after the FIN is EPIPE to Linux, "aborted" to gVisor.
			if c.ep.LastError() != nil {
				return syscall.ECONNRESET
			}
			return nil
		case tcp.StateTimeWait:
			return nil
		}
		if c.wait(c.readableC, &c.readLimit) != nil {
			return nil
		}
	}
}

// CloseRead shuts the reading side.
func (c *Conn) CloseRead() error {
	return c.opError("close", errno(c.ep.Shutdown(tcpip.ShutdownRead)))
}

// CloseWrite sends FIN; reading goes on.
func (c *Conn) CloseWrite() error {
	return c.opError("close", errno(c.ep.Shutdown(tcpip.ShutdownWrite)))
}

// Close sends FIN, if it was not sent yet, and gives up the connection. What is
// still in the send buffer is delivered.
func (c *Conn) Close() error {
	c.end(c.ep.Close)
	return nil
}

// Abort ends the connection with RST; what is in the buffers is lost.
func (c *Conn) Abort() error {
	c.end(c.ep.Abort)
	return nil
}

func (c *Conn) end(how func()) {
	c.closeOnce.Do(func() {
		close(c.closed)
		how()
		c.wq.EventUnregister(&c.readable)
		c.wq.EventUnregister(&c.writable)
		c.stack.untrack(c)
	})
}

// LocalAddr is our end: of a dialled connection the address that the container
// sees, of an accepted one the address that it wanted to reach.
func (c *Conn) LocalAddr() net.Addr { return net.TCPAddrFromAddrPort(c.local) }

// RemoteAddr is the container's end.
func (c *Conn) RemoteAddr() net.Addr { return net.TCPAddrFromAddrPort(c.remote) }

// SetDeadline is SetReadDeadline and SetWriteDeadline.
func (c *Conn) SetDeadline(t time.Time) error {
	c.readLimit.set(t)
	c.writeLimit.set(t)
	return nil
}

// SetReadDeadline ends reads, also one that is blocked, at t; the zero Time is
// never.
func (c *Conn) SetReadDeadline(t time.Time) error {
	c.readLimit.set(t)
	return nil
}

// SetWriteDeadline ends writes, also one that is blocked, at t; the zero Time is
// never.
func (c *Conn) SetWriteDeadline(t time.Time) error {
	c.writeLimit.set(t)
	return nil
}

func (c *Conn) opError(op string, err error) error {
	if err == nil {
		return nil
	}
	return &net.OpError{Op: op, Net: "tcp", Source: c.LocalAddr(), Addr: c.RemoteAddr(), Err: err}
}

// deadline is a point in time at which a channel closes. The zero value is never.
type deadline struct {
	mu    sync.Mutex
	timer *time.Timer
	ch    chan struct{}
}

func (d *deadline) wait() <-chan struct{} {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.ch == nil {
		d.ch = make(chan struct{})
	}
	return d.ch
}

func (d *deadline) set(t time.Time) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.timer != nil {
		d.timer.Stop()
		d.timer = nil
	}
	if d.ch == nil {
		d.ch = make(chan struct{})
	}
	select {
	case <-d.ch:
		d.ch = make(chan struct{})
	default:
	}
	if t.IsZero() {
		return
	}
	ch := d.ch
	if wait := time.Until(t); wait > 0 {
		d.timer = time.AfterFunc(wait, func() { d.expire(ch) })
		return
	}
	close(ch)
}

// expire closes ch, unless it was replaced or closed in the meantime.
func (d *deadline) expire(ch chan struct{}) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.ch != ch {
		return
	}
	select {
	case <-ch:
	default:
		close(ch)
	}
}
