package integration

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

const page = "served in the container\n"

// startNginx serves a page on port 80 of the container, both families, and
// returns its access log: one address and port a line.
func (tp *topo) startNginx(t *testing.T) (accessLog string) {
	t.Helper()
	need(t, "nginx")
	dir := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(dir, "index.html"), []byte(page), 0o644))
	accessLog = filepath.Join(dir, "access.log")
	conf := filepath.Join(dir, "nginx.conf")
	require.NoError(t, os.WriteFile(conf, fmt.Appendf(nil, `
		daemon off;
		master_process off;
		user root;
		pid %[1]s/pid;
		error_log stderr;
		worker_rlimit_nofile %[2]d;
		events { worker_connections %[2]d; }
		http {
			client_header_timeout 10m;
			log_format source "$remote_addr $remote_port";
			access_log %[1]s/access.log source;
			client_body_temp_path %[1]s/body; proxy_temp_path %[1]s/proxy;
			fastcgi_temp_path %[1]s/fastcgi; uwsgi_temp_path %[1]s/uwsgi; scgi_temp_path %[1]s/scgi;
			server { listen 80 backlog=4096; listen [::]:80 backlog=4096; root %[1]s; }
		}`, dir, nofile(t)-100), 0o644))
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
			port, ok := strings.CutPrefix(out, page)
			require.True(t, ok, "%q", out)
			var log []byte
			eventually(t, "no line in nginx's access log", func() bool {
				var err error
				log, err = os.ReadFile(accessLog)
				return err == nil && len(log) > 0
			})
			require.Equal(t, fmt.Sprintf("%s %s\n", c.seen, port), string(log), "%s to %s", c.src, c.dst)
		}
	})
}

// TestManyClients: hundreds of connections at a time to one port, from two
// addresses, and each gets its own bytes and is seen as itself.
func TestManyClients(t *testing.T) {
	t.Parallel()
	tp := newTopo(t)
	tp.attach(t, "-p", "8080:80")
	eachFamily(t, func(t *testing.T, f family) {
		const clients = 300
		l := tp.ctr.listenTCP(t, f.any, 80)
		bySource := map[netip.AddrPort]*net.TCPConn{}
		var conns []*net.TCPConn
		for i := range clients {
			src := f.client
			if i%2 == 1 {
				src = f.client2
			}
			conns = append(conns, tp.client.dialTCP(t, src, netip.AddrPortFrom(f.host, 8080)))
		}
		for range clients {
			c := acceptOne(t, l)
			bySource[addrPort(c.RemoteAddr())] = c
		}
		for i, c := range conns {
			server := bySource[addrPort(c.LocalAddr())]
			require.NotNil(t, server, "client %d is not seen as %s", i, c.LocalAddr())
			requireEcho(t, c, server)
			requireEcho(t, server, c)
		}
	})
}

// TestTransfer sends 16 MiB in each direction at the same time and compares them
// byte by byte.
func TestTransfer(t *testing.T) {
	t.Parallel()
	tp := newTopo(t)
	tp.attach(t, "-p", "8080:80")
	in, out := noise(1, 16<<20), noise(2, 16<<20)
	eachFamily(t, func(t *testing.T, f family) {
		for _, c := range []struct {
			name           string
			client, server *node
			listen, dst    netip.AddrPort
		}{
			{"inbound", tp.client, tp.ctr, netip.AddrPortFrom(f.any, 80), netip.AddrPortFrom(f.host, 8080)},
			{"outbound", tp.ctr, tp.client, netip.AddrPortFrom(f.client, 81), netip.AddrPortFrom(f.client, 81)},
		} {
			t.Run(c.name, func(t *testing.T) {
				l := c.server.listenTCP(t, c.listen.Addr(), c.listen.Port())
				client, server := pair(t, c.client, c.dst, l)
				back := make(chan error, 1)
				go sendAll(server, out, back)
				forth := make(chan error, 1)
				go sendAll(client, in, forth)
				received := make(chan []byte, 1)
				go func() {
					b, _ := io.ReadAll(server)
					received <- b
				}()
				got, err := io.ReadAll(client)
				require.NoError(t, err)
				require.True(t, bytes.Equal(out, got), "the bytes from the server differ")
				require.True(t, bytes.Equal(in, <-received), "the bytes from the client differ")
				require.NoError(t, <-back)
				require.NoError(t, <-forth)
			})
		}
	})
}

// TestIperf3 runs a real iperf3 for a second in each direction, in and out.
func TestIperf3(t *testing.T) {
	t.Parallel()
	need(t, "iperf3")
	tp := newTopo(t)
	tp.attach(t, "-p", "5201:5201", "-p", "5201:5201/udp")
	iperf3 := func(t *testing.T, from, to *node, dst netip.Addr, args ...string) {
		t.Helper()
		to.waitPort(t, "tcp", 5201) // the server listens anew after each run
		out := from.output(t, append([]string{"iperf3", "-J", "-t", "1", "-c", dst.String()}, args...)...)
		var r struct {
			End struct {
				SumReceived struct{ Bytes float64 } `json:"sum_received"`
				Sum         struct{ Bytes float64 } `json:"sum"` // UDP
			} `json:"end"`
		}
		require.NoError(t, json.Unmarshal([]byte(out), &r), "%s", out)
		require.Greater(t, max(r.End.SumReceived.Bytes, r.End.Sum.Bytes), 1e5, "%v: %s", args, out)
	}
	tp.ctr.start(t, "iperf3", "-s")
	tp.ctr.waitPort(t, "tcp", 5201)
	eachFamily(t, func(t *testing.T, f family) {
		// iperf3 answers UDP from any of the client's addresses unless
		// bound to one.
		server := tp.client.start(t, "iperf3", "-s", "-B", f.client.String())
		defer server.stop()
		tp.client.waitPort(t, "tcp", 5201)
		for _, reverse := range [][]string{nil, {"-R"}} {
			iperf3(t, tp.client, tp.ctr, f.host, reverse...)
			iperf3(t, tp.ctr, tp.client, f.client, reverse...)
			udp := append([]string{"-u", "-b", "20M", "-l", "1200"}, reverse...)
			iperf3(t, tp.client, tp.ctr, f.host, udp...)
			iperf3(t, tp.ctr, tp.client, f.client, udp...)
		}
	})
}

// TestSYNBurst: a thousand connections at the same moment, in and out, and none is
// refused or lost.
func TestSYNBurst(t *testing.T) {
	t.Parallel()
	tp := newTopo(t)
	tp.attach(t, "-p", "8080:80")
	const count = 1000
	eachFamily(t, func(t *testing.T, f family) {
		for _, c := range []struct {
			name           string
			client, server *node
			listen, dst    netip.AddrPort
		}{
			{"inbound", tp.client, tp.ctr, netip.AddrPortFrom(f.any, 80), netip.AddrPortFrom(f.host, 8080)},
			{"outbound", tp.ctr, tp.client, netip.AddrPortFrom(f.client, 81), netip.AddrPortFrom(f.client, 81)},
		} {
			t.Run(c.name, func(t *testing.T) {
				l := c.server.listenTCP(t, c.listen.Addr(), c.listen.Port())
				accepted := make(chan int, 1)
				go acceptMany(l, count, accepted)
				c.client.burst(t, c.dst, count)
				require.Equal(t, count, <-accepted)
			})
		}
	})
}

// acceptMany accepts up to count connections and keeps them until it has them
// all.
func acceptMany(l *net.TCPListener, count int, accepted chan<- int) {
	l.SetDeadline(time.Now().Add(2 * patience))
	var conns []net.Conn
	for len(conns) < count {
		c, err := l.Accept()
		if err != nil {
			break
		}
		conns = append(conns, c)
	}
	accepted <- len(conns)
	for _, c := range conns {
		c.Close()
	}
}

// TestIdleConnections keeps ten thousand connections open to nginx, as many as
// the limit of open files allows: the memory that they take is bounded, and they
// still work.
func TestIdleConnections(t *testing.T) {
	need(t, "nginx")
	for _, datapath := range []string{"kernel", "tap"} {
		t.Run(datapath, func(t *testing.T) { testIdleConnections(t, datapath) })
	}
}

func testIdleConnections(t *testing.T, datapath string) {
	tp := newTopo(t)
	tp.startNginx(t)
	g := tp.attach(t, "-p", "8080:80", "--log-level", "info", "--datapath", datapath)
	// The kernel path has two sockets for each.
	count := min(10_000, nofile(t)/2-500)
	if count < 10_000 {
		t.Logf("only %d connections: RLIMIT_NOFILE is %d", count, nofile(t))
	}
	before := g.rss(t)
	var fds []int
	for len(fds) < count {
		f := []family{ipv4, ipv6}[len(fds)/500%2]
		fds = append(fds, tp.client.burst(t, netip.AddrPortFrom(f.host, 8080), min(500, count-len(fds)))...)
	}
	// Each has a connection of its own in the container.
	eventually(t, "nginx has not accepted all", func() bool {
		established := 0
		for line := range strings.Lines(tp.ctr.readProc("tcp") + tp.ctr.readProc("tcp6")) {
			field := strings.Fields(line)
			if len(field) > 3 && field[3] == "01" && strings.HasSuffix(field[1], ":0050") {
				established++
			}
		}
		return established >= count
	})
	grown := g.rss(t) - before
	t.Logf("%d idle connections take %d MiB, %d KiB each", count, grown>>20, grown>>10/int64(count))
	require.Less(t, grown, int64(count)*idleConnBound)
	request := []byte("GET / HTTP/1.0\r\n\r\n")
	for i := 0; i < count; i += count / 20 {
		_, err := unix.Write(fds[i], request)
		require.NoError(t, err)
		reply := make([]byte, 15)
		eventually(t, "no answer on an idle connection", func() bool {
			n, _ := unix.Read(fds[i], reply)
			return n > 0
		})
		require.Equal(t, "HTTP/1.1 200 OK", string(reply))
	}
}

// nofile is how many files a process may have open; the Go runtime has raised it
// to the hard limit.
func nofile(t *testing.T) int {
	t.Helper()
	var limit unix.Rlimit
	require.NoError(t, unix.Getrlimit(unix.RLIMIT_NOFILE, &limit))
	return int(min(limit.Cur, 1<<20))
}

// idleConnBound is the memory that an idle connection may take, in bytes.
const idleConnBound = 48 << 10

// TestNeverReads: a container that never reads stops its own client, not gofwd,
// and not with unbounded memory.
func TestNeverReads(t *testing.T) {
	t.Parallel()
	tp := newTopo(t)
	g := tp.attach(t, "-p", "8080:80")
	eachFamily(t, func(t *testing.T, f family) {
		for _, c := range []struct {
			name           string
			client, server *node
			listen, dst    netip.AddrPort
		}{
			{"inbound", tp.client, tp.ctr, netip.AddrPortFrom(f.any, 80), netip.AddrPortFrom(f.host, 8080)},
			{"outbound", tp.ctr, tp.client, netip.AddrPortFrom(f.client, 81), netip.AddrPortFrom(f.client, 81)},
		} {
			t.Run(c.name, func(t *testing.T) {
				l := c.server.listenTCP(t, c.listen.Addr(), c.listen.Port())
				before := g.rss(t)
				client, _ := pair(t, c.client, c.dst, l)
				b := make([]byte, 1<<20)
				sent := 0
				for {
					client.SetWriteDeadline(time.Now().Add(time.Second))
					n, err := client.Write(b)
					sent += n
					if err != nil {
						require.True(t, isTimeout(err), "%v", err)
						break
					}
					require.Less(t, sent, 256<<20, "the bytes go somewhere")
				}
				require.Less(t, g.rss(t)-before, int64(64<<20), "after %d MiB", sent>>20)
				other, server := pair(t, c.client, c.dst, l)
				requireEcho(t, other, server)
				requireEcho(t, server, other)
			})
		}
	})
}

// greetHTTP answers every request with one page, without a look at it.
func greetHTTP(l *net.TCPListener, page string) {
	for {
		c, err := l.AcceptTCP()
		if err != nil {
			return
		}
		_, _ = c.Read(make([]byte, 4096))
		fmt.Fprintf(c, "HTTP/1.0 200 OK\r\nContent-Length: %d\r\n\r\n%s", len(page), page)
		c.Close()
	}
}
