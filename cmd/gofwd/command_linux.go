package main

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"runtime"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/gofwd/gofwd/netnsutil"
)

// command is COMMAND of gofwd run.
type command struct {
	argv       []string // none: $SHELL
	ns         *netnsutil.NS
	resolvConf []byte // instead of /etc/resolv.conf; nil leaves it
	detached   bool
	pidNS      bool   // is the first process of a PID namespace
	hostname   string // of that namespace, see isolate
	log        *slog.Logger

	cmd     *exec.Cmd
	done    chan error   // how it ended, once
	endedBy atomic.Int32 // the signal that a SIGKILL stood for
}

// start starts the command from a thread of its own, which then waits for it: a
// program starts in the namespaces of the thread that starts it, and its
// parent-death signal comes with the end of that thread
// (PR_SET_PDEATHSIG(2const)).
func (c *command) start() error {
	if len(c.argv) == 0 {
		shell := os.Getenv("SHELL")
		if shell == "" {
			shell = "/bin/sh"
		}
		c.argv = []string{shell}
	}
	c.cmd = exec.Command(c.argv[0], c.argv[1:]...)
	if err := c.cmd.Err; err != nil {
		return notRunnable(c.argv[0], err)
	}
	c.cmd.Stdin, c.cmd.Stdout, c.cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	if c.detached { // as releaseStdio; nil is /dev/null
		if !isRegular(os.Stdout) {
			c.cmd.Stdout = nil
		}
		if !isRegular(os.Stderr) {
			c.cmd.Stderr = nil
		}
	}
	c.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if c.pidNS {
		isolate(c.cmd, c.hostname)
	}
	c.done = make(chan error, 1)
	started := make(chan error)
	go c.runOnOwnThread(started)
	return <-started
}

// runOnOwnThread never unlocks its thread: no other goroutine may run in those
// namespaces.
func (c *command) runOnOwnThread(started chan<- error) {
	runtime.LockOSThread()
	if err := c.enter(); err != nil {
		started <- err
		return
	}
	if err := c.cmd.Start(); err != nil {
		started <- notRunnable(c.argv[0], err)
		return
	}
	started <- nil
	err := c.cmd.Wait()
	if c.cmd.ProcessState != nil {
		err = waitStatus(c.cmd.ProcessState)
		if s := c.endedBy.Load(); s != 0 && errors.Is(err, exitStatus(128+int(unix.SIGKILL))) {
			err = exitStatus(128 + s)
		}
	}
	c.done <- err
}

// enter takes the thread to where the command is to start: the network namespace,
// and a new mount namespace, in which /etc/resolv.conf is ours. What the host
// mounts later shows up there, not the other way round.
func (c *command) enter() error {
	if err := unix.Setns(c.ns.Fd(), unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("enter network namespace: %w", os.NewSyscallError("setns", err))
	}
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("make mount namespace: %w", os.NewSyscallError("unshare", err))
	}
	if err := unix.Mount("", "/", "", unix.MS_SLAVE|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("make mount namespace: %w", os.NewSyscallError("mount", err))
	}
	if c.resolvConf == nil {
		return nil
	}
	if err := mountFile(resolvConfPath, c.resolvConf); err != nil {
		c.log.Warn("the command keeps the host's resolv.conf, names may not resolve", "err", err)
	}
	return nil
}

// wait waits for the end of the command, if nobody receives from done.
func (c *command) wait() error { return <-c.done }

// signal sends s to the command, unless it has ended.
func (c *command) signal(s syscall.Signal) { _ = c.cmd.Process.Signal(c.initSignal(s)) }

// notRunnable gives err of starting program the exit code that a shell would.
func notRunnable(program string, err error) error {
	code := exitNotRunnable
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, exec.ErrNotFound) {
		code = exitNotFound
	}
	if path, ok := errors.AsType[*fs.PathError](err); ok {
		err = path.Err
	} else if name, ok := errors.AsType[*exec.Error](err); ok {
		err = name.Err
	}
	return &codedError{fmt.Errorf("run %s: %w", program, err), code}
}

// groupDelay is how far apart the signals that outer and inner get may be and
// still be one, sent to the process group: far longer than it takes the kernel to
// send both, on a busy machine too.
const groupDelay = 50 * time.Millisecond

// groupFilter passes those signals of outer on to the command that were sent to
// outer alone. What was sent to the process group, be it by the terminal or by
// kill(2), reached the command by itself; inner is in the group to tell.
type groupFilter struct {
	cmd     *command
	pending []syscall.Signal
	due     <-chan time.Time // for pending, nil if there is none
	last    map[os.Signal]time.Time
}

// got notes a signal that inner got itself.
func (f *groupFilter) got(s os.Signal) {
	if f.last == nil {
		f.last = make(map[os.Signal]time.Time)
	}
	f.last[s] = time.Now()
}

// order takes a signal that outer got, for pass.
func (f *groupFilter) order(s syscall.Signal) {
	f.pending = append(f.pending, s)
	f.due = time.After(groupDelay)
}

// pass sends what is pending.
func (f *groupFilter) pass() {
	for _, s := range f.pending {
		if time.Since(f.last[s]) > 2*groupDelay || !f.cmd.inOurGroup() || f.cmd.initSignal(s) != s {
			f.cmd.signal(s)
		}
	}
	f.pending, f.due = nil, nil
}

// inOurGroup reports whether the command is in our process group: a shell leaves
// it, to have jobs of its own.
func (c *command) inOurGroup() bool {
	group, err := unix.Getpgid(c.cmd.Process.Pid)
	return err == nil && group == unix.Getpgrp()
}
