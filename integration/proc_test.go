package integration

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// proc is a program that runs in a namespace while the test does something else.
type proc struct {
	name string
	cmd  *exec.Cmd
	log  *logBuffer
	done chan struct{} // closed when it has ended
	err  error         // of Wait, once done is closed
}

// start runs a program in the namespace, until the end of the test at the
// latest. Its output is shown if the test fails.
func (n *node) start(t *testing.T, argv ...string) *proc {
	t.Helper()
	return n.startCmd(t, exec.Command(argv[0], argv[1:]...))
}

func (n *node) startCmd(t *testing.T, cmd *exec.Cmd) *proc {
	t.Helper()
	p := &proc{name: n.name + ": " + cmd.Args[0], cmd: cmd, log: newLogBuffer(), done: make(chan struct{})}
	if cmd.Stdout == nil {
		cmd.Stdout = p.log
	}
	if cmd.Stderr == nil {
		cmd.Stderr = p.log
	}
	// Grandchildren may keep the pipe of the output open.
	cmd.WaitDelay = time.Second
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Setpgid = true
	// A new process is in the network namespace of the thread that forks it.
	require.NoError(t, n.ns.Do(cmd.Start), "start %v in %s", cmd.Args, n.name)
	go p.wait()
	t.Cleanup(func() {
		p.stop()
		if t.Failed() && p.log.String() != "" {
			t.Logf("%s (%v):\n%s", p.name, p.cmd.Args, p.log.String())
		}
	})
	return p
}

func (p *proc) wait() {
	p.err = p.cmd.Wait()
	close(p.done)
}

// stop ends the program and all it has started.
func (p *proc) stop() {
	p.signal(unix.SIGTERM)
	select {
	case <-p.done:
	case <-time.After(3 * time.Second):
	}
	_ = unix.Kill(-p.cmd.Process.Pid, unix.SIGKILL)
	<-p.done
}

func (p *proc) signal(sig syscall.Signal) {
	select {
	case <-p.done: // its PID may be another's by now
	default:
		_ = unix.Kill(p.cmd.Process.Pid, sig)
	}
}

// running reports whether the program has not ended.
func (p *proc) running() bool {
	select {
	case <-p.done:
		return false
	default:
		return true
	}
}

// exit waits until the program has ended, and returns its exit code; -1 is a
// signal.
func (p *proc) exit(t *testing.T, within time.Duration) int {
	t.Helper()
	select {
	case <-p.done:
	case <-time.After(within):
		require.Fail(t, "still running", "%s after %s", p.name, within)
	}
	return p.cmd.ProcessState.ExitCode()
}

// waitLog waits for a line of output, and returns the submatches.
func (p *proc) waitLog(t *testing.T, pattern string) []string {
	t.Helper()
	re := regexp.MustCompile(pattern)
	deadline := time.After(patience)
	for {
		changed := p.log.changed()
		if m := re.FindStringSubmatch(p.log.String()); m != nil {
			return m
		}
		select {
		case <-changed:
		case <-p.done:
			// cmd.Wait has collected all output before done.
			m := re.FindStringSubmatch(p.log.String())
			require.NotNil(t, m, "%s ended (%v) without having printed %q", p.name, p.err, pattern)
			return m
		case <-deadline:
			require.Fail(t, "not printed", "%s: %q", p.name, pattern)
		}
	}
}

// logBuffer collects output, and tells when there is more.
type logBuffer struct {
	mu   sync.Mutex
	buf  bytes.Buffer
	more chan struct{} // closed and replaced by each Write
}

func newLogBuffer() *logBuffer { return &logBuffer{more: make(chan struct{})} }

func (b *logBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	close(b.more)
	b.more = make(chan struct{})
	return b.buf.Write(p)
}

func (b *logBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

func (b *logBuffer) changed() <-chan struct{} {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.more
}

// result is what came of a program that ran to its end.
type result struct {
	code           int
	stdout, stderr string
	took           time.Duration
}

// run runs a program in the namespace to its end.
func (n *node) run(t *testing.T, argv ...string) result {
	t.Helper()
	return n.runCmd(t, exec.Command(argv[0], argv[1:]...))
}

func (n *node) runCmd(t *testing.T, cmd *exec.Cmd) result {
	t.Helper()
	stdout, stderr := newLogBuffer(), newLogBuffer()
	cmd.Stdout, cmd.Stderr = stdout, stderr
	begin := time.Now()
	p := n.startCmd(t, cmd)
	code := p.exit(t, 2*patience)
	return result{code: code, stdout: stdout.String(), stderr: stderr.String(), took: time.Since(begin)}
}

// output runs a program that must succeed, and returns its standard output.
func (n *node) output(t *testing.T, argv ...string) string {
	t.Helper()
	r := n.run(t, argv...)
	require.Zero(t, r.code, "%v in %s: %s%s", argv, n.name, r.stdout, r.stderr)
	return r.stdout
}

// gofwd is a running gofwd.
type gofwd struct {
	*proc
	name string // as gofwd status knows it
}

// gofwdCmd is the command line of gofwd.
func gofwdCmd(args ...string) *exec.Cmd { return exec.Command(os.Getenv(binEnv), args...) }

// attach starts gofwd on the host for the container's namespace, and waits until
// it is ready.
func (tp *topo) attach(t *testing.T, opts ...string) *gofwd {
	t.Helper()
	return tp.host.startGofwd(t, tp.ctr.id, append([]string{"attach", "--netns", tp.ctr.path}, opts...)...)
}

// startGofwd starts gofwd and waits until it is ready.
func (n *node) startGofwd(t *testing.T, name string, args ...string) *gofwd {
	t.Helper()
	return n.startGofwdCmd(t, name, gofwdCmd(args...))
}

func (n *node) startGofwdCmd(t *testing.T, name string, cmd *exec.Cmd) *gofwd {
	t.Helper()
	ready, w, err := os.Pipe()
	require.NoError(t, err)
	defer ready.Close()
	fd := 3 + len(cmd.ExtraFiles) // exec.Cmd.ExtraFiles: "entry i becomes file descriptor 3+i"
	cmd.ExtraFiles = append(cmd.ExtraFiles, w)
	// After the verb, before any "--".
	verb := len(cmd.Args)
	for i, arg := range cmd.Args {
		if arg == "attach" || arg == "run" {
			verb = i + 1
			break
		}
	}
	opts := []string{"--ready-fd", strconv.Itoa(fd), "--name", name, "--log-level", "debug"}
	cmd.Args = append(cmd.Args[:verb:verb], append(opts, cmd.Args[verb:]...)...)
	g := &gofwd{proc: n.startCmd(t, cmd), name: name}
	w.Close()
	require.NoError(t, ready.SetReadDeadline(time.Now().Add(patience)))
	got, err := ready.Read(make([]byte, 16))
	if err != nil || got == 0 {
		code := g.exit(t, patience)
		require.Fail(t, "not ready", "%v: exit %d", cmd.Args, code)
	}
	return g
}

// status is what the tests look at in "gofwd status --json".
type status struct {
	Addrs    []string  `json:"addrs"`
	DNS      []string  `json:"dns"`
	Notes    []string  `json:"notes"`
	Forwards []forward `json:"forwards"`

	Multicast []struct {
		Group   string   `json:"group"`
		Ports   []uint16 `json:"ports"`
		Problem string   `json:"problem"`
	} `json:"multicast"`
}

type forward struct {
	Bound    []string `json:"bound"`
	Path     string   `json:"path"`
	Reason   string   `json:"reason"`
	Problems []string `json:"problems"`
	Active   int64    `json:"active"`
	Total    int64    `json:"total"`
	BytesIn  int64    `json:"bytes_in"`
	BytesOut int64    `json:"bytes_out"`
}

// status asks the running gofwd.
func (g *gofwd) status(t *testing.T, n *node) status {
	t.Helper()
	var s status
	out := n.output(t, os.Getenv(binEnv), "status", "--json", g.name)
	require.NoError(t, json.Unmarshal([]byte(out), &s), "%s", out)
	return s
}

// rss is the resident memory of a process in bytes.
func (p *proc) rss(t *testing.T) int64 {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid))
	require.NoError(t, err)
	m := regexp.MustCompile(`VmRSS:\s+(\d+) kB`).FindSubmatch(b)
	require.NotNil(t, m)
	kb, err := strconv.ParseInt(string(m[1]), 10, 64)
	require.NoError(t, err)
	return kb << 10
}

// children returns the PIDs of all processes that descend from pid.
func children(pid int) []int {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", pid, pid))
	var all []int
	for f := range strings.FieldsSeq(string(b)) {
		child, _ := strconv.Atoi(f)
		all = append(append(all, child), children(child)...)
	}
	return all
}

// alive reports whether there is such a process, zombies not counted.
func alive(pid int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	return err == nil && !bytes.Contains(b, []byte(") Z ")) && !errors.Is(err, os.ErrNotExist)
}
