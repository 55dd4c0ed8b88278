package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	"golang.org/x/term"

	"github.com/gofwd/gofwd/netnsutil"
)

// measure builds what is measured, starts the lab in a user namespace, and
// collects what it reports.
func measure(o *options) (*Result, error) {
	tmp, err := os.MkdirTemp("", "bench-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(tmp)
	env, err := build(tmp)
	if err != nil {
		return nil, err
	}
	result := &Result{Machine: machine(o)}
	lab := order{Tools: o.toolNames(), Rounds: o.rounds, Seconds: o.seconds}
	for _, r := range o.rows() {
		result.Rows = append(result.Rows, r.Row)
		lab.Rows = append(lab.Rows, r.Name)
	}
	proc, out, err := startLab(lab, env)
	if err != nil {
		return nil, err
	}
	defer out.Close()
	// ^C ends the run early: what has been measured is shown.
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
	defer stop()
	defer context.AfterFunc(ctx, func() { _ = proc.Signal(unix.SIGTERM) })()
	collectErr := collect(o, out, result)
	state, err := proc.Wait()
	if err != nil {
		return nil, err
	}
	if !state.Success() {
		return nil, fmt.Errorf("the measuring process ended: %s", state)
	}
	if collectErr != nil {
		return nil, collectErr
	}
	if o.all {
		return result, result.complete()
	}
	return result, nil
}

// complete returns an error if one of the tools has no sample at all.
func (r *Result) complete() error {
	for _, t := range r.Tools {
		measured := slices.ContainsFunc(r.Samples, func(s Sample) bool { return s.Tool == t.Name && s.Err == "" })
		if !measured {
			return fmt.Errorf("%s could not be measured: %s", t.Name, strings.Join(r.failures(r.Rows), "; "))
		}
	}
	return nil
}

const module = "github.com/gofwd/gofwd"

// build compiles gofwd and fdbased into dir, unless the environment names
// other ones, and returns an environment that names them.
func build(dir string) ([]string, error) {
	environ := os.Environ()
	for env, pkg := range map[string]string{"GOFWD": module + "/cmd/gofwd", "FDBASED": module + "/bench/fdbased"} {
		if os.Getenv(env) != "" {
			continue
		}
		path := filepath.Join(dir, filepath.Base(pkg))
		cmd := exec.Command("go", "build", "-trimpath", "-o", path, pkg)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			return nil, fmt.Errorf("build %s (run this from its source, or set %s=): %w\n%s", pkg, env, err, out)
		}
		environ = append(environ, env+"="+path)
	}
	return environ, nil
}

// startLab starts this program once more as root of a user namespace, with
// subordinate ids where there are any: RootlessKit wants them.
func startLab(o order, env []string) (*os.Process, *os.File, error) {
	liftFileLimit()
	text, err := json.Marshal(o)
	if err != nil {
		return nil, nil, err
	}
	read, write, err := os.Pipe()
	if err != nil {
		return nil, nil, err
	}
	defer write.Close()
	runtime.LockOSThread() // the lab ends with this thread
	cfg := netnsutil.SpawnConfig{
		MapAuto:   true,
		NewNS:     unix.CLONE_NEWNET | unix.CLONE_NEWNS | unix.CLONE_NEWIPC,
		Args:      []string{os.Args[0], "lab", string(text)},
		Env:       env,
		Files:     []*os.File{nil, write, os.Stderr},
		Pdeathsig: unix.SIGTERM,
	}
	proc, err := netnsutil.Spawn(cfg)
	if err != nil {
		cfg.MapAuto = false
		var again error
		if proc, again = netnsutil.Spawn(cfg); again != nil {
			read.Close()
			return nil, nil, errors.Join(err, again)
		}
		fmt.Fprintf(os.Stderr, "bench: no subordinate ids, so RootlessKit will be missing: %v\n", err)
	}
	return proc, read, nil
}

// liftFileLimit lets root's run have the open files that 10,000 connections
// need; an ordinary user has what he has, and the result says how many.
func liftFileLimit() {
	const want = 1 << 17
	var lim unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_NOFILE, &lim) == nil && lim.Max < want {
		lim.Max = want
		_ = unix.Setrlimit(unix.RLIMIT_NOFILE, &lim)
	}
	raiseFileLimit()
}

// collect reads the lab's reports to their end, and shows how far it is.
func collect(o *options, from io.Reader, result *Result) error {
	in := json.NewDecoder(from)
	p := newProgress(os.Stderr, term.IsTerminal(int(os.Stderr.Fd())), o)
	defer p.end()
	for {
		var r report
		switch err := in.Decode(&r); {
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return fmt.Errorf("read reports: %w", err)
		}
		switch {
		case r.Total != nil:
			p.begin(*r.Total)
		case r.Tool != nil:
			result.addTool(*r.Tool)
			if r.Tool.Missing != "" {
				fmt.Fprintf(os.Stderr, "bench: leaving out %s: %s\n", r.Tool.Name, r.Tool.Missing)
				if o.all {
					return fmt.Errorf("%s is missing: %s", r.Tool.Name, r.Tool.Missing)
				}
			}
		case r.Sample != nil:
			result.Samples = append(result.Samples, *r.Sample)
			p.add(r.Sample)
		}
	}
}

// addTool puts a tool into the list, in the order of the columns.
func (r *Result) addTool(info ToolInfo) {
	if have := r.tool(info.Name); have != nil {
		*have = info
		return
	}
	r.Tools = append(r.Tools, info)
	order := func(name string) int {
		return slices.IndexFunc(allTools(), func(t tool) bool { return t.name() == name })
	}
	slices.SortFunc(r.Tools, func(a, b ToolInfo) int { return order(a.Name) - order(b.Name) })
}

// machine describes where the program runs.
func machine(o *options) Machine {
	liftFileLimit()
	m := Machine{
		Date: time.Now().UTC().Truncate(time.Second), Cores: runtime.NumCPU(),
		User: "an ordinary user", Sysctls: map[string]string{},
		Rounds: o.rounds, Seconds: o.seconds,
	}
	if os.Getuid() == 0 {
		m.User = "root"
	}
	// The part after the first dash is the distribution's.
	m.Kernel, _, _ = strings.Cut(readLine("/proc/sys/kernel/osrelease"), "-")
	m.DefaultCC = readLine("/proc/sys/net/ipv4/tcp_congestion_control")
	for _, name := range []string{
		"net/core/rmem_max", "net/core/wmem_max", "net/ipv4/tcp_rmem", "net/ipv4/tcp_wmem",
		"fs/pipe-user-pages-soft", "fs/pipe-max-size",
	} {
		m.Sysctls[name] = strings.Join(strings.Fields(readLine("/proc/sys/"+name)), " ")
	}
	info, _ := os.ReadFile("/proc/cpuinfo")
	for line := range strings.Lines(string(info)) {
		if key, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(key) == "model name" {
			m.CPU = strings.TrimSpace(value)
			break
		}
	}
	commit, err := exec.Command("git", "-c", "safe.directory=*", "describe", "--always", "--dirty").Output()
	if err == nil {
		m.Gofwd = strings.TrimSpace(string(commit))
	}
	var lim unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_NOFILE, &lim) == nil {
		m.MaxFiles = lim.Max
	}
	return m
}

// readLine returns the first line of a file of /proc, "" where it is not there.
func readLine(path string) string {
	data, _ := os.ReadFile(path)
	line, _, _ := strings.Cut(string(data), "\n")
	return line
}
