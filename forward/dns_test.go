package forward

import (
	"net/netip"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

func TestParseNameservers(t *testing.T) {
	for _, tt := range []struct {
		text string
		want []netip.Addr
	}{
		{"", nil},
		{"nameserver 192.0.2.1", addrs("192.0.2.1")},
		{"# comment\nsearch example.org\nnameserver\t192.0.2.1 \r\nnameserver 2001:db8::1\n", addrs("192.0.2.1", "2001:db8::1")},
		{"nameserver fe80::1%eth0\n", addrs("fe80::1%eth0")},
		{"nameserver ::ffff:192.0.2.1\n", addrs("192.0.2.1")},
		{"nameserver 192.0.2.1 # the router\n", addrs("192.0.2.1")},
		{"#nameserver 192.0.2.1\n;nameserver 192.0.2.2\nnameserver dns.example.org\nnameserver\nnameservers 192.0.2.3\n", nil},
		{"nameserver 0.0.0.0\nnameserver 224.0.0.1\n", nil},
	} {
		require.Equal(t, tt.want, parseNameservers([]byte(tt.text)), tt.text)
	}
}

func FuzzParseNameservers(f *testing.F) {
	f.Add([]byte("nameserver 192.0.2.1\nnameserver fe80::1%eth0"))
	f.Fuzz(func(t *testing.T, text []byte) {
		for _, a := range parseNameservers(text) {
			require.True(t, a.IsValid() && !a.IsUnspecified() && !a.Is4In6())
		}
	})
}

func TestNameserversFollowFile(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "resolv.conf")
	write := func(name, text string) string {
		name = filepath.Join(dir, name)
		require.NoError(t, os.WriteFile(name, []byte(text), 0o600))
		return name
	}
	synctest.Test(t, func(t *testing.T) {
		n := &nameservers{path: file}
		next := func(want string) {
			t.Helper()
			got, err := n.next()
			require.NoError(t, err)
			require.Equal(t, want, got.String())
		}
		_, err := n.next()
		require.ErrorIs(t, err, syscall.ENETUNREACH, "no file yet")

		require.NoError(t, os.Symlink(write("a", "nameserver 192.0.2.1"), file))
		_, err = n.next()
		require.ErrorIs(t, err, syscall.ENETUNREACH, "looked a moment ago")
		time.Sleep(resolvConfAge)
		next("192.0.2.1")

		write("a", "nameserver 192.0.2.22") // in place
		next("192.0.2.1")
		time.Sleep(resolvConfAge)
		next("192.0.2.22")

		require.NoError(t, os.Rename(write("b", "nameserver 192.0.2.33"), filepath.Join(dir, "a"))) // behind the link
		time.Sleep(resolvConfAge)
		next("192.0.2.33")

		require.NoError(t, os.Remove(file)) // another link
		time.Sleep(resolvConfAge)
		next("192.0.2.33")
		require.NoError(t, os.Symlink(write("c", "nameserver 192.0.2.44"), file))
		time.Sleep(resolvConfAge)
		next("192.0.2.44")

		write("c", "") // being written
		time.Sleep(resolvConfAge)
		next("192.0.2.44")
	})
}

func TestNameserversFailover(t *testing.T) {
	file := filepath.Join(t.TempDir(), "resolv.conf")
	require.NoError(t, os.WriteFile(file, []byte("nameserver 192.0.2.1\nnameserver 192.0.2.2\nnameserver 192.0.2.3"), 0o600))
	synctest.Test(t, func(t *testing.T) {
		n := &nameservers{path: file}
		next := func(want string) {
			t.Helper()
			got, err := n.next()
			require.NoError(t, err)
			require.Equal(t, want, got.String())
		}
		next("192.0.2.1")
		n.report(netip.MustParseAddr("192.0.2.1"), false)
		next("192.0.2.2")
		time.Sleep(time.Second)
		n.report(netip.MustParseAddr("192.0.2.2"), false)
		next("192.0.2.3")
		time.Sleep(time.Second)
		n.report(netip.MustParseAddr("192.0.2.3"), false)
		next("192.0.2.1") // all failed: the one whose failure is oldest
		n.report(netip.MustParseAddr("192.0.2.2"), true)
		next("192.0.2.2")
		time.Sleep(nameserverPenalty)
		next("192.0.2.1")
		n.report(netip.MustParseAddr("198.51.100.1"), false) // none of ours
		require.Len(t, n.failure, 2)
	})
}
