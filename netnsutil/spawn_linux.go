package netnsutil

import (
	"fmt"
	"os"
	"os/exec"
	"syscall"

	"golang.org/x/sys/unix"
)

// A thread may enter or leave a user namespace only while it is alone in its
// process (setns(2), unshare(2): EINVAL), and a Go program never is. Between
// fork and exec it is; so that is where the work is done, in the manner of
// package syscall, with the steps that syscall.SysProcAttr lacks:
//
//	parent                                child
//	open the program, dup descriptors
//	fork ───────────────────────────────► setns(user), or born in a new one
//	write uid_map, gid_map, send "go" ──► (new one only: wait for it)
//	                                      setns(mount), setresgid/setresuid(0)
//	                                      unshare, setsid, dup Files, execve
//	read: end of file is success ◄─────── failing step and its errno; or exec

// SpawnConfig says what [Spawn] starts, and where. The zero value starts the
// running program once more, without arguments, as root of a new user namespace.
type SpawnConfig struct {
	// UserNS is the user namespace to join, see [OwnerUserNS] and
	// [UserNSOfPID]; joining the caller's own fails with EINVAL, see
	// [SameUserNS]. Nil makes a new one, whose root is the caller.
	UserNS *os.File
	// MapAuto maps the caller's subordinate ids (subuid(5)) into the new
	// user namespace as well, from 1 on, by newuidmap(1) and newgidmap(1).
	MapAuto bool
	// MountNS is a mount namespace to join once in the user namespace, e.g.
	// that of Podman's pause process; nil stays in the caller's.
	MountNS *os.File
	// NewNS are further namespaces to make there: CLONE_NEWNET,
	// CLONE_NEWNS and others that unshare(2) makes for the caller itself.
	NewNS uintptr

	// Path is the program, "" the running one. It is opened before any
	// namespace changes, and must not be a script.
	Path string
	// Args are its arguments, argv[0] first; nil is Path alone.
	Args []string
	// Env is its environment; nil is the caller's.
	Env []string
	// Files become its descriptors 0, 1, 2 and on; it gets no others. A nil
	// one, and what is missing of the first three, is /dev/null. The caller
	// closes them.
	Files []*os.File
	// Setsid starts a session, without a terminal.
	Setsid bool
	// Pdeathsig is sent to the program when the thread that called Spawn
	// ends; 0 is none. See PR_SET_PDEATHSIG(2const), and lock the thread.
	Pdeathsig syscall.Signal
}

// Spawn starts a program inside another user namespace, where it is root and has
// all capabilities. It returns when the program has been executed; the caller
// waits for its end. An error names the step that went wrong and wraps its
// errno; it is a [*ForbiddenError] where the system is set up to forbid user
// namespaces.
//
// The program inherits working directory (with MountNS: the root there),
// process group, supplementary groups and resource limits.
func Spawn(cfg SpawnConfig) (*os.Process, error) {
	var mapIDs func(pid int) error // nil: joined, there is nothing to map
	if cfg.UserNS == nil {
		var err error
		if mapIDs, err = idMapper(cfg.MapAuto); err != nil {
			return nil, err
		}
	}
	plan, err := newForkPlan(&cfg)
	if err != nil {
		return nil, fmt.Errorf("start program: %w", err)
	}
	defer plan.close()

	// The lock keeps descriptors that are about to become close-on-exec
	// out of the child.
	syscall.ForkLock.Lock()
	pid, errno := plan.fork()
	syscall.ForkLock.Unlock()
	plan.closeFD(&plan.childSock)
	if errno != 0 {
		err := os.NewSyscallError("clone", errno)
		if cfg.UserNS != nil {
			return nil, fmt.Errorf("start program: %w", err)
		}
		return nil, forbidden(fmt.Errorf("make user namespace: %w", err))
	}
	if err := plan.finish(int(pid), mapIDs); err != nil {
		plan.closeFD(&plan.sock) // a child that still waits for "go" ends now
		for {
			if _, err := unix.Wait4(int(pid), nil, 0, nil); err != unix.EINTR {
				break
			}
		}
		if cfg.UserNS == nil {
			err = forbidden(err)
		}
		return nil, err
	}
	return os.FindProcess(int(pid))
}

// newForkPlan prepares everything that the child needs, since the child cannot
// allocate.
func newForkPlan(cfg *SpawnConfig) (_ *forkPlan, err error) {
	p := &forkPlan{
		flags: uintptr(unix.SIGCHLD), newNS: cfg.NewNS,
		setsid: cfg.Setsid, pdeathsig: uintptr(cfg.Pdeathsig), ppid: uintptr(os.Getpid()),
		userNS: -1, mountNS: -1, exe: -1, sock: -1, childSock: -1,
	}
	defer func() {
		if err != nil {
			p.close()
		}
	}()
	path, args, env := cfg.Path, cfg.Args, cfg.Env
	if path == "" {
		path = "/proc/self/exe"
	} else if path, err = exec.LookPath(path); err != nil {
		return nil, err
	}
	if args == nil {
		args = []string{path}
	}
	if env == nil {
		env = os.Environ()
	}
	if p.argv, err = syscall.SlicePtrFromStrings(args); err != nil {
		return nil, fmt.Errorf("argument of %s: %w", path, err)
	}
	if p.envv, err = syscall.SlicePtrFromStrings(env); err != nil {
		return nil, fmt.Errorf("environment of %s: %w", path, err)
	}
	exe, err := unix.Open(path, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	defer unix.Close(exe)
	if err := p.takeFiles(cfg, exe); err != nil {
		return nil, err
	}
	return p, nil
}

// takeFiles duplicates every descriptor that the child uses to a number above
// those that the program gets, so that these can be installed in any order.
func (p *forkPlan) takeFiles(cfg *SpawnConfig, exe int) error {
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer null.Close()
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return os.NewSyscallError("socketpair", err)
	}
	defer unix.Close(pair[1])
	p.sock = pair[0]

	files := make([]*os.File, max(3, len(cfg.Files)))
	copy(files, cfg.Files)
	p.files = make([]int, len(files))
	type dup struct {
		from int
		to   *int
	}
	dups := []dup{{exe, &p.exe}, {pair[1], &p.childSock}}
	for i, f := range files {
		if f == nil {
			f = null
		}
		p.files[i] = -1
		dups = append(dups, dup{int(f.Fd()), &p.files[i]})
	}
	if cfg.UserNS != nil {
		dups = append(dups, dup{int(cfg.UserNS.Fd()), &p.userNS})
	} else {
		p.flags |= unix.CLONE_NEWUSER
	}
	if cfg.MountNS != nil {
		dups = append(dups, dup{int(cfg.MountNS.Fd()), &p.mountNS})
	}
	for _, d := range dups {
		fd, err := unix.FcntlInt(uintptr(d.from), unix.F_DUPFD_CLOEXEC, len(files))
		if err != nil {
			return os.NewSyscallError("fcntl", err)
		}
		*d.to = fd
	}
	return nil
}

// finish lets a forked child go on, and waits until it has become the program.
func (p *forkPlan) finish(pid int, mapIDs func(pid int) error) error {
	if mapIDs != nil {
		if err := mapIDs(pid); err != nil {
			return err
		}
		if _, err := unix.Write(p.sock, []byte{1}); err != nil {
			return fmt.Errorf("start program: %w", os.NewSyscallError("write", err))
		}
	}
	var msg childError
	n, err := readSock(p.sock, &msg)
	switch {
	case err != nil:
		return fmt.Errorf("start program: %w", os.NewSyscallError("read", err))
	case n == 0:
		return nil
	}
	step := childSteps[msg.step]
	return fmt.Errorf("%s: %w", step.what, os.NewSyscallError(step.syscall, syscall.Errno(msg.errno)))
}

// close closes what is left of the descriptors in the parent.
func (p *forkPlan) close() {
	for _, fd := range []*int{&p.userNS, &p.mountNS, &p.exe, &p.sock, &p.childSock} {
		p.closeFD(fd)
	}
	for i := range p.files {
		p.closeFD(&p.files[i])
	}
}

func (p *forkPlan) closeFD(fd *int) {
	if *fd >= 0 {
		unix.Close(*fd)
		*fd = -1
	}
}
