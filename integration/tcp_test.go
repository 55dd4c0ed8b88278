package integration

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
)

// startNginx serves a page on port 80 of the container, both families, and
// returns its access log: one address and port a line.
func (tp *topo) startNginx(t *testing.T) (accessLog string) {
	t.Helper()
	need(t, "nginx")
	dir := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(dir, "index.html"), []byte("served in the container\n"), 0o644))
	accessLog = filepath.Join(dir, "access.log")
	conf := filepath.Join(dir, "nginx.conf")
	require.NoError(t, os.WriteFile(conf, fmt.Appendf(nil, `
		daemon off;
		master_process off;
		user root;
		pid %[1]s/pid;
		error_log stderr;
		events {}
		http {
			log_format source "$remote_addr $remote_port";
			access_log %[1]s/access.log source;
			client_body_temp_path %[1]s/body; proxy_temp_path %[1]s/proxy;
			fastcgi_temp_path %[1]s/fastcgi; uwsgi_temp_path %[1]s/uwsgi; scgi_temp_path %[1]s/scgi;
			server { listen 80; listen [::]:80; root %[1]s; }
		}`, dir), 0o644))
	tp.ctr.start(t, "nginx", "-c", conf, "-e", "stderr")
	tp.ctr.waitPort(t, "tcp", 80)
	return accessLog
}

// TestNginx is the main job with real programs: curl on three machines, and what
// nginx writes into its log.
func TestNginx(t *testing.T) {
	t.Parallel()
	need(t, "curl")
	tp := newTopo(t)
	accessLog := tp.startNginx(t)
	tp.attach(t, "-p", "8080:80")
	eachFamily(t, func(t *testing.T, f family) {
		for _, c := range []struct {
			from     *node
			src, dst netip.Addr
			seen     netip.Addr
		}{
			{tp.client, f.client, f.host, f.client},
			{tp.client, f.client2, f.host2, f.client2},
			{tp.client, f.client, f.hostEth1, f.client},
			{tp.host, f.host, f.host, f.host},
			{tp.host, f.loopback, f.loopback, f.alias},
		} {
			require.NoError(t, os.Truncate(accessLog, 0))
			// %{local_port} is what the log must show.
			out := c.from.output(t, "curl", "-sS", "--max-time", "10", "-g", "--interface", c.src.String(),
				"-w", "%{local_port}", url(c.dst, 8080))
			var page, port string
			_, err := fmt.Sscanf(out, "served in the %s %s", &page, &port)
			require.NoError(t, err, "%q", out)
			var log []byte
			eventually(t, "no line in nginx's access log", func() bool {
				log, err = os.ReadFile(accessLog)
				require.NoError(t, err)
				return len(log) > 0
			})
			require.Equal(t, fmt.Sprintf("%s %s\n", c.seen, port), string(log), "%s to %s", c.src, c.dst)
		}
	})
}
