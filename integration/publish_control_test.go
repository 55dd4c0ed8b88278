package integration

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// nginx starts one server block in the namespace.
func (n *node) nginx(t *testing.T, server string) {
	t.Helper()
	need(t, "nginx")
	dir := t.TempDir()
	conf := filepath.Join(dir, "nginx.conf")
	require.NoError(t, os.WriteFile(conf, []byte(`
		daemon off; master_process off; user root; pid `+dir+`/pid;
		events {}
		http {
			access_log /dev/stdout; error_log stderr;
			client_body_temp_path `+dir+`; proxy_temp_path `+dir+`; fastcgi_temp_path `+dir+`;
			uwsgi_temp_path `+dir+`; scgi_temp_path `+dir+`;
			server { `+server+` }
		}`), 0o600))
	n.start(t, "nginx", "-c", conf, "-e", "stderr")
}

// ports runs "gofwd ports" for the instance.
func (g *gofwd) ports(t *testing.T, n *node, args ...string) string {
	t.Helper()
	args = append([]string{os.Getenv(binEnv), "ports", args[0], "--name", g.name}, args[1:]...)
	return n.output(t, args...)
}

// curl asks the control socket, and returns the status code and the answer.
func (g *gofwd) curl(t *testing.T, n *node, method, path, body string) (string, string) {
	t.Helper()
	args := []string{"curl", "-sS", "-w", "\n%{http_code}", "--unix-socket", g.controlSocket(t, n), "-X", method, "http://gofwd" + path}
	if body != "" {
		args = append(args, "-d", body)
	}
	out := n.output(t, args...)
	i := strings.LastIndexByte(out, '\n')
	return out[i+1:], strings.TrimSpace(out[:i])
}

// controlSocket finds the socket: it is in the runtime directory of the tests' user.
func (g *gofwd) controlSocket(t *testing.T, _ *node) string {
	t.Helper()
	for _, dir := range []string{filepath.Join(os.Getenv("XDG_RUNTIME_DIR"), "gofwd"), "/run/gofwd", fmt.Sprintf("%s/gofwd-%d", os.TempDir(), os.Geteuid())} {
		path := filepath.Join(dir, g.name+".sock")
		if _, err := os.Stat(path); err == nil {
			return path
		}
	}
	require.Fail(t, "no control socket", g.name)
	return ""
}

// TestPortsCommand changes what is published by the command line.
func TestPortsCommand(t *testing.T) {
	t.Parallel()
	tp := newTopo(t)
	g := tp.attach(t)
	tp.ctr.serveWho(t, 80, ipv4.any, ipv6.any)
	at := netip.AddrPortFrom(ipv4.host, 8080)
	reach := func() error { _, err := tp.client.who(t, "tcp", ipv4.client, at); return err }
	require.ErrorIs(t, reach(), unix.ECONNREFUSED)

	out := g.ports(t, tp.host, "add", "8080:80", "8081:81/udp")
	require.Regexp(t, `(?m)^1 +8080:80/tcp +\[::\]:8080 `, out)
	require.NoError(t, reach())
	require.Equal(t, out, g.ports(t, tp.host, "add", "8080:80", "8081:81/udp"), "again is no change")
	require.Equal(t, out, g.ports(t, tp.host, "list"))

	var list struct {
		Generation int
		Forwards   []struct{ ID int }
	}
	require.NoError(t, json.Unmarshal([]byte(g.ports(t, tp.host, "list", "--json")), &list))
	require.Len(t, list.Forwards, 2)

	for _, c := range []struct {
		args []string
		code int
		want string
	}{
		{[]string{"add", "8080:81"}, 1, `gofwd: port rule "8080:81/tcp" overlaps forward 1, "8080:80/tcp"`},
		{[]string{"add", "nonsense"}, 2, `gofwd: port rule "nonsense"`},
		{[]string{"add"}, 2, "no PORT given"},
		{[]string{"rm", "99"}, 1, "gofwd: forward 99: no such forward"},
		{[]string{"rm", "9:9"}, 1, `gofwd: no forward is "9:9/tcp"`},
		{[]string{"set", "8080:80", "198.51.100.250:1:1"}, 1, "no interface of this host has the address"},
		{[]string{"list", "--name", "nobody"}, 1, `gofwd: no gofwd named "nobody" runs`},
	} {
		args := append([]string{os.Getenv(binEnv), "ports"}, c.args...)
		if c.args[0] != "list" {
			args = append(args, "--name", g.name)
		}
		r := tp.host.run(t, args...)
		require.Equal(t, c.code, r.code, "%v: %s", c.args, r.stderr)
		require.Contains(t, r.stderr, c.want)
	}
	require.Equal(t, out, g.ports(t, tp.host, "list"))

	g.ports(t, tp.host, "set", "8080:80", "8082:82")
	require.NoError(t, reach())
	g.ports(t, tp.host, "rm", "8080:80")
	require.ErrorIs(t, reach(), unix.ECONNREFUSED)
	g.ports(t, tp.host, "set")
	require.Empty(t, g.ports(t, tp.host, "list"))
	require.Contains(t, tp.host.output(t, os.Getenv(binEnv), "ps"), g.name)
}

// TestRootlessctl: RootlessKit's own client works unchanged.
func TestRootlessctl(t *testing.T) {
	t.Parallel()
	need(t, "rootlessctl")
	tp := newTopo(t)
	g := tp.attach(t)
	tp.ctr.serveWho(t, 80, ipv4.any, ipv6.any)
	ctl := func(args ...string) string {
		t.Helper()
		return tp.host.output(t, append([]string{"rootlessctl", "--socket", g.controlSocket(t, tp.host)}, args...)...)
	}
	require.Contains(t, ctl("info"), "- Network Driver: gofwd\n")
	require.Equal(t, "1\n", ctl("add-ports", "0.0.0.0:8080:80/tcp"))
	got, err := tp.client.who(t, "tcp", ipv4.client, netip.AddrPortFrom(ipv4.host, 8080))
	require.NoError(t, err)
	require.Equal(t, ipv4.client, got.by.Addr())
	require.Regexp(t, `(?m)^1 +tcp +0\.0\.0\.0 +8080 .* +80`, ctl("list-ports"))
	r := tp.host.run(t, "rootlessctl", "--socket", g.controlSocket(t, tp.host), "add-ports", "127.0.0.1:8080:81/tcp")
	require.NotZero(t, r.code)
	require.Contains(t, r.stderr, "overlaps forward 1")
	require.Equal(t, "1\n", ctl("remove-ports", "1"))
	_, err = tp.client.who(t, "tcp", ipv4.client, netip.AddrPortFrom(ipv4.host, 8080))
	require.ErrorIs(t, err, unix.ECONNREFUSED)
}

// TestControlByCurl: what a script does.
func TestControlByCurl(t *testing.T) {
	t.Parallel()
	tp := newTopo(t)
	g := tp.attach(t)
	tp.ctr.serveWho(t, 80, ipv4.any, ipv6.any)
	code, body := g.curl(t, tp.host, "POST", "/v1/ports", `{"proto":"tcp","parentIP":"0.0.0.0","parentPort":8080,"childPort":80}`)
	require.Equal(t, "201", code, body)
	_, err := tp.client.who(t, "tcp", ipv4.client, netip.AddrPortFrom(ipv4.host, 8080))
	require.NoError(t, err)
	code, body = g.curl(t, tp.host, "PUT", "/v1/ports", `{"forwards":["8081:80"],"generation":999}`)
	require.Equal(t, "412", code, body)
	code, body = g.curl(t, tp.host, "GET", "/metrics", "")
	require.Equal(t, "200", code)
	require.Regexp(t, `(?m)^gofwd_flows_total\{forward="1",rule="8080:80/tcp",path="\w+"\} 1$`, body)
	// A busy port, and enough to find out who has it: gofwd in its sandbox
	// may not look.
	holder := tp.host.listenTCP(t, ipv4.any, 8090)
	defer holder.Close()
	code, body = g.curl(t, tp.host, "POST", "/v1/ports", `{"proto":"tcp","parentPort":8090,"childPort":80}`)
	require.Equal(t, "409", code)
	require.Contains(t, body, "bind host port 8090/tcp: in use")
	require.Contains(t, body, `"busy":{"op":"bind host port","rule":{"dir":"in","proto":"tcp","ports":"8090"`)
	r := tp.host.runCmd(t, gofwdCmd("ports", "add", "--name", g.name, "8090:80"))
	requireOneLine(t, r, 1, fmt.Sprintf(`8090/tcp: in use by .* \(pid %d\); stop what uses it`, os.Getpid()))
}

// TestChangesRefuseNobody repeats what pesto was measured at: a hundred changes of
// rules in 1.5 s, and four tight loops of clients of a port that they don't name.
func TestChangesRefuseNobody(t *testing.T) {
	t.Parallel()
	tp := newTopo(t)
	g := tp.attach(t, "-p", "8080:80")
	socket := g.controlSocket(t, tp.host)
	tp.ctr.serveWho(t, 80, ipv4.any)
	count := tp.connectLoops(netip.AddrPortFrom(ipv4.host, 8080))
	client := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", socket)
	}}}
	defer client.CloseIdleConnections()
	begin := time.Now()
	for i := range 100 {
		set := fmt.Sprintf(`{"forwards":["8080:80","%d:80","%d:80/udp"]}`, 9000+i, 9000+i)
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPut, "http://gofwd/v1/ports", strings.NewReader(set))
		require.NoError(t, err)
		resp, err := client.Do(req)
		require.NoError(t, err)
		resp.Body.Close()
		require.Equal(t, http.StatusOK, resp.StatusCode)
		time.Sleep(time.Until(begin.Add(time.Duration(i+1) * 15 * time.Millisecond)))
	}
	good, refused := count()
	t.Logf("100 changes in %s: %d connections, %d refused", time.Since(begin).Round(time.Millisecond), good, refused)
	require.Zero(t, refused)
	require.Greater(t, good, int64(200))
}

// TestProxyV2: nginx reads the client's address from the PROXY protocol, also where
// it has no address of the client's family.
func TestProxyV2(t *testing.T) {
	t.Parallel()
	tp := newTopo(t)
	tp.attach(t, "-p", "8080:80/tcp,proxy=v2")
	tp.ctr.nginx(t, `listen 80 proxy_protocol; location / { return 200 $proxy_protocol_addr; }`)
	tp.ctr.waitPort(t, "tcp", 80)
	eachFamily(t, func(t *testing.T, f family) {
		require.Equal(t, f.client.String(), tp.client.output(t, "curl", "-sS", "--interface", f.client.String(), url(f.host, 8080)))
	})
}

// TestUnixSockets publishes by a UNIX socket of the host, and leads to one.
func TestUnixSockets(t *testing.T) {
	t.Parallel()
	tp := newTopo(t)
	dir := t.TempDir()
	web, db := filepath.Join(dir, "web.sock"), filepath.Join(dir, "db.sock")
	tp.host.start(t, "socat", "UNIX-LISTEN:"+db+",fork", "EXEC:echo database")
	g := tp.attach(t, "-p", "unix:"+web+":80", "-T", "5432:unix:"+db)
	tp.ctr.nginx(t, `listen 80; location / { return 200 "hello $remote_addr"; }`)
	tp.ctr.waitPort(t, "tcp", 80)
	require.Equal(t, "hello 169.254.1.2", tp.host.output(t, "curl", "-sS", "--unix-socket", web, "http://web/"))
	eventually(t, "no "+db, func() bool { _, err := os.Stat(db); return err == nil })
	require.Equal(t, "database\n", tp.ctr.output(t, "socat", "-u", "TCP4:127.0.0.1:5432", "-"))

	// In its sandbox too gofwd makes and removes sockets beside that one, and
	// says why it makes none elsewhere.
	admin := filepath.Join(dir, "admin.sock")
	g.ports(t, tp.host, "add", "unix:"+admin+":80")
	require.Equal(t, "hello 169.254.1.2", tp.host.output(t, "curl", "-sS", "--unix-socket", admin, "http://admin/"))
	g.ports(t, tp.host, "rm", "unix:"+admin+":80")
	require.NoFileExists(t, admin)
	r := tp.host.runCmd(t, gofwdCmd("ports", "add", "--name", g.name, "unix:"+filepath.Join(t.TempDir(), "x.sock")+":80"))
	requireOneLine(t, r, 1, "permission denied; choose a directory that you may write to")
	g.stop()
	require.NoFileExists(t, web)
}

// TestAuto publishes what a container's programs listen on, without being told.
func TestAutoPublish(t *testing.T) {
	t.Parallel()
	tp := newTopo(t)
	g := tp.attach(t, "-t", "auto")
	reach := func() error {
		c, err := tp.client.tryTCP(netip.Addr{}, netip.AddrPortFrom(ipv4.host, 8080), patience)
		if err == nil {
			c.Close()
		}
		return err
	}
	require.ErrorIs(t, reach(), unix.ECONNREFUSED)
	tp.ctr.listenTCP(t, ipv4.loopback, 8081)
	l := tp.ctr.listenTCP(t, ipv4.any, 8080)
	begin := time.Now()
	eventually(t, "not published", func() bool { return reach() == nil })
	took := time.Since(begin)
	l.Close()
	begin = time.Now()
	eventually(t, "still published", func() bool { return reach() != nil })
	t.Logf("published %s after listen, gone %s after close", took, time.Since(begin))
	require.Less(t, took, 500*time.Millisecond)
	require.False(t, tp.host.listening("tcp", 8081), "the container's loopback is its own")

	// It looks now and then, and does not spin: the least of some seconds, since
	// the machine may be busy.
	least := time.Second
	for range 3 {
		before := cpuTime(t, g.cmd.Process.Pid)
		time.Sleep(time.Second)
		least = min(least, cpuTime(t, g.cmd.Process.Pid)-before)
	}
	t.Logf("%s of processor time a second", least)
	require.LessOrEqual(t, least, 20*time.Millisecond)
}

// cpuTime returns the processor time of a process and its children, in ticks of
// 10 ms (proc_pid_stat(5)).
func cpuTime(t *testing.T, pid int) (total time.Duration) {
	t.Helper()
	for _, p := range append(children(pid), pid) {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p))
		require.NoError(t, err)
		_, rest, _ := strings.Cut(string(b), ") ")
		f := strings.Fields(rest)
		for _, ticks := range f[11:13] {
			n, err := strconv.ParseInt(ticks, 10, 64)
			require.NoError(t, err)
			total += time.Duration(n) * 10 * time.Millisecond
		}
	}
	return total
}

// TestLateAddress: a port is published on an address that comes after gofwd.
func TestLateAddress(t *testing.T) {
	t.Parallel()
	tp := newTopo(t)
	late := addr("198.51.100.77")
	tp.attach(t, "-p", late.String()+":8080:80/tcp,wait")
	tp.ctr.serveWho(t, 80, ipv4.any)
	for range 2 {
		tp.host.ip(t, "addr add 198.51.100.77/24 dev eth0")
		eventually(t, "not published", func() bool {
			_, err := tp.client.who(t, "tcp", ipv4.client, netip.AddrPortFrom(late, 8080))
			return err == nil
		})
		tp.host.ip(t, "addr del 198.51.100.77/24 dev eth0")
	}
}

// TestManyPorts: thousands of published ports, and how fast one more is added.
func TestManyPorts(t *testing.T) {
	t.Parallel()
	tp := newTopo(t)
	begin := time.Now()
	g := tp.attach(t, "-p", "10000-11999:10000-11999")
	start := time.Since(begin)
	tp.ctr.serveWho(t, 11999, ipv4.any)
	begin = time.Now()
	code, body := g.curl(t, tp.host, "POST", "/v1/ports", `{"proto":"tcp","parentPort":8080,"childPort":11999}`)
	t.Logf("2,000 ports: start %s, one more %s, RSS %d kB", start, time.Since(begin), g.rss(t)>>10)
	require.Equal(t, "201", code, body)
	for _, port := range []uint16{8080, 11999} {
		_, err := tp.client.who(t, "tcp", ipv4.client, netip.AddrPortFrom(ipv4.host, port))
		require.NoError(t, err)
	}
}

// TestCaptureForward: what gofwd capture writes, tcpdump reads.
func TestCaptureForward(t *testing.T) {
	t.Parallel()
	tp := newTopo(t)
	g := tp.attach(t, "-p", "8080:80", "-p", "8081:81")
	tp.ctr.serveWho(t, 80, ipv4.any)
	tp.ctr.serveWho(t, 81, ipv4.any)
	file := filepath.Join(t.TempDir(), "web.pcap")
	p := tp.host.start(t, os.Getenv(binEnv), "capture", "--name", g.name, "--forward", "1", file)
	eventually(t, "no capture", func() bool { st, err := os.Stat(file); return err == nil && st.Size() > 0 })
	for _, port := range []uint16{8081, 8080} {
		_, err := tp.client.who(t, "tcp", ipv4.client, netip.AddrPortFrom(ipv4.host, port))
		require.NoError(t, err)
	}
	var text string
	eventually(t, "no packets", func() bool {
		text = tcpdump(t, tp.host, file)
		return strings.Contains(text, "Flags [F.]")
	})
	p.signal(unix.SIGINT)
	require.Zero(t, p.exit(t, patience))
	require.Contains(t, text, "IP "+ipv4.client.String()+".")
	require.NotContains(t, text, ".81:")
}
