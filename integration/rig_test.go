package integration

import (
	"errors"
	"net/netip"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// TestTopology checks the picture in topo_test.go itself, without gofwd: what it
// says of each address is what connect(2) on the host says.
func TestTopology(t *testing.T) {
	t.Parallel()
	tp := newTopo(t)
	tp.addFar(t)
	eachFamily(t, func(t *testing.T, f family) {
		for _, c := range []struct {
			dst  netip.Addr
			want error
		}{
			{f.client, unix.ECONNREFUSED},
			{f.client2, unix.ECONNREFUSED},
			{f.far, unix.ECONNREFUSED},
			{f.unreachable, f.unreachableErr},
			{f.noRoute, unix.EHOSTUNREACH},
		} {
			_, err := tp.host.tryTCP(netip.Addr{}, netip.AddrPortFrom(c.dst, 9), patience)
			require.ErrorIs(t, err, c.want, "connect to %s", c.dst)
		}
		_, err := tp.host.tryTCP(netip.Addr{}, netip.AddrPortFrom(f.silent, 9), 300*time.Millisecond)
		var timeout interface{ Timeout() bool }
		require.True(t, errors.As(err, &timeout) && timeout.Timeout(), "connect to %s: %v", f.silent, err)
		for _, dst := range []netip.Addr{f.host, f.host2, f.hostEth1} {
			_, err := tp.client.tryTCP(f.client2, netip.AddrPortFrom(dst, 9), patience)
			require.ErrorIs(t, err, unix.ECONNREFUSED, "connect to %s", dst)
		}
	})
}
