package forward

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"

	"golang.org/x/sys/unix"

	"github.com/gofwd/gofwd/netnsutil"
)

// nsDialer is the kernel path into a namespace: ordinary sockets, made in it and
// bound to the client's own address. The routing that brings the server's replies
// back to them is netnsutil's ([netnsutil.KernelPath]).
//
// Making a socket takes a thread in the namespace. The splicer's are, and an
// inbound connection is served by one of them from accept(2) to the end. No
// socket is made ahead of time: it would be made by the same threads, and is a
// small part of a connection (BenchmarkTransparentSocket, against
// BenchmarkSplicerConnections).
type nsDialer struct {
	ns   *netnsutil.NS
	mark uint32 // SO_MARK, [netnsutil.KernelPath.Mark]
	// ephemeral are the ports from which the namespace's kernel chooses.
	ephemeral PortRange
}

// DialTCP connects to dst in the namespace from src, which may be anybody's
// address. Where src's port is taken it connects from another port of the same
// address. Of its errors ECONNREFUSED says that nobody listens: that is true only
// if dst is an address of the namespace itself.
func (d nsDialer) DialTCP(ctx context.Context, src, dst netip.AddrPort) (flowConn, error) {
	var fd int
	err := d.ns.Do(func() (err error) {
		fd, err = d.connect(src, dst)
		return err
	})
	if err != nil {
		return nil, dialError(src, dst, err)
	}
	c, err := awaitConn(ctx, fd)
	if err != nil {
		return nil, dialError(src, dst, err)
	}
	return c, nil
}

func dialError(src, dst netip.AddrPort, err error) error {
	return &net.OpError{
		Op: "dial", Net: "tcp",
		Source: net.TCPAddrFromAddrPort(src), Addr: net.TCPAddrFromAddrPort(dst), Err: err,
	}
}

// connect begins to connect, on a thread in the namespace, and returns the
// non-blocking socket. Over loopback a handshake is done, or refused, before
// connect(2) returns, though that says EINPROGRESS.
//
// A port that bind(2) was given is not chosen by connect(2) for anybody, not even for
// another destination, until the last TIME_WAIT on it has gone (tb->fastreuse in
// __inet_hash_connect, net/ipv4/inet_hashtables.c): some thousand clients would use up
// the container's own ports. So connect(2) chooses for clients as well, from a range
// of one port. It does not take a 4-tuple in TIME_WAIT, which it does after bind(2)
// (tcp_twsk_unique).
//
// The client's port can be taken: by a flow of another forward to the same
// server, or by one that has just ended. The first is EADDRINUSE of bind(2), or
// EADDRNOTAVAIL of connect(2) since SO_REUSEADDR lets bind(2) pass; so is the
// second with tcp_timestamps=0. Then the client gets another port.
func (d nsDialer) connect(src, dst netip.AddrPort) (fd int, err error) {
	port, noPort := src.Port(), netip.AddrPortFrom(src.Addr(), 0)
	if port != 0 && d.ephemeral.First <= port && port <= d.ephemeral.Last {
		if fd, err = d.connectFrom(noPort, dst, port); !portTaken(err) {
			return fd, err
		}
	}
	if fd, err = d.connectFrom(src, dst, 0); !portTaken(err) {
		return fd, err
	}
	return d.connectFrom(noPort, dst, 0)
}

func portTaken(err error) bool {
	return errors.Is(err, unix.EADDRINUSE) || errors.Is(err, unix.EADDRNOTAVAIL)
}

// connectFrom connects from src. Without a port in that, connect(2) chooses: only, or
// any that makes the 4-tuple a new one if only is 0 too.
func (d nsDialer) connectFrom(src, dst netip.AddrPort, only uint16) (fd int, err error) {
	if fd, err = d.open(dst.Addr().Is4()); err != nil {
		return -1, err
	}
	if src.Port() == 0 {
		err = setOptions(fd, []option{{unix.SOL_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1}})
	}
	if only != 0 && err == nil {
		one := option{unix.SOL_IP, unix.IP_LOCAL_PORT_RANGE, int(only)<<16 | int(only)}
		if setOptions(fd, []option{one}) != nil { // before Linux 6.3 there is no such option
			src = netip.AddrPortFrom(src.Addr(), only)
		}
	}
	if err == nil {
		err = os.NewSyscallError("bind", unix.Bind(fd, toSockaddr(src)))
	}
	if err == nil {
		err = beginConnect(fd, dst)
	}
	if err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// open makes a socket, on a thread in the namespace, that may have anybody's address.
func (d nsDialer) open(is4 bool) (fd int, err error) {
	family, level, transparent := unix.AF_INET6, unix.SOL_IPV6, unix.IPV6_TRANSPARENT
	if is4 {
		family, level, transparent = unix.AF_INET, unix.SOL_IP, unix.IP_TRANSPARENT
	}
	if fd, err = unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP); err != nil {
		return -1, os.NewSyscallError("socket", err)
	}
	options := [...]option{
		{level, transparent, 1},
		{unix.SOL_SOCKET, unix.SO_MARK, int(d.mark)},
		{unix.IPPROTO_TCP, unix.TCP_NODELAY, 1},
		// Without, a client port that is in use anywhere in the namespace,
		// or in TIME_WAIT, can't be bound, nor the container's server on the
		// port of a client. What remains: TestContainerBindsAPortOfOurSockets.
		{unix.SOL_SOCKET, unix.SO_REUSEADDR, 1},
	}
	if err = setOptions(fd, options[:]); err != nil {
		unix.Close(fd)
		return -1, err
	}
	if d.mark != 0 { // else it goes where the namespace's routes lead
		staysLocal(fd)
	}
	return fd, nil
}

// staysLocal says of a socket that connects or listens that the connection does
// not leave the machine. Accepted sockets inherit it.
func staysLocal(fd int) {
	// Without, it is only slower.
	_ = unix.SetsockoptString(fd, unix.IPPROTO_TCP, unix.TCP_CONGESTION, netnsutil.LocalCongestion)
}

// connectPlain begins to connect an ordinary socket of the thread's namespace, the
// container's, to an address there.
func connectPlain(dst netip.AddrPort) (fd int, err error) {
	if fd, err = openTCP(dst.Addr().Is4()); err != nil {
		return -1, err
	}
	staysLocal(fd)
	if err = beginConnect(fd, dst); err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// openTCP makes an ordinary socket of the thread's namespace.
func openTCP(is4 bool) (fd int, err error) {
	family := unix.AF_INET6
	if is4 {
		family = unix.AF_INET
	}
	if fd, err = unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP); err != nil {
		return -1, os.NewSyscallError("socket", err)
	}
	if err = setOptions(fd, []option{{unix.IPPROTO_TCP, unix.TCP_NODELAY, 1}}); err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// beginConnect is connect(2) of a non-blocking socket.
func beginConnect(fd int, dst netip.AddrPort) error {
	if err := unix.Connect(fd, toSockaddr(dst)); err != nil && err != unix.EINPROGRESS {
		return os.NewSyscallError("connect", err)
	}
	return nil
}

// connectError returns what a connect(2) under way has come to, when the socket
// is writable or has an error: nil is success.
func connectError(fd int) error {
	errno, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR)
	if err != nil {
		return os.NewSyscallError("getsockopt", err)
	}
	if errno != 0 {
		return os.NewSyscallError("connect", unix.Errno(errno))
	}
	return nil
}

// awaitConn waits for a connect(2) under way, and makes a connection of the
// socket, which it owns.
func awaitConn(ctx context.Context, fd int) (*net.TCPConn, error) {
	file := os.NewFile(uintptr(fd), "tcp")
	defer file.Close() // net.FileConn duplicates
	if err := awaitConnect(ctx, file); err != nil {
		return nil, os.NewSyscallError("connect", err)
	}
	c, err := net.FileConn(file)
	if err != nil {
		return nil, err
	}
	return c.(*net.TCPConn), nil
}
