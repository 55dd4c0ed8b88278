package main

import (
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// pasta runs its command as the first process of a PID namespace, with /proc of
// that, and IPC and UTS namespaces of its own. /proc can be mounted only from
// inside; so gofwd starts itself there, and becomes the command.

// execOption precedes the path of a program and its argv.
const execOption = "--exec"

// isolate makes cmd, which is complete, one of gofwd to start in new namespaces.
// hostname is that of the host in there; "" is the host's with pasta- before it.
func isolate(cmd *exec.Cmd, hostname string) {
	cmd.Args = append([]string{os.Args[0], execOption, hostname, cmd.Path}, cmd.Args...)
	cmd.Path = "/proc/self/exe"
	cmd.SysProcAttr.Cloneflags = unix.CLONE_NEWPID | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS
}

// becomeCommand is what runs then: words are those behind execOption. It returns
// only with an error.
func becomeCommand(words []string) error {
	if len(words) < 3 {
		return fmt.Errorf("%s: no command", execOption)
	}
	if err := unix.Mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		// In a container whose own /proc is covered in part (mount_too_revealing
		// in fs/namespace.c).
		fmt.Fprintf(os.Stderr, "the command sees the host's /proc: mount: %v\n", err)
	}
	name, words := words[0], words[1:]
	if host, err := os.Hostname(); err == nil && name == "" {
		name = "pasta-" + host
	}
	if name != "" {
		_ = unix.Sethostname([]byte(name[:min(len(name), 64)])) // HOST_NAME_MAX
	}
	return notRunnable(words[1], os.NewSyscallError("exec", unix.Exec(words[0], words[1:], os.Environ())))
}

// initSignal is what s comes to for the first process of a PID namespace: the
// kernel keeps from it what it neither catches nor blocks (pid_namespaces(7),
// sig_ignored in kernel/signal.c), all but SIGKILL, which s is then.
func (c *command) initSignal(s syscall.Signal) syscall.Signal {
	if !c.pidNS || c.catches(s) {
		return s
	}
	c.endedBy.CompareAndSwap(0, int32(s))
	return unix.SIGKILL
}

// catches reports whether the command ignores s, has a handler for it, or blocks it,
// to wait for it as tini does (proc_pid_status(5)).
func (c *command) catches(s syscall.Signal) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", c.cmd.Process.Pid))
	if err != nil {
		return true // it has ended
	}
	for line := range strings.Lines(string(b)) {
		name, value, _ := strings.Cut(line, ":")
		if name != "SigCgt" && name != "SigIgn" && name != "SigBlk" {
			continue
		}
		mask, err := strconv.ParseUint(strings.TrimSpace(value), 16, 64)
		if err == nil && mask&(1<<(s-1)) != 0 {
			return true
		}
	}
	return false
}
