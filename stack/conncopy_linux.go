package stack

import (
	"errors"
	"io"
	"net"
	"os"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip"
)

// maxMove is how much goes from a host socket into gVisor before anybody else
// gets a turn.
const maxMove = 256 << 10

// CopyTo copies what the container sends to a stream socket until its FIN, and
// returns the number of bytes, which it also adds to live as they go. gVisor's
// buffers go to write(2) as they are, without a copy in between. The error is a
// [net.OpError] whose Op tells whose it is: "read" the container's, "write" the
// socket's.
func (c *Conn) CopyTo(dst syscall.RawConn, live *atomic.Int64) (int64, error) {
	m := toSocket{conn: c, live: live}
	for {
		if err := dst.Write(m.step); err != nil {
			return m.done, &net.OpError{Op: "write", Net: "tcp", Err: err}
		}
		switch {
		case errors.Is(m.err, io.EOF):
			return m.done, nil
		case m.err != nil:
			return m.done, m.err
		}
		if err := c.wait(c.readableC, &c.readLimit); err != nil {
			return m.done, c.opError("read", err)
		}
	}
}

// toSocket moves data from gVisor to a socket. It is the io.Writer that gVisor
// writes to, while it holds the connection's lock: so it never blocks.
type toSocket struct {
	conn  *Conn
	fd    int
	full  bool // the socket takes no more
	done  int64
	live  *atomic.Int64
	err   error // io.EOF after the container's FIN
	errno error // of write(2)
}

// step moves what is there. It returns false to be called again when the socket
// is writable.
func (m *toSocket) step(fd uintptr) bool {
	m.fd = int(fd)
	for {
		m.full, m.errno = false, nil
		res, terr := m.conn.ep.Read(m, tcpip.ReadOptions{})
		m.done += int64(res.Count)
		m.live.Add(int64(res.Count))
		switch {
		case m.errno != nil:
			m.err = &net.OpError{Op: "write", Net: "tcp", Err: os.NewSyscallError("write", m.errno)}
			return true
		case m.full:
			return false
		}
		switch terr.(type) {
		case nil:
		case *tcpip.ErrWouldBlock:
			return true
		case *tcpip.ErrClosedForReceive:
			m.err = io.EOF
			return true
		default:
			m.err = m.conn.opError("read", errno(terr))
			return true
		}
	}
}

// Write implements io.Writer for gVisor.
func (m *toSocket) Write(b []byte) (int, error) {
	done := 0
	for done < len(b) {
		n, err := unix.Write(m.fd, b[done:])
		switch err {
		case nil:
			done += n
		case unix.EINTR:
		case unix.EAGAIN:
			m.full = true
			return done, errShortWrite
		default:
			m.errno = err
			return done, errShortWrite
		}
	}
	return done, nil
}

// CopyFrom copies from a stream socket to the container until the socket's end,
// without sending FIN, and returns the number of bytes, which it also adds to
// live as they go. read(2) goes straight into gVisor's buffers. The error is a
// [net.OpError] whose Op tells whose it is: "read" the socket's, "write" the
// container's.
func (c *Conn) CopyFrom(src syscall.RawConn, live *atomic.Int64) (int64, error) {
	m := fromSocket{conn: c, live: live}
	for {
		if err := src.Read(m.step); err != nil {
			return m.done, &net.OpError{Op: "read", Net: "tcp", Err: err}
		}
		switch {
		case errors.Is(m.err, io.EOF):
			return m.done, nil
		case m.err != nil:
			return m.done, m.err
		}
		if err := c.wait(c.writableC, &c.writeLimit); err != nil {
			return m.done, c.opError("write", err)
		}
	}
}

// fromSocket moves data from a socket to gVisor. It is the tcpip.Payloader that
// gVisor reads from.
type fromSocket struct {
	conn *Conn
	fd   int
	left int // that the socket has, and gVisor may read
	done int64
	live *atomic.Int64
	err  error // io.EOF at the socket's end
}

// step moves what is there. It returns false to be called again when the socket
// is readable.
func (m *fromSocket) step(fd uintptr) bool {
	m.fd = int(fd)
	for {
		// gVisor wants to know beforehand how much it will get, and
		// loses what it has read if it gets less.
		n, err := readable(m.fd)
		switch {
		case errors.Is(err, unix.EAGAIN):
			return false
		case err != nil:
			m.err = err
			return true
		}
		m.left = min(n, maxMove)
		sent, terr := m.conn.ep.Write(m, tcpip.WriteOptions{})
		m.done += sent
		m.live.Add(sent)
		switch terr.(type) {
		case nil:
		case *tcpip.ErrWouldBlock:
			return true
		default:
			m.err = m.conn.opError("write", errno(terr))
			return true
		}
	}
}

// readable returns how many bytes a stream socket has ready, at least one; EAGAIN
// if none, io.EOF at the end, or the socket's error.
func readable(fd int) (int, error) {
	if n, err := unix.IoctlGetInt(fd, unix.SIOCINQ); err == nil && n > 0 {
		return n, nil
	}
	var b [1]byte
	for {
		n, _, err := unix.Recvfrom(fd, b[:], unix.MSG_PEEK|unix.MSG_DONTWAIT)
		switch {
		case err == unix.EINTR:
			continue
		case err == unix.EAGAIN:
			return 0, err
		case err != nil:
			return 0, &net.OpError{Op: "read", Net: "tcp", Err: os.NewSyscallError("recvfrom", err)}
		case n == 0:
			return 0, io.EOF
		}
		return n, nil
	}
}

// Len implements tcpip.Payloader.
func (m *fromSocket) Len() int { return m.left }

// Read implements tcpip.Payloader. Nobody else reads the socket, so that what
// readable promised is there.
func (m *fromSocket) Read(b []byte) (int, error) {
	b = b[:min(len(b), m.left)]
	for len(b) > 0 {
		n, err := unix.Read(m.fd, b)
		switch {
		case err == unix.EINTR:
			continue
		case err != nil:
			return 0, err
		case n == 0:
			return 0, io.ErrUnexpectedEOF
		}
		m.left -= n
		return n, nil
	}
	return 0, nil
}
