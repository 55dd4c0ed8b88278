package main

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"

	ll "github.com/landlock-lsm/go-landlock/landlock/syscall"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/gofwd/gofwd/netnsutil"
)

// What a process in the sandbox can do, and what it can't.
func TestSandbox(t *testing.T) {
	if _, err := ll.LandlockGetABIVersion(); err != nil {
		t.Skipf("this kernel has no Landlock: %v", err)
	}
	dir := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(dir, "own"), nil, 0o600))
	out, err := exec.Command("sandboxed", dir).CombinedOutput()
	require.NoError(t, err, "%s", out)
	require.Equal(t, `read resolv.conf: ok
read proc: ok
remove own file: ok
enter namespace: ok
make transparent socket: ok
make netlink socket: ok
make packet socket: ok
listen: ok
start threads: ok
read a program: permission denied
write a file: permission denied
make a file: permission denied
make a directory: operation not permitted
run a program: operation not permitted
become a program: operation not permitted
mount: operation not permitted
make a user namespace: operation not permitted
enter another kind of namespace: operation not permitted
make a socket of another kind: operation not permitted
trace: operation not permitted
become somebody: operation not permitted
`, string(out))
}

// What only root's capabilities allow is refused before they are given up.
func TestSandboxIsTooSmall(t *testing.T) {
	dir := t.TempDir()
	closed, file := filepath.Join(dir, "closed"), filepath.Join(dir, "config")
	require.NoError(t, os.Mkdir(closed, 0o500))
	require.NoError(t, os.WriteFile(file, nil, 0o600))
	s := sandbox{removeFrom: []string{dir}, config: file}
	require.NoError(t, s.checkNames())
	require.NoError(t, s.checkConfig())
	require.NoError(t, (&sandbox{}).checkConfig())
	require.NoError(t, os.Chmod(file, 0o200))
	s.removeFrom = append(s.removeFrom, closed)
	if _, err := os.ReadFile(file); err != nil {
		require.NoError(t, s.checkNames(), "it is not the sandbox's fault")
		require.NoError(t, s.checkConfig())
		return
	}
	require.EqualError(t, s.checkNames(), "remove files from "+closed+" at the end: in the sandbox even root may not: permission denied")
	require.EqualError(t, s.checkConfig(), "read configuration "+file+": in the sandbox even root may not: permission denied")
	require.NoError(t, os.WriteFile(filepath.Join(closed, "again"), nil, 0o600), "as before")
}

// sandboxed DIR enters the sandbox, and tells what comes of several attempts.
func sandboxedMain() {
	dir := os.Args[1]
	ns, err := netnsutil.New()
	check(err)
	s := sandbox{removeFrom: []string{dir}}
	check(s.enter())
	for _, a := range []struct {
		name string
		try  func() error
	}{
		{"read resolv.conf", func() error { return readAll(resolvConfPath) }},
		{"read proc", func() error { return readAll("/proc/thread-self/net/tcp") }},
		{"remove own file", func() error { return os.Remove(filepath.Join(dir, "own")) }},
		{"enter namespace", func() error { return ns.Do(func() error { return nil }) }},
		{"make transparent socket", func() error { return ns.Do(transparentSocket) }},
		{"make netlink socket", func() error { return socket(unix.AF_NETLINK, unix.SOCK_RAW) }},
		{"make packet socket", func() error {
			return ns.Do(func() error { return socket(unix.AF_PACKET, unix.SOCK_RAW) })
		}},
		{"listen", func() error {
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				return err
			}
			return l.Close()
		}},
		{"start threads", startThreads},

		{"read a program", func() error { return readAll("/bin/sh") }},
		{"write a file", func() error { return os.WriteFile("/etc/passwd", nil, 0) }},
		{"make a file", func() error { return os.WriteFile(filepath.Join(dir, "new"), nil, 0o600) }},
		{"make a directory", func() error { return os.Mkdir(filepath.Join(dir, "new"), 0o700) }},
		{"run a program", func() error { return exec.Command("/bin/true").Run() }},
		{"become a program", func() error { return unix.Exec("/bin/true", []string{"true"}, nil) }},
		{"mount", func() error { return unix.Mount("none", dir, "tmpfs", 0, "") }},
		{"make a user namespace", func() error { return unix.Unshare(unix.CLONE_NEWUSER) }},
		{"enter another kind of namespace", func() error { return unix.Setns(ns.Fd(), 0) }},
		{"make a socket of another kind", func() error { return socket(unix.AF_ALG, unix.SOCK_SEQPACKET) }},
		{"trace", func() error { return unix.PtraceAttach(os.Getppid()) }},
		{"become somebody", func() error { return unix.Setuid(1) }},
	} {
		result := "ok"
		if err := a.try(); err != nil {
			result = err.Error()
			if errno, ok := errors.AsType[syscall.Errno](err); ok {
				result = errno.Error()
			}
		}
		fmt.Printf("%s: %s\n", a.name, result)
	}
}

func readAll(path string) error {
	_, err := os.ReadFile(path)
	return err
}

func socket(family, kind int) error {
	fd, err := unix.Socket(family, kind|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	return unix.Close(fd)
}

func transparentSocket() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return unix.SetsockoptInt(fd, unix.SOL_IP, unix.IP_TRANSPARENT, 1)
}

// startThreads starts some that are all there at once.
func startThreads() error {
	const n = 20
	there, done := make(chan int), make(chan struct{})
	for range n {
		go func() {
			runtime.LockOSThread()
			there <- unix.Gettid()
			<-done
		}()
	}
	ids := make(map[int]bool)
	for range n {
		ids[<-there] = true
	}
	close(done)
	if len(ids) != n {
		return fmt.Errorf("only %d threads", len(ids))
	}
	return nil
}

// Every phase holds for every thread of a running gofwd, and --no-sandbox is
// none of them.
func TestSandboxOfRun(t *testing.T) {
	last, err := os.ReadFile("/proc/sys/kernel/cap_last_cap")
	require.NoError(t, err)
	n, err := strconv.Atoi(strings.TrimSpace(string(last)))
	require.NoError(t, err)
	all := fmt.Sprintf("%016x", uint64(1)<<(n+1)-1)
	for _, tt := range []struct{ option, want string }{
		// CAP_KILL, CAP_NET_BIND_SERVICE, CAP_NET_ADMIN, CAP_NET_RAW, CAP_SYS_ADMIN
		{"--no-sandbox=false", "CapEff:\t0000000000203420\nNoNewPrivs:\t1\nSeccomp:\t2"},
		{"--no-sandbox", "CapEff:\t" + all + "\nNoNewPrivs:\t0\nSeccomp:\t0"},
	} {
		cmd := exec.Command("gofwd", "run", tt.option, "--ready-fd=3", "--", "sh", "-c",
			`head -c1 ready >/dev/null; for t in /proc/$PPID/task/*; do grep -hE '^(CapEff|NoNewPrivs|Seccomp):' $t/status; done; echo; grep NoNew /proc/$$/status`)
		cmd.Dir = t.TempDir()
		require.NoError(t, unix.Mkfifo(filepath.Join(cmd.Dir, "ready"), 0o600))
		ready, err := os.OpenFile(filepath.Join(cmd.Dir, "ready"), os.O_RDWR, 0)
		require.NoError(t, err)
		defer ready.Close()
		cmd.ExtraFiles = []*os.File{ready}
		cmd.Env = append(os.Environ(), "XDG_RUNTIME_DIR="+cmd.Dir)
		out, err := cmd.CombinedOutput()
		require.NoError(t, err, "%s", out)
		threads, command, _ := strings.Cut(string(out), "\n\n")
		require.Equal(t, "NoNewPrivs:\t0\n", command, "COMMAND is not concerned")
		lines := strings.Split(threads, "\n")
		require.Zero(t, len(lines)%3)
		require.GreaterOrEqual(t, len(lines)/3, 3)
		for i := 0; i < len(lines); i += 3 {
			require.Equal(t, tt.want, strings.Join(lines[i:i+3], "\n"))
		}
	}
}
