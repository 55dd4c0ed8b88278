package netnsutil

import (
	"net/netip"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// The rule finds the transparent socket that a reply of a host behind the namespace
// is for (nft_socket), so that both ends see the addresses that were asked for, and
// a closed port refuses. It gets along with HoldSYN.
func TestKernelSocketMatchTakesRepliesFromBehind(t *testing.T) {
	for _, f := range families {
		for _, hold := range []bool{false, true} {
			name := f.name
			if hold {
				name += " with held SYNs"
			}
			t.Run(name, func(t *testing.T) {
				ns, h := newTestNS(t)
				addNowhere(t, h)
				behind, _ := newTestNS(t)
				prefix := func(s string) netip.Prefix { return netip.MustParsePrefix(s) }
				require.NoError(t, Veth(
					ns, Link{Name: "bridge", Addrs: []netip.Prefix{prefix("10.89.0.1/24"), prefix("fd89::1/64")}},
					behind, Link{Name: "eth0", Addrs: []netip.Prefix{prefix("10.89.0.3/24"), prefix("fd89::3/64")}, Routes: []Route{
						{Dst: prefix("0.0.0.0/0"), Via: netip.MustParseAddr("10.89.0.1")},
						{Dst: prefix("::/0"), Via: netip.MustParseAddr("fd89::1")},
					}},
				))
				server := netip.MustParseAddr("10.89.0.3")
				if f.name == "IPv6" {
					server = netip.MustParseAddr("fd89::3")
				}
				before := netState(t, ns, h)
				k, err := ns.OpenKernelPath()
				require.NoError(t, err)
				defer k.Close()
				require.False(t, k.IsBehind(server))
				if hold {
					require.NoError(t, k.HoldSYN("nowhere", netip.MustParseAddrPort("127.0.0.1:1"), netip.MustParseAddrPort("[::1]:1")))
				}
				require.NoError(t, k.ServeBehind("nowhere"))
				require.True(t, k.IsBehind(server))
				require.False(t, k.IsBehind(f.server), "the namespace's own")
				require.False(t, k.IsBehind(f.client), "by the default route")

				l := listenIn(t, behind, netip.AddrPortFrom(server, 80).String(), 0)
				client := netip.AddrPortFrom(f.client, 40000)
				c, err := dialAs(ns, f, 0, "tcp", client, netip.AddrPortFrom(server, 80))
				require.NoError(t, err)
				defer c.Close()
				s, err := l.Accept()
				require.NoError(t, err)
				defer s.Close()
				require.Equal(t, client.String(), s.RemoteAddr().String())
				_, err = s.Write([]byte("hello"))
				require.NoError(t, err)
				b := make([]byte, 5)
				require.NoError(t, c.SetReadDeadline(time.Now().Add(5*time.Second)))
				_, err = c.Read(b)
				require.NoError(t, err)
				require.Equal(t, "hello", string(b))

				_, err = dialAs(ns, f, 0, "tcp", netip.AddrPortFrom(f.client, 40001), netip.AddrPortFrom(server, 9))
				require.ErrorIs(t, err, unix.ECONNREFUSED)
				require.NoError(t, k.Close())
				require.False(t, k.IsBehind(server))
				require.Equal(t, before, netState(t, ns, h))
			})
		}
	}
}
