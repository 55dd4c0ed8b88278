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

// TestRunExitCode: run passes on how COMMAND ended.
func TestRunExitCode(t *testing.T) {
	t.Parallel()
	tp := newTopo(t)
	for _, c := range []struct {
		command []string
		code    int
	}{
		{[]string{"true"}, 0},
		{[]string{"false"}, 1},
		{[]string{"sh", "-c", "exit 42"}, 42},
		{[]string{"sh", "-c", "kill -TERM $$"}, 128 + 15},
		{[]string{"sh", "-c", "kill -KILL $$"}, 128 + 9},
		{[]string{"/no/such/program"}, 127},
		{[]string{"/etc/passwd"}, 126},
	} {
		t.Run(strings.Join(c.command, " "), func(t *testing.T) {
			r := tp.host.runCmd(t, asUser(t, gofwdCmd(append([]string{"run", "-q", "--"}, c.command...)...)))
			require.Equal(t, c.code, r.code, "%s%s", r.stdout, r.stderr)
			if c.code >= 126 && c.code < 128 {
				requireOneLine(t, r, c.code, c.command[0])
			}
		})
	}
}

// TestRun: an ordinary user's command in a namespace of its own: root there, on
// the network, with a resolv.conf that works, its standard streams untouched.
func TestRun(t *testing.T) {
	t.Parallel()
	need(t, "curl")
	tp := newTopo(t)
	tp.client.startDNS(t, ipv4.client, ipv4.client)
	etc, wrap := withEtc(t, "nameserver "+ipv4.client.String()+"\nsearch test\n")
	go greetHTTP(tp.client.listenTCP(t, ipv4.client, 8000), "hello from the client")
	run := func(t *testing.T, script string, opts ...string) result {
		t.Helper()
		args := append(append([]string{"run", "-q"}, opts...), "--", "sh", "-c", script)
		cmd := wrap(asUser(t, gofwdCmd(args...)))
		cmd.Stdin = strings.NewReader("standard input\n")
		return tp.host.runCmd(t, cmd)
	}
	for _, c := range []struct {
		name, script, want string
		opts               []string
	}{
		{name: "root", script: "id -u", want: "0\n"},
		{name: "standard input", script: "cat", want: "standard input\n"},
		{name: "address", script: "ip -o -4 addr show tap0 | grep -o 'inet [^ ]*'", want: "inet 10.0.2.100/24\n"},
		{name: "IPv6 address", script: "ip -o -6 addr show tap0 scope global | grep -o 'inet6 [^ ]*'", want: "inet6 fd67:6f66:7764::100/64\n"},
		{name: "loopback is up", script: "ping -c 1 -n 127.0.0.1 >/dev/null && echo up", want: "up\n"},
		{name: "MTU", script: "cat /sys/class/net/tap0/mtu || ip -o link show tap0 | grep -o 'mtu [0-9]*'", want: "mtu 1400\n", opts: []string{"--mtu", "1400"}},
		{name: "resolv.conf", script: "grep nameserver /etc/resolv.conf | head -1", want: "nameserver 10.0.2.3\n"},
		{name: "search list", script: "grep search /etc/resolv.conf", want: "search test\n"},
		{name: "a name resolves", script: "getent ahostsv4 who.test | head -1 | cut -d' ' -f1", want: "198.51.100.2\n"},
		{name: "curl", script: "curl -sS --max-time 10 http://who.test:8000/", want: "hello from the client"},
		{name: "no DNS", script: "grep -c 10.0.2.3 /etc/resolv.conf", want: "0\n", opts: []string{"--dns", "none"}},
		{name: "another interface name", script: "ip -o link show eth0 | cut -d' ' -f2", want: "eth0:\n", opts: []string{"--ifname", "eth0"}},
		{name: "IPv4 only", script: "ip -6 route show default | wc -l", want: "0\n", opts: []string{"-4"}},
		{name: "IPv6 only", script: "ip -4 route show default | wc -l", want: "0\n", opts: []string{"-6"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := run(t, c.script, c.opts...)
			if c.name == "MTU" {
				r.stdout = "mtu " + strings.TrimPrefix(r.stdout, "mtu ")
			}
			require.Equal(t, c.want, r.stdout, "%s", r.stderr)
		})
	}
	// The host's own resolv.conf is as it was.
	b, err := os.ReadFile(filepath.Join(etc, "resolv.conf"))
	require.NoError(t, err)
	require.Equal(t, "nameserver "+ipv4.client.String()+"\nsearch test\n", string(b))
}

// TestRunPublishes: an ordinary user's server, published and reached from the
// remote client.
func TestRunPublishes(t *testing.T) {
	t.Parallel()
	need(t, "socat")
	tp := newTopo(t)
	g := tp.host.startGofwdCmd(t, tp.ctr.id, asUser(t, gofwdCmd("run", "-p", "8080:80", "--",
		"socat", "-d", "-d", "TCP6-LISTEN:80,ipv6only=0,fork,reuseaddr", "SYSTEM:echo $SOCAT_PEERADDR")))
	g.waitLog(t, "listening on")
	eachFamily(t, func(t *testing.T, f family) {
		c := tp.client.dialTCP(t, f.client2, netip.AddrPortFrom(f.host, 8080))
		b, err := io.ReadAll(c)
		require.NoError(t, err)
		line := strings.TrimSpace(string(b))
		got, err := netip.ParseAddr(strings.Trim(line, "[]"))
		require.NoError(t, err)
		require.Equal(t, f.client2, got.Unmap())
	})
}

// TestRunSignals: run passes signals on to COMMAND, and ends when COMMAND does.
func TestRunSignals(t *testing.T) {
	t.Parallel()
	tp := newTopo(t)
	for _, sig := range []unix.Signal{unix.SIGTERM, unix.SIGINT, unix.SIGHUP, unix.SIGUSR1} {
		t.Run(unix.SignalName(sig), func(t *testing.T) {
			name := strings.TrimPrefix(unix.SignalName(sig), "SIG")
			p := tp.host.startCmd(t, asUser(t, gofwdCmd("run", "-q", "--", "sh", "-c",
				`trap 'echo got `+name+`; exit 7' `+name+`; echo ready; while :; do sleep 0.05; done`)))
			p.waitLog(t, "ready")
			p.signal(sig)
			require.Equal(t, 7, p.exit(t, patience))
			require.Contains(t, p.log.String(), "got "+name)
		})
	}
}

// TestNothingLeft: after the end of run and attach, however it came, nothing of
// them is left: no process, no listener, no interface, no rule, no socket file.
func TestNothingLeft(t *testing.T) {
	t.Parallel()
	tp := newTopo(t)
	before := tp.ctr.output(t, "sh", "-c", netState)
	for _, end := range []unix.Signal{unix.SIGTERM, unix.SIGINT, unix.SIGKILL} {
		t.Run("attach, "+unix.SignalName(end), func(t *testing.T) {
			g := tp.attach(t, "-p", "8080:80", "-T", "5432")
			require.True(t, tp.host.listening("tcp", 8080))
			family := append(children(g.cmd.Process.Pid), g.cmd.Process.Pid)
			g.signal(end)
			code := g.exit(t, 3*time.Second)
			if end == unix.SIGTERM {
				require.Zero(t, code)
			}
			requireGone(t, family)
			require.False(t, tp.host.listening("tcp", 8080))
			if end != unix.SIGKILL { // kernel path rules outlive a kill until the next start
				require.Equal(t, before, tp.ctr.output(t, "sh", "-c", netState))
				require.Empty(t, socketFiles(t, g.name))
			}
		})
	}
	t.Run("run", func(t *testing.T) {
		p := tp.host.startGofwdCmd(t, tp.ctr.id+"run", asUser(t, gofwdCmd("run", "-p", "8080:80", "--", "sleep", "1000")))
		family := append(children(p.cmd.Process.Pid), p.cmd.Process.Pid)
		require.Greater(t, len(family), 1)
		p.signal(unix.SIGTERM)
		require.Equal(t, 128+15, p.exit(t, 3*time.Second))
		requireGone(t, family)
		require.False(t, tp.host.listening("tcp", 8080))
		require.Empty(t, socketFiles(t, p.name))
	})
	t.Run("run, killed", func(t *testing.T) {
		p := tp.host.startGofwdCmd(t, tp.ctr.id+"kill", asUser(t, gofwdCmd("run", "--", "sleep", "1000")))
		family := append(children(p.cmd.Process.Pid), p.cmd.Process.Pid)
		p.signal(unix.SIGKILL)
		requireGone(t, family)
	})
}

// netState is all that gofwd may have changed in a namespace.
const netState = `ip -o link | sed 's/qlen.*//'; ip -o addr; ip route show table all; ip -6 route show table all; ip rule; ip -6 rule;
	cat /proc/sys/net/ipv4/tcp_fwmark_accept; nft list ruleset`

func requireGone(t *testing.T, pids []int) {
	t.Helper()
	eventually(t, fmt.Sprintf("one of the processes %v lives on", pids), func() bool {
		return !slices.ContainsFunc(pids, alive)
	})
}

// socketFiles are what gofwd of that name has in the runtime directory.
func socketFiles(t *testing.T, name string) []string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(runtimeDir, "gofwd", name+"*"))
	require.NoError(t, err)
	return files
}

// TestAgain: a killed gofwd can be followed by a new one at once.
func TestAgain(t *testing.T) {
	t.Parallel()
	tp := newTopo(t)
	tp.ctr.serveWho(t, 80, ipv4.any, ipv6.any)
	for range 3 {
		g := tp.attach(t, "-p", "8080:80")
		eachFamily(t, func(t *testing.T, f family) {
			got, err := tp.client.who(t, "tcp", f.client, netip.AddrPortFrom(f.host, 8080))
			require.NoError(t, err)
			require.Equal(t, f.client, got.by.Addr())
		})
		g.signal(unix.SIGKILL)
		g.exit(t, 3*time.Second)
	}
}

// TestNamespaceGone: attach ends within a second of the namespace: when its name
// is taken away, or its process has ended.
func TestNamespaceGone(t *testing.T) {
	t.Parallel()
	t.Run("name", func(t *testing.T) {
		t.Parallel()
		tp := newTopo(t)
		g := tp.attach(t, "-p", "8080:80")
		tp.ctr.unname()
		require.Zero(t, g.exit(t, time.Second))
	})
	t.Run("process", func(t *testing.T) {
		t.Parallel()
		tp := newTopo(t)
		sleep := tp.ctr.start(t, "sleep", "1000")
		g := tp.host.startGofwd(t, tp.ctr.id, "attach", "--pid", strconv.Itoa(sleep.cmd.Process.Pid))
		sleep.signal(unix.SIGKILL)
		require.Zero(t, g.exit(t, time.Second))
	})
}

// TestAttachUserNamespace: the container has a user namespace of its own, made by
// the same ordinary user, and gofwd gets in by itself.
func TestAttachUserNamespace(t *testing.T) {
	t.Parallel()
	need(t, "unshare")
	tp := newTopo(t)
	ctr := tp.host.startCmd(t, asUser(t, exec.Command("unshare", "-r", "-n", "sh", "-c", "echo ready; exec sleep 1000")))
	ctr.waitLog(t, "ready")
	pid := strconv.Itoa(ctr.cmd.Process.Pid)
	g := tp.host.startGofwdCmd(t, tp.ctr.id, asUser(t, gofwdCmd("attach", "--pid", pid, "-p", "8080:80")))
	addrs := tp.host.output(t, "nsenter", "-t", pid, "-U", "-n", "--preserve-credentials", "ip", "-o", "addr", "show", "tap0")
	require.Contains(t, addrs, "10.0.2.100/24")
	require.Contains(t, addrs, "fd67:6f66:7764::100/64")
	require.True(t, tp.host.listening("tcp", 8080))
	ctr.signal(unix.SIGKILL)
	require.Zero(t, g.exit(t, time.Second))
}

// TestDetach: the foreground process returns when all is ready; what stays is in
// the pid file and ends on SIGTERM, file and all.
func TestDetach(t *testing.T) {
	t.Parallel()
	tp := newTopo(t)
	tp.ctr.serveWho(t, 80, ipv4.any, ipv6.any)
	pidFile := filepath.Join(t.TempDir(), "pid")
	r := tp.host.runCmd(t, gofwdCmd("attach", "--netns", tp.ctr.path, "-p", "8080:80",
		"--detach", "--pid-file", pidFile, "--name", tp.ctr.id))
	require.Zero(t, r.code, "%s%s", r.stdout, r.stderr)
	b, err := os.ReadFile(pidFile)
	require.NoError(t, err)
	pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
	require.NoError(t, err)
	t.Cleanup(func() { unix.Kill(pid, unix.SIGKILL) })
	_, err = tp.client.who(t, "tcp", netip.Addr{}, netip.AddrPortFrom(ipv4.host, 8080))
	require.NoError(t, err)
	sid, err := unix.Getsid(pid)
	require.NoError(t, err)
	own, err := unix.Getsid(0)
	require.NoError(t, err)
	require.NotEqual(t, own, sid, "still of our session")
	require.NoError(t, unix.Kill(pid, unix.SIGTERM))
	requireGone(t, []int{pid})
	require.NoFileExists(t, pidFile)
	require.False(t, tp.host.listening("tcp", 8080))

	// What cannot start says so in the foreground.
	r = tp.host.runCmd(t, gofwdCmd("attach", "--netns", tp.ctr.path, "-p", "%wlan7:8080:80", "--detach", "--pid-file", pidFile))
	requireOneLine(t, r, 1, "wlan7")
	require.NoFileExists(t, pidFile)
}

// TestExitFD: gofwd ends with the descriptor that it was given, be it closed or
// written to.
func TestExitFD(t *testing.T) {
	t.Parallel()
	tp := newTopo(t)
	for _, end := range []string{"closed", "written"} {
		t.Run(end, func(t *testing.T) {
			r, w, err := os.Pipe()
			require.NoError(t, err)
			defer w.Close()
			cmd := gofwdCmd("attach", "--netns", tp.ctr.path, "--exit-fd", "3")
			cmd.ExtraFiles = []*os.File{r}
			g := tp.host.startGofwdCmd(t, tp.ctr.id, cmd)
			r.Close()
			require.True(t, g.running())
			if end == "closed" {
				require.NoError(t, w.Close())
			} else {
				_, err = w.Write([]byte("x"))
				require.NoError(t, err)
			}
			require.Zero(t, g.exit(t, time.Second))
		})
	}
}

// TestNoNetworkAtStart: the host has no network when gofwd starts; it comes later,
// and changes its addresses.
func TestNoNetworkAtStart(t *testing.T) {
	t.Parallel()
	tp := newTopo(t)
	tp.host.ip(t, "addr flush dev eth0\naddr flush dev eth1\nlink set eth0 down\nlink set eth1 down")
	tp.attach(t, "-p", "8080:80", "-p", "8080:80/udp")
	tp.ctr.serveWho(t, 80, ipv4.any, ipv6.any)
	tp.client.serveWho(t, 7000, ipv4.client, ipv6.client)
	eachFamily(t, func(t *testing.T, f family) {
		// Loopback works, and the world is unreachable rather than silent.
		got, err := tp.host.who(t, "tcp", f.loopback, netip.AddrPortFrom(f.loopback, 8080))
		require.NoError(t, err)
		require.Equal(t, f.alias, got.by.Addr())
		_, err = tp.ctr.tryTCP(netip.Addr{}, netip.AddrPortFrom(f.client, 7000), patience)
		require.True(t, isOneOf(err, unix.ENETUNREACH, unix.EHOSTUNREACH), "%v", err)
	})
	tp.host.ip(t, strings.ReplaceAll(hostNetwork, "route add unreachable", "route replace unreachable"))
	tp.settle(t)
	works := func(t *testing.T, f family, host netip.Addr) {
		t.Helper()
		for _, proto := range []string{"tcp", "udp"} {
			got, err := tp.client.who(t, proto, f.client, netip.AddrPortFrom(host, 8080))
			require.NoError(t, err, "%s in", proto)
			require.Equal(t, f.client, got.by.Addr())
			_, err = tp.ctr.who(t, proto, netip.Addr{}, netip.AddrPortFrom(f.client, 7000))
			require.NoError(t, err, "%s out", proto)
		}
	}
	eachFamily(t, func(t *testing.T, f family) { works(t, f, f.host) })

	// Another address, as after a change of network. The old ones are gone.
	tp.host.ip(t, `
		addr flush dev eth0
		addr add 198.51.100.21/24 dev eth0
		addr add 2001:db8:1::21/64 dev eth0 nodad
		route replace default via 198.51.100.2
		route replace default via 2001:db8:1::2`)
	go greet(tp.host.listenTCP(t, addr("198.51.100.21"), 7001), "main address")
	works(t, ipv4, addr("198.51.100.21"))
	works(t, ipv6, addr("2001:db8:1::21"))
	tp.ctr.requireGreeting(t, netip.AddrPortFrom(ipv4.alias, 7001), "main address")
}

// TestHostInOurNet: where the host itself is in 10.0.2.0/24, as a guest of QEMU
// or VirtualBox is, the container gets the next free net.
func TestHostInOurNet(t *testing.T) {
	t.Parallel()
	tp := newTopo(t)
	tp.host.ip(t, "addr add 10.0.2.15/24 dev eth1\naddr add 10.0.3.1/24 dev eth1")
	tp.client.ip(t, "addr add 10.0.2.1/24 dev eth1")
	g := tp.attach(t)
	require.Contains(t, g.status(t, tp.host).Addrs, "10.0.4.100/24")
	require.Contains(t, tp.ctr.output(t, "ip", "-o", "addr", "show", "tap0"), "10.0.4.100/24")
	go greet(tp.client.listenTCP(t, addr("10.0.2.1"), 7000), "the host's net")
	tp.ctr.requireGreeting(t, netip.MustParseAddrPort("10.0.2.1:7000"), "the host's net")
}

// TestStatus: what status says is what happened.
func TestStatus(t *testing.T) {
	t.Parallel()
	tp := newTopo(t)
	g := tp.attach(t, "-p", "8080:80", "-p", "5300:53/udp")
	tp.ctr.serveWho(t, 53, ipv4.any)
	l := tp.ctr.listenTCP(t, ipv4.any, 80)
	client, server := pair(t, tp.client, netip.AddrPortFrom(ipv4.host, 8080), l)
	_, err := client.Write(make([]byte, 1000))
	require.NoError(t, err)
	_, err = server.Write(make([]byte, 500))
	require.NoError(t, err)
	_, err = tp.client.who(t, "udp", netip.Addr{}, netip.AddrPortFrom(ipv4.host, 5300))
	require.NoError(t, err)

	s := g.status(t, tp.host)
	require.Contains(t, s.Addrs, "10.0.2.100/24")
	require.Contains(t, s.DNS, "10.0.2.3")
	require.Len(t, s.Forwards, 2)
	require.EqualValues(t, 1, s.Forwards[0].Active)
	require.EqualValues(t, 1, s.Forwards[0].Total)
	require.Equal(t, "kernel", s.Forwards[0].Path)
	eventually(t, "bytes are not counted", func() bool {
		s := g.status(t, tp.host)
		return s.Forwards[0].BytesIn == 1000 && s.Forwards[0].BytesOut == 500
	})
	require.EqualValues(t, 1, s.Forwards[1].Total)
	require.Positive(t, s.Forwards[1].BytesOut)
	client.Close()
	server.Close()
	eventually(t, "a closed connection is still active", func() bool {
		return g.status(t, tp.host).Forwards[0].Active == 0
	})
	text := tp.host.output(t, os.Getenv(binEnv), "status", g.name)
	require.Contains(t, text, "8080")
	require.Contains(t, text, "5300")
	require.Contains(t, tp.host.output(t, os.Getenv(binEnv), "status"), g.name)
}
