package forward

import (
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/gofwd/gofwd/netnsutil"
	"github.com/gofwd/gofwd/stack"
)

// allowPing lets group 0 have ping sockets in the thread's namespace. There is no
// way back: the default is of groups that the tests' user namespace doesn't have.
func allowPing(t *testing.T) {
	t.Helper()
	require.NoError(t, os.WriteFile("/proc/sys/net/ipv4/ping_group_range", []byte("0 0"), 0))
}

// ping runs ping(8) in ns and returns what it prints.
func ping(t *testing.T, ns *netnsutil.NS, args string) (out string, ok bool) {
	t.Helper()
	within(t, ns, func() {
		b, err := exec.Command("ping", strings.Fields("-n -W 2 "+args)...).CombinedOutput()
		out, ok = string(b), err == nil
	})
	return out, ok
}

func TestPing(t *testing.T) {
	remote := newLAN(t)
	// A router behind the other host: what has no route there is unreachable,
	// and what has no hops left dies.
	require.NoError(t, remote.Do(func() error {
		for file, value := range map[string]string{"ipv4/ip_forward": "1", "ipv6/conf/all/forwarding": "1", "ipv4/icmp_ratelimit": "0", "ipv6/icmp/ratelimit": "0"} {
			if err := os.WriteFile("/proc/sys/net/"+file, []byte(value), 0); err != nil {
				return err
			}
		}
		ip(t, "route add unreachable 198.51.100.0/24")
		ip(t, "route add unreachable 2001:db8:2::/64")
		ip(t, "route add 198.18.0.0/24 dev lan0")
		ip(t, "route add 2001:db8:3::/64 dev lan0")
		return nil
	}))
	allowPing(t)
	f, ns := start(t, Config{})
	require.Empty(t, f.Status().Notes)

	for _, tt := range []struct {
		name, args, want string
		ok               bool
	}{
		{"world v4", "-c 3 -i 0.01 " + remote4, "3 received", true},
		{"world v6", "-c 3 -i 0.01 " + remote6, "3 received", true},
		{"hop limit of the reply v4", "-c 1 -t 7 " + remote4, "ttl=64", true},
		{"hop limit of the reply v6", "-c 1 -t 7 " + remote6, "ttl=64", true},
		{"large", "-c 1 -s 8000 " + remote4, "8008 bytes from " + remote4, true},
		{"small", "-c 1 -s 0 " + remote6, "8 bytes from " + remote6, true},
		{"alias v4", "-c 1 169.254.1.2", "1 received", true},
		{"alias v6", "-c 1 fd67:6f66:7764::1", "1 received", true},
		{"gateway v4", "-c 1 10.0.2.2", "1 received", true},
		{"gateway v6", "-c 1 fd67:6f66:7764::2", "1 received", true},
		{"unreachable v4", "-c 1 198.51.100.1", "From " + remote4 + " icmp_seq=1 Destination Host Unreachable", false},
		{"unreachable v6", "-c 1 2001:db8:2::1", "From " + remote6 + " icmp_seq=1 Destination unreachable", false},
		{"no hops left v4", "-c 1 -t 1 198.18.0.1", "From " + remote4 + " icmp_seq=1 Time to live exceeded", false},
		{"no hops left v6", "-c 1 -t 1 2001:db8:3::1", "From " + remote6 + " icmp_seq=1 Time exceeded: Hop limit", false},
		{"nobody of our net", "-c 1 10.0.2.77", "Destination Host Unreachable", false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			out, ok := ping(t, ns, tt.args)
			require.Contains(t, out, tt.want)
			require.Equal(t, tt.ok, ok, out)
		})
	}
}

// Several pings at once, of one identifier each, and the answers to each are its
// own.
func TestPingManyAtOnce(t *testing.T) {
	newLAN(t)
	allowPing(t)
	_, ns := start(t, Config{})
	results := make(chan string)
	const pings = 8
	for i := range pings {
		dst := remote4
		if i%2 == 1 {
			dst = remote6
		}
		go func() {
			out, _ := ping(t, ns, "-c 20 -i 0.01 "+dst)
			results <- out
		}()
	}
	for range pings {
		require.Contains(t, <-results, "20 received, 0% packet loss")
	}
}

// Where the sysctl forbids ping sockets, the note says so, and what to do; and
// when it is allowed, no restart is needed.
func TestPingForbidden(t *testing.T) {
	host := newNS(t)
	within(t, host, func() {
		p := newPinger(testHostMap(), nil, nil, slog.New(slog.DiscardHandler))
		defer p.close()
		require.Contains(t, p.note(), "net.ipv4.ping_group_range")
		require.NoError(t, p.send(&stack.Echo{}, netip.MustParseAddr("127.0.0.1")), "neither sent nor the container's fault")

		allowPing(t)
		p.tried = time.Now().Add(-pingRetry)
		require.Empty(t, p.note())
	})
}
