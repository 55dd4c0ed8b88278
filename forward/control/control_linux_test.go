package control

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/gofwd/gofwd/forward"
	"github.com/gofwd/gofwd/netnsutil"
	"github.com/gofwd/gofwd/netnsutil/nstest"
)

func TestMain(m *testing.M) { nstest.Main(m) }

// rig is a Forwarder with its control socket.
type rig struct {
	f      *forward.Forwarder
	ns     *netnsutil.NS
	socket string
	client *http.Client
	srv    *Server
}

// conns is how many clients the server has.
func (r *rig) conns() int {
	r.srv.mu.Lock()
	defer r.srv.mu.Unlock()
	return len(r.srv.conns)
}

func newRig(t *testing.T) *rig {
	t.Helper()
	ns := nstest.New(t)
	f, err := forward.Start(t.Context(), forward.Config{NetNS: ns})
	require.NoError(t, err)
	t.Cleanup(func() { f.Close() })
	r := &rig{f: f, ns: ns, socket: filepath.Join(t.TempDir(), "s")}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: r.socket, Net: "unix"})
	require.NoError(t, err)
	s := NewServer(Config{Forwarder: f, Version: "1.2.3"})
	r.srv = s
	served := make(chan error)
	go func() { served <- s.Serve(l) }()
	t.Cleanup(func() {
		require.NoError(t, s.Close())
		require.ErrorIs(t, <-served, http.ErrServerClosed)
	})
	r.client = &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", r.socket)
	}}}
	t.Cleanup(r.client.CloseIdleConnections)
	return r
}

// do makes a request and returns status and body.
func (r *rig) do(t *testing.T, method, path, body string) (int, string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, "http://gofwd"+path, strings.NewReader(body))
	require.NoError(t, err)
	resp, err := r.client.Do(req)
	require.NoError(t, err)
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	require.NoError(t, err)
	return resp.StatusCode, string(b)
}

// server starts an echo server in the namespace.
func (r *rig) server(t *testing.T) (port int) {
	t.Helper()
	var l net.Listener
	require.NoError(t, r.ns.Do(func() (err error) { l, err = net.Listen("tcp", ":0"); return err }))
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() { io.Copy(c, c); c.Close() }()
		}
	}()
	return l.Addr().(*net.TCPAddr).Port
}

func (r *rig) echo(t *testing.T, addr string) net.Conn {
	t.Helper()
	c, err := net.Dial("tcp", addr)
	require.NoError(t, err)
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(5 * time.Second))
	_, err = c.Write([]byte("hello"))
	require.NoError(t, err)
	_, err = io.ReadFull(c, make([]byte, 5))
	require.NoError(t, err)
	return c
}

func refused(t *testing.T, addr string) {
	t.Helper()
	_, err := net.Dial("tcp", addr)
	require.ErrorIs(t, err, syscall.ECONNREFUSED)
}

// What RootlessKit's clients send and expect.
func TestRootlessKit(t *testing.T) {
	r := newRig(t)
	port := r.server(t)

	code, body := r.do(t, "GET", "/v1/info", "")
	require.Equal(t, 200, code)
	var i map[string]any
	require.NoError(t, json.Unmarshal([]byte(body), &i))
	require.Equal(t, "1.1.1", i["apiVersion"])
	require.Equal(t, "1.2.3", i["version"])
	require.Equal(t, "10.0.2.100", i["networkDriver"].(map[string]any)["childIP"])
	require.Contains(t, i["portDriver"].(map[string]any)["protos"], "udp6")

	code, body = r.do(t, "GET", "/v1/ports", "")
	require.Equal(t, 200, code)
	require.Equal(t, "[]\n", body)

	spec := fmt.Sprintf(`{"proto":"tcp","parentIP":"0.0.0.0","parentPort":8080,"childPort":%d}`, port)
	code, body = r.do(t, "POST", "/v1/ports", spec)
	require.Equal(t, 201, code, body)
	require.Equal(t, fmt.Sprintf(`{"id":1,"spec":%s}`, spec)+"\n", body)
	r.echo(t, "127.0.0.1:8080")
	r.echo(t, "[::1]:8080") // Go's "tcp" listens on both, and so RootlessKit does

	code, body = r.do(t, "POST", "/v1/ports", spec)
	require.Equal(t, 201, code)
	require.Contains(t, body, `"id":1,`, "the same again is the same forward")

	code, body = r.do(t, "POST", "/v1/ports", `{"proto":"udp6","parentPort":8080,"childIP":"fd67:6f66:7764::100","childPort":53}`)
	require.Equal(t, 201, code, body)
	code, body = r.do(t, "GET", "/v1/ports", "")
	require.Equal(t, 200, code)
	require.Equal(t, fmt.Sprintf(`[{"id":1,"spec":%s},{"id":2,"spec":{"proto":"udp","parentIP":"::","parentPort":8080,"childIP":"fd67:6f66:7764::100","childPort":53}}]`, spec)+"\n", body)

	code, _ = r.do(t, "DELETE", "/v1/ports/1", "")
	require.Equal(t, 200, code)
	refused(t, "127.0.0.1:8080")
	code, body = r.do(t, "DELETE", "/v1/ports/1", "")
	require.Equal(t, 404, code)
	require.JSONEq(t, `{"message":"forward 1: no such forward"}`, body)
}

func TestBadRequests(t *testing.T) {
	r := newRig(t)
	_, err := r.f.Add(forward.Rule{Proto: forward.TCP, Ports: forward.PortRange{First: 8080, Last: 8080}, TargetPorts: forward.PortRange{First: 80, Last: 80}})
	require.NoError(t, err)
	busy, err := net.Listen("tcp", ":8081")
	require.NoError(t, err)
	defer busy.Close()
	before := r.f.Status()
	for _, tt := range []struct {
		method, path, body string
		code               int
		message            string
	}{
		{"POST", "/v1/ports", ``, 400, "EOF"},
		{"POST", "/v1/ports", `{`, 400, "unexpected EOF"},
		{"POST", "/v1/ports", `garbage`, 400, "invalid character"},
		{"POST", "/v1/ports", `{"proto":"tcp","parentPort":1,"childPort":2,"color":"red"}`, 400, `unknown field \"color\"`},
		{"POST", "/v1/ports", `{"proto":"tcp","parentPort":9000,"childPort":2}{}`, 400, "something follows"},
		{"POST", "/v1/ports", `{"proto":"sctp","parentPort":9000,"childPort":2}`, 400, "sctp"},
		{"POST", "/v1/ports", `{"proto":"tcp","parentPort":0,"childPort":2}`, 400, "parentPort 0"},
		{"POST", "/v1/ports", `{"proto":"tcp","parentPort":9000,"childPort":70000}`, 400, "childPort 70000"},
		{"POST", "/v1/ports", `{"proto":"tcp4","parentIP":"::1","parentPort":9000,"childPort":1}`, 400, "tcp4"},
		{"POST", "/v1/ports", `{"proto":"tcp","parentIP":"localhost","parentPort":9000,"childPort":1}`, 400, "localhost"},
		{"POST", "/v1/ports", `{"proto":"tcp","parentIP":"127.0.0.1","parentPort":8080,"childPort":1}`, 409, `overlaps forward 1, \"8080:80/tcp\"`},
		{"POST", "/v1/ports", `{"proto":"tcp","parentPort":8081,"childPort":1}`, 409, fmt.Sprintf("(pid %d)", os.Getpid())},
		{"POST", "/v1/ports", `{"proto":"tcp","parentIP":"192.0.2.1","parentPort":9000,"childPort":1}`, 400, "no interface of this host"},
		{"PUT", "/v1/ports", `{}`, 400, "forwards"},
		{"PUT", "/v1/ports", `{"forwards":["9000:90","x"]}`, 400, `\"x\"`},
		{"PUT", "/v1/ports", `{"forwards":["9000:90","8081:1"]}`, 409, "in use by"},
		{"PUT", "/v1/ports", `{"forwards":[],"generation":99}`, 412, "generation"},
		{"PUT", "/v1/ports", `{"forwards":[],"drain":"-1s"}`, 400, "negative"},
		{"POST", "/v1/forwards", `{"add":["9000:90"],"remove":[7]}`, 404, "forward 7"},
		{"POST", "/v1/forwards", `{"add":[{"proto":"tcp","target_ports":"80","colour":1}]}`, 400, "colour"},
		{"POST", "/v1/forwards", `{"add":["fd:web:80"],"fds":["web"]}`, 400, "1 descriptors are named, and 0 came"},
		{"POST", "/v1/forwards", `{"add":["fd:web:80"]}`, 400, "no socket was passed"},
		{"DELETE", "/v1/ports/x", ``, 400, `\"x\"`},
		{"DELETE", "/v1/ports/1?drain=soon", ``, 400, "soon"},
		{"GET", "/v1/capture?forward=9", ``, 404, "forward 9"},
		{"POST", "/v1/reload", ``, 501, "started without --config"},
		{"POST", "/v1/ports", `{"proto":"` + strings.Repeat("x", maxBody), 413, "too large"},
		{"PATCH", "/v1/ports", ``, 405, ""},
		{"GET", "/v2/ports", ``, 404, ""},
	} {
		code, body := r.do(t, tt.method, tt.path, tt.body)
		require.Equal(t, tt.code, code, "%s %s %.80s: %s", tt.method, tt.path, tt.body, body)
		require.Contains(t, body, tt.message, "%s %s %.80s", tt.method, tt.path, tt.body)
	}
	after := r.f.Status()
	require.Equal(t, before.Generation, after.Generation)
	require.Equal(t, before.Rules, after.Rules)
}

func TestReplaceAll(t *testing.T) {
	r := newRig(t)
	port := r.server(t)
	var changed forward.Changed
	put := func(body string) {
		t.Helper()
		code, got := r.do(t, "PUT", "/v1/ports", body)
		require.Equal(t, 200, code, got)
		require.NoError(t, json.Unmarshal([]byte(got), &changed))
	}
	put(fmt.Sprintf(`{"forwards":["8080:%d","8081:81/tcp,udp"]}`, port))
	require.Len(t, changed.Rules, 3)
	first, open := changed.Rules[0].ID, r.echo(t, "127.0.0.1:8080")

	rule, err := json.Marshal(changed.Rules[0].Rule)
	require.NoError(t, err)
	put(fmt.Sprintf(`{"forwards":[%s,"8082:82"],"generation":%d,"drain":"1m"}`, rule, changed.Generation))
	require.Equal(t, first, changed.Rules[0].ID)
	require.Equal(t, []int{changed.Rules[1].ID}, changed.New)
	_, err = open.Write([]byte("still"))
	require.NoError(t, err)
	_, err = io.ReadFull(open, make([]byte, 5))
	require.NoError(t, err)
	refused(t, "127.0.0.1:8081")
	put(`{"forwards":[]}`)
	refused(t, "127.0.0.1:8080")
}

// A thousand clients that send half a request, or none, keep nobody waiting.
func TestStalledClients(t *testing.T) {
	r := newRig(t)
	port := r.server(t)
	for i := range 1000 {
		c, err := net.Dial("unix", r.socket)
		require.NoError(t, err)
		defer c.Close()
		for text := range map[string]bool{
			[]string{
				"", "P", "POST /v1/ports HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{\"proto\":",
				"GET /v1/events HTTP/1.1\r\nHost: x\r\n\r\n", "\x00\xff\r\n\r\n",
			}[i%5]: true,
		} {
			_, err = c.Write([]byte(text))
			require.NoError(t, err)
		}
	}
	begin := time.Now()
	code, body := r.do(t, "POST", "/v1/ports", fmt.Sprintf(`{"proto":"tcp","parentPort":8080,"childPort":%d}`, port))
	require.Equal(t, 201, code, body)
	r.echo(t, "127.0.0.1:8080")
	require.Less(t, time.Since(begin), 2*time.Second)
}

func TestLease(t *testing.T) {
	r := newRig(t)
	port := r.server(t)
	_, err := r.f.Add(forward.Rule{Proto: forward.UDP, TargetPorts: forward.PortRange{First: 53, Last: 53}})
	require.NoError(t, err)

	c, err := net.Dial("unix", r.socket)
	require.NoError(t, err)
	body := fmt.Sprintf(`{"add":["8080:%d","53/udp"],"lease":true}`, port)
	fmt.Fprintf(c, "POST /v1/forwards HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s", len(body), body)
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	require.NoError(t, err)
	require.Equal(t, 200, resp.StatusCode)
	var changed forward.Changed
	require.NoError(t, json.NewDecoder(resp.Body).Decode(&changed))
	require.Len(t, changed.Rules, 2)
	require.Len(t, changed.New, 1)
	r.echo(t, "127.0.0.1:8080")
	c.Close()
	require.Eventually(t, func() bool {
		s := r.f.Status()
		return len(s.Rules) == 1 && s.Rules[0].Rule.Proto == forward.UDP // what was there before stays
	}, 5*time.Second, 5*time.Millisecond)
	refused(t, "127.0.0.1:8080")
}

// A client that has sent more than its request, as much as the socket takes, is seen to
// go like any other.
func TestStreamsEndWithTheirClients(t *testing.T) {
	r := newRig(t)
	const lease = `{"add":["8080:80"],"lease":true}`
	for _, request := range []string{
		"GET /v1/events HTTP/1.1\r\nHost: x\r\n\r\n",
		"GET /v1/capture HTTP/1.1\r\nHost: x\r\n\r\n",
		fmt.Sprintf("POST /v1/forwards HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s", len(lease), lease),
	} {
		for _, stray := range []int{0, 1, 10 << 20} {
			c, err := net.Dial("unix", r.socket)
			require.NoError(t, err)
			_, err = io.WriteString(c, request)
			require.NoError(t, err)
			resp, err := http.ReadResponse(bufio.NewReader(c), nil)
			require.NoError(t, err)
			require.Equal(t, 200, resp.StatusCode, request)
			time.Sleep(20 * time.Millisecond)
			c.SetWriteDeadline(time.Now().Add(50 * time.Millisecond))
			c.Write(make([]byte, stray))
			time.Sleep(20 * time.Millisecond)
			require.Equal(t, 1, r.conns(), "%d bytes past %s", stray, request)
			c.Close()
			require.Eventually(t, func() bool { return r.conns() == 0 }, 5*time.Second, 5*time.Millisecond, "%d bytes past %s", stray, request)
			require.Empty(t, r.f.Status().Rules)
		}
	}
}

// What is too much is refused, and nothing else: a request whose body never comes is
// none yet, and more than can be answered are told so.
func TestTooManyRequests(t *testing.T) {
	r := newRig(t)
	send := func(text string) net.Conn {
		t.Helper()
		c, err := net.Dial("unix", r.socket)
		require.NoError(t, err)
		t.Cleanup(func() { c.Close() })
		_, err = io.WriteString(c, text)
		require.NoError(t, err)
		return c
	}
	for range MaxConns + 100 {
		send("POST /v1/ports HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n")
	}
	code, got := r.do(t, "GET", "/v1/ports", "")
	require.Equal(t, 200, code, got)
	require.LessOrEqual(t, r.conns(), MaxConns)
	answered := func(c net.Conn) {
		t.Helper()
		c.SetDeadline(time.Now().Add(5 * time.Second))
		resp, err := http.ReadResponse(bufio.NewReader(c), nil)
		require.NoError(t, err)
		require.Equal(t, 200, resp.StatusCode)
	}
	var streams []net.Conn
	for i := range maxBusy {
		// A body that is announced, and too long for net/http to read it, is nothing to
		// wait for.
		body := map[bool]string{true: "Content-Length: 300000\r\n"}[i%2 == 0]
		streams = append(streams, send("GET /v1/events HTTP/1.1\r\nHost: x\r\n"+body+"\r\n"))
		answered(streams[len(streams)-1])
	}
	for _, body := range []string{"", `{"forwards":[]}`} {
		code, got := r.do(t, map[bool]string{true: "GET", false: "PUT"}[body == ""], "/v1/ports", body)
		require.Equal(t, 503, code)
		require.Contains(t, got, "448 requests are being answered")
	}
	streams[0].Close()
	require.Eventually(t, func() bool {
		code, _ := r.do(t, "GET", "/v1/ports", "")
		return code == 200
	}, 5*time.Second, time.Millisecond)
}

// A body that nobody has asked for, and that never comes, delays the answer for as long
// as the client may take to send it.
func TestBodyNeverComes(t *testing.T) {
	r := newRig(t)
	socket := filepath.Join(t.TempDir(), "s")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket, Net: "unix"})
	require.NoError(t, err)
	s := NewServer(Config{Forwarder: r.f})
	s.http.ReadTimeout /= 100
	go s.Serve(l)
	t.Cleanup(func() { s.Close() })
	for request, code := range map[string]int{
		"POST /v1/reload": 501, "GET /v1/status": 200, "GET /v1/events": 200, "DELETE /v1/ports/1": 404,
	} {
		c, err := net.Dial("unix", socket)
		require.NoError(t, err)
		defer c.Close()
		c.SetDeadline(time.Now().Add(5 * time.Second))
		fmt.Fprintf(c, "%s HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n", request)
		resp, err := http.ReadResponse(bufio.NewReader(c), nil)
		require.NoError(t, err, request)
		require.Equal(t, code, resp.StatusCode, request)
	}

	// An answer without an end takes longer than that.
	c, err := net.Dial("unix", socket)
	require.NoError(t, err)
	defer c.Close()
	c.SetDeadline(time.Now().Add(5 * time.Second))
	const lease = `{"add":["8080:80"],"lease":true}`
	fmt.Fprintf(c, "POST /v1/forwards HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s", len(lease), lease)
	_, err = http.ReadResponse(bufio.NewReader(c), nil)
	require.NoError(t, err)
	time.Sleep(3 * s.http.ReadTimeout)
	require.Len(t, r.f.Status().Rules, 1)
}

// sendFDs makes a request with descriptors.
func (r *rig) sendFDs(t *testing.T, body string, fds ...int) (int, string) {
	t.Helper()
	c, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: r.socket, Net: "unix"})
	require.NoError(t, err)
	defer c.Close()
	req := fmt.Sprintf("POST /v1/forwards HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s", len(body), body)
	_, _, err = c.WriteMsgUnix([]byte(req), unix.UnixRights(fds...), nil)
	require.NoError(t, err)
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	require.NoError(t, err)
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	require.NoError(t, err)
	return resp.StatusCode, string(b)
}

func TestPassedListener(t *testing.T) {
	r := newRig(t)
	port := r.server(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	addr := l.Addr().String()
	file, err := l.(*net.TCPListener).File()
	require.NoError(t, err)
	l.Close()
	body := fmt.Sprintf(`{"add":["fd:web:%d"],"fds":["web"]}`, port)
	code, got := r.sendFDs(t, body, int(file.Fd()))
	require.Equal(t, 200, code, got)
	file.Close()
	var changed forward.Changed
	require.NoError(t, json.Unmarshal([]byte(got), &changed))
	require.Equal(t, addr, changed.Rules[0].Bound[0].String())
	r.echo(t, addr)
	require.NoError(t, r.f.Remove(changed.Rules[0].ID, 0))
	refused(t, addr)

	// Descriptors that are no good.
	udp, err := net.ListenPacket("udp", "127.0.0.1:0")
	require.NoError(t, err)
	defer udp.Close()
	udpFile, err := udp.(*net.UDPConn).File()
	require.NoError(t, err)
	defer udpFile.Close()
	null, err := os.Open(os.DevNull)
	require.NoError(t, err)
	defer null.Close()
	deaf, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	require.NoError(t, err)
	defer unix.Close(deaf)
	for fd, message := range map[int]string{
		int(udpFile.Fd()): "not one for tcp", int(null.Fd()): "not a socket", deaf: "does not listen",
	} {
		code, got := r.sendFDs(t, body, fd)
		require.Equal(t, 400, code, got)
		require.Contains(t, got, message)
	}
	require.Empty(t, r.f.Status().Rules)

	// None is left open.
	entries := func() int {
		e, err := os.ReadDir("/proc/self/fd")
		require.NoError(t, err)
		return len(e)
	}
	before := entries()
	for range 20 {
		r.sendFDs(t, `{"add":[]}`, int(null.Fd()), int(null.Fd()))
	}
	require.Eventually(t, func() bool { return entries() <= before }, 5*time.Second, 10*time.Millisecond)
}

func TestEventsAndFlows(t *testing.T) {
	r := newRig(t)
	port := r.server(t)
	resp, err := r.client.Get("http://gofwd/v1/events")
	require.NoError(t, err)
	defer resp.Body.Close()
	lines := json.NewDecoder(resp.Body)
	next := func() (e forward.Event) {
		t.Helper()
		require.NoError(t, lines.Decode(&e))
		return e
	}
	added, err := r.f.Add(forward.Rule{
		Proto: forward.TCP, Ports: forward.PortRange{First: 8080, Last: 8080},
		TargetPorts: forward.PortRange{First: uint16(port), Last: uint16(port)},
	})
	require.NoError(t, err)
	e := next()
	require.Equal(t, forward.ForwardAdded, e.Type)
	require.Equal(t, added.ID, e.Forward.ID)

	c := r.echo(t, "127.0.0.1:8080")
	e = next()
	require.Equal(t, forward.FlowOpened, e.Type)
	require.Equal(t, c.LocalAddr().String(), e.Flow.Client.String())

	code, body := r.do(t, "GET", "/v1/flows", "")
	require.Equal(t, 200, code)
	var flows []forward.Flow
	require.NoError(t, json.Unmarshal([]byte(body), &flows))
	require.Len(t, flows, 1)
	require.Equal(t, added.ID, flows[0].Forward)
	require.Equal(t, fmt.Sprintf("10.0.2.100:%d", port), flows[0].Server.String())
	require.Equal(t, "169.254.1.2", flows[0].Seen.Addr().String())
	require.EqualValues(t, 5, flows[0].BytesIn)
	require.EqualValues(t, 5, flows[0].BytesOut)
	require.NotZero(t, flows[0].RTT)

	c.Close()
	e = next()
	require.Equal(t, forward.FlowClosed, e.Type)
	require.EqualValues(t, 5, e.Flow.BytesIn)
	require.NoError(t, r.f.Remove(added.ID, 0))
	require.Equal(t, forward.ForwardRemoved, next().Type)
	require.NoError(t, r.f.Close())
	require.ErrorIs(t, lines.Decode(&e), io.EOF)
}

func TestMetrics(t *testing.T) {
	r := newRig(t)
	port := r.server(t)
	r.do(t, "PUT", "/v1/ports", fmt.Sprintf(`{"forwards":["8080:%d"]}`, port))
	c := r.echo(t, "127.0.0.1:8080")
	defer c.Close()
	code, body := r.do(t, "GET", "/metrics", "")
	require.Equal(t, 200, code)
	rule := fmt.Sprintf(`forward="1",rule="8080:%d/tcp",path="tap"`, port)
	if !strings.Contains(body, rule) {
		rule = strings.Replace(rule, "tap", "kernel", 1)
	}
	require.Contains(t, body, "# TYPE gofwd_flows_total counter\ngofwd_flows_total{"+rule+"} 1\n")
	require.Contains(t, body, "gofwd_flows_active{"+rule+"} 1\n")
	require.Contains(t, body, "gofwd_in_bytes_total{"+rule+"} 5\n")
	require.Contains(t, body, "gofwd_forwards 1\n")
	require.Equal(t, `"a\\b\"c\n"`, label("a\\b\"c\n"))
}

func TestCapture(t *testing.T) {
	r := newRig(t)
	port, other := r.server(t), r.server(t)
	r.do(t, "PUT", "/v1/ports", fmt.Sprintf(`{"forwards":["8080:%d","8081:%d"]}`, port, other))
	resp, err := r.client.Get("http://gofwd/v1/capture?forward=1")
	require.NoError(t, err)
	head := make([]byte, 24)
	_, err = io.ReadFull(resp.Body, head)
	require.NoError(t, err)
	require.Equal(t, uint32(0xa1b23c4d), binary.NativeEndian.Uint32(head))
	r.echo(t, "127.0.0.1:8081").Close()
	r.echo(t, "127.0.0.1:8080").Close()
	seen := 0
	for {
		record := make([]byte, 16)
		_, err = io.ReadFull(resp.Body, record)
		require.NoError(t, err)
		frame := make([]byte, binary.NativeEndian.Uint32(record[8:]))
		_, err = io.ReadFull(resp.Body, frame)
		require.NoError(t, err)
		ports := frame[14+20:]
		src, dst := binary.BigEndian.Uint16(ports), binary.BigEndian.Uint16(ports[2:])
		require.True(t, int(src) == port || int(dst) == port, "a frame of %d to %d", src, dst)
		if bytes.HasSuffix(frame, []byte("hello")) {
			if seen++; seen == 2 { // there and back
				break
			}
		}
	}
	resp.Body.Close()
}

// openapi.yaml describes all that there is, and nothing else.
func TestOpenAPI(t *testing.T) {
	r := newRig(t)
	code, body := r.do(t, "GET", "/openapi.yaml", "")
	require.Equal(t, 200, code)
	var described []string
	path := ""
	paths, _, _ := strings.Cut(body, "\ncomponents:")
	for line := range strings.Lines(paths) {
		name, is := strings.CutSuffix(strings.TrimRight(line, "\n"), ":")
		switch {
		case is && strings.HasPrefix(name, "  /"):
			path = strings.TrimSpace(name)
		case is && path != "" && strings.HasPrefix(name, "    ") && !strings.HasPrefix(name, "     "):
			described = append(described, strings.ToUpper(strings.TrimSpace(name))+" "+path)
		}
	}
	require.ElementsMatch(t, slices.Collect(maps.Keys(newHandler(Config{}).routes())), described)
}

// Clients of other users are turned away.
func TestOtherUser(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket, Net: "unix"})
	require.NoError(t, err)
	users, err := usersOf(l)
	require.NoError(t, err)
	require.Equal(t, [2]uint32{uint32(os.Geteuid()), uint32(os.Geteuid())}, users)

	s := NewServer(Config{})
	go s.http.Serve(&listener{&UserListener{l, [2]uint32{users[0] + 1, users[1] + 2}, s.log}, s})
	t.Cleanup(func() { s.Close() })
	c, err := net.Dial("unix", socket)
	require.NoError(t, err)
	defer c.Close()
	c.SetDeadline(time.Now().Add(5 * time.Second))
	_, err = c.Read(make([]byte, 1))
	require.ErrorIs(t, err, io.EOF)
}
