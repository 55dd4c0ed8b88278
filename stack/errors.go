package stack

import (
	"context"
	"errors"
	"os"
	"syscall"

	"gvisor.dev/gvisor/pkg/tcpip"
)

// errno is the errno with which the kernel would have said what gVisor says.
func errno(err tcpip.Error) error {
	switch err.(type) {
	case nil:
		return nil
	case *tcpip.ErrConnectionRefused:
		return syscall.ECONNREFUSED
	case *tcpip.ErrConnectionReset:
		return syscall.ECONNRESET
	case *tcpip.ErrConnectionAborted, *tcpip.ErrAborted:
		return syscall.ECONNABORTED
	case *tcpip.ErrTimeout:
		return syscall.ETIMEDOUT
	case *tcpip.ErrHostUnreachable, *tcpip.ErrHostDown:
		return syscall.EHOSTUNREACH
	case *tcpip.ErrNetworkUnreachable:
		return syscall.ENETUNREACH
	case *tcpip.ErrPortInUse:
		return syscall.EADDRINUSE
	case *tcpip.ErrNoPortAvailable, *tcpip.ErrBadLocalAddress:
		return syscall.EADDRNOTAVAIL
	case *tcpip.ErrClosedForSend:
		return syscall.EPIPE
	case *tcpip.ErrNotConnected, *tcpip.ErrInvalidEndpointState:
		return syscall.ENOTCONN
	}
	return errors.New(err.String())
}

// silent reports whether a dial that failed with err was never answered: then
// neither is the container.
func silent(err error) bool {
	return errors.Is(err, syscall.ETIMEDOUT) || errors.Is(err, os.ErrDeadlineExceeded) ||
		errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled)
}

// unreachable is the ICMP error that makes connect(2) fail with err.
func unreachable(err error, v6 bool) (ICMPError, bool) {
	prohibited := errors.Is(err, syscall.EACCES) || errors.Is(err, syscall.EPERM)
	host := errors.Is(err, syscall.EHOSTUNREACH) || errors.Is(err, syscall.EHOSTDOWN)
	// A host without an address of that family has no route to it either.
	network := errors.Is(err, syscall.ENETUNREACH) || errors.Is(err, syscall.ENETDOWN) ||
		errors.Is(err, syscall.EADDRNOTAVAIL) || errors.Is(err, syscall.EAFNOSUPPORT)
	switch {
	case v6 && prohibited:
		return ICMPError{Type: icmp6Unreachable, Code: icmp6CodeProhibit}, true
	case v6 && host:
		return ICMPError{Type: icmp6Unreachable, Code: icmp6CodeAddress}, true
	case v6 && network:
		return ICMPError{Type: icmp6Unreachable, Code: icmpCodeNet}, true
	case prohibited:
		return ICMPError{Type: icmpUnreachable, Code: icmpCodeProhibited}, true
	case host:
		return ICMPError{Type: icmpUnreachable, Code: icmpCodeHost}, true
	case network:
		return ICMPError{Type: icmpUnreachable, Code: icmpCodeNet}, true
	}
	return ICMPError{}, false
}
