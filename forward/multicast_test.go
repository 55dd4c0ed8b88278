package forward

import (
	"net/netip"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestParseGroup(t *testing.T) {
	for _, s := range []string{"224.0.0.251", "239.255.255.250%eth0", "ff02::fb", "ff05::c%wlan0"} {
		g, err := ParseGroup(s)
		require.NoError(t, err)
		require.Equal(t, s, g.String())
		require.True(t, g.Addr.IsMulticast())
	}
	for s, want := range map[string]string{
		"":                             `multicast group "": "" is not an IP address`,
		"224.0.0.251:5353":             `"224.0.0.251:5353" is not an IP address`,
		"10.0.0.1%eth0":                `multicast group "10.0.0.1%eth0": 10.0.0.1 is not a multicast address`,
		"::ffff:224.0.0.1":             `is not a multicast address`,
		"ff01::1":                      `never leaves`,
		"224.0.0.251%":                 `no interface follows`,
		"224.0.0.251%an-endless-iface": `"an-endless-iface" is not an interface`,
		"224.0.0.251%a/b":              `"a/b" is not an interface`,
	} {
		_, err := ParseGroup(s)
		require.ErrorContains(t, err, want, "%q", s)
	}
}

// A link-local neighbour that was heard in a group can be answered, if the policy
// lets; any other is still nowhere.
func TestLinkLocalNeighbour(t *testing.T) {
	m := testHostMap()
	m.zone = func(a netip.Addr) string { return map[string]string{"fe80::5": "7"}[a.String()] }
	to, err := m.destination(netip.MustParseAddrPort("[fe80::5]:1900"))
	require.NoError(t, err)
	require.Equal(t, "[fe80::5%7]:1900", to.String())
	_, err = m.destination(netip.MustParseAddrPort("[fe80::6]:1900"))
	require.Error(t, err)
	deny, err := ParseDestination("fe80::/10")
	require.NoError(t, err)
	m.policy, err = newPolicy(nil, []Destination{deny}, nil)
	require.NoError(t, err)
	_, err = m.destination(netip.MustParseAddrPort("[fe80::5]:1900"))
	require.Error(t, err)
}
