package integration

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// The test binary runs three times over:
//
//	outside   builds gofwd and starts itself in a user, mount, PID, IPC and
//	          network namespace of its own
//	init      is PID 1 there: mounts /proc and /run, starts itself once more
//	          and reaps what the tests leave behind
//	tests     runs the tests, as root of that user namespace
//
// So the tests may do all that root may do to networks, whoever runs them, and
// when init ends the kernel kills every program that a test has started.
const stageEnv = "GOFWD_TEST_STAGE"

// binEnv may name a gofwd binary to test instead of a fresh one.
const binEnv = "GOFWD_TEST_BINARY"

// ciEnv, if not empty, turns skipped tests into failed ones.
const ciEnv = "GOFWD_CI"

func TestMain(m *testing.M) {
	var code int
	var err error
	switch os.Getenv(stageEnv) {
	case "":
		code, err = outside()
	case "init":
		code, err = initProcess()
	default:
		// Most tests wait for the network most of the time.
		flag.Parse()
		if f := flag.Lookup("test.parallel"); f.Value.String() == f.DefValue {
			_ = f.Value.Set("6")
		}
		code = m.Run()
		skips.report()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "integration:", err)
		code = 1
	}
	os.Exit(code)
}

// outside builds what is to be tested and starts the tests in namespaces.
func outside() (int, error) {
	// Pdeathsig is about the thread that forked, not the process
	// (PR_SET_PDEATHSIG(2const)).
	runtime.LockOSThread()

	dir, err := os.MkdirTemp("", "gofwd-test-")
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(dir)

	bin := os.Getenv(binEnv)
	if bin == "" {
		bin = filepath.Join(dir, "gofwd")
		build := exec.Command("go", "build", "-trimpath", "-o", bin, "../cmd/gofwd")
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		build.Stdout, build.Stderr = os.Stdout, os.Stderr
		if err := build.Run(); err != nil {
			return 0, fmt.Errorf("build gofwd: %w", err)
		}
	}

	liftFileLimit()
	init := exec.Command("/proc/self/exe", os.Args[1:]...)
	init.Env = append(os.Environ(), stageEnv+"=init", binEnv+"="+bin, "TMPDIR="+dir, "HOME="+dir,
		"PATH="+os.Getenv("PATH")+":/usr/sbin:/sbin") // nginx, ip, tcpdump: not on every user's path
	init.Stdin, init.Stdout, init.Stderr = os.Stdin, os.Stdout, os.Stderr
	init.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWUSER | unix.CLONE_NEWNS | unix.CLONE_NEWPID |
			unix.CLONE_NEWIPC | unix.CLONE_NEWNET,
		UidMappings: []syscall.SysProcIDMap{{HostID: os.Getuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{HostID: os.Getgid(), Size: 1}},
		Pdeathsig:   unix.SIGKILL,
	}
	if err := init.Start(); err != nil {
		return 0, fmt.Errorf("the tests need user namespaces, and they are forbidden here (%w): "+
			"see the sysctls user.max_user_namespaces, kernel.unprivileged_userns_clone and "+
			"kernel.apparmor_restrict_unprivileged_userns", err)
	}
	return exitCode(init.Wait())
}

// liftFileLimit lets the tests open as many files as a service of systemd may
// (DefaultLimitNOFILE=, systemd-system.conf(5)), where that may be changed.
func liftFileLimit() {
	const want = 1 << 19
	var limit unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_NOFILE, &limit) == nil && limit.Max < want {
		_ = unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: limit.Cur, Max: want})
	}
}

// initProcess is PID 1 of the namespaces.
func initProcess() (int, error) {
	for _, m := range []struct{ kind, dir string }{
		{"proc", "/proc"},
		{"tmpfs", "/run"}, // network namespaces by name, control sockets
	} {
		if err := unix.Mount(m.kind, m.dir, m.kind, unix.MS_NOSUID|unix.MS_NODEV, ""); err != nil {
			return 0, fmt.Errorf("mount %s on %s: %w", m.kind, m.dir, err)
		}
	}
	for _, dir := range []string{netnsDir, runtimeDir} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return 0, err
		}
	}
	bin, err := os.Executable()
	if err != nil {
		return 0, err
	}
	os.Setenv(stageEnv, "tests")
	os.Setenv("XDG_RUNTIME_DIR", runtimeDir)
	tests, err := os.StartProcess(bin, os.Args, &os.ProcAttr{
		Files: []*os.File{os.Stdin, os.Stdout, os.Stderr},
	})
	if err != nil {
		return 0, err
	}
	for {
		var status unix.WaitStatus
		switch pid, err := unix.Wait4(-1, &status, 0, nil); {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return 0, fmt.Errorf("wait for the tests: %w", err)
		case pid == tests.Pid && status.Signaled():
			return 0, fmt.Errorf("the tests were ended by a signal: %s", status.Signal())
		case pid == tests.Pid && status.Exited():
			return status.ExitStatus(), nil
		}
	}
}

func exitCode(err error) (int, error) {
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.Exited() {
		return exit.ExitCode(), nil
	}
	return 0, err
}

// skips remembers the tests that did not run, and why.
var skips skipLog

type skipLog struct {
	mu    sync.Mutex
	lines []string
}

func (l *skipLog) report() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, line := range l.lines {
		fmt.Println("skipped:", line)
	}
}

// skip is the only way in which a test of this package is skipped: the reason is
// printed with or without -v, and where everything is expected to be there (CI)
// it is a failure.
func skip(t *testing.T, format string, args ...any) {
	t.Helper()
	why := fmt.Sprintf(format, args...)
	if os.Getenv(ciEnv) != "" {
		t.Fatalf("not to be skipped here: %s", why)
	}
	skips.mu.Lock()
	skips.lines = append(skips.lines, t.Name()+": "+why)
	skips.mu.Unlock()
	t.Skip(why)
}

// need skips the test where a program is not installed.
func need(t *testing.T, programs ...string) {
	t.Helper()
	for _, p := range programs {
		if _, err := exec.LookPath(p); err != nil {
			skip(t, "%s is not installed", p)
		}
	}
}
