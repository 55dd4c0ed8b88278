package integration

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/gofwd/gofwd/netnsutil"
)

// container is one that gVisor runs, with the host's files, and programs of the host
// in it. Its stack is gVisor's own.
type container struct {
	*proc
	host   *node
	runsc  []string // the program, and the options that all of its commands take
	id     string
	bundle string
}

// guestScript serves as serveWho does on port 80, and echoes on port 7. It says so
// when it serves both families.
const guestScript = `
serve() {
	socat UDP$1-RECVFROM:80,fork$2 SYSTEM:'echo $SOCAT_PEERADDR\:$SOCAT_PEERPORT .' &
	socat TCP$1-LISTEN:80,fork$2 SYSTEM:'echo $SOCAT_PEERADDR\:$SOCAT_PEERPORT' &
	socat -t 30 TCP$1-LISTEN:7,fork$2 PIPE &
}
serve 4
serve 6 ,ipv6only
for server in TCP4:127.0.0.1:80 TCP4:127.0.0.1:7 'TCP6:[::1]:80' 'TCP6:[::1]:7'; do
	until socat -u OPEN:/dev/null "$server" 2>/dev/null; do sleep 0.05; done
done
echo serving
wait`

// newContainer prepares a container whose network namespace is at path, or is made by
// runsc if path is empty. hooks are those of the OCI.
func newContainer(t *testing.T, host *node, path string, hooks, annotations map[string]any) *container {
	t.Helper()
	need(t, "socat", "curl", "dig")
	c := &container{host: host, id: strings.ReplaceAll(t.Name(), "/", "-"), bundle: t.TempDir()}
	root := filepath.Join(runtimeDir, c.id) // no TempDir: runsc leaves a mount in it
	c.runsc = []string{findRunsc(t), "--root", root, "--network=sandbox", "--ignore-cgroups"}
	resolvConf := filepath.Join(c.bundle, "resolv.conf")
	require.NoError(t, os.WriteFile(resolvConf, fmt.Appendf(nil, "nameserver %s\n", ipv4.dns), 0o644))
	netns := map[string]any{"type": "network"}
	if path != "" {
		netns["path"] = path
	}
	spec := map[string]any{
		"ociVersion": "1.0.0",
		"process": map[string]any{
			"user": map[string]any{"uid": 0, "gid": 0}, "cwd": "/",
			"env":          []string{"PATH=" + os.Getenv("PATH")},
			"args":         []string{"sh", "-c", guestScript},
			"capabilities": map[string]any{"bounding": guestCaps, "effective": guestCaps, "permitted": guestCaps},
		},
		"root": map[string]any{"path": "/", "readonly": true},
		"mounts": []map[string]any{
			{"destination": "/proc", "type": "proc"},
			{"destination": "/dev", "type": "tmpfs"},
			{"destination": "/etc/resolv.conf", "type": "bind", "source": resolvConf},
		},
		"linux":       map[string]any{"namespaces": []any{netns, map[string]any{"type": "pid"}, map[string]any{"type": "mount"}}},
		"hooks":       hooks,
		"annotations": annotations,
	}
	b, err := json.Marshal(spec)
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(filepath.Join(c.bundle, "config.json"), b, 0o644))
	return c
}

var guestCaps = []string{"CAP_NET_BIND_SERVICE"}

// findRunsc returns where gVisor's runsc is, in the PATH or where make puts it.
func findRunsc(t *testing.T) string {
	t.Helper()
	if path, err := exec.LookPath("runsc"); err == nil {
		return path
	}
	path, err := filepath.Abs("../bin/runsc")
	require.NoError(t, err)
	if _, err := os.Stat(path); err != nil {
		skip(t, "runsc is neither in the PATH nor in bin/: make runsc")
	}
	return path
}

// run starts the container, and waits until it serves.
func (c *container) run(t *testing.T) {
	t.Helper()
	c.proc = c.host.start(t, slices.Concat(c.runsc, []string{"run", "--bundle", c.bundle, c.id})...)
	t.Cleanup(c.delete)
	c.waitLog(t, "serving")
}

// delete ends the container, whose processes are in no group of ours.
func (c *container) delete() {
	_ = exec.Command(c.runsc[0], slices.Concat(c.runsc[1:], []string{"delete", "--force", c.id})...).Run()
}

// exec runs a program in the container.
func (c *container) exec(t *testing.T, argv ...string) result {
	t.Helper()
	return c.host.run(t, slices.Concat(c.runsc, []string{"exec", c.id}, argv)...)
}

// TestRunsc: a container that gVisor's own runsc runs in a namespace of gofwd's is
// reached with its clients' addresses, and gets out, on either datapath, and gofwd
// leaves alone what runsc has taken from the namespace.
func TestRunsc(t *testing.T) {
	t.Parallel()
	for _, datapath := range []string{"auto", "tap"} {
		t.Run(datapath, func(t *testing.T) {
			t.Parallel()
			tp := newTopo(t)
			c := newContainer(t, tp.host, tp.ctr.path, nil, nil)
			tp.client.startDNS(t, ipv4.client, addr("192.0.2.11"))
			tp.client.serveWho(t, 9000, ipv4.client, ipv6.client)
			_, wrap := withEtc(t, "nameserver "+ipv4.client.String()+"\n")
			g := tp.host.startGofwdCmd(t, tp.ctr.id, wrap(gofwdCmd("attach", "--netns", tp.ctr.path,
				"--datapath", datapath, "-p", "8080:80", "-p", "5300:80/udp", "-p", "7007:7")))
			c.run(t)
			eachFamily(t, func(t *testing.T, f family) {
				c.requireReached(t, tp, f, datapath == "tap")
				c.requireEcho(t, tp, f)
				c.requireGetsOut(t, tp, f)
			})
			status := tp.host.output(t, os.Getenv(binEnv), "status", g.name)
			if datapath == "tap" {
				require.Contains(t, status, "the tap path was asked for")
			} else {
				require.Contains(t, status, "no socket of the namespace's kernel listens on port 80, but a guest does")
				require.Contains(t, status, "connections were not begun by the namespace's kernel")
			}
			require.NoError(t, tp.ctr.ns.Do(func() error {
				link, err := netnsutil.ReadLink("tap0")
				require.Empty(t, link.Addrs, "what runsc has taken is back")
				return err
			}))
		})
	}
}

// requireReached asks the container who its clients are. The first of a port is seen
// with another port if it was not known before that there is a guest.
func (c *container) requireReached(t *testing.T, tp *topo, f family, portKept bool) {
	t.Helper()
	for range 2 {
		got, err := tp.client.who(t, "tcp", f.client2, netip.AddrPortFrom(f.host, 8080))
		require.NoError(t, err)
		require.Equal(t, f.client2, got.by.Addr())
		if portKept {
			require.Equal(t, got.local, got.by)
		}
		portKept = true
	}
	got, err := tp.client.who(t, "udp", f.client2, netip.AddrPortFrom(f.host, 5300))
	require.NoError(t, err)
	require.Equal(t, got.local, got.by)
}

// requireEcho sends the container a lot, which it sends back. gVisor's packet socket
// takes and gives segments that are larger than the MTU.
func (c *container) requireEcho(t *testing.T, tp *topo, f family) {
	t.Helper()
	conn := tp.client.dialTCP(t, netip.Addr{}, netip.AddrPortFrom(f.host, 7007))
	requireTransfer(t, conn, conn, noise(7, 4<<20))
}

// requireGetsOut has the container speak to the client, over TCP, UDP and DNS, and
// to a port that refuses.
func (c *container) requireGetsOut(t *testing.T, tp *topo, f family) {
	t.Helper()
	peer := netip.AddrPortFrom(f.client, 9000).String()
	r := c.exec(t, "socat", "-u", "TCP:"+peer, "-")
	require.Contains(t, r.stdout, f.host.String(), r.stderr)
	r = c.exec(t, "sh", "-c", "echo question | socat -t 2 - UDP:"+peer)
	require.Contains(t, r.stdout, "question", r.stderr)
	r = c.exec(t, "dig", "@"+f.dns.String(), "+short", "who.test", "A")
	require.Equal(t, "192.0.2.11\n", r.stdout, r.stderr)
	r = c.exec(t, "curl", "-sS", "--max-time", "10", url(f.client, 9))
	require.Contains(t, r.stderr, "connect to server")
}

// TestRunscHook: an OCI hook gives each start of a container that runsc runs a network
// before runsc takes that over, a restart too.
func TestRunscHook(t *testing.T) {
	t.Parallel()
	tp := newTopo(t)
	c := newContainer(t, tp.host, "", map[string]any{
		"createRuntime": []any{map[string]any{
			"path": os.Getenv(binEnv), "args": []string{"gofwd", "hook"},
			"env": []string{"PATH=" + os.Getenv("PATH"), "XDG_RUNTIME_DIR=" + runtimeDir},
		}},
	}, map[string]any{"gofwd.publish": "8080:80 5300:80/udp"})
	for range 2 {
		c.run(t)
		eachFamily(t, func(t *testing.T, f family) { c.requireReached(t, tp, f, false) })
		c.delete()
		// gofwd ends with the namespace.
		eventually(t, "port 8080 is still listened on", func() bool { return !tp.host.listening("tcp", 8080) })
	}
}
