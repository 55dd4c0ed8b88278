package integration

import (
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// TestBind checks on which addresses, interfaces and ports a forward listens.
func TestBind(t *testing.T) {
	t.Parallel()
	type target struct {
		dst  func(f family) netip.Addr
		port uint16
	}
	for _, c := range []struct {
		name   string
		opts   []string
		open   []target
		closed []target
		only   string
	}{
		{
			name: "every address", opts: []string{"-p", "8080:80"},
			open: []target{{fHost, 8080}, {fHost2, 8080}, {fEth1, 8080}}, closed: []target{{fHost, 80}},
		},
		{
			name: "one IPv4 address", opts: []string{"-p", "198.51.100.11:8080:80"}, only: "IPv4",
			open: []target{{fHost2, 8080}}, closed: []target{{fHost, 8080}, {fEth1, 8080}},
		},
		{
			name: "one IPv6 address", opts: []string{"-p", "[2001:db8:1::11]:8080:80"}, only: "IPv6",
			open: []target{{fHost2, 8080}}, closed: []target{{fHost, 8080}, {fEth1, 8080}},
		},
		{
			name: "one interface", opts: []string{"-p", "%eth1:8080:80"},
			open: []target{{fEth1, 8080}},
		},
		{
			name: "one port on two interfaces", opts: []string{"-p", "%eth0:8080:80", "-p", "%eth1:8080:80"},
			open: []target{{fHost, 8080}, {fEth1, 8080}},
		},
		{
			name: "one port on two addresses", only: "IPv4",
			opts: []string{"-p", "198.51.100.1:8080:80", "-p", "198.51.100.11:8080:80"},
			open: []target{{fHost, 8080}, {fHost2, 8080}}, closed: []target{{fEth1, 8080}},
		},
		{
			name: "range", opts: []string{"-p", "8000-8002:79-81"},
			open: []target{{fHost, 8001}},
		},
		{
			name: "pasta, port", opts: []string{"-t", "8080:80", "-u", "8080:80"},
			open: []target{{fHost, 8080}, {fHost2, 8080}}, closed: []target{{fHost, 80}},
		},
		{
			name: "pasta, one port to itself", opts: []string{"-t", "80", "-u", "80"},
			open: []target{{fHost, 80}}, closed: []target{{fHost, 8080}},
		},
		{
			name: "pasta, address", opts: []string{"-t", "198.51.100.11/8080:80", "-u", "198.51.100.11/8080:80"}, only: "IPv4",
			open: []target{{fHost2, 8080}}, closed: []target{{fHost, 8080}},
		},
		{
			name: "pasta, IPv6 address", opts: []string{"-t", "2001:db8:1::11/8080:80", "-u", "[2001:db8:1::11]/8080:80"}, only: "IPv6",
			open: []target{{fHost2, 8080}}, closed: []target{{fHost, 8080}},
		},
		{
			name: "pasta, interface", opts: []string{"-t", "%eth1/8080:80", "-u", "%eth1/8080:80"},
			open: []target{{fEth1, 8080}},
		},
		{
			name: "pasta, list and exclusion", opts: []string{"-t", "8080:80,8000-8009:80-89,~8001", "-u", "8080:80,8000-8009:80-89,~8001"},
			open: []target{{fHost, 8080}, {fHost, 8000}}, closed: []target{{fHost, 8001}},
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			tp := newTopo(t)
			opts := c.opts
			if !strings.HasPrefix(c.name, "pasta") {
				for i := range c.opts {
					if i%2 == 1 {
						opts = append(opts, "-p", c.opts[i]+"/udp")
					}
				}
			}
			tp.attach(t, opts...)
			tp.ctr.serveWho(t, 80, ipv4.any, ipv6.any)
			eachFamily(t, func(t *testing.T, f family) {
				if c.only != "" && c.only != f.name {
					return
				}
				for _, proto := range []string{"tcp", "udp"} {
					for _, to := range c.open {
						// From the address of the same link: a socket that
						// is bound to an interface answers by it alone.
						got, err := tp.client.who(t, proto, netip.Addr{}, netip.AddrPortFrom(to.dst(f), to.port))
						require.NoError(t, err, "%s %s port %d", proto, to.dst(f), to.port)
						require.Equal(t, got.local, got.by)
					}
					for _, to := range c.closed {
						_, err := tp.client.who(t, proto, f.client, netip.AddrPortFrom(to.dst(f), to.port))
						require.ErrorIs(t, err, unix.ECONNREFUSED, "%s %s port %d", proto, to.dst(f), to.port)
					}
				}
			})
		})
	}
}

// TestBindInterface: what comes in by another interface is not for the forward,
// even if sent to the interface's address.
func TestBindInterface(t *testing.T) {
	t.Parallel()
	tp := newTopo(t)
	tp.attach(t, "-p", "%eth1:8080:80")
	tp.ctr.serveWho(t, 80, ipv4.any, ipv6.any)
	// The client's way to eth0's net is by its eth0.
	eachFamily(t, func(t *testing.T, f family) {
		_, err := tp.client.who(t, "tcp", f.client, netip.AddrPortFrom(f.host, 8080))
		require.ErrorIs(t, err, unix.ECONNREFUSED)
		_, err = tp.host.who(t, "tcp", netip.Addr{}, netip.AddrPortFrom(f.loopback, 8080))
		require.ErrorIs(t, err, unix.ECONNREFUSED)
	})
}

// TestOneFamily: -4 and -6 leave the other family alone altogether.
func TestOneFamily(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		opt       string
		with, not family
	}{{"-4", ipv4, ipv6}, {"-6", ipv6, ipv4}} {
		t.Run(c.opt, func(t *testing.T) {
			t.Parallel()
			tp := newTopo(t)
			tp.attach(t, c.opt, "-p", "8080:80", "-p", "8080:80/udp")
			tp.ctr.serveWho(t, 80, ipv4.any, ipv6.any)
			for _, proto := range []string{"tcp", "udp"} {
				got, err := tp.client.who(t, proto, c.with.client, netip.AddrPortFrom(c.with.host, 8080))
				require.NoError(t, err)
				require.Equal(t, c.with.client, got.by.Addr())
				_, err = tp.client.who(t, proto, c.not.client, netip.AddrPortFrom(c.not.host, 8080))
				require.ErrorIs(t, err, unix.ECONNREFUSED)
			}
			_, err := tp.ctr.tryTCP(netip.Addr{}, netip.AddrPortFrom(c.not.client, 7000), patience)
			require.ErrorIs(t, err, unix.ENETUNREACH)
		})
	}
}

// TestFreePort: -p 80 takes a free port of the host and prints it.
func TestFreePort(t *testing.T) {
	t.Parallel()
	tp := newTopo(t)
	g := tp.attach(t, "-p", "80")
	tp.ctr.serveWho(t, 80, ipv4.any, ipv6.any)
	s := g.status(t, tp.host)
	require.Len(t, s.Forwards, 1)
	require.NotEmpty(t, s.Forwards[0].Bound)
	bound, err := netip.ParseAddrPort(s.Forwards[0].Bound[0])
	require.NoError(t, err)
	require.NotZero(t, bound.Port())
	require.Regexp(t, regexp.MustCompile(`\b`+strconv.Itoa(int(bound.Port()))+`\b`), g.log.String())
	eachFamily(t, func(t *testing.T, f family) {
		got, err := tp.client.who(t, "tcp", f.client, netip.AddrPortFrom(f.host, bound.Port()))
		require.NoError(t, err)
		require.Equal(t, f.client, got.by.Addr())
	})
}

// TestWholeRange publishes a range to one of the same length, and each port leads
// to its own.
func TestWholeRange(t *testing.T) {
	t.Parallel()
	tp := newTopo(t)
	tp.attach(t, "-p", "8000-8004:9000-9004")
	for port := uint16(9000); port <= 9004; port++ {
		l := tp.ctr.listenTCP(t, ipv4.any, port)
		go greet(l, fmt.Sprint(port))
	}
	for port := uint16(8000); port <= 8004; port++ {
		c := tp.client.dialTCP(t, netip.Addr{}, netip.AddrPortFrom(ipv4.host, port))
		b, err := io.ReadAll(c)
		require.NoError(t, err)
		require.Equal(t, fmt.Sprint(port+1000), string(b))
	}
}

// TestThousandsOfPorts publishes a range of 60,000 ports, or of as many as the limit
// of open files allows; one port more is published beside it, and more than the
// limit are refused before anything is bound.
func TestThousandsOfPorts(t *testing.T) {
	tp := newTopo(t)
	const first, all = 2001, 60_000
	count := min(all, nofile(t)-200)
	t.Logf("%d ports: RLIMIT_NOFILE is %d", count, nofile(t))
	ports := func(n int) string { return fmt.Sprintf("%d-%d:%[1]d-%d", first, first+n-1, first+n-1) }

	r := tp.host.runCmd(t, exec.Command("sh", "-c", `ulimit -n 1000; exec "$0" "$@"`,
		os.Getenv(binEnv), "attach", "--netns", tp.ctr.path, "-p", ports(all)))
	require.Equal(t, 1, r.code)
	require.Regexp(t, `^gofwd: bind ports: 60000 sockets are needed, and [89]\d\d are allowed: too many open files; the limit of open files is 1000, `, r.stderr)

	last := uint16(first + count - 1)
	served := []uint16{first, last, 80}
	for _, port := range served {
		tp.ctr.serveWho(t, port, ipv4.any, ipv6.any)
	}
	g := tp.attach(t, "-p", ports(count))
	t.Logf("%d MiB", g.rss(t)>>20)
	tp.host.output(t, os.Getenv(binEnv), "ports", "--name", g.name, "add", "1999:80")
	reached := func(port uint16) {
		t.Helper()
		eachFamily(t, func(t *testing.T, f family) {
			got, err := tp.client.who(t, "tcp", f.client, netip.AddrPortFrom(f.host, port))
			require.NoError(t, err)
			require.Equal(t, f.client, got.by.Addr())
		})
	}
	for _, port := range []uint16{first, last, 1999} {
		reached(port)
	}
	tp.host.output(t, os.Getenv(binEnv), "ports", "--name", g.name, "set", "1999:80")
	reached(1999)
	_, err := tp.host.tryTCP(netip.Addr{}, netip.AddrPortFrom(ipv4.loopback, last), patience)
	require.ErrorIs(t, err, unix.ECONNREFUSED)
}
