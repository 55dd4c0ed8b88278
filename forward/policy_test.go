package forward

import (
	"net/netip"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestParseDestination(t *testing.T) {
	for text, want := range map[string]string{
		"192.168.1.7/16": "192.168.0.0/16", "10.0.0.1": "10.0.0.1/32", "10.0.0.1:22": "10.0.0.1/32:22", "fd00::/8": "fd00::/8",
		"[fd00::/8]:22-25": "[fd00::/8]:22-25", "[::1]": "::1/128", "host": "host", "loopback:5432": "loopback:5432", "*:25": "*:25",
		"192.0.2.0/24:1-1023": "192.0.2.0/24:1-1023",
	} {
		d, err := ParseDestination(text)
		require.NoError(t, err, text)
		require.Equal(t, want, d.String(), text)
		again, err := ParseDestination(d.String())
		require.NoError(t, err)
		require.Equal(t, d, again)
	}
	for _, text := range []string{"", ":", ":25", "hosts", "10.0.0.1:", "10.0.0.1:0", "10.0.0.1:9-8", "[fd00::", "[fd00::]22", "1.1.1.1+2.2.2.2", "10.0.0.0/33", "fd00::1%eth0"} {
		_, err := ParseDestination(text)
		require.Error(t, err, text)
	}
}

func TestPolicy(t *testing.T) {
	list := func(texts ...string) (l []Destination) {
		for _, text := range texts {
			d, err := ParseDestination(text)
			require.NoError(t, err)
			l = append(l, d)
		}
		return l
	}
	local := func() ([]netip.Prefix, error) {
		return []netip.Prefix{netip.MustParsePrefix("192.168.1.5/24"), netip.MustParsePrefix("127.0.0.1/8")}, nil
	}
	for _, tt := range []struct {
		allow, deny []Destination
		dst, to     string
		want        bool
	}{
		{nil, nil, "192.0.2.1:80", "", true},
		{nil, list("192.168.0.0/16"), "192.168.9.9:80", "", false},
		{nil, list("192.168.0.0/16"), "192.0.2.1:80", "", true},
		{list("192.168.9.9:443"), list("192.168.0.0/16"), "192.168.9.9:443", "", true},
		{list("192.168.9.9:443"), list("192.168.0.0/16"), "192.168.9.9:80", "", false},
		{list("192.0.2.0/24"), nil, "192.0.2.1:80", "", true},
		{list("192.0.2.0/24"), nil, "198.51.100.1:80", "", false},
		{nil, list("*:25"), "192.0.2.1:25", "", false},
		{nil, list("*:25"), "[2001:db8::1]:25", "", false},
		{nil, list("*:25"), "192.0.2.1:26", "", true},
		{nil, list("host"), "192.168.1.5:80", "", false},
		{nil, list("host"), "192.168.1.6:80", "", true},
		{nil, list("host"), "169.254.1.2:80", "192.168.1.5:80", false},
		{nil, list("169.254.1.2"), "169.254.1.2:80", "192.168.1.5:80", false},
		{nil, list("host"), "10.0.2.2:80", "127.0.0.1:80", true},
		{nil, list("loopback"), "10.0.2.2:80", "127.0.0.1:80", false},
		{list("loopback:5432"), list("loopback"), "10.0.2.2:5432", "127.0.0.1:5432", true},
	} {
		p, err := newPolicy(tt.allow, tt.deny, &hostAddrs{read: local})
		require.NoError(t, err)
		dst := netip.MustParseAddrPort(tt.dst)
		to := dst
		if tt.to != "" {
			to = netip.MustParseAddrPort(tt.to)
		}
		require.Equal(t, tt.want, p.allows(dst, to), "allow %v deny %v: %s %s", tt.allow, tt.deny, tt.dst, tt.to)
	}
	_, err := newPolicy([]Destination{{Class: "hosts"}}, nil, nil)
	require.Error(t, err)
}
