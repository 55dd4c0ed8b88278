package integration

import (
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// activated returns the command line of gofwd attach under
// systemd-socket-activate(1), which binds sockets, waits for the first client and
// then runs gofwd as systemd would.
func (tp *topo) activated(sockets []string, opts ...string) *exec.Cmd {
	argv := append(append(sockets, "--setenv", "XDG_RUNTIME_DIR"), os.Getenv(binEnv), "attach", "--netns", tp.ctr.path, "--name", tp.ctr.id)
	return exec.Command("systemd-socket-activate", append(argv, opts...)...)
}

// TestSystemdSockets: sockets that systemd bound are the host's side of a forward,
// for servers that know nothing of it, and they see their clients.
func TestSystemdSockets(t *testing.T) {
	t.Parallel()
	need(t, "systemd-socket-activate")
	t.Run("TCP", func(t *testing.T) {
		t.Parallel()
		tp := newTopo(t)
		tp.ctr.serveWho(t, 8080, ipv4.any, ipv6.any)
		// A port below 1024, for which gofwd itself needs no right.
		tp.host.startCmd(t, tp.activated([]string{"--listen", "[::]:80", "--listen", "[::]:443", "--fdname", "web:tls"},
			"-p", "systemd:web:8080", "-p", "systemd:tls:8443"))
		tp.host.waitPort(t, "tcp", 80)
		eachFamily(t, func(t *testing.T, f family) {
			got, err := tp.client.who(t, "tcp", f.client, netip.AddrPortFrom(f.host, 80))
			require.NoError(t, err)
			require.Equal(t, f.client, got.by.Addr())
		})
		s := (&gofwd{name: tp.ctr.id}).status(t, tp.host)
		require.Len(t, s.Forwards, 2)
		require.Equal(t, []string{"[::]:443"}, s.Forwards[1].Bound)
	})
	t.Run("UDP", func(t *testing.T) {
		t.Parallel()
		tp := newTopo(t)
		tp.ctr.serveWho(t, 8080, ipv4.any, ipv6.any)
		tp.host.startCmd(t, tp.activated([]string{"--datagram", "--listen", "198.51.100.1:80", "--fdname", "dns"}, "-p", "systemd:dns:8080/udp"))
		tp.host.waitPort(t, "udp", 80)
		eventually(t, "an answer", func() bool {
			got, err := tp.client.who(t, "udp", ipv4.client, netip.AddrPortFrom(ipv4.host, 80))
			return err == nil && got.by.Addr() == ipv4.client
		})
	})
	t.Run("UNIX", func(t *testing.T) {
		t.Parallel()
		tp := newTopo(t)
		tp.ctr.nginx(t, "listen 8080; location / { return 200 hello; }")
		path := filepath.Join(t.TempDir(), "web.sock")
		tp.host.startCmd(t, tp.activated([]string{"--listen", path, "--fdname", "web"}, "-p", "systemd:web:8080"))
		eventually(t, "no socket", func() bool { _, err := os.Stat(path); return err == nil })
		require.Equal(t, "hello", tp.host.output(t, "curl", "-sS", "--retry", "5", "--retry-all-errors", "--unix-socket", path, "http://web/"))
	})
	t.Run("no such name", func(t *testing.T) {
		t.Parallel()
		tp := newTopo(t)
		p := tp.host.startCmd(t, tp.activated([]string{"--listen", "[::]:80", "--fdname", "web"}, "-p", "systemd:www:8080"))
		tp.host.waitPort(t, "tcp", 80)
		c, err := tp.host.tryTCP(netip.Addr{}, netip.AddrPortFrom(ipv4.loopback, 80), time.Second)
		require.NoError(t, err)
		defer c.Close()
		require.Equal(t, 1, p.exit(t, patience))
		p.waitLog(t, `gofwd: listen on systemd:www: no socket of that name was passed, only "web"`)
	})
}
