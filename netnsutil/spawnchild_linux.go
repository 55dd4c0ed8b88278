package netnsutil

import (
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The hooks that package syscall puts around its own fork: signals are blocked,
// and a child that would grow its stack crashes. The runtime keeps them open to
// linkname (go.dev/issue/67401).

//go:linkname runtimeBeforeFork syscall.runtime_BeforeFork
func runtimeBeforeFork()

//go:linkname runtimeAfterFork syscall.runtime_AfterFork
func runtimeAfterFork()

//go:linkname runtimeAfterForkInChild syscall.runtime_AfterForkInChild
func runtimeAfterForkInChild()

// forkPlan is all that the child needs. A descriptor of -1 is none.
type forkPlan struct {
	flags           uintptr // of clone(2)
	userNS, mountNS int
	newNS           uintptr
	setsid          bool
	pdeathsig, ppid uintptr
	files           []int
	exe             int
	argv, envv      []*byte
	// A socket pair, the parent's end and the child's.
	sock, childSock int
	// msg is where the child puts its together; in the parent it is unused.
	msg childError
}

// childError is what the child tells the parent when it cannot go on.
type childError struct{ step, errno uint32 }

// The steps of the child, for childError.
const (
	stepJoinUser uint32 = iota
	stepWait
	stepJoinMount
	stepGID
	stepUID
	stepNewNS
	stepSession
	stepDeathSignal
	stepFiles
	stepExec
)

var childSteps = [...]struct{ what, syscall string }{
	stepJoinUser:    {"join user namespace", "setns"},
	stepWait:        {"wait for the user namespace's ids", "read"},
	stepJoinMount:   {"join mount namespace", "setns"},
	stepGID:         {"become group 0 of the user namespace", "setresgid"},
	stepUID:         {"become root of the user namespace", "setresuid"},
	stepNewNS:       {"make namespaces", "unshare"},
	stepSession:     {"start session", "setsid"},
	stepDeathSignal: {"set parent death signal", "prctl"},
	stepFiles:       {"pass descriptors", "dup3"},
	stepExec:        {"execute program", "execveat"},
}

// fork forks, and is the child until it executes or exits. Without CLONE_VM the
// child has its own copy of the memory, the stack included. What holds for
// forkAndExecInChild of package syscall holds here: from runtimeBeforeFork on the
// child must not allocate, take locks, store pointers (a write barrier may be
// on), or call anything that could grow the stack.
//
//go:noinline
//go:norace
//go:nocheckptr
func (p *forkPlan) fork() (pid uintptr, errno syscall.Errno) {
	runtimeBeforeFork()
	pid, _, errno = syscall.RawSyscall6(unix.SYS_CLONE, p.flags, 0, 0, 0, 0, 0)
	if pid != 0 || errno != 0 {
		runtimeAfterFork()
		return pid, errno
	}
	runtimeAfterForkInChild()
	p.child()
	return 0, 0 // not reached
}

// child does the child's steps in their order, and never returns.
//
//go:nosplit
//go:norace
//go:nocheckptr
func (p *forkPlan) child() {
	// The parent's end must have no second holder, or the end of file that
	// says that the parent has died would never come.
	_, _, _ = syscall.RawSyscall(unix.SYS_CLOSE, uintptr(p.sock), 0, 0)

	if p.userNS >= 0 {
		p.must(stepJoinUser, unix.SYS_SETNS, uintptr(p.userNS), unix.CLONE_NEWUSER, 0, 0, 0)
	} else if n := p.must(stepWait, unix.SYS_READ, uintptr(p.childSock), uintptr(unsafe.Pointer(&p.msg)), 1, 0, 0); n == 0 {
		childExit() // the parent gave up
	}
	if p.mountNS >= 0 {
		p.must(stepJoinMount, unix.SYS_SETNS, uintptr(p.mountNS), unix.CLONE_NEWNS, 0, 0, 0)
	}
	// Where the caller's uid is not mapped, only root keeps its
	// capabilities across execve (capabilities(7)).
	p.must(stepGID, unix.SYS_SETRESGID, 0, 0, 0, 0, 0)
	p.must(stepUID, unix.SYS_SETRESUID, 0, 0, 0, 0, 0)
	if p.newNS != 0 {
		p.must(stepNewNS, unix.SYS_UNSHARE, p.newNS, 0, 0, 0, 0)
	}
	if p.setsid {
		p.must(stepSession, unix.SYS_SETSID, 0, 0, 0, 0, 0)
	}
	// After setresuid, which clears it; and the parent may have died before.
	if p.pdeathsig != 0 {
		p.must(stepDeathSignal, unix.SYS_PRCTL, unix.PR_SET_PDEATHSIG, p.pdeathsig, 0, 0, 0)
		if ppid, _, _ := syscall.RawSyscall(unix.SYS_GETPPID, 0, 0, 0); ppid != p.ppid {
			childExit()
		}
	}
	for i := 0; i < len(p.files); i++ {
		p.must(stepFiles, unix.SYS_DUP3, uintptr(p.files[i]), uintptr(i), 0, 0, 0)
	}
	// What the parent has inherited by mistake goes no further. The flag is
	// Linux 5.11's; before, the rest of the world's programs leak as well.
	_, _, _ = syscall.RawSyscall(unix.SYS_CLOSE_RANGE, uintptr(len(p.files)), 1<<32-1, unix.CLOSE_RANGE_CLOEXEC)
	p.must(stepExec, unix.SYS_EXECVEAT, uintptr(p.exe), uintptr(unsafe.Pointer(&emptyPath)),
		uintptr(unsafe.Pointer(&p.argv[0])), uintptr(unsafe.Pointer(&p.envv[0])), unix.AT_EMPTY_PATH)
}

// emptyPath is "" for C: with AT_EMPTY_PATH, execveat(2) runs the descriptor.
var emptyPath byte

// must makes a system call of the child; if it fails, that is the child's end.
//
//go:nosplit
//go:norace
func (p *forkPlan) must(step uint32, trap, a1, a2, a3, a4, a5 uintptr) uintptr {
	r, _, errno := syscall.RawSyscall6(trap, a1, a2, a3, a4, a5, 0)
	if errno != 0 {
		p.msg.step, p.msg.errno = step, uint32(errno)
		_, _, _ = syscall.RawSyscall(unix.SYS_WRITE, uintptr(p.childSock), uintptr(unsafe.Pointer(&p.msg)), unsafe.Sizeof(p.msg))
		childExit()
	}
	return r
}

//go:nosplit
//go:norace
func childExit() {
	for {
		_, _, _ = syscall.RawSyscall(unix.SYS_EXIT_GROUP, 253, 0, 0)
	}
}

// readSock reads the child's message; 0 is the end of file.
func readSock(sock int, msg *childError) (int, error) {
	for {
		n, err := unix.Read(sock, (*[unsafe.Sizeof(*msg)]byte)(unsafe.Pointer(msg))[:])
		if err != unix.EINTR {
			return n, err
		}
	}
}
