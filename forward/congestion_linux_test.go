package forward

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/gofwd/gofwd/netnsutil"
)

// paceIn makes something else than reno the congestion control of a namespace, and
// returns it: bbr if it is there.
func paceIn(t *testing.T, ns *netnsutil.NS) (name string) {
	t.Helper()
	within(t, ns, func() {
		b, err := os.ReadFile("/proc/sys/net/ipv4/tcp_allowed_congestion_control")
		require.NoError(t, err)
		for one := range strings.FieldsSeq(string(b)) {
			if one != netnsutil.LocalCongestion && name != "bbr" {
				name = one
			}
		}
		require.NotEmpty(t, name, "a namespace may have nothing but %s", netnsutil.LocalCongestion)
		setting := "/proc/sys/net/ipv4/tcp_congestion_control"
		was, err := os.ReadFile(setting)
		require.NoError(t, err)
		require.NoError(t, os.WriteFile(setting, []byte(name), 0))
		t.Cleanup(func() { within(t, ns, func() { require.NoError(t, os.WriteFile(setting, was, 0)) }) })
	})
	return name
}

// congestionIn returns the congestion controls of the connections in a namespace
// of which match is part of the addresses, as ss(8) shows them.
func congestionIn(t *testing.T, ns *netnsutil.NS, match string) (names []string) {
	t.Helper()
	within(t, ns, func() {
		out, err := exec.Command("ss", "-HtinO", "state", "established").CombinedOutput()
		require.NoError(t, err, "%s", out)
		for line := range strings.Lines(string(out)) {
			if f := strings.Fields(line); len(f) > 4 && strings.Contains(f[2]+" "+f[3], match) {
				names = append(names, f[4])
			}
		}
	})
	return names
}

// hold connects to dst in ns, and keeps the connection.
func hold(t *testing.T, ns *netnsutil.NS, dst string) {
	t.Helper()
	within(t, ns, func() {
		c, err := net.DialTimeout("tcp", dst, 5*time.Second)
		require.NoError(t, err)
		t.Cleanup(func() { c.Close() })
		c.SetDeadline(time.Now().Add(5 * time.Second))
		_, err = c.Write([]byte("x"))
		require.NoError(t, err)
		_, err = c.Read(make([]byte, 1)) // the server has it
		require.NoError(t, err)
	})
}

// holderIn starts a server in ns that says a byte and keeps its connections.
func holderIn(t *testing.T, ns *netnsutil.NS, addr string) (port uint16) {
	t.Helper()
	return serveTCP(t, ns, addr, func(c net.Conn) {
		_, _ = c.Write([]byte("x"))
		_, _ = io.Copy(io.Discard, c)
		c.Close()
	})
}

// What does not leave the machine is not paced, whatever the congestion control of
// the host and of the container: both ends of what goes over the container's lo, and
// the helper's of the host's. The network's end keeps the host's.
func TestLocalConnectionsAreNotPaced(t *testing.T) {
	remote := newLAN(t)
	hosts := paceIn(t, nil)
	outside := holderIn(t, remote, ":0")
	local := holderIn(t, nil, "127.0.0.1:0")
	passed, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	file, err := passed.(*net.TCPListener).File()
	require.NoError(t, err)
	passed.Close()
	defer file.Close()
	reno := netnsutil.LocalCongestion
	for name, network := range map[string]Network{"a net of its own": {}, "the host's addresses": {CopyHost: true}} {
		t.Run(name, func(t *testing.T) {
			ns := newNS(t)
			paceIn(t, ns)
			server := holderIn(t, ns, ":0")
			rules := append(publishTCP(8080, server), Rule{
				Proto: TCP, Dir: Out, Ports: PortRange{8081, 8081}, TargetPorts: PortRange{local, local},
			}, rule(fmt.Sprintf("fd:web:%d", server)))
			start(t, Config{NetNS: ns, Datapath: Kernel, Rules: rules, Network: network, Sockets: []Socket{{"web", file}}})
			for _, host := range []string{host4, host6} {
				hold(t, remote, net.JoinHostPort(host, "8080"))
				require.Equal(t, []string{reno, reno}, congestionIn(t, ns, remoteOf(host)), "into the container")
				require.Equal(t, []string{hosts}, congestionIn(t, nil, remoteOf(host)), "the client's")
			}
			for _, addr := range []string{remote4, remote6} {
				dst := netip.AddrPortFrom(netip.MustParseAddr(addr), outside).String()
				hold(t, ns, dst)
				require.Equal(t, []string{reno, reno}, congestionIn(t, ns, dst), "out of the container")
				require.Equal(t, []string{hosts}, congestionIn(t, nil, dst), "to the outside")
			}
			hold(t, ns, "127.0.0.1:8081")
			require.Contains(t, congestionIn(t, ns, "127.0.0.1:8081 "), reno, "accepted from the container's loopback")
			there := " " + netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), local).String()
			require.Contains(t, congestionIn(t, nil, there), reno, "to the host's loopback")
			hold(t, nil, passed.Addr().String())
			require.Contains(t, congestionIn(t, nil, passed.Addr().String()+" "), reno, "accepted by a passed socket")
		})
	}
}

// remoteOf is the other host's address of the family of one of this host.
func remoteOf(host string) string {
	if host == host4 {
		return remote4
	}
	return remote6
}
