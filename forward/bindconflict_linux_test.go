package forward

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// Kernel: a socket of ours in the namespace has a foreign address, and yet a local
// port that is that of the container, too (inet_csk_bind_conflict in
// net/ipv4/inet_connection_sock.c): that of the client, or that which the
// container has called. A server with SO_REUSEADDR may have the port all the
// same, or one at an address of its own; one on the wildcard address without it may
// not, while the connection lasts, or its TIME_WAIT.
func TestContainerBindsAPortOfOurSockets(t *testing.T) {
	remote := newLAN(t)
	ns := newNS(t)
	inside, outside := echoServer(t, ns), echoServer(t, remote)
	start(t, Config{NetNS: ns, Datapath: Kernel, Rules: publishTCP(8080, inside)})
	bind := func(addr netip.Addr, port uint16, reuse int) (err error) {
		family := unix.AF_INET6
		if addr.Is4() {
			family = unix.AF_INET
		}
		within(t, ns, func() {
			fd, e := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
			require.NoError(t, e)
			defer unix.Close(fd)
			require.NoError(t, unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, reuse))
			if err = unix.Bind(fd, toSockaddr(netip.AddrPortFrom(addr, port))); err == nil {
				err = unix.Listen(fd, 1)
			}
		})
		return err
	}
	for _, tt := range []struct {
		name      string
		own       netip.Addr
		addr, dst string // of the remote host, of this one
	}{
		{"IPv4", addr("10.0.2.100"), remote4, host4},
		{"IPv6", addr("fd67:6f66:7764::100"), remote6, host6},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var in, out net.Conn
			within(t, remote, func() {
				var err error
				in, err = net.Dial("tcp", net.JoinHostPort(tt.dst, "8080"))
				require.NoError(t, err)
			})
			within(t, ns, func() {
				var err error
				out, err = net.Dial("tcp", at(tt.addr, outside))
				require.NoError(t, err)
			})
			wildcard := netip.IPv6Unspecified()
			if tt.own.Is4() {
				wildcard = netip.IPv4Unspecified()
			}
			client := in.LocalAddr().(*net.TCPAddr).AddrPort().Port()
			for _, c := range []net.Conn{in, out} {
				_, err := fmt.Fprint(c, "x")
				require.NoError(t, err)
				_, err = io.ReadFull(c, make([]byte, 1))
				require.NoError(t, err)
			}
			for _, port := range []uint16{client, outside} {
				require.NoError(t, bind(wildcard, port, 1))
				require.ErrorIs(t, bind(wildcard, port, 0), unix.EADDRINUSE)
				require.NoError(t, bind(tt.own, port, 0))
			}
			in.Close()
			out.Close()
		})
	}
}

// The ports from which the container's connections come are not used up by its
// clients, who come from the same range.
func TestContainerConnectsFromAClientsPort(t *testing.T) {
	remote := newLAN(t)
	ns := newNS(t)
	inside, outside := echoServer(t, ns), echoServer(t, remote)
	const first, last = 40000, 40009
	within(t, ns, func() {
		require.NoError(t, os.WriteFile("/proc/sys/net/ipv4/ip_local_port_range", []byte(fmt.Sprint(first, last)), 0))
	})
	start(t, Config{NetNS: ns, Datapath: Kernel, Rules: publishTCP(8080, inside)})
	echo := func(c net.Conn) error {
		if _, err := fmt.Fprint(c, "x"); err != nil {
			return err
		}
		_, err := io.ReadFull(c, make([]byte, 1))
		return err
	}
	for _, tt := range []struct{ name, remote, host string }{{"IPv4", remote4, host4}, {"IPv6", remote6, host6}} {
		t.Run(tt.name, func(t *testing.T) {
			served := 0
			for port := first; port <= last; port++ {
				within(t, remote, func() {
					d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(tt.remote), Port: port}}
					in, err := d.Dial("tcp", net.JoinHostPort(tt.host, "8080"))
					if err != nil {
						return // reset: a listener of ours has the port, and no other is left
					}
					t.Cleanup(func() { in.Close() })
					if echo(in) == nil {
						served++
					}
				})
			}
			require.Greater(t, served, 5)
			var out net.Conn
			within(t, ns, func() {
				var err error
				out, err = net.Dial("tcp", at(tt.remote, outside))
				require.NoError(t, err)
			})
			defer out.Close()
			require.NoError(t, echo(out))
		})
	}
}
