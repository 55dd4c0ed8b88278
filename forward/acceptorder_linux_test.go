package forward

import (
	"fmt"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// A server accepts a client's connections in the order in which the client made
// them.
func TestAcceptOrder(t *testing.T) {
	for _, path := range []Datapath{Kernel, Tap} {
		t.Run(string(path), func(t *testing.T) { testAcceptOrder(t, path) })
	}
}

func testAcceptOrder(t *testing.T, path Datapath) {
	ns := newNS(t)
	var ln net.Listener
	within(t, ns, func() {
		var err error
		ln, err = net.Listen("tcp", ":0")
		require.NoError(t, err)
	})
	defer ln.Close()
	port := ln.Addr().(*net.TCPAddr).AddrPort().Port()
	start(t, Config{Datapath: path, NetNS: ns, Rules: forEach(Rule{Ports: PortRange{8080, 8080}, TargetPorts: PortRange{port, port}})})
	for round := range 300 {
		const n = 4
		var names []string
		for range n {
			c, err := net.DialTimeout("tcp", "127.0.0.1:8080", 5*time.Second)
			require.NoError(t, err)
			defer c.Close()
			names = append(names, fmt.Sprint(c.LocalAddr().(*net.TCPAddr).Port))
		}
		for i := range n {
			c, err := ln.Accept()
			require.NoError(t, err)
			require.Equal(t, names[i], fmt.Sprint(c.RemoteAddr().(*net.TCPAddr).Port), "round %d, connection %d", round, i)
			c.Close()
		}
	}
}

// Who does not answer keeps the next one waiting for a moment, and nobody else.
func TestAcceptOrderIsNotForEver(t *testing.T) {
	var o acceptOrder
	a, b := netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("192.0.2.2")
	first, second, third, other := o.next(a), o.next(a), o.next(a), o.next(b)
	other.wait()
	began := time.Now()
	second.wait()
	require.GreaterOrEqual(t, time.Since(began), turnWait)
	second.done()
	third.wait()
	for _, x := range []*turn{first, second, third, other} {
		x.done()
	}
	require.Empty(t, o.last)
	o.next(a).wait()
}
