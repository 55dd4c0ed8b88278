// Package spawntest tests netnsutil.Spawn from where users call it: outside of
// any namespace that the tests made, which is where netnsutil's own tests run.
package spawntest

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/gofwd/gofwd/netnsutil"
)

// report is what a spawned copy of the test binary says about itself.
type report struct {
	UID, GID             int
	UserNS, MntNS, NetNS string
	UIDMap               string
	CapEff               string
	PPID, SID, PID       int
	Args                 []string
	Env                  []string
	FDs                  map[string]string
	EnterError           string
}

// TestMain is also the program that the tests start: "report" prints a report
// and then, as "hold" does, waits until its standard input ends.
func TestMain(m *testing.M) {
	if len(os.Args) < 2 {
		os.Exit(m.Run())
	}
	switch os.Args[1] {
	case "report":
		json.NewEncoder(os.Stdout).Encode(newReport())
	case "hold":
		fmt.Println("holding")
	case "spawn-and-die":
		// Pdeathsig is due when this thread ends.
		runtime.LockOSThread()
		p, err := netnsutil.Spawn(netnsutil.SpawnConfig{
			Args:  []string{"spawntest", "hold"},
			Files: []*os.File{os.Stdin, os.Stdout}, Pdeathsig: syscall.SIGKILL,
		})
		if err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		fmt.Println(p.Pid)
		os.Exit(0)
	default:
		os.Exit(m.Run())
	}
	io.Copy(io.Discard, os.Stdin)
	os.Exit(7)
}

func newReport() report {
	link := func(path string) string { s, _ := os.Readlink(path); return s }
	r := report{
		UID: os.Getuid(), GID: os.Getgid(), PPID: os.Getppid(), PID: os.Getpid(),
		UserNS: link("/proc/self/ns/user"), MntNS: link("/proc/self/ns/mnt"), NetNS: link("/proc/self/ns/net"),
		Args: os.Args, Env: os.Environ(), FDs: map[string]string{},
	}
	r.SID, _ = unix.Getsid(0)
	b, _ := os.ReadFile("/proc/self/uid_map")
	r.UIDMap = strings.Join(strings.Fields(string(b)), " ")
	status, _ := os.ReadFile("/proc/self/status")
	_, rest, _ := strings.Cut(string(status), "CapEff:\t")
	r.CapEff, _, _ = strings.Cut(rest, "\n")
	fds, _ := os.ReadDir("/proc/self/fd")
	for _, e := range fds {
		fd, _ := strconv.Atoi(e.Name())
		// The runtime's own (epoll, the directory just read) close on exec.
		if flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err == nil && flags&unix.FD_CLOEXEC == 0 {
			r.FDs[e.Name()] = link("/proc/self/fd/" + e.Name())
		}
	}
	if err := enterOften(); err != nil {
		r.EnterError = err.Error()
	}
	return r
}

// enterOften goes in and out of a network namespace, as a spawned gofwd does,
// and then looks for threads that are in it still.
func enterOften() error {
	here, err := netnsutil.Current()
	if err != nil {
		return err
	}
	defer here.Close()
	// setns(2) refuses also to go where one is, without the right to it.
	if err := here.Do(func() error { return nil }); err != nil {
		return err
	}
	ns, err := netnsutil.New()
	if err != nil {
		return err
	}
	defer ns.Close()
	inside, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", ns.Fd()))
	if err != nil {
		return err
	}
	for range 100 {
		if err := ns.Do(func() error {
			if got, err := os.Readlink("/proc/thread-self/ns/net"); err != nil || got != inside {
				return fmt.Errorf("in %s, not in %s: %w", got, inside, err)
			}
			return nil
		}); err != nil {
			return err
		}
		if got, err := os.Readlink("/proc/thread-self/ns/net"); err != nil || got == inside {
			return fmt.Errorf("still inside: %w", err)
		}
	}
	if err := useKernelPath(ns); err != nil {
		return err
	}
	// A thread ends a moment after its goroutine has.
	deadline := time.Now().Add(5 * time.Second)
	for {
		threads, err := filepath.Glob("/proc/self/task/*/ns/net")
		if err != nil {
			return err
		}
		left := 0
		for _, thread := range threads {
			if got, err := os.Readlink(thread); err == nil && got == inside {
				left++
			}
		}
		if left == 0 && len(threads) > 0 {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%d of %d threads are still inside", left, len(threads))
		}
		time.Sleep(time.Millisecond)
	}
}

// useKernelPath has the sockets of netlink and nf_tables made in ns, from a process
// whose threads may not go back to where they came from. netlink.NewHandleAt left
// its thread inside there, and nftables.WithNetNSFd made no socket at all.
func useKernelPath(ns *netnsutil.NS) error {
	if err := ns.Configure(netnsutil.Link{}); err != nil {
		return err
	}
	k, err := ns.OpenKernelPath()
	if err != nil {
		return err
	}
	if err := k.HoldSYN("lo", netip.MustParseAddrPort("127.0.0.1:1"), netip.MustParseAddrPort("[::1]:1")); err != nil {
		return errors.Join(err, k.Close())
	}
	if err := k.Close(); err != nil {
		return err
	}
	errNFT, errTProxy := ns.ProbeNFT()
	return errors.Join(errNFT, errTProxy)
}

// spawned is a running copy of the test binary.
type spawned struct {
	*os.Process
	stdin  *os.File
	stdout *json.Decoder
}

// spawn starts cfg with pipes as standard input and output.
func spawn(t *testing.T, mode string, cfg netnsutil.SpawnConfig) (*spawned, error) {
	t.Helper()
	inR, inW, err := os.Pipe()
	require.NoError(t, err)
	outR, outW, err := os.Pipe()
	require.NoError(t, err)
	t.Cleanup(func() { inW.Close(); outR.Close() })
	cfg.Args = []string{"spawntest", mode}
	cfg.Files = append([]*os.File{inR, outW, os.Stderr}, cfg.Files...)
	p, err := netnsutil.Spawn(cfg)
	inR.Close()
	outW.Close()
	if err != nil {
		return nil, err
	}
	return &spawned{p, inW, json.NewDecoder(outR)}, nil
}

func (s *spawned) report(t *testing.T) (r report) {
	t.Helper()
	require.NoError(t, s.stdout.Decode(&r))
	return r
}

// end lets the copy end, and checks that Wait sees how it ended.
func (s *spawned) end(t *testing.T) {
	t.Helper()
	s.stdin.Close()
	state, err := s.Wait()
	require.NoError(t, err)
	require.Equal(t, 7, state.ExitCode())
}

func mustReport(t *testing.T, cfg netnsutil.SpawnConfig) report {
	t.Helper()
	p, err := spawn(t, "report", cfg)
	require.NoError(t, err)
	r := p.report(t)
	p.end(t)
	return r
}

func nsLink(t *testing.T, pid, kind string) string {
	t.Helper()
	s, err := os.Readlink("/proc/" + pid + "/ns/" + kind)
	require.NoError(t, err)
	return s
}

// requireAllCaps checks those that matter; how many there are depends on the kernel.
func requireAllCaps(t *testing.T, hex string) {
	t.Helper()
	caps, err := strconv.ParseUint(hex, 16, 64)
	require.NoError(t, err)
	need := uint64(1<<unix.CAP_SYS_ADMIN | 1<<unix.CAP_NET_ADMIN | 1<<unix.CAP_NET_RAW | 1<<unix.CAP_SETUID)
	require.Equal(t, need, caps&need, "CapEff %s", hex)
}

func TestSpawnNewUserNS(t *testing.T) {
	r := mustReport(t, netnsutil.SpawnConfig{Env: []string{"A=1"}})
	require.Equal(t, 0, r.UID)
	require.Equal(t, 0, r.GID)
	require.Equal(t, fmt.Sprintf("0 %d 1", os.Getuid()), r.UIDMap)
	require.NotEqual(t, nsLink(t, "self", "user"), r.UserNS)
	require.Equal(t, nsLink(t, "self", "net"), r.NetNS)
	require.Equal(t, nsLink(t, "self", "mnt"), r.MntNS)
	require.Equal(t, []string{"spawntest", "report"}, r.Args)
	require.Equal(t, []string{"A=1"}, r.Env)
	require.Equal(t, os.Getpid(), r.PPID)
	require.NotEqual(t, r.PID, r.SID)
	require.Empty(t, r.EnterError)
	requireAllCaps(t, r.CapEff)
}

func TestSpawnNewNS(t *testing.T) {
	r := mustReport(t, netnsutil.SpawnConfig{NewNS: unix.CLONE_NEWNET | unix.CLONE_NEWNS, Setsid: true})
	require.NotEqual(t, nsLink(t, "self", "net"), r.NetNS)
	require.NotEqual(t, nsLink(t, "self", "mnt"), r.MntNS)
	require.Equal(t, r.PID, r.SID)
}

// The program gets the descriptors that it was given, in order, and no other.
func TestSpawnFiles(t *testing.T) {
	dir := t.TempDir()
	var files []*os.File
	// Opened in reverse, so that numbers must cross on their way down.
	for i := 7; i >= 0; i-- {
		f, err := os.Create(filepath.Join(dir, strconv.Itoa(i)))
		require.NoError(t, err)
		defer f.Close()
		files = append([]*os.File{f}, files...)
	}
	files[2] = nil
	r := mustReport(t, netnsutil.SpawnConfig{Files: files})
	require.Len(t, r.FDs, 3+len(files))
	for i, f := range files {
		want := os.DevNull
		if f != nil {
			want = f.Name()
		}
		require.Equal(t, want, r.FDs[strconv.Itoa(3+i)])
	}
}

func TestSpawnNoFiles(t *testing.T) {
	p, err := netnsutil.Spawn(netnsutil.SpawnConfig{
		Path: "sh", Args: []string{"sh", "-c", `[ /dev/null = "$(readlink /proc/$$/fd/0)" ] && exit 5`},
	})
	require.NoError(t, err)
	state, err := p.Wait()
	require.NoError(t, err)
	require.Equal(t, 5, state.ExitCode())
}

// A process of ours makes a user namespace and a network namespace in it; the
// spawned one joins by way of the network namespace, as attach does.
func TestSpawnJoin(t *testing.T) {
	holder, err := spawn(t, "report", netnsutil.SpawnConfig{NewNS: unix.CLONE_NEWNET | unix.CLONE_NEWNS})
	require.NoError(t, err)
	defer holder.Kill()
	h := holder.report(t)
	ns, err := netnsutil.OpenPID(holder.Pid)
	require.NoError(t, err)
	defer ns.Close()

	userNS, err := netnsutil.OwnerUserNS(ns)
	require.NoError(t, err)
	defer userNS.Close()
	require.False(t, netnsutil.SameUserNS(userNS))
	byPID, err := netnsutil.UserNSOfPID(holder.Pid)
	require.NoError(t, err)
	defer byPID.Close()
	mntNS, err := os.Open(fmt.Sprintf("/proc/%d/ns/mnt", holder.Pid))
	require.NoError(t, err)
	defer mntNS.Close()

	for name, cfg := range map[string]netnsutil.SpawnConfig{
		"by network namespace": {UserNS: userNS},
		"by pid":               {UserNS: byPID},
		"with mounts":          {UserNS: userNS, MountNS: mntNS},
	} {
		t.Run(name, func(t *testing.T) {
			r := mustReport(t, cfg)
			require.Equal(t, h.UserNS, r.UserNS)
			require.Equal(t, 0, r.UID)
			require.Equal(t, nsLink(t, "self", "net"), r.NetNS)
			require.Equal(t, cfg.MountNS != nil, h.MntNS == r.MntNS)
			requireAllCaps(t, r.CapEff)
		})
	}
	holder.end(t)
}

func TestOwnUserNS(t *testing.T) {
	f, err := netnsutil.UserNSOfPID(os.Getpid())
	require.NoError(t, err)
	defer f.Close()
	require.True(t, netnsutil.SameUserNS(f))
	// The kernel's answer, for which SpawnConfig refers to SameUserNS.
	_, err = spawn(t, "report", netnsutil.SpawnConfig{UserNS: f})
	require.ErrorIs(t, err, unix.EINVAL)
	require.ErrorContains(t, err, "join user namespace: setns: ")
}

// From inside of a user namespace, the owner of the host's network namespace is
// out of reach.
func TestOwnerOutside(t *testing.T) {
	ns, err := netnsutil.Current()
	require.NoError(t, err)
	defer ns.Close()
	owner, err := netnsutil.OwnerUserNS(ns)
	if err != nil { // the tests themselves run inside of one
		require.ErrorIs(t, err, netnsutil.ErrOutside)
		return
	}
	owner.Close()
	cmd := exec.Command("/proc/self/exe", "-test.run=^TestOwnerOutside$", "-test.v")
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  unix.CLONE_NEWUSER,
		UidMappings: []syscall.SysProcIDMap{{HostID: os.Getuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{HostID: os.Getgid(), Size: 1}},
	}
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, "%s", out)
	require.Contains(t, string(out), "--- PASS: TestOwnerOutside")
}

// A user with subordinate ids gets them all; a user without is told so.
func TestSpawnMapAuto(t *testing.T) {
	me, err := user.Current()
	require.NoError(t, err)
	table, err := os.ReadFile("/etc/subuid")
	has := err == nil && (strings.Contains("\n"+string(table), "\n"+me.Username+":") || strings.Contains("\n"+string(table), "\n"+me.Uid+":"))
	_, noTool := exec.LookPath("newuidmap")
	p, err := spawn(t, "report", netnsutil.SpawnConfig{MapAuto: true})
	switch {
	case noTool != nil:
		require.ErrorIs(t, err, exec.ErrNotFound)
		require.ErrorContains(t, err, "newuidmap")
		return
	case !has:
		require.ErrorContains(t, err, "/etc/subuid")
		return
	}
	require.NoError(t, err)
	r := p.report(t)
	require.Equal(t, 0, r.UID)
	require.Regexp(t, fmt.Sprintf(`^0 %d 1 1 \d+ \d+`, os.Getuid()), r.UIDMap)

	// A second program joins it; there its own ids are root's.
	userNS, err := netnsutil.UserNSOfPID(p.Pid)
	require.NoError(t, err)
	defer userNS.Close()
	joined := mustReport(t, netnsutil.SpawnConfig{UserNS: userNS})
	require.Equal(t, r.UserNS, joined.UserNS)
	require.Equal(t, 0, joined.UID)
	requireAllCaps(t, joined.CapEff)
	p.end(t)
}

func TestSpawnErrors(t *testing.T) {
	dir := t.TempDir()
	noExec := filepath.Join(dir, "noexec")
	require.NoError(t, os.WriteFile(noExec, []byte("not a program"), 0o755))
	netns, err := os.Open("/proc/self/ns/net")
	require.NoError(t, err)
	defer netns.Close()

	for name, tt := range map[string]struct {
		cfg  netnsutil.SpawnConfig
		is   error
		text string
	}{
		"no such program":      {netnsutil.SpawnConfig{Path: filepath.Join(dir, "missing")}, os.ErrNotExist, "start program: "},
		"not a program":        {netnsutil.SpawnConfig{Path: noExec}, unix.ENOEXEC, "execute program: execveat: "},
		"not a user namespace": {netnsutil.SpawnConfig{UserNS: netns}, unix.EINVAL, "join user namespace: setns: "},
		"not a mount namespace": {
			netnsutil.SpawnConfig{MountNS: netns}, unix.EINVAL, "join mount namespace: setns: ",
		},
		"bad flags":   {netnsutil.SpawnConfig{NewNS: unix.CLONE_PARENT}, unix.EINVAL, "make namespaces: unshare: "},
		"NUL in args": {netnsutil.SpawnConfig{Args: []string{"a\x00b"}}, unix.EINVAL, "start program: argument of "},
	} {
		t.Run(name, func(t *testing.T) {
			before := openFDs(t)
			_, err := netnsutil.Spawn(tt.cfg)
			require.ErrorIs(t, err, tt.is)
			require.ErrorContains(t, err, tt.text)
			require.Equal(t, before, openFDs(t), "descriptors leak")
		})
	}
}

// user.max_user_namespaces counts per user namespace, so a namespace of ours can
// forbid them inside itself.
func TestSpawnForbidden(t *testing.T) {
	const inside = "SPAWNTEST_FORBIDDEN"
	if os.Getenv(inside) != "" {
		require.NoError(t, os.WriteFile("/proc/sys/user/max_user_namespaces", []byte("0"), 0))
		_, err := netnsutil.Spawn(netnsutil.SpawnConfig{})
		var forbidden *netnsutil.ForbiddenError
		require.ErrorAs(t, err, &forbidden)
		require.ErrorIs(t, err, unix.ENOSPC)
		require.Equal(t, "user.max_user_namespaces=0", forbidden.Setting)
		require.Contains(t, forbidden.Remedy, "sysctl -w user.max_user_namespaces=")
		require.EqualError(t, err, "make user namespace: clone: no space left on device (user.max_user_namespaces=0)")
		return
	}
	p, err := netnsutil.Spawn(netnsutil.SpawnConfig{
		Args: []string{"spawntest", "-test.run=^TestSpawnForbidden$"}, Env: append(os.Environ(), inside+"=1"),
		Files: []*os.File{nil, os.Stdout, os.Stderr},
	})
	require.NoError(t, err)
	state, err := p.Wait()
	require.NoError(t, err)
	require.True(t, state.Success())
}

func TestSpawnDeathSignal(t *testing.T) {
	cmd := exec.Command("/proc/self/exe", "spawn-and-die")
	stdin, err := cmd.StdinPipe()
	require.NoError(t, err)
	defer stdin.Close()
	out, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	// The grandchild holds the pipe, and lives as long as its input is
	// open: end of file means that it was killed.
	done := make(chan string, 1)
	go func() { b, _ := io.ReadAll(out); done <- string(b) }()
	select {
	case s := <-done:
		require.Regexp(t, `^((holding\n)?\d+\n|\d+\nholding\n)$`, s)
	case <-time.After(10 * time.Second):
		require.Fail(t, "the program outlives its parent")
	}
	require.NoError(t, cmd.Wait())
}

// Many at once, while the runtime collects garbage: the child runs in a copy of
// a busy program.
func TestSpawnConcurrent(t *testing.T) {
	stop := make(chan struct{})
	var background, spawns sync.WaitGroup
	background.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
				runtime.GC()
			}
		}
	})
	errs := make(chan error, 8)
	for range 8 {
		spawns.Go(func() {
			for range 8 {
				p, err := netnsutil.Spawn(netnsutil.SpawnConfig{Path: "true"})
				if err == nil {
					var state *os.ProcessState
					if state, err = p.Wait(); err == nil && !state.Success() {
						err = errors.New(state.String())
					}
				}
				if err != nil {
					errs <- err
					return
				}
			}
		})
	}
	spawns.Wait()
	close(stop)
	background.Wait()
	close(errs)
	require.NoError(t, <-errs)
}

func openFDs(t *testing.T) int {
	t.Helper()
	fds, err := os.ReadDir("/proc/self/fd")
	require.NoError(t, err)
	return len(fds)
}
