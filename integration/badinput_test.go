package integration

import (
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// requireOneLine checks an error of gofwd: exit code, one line on stderr, and
// what it says.
func requireOneLine(t *testing.T, r result, code int, says ...string) {
	t.Helper()
	require.Equal(t, code, r.code, "%s%s", r.stdout, r.stderr)
	require.Equal(t, 1, strings.Count(r.stderr, "\n"), "not one line: %q", r.stderr)
	require.True(t, strings.HasSuffix(r.stderr, "\n"), "%q", r.stderr)
	for _, s := range says {
		require.Regexp(t, s, r.stderr)
	}
}

// TestUsageErrors: what cannot be meant is exit code 2, quotes the offending
// piece, and touches nothing.
func TestUsageErrors(t *testing.T) {
	t.Parallel()
	tp := newTopo(t)
	for _, c := range []struct {
		args []string
		says string
	}{
		{[]string{"-t", "0"}, `"0"`},
		{[]string{"-p", "70000:80"}, `70000`},
		{[]string{"-p", "8080:eighty"}, `eighty`},
		{[]string{"-p", "90-80:90-80"}, `90-80`},
		{[]string{"-p", "8000-8010:9000-9005"}, `8000-8010|9000-9005`},
		{[]string{"-p", "8080:80/sctp"}, `sctp`},
		{[]string{"-p", "1.2.3.4.5:8080:80"}, `1\.2\.3\.4\.5`},
		{[]string{"-p", "2001:db8::1:8080:80"}, `2001:db8::1:8080:80`},
		{[]string{"-p", ""}, `""|empty`},
		{[]string{"-p", "8080:80", "-p", "8080:81"}, `8080`},
		{[]string{"-p", "8000-8010:9000-9010", "-t", "8005"}, `8005`},
		{[]string{"-t", "80-70"}, `80-70`},
		{[]string{"-t", "::1/"}, `::1/`},
		{[]string{"-t", "80,none"}, `none`},
		{[]string{"-u", "22,25:26-27"}, `25:26-27`},
		{[]string{"--mtu", "12"}, `mtu`},
		{[]string{"--address", "10.0.2.300/24"}, `10\.0\.2\.300`},
		{[]string{"--address", "10.0.2.1/33"}, `10\.0\.2\.1/33`},
		{[]string{"--gateway", "nowhere"}, `nowhere`},
		{[]string{"--dns", "10.0.2"}, `10\.0\.2`},
		{[]string{"--datapath", "fast"}, `fast`},
		{[]string{"--log-level", "loud"}, `loud`},
		{[]string{"--log-format", "xml"}, `xml`},
		{[]string{"--ifname", "a-name-that-is-too-long"}, `a-name-that-is-too-long`},
		{[]string{"-4", "-6"}, `ipv4-only|-4`},
		{[]string{"--no-such-flag"}, `no-such-flag`},
		{[]string{"--pid", "1"}, `pid`}, // besides --netns
		{[]string{"stray"}, `stray`},
	} {
		t.Run(strings.Join(c.args, " "), func(t *testing.T) {
			r := tp.host.runCmd(t, gofwdCmd(append([]string{"attach", "--netns", tp.ctr.path}, c.args...)...))
			requireOneLine(t, r, 2, c.says)
		})
	}
	requireOneLine(t, tp.host.runCmd(t, gofwdCmd()), 2)
	requireOneLine(t, tp.host.runCmd(t, gofwdCmd("atach")), 2, "atach", "attach")
	requireOneLine(t, tp.host.runCmd(t, gofwdCmd("attach")), 2, "netns")
	requireOneLine(t, tp.host.runCmd(t, gofwdCmd("run", "--netns", "x")), 2, "netns")
	require.NotContains(t, tp.ctr.output(t, "ip", "-o", "link"), "tap0")
}

// requireUntouched: a start that failed has left nothing behind in the container
// and on the host.
func (tp *topo) requireUntouched(t *testing.T) {
	t.Helper()
	require.NotContains(t, tp.ctr.output(t, "ip", "-o", "link"), "tap0")
	require.Empty(t, tp.ctr.output(t, "ip", "route", "show"))
	require.False(t, tp.host.listening("tcp", 8080), "a listener is left")
}

// TestStartErrors: what goes wrong at the start is exit code 1, one line that says
// what, where and what to do, and start-up is all or nothing.
func TestStartErrors(t *testing.T) {
	t.Parallel()
	need(t, "socat")
	tp := newTopo(t)
	holder := tp.host.start(t, "socat", "TCP4-LISTEN:9999,bind=198.51.100.1", "PIPE")
	tp.host.waitPort(t, "tcp", 9999)
	tp.host.start(t, "socat", "UDP4-RECV:9999,bind=198.51.100.1", "PIPE")
	tp.host.waitPort(t, "udp", 9999)
	dir := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(dir, "file"), []byte("x"), 0o600))

	attach := func(args ...string) result {
		// The good forward must not survive the bad one.
		args = append([]string{"attach", "--netns", tp.ctr.path, "-p", "8080:80"}, args...)
		return tp.host.runCmd(t, gofwdCmd(args...))
	}
	for _, c := range []struct {
		name string
		args []string
		says []string
	}{
		{
			"port in use",
			[]string{"-p", "9999:80"},
			[]string{"9999", "in use", "socat", fmt.Sprint(holder.cmd.Process.Pid)},
		},
		{"UDP port in use", []string{"-p", "9999:80/udp"}, []string{"9999", "in use", "socat"}},
		{"port of a range in use", []string{"-p", "9990-9999:80-89"}, []string{"9999", "in use"}},
		{"address not here", []string{"-p", "198.51.100.77:8081:80"}, []string{`198\.51\.100\.77`}},
		{"IPv6 address not here", []string{"-p", "[2001:db8:1::77]:8081:80"}, []string{`2001:db8:1::77`}},
		{"no such interface", []string{"-p", "%wlan7:8081:80"}, []string{"wlan7"}},
		{"pcap in no directory", []string{"--pcap", filepath.Join(dir, "none/tap.pcap")}, []string{"none/tap.pcap"}},
		{"pcap is a directory", []string{"--pcap", dir}, []string{dir, "directory"}},
		{"pid file in no directory", []string{"--pid-file", filepath.Join(dir, "none/pid")}, []string{"none/pid"}},
		{"descriptor that is not open", []string{"--ready-fd", "77"}, []string{"77"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			requireOneLine(t, attach(c.args...), 1, c.says...)
			tp.requireUntouched(t)
		})
	}
	for _, c := range []struct {
		name string
		args []string
		says []string
	}{
		{"no such netns", []string{"--netns", filepath.Join(dir, "none")}, []string{"none", "no such file"}},
		{"no netns of that name", []string{"--netns", "nobody"}, []string{"nobody"}},
		{"a file, not a netns", []string{"--netns", filepath.Join(dir, "file")}, []string{"file", "not a network namespace"}},
		{"a namespace of another kind", []string{"--netns", "/proc/self/ns/uts"}, []string{"uts", "not a network namespace"}},
		{"PID gone", []string{"--pid", "999999"}, []string{"999999"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := tp.host.runCmd(t, gofwdCmd(append([]string{"attach", "-p", "8080:80"}, c.args...)...))
			requireOneLine(t, r, 1, c.says...)
			require.False(t, tp.host.listening("tcp", 8080), "a listener is left")
		})
	}
}

// TestInterfaceTaken: a container that has a tap0 already keeps it.
func TestInterfaceTaken(t *testing.T) {
	t.Parallel()
	tp := newTopo(t)
	tp.ctr.ip(t, "link add tap0 type veth peer name other")
	r := tp.host.runCmd(t, gofwdCmd("attach", "--netns", tp.ctr.path, "-p", "8080:80"))
	requireOneLine(t, r, 1, "tap0")
	require.False(t, tp.host.listening("tcp", 8080), "a listener is left")
	require.Contains(t, tp.ctr.output(t, "ip", "-o", "link"), "tap0")
}

// asUser makes cmd run without capabilities, as an ordinary user's programs do:
// exec of the namespace's root gains none beyond the bounding set
// (capabilities(7)). CAP_SETFCAP stays, for without it uid 0, which we are, could
// not be mapped into another user namespace (user_namespaces(7)).
func asUser(t *testing.T, cmd *exec.Cmd) *exec.Cmd {
	t.Helper()
	need(t, "setpriv")
	wrapped := exec.Command("setpriv", append([]string{"--bounding-set=-all,+setfcap", "--inh-caps=-all"}, cmd.Args...)...)
	wrapped.ExtraFiles = cmd.ExtraFiles
	return wrapped
}

// TestPrivilegedPort: a port below ip_unprivileged_port_start names the sysctl and
// socket activation.
func TestPrivilegedPort(t *testing.T) {
	t.Parallel()
	tp := newTopo(t)
	for _, proto := range []string{"tcp", "udp"} {
		r := tp.host.runCmd(t, asUser(t, gofwdCmd("run", "-p", "443:443/"+proto, "--", "true")))
		requireOneLine(t, r, 1, "443", `ip_unprivileged_port_start`, `socket activation`)
	}
	// And with the sysctl it works.
	tp.host.sysctl(t, "net/ipv4/ip_unprivileged_port_start", "443")
	r := tp.host.runCmd(t, asUser(t, gofwdCmd("run", "-p", "443:443", "--", "true")))
	require.Zero(t, r.code, "%s", r.stderr)
}

// TestNoTun: /dev/net/tun missing, and forbidden.
func TestNoTun(t *testing.T) {
	t.Parallel()
	need(t, "unshare", "mount")
	tp := newTopo(t)
	for _, c := range []struct {
		name, script string
		says         string
	}{
		{"missing", `mount --bind ` + t.TempDir() + ` /dev/net`, "modprobe tun|no such file"},
		{
			"forbidden", `mount --bind /dev/net/tun /dev/net/tun && mount -o remount,bind,nodev /dev/net/tun`,
			"permission denied",
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			cmd := gofwdCmd("attach", "--netns", tp.ctr.path, "-p", "8080:80")
			wrapped := exec.Command("unshare", append([]string{"-m", "sh", "-c", c.script + ` && exec "$0" "$@"`}, cmd.Args...)...)
			requireOneLine(t, tp.host.runCmd(t, wrapped), 1, "/dev/net/tun", c.says)
			tp.requireUntouched(t)
		})
	}
}

// TestNoUserNamespaces: run says which setting forbids user namespaces.
func TestNoUserNamespaces(t *testing.T) {
	t.Parallel()
	need(t, "unshare")
	// The limit is that of the user namespace: an own one for the test, whose
	// root may make no more of them.
	r := newTopo(t).host.runCmd(t, exec.Command("unshare", "-r", "sh", "-c",
		`echo 0 > /proc/sys/user/max_user_namespaces && exec "$0" run -- true`, os.Getenv(binEnv)))
	requireOneLine(t, r, 1, "user namespace", `user\.max_user_namespaces`)
}

// TestStatusOfNobody: status of a name that does not run.
func TestStatusOfNobody(t *testing.T) {
	t.Parallel()
	tp := newTopo(t)
	requireOneLine(t, tp.host.runCmd(t, gofwdCmd("status", "nobody-runs-by-this-name")), 1, "nobody-runs-by-this-name")
}

// TestLateErrors: what is wrong with a forward's server is the client's to see,
// and gofwd goes on.
func TestLateErrors(t *testing.T) {
	t.Parallel()
	tp := newTopo(t)
	g := tp.attach(t, "-p", "8080:80")
	eachFamily(t, func(t *testing.T, f family) {
		dst := netip.AddrPortFrom(f.host, 8080)
		_, err := tp.client.who(t, "tcp", f.client, dst)
		require.Error(t, err, "nobody listens in the container")
		tp.ctr.serveWho(t, 80, f.any)
		got, err := tp.client.who(t, "tcp", f.client, dst)
		require.NoError(t, err)
		require.Equal(t, f.client, got.by.Addr())
	})
	require.True(t, g.running())
}
