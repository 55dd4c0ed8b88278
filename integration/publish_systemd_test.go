package integration

import (
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// systemd is a systemd(1) of a user, with units of ours, on a node.
type systemd struct {
	node *node
	home string
}

// startSystemd starts one that has the units of contrib/systemd, each with an
// addition of the test's.
func (n *node) startSystemd(t *testing.T, additions map[string]string) *systemd {
	t.Helper()
	need(t, "systemd", "systemctl", "unshare")
	s := &systemd{n, t.TempDir()}
	units := filepath.Join(s.home, ".config/systemd/user")
	require.NoError(t, os.CopyFS(units, os.DirFS("../contrib/systemd")))
	for unit, text := range additions {
		dir := filepath.Join(units, unit+".d")
		require.NoError(t, os.Mkdir(dir, 0o755))
		require.NoError(t, os.WriteFile(filepath.Join(dir, "test.conf"), []byte(text), 0o644))
	}
	group := newCgroup(t)
	// The manager has its own cgroup for the root of all, and thinks that the
	// system was booted by systemd (sd_booted(3)).
	cmd := exec.Command("sh", "-c", `set -e
		mkdir -p /run/systemd/system
		echo $$ > "$0/cgroup.procs"
		exec unshare --cgroup --mount sh -c '
			mount -t cgroup2 cgroup2 /sys/fs/cgroup
			exec "$0" --user --log-target=console' "$(command -v systemd)"`, group)
	cmd.Env = append(os.Environ(), "HOME="+s.home, "XDG_CONFIG_HOME="+filepath.Join(s.home, ".config"))
	n.startCmd(t, cmd)
	eventually(t, "systemd does not answer", func() bool {
		return s.systemctl(t, "is-system-running").stdout == "running\n"
	})
	return s
}

func (s *systemd) systemctl(t *testing.T, args ...string) result {
	t.Helper()
	return s.node.run(t, append([]string{"systemctl", "--user"}, args...)...)
}

// newCgroup makes a cgroup below that of the tests, which is to be delegated to
// their user, as systemd does with all that it runs for one.
func newCgroup(t *testing.T) string {
	t.Helper()
	mounts, err := os.ReadFile("/proc/self/mounts")
	require.NoError(t, err)
	own, err := os.ReadFile("/proc/self/cgroup")
	require.NoError(t, err)
	root := ""
	const how = "run the tests by systemd-run --user --pty"
	for line := range strings.Lines(string(mounts)) {
		if f := strings.Fields(line); f[2] == "cgroup2" {
			root = f[1]
			break
		}
	}
	if root == "" {
		skip(t, "no cgroup2 is mounted (%s)", how)
	}
	for line := range strings.Lines(string(own)) {
		if path, ok := strings.CutPrefix(line, "0::"); ok {
			root = filepath.Join(root, strings.TrimSpace(path))
		}
	}
	dir, err := os.MkdirTemp(root, "gofwd-test-") //nolint:usetesting // a cgroup, not a directory of files
	if err != nil {
		skip(t, "no cgroup of this user's own (%s): %v", how, err)
	}
	t.Cleanup(func() {
		// Directories only, the deepest first; the last process takes a moment
		// to go.
		eventually(t, "the cgroup is not empty", func() bool {
			return exec.Command("find", dir, "-depth", "-type", "d", "-exec", "rmdir", "{}", "+").Run() == nil
		})
	})
	return dir
}

// TestSystemdUnits: the units of contrib/systemd under a real systemd, which binds
// ports below 1024, one of them on one interface, for a gofwd without any right to
// that.
func TestSystemdUnits(t *testing.T) {
	need(t, "socat", "setpriv")
	tp := newTopo(t)
	const service = "[Service]\nExecStart=\nExecStart=setpriv --bounding-set=-all,+setfcap --inh-caps=-all %s" +
		" run --name %%i $GOFWD_PORTS -- socat TCP4-LISTEN:8080,fork,reuseaddr SYSTEM:'echo $$SOCAT_PEERADDR'\n"
	s := tp.host.startSystemd(t, map[string]string{
		"gofwd@.service": fmt.Sprintf(service, os.Getenv(binEnv)),
		// Of other interfaces systemd waits for udev to announce them.
		"gofwd@lo.socket": "[Socket]\nListenStream=\nListenStream=81\nBindToDevice=lo\n",
	})
	for name, c := range map[string]struct {
		from     *node
		dst      netip.AddrPort
		seen     string
		notThere netip.AddrPort
	}{
		"web": {tp.client, netip.AddrPortFrom(ipv4.host, 80), ipv4.client.String(), netip.AddrPortFrom(ipv4.host, 82)},
		"lo":  {tp.host, netip.AddrPortFrom(ipv4.loopback, 81), "169.254.1.2", netip.AddrPortFrom(ipv4.host, 81)},
	} {
		t.Run(name, func(t *testing.T) {
			env := filepath.Join(s.home, ".config/gofwd", name+".env")
			require.NoError(t, os.MkdirAll(filepath.Dir(env), 0o755))
			require.NoError(t, os.WriteFile(env, []byte("GOFWD_PORTS=-p systemd:"+name+":8080\n"), 0o644))
			socket, service := "gofwd@"+name+".socket", "gofwd@"+name+".service"
			r := s.systemctl(t, "start", socket)
			require.Zero(t, r.code, "%s", r.stderr)
			require.Equal(t, "inactive\n", s.systemctl(t, "is-active", service).stdout)
			for range 2 { // the socket outlives the service, and starts it again
				eventually(t, "no answer", func() bool { return c.from.hear(c.dst) == c.seen })
				// It says that it is ready after it has begun to answer.
				eventually(t, service+" is not active", func() bool {
					return s.systemctl(t, "is-active", service).stdout == "active\n"
				})
				_, err := tp.client.tryTCP(netip.Addr{}, c.notThere, patience)
				require.ErrorIs(t, err, unix.ECONNREFUSED)
				require.Zero(t, s.systemctl(t, "stop", service).code)
			}
		})
	}
}

// hear connects and returns what the server says, or why nothing.
func (n *node) hear(dst netip.AddrPort) string {
	c, err := n.tryTCP(netip.Addr{}, dst, patience)
	if err != nil {
		return err.Error()
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(patience))
	got, _ := io.ReadAll(c)
	return strings.TrimSpace(string(got))
}
