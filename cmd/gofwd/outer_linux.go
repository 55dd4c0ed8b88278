package main

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/gofwd/gofwd/forward"
	"github.com/gofwd/gofwd/forward/control"
	"github.com/gofwd/gofwd/netnsutil"
)

// # Theory of operation
//
// Forwarding needs all capabilities in the user namespace that owns the
// container's network namespace, while it stays in the host's network namespace.
// A Go process can't enter a user namespace, so there are two processes:
//
//	outer                               inner
//	what the user started               root in the user namespace
//	─────────────────────────────────   ──────────────────────────────────────
//	command line, names in the file     forward.Start: tap, listeners
//	system: control socket, pid file,   the control socket's HTTP
//	capture; --ready-fd, --exit-fd      run: COMMAND, in the network namespace
//	                                         and in a mount namespace of its own
//	           ── link: signals ──►
//	           ◄── link: ready ───
//	waits for inner, ends as it did     end of the link: ends
//
// The inner process is gofwd with the same command line and --inner, so that
// both parse the same options. Whatever needs the user's own rights in the file
// system is opened by outer: under podman's --userns=auto, inner is somebody
// else.
//
// The link is a socket pair. Outer sends the numbers of signals, one byte each,
// inner a message when it is ready; whoever reads its end knows that the other is
// gone, kill -9 included.
//
// All three processes stay in the process group of the shell's job: the
// terminal's ^C and ^Z reach COMMAND by themselves. Outer and inner outlive ^C,
// and stop and continue on ^Z and fg like any job. A signal that inner gets as
// well as outer was sent to the group, and isn't passed on a second time.
//
// attach in the user namespace where it runs already (root, podman unshare)
// needs one process; then inner is a goroutine. With --follow it is a process all
// the same: outer will start podman(1) again, and so can be in no sandbox.

// message is what inner has to tell outer, as JSON.
type message struct {
	// Ready says that everything is up.
	Ready bool `json:"ready,omitempty"`
	// Busy is why everything is to end: a port that somebody else has.
	// Who, outer may find out, and inner may not.
	Busy *control.Busy `json:"busy,omitempty"`
}

// firstInnerFD is the first descriptor that a spawned inner process takes over:
// the link, the control socket, pesto's if there is --conf-path, the capture if
// there is --pcap, attach's namespace, and the sockets that systemd passed.
const firstInnerFD = 3

// forwardedSignals are passed to inner, and by it to COMMAND. The rest is left
// to the process group: WINCH is only ever sent by the terminal, TSTP and CONT
// are about this process.
var forwardedSignals = []os.Signal{unix.SIGHUP, unix.SIGINT, unix.SIGQUIT, unix.SIGTERM, unix.SIGUSR1, unix.SIGUSR2}

// outer is the side that has names: all that is known about an instance outside
// of it.
type outer struct {
	opts *options
	log  *slog.Logger
	argv []string

	control  *net.UnixListener
	socket   ownFile
	pesto    *net.UnixListener // nil without --conf-path
	pestoOwn ownFile
	capture  *os.File         // nil without --pcap
	pid      *pidFile         // nil without --pid-file
	readyFD  *os.File         // nil without --ready-fd
	exitFD   *os.File         // nil without --exit-fd
	detached *os.File         // nil without --detach
	notify   string           // $NOTIFY_SOCKET
	sockets  []forward.Socket // that systemd passed
}

// openOuter opens everything, or nothing. hint is what to name the instance
// after.
func openOuter(o *options, argv []string, hint string) (_ *outer, err error) {
	u := &outer{opts: o, log: o.logger(), argv: argv, notify: os.Getenv("NOTIFY_SOCKET")}
	// It is ours to answer, not COMMAND's.
	os.Unsetenv("NOTIFY_SOCKET")
	defer func() {
		if err != nil {
			u.close()
		}
	}()
	for _, in := range []struct {
		option string
		fd     int
		file   **os.File
	}{{"ready-fd", o.readyFD, &u.readyFD}, {"exit-fd", o.exitFD, &u.exitFD}, {"detached-fd", o.detachedFD, &u.detached}} {
		if in.fd < 0 {
			continue
		}
		if *in.file, err = inheritedFD(in.option, in.fd); err != nil {
			return nil, err
		}
	}
	if !o.attached {
		if o.sockets, err = takeListenFDs(); err != nil {
			return nil, err
		}
	}
	if err := closeInheritedOnExec(); err != nil {
		return nil, err
	}
	if o.pcap != "" && !o.attached {
		if o.capture, err = openCapture(o.pcap); err != nil {
			return nil, err
		}
	}
	u.sockets, u.capture = o.sockets, o.capture
	if o.pidFile != "" {
		if u.pid, err = openPIDFile(o.pidFile); err != nil {
			return nil, err
		}
	}
	if o.pestoSocket != "" {
		if u.pesto, u.pestoOwn, err = listenPesto(o.pestoSocket); err != nil {
			return nil, err
		}
	}
	if o.runAs != nil {
		if err := o.runAs.become(); err != nil {
			return nil, err
		}
	}
	if u.control, u.socket, err = listenControl(o.name, hint); err != nil {
		return nil, err
	}
	return u, nil
}

// close lets go of everything, and removes what had a name.
func (u *outer) close() {
	if u.control != nil {
		u.socket.remove()
		u.control.Close()
	}
	if u.pesto != nil {
		u.pestoOwn.remove()
		u.pesto.Close()
	}
	if u.pid != nil {
		u.pid.remove()
	}
	for _, f := range []*os.File{u.readyFD, u.exitFD, u.detached} {
		if f != nil {
			f.Close()
		}
	}
	if u.opts.follow {
		return
	}
	if u.capture != nil {
		u.capture.Close()
	}
	for _, s := range u.sockets {
		s.File.Close()
	}
}

// namesIn returns the directories from which close removes files.
func (u *outer) namesIn() []string {
	dirs := []string{filepath.Dir(u.socket.path)}
	if u.pesto != nil {
		dirs = append(dirs, filepath.Dir(u.pestoOwn.path))
	}
	if u.pid != nil && isRegular(u.pid.File) {
		dirs = append(dirs, filepath.Dir(u.pid.own.path))
	}
	return dirs
}

// inside is the inner side as outer sees it: its end of the link, and how it
// ends.
type inside struct {
	link *os.File
	pid  int // 0 in this process
	done chan error
}

// spawn starts the inner process. cfg says in which user namespace; ns is
// attach's network namespace.
func (u *outer) spawn(cfg netnsutil.SpawnConfig, ns *netnsutil.NS) (*inside, error) {
	ours, theirs, err := newLink()
	if err != nil {
		return nil, err
	}
	defer theirs.Close()
	control, err := u.control.File()
	if err != nil {
		ours.Close()
		return nil, fmt.Errorf("pass control socket: %w", err)
	}
	defer control.Close()
	cfg.Files = []*os.File{os.Stdin, os.Stdout, os.Stderr, theirs, control}
	if u.pesto != nil {
		pesto, err := u.pesto.File()
		if err != nil {
			ours.Close()
			return nil, fmt.Errorf("pass pesto's socket: %w", err)
		}
		defer pesto.Close()
		cfg.Files = append(cfg.Files, pesto)
	}
	if u.capture != nil {
		cfg.Files = append(cfg.Files, u.capture)
	}
	path := ""
	if ns != nil {
		path = ns.Path()
		f, err := dupNS(ns)
		if err != nil {
			ours.Close()
			return nil, err
		}
		defer f.Close()
		cfg.Files = append(cfg.Files, f)
	}
	again := []string{innerOption, innerNetNSOption + "=" + path}
	for _, s := range u.sockets {
		cfg.Files = append(cfg.Files, s.File)
		again = append(again, innerSocketOption+"="+s.Name)
	}
	cfg.Args = u.opts.again(u.argv, again...)
	// Go has raised the soft limit of open files, and takes that back in what it starts
	// itself, or here before it fails: a directory can't be executed. Or else COMMAND
	// would be given the hard limit for its own.
	_ = syscall.Exec("/", []string{"/"}, nil)
	start := netnsutil.Spawn
	if cfg.UserNS == nil && (ns != nil || u.opts.netNSOnly) {
		start = spawnHere
	}
	proc, err := start(cfg)
	if err != nil {
		ours.Close()
		return nil, err
	}
	in := &inside{link: ours, pid: proc.Pid, done: make(chan error, 1)}
	go in.waitProcess(proc)
	return in, nil
}

// spawnHere is netnsutil.Spawn without another user namespace.
func spawnHere(cfg netnsutil.SpawnConfig) (*os.Process, error) {
	return os.StartProcess("/proc/self/exe", cfg.Args, &os.ProcAttr{Files: cfg.Files})
}

// dupNS returns a file that is the namespace, and the caller's to close.
func dupNS(ns *netnsutil.NS) (*os.File, error) {
	fd, err := unix.FcntlInt(uintptr(ns.Fd()), unix.F_DUPFD_CLOEXEC, firstInnerFD)
	if err != nil {
		return nil, fmt.Errorf("pass network namespace: %w", os.NewSyscallError("fcntl", err))
	}
	return os.NewFile(uintptr(fd), ns.String()), nil
}

// waitProcess waits for the inner process, which has said itself what went
// wrong if it could.
func (in *inside) waitProcess(proc *os.Process) {
	state, err := proc.Wait()
	if err == nil {
		err = waitStatus(state)
		if ws, ok := state.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
			err = &codedError{fmt.Errorf("the process that forwards, %d, was ended by a signal: %s", proc.Pid, ws.Signal()), 128 + int(ws.Signal())}
		}
	}
	in.done <- err
}

// isToldBy reports whether a signal tells us to end.
func (o *options) isToldBy(s os.Signal) bool {
	switch s {
	case unix.SIGUSR1, unix.SIGUSR2:
		return false
	case unix.SIGHUP: // see reloadOnHangup
		return o.configFile == ""
	}
	return true
}

// supervise passes signals on, makes readiness known, and returns how inner
// ended. gone, if not nil, ends inner too.
func (u *outer) supervise(in *inside, gone <-chan struct{}) error {
	defer in.link.Close()
	signals := make(chan os.Signal, 16)
	catchSignals(signals)
	defer signal.Stop(signals)
	messages := make(chan message)
	go in.readMessages(messages)
	exit := make(chan struct{})
	if u.exitFD != nil {
		go waitExit(u.exitFD, exit)
	}

	// Inner's last words come before its end.
	var failed, result error
	for running := true; running || messages != nil; {
		select {
		case s := <-signals:
			u.opts.told = u.opts.told || u.opts.isToldBy(s)
			in.send(s)
		case m, ok := <-messages:
			switch {
			case !ok:
				messages = nil
			case m.Ready:
				if failed = u.announce(); failed != nil {
					in.link.Close()
				}
			case m.Busy != nil:
				failed = forward.NameHolder(&forward.Error{Op: m.Busy.Op, Rule: m.Busy.Rule, Err: unix.EADDRINUSE})
			}
		case <-exit:
			exit = nil
			in.link.Close()
		case <-gone:
			gone = nil
			in.link.Close()
		case result = <-in.done:
			running = false
		}
	}
	if failed != nil {
		return failed
	}
	return result
}

// readMessages delivers inner's messages, and closes messages when it has ended.
func (in *inside) readMessages(messages chan<- message) {
	defer close(messages)
	for d := json.NewDecoder(in.link); ; {
		var m message
		if err := d.Decode(&m); err != nil {
			return
		}
		messages <- m
	}
}

// send passes a signal to inner. One that can't be told any more is ending.
func (in *inside) send(s os.Signal) {
	if n, ok := s.(unix.Signal); ok {
		_, _ = in.link.Write([]byte{byte(n)})
	}
}

func waitExit(f *os.File, exit chan<- struct{}) {
	waitReadable(f)
	close(exit)
}

// announce tells everybody who asked that the forwards are up.
func (u *outer) announce() error {
	if u.pid != nil {
		if err := u.pid.write(); err != nil {
			return err
		}
	}
	if err := notifySystemd(u.notify); err != nil {
		u.log.Warn("systemd was not told that gofwd is ready", "err", err)
	}
	if f := u.readyFD; f != nil { // as slirp4netns(1) does: "1", then the end
		if _, err := f.WriteString("1"); err != nil {
			u.log.Warn("whoever waits for readiness went away", "err", err)
		}
		if f.Fd() > 2 { // else something else would get the number, and what is written there
			f.Close()
		}
	}
	if u.detached == nil {
		return nil
	}
	if err := releaseStdio(); err != nil {
		return err
	}
	defer u.detached.Close()
	if _, err := u.detached.WriteString("1"); err != nil {
		return fmt.Errorf("detach: whoever started it has gone: %w", err)
	}
	return nil
}

// newLink makes the socket pair between outer and inner.
func newLink() (ours, theirs *os.File, err error) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("make link: %w", os.NewSyscallError("socketpair", err))
	}
	return os.NewFile(uintptr(pair[0]), "link"), os.NewFile(uintptr(pair[1]), "link"), nil
}

// serveHere runs inner in this process.
func (u *outer) serveHere(ctx context.Context, ns *netnsutil.NS) (*inside, error) {
	ours, theirs, err := newLink()
	if err != nil {
		return nil, err
	}
	in := &inside{link: ours, done: make(chan error, 1)}
	i := &inner{opts: u.opts, log: u.log, link: theirs, control: u.control, pesto: u.pesto, ns: ns, sockets: u.sockets}
	if u.capture != nil {
		i.capture = captureTo(u.capture)
	}
	if !u.opts.noSandbox {
		i.keep = &sandbox{config: u.opts.configFile, removeFrom: u.namesIn()}
		if err := i.keep.checkNames(); err != nil {
			ours.Close()
			theirs.Close()
			return nil, err
		}
		if err := i.keep.checkConfig(); err != nil {
			u.log.Warn("SIGHUP and gofwd reload will not work", "err", err, "hint", "own the file, or give --no-sandbox")
		}
	}
	go in.attachHere(ctx, i)
	return in, nil
}

func (in *inside) attachHere(ctx context.Context, i *inner) {
	defer i.link.Close()
	in.done <- i.attach(ctx)
}
