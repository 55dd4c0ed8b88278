package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/gofwd/gofwd/forward"
	"github.com/gofwd/gofwd/forward/control"
	"github.com/gofwd/gofwd/forward/control/pesto"
	"github.com/gofwd/gofwd/netnsutil"
)

// startTimeout bounds forward.Start. It takes some ten milliseconds; what can
// hang is a port's holder that is being asked for its name.
const startTimeout = 30 * time.Second

// retryInterval is how often a busy port is tried again.
const retryInterval = 20 * time.Millisecond

// inner is the side that forwards; see outer_linux.go.
type inner struct {
	opts    *options
	log     *slog.Logger
	link    *os.File
	control *net.UnixListener
	pesto   *net.UnixListener // nil without --conf-path
	capture io.Writer         // nil without --pcap
	ns      *netnsutil.NS
	sockets []forward.Socket // that systemd passed
	own     chan os.Signal   // that this process got, if it is one of its own
	keep    *sandbox         // nil: everything

	// Set by start.
	forwarder *forward.Forwarder
	ended     chan error // of forwarder.Wait
	server    *control.Server
	stats     *statsPrinter // nil without
	pestoServ *pesto.Server
}

// newInner takes over what outer passed to this process.
func newInner(o *options) (*inner, error) {
	want := []string{"link", "control"}
	if o.pestoSocket != "" {
		want = append(want, "pesto")
	}
	if o.pcap != "" {
		want = append(want, "capture")
	}
	if o.innerNetNS != "" {
		want = append(want, "netns")
	}
	files := make(map[string]*os.File)
	for n, what := range want {
		f, err := inheritedFD("inner "+what, firstInnerFD+n)
		if err != nil {
			return nil, err
		}
		files[what] = f
	}
	i := &inner{opts: o, log: o.logger()}
	for n, name := range o.innerSockets {
		f, err := inheritedFD("inner socket", firstInnerFD+len(want)+n)
		if err != nil {
			return nil, err
		}
		i.sockets = append(i.sockets, forward.Socket{Name: name, File: f})
	}
	if f := files["capture"]; f != nil {
		i.capture = captureTo(f)
	}
	if err := closeInheritedOnExec(); err != nil {
		return nil, err
	}
	// The descriptor's flags came with it: it does not block, and so the
	// runtime can wait for it together with everything else.
	i.link = files["link"]
	var err error
	if i.control, err = unixListener(files["control"]); err != nil {
		return nil, fmt.Errorf("take over control socket: %w", err)
	}
	files["control"].Close()
	if f := files["pesto"]; f != nil {
		if i.pesto, err = unixListener(f); err != nil {
			return nil, fmt.Errorf("take over pesto's socket: %w", err)
		}
		f.Close()
	}
	if f := files["netns"]; f != nil {
		if i.ns, err = netnsutil.FromFile(f, o.innerNetNS); err != nil {
			return nil, err
		}
	}
	if !o.noSandbox {
		i.keep = &sandbox{kill: i.ns == nil, config: o.configFile}
	}
	// Orders come through the link alone, but we have to live on. What is
	// ignored, rather than caught, would be ignored by COMMAND too.
	i.own = make(chan os.Signal, 16)
	catchSignals(i.own)
	return i, nil
}

func unixListener(f *os.File) (*net.UnixListener, error) {
	l, err := net.FileListener(f)
	if err != nil {
		return nil, err
	}
	u, ok := l.(*net.UnixListener)
	if !ok {
		l.Close()
		return nil, fmt.Errorf("%s is no UNIX socket", f.Name())
	}
	return u, nil
}

// catchSignals delivers what is to be passed on to c, but for what nohup(1)
// ignores.
func catchSignals(c chan os.Signal) {
	for _, s := range forwardedSignals {
		if !signal.Ignored(s) {
			signal.Notify(c, s)
		}
	}
}

// start brings up the forwards and their control socket. close ends both.
func (i *inner) start(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	cfg := i.opts.config
	cfg.NetNS, cfg.Capture, cfg.Sockets, cfg.Logger = i.ns, i.capture, i.sockets, i.log
	f, err := startRetrying(ctx, cfg, i.opts.retryPorts)
	var onRule *forward.Error
	if errors.As(err, &onRule) && errors.Is(err, unix.EADDRINUSE) && i.spawned() {
		i.tell(message{Busy: &control.Busy{Op: onRule.Op, Rule: onRule.Rule}})
		return exitStatus(exitFailure)
	} else if err != nil {
		return err
	}
	i.forwarder = f
	// The forwarder's threads, one for each processor, sleep in epoll_wait(2).
	// Where no processor of the runtime's is idle then, its monitor keeps
	// waking up to take theirs away (retake in runtime/proc.go).
	runtime.GOMAXPROCS(2 * runtime.GOMAXPROCS(0))
	i.ended = make(chan error, 1)
	go i.waitForwarder()
	i.server = control.NewServer(control.Config{Forwarder: f, Version: readVersion().Version, Reload: i.reloader(), Logger: i.log})
	go i.serveControl()
	i.stats = startStats(i.opts.stats, f)
	if i.pesto != nil {
		i.pestoServ = pesto.NewServer(pesto.Config{
			Forwarder: f, NoTCP: cfg.NoTCP, NoUDP: cfg.NoUDP,
			NoIPv4: cfg.Network.NoIPv4, NoIPv6: cfg.Network.NoIPv6, Logger: i.log,
		})
		go i.servePesto()
	}
	if !i.opts.quiet {
		printChosen(os.Stdout, f.Status())
	}
	return nil
}

// podmanRetry is for how long busy ports are tried again on behalf of Podman: it
// starts the next helper of a container while the last one has yet to see that its
// namespace is gone.
const podmanRetry = time.Second

// startRetrying is [forward.Start], tried again for a while as long as a port is
// busy.
func startRetrying(ctx context.Context, cfg forward.Config, patience time.Duration) (*forward.Forwarder, error) {
	for end := time.Now().Add(patience); ; time.Sleep(retryInterval) {
		f, err := forward.Start(ctx, cfg)
		if !errors.Is(err, unix.EADDRINUSE) || time.Now().After(end) {
			return f, err
		}
	}
}

// reloader returns what reads --config anew, nil without it.
func (i *inner) reloader() func() error {
	if i.opts.configFile == "" {
		return nil
	}
	return i.reload
}

// reload makes the published ports those of the command line and of the file as it
// is now, all of them or, after an error, none.
func (i *inner) reload() error {
	rules, err := i.opts.rereadPorts()
	if err != nil {
		return err
	}
	changed, err := i.forwarder.Change(forward.Change{Replace: true, Add: rules})
	if err != nil {
		return err
	}
	i.log.Info("configuration reloaded", "file", i.opts.configFile, "generation", changed.Generation)
	return nil
}

// reloadOnHangup reports whether s is for us to reload, and does that.
func (i *inner) reloadOnHangup(s syscall.Signal) bool {
	if s != unix.SIGHUP || i.opts.configFile == "" {
		return false
	}
	if err := i.reload(); err != nil {
		i.log.Error("configuration not reloaded, nothing has changed", "err", err)
	}
	return true
}

func (i *inner) waitForwarder() { i.ended <- i.forwarder.Wait() }

func (i *inner) serveControl() {
	if err := i.server.Serve(i.control); !errors.Is(err, http.ErrServerClosed) {
		i.log.Warn("gofwd status will not work", "err", err)
	}
}

func (i *inner) servePesto() {
	if err := i.pestoServ.Serve(i.pesto); !errors.Is(err, net.ErrClosed) {
		i.log.Warn("pesto will not work", "err", err)
	}
}

func (i *inner) close() error {
	i.stats.close()
	if i.pestoServ != nil {
		i.pestoServ.Close()
	}
	i.server.Close()
	return i.forwarder.Close()
}

// ready tells outer that everything is up, and gives up what that took.
func (i *inner) ready() error {
	if i.keep != nil {
		for _, r := range i.forwarder.Status().Rules {
			if path, ok := strings.CutPrefix(r.Rule.Socket, "unix:"); ok {
				i.keep.listenIn = append(i.keep.listenIn, filepath.Dir(path))
			}
		}
		if err := i.keep.enter(); err != nil {
			return err
		}
	}
	if i.opts.detachedFD >= 0 {
		if err := releaseStdio(); err != nil {
			return err
		}
	}
	i.tell(message{Ready: true})
	return nil
}

// tell sends a message to outer. If that is gone, readSignals notices.
func (i *inner) tell(m message) { _ = json.NewEncoder(i.link).Encode(m) }

// spawned reports whether inner is a process of its own.
func (i *inner) spawned() bool { return i.own != nil }

// readSignals delivers the signals that outer sends, and closes orders when
// outer is gone.
func (i *inner) readSignals(orders chan<- syscall.Signal) {
	defer close(orders)
	b := make([]byte, 1)
	for {
		if _, err := i.link.Read(b); err != nil {
			return
		}
		orders <- syscall.Signal(b[0])
	}
}

// run runs argv in the namespace until it ends, and returns how.
func (i *inner) run(ctx context.Context, argv []string) error {
	if err := i.start(ctx); err != nil {
		return err
	}
	defer i.close()
	cmd := &command{
		argv:       argv,
		ns:         i.ns,
		resolvConf: i.resolvConf(),
		detached:   i.opts.detachedFD >= 0,
		pidNS:      i.opts.pidNS,
		hostname:   i.opts.config.Network.Services.Hostname,
		log:        i.log,
	}
	if err := cmd.start(); err != nil {
		return err
	}
	defer killOrphans()
	if err := adoptOrphans(cmd.cmd.Process.Pid); err != nil {
		return err
	}
	orders := make(chan syscall.Signal)
	go i.readSignals(orders)
	filter := groupFilter{cmd: cmd}
	err := i.ready()
	for err == nil {
		select {
		case s, ok := <-orders:
			if !ok {
				err = errOuterGone
				break
			}
			if !i.reloadOnHangup(s) {
				filter.order(s)
			}
		case s := <-i.own:
			filter.got(s)
		case <-filter.due:
			filter.pass()
		case err = <-i.ended:
			if err == nil {
				err = errors.New("forwarding ended")
			}
		case result := <-cmd.done:
			return result
		}
	}
	cmd.signal(unix.SIGKILL)
	_ = cmd.wait() // killed, and it is not its fault
	return err
}

// errOuterGone ends inner: somebody killed outer, or it wants the end.
var errOuterGone = exitStatus(128 + int(unix.SIGKILL))

// attach forwards until it is told to end, or the namespace has gone.
func (i *inner) attach(ctx context.Context) error {
	if err := i.start(ctx); err != nil {
		return err
	}
	orders := make(chan syscall.Signal)
	go i.readSignals(orders)
	err := i.ready()
	for err == nil {
		select {
		case s, ok := <-orders:
			if ok && i.reloadOnHangup(s) {
				continue
			}
			if !ok || s == unix.SIGTERM || s == unix.SIGINT || s == unix.SIGHUP || s == unix.SIGQUIT {
				return i.close()
			}
		case err := <-i.ended:
			if errors.Is(err, netnsutil.ErrGone) {
				err = nil
			}
			return errors.Join(err, i.close())
		}
	}
	return errors.Join(err, i.close())
}
