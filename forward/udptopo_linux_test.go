package forward

import (
	"net"
	"net/netip"
	"os/exec"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"
)

// Addresses of the test's host that are no loopback addresses; see routable.
var (
	routable4 = netip.MustParseAddr("192.0.2.7")
	routable6 = netip.MustParseAddr("2001:db8::7")
)

var addRoutable = sync.OnceValues(func() (*net.Interface, error) {
	if err := ip(
		"link add udp0 type veth peer name udp1",
		"addr add "+routable4.String()+"/24 dev udp0",
		"addr add "+routable6.String()+"/64 dev udp0 nodad",
		// No link-local address, which would be tentative for a second; the
		// other end first, so that udp0 has a carrier as soon as it is up.
		"link set udp0 addrgenmode none",
		"link set udp1 up",
		"link set udp0 up",
		"route add 224.0.0.0/4 dev udp0",
	); err != nil {
		return nil, err
	}
	return net.InterfaceByName("udp0")
})

// routable gives the test's host an interface that has these addresses, and where
// multicasts go.
func routable(t testing.TB) *net.Interface {
	t.Helper()
	ifi, err := addRoutable()
	require.NoError(t, err)
	return ifi
}

// setLoopbackMTU makes lo narrow until the test ends.
func setLoopbackMTU(t testing.TB, mtu string) {
	t.Helper()
	require.NoError(t, ip("link set lo mtu "+mtu))
	t.Cleanup(func() { require.NoError(t, ip("link set lo mtu 65536")) })
}

// ip runs ip(8) in the test's namespace.
func ip(commands ...string) error {
	cmd := exec.Command("ip", "-batch", "-")
	cmd.Stdin = strings.NewReader(strings.Join(commands, "\n"))
	out, err := cmd.CombinedOutput()
	if err != nil {
		return &ipError{string(out), err}
	}
	return nil
}

type ipError struct {
	output string
	err    error
}

func (e *ipError) Error() string { return "ip: " + e.err.Error() + ": " + e.output }
func (e *ipError) Unwrap() error { return e.err }
