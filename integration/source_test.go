package integration

import (
	"net/netip"
	"testing"

	"github.com/stretchr/testify/require"
)

// sourceCase is a line of the table "what the container sees as the source".
type sourceCase struct {
	name     string
	onHost   bool // the client is a process of the host, not the remote machine
	src, dst func(f family) netip.Addr
	seen     func(f family) netip.Addr
	port     bool // the client's port is kept too
}

func fClient(f family) netip.Addr   { return f.client }
func fClient2(f family) netip.Addr  { return f.client2 }
func fHost(f family) netip.Addr     { return f.host }
func fHost2(f family) netip.Addr    { return f.host2 }
func fEth1(f family) netip.Addr     { return f.hostEth1 }
func fLoopback(f family) netip.Addr { return f.loopback }
func fAlias(f family) netip.Addr    { return f.alias }

// TestSourceAddress is the table of what the container sees as the source, for
// TCP and UDP, IPv4 and IPv6.
func TestSourceAddress(t *testing.T) {
	t.Parallel()
	remote := []sourceCase{
		{name: "remote", src: fClient, dst: fHost, seen: fClient, port: true},
		{name: "remote, second address", src: fClient2, dst: fHost, seen: fClient2, port: true},
		{name: "remote to the host's second address", src: fClient, dst: fHost2, seen: fClient, port: true},
		{name: "remote to the other interface", src: fClient, dst: fEth1, seen: fClient, port: true},
	}
	own := []sourceCase{
		{name: "host", onHost: true, src: fHost, dst: fHost, seen: fHost, port: true},
		{name: "host, second address", onHost: true, src: fHost2, dst: fHost2, seen: fHost2, port: true},
		{name: "host, one address to the other", onHost: true, src: fHost, dst: fHost2, seen: fHost, port: true},
		{name: "host, other interface", onHost: true, src: fEth1, dst: fEth1, seen: fEth1, port: true},
	}
	loopback := sourceCase{name: "loopback", onHost: true, src: fLoopback, dst: fLoopback, seen: fAlias}

	for _, mode := range []struct {
		name    string
		opts    []string
		serveOn []netip.Addr
		cases   []sourceCase
	}{
		{
			name: "default", serveOn: []netip.Addr{ipv4.any, ipv6.any},
			cases: append(append(remote, own...), loopback),
		},
		{
			// A server on the container's loopback alone: nobody else reaches it.
			name: "host-lo-to-ns-lo", opts: []string{"--host-lo-to-ns-lo"},
			serveOn: []netip.Addr{ipv4.loopback, ipv6.loopback},
			cases:   []sourceCase{{name: "loopback", onHost: true, src: fLoopback, dst: fLoopback, seen: fLoopback}},
		},
		{
			name: "host-lo-to-ns-lo, others", opts: []string{"--host-lo-to-ns-lo"},
			serveOn: []netip.Addr{ipv4.any, ipv6.any}, cases: append(remote[:1:1], own[0]),
		},
		{
			// The container owns what it copied: eth0's addresses, not eth1's.
			name: "config-net", opts: []string{"--config-net"}, serveOn: []netip.Addr{ipv4.any, ipv6.any},
			cases: append(remote[:3:3],
				sourceCase{name: "host", onHost: true, src: fHost, dst: fHost, seen: fAlias},
				sourceCase{name: "host, other interface", onHost: true, src: fEth1, dst: fEth1, seen: fEth1, port: true},
				loopback),
		},
		{
			name: "own numbers", serveOn: []netip.Addr{ipv4.any, ipv6.any},
			opts: []string{
				"--address", "172.30.0.5/16", "--address", "fd00:5::5/64",
				"--host-alias", "169.254.9.9", "--host-alias", "fd00:5::9",
			},
			cases: []sourceCase{
				remote[0], own[0],
				{name: "loopback", onHost: true, src: fLoopback, dst: fLoopback, seen: func(f family) netip.Addr {
					if f.name == ipv4.name {
						return addr("169.254.9.9")
					}
					return addr("fd00:5::9")
				}},
			},
		},
	} {
		t.Run(mode.name, func(t *testing.T) {
			t.Parallel()
			tp := newTopo(t)
			tp.attach(t, append(mode.opts, "-p", "8080:80/tcp", "-p", "8080:80/udp")...)
			tp.ctr.serveWho(t, 80, mode.serveOn...)
			eachFamily(t, func(t *testing.T, f family) {
				for _, proto := range []string{"tcp", "udp"} {
					for _, c := range mode.cases {
						tp.checkSource(t, proto, f, c)
					}
				}
			})
		})
	}
}

func (tp *topo) checkSource(t *testing.T, proto string, f family, c sourceCase) {
	t.Helper()
	from := tp.client
	if c.onHost {
		from = tp.host
	}
	got, err := from.who(t, proto, c.src(f), netip.AddrPortFrom(c.dst(f), 8080))
	if !assertNoError(t, err, "%s: %s", proto, c.name) {
		return
	}
	if want := c.seen(f); got.by.Addr() != want {
		t.Errorf("%s: %s: %s to %s was seen as %s, not %s", proto, c.name, c.src(f), c.dst(f), got.by.Addr(), want)
	}
	if c.port && got.by.Port() != got.local.Port() {
		t.Errorf("%s: %s: port %d was seen as %d", proto, c.name, got.local.Port(), got.by.Port())
	}
}

func assertNoError(t *testing.T, err error, format string, args ...any) bool {
	t.Helper()
	if err != nil {
		t.Errorf(format+": %v", append(args, err)...)
	}
	return err == nil
}

// TestSourceOtherFamilyServer is the table's last line for a server that listens
// on one family in a container that has both: the host alias of that family.
func TestSourceOtherFamilyServer(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ client, server family }{{ipv6, ipv4}, {ipv4, ipv6}} {
		t.Run(c.server.name+" server", func(t *testing.T) {
			t.Parallel()
			tp := newTopo(t)
			g := tp.attach(t, "-p", "8080:80")
			tp.ctr.serveWho(t, 80, c.server.any)
			got, err := tp.client.who(t, "tcp", c.client.client, netip.AddrPortFrom(c.client.host, 8080))
			require.NoError(t, err)
			require.Equal(t, c.server.alias, got.by.Addr())
			got, err = tp.client.who(t, "tcp", c.server.client, netip.AddrPortFrom(c.server.host, 8080))
			require.NoError(t, err)
			require.Equal(t, c.server.client, got.by.Addr())
			// The substitution is not to go unnoticed.
			s := g.status(t, tp.host)
			require.Len(t, s.Forwards, 1)
			require.NotEmpty(t, s.Forwards[0].Problems)
		})
	}
}
