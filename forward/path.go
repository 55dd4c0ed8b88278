package forward

import (
	"context"
	"net"
	"net/netip"
)

// flowConn is either end of a TCP flow: a host socket, a transparent socket in
// the namespace, or a connection of the stack.
type flowConn interface {
	net.Conn
	CloseRead() error
	CloseWrite() error
}

// dialer is a path into the namespace: it connects to dst there with src as the
// address that the server sees. There are two, *stack.Stack (tap) and *nsDialer
// (kernel).
type dialer interface {
	DialTCP(ctx context.Context, src, dst netip.AddrPort) (flowConn, error)
}
