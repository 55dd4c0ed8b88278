package forward

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// adopt returns listeners on the socket that r names. They are descriptors of
// their own. After an error those that it returns are to be closed.
func (b *binder) adopt(r Rule) (bound []*boundListener, err error) {
	kind, name, _ := strings.Cut(r.Socket, ":")
	if kind == "unix" {
		l, err := listenUnix(name)
		if err != nil {
			return nil, plainErr(err)
		}
		return []*boundListener{{rule: r, unix: l}}, nil
	}
	var other error
	for _, s := range b.sockets {
		if s.Name != name {
			continue
		}
		l, err := adoptSocket(r, s.File)
		switch {
		case err != nil:
			return bound, err
		case l == nil:
			other = fmt.Errorf("the socket is not one for %s", r.Proto)
		default:
			bound = append(bound, l)
		}
	}
	if len(bound) > 0 {
		return bound, nil
	}
	if other != nil {
		return nil, other
	}
	switch {
	case len(b.sockets) > 0:
	case kind == "systemd":
		return nil, errors.New("no socket was passed: systemd passes those of a .socket unit, and none with --detach")
	default:
		return nil, errors.New("no socket was passed")
	}
	return nil, fmt.Errorf("no socket of that name was passed, only %s", b.socketNames())
}

func (b *binder) socketNames() string {
	var names []string
	for _, s := range b.sockets {
		names = append(names, fmt.Sprintf("%q", s.Name))
	}
	return strings.Join(names, ", ")
}

// listenUnix makes a UNIX socket at path. One that nobody listens on is replaced.
func listenUnix(path string) (*net.UnixListener, error) {
	addr := &net.UnixAddr{Name: path, Net: "unix"}
	l, err := net.ListenUnix("unix", addr)
	if !errors.Is(err, unix.EADDRINUSE) {
		return l, err
	}
	// Only a socket refuses connections; a file of another type stays.
	c, dialErr := net.DialUnix("unix", nil, addr)
	if dialErr == nil {
		c.Close()
		return nil, err
	}
	info, statErr := os.Lstat(path)
	if !errors.Is(dialErr, unix.ECONNREFUSED) || statErr != nil || info.Mode().Type() != fs.ModeSocket {
		return nil, err
	}
	if err := os.Remove(path); err != nil {
		return nil, err
	}
	return net.ListenUnix("unix", addr)
}

// adoptSocket returns a listener that is a duplicate of file; nil if that is of
// another protocol than r.
func adoptSocket(r Rule, file *os.File) (*boundListener, error) {
	kind, err := socketKind(file)
	if err != nil {
		return nil, err
	}
	if kind.udp != (r.Proto == UDP) {
		return nil, nil
	}
	l := &boundListener{rule: r}
	if kind.udp {
		c, err := net.FilePacketConn(file)
		if err != nil {
			return nil, plainErr(err)
		}
		l.udp = c.(*net.UDPConn)
		if err := controlFD(l.udp, func(fd int) error { return prepareUDP(fd, udpListener) }); err != nil {
			l.udp.Close()
			return nil, err
		}
		l.address = l.addr()
		return l, nil
	}
	ln, err := net.FileListener(file)
	if err != nil {
		return nil, plainErr(err)
	}
	switch ln := ln.(type) {
	case *net.UnixListener:
		ln.SetUnlinkOnClose(false) // whoever made it knows how long it lives
		l.unix = ln
		return l, nil
	case *net.TCPListener:
		l.tcp = ln
		l.address = l.addr()
		err := controlFD(ln, func(fd int) error {
			if l.address.Addr().IsLoopback() {
				staysLocal(fd)
			}
			return prepareTCP(fd)
		})
		if err != nil {
			ln.Close()
			return nil, err
		}
		return l, nil
	}
	ln.Close()
	return nil, errors.New("the socket is neither of TCP nor a UNIX socket")
}

// kindOfSocket is what a descriptor turned out to be.
type kindOfSocket struct{ udp bool }

// socketKind checks that file is a socket that can be a listener.
func socketKind(file *os.File) (k kindOfSocket, err error) {
	raw, err := file.SyscallConn()
	if err != nil {
		return k, err
	}
	controlErr := raw.Control(func(f uintptr) {
		fd := int(f)
		var kind, domain, listens int
		for _, o := range []struct {
			name  int
			value *int
		}{{unix.SO_TYPE, &kind}, {unix.SO_DOMAIN, &domain}, {unix.SO_ACCEPTCONN, &listens}} {
			if *o.value, err = unix.GetsockoptInt(fd, unix.SOL_SOCKET, o.name); err != nil {
				err = errors.New("the descriptor is not a socket")
				return
			}
		}
		inet := domain == unix.AF_INET || domain == unix.AF_INET6
		switch {
		case kind == unix.SOCK_STREAM && (inet || domain == unix.AF_UNIX):
			if listens == 0 {
				err = errors.New("the socket does not listen")
			}
		case kind == unix.SOCK_DGRAM && inet:
			k.udp = true
			err = checkUDPBound(fd)
		default:
			err = errors.New("the socket is none of TCP, UDP and UNIX stream")
		}
	})
	return k, cmp.Or(controlErr, err)
}

// checkUDPBound refuses UDP sockets that are not bound, or that are connected.
func checkUDPBound(fd int) error {
	if _, err := unix.Getpeername(fd); err == nil {
		return errors.New("the UDP socket is connected")
	}
	sa, err := unix.Getsockname(fd)
	if err != nil {
		return os.NewSyscallError("getsockname", err)
	}
	var port int
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		port = sa.Port
	case *unix.SockaddrInet6:
		port = sa.Port
	}
	if port == 0 {
		return errors.New("the UDP socket is not bound")
	}
	return nil
}

// controlFD calls fn with the descriptor of c.
func controlFD(c syscall.Conn, fn func(fd int) error) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var fnErr error
	if err := raw.Control(func(fd uintptr) { fnErr = fn(int(fd)) }); err != nil {
		return err
	}
	return fnErr
}
