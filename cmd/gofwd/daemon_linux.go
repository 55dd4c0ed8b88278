package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"
)

// inheritedFD returns descriptor fd, which the option must have got from
// whoever started gofwd, and keeps it from our own children. Descriptors that Go
// opened are told apart by FD_CLOEXEC: none of those that came through execve
// has it.
func inheritedFD(option string, fd int) (*os.File, error) {
	flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0)
	if err != nil || flags&unix.FD_CLOEXEC != 0 {
		return nil, &hintedError{
			fmt.Errorf("--%s %d: no such descriptor", option, fd),
			fmt.Sprintf("pass an open one, in a shell as %d>FILE or %d<FILE", fd, fd),
		}
	}
	unix.CloseOnExec(fd)
	return os.NewFile(uintptr(fd), "--"+option+" "+strconv.Itoa(fd)), nil
}

// closeInherited closes what whoever started gofwd forgot to close, so that nobody
// waits for its end because of us.
func closeInherited() error {
	return eachInherited(func(fd int) { _ = unix.Close(fd) })
}

// closeInheritedOnExec keeps descriptors that whoever started gofwd forgot to
// close from gofwd's children.
func closeInheritedOnExec() error {
	return eachInherited(unix.CloseOnExec)
}

// eachInherited calls fn for each descriptor above 2 that came through execve:
// those that Go opened have FD_CLOEXEC.
func eachInherited(fn func(fd int)) error {
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return fmt.Errorf("list descriptors: %w", err)
	}
	for _, e := range entries {
		fd, err := strconv.Atoi(e.Name())
		if err != nil || fd <= 2 {
			continue
		}
		if flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err == nil && flags&unix.FD_CLOEXEC == 0 {
			fn(fd)
		}
	}
	return nil
}

// goBackground starts gofwd once more, in a session of its own, and returns when it is
// ready, or with its exit code when it ended before. Go cannot fork.
//
// The other one keeps our standard error until it is ready, and with it its
// chance to say why it isn't.
func (o *options) goBackground(argv []string) error {
	r, w, err := os.Pipe()
	if err != nil {
		return fmt.Errorf("detach: %w", err)
	}
	defer r.Close()
	defer w.Close()
	null, err := os.Open(os.DevNull)
	if err != nil {
		return fmt.Errorf("detach: %w", err)
	}
	defer null.Close()

	files := []*os.File{null, os.Stdout, os.Stderr}
	for fd, option := range map[int]string{o.readyFD: "ready-fd", o.exitFD: "exit-fd"} {
		if fd <= 2 {
			continue
		}
		f, err := inheritedFD(option, fd)
		if err != nil {
			return err
		}
		for len(files) <= fd {
			files = append(files, nil)
		}
		files[fd] = f
	}
	files = append(files, w)
	// Nobody is to wait for our end because of the others.
	if err := closeInheritedOnExec(); err != nil {
		return fmt.Errorf("detach: %w", err)
	}

	args := o.again(argv, fmt.Sprintf("%s=%d", detachedFDOption, len(files)-1))
	proc, err := os.StartProcess("/proc/self/exe", args, &os.ProcAttr{
		Files: files,
		Sys:   &syscall.SysProcAttr{Setsid: true},
	})
	if err != nil {
		return fmt.Errorf("detach: %w", err)
	}
	w.Close()
	if _, err := r.Read(make([]byte, 1)); err == nil {
		return proc.Release()
	}
	state, err := proc.Wait()
	if err != nil {
		return fmt.Errorf("detach: %w", err)
	}
	if err := waitStatus(state); err != nil {
		return err
	}
	return errors.New("detach: it ended before it was ready")
}

// The options of one gofwd process to another, which nobody else gives.
const (
	innerOption       = "--inner"
	innerNetNSOption  = "--inner-netns"
	innerSocketOption = "--inner-socket"
	detachedFDOption  = "--detached-fd"
)

// again returns the command line argv with own options before the user's.
func (o *options) again(argv []string, own ...string) []string {
	words := 2 // program and verb
	if o.noVerb {
		words = 1
	}
	return slices.Concat(argv[:words], own, argv[words:])
}

// releaseStdio lets go of the caller's terminal and pipes once gofwd is ready in
// the background: a reader of them must see their end. Regular files stay, so
// that 2>gofwd.log keeps a log.
func releaseStdio() error {
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return fmt.Errorf("detach: %w", err)
	}
	defer null.Close()
	for _, f := range []*os.File{os.Stdout, os.Stderr} {
		if isRegular(f) {
			continue
		}
		if err := unix.Dup3(int(null.Fd()), int(f.Fd()), 0); err != nil {
			return fmt.Errorf("detach: %w", os.NewSyscallError("dup3", err))
		}
	}
	return nil
}

func isRegular(f *os.File) bool {
	st, err := f.Stat()
	return err == nil && st.Mode().IsRegular()
}

// waitStatus turns the end of a process into our own: nil, its exit code, or 128
// and the number of the signal that killed it.
func waitStatus(state *os.ProcessState) error {
	ws, _ := state.Sys().(syscall.WaitStatus)
	switch {
	case ws.Signaled():
		return exitStatus(128 + int(ws.Signal()))
	case ws.ExitStatus() != 0:
		return exitStatus(ws.ExitStatus())
	}
	return nil
}

// pidFile is the file of --pid-file: opened at start, so that it can be refused,
// and filled in when gofwd is ready. Until then one that was there before, and
// may be another gofwd's, is left as it is.
type pidFile struct {
	*os.File
	own  ownFile
	ours bool // made or written by us
}

func openPIDFile(path string) (*pidFile, error) {
	path, err := filepath.Abs(path)
	if err != nil {
		return nil, fmt.Errorf("write pid file: %w", err)
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	ours := err == nil
	if errors.Is(err, fs.ErrExist) {
		f, err = os.OpenFile(path, os.O_WRONLY, 0)
	}
	if err != nil {
		return nil, fmt.Errorf("write pid file: %w", err)
	}
	_ = unix.Flock(int(f.Fd()), unix.LOCK_SH|unix.LOCK_NB) // see remove
	own, err := newOwnFile(path)
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("write pid file: %w", err)
	}
	return &pidFile{f, own, ours}, nil
}

// write puts our process id into the file.
func (p *pidFile) write() error {
	p.ours = true
	regular := isRegular(p.File)
	var err error
	if regular {
		err = p.Truncate(0)
	}
	if err == nil {
		_, err = fmt.Fprintln(p, os.Getpid())
	}
	if !regular { // whoever reads it waits for the end
		err = errors.Join(err, p.Close())
	}
	if err != nil {
		return fmt.Errorf("write pid file: %w", err)
	}
	return nil
}

// remove removes the file, unless it is the next gofwd's by now: that has it open, and
// a lock on it.
func (p *pidFile) remove() {
	defer p.Close()
	if unix.Flock(int(p.Fd()), unix.LOCK_EX|unix.LOCK_NB) == unix.EWOULDBLOCK {
		return
	}
	if st, err := os.Lstat(p.own.path); p.ours && err == nil && st.Mode().IsRegular() { // not /dev/stdout
		p.own.remove()
	}
}

// notifySystemd tells systemd that gofwd is ready, where systemd asked for it
// (sd_notify(3)). socket is $NOTIFY_SOCKET.
func notifySystemd(socket string) error {
	if socket == "" {
		return nil
	}
	c, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: socket, Net: "unixgram"})
	if err != nil {
		return fmt.Errorf("notify systemd: %w", err)
	}
	defer c.Close()
	if _, err := fmt.Fprintf(c, "READY=1\nMAINPID=%d", os.Getpid()); err != nil {
		return fmt.Errorf("notify systemd: %w", err)
	}
	return nil
}

// waitReadable blocks until f can be read, is at its end, or has an error.
func waitReadable(f *os.File) {
	fds := []unix.PollFd{{Fd: int32(f.Fd()), Events: unix.POLLIN}}
	for {
		if _, err := unix.Poll(fds, -1); !errors.Is(err, unix.EINTR) {
			return
		}
	}
}

// openCapture makes the file of --pcap.
func openCapture(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return nil, fmt.Errorf("write capture: %w", err)
	}
	return f, nil
}

// pcapHeaderLen is how long the header of a capture is, which it has once.
const pcapHeaderLen = 24

// captureTo returns what a capture to f is written to: without its header, if an earlier
// attach has written that. A pipe gets another one, for it can't be asked.
func captureTo(f *os.File) io.Writer {
	if at, err := f.Seek(0, io.SeekCurrent); err == nil && at >= pcapHeaderLen {
		return &appended{f, pcapHeaderLen}
	}
	return f
}

// appended is a writer that leaves out the next bytes.
type appended struct {
	io.Writer
	skip int
}

func (a *appended) Write(b []byte) (int, error) {
	skipped := min(a.skip, len(b))
	a.skip -= skipped
	n, err := a.Writer.Write(b[skipped:])
	return skipped + n, err
}
