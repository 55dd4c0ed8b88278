package integration

import (
	"fmt"
	"net"
	"net/netip"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// Groups of mDNS and of SSDP.
var (
	mdns4, mdns6 = addr("224.0.0.251"), addr("ff02::fb")
	ssdp4, ssdp6 = addr("239.255.255.250"), addr("ff02::c")
)

// member is a UDP socket in the namespace that has joined a group on an interface,
// and sends to it there. Others may have the port.
func (n *node) member(t *testing.T, group netip.Addr, port uint16, ifname string) *net.UDPConn {
	t.Helper()
	lc := net.ListenConfig{Control: reuseAddr}
	var c *net.UDPConn
	n.bind(t, func() error {
		pc, err := lc.ListenPacket(t.Context(), "udp"+network(group), fmt.Sprintf(":%d", port))
		if err != nil {
			return err
		}
		c = pc.(*net.UDPConn)
		ifi, err := net.InterfaceByName(ifname)
		require.NoError(t, err)
		onFD(t, c, func(fd int) error {
			if group.Is4() {
				mreq := &unix.IPMreqn{Multiaddr: group.As4(), Ifindex: int32(ifi.Index)}
				require.NoError(t, unix.SetsockoptIPMreqn(fd, unix.SOL_IP, unix.IP_MULTICAST_IF, mreq))
				return unix.SetsockoptIPMreqn(fd, unix.SOL_IP, unix.IP_ADD_MEMBERSHIP, mreq)
			}
			require.NoError(t, unix.SetsockoptInt(fd, unix.SOL_IPV6, unix.IPV6_MULTICAST_IF, ifi.Index))
			return unix.SetsockoptIPv6Mreq(fd, unix.SOL_IPV6, unix.IPV6_JOIN_GROUP,
				&unix.IPv6Mreq{Multiaddr: group.As16(), Interface: uint32(ifi.Index)})
		})
		return nil
	})
	t.Cleanup(func() { c.Close() })
	return c
}

func reuseAddr(_, _ string, raw syscall.RawConn) (err error) {
	_ = raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1) })
	return err
}

func onFD(t *testing.T, c *net.UDPConn, fn func(fd int) error) {
	t.Helper()
	raw, err := c.SyscallConn()
	require.NoError(t, err)
	var fnErr error
	require.NoError(t, raw.Control(func(fd uintptr) { fnErr = fn(int(fd)) }))
	require.NoError(t, fnErr)
}

// waitGroup waits until gofwd hears a group on a port.
func (g *gofwd) waitGroup(t *testing.T, n *node, group netip.Addr, port uint16) {
	t.Helper()
	eventually(t, fmt.Sprintf("%s is not heard on port %d", group, port), func() bool {
		for _, s := range g.status(t, n).Multicast {
			for _, p := range s.Ports {
				if s.Group == group.String() && p == port {
					return true
				}
			}
		}
		return false
	})
}

// hear returns the next datagram and its sender.
func hear(t *testing.T, c *net.UDPConn) (string, netip.AddrPort) {
	t.Helper()
	c.SetReadDeadline(time.Now().Add(patience))
	buf := make([]byte, 1<<16)
	n, from, err := c.ReadFromUDPAddrPort(buf)
	require.NoError(t, err)
	return string(buf[:n]), netip.AddrPortFrom(from.Addr().Unmap(), from.Port())
}

func say(t *testing.T, c *net.UDPConn, to netip.AddrPort, what string) {
	t.Helper()
	_, err := c.WriteToUDPAddrPort([]byte(what), to)
	require.NoError(t, err)
}

// TestMulticastMDNS: the container, the host and another host are members of the
// same group on one port, and hear each other from it, but nobody twice. The port
// is published, too.
func TestMulticastMDNS(t *testing.T) {
	t.Parallel()
	for _, f := range []struct {
		family
		group netip.Addr
	}{{ipv4, mdns4}, {ipv6, mdns6}} {
		t.Run(f.name, func(t *testing.T) {
			t.Parallel()
			tp := newTopo(t)
			host := tp.host.member(t, f.group, 5353, "eth0") // as avahi has it
			g := tp.attach(t, "--multicast", f.group.String()+"%eth0", "-p", netip.AddrPortFrom(f.host, 5354).String()+":5353/udp")
			ctr := tp.ctr.member(t, f.group, 5353, "tap0")
			client := tp.client.member(t, f.group, 5353, "eth0")
			g.waitGroup(t, tp.host, f.group, 5353)
			to := netip.AddrPortFrom(f.group, 5353)

			say(t, client, to, "from the client")
			_, own := hear(t, client)
			got, from := hear(t, ctr)
			require.Equal(t, "from the client", got)
			require.Equal(t, own.Addr().WithZone(""), from.Addr().WithZone(""), "the sender's own address")
			require.EqualValues(t, 5353, from.Port())
			got, _ = hear(t, host)
			require.Equal(t, "from the client", got)

			say(t, host, to, "from the host")
			got, from = hear(t, ctr)
			require.Equal(t, "from the host", got)
			require.EqualValues(t, 5353, from.Port())
			for _, c := range []*net.UDPConn{host, client} {
				got, _ = hear(t, c)
				require.Equal(t, "from the host", got)
			}

			say(t, ctr, to, "from the container")
			for _, c := range []*net.UDPConn{ctr, host, client} {
				got, from = hear(t, c)
				require.Equal(t, "from the container", got)
				require.EqualValues(t, 5353, from.Port(), "RFC 6762: an answer comes from port 5353")
			}

			// The same once more, of two who say the same, and nothing
			// besides: had the container heard its echo, it would be here.
			say(t, client, to, "last")
			got, _ = hear(t, ctr)
			require.Equal(t, "last", got)

			// The published port is the container's alone.
			say(t, client, netip.AddrPortFrom(f.host, 5354), "to the container")
			got, from = hear(t, ctr)
			require.Equal(t, "to the container", got)
			say(t, ctr, from, "answer")
			got, _ = hear(t, client)
			require.Equal(t, "last", got)
			got, from = hear(t, client)
			require.Equal(t, "answer", got)
			require.Equal(t, netip.AddrPortFrom(f.host, 5354), from)
		})
	}
}

// TestMulticastSSDP: a search of a real socat is answered by a real socat in the
// container, by unicast to the searcher's address; over IPv6 that is a link-local
// one.
func TestMulticastSSDP(t *testing.T) {
	t.Parallel()
	need(t, "socat")
	tp := newTopo(t)
	g := tp.attach(t, "--multicast", ssdp4.String()+","+ssdp6.String()) // on that of the default route
	const answer = "SYSTEM:read line; echo $SOCAT_PEERADDR asks for $line"
	for _, f := range []struct {
		family
		group              netip.Addr
		member, to, option string
	}{
		{ipv4, ssdp4, "ip-add-membership=239.255.255.250:tap0", "UDP4-DATAGRAM:239.255.255.250:1900", "ip-multicast-if=198.51.100.2"},
		{ipv6, ssdp6, "ipv6-join-group=[ff02::c]:tap0", "UDP6-DATAGRAM:[ff02::c%eth0]:1900", "ipv6-v6only=1"},
	} {
		t.Run(f.name, func(t *testing.T) {
			v := strings.TrimPrefix(f.flag, "-")
			tp.ctr.start(t, "socat", fmt.Sprintf("UDP%s-RECVFROM:1900,reuseaddr,%s,fork", v, f.member), answer)
			g.waitGroup(t, tp.host, f.group, 1900)
			cmd := exec.Command("socat", "-t2", "-", f.to+","+f.option)
			cmd.Stdin = strings.NewReader("ssdp:all\n")
			r := tp.client.runCmd(t, cmd)
			require.Contains(t, r.stdout, "asks for ssdp:all", "%s", r.stderr)
			if f.name == ipv4.name {
				require.Contains(t, r.stdout, f.client.String())
			} else {
				require.Contains(t, strings.ReplaceAll(r.stdout, "0000", ""), "fe80:", "a link-local searcher")
			}
		})
	}
}

// TestMulticastPublishedPort: the port of a group can be published as well, before
// and after the group is heard on it. What is for the group comes once.
func TestMulticastPublishedPort(t *testing.T) {
	t.Parallel()
	tp := newTopo(t)
	g := tp.attach(t, "--multicast", mdns4.String(), "-p", "5353:5353/udp")
	ctr := tp.ctr.member(t, mdns4, 5353, "tap0")
	client := tp.client.member(t, mdns4, 5353, "eth0")
	g.waitGroup(t, tp.host, mdns4, 5353)
	both := func(round string) {
		for _, to := range []netip.Addr{mdns4, ipv4.host} {
			what := to.String() + " " + round
			say(t, client, netip.AddrPortFrom(to, 5353), what)
			got, from := hear(t, ctr)
			require.Equal(t, what, got)
			require.Equal(t, netip.AddrPortFrom(ipv4.client, 5353), from)
		}
	}
	both("1")
	gofwd := func(args ...string) {
		r := tp.host.runCmd(t, gofwdCmd(append([]string{"ports"}, args...)...))
		require.Zero(t, r.code, "%v: %s", args, r.stderr)
	}
	gofwd("rm", "--name", g.name, "5353:5353/udp")
	gofwd("add", "--name", g.name, "5353:5353/udp")
	both("2")
}

// TestMulticastInterface: a group is heard on its interface alone, and what the
// container sends to it leaves by that.
func TestMulticastInterface(t *testing.T) {
	t.Parallel()
	tp := newTopo(t)
	g := tp.attach(t, "--multicast", "239.1.2.3%eth1")
	group := addr("239.1.2.3")
	ctr := tp.ctr.member(t, group, 7000, "tap0")
	near, other := tp.client.member(t, group, 7000, "eth1"), tp.client.member(t, group, 7001, "eth0")
	g.waitGroup(t, tp.host, group, 7000)
	to := netip.AddrPortFrom(group, 7000)
	say(t, other, to, "on eth0")
	say(t, near, to, "on eth1")
	got, from := hear(t, ctr)
	require.Equal(t, "on eth1", got)
	require.Equal(t, netip.AddrPortFrom(addr("203.0.113.2"), 7000), from)
	say(t, ctr, to, "out")
	for {
		if got, from = hear(t, near); got == "out" {
			break
		}
	}
	require.Equal(t, netip.AddrPortFrom(addr("203.0.113.1"), 7000), from)

	// The interface goes and returns.
	tp.host.ip(t, "link del eth1")
	eventually(t, "the interface is missed", func() bool {
		return strings.Contains(g.status(t, tp.host).Multicast[0].Problem, "no interface eth1")
	})
	tp.host.ip(t, `
		link add eth1 type veth peer name eth1 netns `+tp.client.id+`
		addr add 203.0.113.1/24 dev eth1
		link set eth1 up`)
	tp.client.ip(t, "addr add 203.0.113.2/24 dev eth1\nlink set eth1 up")
	g.waitGroup(t, tp.host, group, 7000)
	near = tp.client.member(t, group, 7000, "eth1")
	eventually(t, "nothing is heard after the interface has returned", func() bool {
		say(t, near, to, "again")
		ctr.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
		n, err := ctr.Read(make([]byte, 16))
		return err == nil && n == len("again")
	})
}

// TestBroadcastOut: a broadcast of the container's reaches the host's network, and
// who answers it is heard.
func TestBroadcastOut(t *testing.T) {
	t.Parallel()
	need(t, "socat")
	tp := newTopo(t)
	tp.attach(t)
	tp.client.start(t, "socat", "UDP4-RECVFROM:7000,broadcast,fork", "SYSTEM:read line; echo here for $line")
	tp.client.waitPort(t, "udp", 7000)
	for _, dst := range []string{"255.255.255.255", "198.51.100.255"} {
		cmd := exec.Command("socat", "-t2", "-", "UDP4-DATAGRAM:"+dst+":7000,broadcast")
		cmd.Stdin = strings.NewReader("anybody\n")
		r := tp.ctr.runCmd(t, cmd)
		require.Equal(t, "here for anybody\n", r.stdout, "%s: %s", dst, r.stderr)
	}
}

// TestMulticastErrors: what cannot be had is said in one line.
func TestMulticastErrors(t *testing.T) {
	t.Parallel()
	tp := newTopo(t)
	for _, c := range []struct {
		code int
		args []string
		says string
	}{
		{2, []string{"--multicast", "192.0.2.1"}, `"192.0.2.1": 192.0.2.1 is not a multicast address`},
		{2, []string{"--multicast", "mdns"}, `"mdns" is not an IP address`},
		{2, []string{"--multicast", "224.0.0.251%"}, `no interface follows`},
		{2, []string{"--multicast", "ff01::1"}, `never leaves`},
		{1, []string{"--multicast", "224.0.0.251%nosuch0"}, `join multicast group "224.0.0.251%nosuch0": the host has no interface nosuch0`},
		{1, []string{"--multicast", "ff02::fb", "-4"}, `"ff02::fb": the container has no address of this family`},
		{1, []string{"--multicast", "ff02::fb,ff02::fb"}, `"ff02::fb" is given twice`},
		{1, []string{"--multicast", "224.0.0.251", "--no-udp"}, `UDP is switched off`},
		{1, []string{"--multicast", "224.0.0.251", "--inbound-only"}, `no tap`},
	} {
		r := tp.host.runCmd(t, gofwdCmd(append([]string{"attach", "--netns", tp.ctr.path}, c.args...)...))
		requireOneLine(t, r, c.code, c.says)
	}
}
