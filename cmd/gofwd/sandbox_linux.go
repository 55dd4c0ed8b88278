package main

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"unsafe"

	"github.com/elastic/go-seccomp-bpf"
	"github.com/elastic/go-seccomp-bpf/arch"
	"github.com/landlock-lsm/go-landlock/landlock"
	ll "github.com/landlock-lsm/go-landlock/landlock/syscall"
	"golang.org/x/sys/unix"
	"kernel.org/pub/linux/libs/security/libcap/psx"
)

// Once everything is up, the process that forwards gives up what it needs no
// more, in phases of which each stands by itself:
//
//	capabilities   four are left, over the user namespace that gofwd runs in, which
//	               is the container's but for root beside a namespace of root's own,
//	               and with a command CAP_KILL
//	no_new_privs   no program gives more, and no program can be started anyway
//	Landlock       files are for reading, and only some (as far as the kernel can)
//	seccomp        a list of system calls; others fail with EPERM
//
// All of it is for the whole process: its threads share their memory, so that one
// with more rights would give them to all. It comes after COMMAND has been
// started, which is not concerned.

// sandbox is what a process keeps.
type sandbox struct {
	// kill keeps CAP_KILL: for a COMMAND that changed its uid.
	kill bool
	// config is a file that is read anew on request, "" for none.
	config string
	// removeFrom are the directories of files that have to go at the end.
	removeFrom []string
	// listenIn are the directories of the UNIX sockets that forwards listen on:
	// others may be made there, and go.
	listenIn []string
}

// enter gives up the rest. The error names the phase.
func (s *sandbox) enter() error {
	for _, phase := range []struct {
		name string
		do   func() error
	}{
		{"drop capabilities", s.dropCapabilities},
		{"set no_new_privs", setNoNewPrivs},
		{"restrict file access", s.restrictFiles},
		{"restrict system calls", restrictSyscalls},
	} {
		if err := phase.do(); err != nil {
			return &hintedError{fmt.Errorf("enter sandbox: %s: %w", phase.name, err), "gofwd run and gofwd attach have --no-sandbox"}
		}
	}
	return nil
}

// checkNames says so if in the sandbox the files could not be removed that have to go:
// root then is a user like any other.
func (s *sandbox) checkNames() error {
	for _, dir := range s.removeFrom {
		if err := inSandbox(dir, unix.W_OK|unix.X_OK); err != nil {
			return &hintedError{
				fmt.Errorf("remove files from %s at the end: in the sandbox even root may not: %w", dir, err),
				"choose a directory of your own, or give --no-sandbox",
			}
		}
	}
	return nil
}

// checkConfig says so if in the sandbox the configuration could not be read.
func (s *sandbox) checkConfig() error {
	if s.config == "" {
		return nil
	}
	if err := inSandbox(s.config, unix.R_OK); err != nil {
		return fmt.Errorf("read configuration %s: in the sandbox even root may not: %w", s.config, err)
	}
	return nil
}

// inSandbox returns the error that access to path is going to have without the
// capabilities that the sandbox takes; nil if there is one already.
func inSandbox(path string, mode uint32) error {
	if unix.Faccessat(unix.AT_FDCWD, path, mode, unix.AT_EACCESS) != nil {
		return nil
	}
	// Of this thread alone, which the runtime ends if it can't be what it was.
	runtime.LockOSThread()
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var had [2]unix.CapUserData
	if err := unix.Capget(&header, &had[0]); err != nil {
		return os.NewSyscallError("capget", err)
	}
	less := had
	less[0].Effective &^= 1<<unix.CAP_DAC_OVERRIDE | 1<<unix.CAP_DAC_READ_SEARCH
	if err := unix.Capset(&header, &less[0]); err != nil {
		return os.NewSyscallError("capset", err)
	}
	err := unix.Faccessat(unix.AT_FDCWD, path, mode, unix.AT_EACCESS)
	if capErr := unix.Capset(&header, &had[0]); capErr != nil {
		return os.NewSyscallError("capset", capErr)
	}
	runtime.UnlockOSThread()
	return err
}

// dropCapabilities keeps what entering the namespace takes (setns(2)), and what
// transparent sockets, routes, nf_tables, captures and ports below 1024 take
// there.
func (s *sandbox) dropCapabilities() error {
	keep := []int{unix.CAP_SYS_ADMIN, unix.CAP_NET_ADMIN, unix.CAP_NET_RAW, unix.CAP_NET_BIND_SERVICE}
	if s.kill {
		keep = append(keep, unix.CAP_KILL)
	}
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil {
		return os.NewSyscallError("capget", err)
	}
	var mask [2]uint32
	for _, c := range keep {
		mask[c/32] |= 1 << (c % 32)
	}
	for i := range data {
		have := data[i].Permitted & mask[i]
		data[i] = unix.CapUserData{Effective: have, Permitted: have}
	}
	return capset(&header, &data)
}

// capset is capset(2) for all threads. What it points to is pinned, which is to say on
// the heap: a goroutine's stack may move on the way to the system call. (Set.SetProc
// of libcap's Go package, at 1.2.78, leaves its header there, and fails now and then
// with EINVAL.)
func capset(header *unix.CapUserHeader, data *[2]unix.CapUserData) error {
	var pins runtime.Pinner
	defer pins.Unpin()
	pins.Pin(header)
	pins.Pin(data)
	_, _, errno := psx.Syscall3(unix.SYS_CAPSET, uintptr(unsafe.Pointer(header)), uintptr(unsafe.Pointer(data)), 0)
	if errno != 0 {
		return os.NewSyscallError("capset", errno)
	}
	return nil
}

// setNoNewPrivs sets it for all threads.
func setNoNewPrivs() error {
	_, _, errno := psx.Syscall6(unix.SYS_PRCTL, unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0, 0)
	if errno != 0 {
		return os.NewSyscallError("prctl", errno)
	}
	return nil
}

// restrictFiles leaves the files that are read while gofwd runs: resolv.conf,
// which may be a link to anywhere and is replaced as a whole, like the
// configuration, so that it is directories that count; proc, for the
// namespaces and sockets of processes; and time zones, for the log.
func (s *sandbox) restrictFiles() error {
	const read = landlock.AccessFSSet(ll.AccessFSReadFile | ll.AccessFSReadDir)
	readable := []string{"/etc", "/run", "/proc", "/usr/share/zoneinfo"}
	for _, file := range []string{resolvConfPath, s.config} {
		readable = append(readable, filepath.Dir(file))
		if target, err := filepath.EvalSymlinks(file); err == nil {
			readable = append(readable, filepath.Dir(target))
		}
	}
	// What can't be reached now, can't be in the sandbox.
	readable = slices.DeleteFunc(readable, func(dir string) bool {
		_, err := os.Stat(dir)
		return err != nil || dir == "."
	})
	rules := []landlock.Rule{
		landlock.PathAccess(read, readable...),
		landlock.RWFiles("/dev/null").IgnoreIfMissing(),
	}
	if len(s.removeFrom) > 0 {
		rules = append(rules, landlock.PathAccess(landlock.AccessFSSet(ll.AccessFSRemoveFile), s.removeFrom...))
	}
	if len(s.listenIn) > 0 {
		const comeAndGo = landlock.AccessFSSet(ll.AccessFSMakeSock | ll.AccessFSRemoveFile)
		rules = append(rules, landlock.PathAccess(comeAndGo, s.listenIn...))
	}
	return landlock.V5.BestEffort().RestrictPaths(rules...)
}

// allowedSyscalls are those of the Go runtime, and what gofwd's files do. Some
// exist on one architecture only.
var allowedSyscalls = map[string][]string{
	"relay, UDP and tap": {
		"read", "write", "readv", "writev", "splice", "recvmmsg", "sendmmsg", "recvmsg", "sendmsg",
		"recvfrom", "sendto", "epoll_pwait", "epoll_pwait2", "epoll_wait", "epoll_ctl", "ppoll", "poll",
	},
	"memory and threads": {
		"futex", "mmap", "munmap", "mprotect", "mremap", "madvise", "mincore", "brk", "membarrier", "rseq",
		"set_robust_list", "sched_yield", "sched_getaffinity", "nanosleep", "clock_nanosleep", "clock_gettime",
		"gettimeofday", "getrandom", "restart_syscall", "exit", "exit_group", "prctl", "arch_prctl",
		"timer_create", "timer_settime", "timer_delete", "sysinfo", "uname", "getrlimit", "prlimit64", "getrusage",
	},
	"signals": {
		"rt_sigaction", "rt_sigprocmask", "rt_sigreturn", "sigaltstack", "tgkill", "tkill", "kill",
		"gettid", "getpid", "getppid", "getpgrp", "getpgid", "setitimer",
	},
	"COMMAND and orphans": {"wait4", "waitid", "pidfd_open", "pidfd_send_signal"},
	"sockets": {
		"socketpair", "bind", "listen", "accept", "accept4", "connect", "shutdown",
		"getsockname", "getpeername", "getsockopt", "setsockopt",
	},
	"descriptors": {
		"close", "close_range", "dup", "dup2", "dup3", "fcntl", "ioctl", "pipe2", "eventfd2", "epoll_create1", "lseek",
		"pread64", "pwrite64", "tee", "vmsplice", "sendfile", "copy_file_range", "ftruncate", "fallocate", "fsync",
	},
	"files, as far as Landlock lets": {
		"open", "openat", "openat2", "access", "faccessat", "faccessat2", "stat", "lstat", "fstat", "newfstatat", "statx",
		"statfs", "fstatfs", "readlink", "readlinkat", "getdents64", "getcwd", "unlink", "unlinkat", "flock",
		"inotify_init1", "inotify_add_watch", "inotify_rm_watch",
	},
	"identity": {
		"getuid", "geteuid", "getgid", "getegid", "getresuid", "getresgid", "getgroups", "capget", "umask",
	},
}

// restrictSyscalls allows nothing but what is in the list, for all threads. What
// makes a process into another one (execve, fork, ptrace), and what changes the
// system rather than one network namespace (mount, bpf, kexec), is not in it.
func restrictSyscalls() error {
	here, err := arch.GetInfo("")
	if err != nil {
		return err
	}
	var names []string
	// The hot ones come first: before Linux 5.11 a filter is a walk through
	// the list (seccomp: add bitmap cache support, f9d480b6ffbe).
	const hot = "relay, UDP and tap"
	for _, group := range append([]string{hot}, slices.Sorted(maps.Keys(allowedSyscalls))...) {
		for _, name := range allowedSyscalls[group] {
			if _, ok := here.SyscallNames[name]; ok && !slices.Contains(names, name) {
				names = append(names, name)
			}
		}
	}
	with := func(name string, op seccomp.Operation, argument uint32, value uint64) seccomp.NameWithConditions {
		return seccomp.NameWithConditions{Name: name, Conditions: seccomp.ArgumentConditions{
			{Argument: argument, Operation: op, Value: value},
		}}
	}
	return seccomp.LoadFilter(seccomp.Filter{
		Flag: seccomp.FilterFlagTSync,
		Policy: seccomp.Policy{
			DefaultAction: seccomp.ActionErrno,
			Syscalls: []seccomp.SyscallGroup{{
				Action: seccomp.ActionAllow,
				Names:  names,
				NamesWithCondtions: []seccomp.NameWithConditions{
					with("clone", seccomp.BitsSet, 0, unix.CLONE_THREAD),
					with("setns", seccomp.Equal, 1, unix.CLONE_NEWNET),
					with("socket", seccomp.Equal, 0, unix.AF_UNIX),
					with("socket", seccomp.Equal, 0, unix.AF_INET),
					with("socket", seccomp.Equal, 0, unix.AF_INET6),
					with("socket", seccomp.Equal, 0, unix.AF_NETLINK),
					with("socket", seccomp.Equal, 0, unix.AF_PACKET),
				},
			}, {
				// Its flags are in memory, where no filter looks;
				// the C library takes clone instead.
				Action: seccomp.ActionErrno | seccomp.Action(unix.ENOSYS),
				Names:  []string{"clone3"},
			}},
		},
	})
}
