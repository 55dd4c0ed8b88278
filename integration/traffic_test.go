package integration

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// serveWho starts servers that tell each client as whom they see it: TCP and UDP,
// on the given addresses.
func (n *node) serveWho(t *testing.T, port uint16, addrs ...netip.Addr) {
	t.Helper()
	for _, a := range addrs {
		go whoTCP(n.listenTCP(t, a, port))
		go whoUDP(n.listenUDP(t, a, port))
	}
}

func whoTCP(l *net.TCPListener) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		fmt.Fprintln(c, addrPort(c.RemoteAddr()))
		c.Close()
	}
}

// whoUDP answers "SOURCE PAYLOAD".
func whoUDP(c *net.UDPConn) {
	buf := make([]byte, 1<<16)
	for {
		n, from, err := c.ReadFromUDPAddrPort(buf)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			continue // ECONNREFUSED of an earlier answer
		}
		from = netip.AddrPortFrom(from.Addr().Unmap(), from.Port())
		c.WriteToUDPAddrPort(fmt.Appendf(nil, "%s %s", from, buf[:n]), from)
	}
}

// seen is what a serveWho server said, and who we really were.
type seen struct {
	by, local netip.AddrPort
}

// who asks a serveWho server, over "tcp" or "udp".
func (n *node) who(t *testing.T, proto string, src netip.Addr, dst netip.AddrPort) (seen, error) {
	t.Helper()
	if proto == "udp" {
		return n.whoUDP(t, src, dst)
	}
	c, err := n.tryTCP(src, dst, patience)
	if err != nil {
		return seen{}, err
	}
	defer c.Close()
	c.SetReadDeadline(time.Now().Add(patience))
	line, err := bufio.NewReader(c).ReadString('\n')
	if err != nil {
		return seen{}, err
	}
	by, err := netip.ParseAddrPort(line[:len(line)-1])
	return seen{by, addrPort(c.LocalAddr())}, err
}

func (n *node) whoUDP(t *testing.T, src netip.Addr, dst netip.AddrPort) (seen, error) {
	t.Helper()
	c := n.dialUDP(t, src, dst)
	defer c.Close()
	buf := make([]byte, 1<<16)
	// A datagram may get lost while neighbours are being resolved.
	for range 5 {
		if _, err := c.Write([]byte("who")); err != nil {
			return seen{}, err
		}
		c.SetReadDeadline(time.Now().Add(2 * time.Second))
		k, err := c.Read(buf)
		if errors.Is(err, unix.ETIMEDOUT) || isTimeout(err) {
			continue
		}
		if err != nil {
			return seen{}, err
		}
		source, _, _ := bytes.Cut(buf[:k], []byte(" "))
		by, err := netip.ParseAddrPort(string(source))
		return seen{by, addrPort(c.LocalAddr())}, err
	}
	return seen{}, fmt.Errorf("no answer from %s: %w", dst, unix.ETIMEDOUT)
}

func isTimeout(err error) bool {
	var e net.Error
	return errors.As(err, &e) && e.Timeout()
}

// acceptOne returns the next connection of a listener, as long as the test runs.
func acceptOne(t *testing.T, l *net.TCPListener) *net.TCPConn {
	t.Helper()
	l.SetDeadline(time.Now().Add(patience))
	c, err := l.AcceptTCP()
	require.NoError(t, err)
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(2 * patience))
	return c
}

// pair connects a client through gofwd to a listener, and returns both ends.
func pair(t *testing.T, from *node, dst netip.AddrPort, l *net.TCPListener) (client, server *net.TCPConn) {
	t.Helper()
	client = from.dialTCP(t, netip.Addr{}, dst)
	return client, acceptOne(t, l)
}

// noise is size bytes that do not compress, reproducible from seed.
func noise(seed uint64, size int) []byte {
	b := make([]byte, size)
	rand.NewChaCha8(sha256.Sum256(fmt.Append(nil, seed))).Read(b)
	return b
}

// requireTransfer sends b one way and checks what arrives, to the end of the
// stream.
func requireTransfer(t *testing.T, from, to *net.TCPConn, b []byte) {
	t.Helper()
	sent := make(chan error, 1)
	go sendAll(from, b, sent)
	got, err := io.ReadAll(to)
	require.NoError(t, err)
	require.NoError(t, <-sent)
	require.Len(t, got, len(b))
	require.True(t, bytes.Equal(b, got), "the bytes differ")
}

func sendAll(c *net.TCPConn, b []byte, sent chan<- error) {
	_, err := c.Write(b)
	sent <- errors.Join(err, c.CloseWrite())
}

// requireEcho sends a few bytes one way and waits for them.
func requireEcho(t *testing.T, from, to *net.TCPConn) {
	t.Helper()
	word := []byte("still here")
	_, err := from.Write(word)
	require.NoError(t, err)
	got := make([]byte, len(word))
	_, err = io.ReadFull(to, got)
	require.NoError(t, err)
	require.Equal(t, word, got)
}

// requireEOF waits for the FIN of the other side.
func requireEOF(t *testing.T, c *net.TCPConn) {
	t.Helper()
	n, err := c.Read(make([]byte, 1))
	require.Zero(t, n)
	require.ErrorIs(t, err, io.EOF)
}

// requireReset waits for the RST of the other side.
func requireReset(t *testing.T, c *net.TCPConn) {
	t.Helper()
	_, err := io.Copy(io.Discard, c)
	require.ErrorIs(t, err, unix.ECONNRESET)
}

// burst opens count connections at once, without waiting for any of them, and
// returns them when all have been answered. One thread does it all.
func (n *node) burst(t *testing.T, dst netip.AddrPort, count int) []int {
	t.Helper()
	family, sa := unix.AF_INET, unix.Sockaddr(&unix.SockaddrInet4{Port: int(dst.Port()), Addr: as4(dst.Addr())})
	if dst.Addr().Is6() {
		family, sa = unix.AF_INET6, &unix.SockaddrInet6{Port: int(dst.Port()), Addr: dst.Addr().As16()}
	}
	fds := make([]int, 0, count)
	t.Cleanup(func() {
		for _, fd := range fds {
			unix.Close(fd)
		}
	})
	err := n.ns.Do(func() error {
		for range count {
			fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				return err
			}
			fds = append(fds, fd)
			if err := unix.Connect(fd, sa); err != nil && !errors.Is(err, unix.EINPROGRESS) {
				return err
			}
		}
		return nil
	})
	require.NoError(t, err)
	deadline := time.Now().Add(2 * patience)
	for i, fd := range fds {
		pfd := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}
		for {
			k, err := unix.Poll(pfd, int(time.Until(deadline).Milliseconds()))
			if errors.Is(err, unix.EINTR) {
				continue
			}
			require.NoError(t, err)
			require.Equal(t, 1, k, "connection %d of %d is not answered", i, count)
			break
		}
		soerr, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR)
		require.NoError(t, err)
		require.Zero(t, soerr, "connection %d of %d: %s", i, count, unix.Errno(soerr))
	}
	return fds
}

func as4(a netip.Addr) [4]byte {
	if a.Is4() {
		return a.As4()
	}
	return [4]byte{}
}
