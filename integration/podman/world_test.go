//go:build podman

package podman

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/gofwd/gofwd/netnsutil"
)

// The internet's stand-in, where the labs' nameserver is too: see lab/setup.sh.
const net4, net6, netName = "192.0.2.80", "2001:db8:80::80", "www.example.org"

// startInternet starts servers of TCP and UDP on port 8000 there, and the
// nameserver.
func startInternet(t *testing.T, l *lab) {
	t.Helper()
	serveHTTP(t, l.client, net.JoinHostPort(net4, "8000"))
	serveHTTP(t, l.client, net.JoinHostPort(net6, "8000"))
	serveUDP(t, l.client, net.JoinHostPort(net4, "8000"))
	serveUDP(t, l.client, net.JoinHostPort(net6, "8000"))
	dns := exec.Command("nsenter", "--net=/run/netns/client", "dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null",
		"--user=root", "--group=", "--pid-file=", "--no-resolv", "--no-hosts", "--bind-interfaces",
		"--listen-address="+net4, "--address=/"+netName+"/"+net4)
	startProcess(t, dns)
}

// startProcess starts a process that ends with the test.
func startProcess(t *testing.T, cmd *exec.Cmd) {
	t.Helper()
	var output strings.Builder
	cmd.Stdout, cmd.Stderr = &output, &output
	require.NoError(t, cmd.Start())
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		_ = cmd.Wait() // ended by a signal
		if t.Failed() {
			t.Logf("%s: %s", cmd, &output)
		}
	})
}

// serveHTTP tells every client who it is, until the test ends.
func serveHTTP(t *testing.T, ns *netnsutil.NS, addr string) {
	t.Helper()
	var ln net.Listener
	require.NoError(t, ns.Do(func() (err error) {
		ln, err = net.Listen("tcp", addr)
		return err
	}))
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintln(w, "client="+r.RemoteAddr)
	})}
	t.Cleanup(func() { srv.Close() })
	go srv.Serve(ln)
}

// serveUDP is the same for datagrams.
func serveUDP(t *testing.T, ns *netnsutil.NS, addr string) {
	t.Helper()
	var c net.PacketConn
	require.NoError(t, ns.Do(func() (err error) {
		c, err = net.ListenPacket("udp", addr)
		return err
	}))
	t.Cleanup(func() { c.Close() })
	go answerDatagrams(c)
}

func answerDatagrams(c net.PacketConn) {
	buf := make([]byte, 2048)
	for {
		_, from, err := c.ReadFrom(buf)
		if err != nil {
			return
		}
		c.WriteTo([]byte("client="+from.String()+"\n"), from)
	}
}

// fetch asks a server from within the container.
func (l *lab) fetch(url string) error {
	out, err := l.try("podman", "exec", "web", "wget", "-T", "3", "-qO-", url)
	if err == nil && !strings.HasPrefix(out, "client=") {
		err = fmt.Errorf("%s answered %q", url, out)
	}
	return err
}

// fetchUDP is the same for UDP, of which a datagram may get lost.
func (l *lab) fetchUDP(addr string) (err error) {
	for range 5 {
		var out string
		out, err = l.try("podman", "exec", "web", "sh", "-c", "echo who am I | socat -t 0.5 - UDP:"+addr)
		if err == nil && strings.HasPrefix(out, "client=") {
			return nil
		}
		err = errors.Join(err, fmt.Errorf("%s answered %q", addr, out))
	}
	return err
}

// web starts the container "web", with options for podman run.
func (l *lab) web(args ...string) error {
	_, err := l.try(append(append([]string{"podman", "run", "-d", "--name", "web"}, args...), "localhost/web")...)
	return err
}

// asked waits until the server that is published on an address's port 8080 answers.
func (l *lab) asked(from *netnsutil.NS, addr string) error {
	return eventually(func() error {
		_, _, err := l.ask(from, "tcp", addr)
		return err
	})
}

// refused is nil if a port of the host is closed.
func (l *lab) refused(from *netnsutil.NS, addr, port string) error {
	err := from.Do(func() error {
		c, err := net.DialTimeout("tcp", net.JoinHostPort(addr, port), 3*time.Second)
		if err != nil {
			return err
		}
		return errors.Join(c.Close(), fmt.Errorf("port %s of %s is open", port, addr))
	})
	if errors.Is(err, syscall.ECONNREFUSED) {
		return nil
	}
	return err
}

// helpers are the processes of gofwd, or of Podman's own helpers, in the lab.
// Those that have ended are not among them, though nobody may have waited for them.
func (l *lab) helpers() (pids []int) {
	root := filepath.Join(labDir(), l.suite, "rootfs")
	names := []string{filepath.Join(labDir(), "shared/bin/gofwd")}
	if !l.ours {
		names = []string{root + "/usr/bin/pasta", root + "/usr/bin/passt", root + "/usr/bin/pasta.avx2", root + "/usr/bin/passt.avx2", root + "/usr/lib/podman/rootlessport", root + "/usr/libexec/podman/rootlessport"}
	}
	var files []os.FileInfo
	for _, name := range names {
		if info, err := os.Stat(name); err == nil {
			files = append(files, info)
		}
	}
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	for _, dir := range dirs {
		exe, err := os.Stat(dir + "/exe") // a zombie has none
		if err != nil {
			continue
		}
		for _, file := range files {
			if os.SameFile(exe, file) {
				var pid int
				fmt.Sscan(filepath.Base(dir), &pid)
				pids = append(pids, pid)
				break
			}
		}
	}
	return pids
}

// traces is what helpers could leave behind on the host: listeners, addresses,
// rules, and files if wanted.
func (l *lab) traces(t *testing.T, files bool) string {
	t.Helper()
	all := traces(t, "/run/netns/labhost")
	if files {
		all += l.run(t, "sh", "-c",
			`cd $XDG_RUNTIME_DIR && ls -d gofwd/* libpod/tmp/rp/* libpod/tmp/rootlessport* 2>/dev/null || true`)
	}
	return all
}

// traces is the state of a network namespace.
func traces(t *testing.T, ns string) string {
	t.Helper()
	out, err := exec.Command("nsenter", "--net="+ns, "sh", "-ec",
		`ss -Hlntu | awk '{print $1, $5}' | sort; ip -br addr; ip rule; ip -6 rule; ip route show table all; ip -6 route show table all; nft list ruleset`).CombinedOutput()
	require.NoError(t, err, "%s", out)
	return string(out)
}

// eventually tries for some seconds.
func eventually(try func() error) (err error) {
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if err = try(); err == nil {
			return nil
		}
	}
	return err
}

// load asks all the time, from several clients at once, until it is stopped.
type load struct {
	cancel context.CancelFunc
	done   chan struct{}
	ok     int
	failed []error
}

func startLoad(ns *netnsutil.NS, url string) *load {
	ctx, cancel := context.WithCancel(context.Background())
	ld := &load{cancel: cancel, done: make(chan struct{})}
	go ld.run(ctx, ns, url)
	return ld
}

func (ld *load) run(ctx context.Context, ns *netnsutil.NS, url string) {
	defer close(ld.done)
	client := &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, network, addr string) (c net.Conn, err error) {
			err = ns.Do(func() error {
				c, err = (&net.Dialer{}).DialContext(ctx, network, addr)
				return err
			})
			return c, err
		},
	}}
	const clients = 4
	results := make(chan error)
	for range clients {
		go askInLoop(ctx, client, url, results)
	}
	for left := clients; left > 0; {
		switch err := <-results; {
		case errors.Is(err, errLoadEnds):
			left--
		case err != nil:
			ld.failed = append(ld.failed, err)
		default:
			ld.ok++
		}
	}
}

var errLoadEnds = errors.New("the load ends")

func askInLoop(ctx context.Context, client *http.Client, url string, results chan<- error) {
	for ctx.Err() == nil {
		resp, err := client.Get(url)
		if err == nil {
			_, err = io.Copy(io.Discard, resp.Body)
			resp.Body.Close()
		}
		results <- err
	}
	results <- errLoadEnds
}

// stop returns how many requests were answered, and the errors of the others.
func (ld *load) stop() (ok int, failed []error) {
	ld.cancel()
	<-ld.done
	return ld.ok, ld.failed
}
