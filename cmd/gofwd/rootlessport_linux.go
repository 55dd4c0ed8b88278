package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/gofwd/gofwd/forward"
	"github.com/gofwd/gofwd/forward/control"
	"github.com/gofwd/gofwd/netnsutil"
)

// # rootlessport
//
// Podman publishes the ports of containers on bridge networks with a helper
// called rootlessport. It gets its orders as JSON on standard input, and has two
// descriptors of Podman's:
//
//	Podman                             we
//	JSON, end of file ───────────────► forward.Start in the container's namespace
//	                    ◄───────────── "1" on ReadyFD; or what went wrong, on
//	                                   standard output, and exit code 1
//	end of file on ExitFD ───────────► end: conmon has ended, and the container
//	"10.89.1.2"\n on the socket ─────► the container's addresses have changed
//	                    ◄───────────── "OK", end of file
//
// The socket is TmpDir/rp/ContainerID, of type SOCK_SEQPACKET; Podman writes to it
// on podman network connect and disconnect.

// rootlessportConfig is what Podman writes (libpod/rootlessport, Config).
type rootlessportConfig struct {
	Mappings     []portMapping
	NetNSPath    string
	ExitFD       int
	ReadyFD      int
	TmpDir       string
	ContainerID  string
	RootlessCNI  bool // whether there is to be a socket
	ContainerPID int
}

// portMapping is one -p of the user (libnetwork/types, PortMapping).
type portMapping struct {
	HostIP        string `json:"host_ip"`
	ContainerPort uint16 `json:"container_port"`
	HostPort      uint16 `json:"host_port"`
	Range         uint16 `json:"range"`
	Protocol      string `json:"protocol"` // several with commas
}

// rules turns a mapping into rules. An address of 0.0.0.0 is every address of both
// families, as in the helper that we stand in for.
func (m portMapping) rules() ([]forward.Rule, error) {
	r := forward.Rule{}
	if m.HostIP != "" && m.HostIP != "0.0.0.0" {
		addr, err := netip.ParseAddr(m.HostIP)
		if err != nil {
			return nil, fmt.Errorf("host address %q: not an IP address", m.HostIP)
		}
		r.Addr = addr.Unmap()
	}
	more := max(m.Range, 1) - 1
	r.Ports = forward.PortRange{First: m.HostPort, Last: m.HostPort + more}
	r.TargetPorts = forward.PortRange{First: m.ContainerPort, Last: m.ContainerPort + more}
	var rules []forward.Rule
	for name := range strings.SplitSeq(m.Protocol, ",") {
		if err := r.Proto.UnmarshalText([]byte(name)); err != nil {
			return nil, err
		}
		rules = append(rules, r)
	}
	return rules, nil
}

// executeRootlessport does all that rootlessport does, and returns the exit code.
func executeRootlessport(argv []string) int {
	if len(argv) > 1 {
		fmt.Printf("too many arguments, rootlessport expects no arguments\n")
		return exitFailure
	}
	if err := runRootlessport(os.Stdin); err != nil {
		// Podman shows what is on standard output.
		fmt.Println(oneLine(err))
		return exitFailure
	}
	return 0
}

// rootlessport is a running one.
type rootlessport struct {
	cfg       rootlessportConfig
	forwarder *forward.Forwarder
	exit      *os.File
	control   *net.UnixListener // nil if there can be none
	socket    ownFile
	reload    *net.UnixListener // nil without RootlessCNI
	reloadOwn ownFile
	wg        sync.WaitGroup
}

func runRootlessport(stdin io.Reader) error {
	var cfg rootlessportConfig
	if err := json.NewDecoder(stdin).Decode(&cfg); err != nil {
		return fmt.Errorf("read orders of Podman: %w", err)
	}
	r := &rootlessport{cfg: cfg}
	ready, err := inheritedFD("ReadyFD", cfg.ReadyFD)
	if err != nil {
		return err
	}
	defer ready.Close()
	if r.exit, err = inheritedFD("ExitFD", cfg.ExitFD); err != nil {
		return err
	}
	if err := closeInherited(); err != nil {
		return err
	}
	ns, err := netnsutil.Open(cfg.NetNSPath)
	if err != nil {
		return err
	}
	defer ns.Close()
	if err := r.start(ns); err != nil {
		return err
	}
	defer r.close()
	if err := r.sandbox().enter(); err != nil {
		return err
	}
	// Podman goes away: what we might print later has nowhere to go.
	if err := releaseStdio(); err != nil {
		return err
	}
	if _, err := ready.WriteString("1"); err != nil {
		return fmt.Errorf("tell Podman that the ports are there: %w", err)
	}
	ready.Close()
	exit := make(chan struct{})
	go waitExit(r.exit, exit)
	<-exit
	return nil
}

// start brings up the forwards and the sockets.
func (r *rootlessport) start(ns *netnsutil.NS) error {
	var rules []forward.Rule
	for _, m := range r.cfg.Mappings {
		more, err := m.rules()
		if err != nil {
			return err
		}
		rules = append(rules, more...)
	}
	ctx, cancel := context.WithTimeout(context.Background(), startTimeout)
	defer cancel()
	var err error
	r.forwarder, err = startRetrying(ctx, forward.Config{NetNS: ns, Rules: rules, InboundOnly: true}, podmanRetry)
	if err != nil {
		return err
	}
	if r.cfg.RootlessCNI {
		if err := r.listenReload(); err != nil {
			r.close()
			return err
		}
	}
	// gofwd status is nice to have, and no reason not to start.
	if r.control, r.socket, err = listenControl("", "rootlessport-"+shortID(r.cfg.ContainerID)); err == nil {
		r.wg.Add(1)
		go r.serveControl()
	}
	return nil
}

// sandbox is what it keeps: what it reads while it runs is in the namespace.
func (r *rootlessport) sandbox() *sandbox {
	var dirs []string
	if r.control != nil {
		dirs = append(dirs, filepath.Dir(r.socket.path))
	}
	if r.reload != nil {
		dirs = append(dirs, filepath.Join(r.cfg.TmpDir, "rp"))
	}
	return &sandbox{removeFrom: dirs}
}

func (r *rootlessport) serveControl() {
	defer r.wg.Done()
	s := http.Server{Handler: control.Handler(r.forwarder), ReadTimeout: control.Timeout}
	_ = s.Serve(r.control) // ends with close
}

func (r *rootlessport) close() {
	if r.reload != nil {
		r.reload.Close()
	}
	if r.control != nil {
		r.socket.remove()
		r.control.Close()
	}
	r.forwarder.Close()
	r.wg.Wait()
}

// listenReload makes the socket that Podman writes to when networks have been
// connected or disconnected.
func (r *rootlessport) listenReload() error {
	dir := filepath.Join(r.cfg.TmpDir, "rp")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("make reload socket: %w", err)
	}
	// The path may be longer than a socket's can be (unix(7)).
	d, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("make reload socket: %w", err)
	}
	defer d.Close()
	path := fmt.Sprintf("/proc/self/fd/%d/%s", d.Fd(), r.cfg.ContainerID)
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("make reload socket: %w", err)
	}
	r.reload, err = net.ListenUnix("unixpacket", &net.UnixAddr{Name: path, Net: "unixpacket"})
	if err != nil {
		return fmt.Errorf("make reload socket: %w", err)
	}
	r.reload.SetUnlinkOnClose(false) // by then that name means something else
	if r.reloadOwn, err = newOwnFile(filepath.Join(dir, r.cfg.ContainerID)); err != nil {
		return fmt.Errorf("make reload socket: %w", err)
	}
	r.wg.Add(1)
	go r.serveReload()
	return nil
}

func (r *rootlessport) serveReload() {
	defer r.wg.Done()
	defer r.reloadOwn.remove()
	for {
		c, err := r.reload.AcceptUnix()
		if errors.Is(err, net.ErrClosed) {
			return
		} else if err != nil {
			time.Sleep(retryInterval)
			continue
		}
		answer := "OK"
		if err := r.serveOne(c); err != nil {
			answer = oneLine(err)
		}
		_, _ = io.WriteString(c, answer)
		c.Close()
	}
}

// serveOne reads the container's new address. It is looked up where it is true,
// in the namespace, so that it is all families' that change.
func (r *rootlessport) serveOne(c net.Conn) error {
	_ = c.SetDeadline(time.Now().Add(10 * time.Second))
	line, err := bufio.NewReader(c).ReadString('\n')
	if err != nil && line == "" {
		return fmt.Errorf("read the container's address: %w", err)
	}
	var addr string
	if err := json.Unmarshal([]byte(line), &addr); err != nil {
		return fmt.Errorf("read the container's address: %w", err)
	}
	return r.forwarder.Refresh()
}
