package stack

import (
	"context"
	"errors"
	"net"
	"net/netip"
)

// Conn is a TCP connection with the container, with gVisor at our end. Besides
// [net.Conn] it has CloseRead, CloseWrite and Abort (RST).
type Conn struct{ net.Conn }

// CloseRead shuts the reading side.
func (c *Conn) CloseRead() error { return nil }

// CloseWrite sends FIN; reading goes on.
func (c *Conn) CloseWrite() error { return nil }

// Abort ends the connection with RST.
func (c *Conn) Abort() error { return nil }

// DialTCP connects to dst in the namespace with src as the address that the
// container sees; src need not be ours, and port 0 lets the stack choose one.
// The error is a [net.OpError] around the errno that connect(2) would give:
// ECONNREFUSED, EHOSTUNREACH, ETIMEDOUT, EADDRINUSE.
func (s *Stack) DialTCP(ctx context.Context, src, dst netip.AddrPort) (*Conn, error) {
	return nil, errors.ErrUnsupported
}
