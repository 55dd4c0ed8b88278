package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// launcher starts every process of a run from one thread of its own, which
// enters the namespace, takes the processors that the child is to have, and
// forks. The thread lives as long as the launcher, and its children die with it
// (PR_SET_PDEATHSIG(2const) means the thread, not the process): nothing is left
// behind even by SIGKILL.
type launcher struct {
	starts chan func()
	// client and server are the processors of the load generators. They
	// are the same for every tool, and the tools themselves may use all.
	client, server unix.CPUSet
	all            unix.CPUSet
}

func newLauncher() (*launcher, error) {
	l := &launcher{starts: make(chan func())}
	if err := unix.SchedGetaffinity(0, &l.all); err != nil {
		return nil, os.NewSyscallError("sched_getaffinity", err)
	}
	l.client, l.server = splitCPUs(l.all)
	go l.serveStarts()
	return l, nil
}

// splitCPUs gives the first half of the processors to the clients and the rest
// to the servers; one processor is for both.
func splitCPUs(all unix.CPUSet) (client, server unix.CPUSet) {
	n := all.Count()
	if n < 2 {
		return all, all
	}
	seen := 0
	for cpu := range len(all) * 64 {
		switch {
		case !all.IsSet(cpu):
			continue
		case seen < n/2:
			client.Set(cpu)
		default:
			server.Set(cpu)
		}
		seen++
	}
	return client, server
}

func (l *launcher) serveStarts() {
	runtime.LockOSThread()
	for start := range l.starts {
		start()
	}
}

// command is a program to start in a namespace.
type command struct {
	ns   *namespace
	cpus unix.CPUSet
	argv []string
	// env is added to the environment, and extra are descriptors 3 and on.
	env   []string
	extra []*os.File
}

// process is a started program.
type process struct {
	argv   []string
	pid    int
	cmd    *exec.Cmd
	stdin  io.WriteCloser
	stdout io.ReadCloser
	stderr tail
}

// start starts a program. Whoever starts it ends it, by [process.output] or
// [process.stop].
func (l *launcher) start(c command) (*process, error) {
	p := &process{argv: c.argv}
	p.cmd = exec.Command(c.argv[0], c.argv[1:]...)
	p.cmd.Env = append(os.Environ(), c.env...)
	p.cmd.ExtraFiles = c.extra
	p.cmd.Stderr = &p.stderr
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	var err error
	if p.stdin, err = p.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	if p.stdout, err = p.cmd.StdoutPipe(); err != nil {
		return nil, err
	}
	errc := make(chan error)
	l.starts <- func() { errc <- p.startHere(c) }
	if err := <-errc; err != nil {
		return nil, fmt.Errorf("start %s: %w", c.argv[0], err)
	}
	p.pid = p.cmd.Process.Pid
	return p, nil
}

// startHere starts the program from the calling thread, which takes on all that
// it inherits. The thread is the launcher's: it does nothing else, so it need
// not go back.
func (p *process) startHere(c command) error {
	if err := unix.Setns(c.ns.ns.Fd(), unix.CLONE_NEWNET); err != nil {
		return os.NewSyscallError("setns", err)
	}
	if err := unix.SchedSetaffinity(0, &c.cpus); err != nil {
		return os.NewSyscallError("sched_setaffinity", err)
	}
	return p.cmd.Start()
}

// output reads what the program prints to its end, and waits for it. The
// program is killed when ctx ends.
func (p *process) output(ctx context.Context) ([]byte, error) {
	stop := context.AfterFunc(ctx, p.kill)
	defer stop()
	out, _ := io.ReadAll(p.stdout)
	err := p.cmd.Wait()
	switch {
	case err == nil:
		return out, nil
	case ctx.Err() != nil:
		return out, fmt.Errorf("%s: no answer in time", p.argv[0])
	}
	return out, fmt.Errorf("%s: %w: %s", p.argv[0], err, p.stderr.lastLine(out))
}

// awaitLine reads one line of what the program prints.
func (p *process) awaitLine(ctx context.Context) (string, error) {
	got, err := p.readUntil(ctx, "\n")
	return string(got), err
}

// awaitOutput reads what the program prints until it contains want.
func (p *process) awaitOutput(ctx context.Context, want string) error {
	_, err := p.readUntil(ctx, want)
	return err
}

func (p *process) readUntil(ctx context.Context, want string) ([]byte, error) {
	stop := context.AfterFunc(ctx, p.kill)
	defer stop()
	var got []byte
	buf := make([]byte, 512)
	for !bytes.Contains(got, []byte(want)) {
		n, err := p.stdout.Read(buf)
		got = append(got, buf[:n]...)
		if err != nil && ctx.Err() != nil {
			return got, fmt.Errorf("%s is not ready in time", p.argv[0])
		}
		if err != nil {
			return got, fmt.Errorf("%s ended before it was ready: %s", p.argv[0], p.stderr.lastLine(got))
		}
	}
	return got, nil
}

func (p *process) kill() { _ = p.cmd.Process.Kill() }

// stop ends the program: SIGTERM, and SIGKILL when that took two seconds.
func (p *process) stop() {
	p.stdin.Close()
	_ = p.cmd.Process.Signal(unix.SIGTERM)
	kill := time.AfterFunc(2*time.Second, p.kill)
	defer kill.Stop()
	_ = p.cmd.Wait()
}

// ended returns why the program has ended, or nil while it runs.
func (p *process) ended() error {
	var info unix.Siginfo
	err := unix.Waitid(unix.P_PID, p.pid, &info, unix.WEXITED|unix.WNOHANG|unix.WNOWAIT, nil)
	if err == nil && info.Signo == 0 {
		return nil
	}
	return fmt.Errorf("%s has ended: %s", p.argv[0], p.stderr.lastLine(nil))
}

// tail keeps the end of what a program wrote.
type tail struct {
	mu  sync.Mutex
	buf []byte
}

func (t *tail) Write(b []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.buf = append(t.buf, b...)
	if over := len(t.buf) - 4096; over > 0 {
		t.buf = t.buf[over:]
	}
	return len(b), nil
}

// lastLine returns the last line of t, or of alt where t is empty.
func (t *tail) lastLine(alt []byte) string {
	t.mu.Lock()
	defer t.mu.Unlock()
	text := strings.TrimSpace(string(t.buf))
	if text == "" {
		text = strings.TrimSpace(string(alt))
	}
	if text == "" {
		return "it said nothing"
	}
	return text[strings.LastIndexByte(text, '\n')+1:]
}

// usage is what a set of processes has used.
type usage struct {
	cpu time.Duration // user and system time since they started
	rss int64         // resident bytes, what they share counted in each
}

// usageOf adds up the processes pids and all their descendants.
func usageOf(pids []int) (usage, error) {
	children, err := processTree()
	if err != nil {
		return usage{}, err
	}
	var u usage
	for queue := pids; len(queue) > 0; queue = queue[1:] {
		queue = append(queue, children[queue[0]]...)
		one, err := usageOfProcess(queue[0])
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) {
			continue // it has just ended
		}
		if err != nil {
			return usage{}, err
		}
		u.cpu += one.cpu
		u.rss += one.rss
	}
	return u, nil
}

// processTree returns the children of every process.
func processTree() (map[int][]int, error) {
	dir, err := os.Open("/proc")
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	names, err := dir.Readdirnames(-1)
	if err != nil {
		return nil, err
	}
	tree := map[int][]int{}
	for _, name := range names {
		pid, err := strconv.Atoi(name)
		if err != nil {
			continue
		}
		if fields, err := procStat(pid); err == nil {
			ppid, _ := strconv.Atoi(fields[statPPID])
			tree[ppid] = append(tree[ppid], pid)
		}
	}
	return tree, nil
}

// Fields of /proc/PID/stat that follow the name of the program, which may
// contain anything (proc_pid_stat(5), numbered from 3 there).
const (
	statPPID = 4 - 3
	statRSS  = 24 - 3
)

func procStat(pid int) ([]string, error) {
	data, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return nil, err
	}
	return parseStat(data)
}

func parseStat(data []byte) ([]string, error) {
	_, rest, ok := bytes.Cut(data, []byte(") "))
	// The name itself may contain ") ": what counts is the last one.
	for ok {
		var more []byte
		if _, more, ok = bytes.Cut(rest, []byte(") ")); ok {
			rest = more
		}
	}
	fields := strings.Fields(string(rest))
	if len(fields) <= statRSS {
		return nil, fmt.Errorf("parse stat of a process: %q", data)
	}
	return fields, nil
}

func usageOfProcess(pid int) (usage, error) {
	fields, err := procStat(pid)
	if err != nil {
		return usage{}, err
	}
	cpu, err := cpuTime(pid)
	if err != nil {
		return usage{}, err
	}
	pages, _ := strconv.ParseInt(fields[statRSS], 10, 64)
	return usage{cpu: cpu, rss: pages * int64(os.Getpagesize())}, nil
}

// cpuTime reads the processor time of a process, threads that have ended
// included, from its CPU clock: in nanoseconds, where /proc/PID/stat counts in
// hundredths of a second, more than a helper that splices uses in a sample. The
// number of the clock is that of clock_getcpuclockid(3).
func cpuTime(pid int) (time.Duration, error) {
	const cpuClockSched = 2
	var t unix.Timespec
	if err := unix.ClockGettime(int32(^pid<<3|cpuClockSched), &t); err != nil {
		if errors.Is(err, unix.EINVAL) {
			err = unix.ESRCH // there is no such process
		}
		return 0, fmt.Errorf("read the CPU clock of process %d: %w", pid, err)
	}
	return time.Duration(t.Nano()), nil
}
