package forward

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
)

// fakeDialer is a path that leads to listeners of the test, by destination.
type fakeDialer struct {
	name    string
	servers map[string]func() (flowConn, error) // by dst
	dialled *[]string
}

func (d fakeDialer) DialTCP(_ context.Context, src, dst netip.AddrPort) (flowConn, error) {
	if d.dialled != nil {
		*d.dialled = append(*d.dialled, d.name+" "+src.String()+" "+dst.String())
	}
	if server := d.servers[dst.String()]; server != nil {
		return server()
	}
	return nil, refused("connect", syscall.ECONNREFUSED)
}

func refused(call string, err error) error {
	return &net.OpError{Op: "dial", Net: "tcp", Err: os.NewSyscallError(call, err)}
}

func TestPathRoutes(t *testing.T) {
	const guest4, guest6 = "10.0.2.100", "fd67:6f66:7764::100"
	tap, kernel, local := fakeDialer{name: "tap"}, fakeDialer{name: "kernel"}, fakeDialer{name: "local"}
	loopback := testHostMap()
	loopback.loopbackToLoopback = true
	only4 := testHostMap()
	only4.guest = only4.guest[:1]
	onlyTap := &paths{addrs: testHostMap(), tap: tap, local: local, noKernel: "not here"}
	both := &paths{addrs: testHostMap(), tap: tap, local: local, kernel: kernel}

	for _, tt := range []struct {
		name   string
		p      *paths
		target string
		client string
		want   []string
	}{
		{"tap v4", onlyTap, "", "203.0.113.7:4444", []string{
			"tap 203.0.113.7:4444 " + guest4 + ":80", "tap [fd67:6f66:7764::1]:4444 [" + guest6 + "]:80",
		}},
		{"tap v6", onlyTap, "", "[2001:db8::7]:4444", []string{
			"tap [2001:db8::7]:4444 [" + guest6 + "]:80", "tap 169.254.1.2:4444 " + guest4 + ":80",
		}},
		{"dual-stack listener", onlyTap, "", "[::ffff:203.0.113.7]:4444", []string{
			"tap 203.0.113.7:4444 " + guest4 + ":80", "tap [fd67:6f66:7764::1]:4444 [" + guest6 + "]:80",
		}},
		{"one family only", &paths{addrs: only4, tap: tap}, "", "[2001:db8::7]:4444", []string{"tap 169.254.1.2:4444 " + guest4 + ":80"}},
		{"target of the rule", onlyTap, "10.0.2.101", "203.0.113.7:4444", []string{"tap 203.0.113.7:4444 10.0.2.101:80"}},
		{"target of the other family", onlyTap, "10.0.2.101", "[2001:db8::7]:4444", []string{"tap 169.254.1.2:4444 10.0.2.101:80"}},
		{"target on the loopback", onlyTap, "127.0.0.1", "203.0.113.7:4444", []string{"local 203.0.113.7:4444 127.0.0.1:80"}},
		{"kernel", both, "", "203.0.113.7:4444", []string{
			"kernel 203.0.113.7:4444 " + guest4 + ":80", "kernel [fd67:6f66:7764::1]:4444 [" + guest6 + "]:80",
		}},
		{"a link-local client has no kernel path", both, "", "[fe80::7%eth0]:4444", []string{
			"tap [fe80::7]:4444 [" + guest6 + "]:80", "kernel 169.254.1.2:4444 " + guest4 + ":80",
		}},
		{"loopback to loopback", &paths{addrs: loopback, tap: tap, local: local}, "", "[::1]:4444", []string{
			"local [::1]:4444 [::1]:80", "local 127.0.0.1:4444 127.0.0.1:80",
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			rule := Rule{Proto: TCP}
			if tt.target != "" {
				rule.Target = netip.MustParseAddr(tt.target)
			}
			var got []string
			for _, r := range tt.p.routes(rule, netip.MustParseAddrPort(tt.client), 80) {
				name := r.dialer.(fakeDialer).name
				require.Equal(t, name == "tap", r.path == Tap)
				got = append(got, name+" "+r.src.String()+" "+r.dst.String())
			}
			require.Equal(t, tt.want, got)
		})
	}

	path, reason := onlyTap.describe(Rule{Proto: TCP})
	require.Equal(t, Tap, path)
	require.Equal(t, "not here", reason)
	path, reason = both.describe(Rule{Proto: TCP})
	require.Equal(t, Kernel, path)
	require.Empty(t, reason)
}

func TestPathDial(t *testing.T) {
	open := func() (flowConn, error) {
		_, c := tcpPair(t)
		return c, nil
	}
	fail := func(err error) func() (flowConn, error) {
		return func() (flowConn, error) { return nil, refused("connect", err) }
	}
	const at4, at6 = "10.0.2.100:80", "[fd67:6f66:7764::100]:80"
	for _, tt := range []struct {
		name    string
		servers map[string]func() (flowConn, error)
		want    string
		err     error
		dials   int
	}{
		{"own family", map[string]func() (flowConn, error){at4: open, at6: open}, at4, nil, 1},
		{"refused, so the other family", map[string]func() (flowConn, error){at6: open}, at6, nil, 2},
		{"refused by both", nil, "", syscall.ECONNREFUSED, 2},
		{"unreachable is no matter of family", map[string]func() (flowConn, error){at4: fail(syscall.EHOSTUNREACH), at6: open}, "", syscall.EHOSTUNREACH, 1},
		{"the first error counts", map[string]func() (flowConn, error){at6: fail(syscall.EHOSTUNREACH)}, "", syscall.ECONNREFUSED, 2},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var dialled []string
			p := &paths{addrs: testHostMap(), tap: fakeDialer{"tap", tt.servers, &dialled}}
			c, r, err := dial(t.Context(), p.routes(Rule{Proto: TCP}, netip.MustParseAddrPort("203.0.113.7:4444"), 80))
			require.ErrorIs(t, err, tt.err)
			require.Len(t, dialled, tt.dials)
			if err == nil {
				require.NotNil(t, c)
				require.Equal(t, tt.want, r.dst.String())
			}
		})
	}
}

// One port of a client can't be used twice for the same server: it keeps its
// address then, and gets another port.
func TestPathDialPortTaken(t *testing.T) {
	for _, taken := range []error{syscall.EADDRINUSE, syscall.EADDRNOTAVAIL} {
		var dialled []string
		p := &paths{addrs: testHostMap(), tap: fakeDialer{name: "tap", dialled: &dialled}}
		_, c := tcpPair(t)
		p.tap = takenDialer{p.tap, taken, c}
		_, _, err := dial(t.Context(), p.routes(Rule{Proto: TCP}, netip.MustParseAddrPort("203.0.113.7:4444"), 80))
		require.NoError(t, err)
		require.Equal(t, []string{"tap 203.0.113.7:4444 10.0.2.100:80", "tap 203.0.113.7:0 10.0.2.100:80"}, dialled)
	}
}

// takenDialer says that every port is taken that was asked for.
type takenDialer struct {
	dialer
	err  error
	conn flowConn
}

func (d takenDialer) DialTCP(ctx context.Context, src, dst netip.AddrPort) (flowConn, error) {
	d.dialer.DialTCP(ctx, src, dst)
	if src.Port() != 0 {
		return nil, refused("bind", d.err)
	}
	return d.conn, nil
}

func TestPathDialWithoutAddress(t *testing.T) {
	p := &paths{addrs: &hostMap{}}
	_, _, err := dial(t.Context(), p.routes(Rule{Proto: TCP}, netip.MustParseAddrPort("203.0.113.7:4444"), 80))
	require.EqualError(t, err, "the container has no address that fits")
	require.False(t, errors.Is(err, syscall.ECONNREFUSED))
}
