package forward

import (
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// sockopt reads a socket option of l, or of a connection that it accepted.
func sockopt(t *testing.T, c syscall.Conn, level, name int) (value int) {
	t.Helper()
	control(t, c, func(fd int) (err error) {
		value, err = unix.GetsockoptInt(fd, level, name)
		return err
	})
	return value
}

func control(t *testing.T, c syscall.Conn, fn func(fd int) error) {
	t.Helper()
	raw, err := c.SyscallConn()
	require.NoError(t, err)
	require.NoError(t, raw.Control(func(fd uintptr) { err = fn(int(fd)) }))
	require.NoError(t, err)
}

func TestListenerOptions(t *testing.T) {
	l := bind(t, &binder{}, "80")[0].listeners[0]
	require.Equal(t, 1, sockopt(t, l.tcp, unix.SOL_SOCKET, unix.SO_REUSEADDR))
	require.Equal(t, unix.IPPROTO_TCP, sockopt(t, l.tcp, unix.SOL_SOCKET, unix.SO_PROTOCOL), "not MPTCP")

	// Of a listener, tcpi_sacked is the backlog (tcp_get_info in net/ipv4/tcp.c).
	var backlog uint32
	control(t, l.tcp, func(fd int) error {
		info, err := unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO)
		if err == nil {
			backlog = info.Sacked
		}
		return err
	})
	somaxconn, err := os.ReadFile("/proc/sys/net/core/somaxconn")
	require.NoError(t, err)
	require.Equal(t, strings.TrimSpace(string(somaxconn)), strconv.Itoa(int(backlog)))
}

// Kernel: accepted sockets inherit keepalive and its times from the listener, and
// package net leaves them alone.
func TestAcceptedInheritKeepAlive(t *testing.T) {
	l := bind(t, &binder{}, "80")[0].listeners[0]
	c, err := net.Dial("tcp", netip.AddrPortFrom(loopbackOf(true), l.addr().Port()).String())
	require.NoError(t, err)
	defer c.Close()
	in, err := l.tcp.AcceptTCP()
	require.NoError(t, err)
	defer in.Close()
	require.Equal(t, 1, sockopt(t, in, unix.SOL_SOCKET, unix.SO_KEEPALIVE))
	require.Equal(t, int(keepAlive.Idle.Seconds()), sockopt(t, in, unix.IPPROTO_TCP, unix.TCP_KEEPIDLE))
	require.Equal(t, int(keepAlive.Interval.Seconds()), sockopt(t, in, unix.IPPROTO_TCP, unix.TCP_KEEPINTVL))
	require.Equal(t, keepAlive.Count, sockopt(t, in, unix.IPPROTO_TCP, unix.TCP_KEEPCNT))
}

func TestUDPOptions(t *testing.T) {
	rmem, err := os.ReadFile("/proc/sys/net/core/rmem_max")
	if os.IsNotExist(err) { // older kernels show it in the first network namespace only; this is its default
		rmem, err = []byte("212992"), nil
	}
	require.NoError(t, err)
	limit, err := strconv.Atoi(strings.TrimSpace(string(rmem)))
	require.NoError(t, err)
	for _, text := range []string{"80/udp", "0.0.0.0::80/udp", "[::]::80/udp"} {
		l := bind(t, &binder{}, text)[0].listeners[0]
		require.Equal(t, 1, sockopt(t, l.udp, unix.IPPROTO_UDP, unix.UDP_GRO))
		require.Zero(t, sockopt(t, l.udp, unix.SOL_SOCKET, unix.SO_REUSEADDR))
		require.Equal(t, 1, sockopt(t, l.udp, unix.IPPROTO_IP, unix.IP_RECVERR))
		// socket(7): the kernel doubles what is asked for.
		require.GreaterOrEqual(t, sockopt(t, l.udp, unix.SOL_SOCKET, unix.SO_RCVBUF), 2*min(limit, udpBuffer))
		if l.addr().Addr().Is4() {
			require.Equal(t, 1, sockopt(t, l.udp, unix.IPPROTO_IP, unix.IP_PKTINFO))
		} else {
			require.Equal(t, 1, sockopt(t, l.udp, unix.IPPROTO_IPV6, unix.IPV6_RECVPKTINFO))
			require.Equal(t, 1, sockopt(t, l.udp, unix.IPPROTO_IPV6, unix.IPV6_RECVERR))
		}
	}
}

// Kernel: on a dual-stack socket IPV6_PKTINFO tells which IPv4 address a datagram
// was sent to, and sent back makes the answer leave from there (ip_cmsg_send).
func TestDualStackPacketInfo(t *testing.T) {
	l := bind(t, &binder{}, "80/udp")[0].listeners[0]
	for _, dst := range []string{"127.0.0.1", "127.0.0.2", "::1"} {
		to := netip.AddrPortFrom(addr(dst), l.addr().Port())
		c, err := net.Dial("udp", to.String())
		require.NoError(t, err)
		defer c.Close()
		_, err = c.Write([]byte("ping"))
		require.NoError(t, err)

		buf, oob := make([]byte, 100), make([]byte, 200)
		n, oobn, _, from, err := l.udp.ReadMsgUDPAddrPort(buf, oob)
		require.NoError(t, err)
		require.Equal(t, "ping", string(buf[:n]))
		var info []byte
		messages, err := unix.ParseSocketControlMessage(oob[:oobn])
		require.NoError(t, err)
		for _, m := range messages {
			if m.Header.Level == unix.IPPROTO_IPV6 && m.Header.Type == unix.IPV6_PKTINFO {
				info = m.Data
			}
		}
		require.Len(t, info, unix.SizeofInet6Pktinfo)
		got, _ := netip.AddrFromSlice(info[:16])
		require.Equal(t, addr(dst), got.Unmap())

		_, _, err = l.udp.WriteMsgUDPAddrPort([]byte("pong"), oob[:oobn], from)
		require.NoError(t, err)
		c.SetReadDeadline(time.Now().Add(time.Second))
		n, err = c.Read(buf) // the client takes answers only from where it sent to
		require.NoError(t, err, dst)
		require.Equal(t, "pong", string(buf[:n]))
	}
}

// Kernel: errors of either family reach a dual-stack socket's error queue.
func TestDualStackErrorQueue(t *testing.T) {
	l := bind(t, &binder{}, "80/udp")[0].listeners[0]
	for _, dst := range []netip.Addr{loopbackOf(true), loopbackOf(false)} {
		closed := netip.AddrPortFrom(dst, 1)
		_, err := l.udp.WriteToUDPAddrPort([]byte("ping"), closed)
		require.NoError(t, err)
		control(t, l.udp, func(fd int) error {
			oob := make([]byte, 200)
			_, oobn, flags, _, err := unix.Recvmsg(fd, make([]byte, 100), oob, unix.MSG_ERRQUEUE|unix.MSG_DONTWAIT)
			require.NoError(t, err, dst)
			require.NotZero(t, flags&unix.MSG_ERRQUEUE)
			messages, err := unix.ParseSocketControlMessage(oob[:oobn])
			require.NoError(t, err)
			for _, m := range messages {
				if m.Header.Type == unix.IP_RECVERR || m.Header.Type == unix.IPV6_RECVERR {
					require.EqualValues(t, unix.ECONNREFUSED, m.Data[0]) // ee_errno, little endian
					return nil
				}
			}
			t.Errorf("no sock_extended_err from %s in %v", dst, messages)
			return nil
		})
		sockopt(t, l.udp, unix.SOL_SOCKET, unix.SO_ERROR) // takes the error from the next call (udp(7))
	}
}
