package integration

import (
	"io"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// greet says who it is to each client.
func greet(l *net.TCPListener, name string) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		io.WriteString(c, name)
		c.Close()
	}
}

// requireGreeting connects and checks who answers.
func (n *node) requireGreeting(t *testing.T, dst netip.AddrPort, name string) {
	t.Helper()
	c := n.dialTCP(t, netip.Addr{}, dst)
	b, err := io.ReadAll(c)
	require.NoError(t, err)
	require.Equal(t, name, string(b), "%s", dst)
}

// TestHostLoopback: what listens on the host's loopback alone stays out of the
// container's reach unless --map-host-loopback opens it, and the host alias leads
// to the host's main address.
func TestHostLoopback(t *testing.T) {
	t.Parallel()
	for _, mode := range []struct {
		name string
		opts []string
		v4   netip.Addr // leads to the host's loopback
		v6   netip.Addr
	}{
		{name: "closed by default"},
		{
			name: "opened", opts: []string{"--map-host-loopback", "169.254.7.7", "--map-host-loopback", "fd00:7::7"},
			v4: addr("169.254.7.7"), v6: addr("fd00:7::7"),
		},
		{
			name: "opened on the gateway", opts: []string{"--map-host-loopback", "10.0.2.2", "--map-host-loopback", "fd67:6f66:7764::2"},
			v4: ipv4.gw, v6: ipv6.gw,
		},
	} {
		t.Run(mode.name, func(t *testing.T) {
			t.Parallel()
			tp := newTopo(t)
			tp.attach(t, mode.opts...)
			eachFamily(t, func(t *testing.T, f family) {
				go greet(tp.host.listenTCP(t, f.loopback, 7000), "loopback")
				main := tp.host.sourceTo(t, f.far)
				go greet(tp.host.listenTCP(t, main, 7001), "main address")
				go whoUDP(tp.host.listenUDP(t, f.loopback, 7000))
				go whoUDP(tp.host.listenUDP(t, main, 7001))
				mapped := mode.v4
				if f.name == ipv6.name {
					mapped = mode.v6
				}
				tp.ctr.requireGreeting(t, netip.AddrPortFrom(f.alias, 7001), "main address")
				tp.ctr.requireGreeting(t, netip.AddrPortFrom(main, 7001), "main address")
				for _, a := range []netip.Addr{f.alias, f.gw, f.host} {
					if a == mapped {
						continue
					}
					_, err := tp.ctr.tryTCP(netip.Addr{}, netip.AddrPortFrom(a, 7000), time.Second)
					require.Error(t, err, "the host's loopback answers at %s", a)
					require.Error(t, udpAnswers(tp.ctr, t, netip.AddrPortFrom(a, 7000)), "UDP at %s", a)
				}
				_, err := tp.ctr.tryTCP(netip.Addr{}, netip.AddrPortFrom(f.loopback, 7000), time.Second)
				require.ErrorIs(t, err, unix.ECONNREFUSED, "the container's own loopback")
				require.NoError(t, udpAnswers(tp.ctr, t, netip.AddrPortFrom(f.alias, 7001)))
				if mapped.IsValid() {
					tp.ctr.requireGreeting(t, netip.AddrPortFrom(mapped, 7000), "loopback")
					require.NoError(t, udpAnswers(tp.ctr, t, netip.AddrPortFrom(mapped, 7000)))
				}
			})
		})
	}
}

// sourceTo is the address that the namespace's routes choose for what goes to dst.
func (n *node) sourceTo(t *testing.T, dst netip.Addr) netip.Addr {
	t.Helper()
	return addrPort(n.dialUDP(t, netip.Addr{}, netip.AddrPortFrom(dst, 9)).LocalAddr()).Addr()
}

// udpAnswers reports whether a serveWho server answers within half a second.
func udpAnswers(n *node, t *testing.T, dst netip.AddrPort) error {
	t.Helper()
	c := n.dialUDP(t, netip.Addr{}, dst)
	defer c.Close()
	if _, err := c.Write([]byte("who")); err != nil {
		return err
	}
	c.SetReadDeadline(time.Now().Add(500 * time.Millisecond))
	_, err := c.Read(make([]byte, 512))
	return err
}

// TestContainerLoopback: -T and -U forward the container's loopback to the
// host's.
func TestContainerLoopback(t *testing.T) {
	t.Parallel()
	tp := newTopo(t)
	tp.attach(t, "-T", "5432,6000:7000", "-U", "5353")
	eachFamily(t, func(t *testing.T, f family) {
		go greet(tp.host.listenTCP(t, f.loopback, 5432), "same port")
		go greet(tp.host.listenTCP(t, f.loopback, 7000), "other port")
		go whoUDP(tp.host.listenUDP(t, f.loopback, 5353))
		tp.ctr.requireGreeting(t, netip.AddrPortFrom(f.loopback, 5432), "same port")
		tp.ctr.requireGreeting(t, netip.AddrPortFrom(f.loopback, 6000), "other port")
		require.NoError(t, udpAnswers(tp.ctr, t, netip.AddrPortFrom(f.loopback, 5353)))
	})
}

// TestContainerLoopbackAuto: -T auto forwards what listens on the host, as it comes.
func TestContainerLoopbackAuto(t *testing.T) {
	t.Parallel()
	tp := newTopo(t)
	tp.attach(t, "-T", "auto")
	eachFamily(t, func(t *testing.T, f family) {
		go greet(tp.host.listenTCP(t, f.loopback, 5432), "late")
		dst := netip.AddrPortFrom(f.loopback, 5432)
		eventually(t, "the host's listener is not forwarded", func() bool {
			c, err := tp.ctr.tryTCP(netip.Addr{}, dst, patience)
			if err == nil {
				c.Close()
			}
			return err == nil
		})
		tp.ctr.requireGreeting(t, dst, "late")
	})
}

// TestContainerLoopbackRefused: with nobody behind -T, the client gets a reset at
// once, not a connection that hangs.
func TestContainerLoopbackRefused(t *testing.T) {
	t.Parallel()
	tp := newTopo(t)
	tp.attach(t, "-T", "5432")
	eachFamily(t, func(t *testing.T, f family) {
		c, err := tp.ctr.tryTCP(netip.Addr{}, netip.AddrPortFrom(f.loopback, 5432), patience)
		if err == nil {
			defer c.Close()
			c.SetReadDeadline(time.Now().Add(patience))
			_, err = c.Read(make([]byte, 1))
		}
		require.True(t, isOneOf(err, unix.ECONNREFUSED, unix.ECONNRESET), "%v", err)
	})
}
