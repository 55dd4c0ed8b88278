package stack

import (
	"context"
	"errors"
	"net/netip"
)

// TCPRequest is a connection that the container wants to open. Its SYN is held
// back, unanswered, until one of Accept, Release and Reject ends the request;
// retransmissions in the meantime are dropped, and the newest is the one held.
type TCPRequest struct {
	// Src is the container's end, Dst what it wants to reach.
	Src, Dst netip.AddrPort
}

// Context ends when the answer is no longer wanted: the container reused the
// ports for another attempt, the request was ended, or the stack closed.
func (r *TCPRequest) Context() context.Context { return context.TODO() }

// Accept lets gVisor complete the handshake, and returns the connection once
// the container has acknowledged it.
func (r *TCPRequest) Accept(ctx context.Context) (*Conn, error) { return nil, errors.ErrUnsupported }

// Release gives the SYN back to the container's own kernel, by writing the frame
// into the device with its two MAC addresses swapped and nothing else changed:
// for the kernel path, where a transparent listener in the namespace takes it.
func (r *TCPRequest) Release() error { return errors.ErrUnsupported }

// Reject answers the SYN as the network would have that made the dial fail with
// err: a RST for ECONNREFUSED and for anything unknown, ICMP unreachable for
// EHOSTUNREACH, ENETUNREACH and EACCES, and silence for ETIMEDOUT.
func (r *TCPRequest) Reject(err error) {}
