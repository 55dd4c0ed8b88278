package forward

import (
	"cmp"
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"time"

	"github.com/gofwd/gofwd/netnsutil"
	"golang.org/x/sys/unix"
)

// localDialer connects by ordinary sockets of a network namespace: the way to
// its loopback, which no packet from outside may have as source or destination
// (RFC 1122 3.2.1.3, RFC 4291 2.5.3).
type localDialer struct{ ns *netnsutil.NS }

// DialTCP connects to dst in the namespace. The server sees the address that
// the kernel chooses, for a loopback dst the loopback; src is not used.
//
// The socket alone is made on a thread in the namespace: connect(2) acts in the
// socket's, and may take its time.
func (d localDialer) DialTCP(ctx context.Context, _, dst netip.AddrPort) (flowConn, error) {
	c, err := d.dial(ctx, dst)
	if err != nil {
		return nil, &net.OpError{Op: "dial", Net: "tcp", Addr: net.TCPAddrFromAddrPort(dst), Err: err}
	}
	return c, nil
}

func (d localDialer) dial(ctx context.Context, dst netip.AddrPort) (*net.TCPConn, error) {
	var fd int
	err := d.ns.Do(func() (err error) {
		fd, err = d.connect(netip.AddrPort{}, dst)
		return err
	})
	if err != nil {
		return nil, err
	}
	return awaitConn(ctx, fd)
}

// connect begins to connect a socket, on a thread in the namespace.
func (localDialer) connect(_, dst netip.AddrPort) (fd int, err error) { return connectPlain(dst) }

// awaitConnect waits until the connect(2) under way on a socket has ended.
func awaitConnect(ctx context.Context, file *os.File) error {
	raw, err := file.SyscallConn()
	if err != nil {
		return err
	}
	defer context.AfterFunc(ctx, func() { _ = file.SetDeadline(time.Unix(1, 0)) })()
	var connectErr error
	err = raw.Write(func(fd uintptr) bool {
		errno, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ERROR)
		if err != nil || errno != 0 {
			connectErr = cmp.Or[error](err, unix.Errno(errno))
			return true
		}
		// No error may also mean no answer yet: the poller can wake us for
		// nothing (golang.org/issue/14548).
		_, err = unix.Getpeername(int(fd))
		return err == nil
	})
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case err != nil:
		return err
	}
	return connectErr
}

// listenUDP is udpConfig.Inside: for a dst on the loopback it returns a socket of
// the namespace, bound to src if that is on the loopback, too, and its port is
// free. Every other dst is reached by the tap.
func (d localDialer) listenUDP(src, dst netip.AddrPort) (c *net.UDPConn, err error) {
	if !dst.Addr().IsLoopback() {
		return nil, nil
	}
	if !src.Addr().IsLoopback() {
		src = netip.AddrPortFrom(dst.Addr(), 0)
	}
	err = d.ns.Do(func() error {
		c, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(src))
		if errors.Is(err, unix.EADDRINUSE) {
			c, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(src.Addr(), 0)))
		}
		return err
	})
	return c, err
}
