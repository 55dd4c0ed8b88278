package integration

import (
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// pastaDaemon is a row about a pasta that serves a namespace that exists.
type pastaDaemon struct {
	options string
	name    string
	check   func(t *testing.T, tp *topo, p pastaProgram)
}

// TestPastaDaemons runs each row.
func TestPastaDaemons(t *testing.T) {
	t.Parallel()
	programs := pastaPrograms(t)
	for _, row := range pastaDaemons {
		for _, p := range programs {
			if !p.does(row.options) {
				continue
			}
			t.Run(p.name+" "+row.name, func(t *testing.T) {
				t.Parallel()
				row.check(t, newTopo(t), p)
			})
		}
	}
}

var pastaDaemons = []pastaDaemon{
	{"--netns --pid", "returns when ready, keeps nothing, and writes its pid", pastaReady},
	{"--netns", "quits at once when the namespace's name goes", pastaNameGone},
	{"--no-netns-quit", "stays when the namespace's name goes", pastaNameGoneStays},
	{"--userns", "joins a user namespace", pastaUserNS},
	{"", "joins the namespaces of a process", pastaPID},
	{"--foreground", "stays in the foreground", pastaForeground},
	{"--quiet", "says nothing", pastaQuiet},
	{"--log-file --log-size --debug", "logs to a file of limited size", pastaLogFile},
	{"--tcp-ports --udp-ports", "publishes ports", pastaPorts},
	{"--tcp-ports --udp-ports", "publishes what is bound", pastaAutoPorts},
	{"--tcp-ns --udp-ns", "forwards to the host's loopback", pastaOutPorts},
	{"--host-lo-to-ns-lo", "leads to the container's loopback", pastaLoopback},
	{"--no-splice", "takes the tap", pastaNoSplice},
	{"--splice-only", "publishes to the loopback alone", pastaSpliceOnly},
	{"--conf-path", "serves pesto", pastaPesto},
	{"", "exits with 1 when a port is busy", pastaBusy},
	{"", "serves a container that configures itself", pastaSelfConfigured},
	{"--no-splice", "serves it by the tap", pastaSelfConfiguredTap},
}

// pasta starts the program for the container, which it configures, and returns its
// pid once it is in the background.
func (tp *topo) pasta(t *testing.T, p pastaProgram, opts ...string) int {
	t.Helper()
	return tp.barePasta(t, p, append([]string{"--config-net"}, opts...)...)
}

// barePasta is pasta for a container that configures itself.
func (tp *topo) barePasta(t *testing.T, p pastaProgram, opts ...string) int {
	t.Helper()
	file := filepath.Join(t.TempDir(), "pid")
	argv := slices.Concat([]string{p.path, "-P", file}, noPortsBut(strings.Join(opts, " ")), opts)
	if !slices.Contains(opts, "--userns") && !slices.Contains(opts, "--") {
		argv = append(argv, "--netns", tp.ctr.path)
	}
	argv = slices.DeleteFunc(argv, func(s string) bool { return s == "--" })
	r := tp.host.run(t, argv...)
	require.Zero(t, r.code, "%v: %s%s", argv, r.stdout, r.stderr)
	pid := readPID(t, file)
	t.Cleanup(func() {
		_ = unix.Kill(pid, unix.SIGTERM)
		requireGone(t, []int{pid})
	})
	return pid
}

func readPID(t *testing.T, file string) int {
	t.Helper()
	b, err := os.ReadFile(file)
	require.NoError(t, err)
	pid, err := strconv.Atoi(strings.TrimSuffix(string(b), "\n"))
	require.NoError(t, err, "%q", b)
	return pid
}

// requireWho asks a serveWho server.
func requireWho(t *testing.T, from *node, proto, dst string) seen {
	t.Helper()
	got, err := from.who(t, proto, netip.Addr{}, netip.MustParseAddrPort(dst))
	require.NoError(t, err, "%s %s from %s", proto, dst, from.name)
	return got
}

// Podman waits for the exit code and for the end of the output, has descriptors
// that nobody may keep, and connects at once.
func pastaReady(t *testing.T, tp *topo, p pastaProgram) {
	tp.ctr.serveWho(t, 80, ipv4.any)
	file := filepath.Join(t.TempDir(), "pid")
	output, w, err := os.Pipe()
	require.NoError(t, err)
	defer output.Close()
	extra, held, err := os.Pipe()
	require.NoError(t, err)
	defer extra.Close()
	cmd := exec.Command(p.path, append(noPortsBut("-t"), "--config-net", "-t", "8080:80", "-q", "-P", file, "--netns", tp.ctr.path)...)
	cmd.Stdout, cmd.Stderr, cmd.ExtraFiles = w, w, []*os.File{nil, held} // descriptor 4
	proc := tp.host.startCmd(t, cmd)
	w.Close()
	held.Close()
	require.Zero(t, proc.exit(t, patience))
	pid := readPID(t, file)
	t.Cleanup(func() { _ = unix.Kill(pid, unix.SIGTERM) })
	requireWho(t, tp.client, "tcp", "198.51.100.1:8080")

	for what, f := range map[string]*os.File{"standard output": output, "descriptor 4": extra} {
		require.NoError(t, f.SetReadDeadline(time.Now().Add(time.Second)))
		said, err := io.ReadAll(f)
		require.NoError(t, err, "%s is held open", what)
		require.Empty(t, said)
	}
	st, err := os.Stat(file)
	require.NoError(t, err)
	require.Equal(t, os.FileMode(0o600), st.Mode().Perm())
	require.True(t, alive(pid))
	session, err := unix.Getsid(pid)
	require.NoError(t, err)
	own, err := unix.Getsid(0)
	require.NoError(t, err)
	require.NotEqual(t, own, session, "still of our session")
	require.NoError(t, unix.Kill(pid, unix.SIGTERM))
	requireGone(t, []int{pid})
	require.False(t, tp.host.listening("tcp", 8080))
}

func pastaNameGone(t *testing.T, tp *topo, p pastaProgram) {
	pid := tp.pasta(t, p, "-t", "8080:80")
	require.True(t, tp.host.listening("tcp", 8080))
	begin := time.Now()
	tp.ctr.unname()
	requireGone(t, []int{pid})
	require.Less(t, time.Since(begin), 2*time.Second)
	require.False(t, tp.host.listening("tcp", 8080))
}

func pastaNameGoneStays(t *testing.T, tp *topo, p pastaProgram) {
	tp.ctr.serveWho(t, 80, ipv4.any)
	pid := tp.pasta(t, p, "--no-netns-quit", "-t", "8080:80")
	tp.ctr.unname()
	time.Sleep(1500 * time.Millisecond)
	require.True(t, alive(pid))
	requireWho(t, tp.client, "tcp", "198.51.100.1:8080")
}

// container is a process in user and network namespaces of its own.
func (tp *topo) container(t *testing.T) string {
	t.Helper()
	need(t, "unshare", "nsenter")
	ctr := tp.host.start(t, "unshare", "-r", "-n", "sh", "-c", "echo ready; exec sleep 1000")
	ctr.waitLog(t, "ready")
	return strconv.Itoa(ctr.cmd.Process.Pid)
}

func pastaUserNS(t *testing.T, tp *topo, p pastaProgram) {
	pid := tp.container(t)
	tp.pasta(t, p, "--userns", "/proc/"+pid+"/ns/user", "--netns", "/proc/"+pid+"/ns/net")
	requireAddrOf(t, tp, pid)
}

func pastaPID(t *testing.T, tp *topo, p pastaProgram) {
	pid := tp.container(t)
	tp.pasta(t, p, "--", pid)
	requireAddrOf(t, tp, pid)
}

// requireAddrOf requires that a container has the host's address.
func requireAddrOf(t *testing.T, tp *topo, pid string) {
	t.Helper()
	addrs := tp.host.output(t, "nsenter", "-t", pid, "-U", "-n", "--preserve-credentials", "ip", "-o", "addr", "show", "eth0")
	require.Contains(t, addrs, "198.51.100.1/24")
}

func pastaForeground(t *testing.T, tp *topo, p pastaProgram) {
	tp.ctr.serveWho(t, 80, ipv4.any)
	proc := tp.host.start(t, append(append([]string{p.path}, noPortsBut("-t")...), "--config-net", "-f", "-t", "8080:80", "--netns", tp.ctr.path)...)
	tp.host.waitPort(t, "tcp", 8080)
	requireWho(t, tp.client, "tcp", "198.51.100.1:8080")
	require.True(t, proc.running())
	proc.signal(unix.SIGTERM)
	require.Zero(t, proc.exit(t, patience))
}

func pastaQuiet(t *testing.T, tp *topo, p pastaProgram) {
	argv := append(append([]string{p.path}, noPortsBut("")...), "--config-net", "-q", "-f", "--netns", tp.ctr.path)
	proc := tp.host.start(t, argv...)
	eventually(t, "no eth0 in the container", func() bool { return strings.Contains(tp.ctr.readProc("dev"), "eth0:") })
	proc.signal(unix.SIGTERM)
	proc.exit(t, patience)
	require.Empty(t, proc.log.String())
}

func pastaLogFile(t *testing.T, tp *topo, p pastaProgram) {
	const limit = 50000
	tp.ctr.serveWho(t, 80, ipv4.any)
	file := filepath.Join(t.TempDir(), "log")
	require.NoError(t, os.WriteFile(file, []byte("of another one"), 0o600))
	tp.pasta(t, p, "-d", "-l", file, "--log-size", strconv.Itoa(limit), "-t", "8080:80")
	b, err := os.ReadFile(file)
	require.NoError(t, err)
	require.Regexp(t, `^pasta \S+: /\S+ \(\d+\)\n`, string(b))
	for range 400 {
		requireWho(t, tp.client, "tcp", "198.51.100.1:8080")
	}
	st, err := os.Stat(file)
	require.NoError(t, err)
	require.LessOrEqual(t, st.Size(), int64(limit))
	require.Greater(t, st.Size(), int64(limit/3))
}

func pastaPorts(t *testing.T, tp *topo, p pastaProgram) {
	tp.ctr.serveWho(t, 80, ipv4.any, ipv6.any)
	// With one address of each family, from which the server answers.
	tp.pasta(t, p, "--no-copy-addrs", "-t", "8080:80", "-t", "198.51.100.11/8081:80", "-u", "8080:80")
	for _, dst := range []string{"198.51.100.1:8080", "[2001:db8:1::1]:8080"} {
		for _, proto := range []string{"tcp", "udp"} {
			got := requireWho(t, tp.client, proto, dst)
			require.Equal(t, got.local, got.by, "%s %s: the client's own address", proto, dst)
		}
	}
	requireWho(t, tp.client, "tcp", "198.51.100.11:8081")
	_, err := tp.client.tryTCP(netip.Addr{}, netip.MustParseAddrPort("198.51.100.1:8081"), patience)
	require.ErrorIs(t, err, unix.ECONNREFUSED)
}

func pastaAutoPorts(t *testing.T, tp *topo, p pastaProgram) {
	tp.pasta(t, p, "-t", "auto", "-u", "auto")
	require.False(t, tp.host.listening("tcp", 8090))
	tp.ctr.serveWho(t, 8090, ipv4.any)
	tp.host.waitPort(t, "tcp", 8090)
	tp.host.waitPort(t, "udp", 8090)
	requireWho(t, tp.client, "tcp", "198.51.100.1:8090")
	requireWho(t, tp.client, "udp", "198.51.100.1:8090")
}

func pastaOutPorts(t *testing.T, tp *topo, p pastaProgram) {
	tp.host.serveWho(t, 5432, ipv4.loopback)
	tp.pasta(t, p, "-T", "5432", "-U", "5432")
	for _, proto := range []string{"tcp", "udp"} {
		require.Equal(t, ipv4.loopback, requireWho(t, tp.ctr, proto, "127.0.0.1:5432").by.Addr())
	}
}

func pastaLoopback(t *testing.T, tp *topo, p pastaProgram) {
	tp.ctr.serveWho(t, 80, ipv4.loopback)
	tp.pasta(t, p, "--host-lo-to-ns-lo", "-t", "8080:80")
	require.Equal(t, ipv4.loopback, requireWho(t, tp.host, "tcp", "127.0.0.1:8080").by.Addr())
}

// pastaNoSplice looks at the tap: what a client of the host's loopback sends
// crosses it, or does not.
func pastaNoSplice(t *testing.T, tp *topo, p pastaProgram) {
	l := tp.ctr.listenTCP(t, ipv4.any, 80)
	for _, opts := range [][]string{{"-t", "8080:80"}, {"--no-splice", "-t", "8080:80"}} {
		pid := tp.pasta(t, p, opts...)
		before := tapBytes(t, tp.ctr)
		client, server := pair(t, tp.host, netip.MustParseAddrPort("127.0.0.1:8080"), l)
		const size = 1 << 20
		requireTransfer(t, client, server, noise(3, size))
		crossed := tapBytes(t, tp.ctr) - before
		if opts[0] == "--no-splice" {
			require.Greater(t, crossed, int64(size))
		} else {
			require.Less(t, crossed, int64(size/10))
		}
		client.Close()
		server.Close()
		_ = unix.Kill(pid, unix.SIGTERM)
		requireGone(t, []int{pid})
	}
}

// tapBytes is how much the container received from the tap.
func tapBytes(t *testing.T, n *node) int64 {
	t.Helper()
	for line := range strings.Lines(n.readProc("dev")) {
		name, counters, _ := strings.Cut(line, ":")
		if strings.TrimSpace(name) != "eth0" {
			continue
		}
		bytes, err := strconv.ParseInt(strings.Fields(counters)[0], 10, 64)
		require.NoError(t, err)
		return bytes
	}
	require.Fail(t, "no eth0", "%s", n.readProc("dev"))
	return 0
}

func pastaSpliceOnly(t *testing.T, tp *topo, p pastaProgram) {
	tp.ctr.serveWho(t, 80, ipv4.loopback)
	tp.pasta(t, p, "--splice-only", "-t", "8080:80", "-u", "8080:80")
	for _, proto := range []string{"tcp", "udp"} {
		require.Equal(t, ipv4.loopback, requireWho(t, tp.host, proto, "127.0.0.1:8080").by.Addr())
	}
	// The RST may come before the handshake is known to be over.
	_, err := tp.client.who(t, "tcp", netip.Addr{}, netip.MustParseAddrPort("198.51.100.1:8080"))
	require.ErrorIs(t, err, unix.ECONNRESET)
	require.NotContains(t, tp.ctr.readProc("dev"), "eth0")
}

func pastaBusy(t *testing.T, tp *topo, p pastaProgram) {
	tp.host.listenTCP(t, ipv4.any, 8080)
	argv := append([]string{p.path}, noPortsBut("-t")...)
	r := tp.host.run(t, append(argv, "--config-net", "-q", "-t", "8080:80", "--netns", tp.ctr.path)...)
	require.Equal(t, 1, r.code)
	require.Contains(t, r.stderr, "8080", fmt.Sprint(r))
}
