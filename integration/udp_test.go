package integration

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// TestUDPManyFlows: hundreds of clients of one port; each gets the answers to its
// own datagrams, twice.
func TestUDPManyFlows(t *testing.T) {
	t.Parallel()
	tp := newTopo(t)
	tp.attach(t, "-p", "5300:53/udp")
	tp.ctr.serveWho(t, 53, ipv4.any, ipv6.any)
	eachFamily(t, func(t *testing.T, f family) {
		var conns []*net.UDPConn
		for range 500 {
			conns = append(conns, tp.client.dialUDP(t, f.client, netip.AddrPortFrom(f.host, 5300)))
		}
		for round := range 2 {
			for i, c := range conns {
				requireAnswer(t, c, fmt.Sprintf("round %d client %d", round, i))
			}
		}
	})
}

// requireAnswer asks a serveWho server until it answers this very question. A
// datagram may get lost while neighbours are being resolved.
func requireAnswer(t *testing.T, c *net.UDPConn, question string) {
	t.Helper()
	buf := make([]byte, 1<<16)
	want := fmt.Sprintf("%s %s", addrPort(c.LocalAddr()), question)
	for range 10 {
		_, err := c.Write([]byte(question))
		require.NoError(t, err)
		c.SetReadDeadline(time.Now().Add(time.Second))
		n, err := c.Read(buf)
		if isTimeout(err) {
			continue
		}
		require.NoError(t, err)
		if got := string(buf[:n]); got != want {
			require.True(t, strings.HasPrefix(got, addrPort(c.LocalAddr()).String()+" "), "%q is not for %s", got, want)
			continue // an answer to an earlier attempt
		}
		return
	}
	require.Fail(t, "no answer", "%s", question)
}

// TestUDPReplySource: on a host with several addresses the answer comes from the
// one that was asked. The clients' sockets are connected, so they receive
// nothing else; one of them asks all addresses from one port.
func TestUDPReplySource(t *testing.T) {
	t.Parallel()
	tp := newTopo(t)
	tp.attach(t, "-p", "5300:53/udp")
	tp.ctr.serveWho(t, 53, ipv4.any, ipv6.any)
	eachFamily(t, func(t *testing.T, f family) {
		hosts := []netip.Addr{f.host, f.host2, f.hostEth1}
		for _, dst := range hosts {
			requireAnswer(t, tp.client.dialUDP(t, f.client, netip.AddrPortFrom(dst, 5300)), "connected to "+dst.String())
		}
		c := tp.client.listenUDP(t, f.client, 0)
		buf := make([]byte, 512)
		for _, dst := range append(hosts, hosts...) {
			_, err := c.WriteToUDPAddrPort([]byte("who"), netip.AddrPortFrom(dst, 5300))
			require.NoError(t, err)
			c.SetReadDeadline(time.Now().Add(patience))
			n, from, err := c.ReadFromUDPAddrPort(buf)
			require.NoError(t, err, "asked %s", dst)
			require.Equal(t, netip.AddrPortFrom(dst, 5300), from)
			require.Equal(t, fmt.Sprintf("%s who", addrPort(c.LocalAddr())), string(buf[:n]))
		}
	})
}

// TestUDPSizes: datagrams from nothing to the largest there is, those that IP has
// to fragment included, in and out.
func TestUDPSizes(t *testing.T) {
	t.Parallel()
	tp := newTopo(t)
	tp.attach(t, "-p", "5300:53/udp")
	eachFamily(t, func(t *testing.T, f family) {
		go echoUDP(tp.ctr.listenUDP(t, f.any, 53))
		go echoUDP(tp.client.listenUDP(t, f.client, 54))
		largest := 65507 // 65535 less the IPv4 and UDP headers
		if f.name == ipv6.name {
			largest = 65527
		}
		for _, c := range []struct {
			name string
			from *node
			dst  netip.AddrPort
		}{
			{"inbound", tp.client, netip.AddrPortFrom(f.host, 5300)},
			{"outbound", tp.ctr, netip.AddrPortFrom(f.client, 54)},
		} {
			for _, size := range []int{0, 1, 1452, 1472, 1473, 4000, 16384, largest} {
				conn := c.from.dialUDP(t, netip.Addr{}, c.dst)
				requireUDPEcho(t, conn, noise(uint64(size), size), c.name)
			}
		}
	})
}

func echoUDP(c *net.UDPConn) {
	buf := make([]byte, 1<<16)
	for {
		n, from, err := c.ReadFromUDPAddrPort(buf)
		if err != nil {
			return
		}
		c.WriteToUDPAddrPort(buf[:n], from)
	}
}

func requireUDPEcho(t *testing.T, c *net.UDPConn, datagram []byte, what string) {
	t.Helper()
	buf := make([]byte, 1<<16)
	for range 5 {
		_, err := c.Write(datagram)
		n := 0
		if err == nil {
			c.SetReadDeadline(time.Now().Add(2 * time.Second))
			n, err = c.Read(buf)
		}
		// EMSGSIZE: the kernel has just learnt the path's MTU (ip(7)).
		if isTimeout(err) || errors.Is(err, unix.EMSGSIZE) {
			continue
		}
		require.NoError(t, err)
		require.True(t, bytes.Equal(datagram, buf[:n]), "%s: %d bytes are not the %d that were sent", what, n, len(datagram))
		return
	}
	require.Fail(t, "no answer", "%s: %d bytes", what, len(datagram))
}

// TestSocatUDP is a UDP exchange between two real socats, in and out.
func TestSocatUDP(t *testing.T) {
	t.Parallel()
	need(t, "socat")
	tp := newTopo(t)
	tp.attach(t, "-p", "5300:53/udp")
	eachFamily(t, func(t *testing.T, f family) {
		for _, c := range []struct {
			from, to    *node
			listen, dst netip.AddrPort
		}{
			{tp.client, tp.ctr, netip.AddrPortFrom(f.any, 53), netip.AddrPortFrom(f.host, 5300)},
			// socat answers from any of the client's addresses unless bound to one.
			{tp.ctr, tp.client, netip.AddrPortFrom(f.client, 54), netip.AddrPortFrom(f.client, 54)},
		} {
			v := strings.TrimPrefix(f.flag, "-")
			bind := c.listen.Addr().String()
			if f.name == ipv6.name {
				bind = "[" + bind + "]"
			}
			server := c.to.start(t, "socat", fmt.Sprintf("UDP%s-RECVFROM:%d,bind=%s,fork", v, c.listen.Port(), bind), "EXEC:cat")
			c.to.waitPort(t, "udp", c.listen.Port())
			cmd := exec.Command("socat", "-t2", "-", fmt.Sprintf("UDP%s:%s", v, c.dst))
			cmd.Stdin = strings.NewReader("through socat\n")
			r := c.from.runCmd(t, cmd)
			require.Equal(t, "through socat\n", r.stdout, "%s", r.stderr)
			server.stop()
		}
	})
}

// TestUDPManyOutbound: hundreds of sockets of the container ask the same server,
// one after the other and then all again.
func TestUDPManyOutbound(t *testing.T) {
	t.Parallel()
	tp := newTopo(t)
	tp.attach(t)
	tp.client.serveWho(t, 7000, ipv4.client, ipv6.client)
	eachFamily(t, func(t *testing.T, f family) {
		var conns []*net.UDPConn
		for range 300 {
			c := tp.ctr.dialUDP(t, netip.Addr{}, netip.AddrPortFrom(f.client, 7000))
			c.SetDeadline(time.Now().Add(2 * patience))
			conns = append(conns, c)
		}
		for round := range 2 {
			for i, c := range conns {
				question := fmt.Sprintf("round %d socket %d", round, i)
				_, err := c.Write([]byte(question))
				require.NoError(t, err)
				buf := make([]byte, 512)
				n, err := c.Read(buf)
				require.NoError(t, err, "%s", question)
				_, answer, _ := strings.Cut(string(buf[:n]), " ")
				require.Equal(t, question, answer)
			}
		}
	})
}
