package forward

import (
	"net"
	"net/netip"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"
)

// Addresses of the test's host that are no loopback addresses; see routable.
var (
	routable4 = netip.MustParseAddr("192.0.2.7")
	routable6 = netip.MustParseAddr("2001:db8::7")
	linkLocal = netip.MustParseAddr("fe80::7%udp0")
)

var makeRoutable sync.Once

// routable gives the test's host an interface that has these addresses, and where
// multicasts go.
func routable(t testing.TB) *net.Interface {
	t.Helper()
	makeRoutable.Do(func() {
		ip(t, "link add udp0 type veth peer name udp1")
		ip(t, "addr add "+routable4.String()+"/24 dev udp0")
		ip(t, "addr add "+routable6.String()+"/64 dev udp0 nodad")
		// No automatic address, which would be tentative for a second; the
		// other end first, so that udp0 has a carrier as soon as it is up.
		ip(t, "link set udp0 addrgenmode none")
		ip(t, "addr add fe80::7/64 dev udp0 nodad")
		ip(t, "link set udp1 up")
		ip(t, "link set udp0 up")
		ip(t, "route add 224.0.0.0/4 dev udp0")
	})
	ifi, err := net.InterfaceByName("udp0")
	require.NoError(t, err)
	return ifi
}

// setLoopbackMTU makes lo narrow until the test ends.
func setLoopbackMTU(t *testing.T, mtu string) {
	t.Helper()
	ip(t, "link set lo mtu "+mtu)
	t.Cleanup(func() { ip(t, "link set lo mtu 65536") })
}
