package forward

import (
	"fmt"
	"net/netip"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/gofwd/gofwd/stack"
)

// What the container itself has sent to a group, in super-frames too, is not heard
// again; the same words of another's are.
func TestUDPGroupEcho(t *testing.T) {
	local := netip.MustParseAddr("192.0.2.7")
	group := netip.MustParseAddrPort("239.1.2.3:7000")
	g := &joinedGroup{Group: Group{Addr: group.Addr()}, sockets: map[uint16]*udpSocket{}}
	u := newUDPTest(t, func(c *udpConfig) {
		c.Groups = []*joinedGroup{g}
		c.Local = func(a netip.Addr) bool { return a == local }
	})
	payload := pattern(2500)
	u.groups.remember(&stack.Datagram{Dst: group, Payload: payload, SegmentSize: 1000})
	for _, part := range [][]byte{payload[:1000], payload[1000:2000], payload[2000:]} {
		require.True(t, u.groups.isEcho(local, group, part))
		require.False(t, u.groups.isEcho(netip.MustParseAddr("192.0.2.8"), group, part), "another host")
		require.False(t, u.groups.isEcho(local, netip.MustParseAddrPort("239.1.2.3:7001"), part), "another port")
	}
	require.False(t, u.groups.isEcho(local, group, payload))
	u.groups.remember(&stack.Datagram{Dst: group})
	require.True(t, u.groups.isEcho(local, group, nil), "an empty datagram")
	u.pass((echoAge + 1) * time.Second)
	require.False(t, u.groups.isEcho(local, group, payload[:1000]), "too late for an echo")
}

// The kernel gives a group's datagrams to every socket that has the port and has
// joined on that interface, whoever bound it first.
func TestUDPGroupSharesItsPort(t *testing.T) {
	ifi := routable(t)
	for _, group := range []netip.Addr{netip.MustParseAddr("239.1.2.4"), netip.MustParseAddr("ff15::4")} {
		t.Run(group.String(), func(t *testing.T) {
			g := &joinedGroup{Group: Group{Addr: group}, ifindex: ifi.Index, sockets: map[uint16]*udpSocket{}}
			u := newUDPTest(t, func(c *udpConfig) {
				c.Groups = []*joinedGroup{g}
				c.Local = func(netip.Addr) bool { return true }
			})
			// A listener that shares its port with nobody but us.
			bound, _ := u.publish("[::]:0", Rule{Proto: UDP}, 53)
			require.NoError(t, u.groups.join(g, bound.Port()))
			require.True(t, u.groups.usesPort(bound.Port()))
			require.Equal(t, []uint16{bound.Port()}, u.groups.ports(g))
			u.udpEngine.mu.Lock()
			done := u.shareLocked(bound.Port())
			fd, err := openGroup(g, bound.Port())
			done()
			u.udpEngine.mu.Unlock()
			require.NoError(t, err)
			defer unix.Close(fd)

			to := netip.AddrPortFrom(group, bound.Port())
			require.NoError(t, unix.Sendto(fd, []byte("hear"), 0, toSockaddr(to)))
			d := u.recv()
			require.Equal(t, "hear", d.payload)
			require.Equal(t, to, d.dst)
			require.Equal(t, bound.Port(), d.src.Port())
			buf := make([]byte, 16)
			n, err := unix.Read(fd, buf)
			require.NoError(t, err)
			require.Equal(t, "hear", string(buf[:n]))

			// Several in one message (UDP_SEGMENT), which comes back in one piece.
			require.NoError(t, unix.SetsockoptInt(fd, unix.SOL_UDP, unix.UDP_SEGMENT, 4))
			require.NoError(t, unix.Sendto(fd, []byte("hearhere!"), 0, toSockaddr(to)))
			for _, want := range []string{"hear", "here", "!"} {
				require.Equal(t, want, u.recv().payload)
				n, err := unix.Read(fd, buf)
				require.NoError(t, err)
				require.Equal(t, want, string(buf[:n]))
			}

			// The container's, from that port, leave by the same socket.
			guest := u.cfg.Guest(group.Is4())
			u.fromNamespace(&stack.Datagram{Src: netip.AddrPortFrom(guest, bound.Port()), Dst: to, TTL: 1, Payload: []byte("answer")})
			n, from, err := unix.Recvfrom(fd, buf, 0)
			require.NoError(t, err)
			require.Equal(t, "answer", string(buf[:n]))
			require.Contains(t, fmt.Sprintf("%+v", from), fmt.Sprintf("Port:%d", bound.Port()))

			u.groups.leave(g, bound.Port())
			require.False(t, u.groups.usesPort(bound.Port()))
			require.Zero(t, u.locked(u.flows.len))
			require.Empty(t, u.tap.got, "neither an echo, nor what the listener heard")
			g.ifindex = 1 << 20
			require.ErrorIs(t, u.groups.join(g, bound.Port()), unix.ENODEV)
		})
	}
}
