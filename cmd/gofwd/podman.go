package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/gofwd/gofwd/netnsutil"
)

// Rootless Podman keeps its containers in a user and a mount namespace of its
// own, which its pause process holds. A namespace that has a name there is seen
// from outside through that process's root directory.

// podmanNetNSDir is where rootless Podman gives network namespaces their names,
// "" without $XDG_RUNTIME_DIR.
func podmanNetNSDir() string {
	if dir := os.Getenv("XDG_RUNTIME_DIR"); dir != "" {
		return filepath.Join(dir, "netns")
	}
	return ""
}

// podmanRoot returns the root directory as Podman's pause process sees it, "" if
// there is none.
func podmanRoot() string {
	dir := os.Getenv("XDG_RUNTIME_DIR")
	if dir == "" {
		return ""
	}
	b, err := os.ReadFile(filepath.Join(dir, "libpod/tmp/pause.pid"))
	if err != nil {
		return ""
	}
	pid, err := strconv.Atoi(string(bytes.TrimSpace(b)))
	if err != nil {
		return ""
	}
	return fmt.Sprintf("/proc/%d/root", pid)
}

// openNetNS opens the network namespace that the user calls arg: a path, or a
// name that ip-netns(8) or gofwd netns gave, both also as Podman sees them.
func openNetNS(arg string) (*netnsutil.NS, error) {
	ns, err := netnsutil.Open(arg)
	if err == nil {
		return ns, nil
	}
	path := arg
	if !strings.Contains(arg, "/") {
		dir := podmanNetNSDir()
		if dir == "" {
			return nil, err
		}
		path = filepath.Join(dir, arg)
	}
	if path, absErr := filepath.Abs(path); absErr == nil {
		for _, root := range []string{"", podmanRoot()} {
			if ns, err := netnsutil.Open(root + path); err == nil {
				return ns, nil
			}
		}
	}
	return nil, err
}

// errNotRunning is about a container without a process.
var errNotRunning = errors.New("it is not running: start it first")

// noContainer is an error about a container that does not exist, and may be made
// again: to --follow it does not run.
type noContainer struct{ error }

func (noContainer) Is(target error) bool { return target == errNotRunning }

// containerPID asks Podman for the first process of a container.
func containerPID(ctx context.Context, name string) (int, error) {
	cmd := exec.CommandContext(ctx, "podman", "container", "inspect", "--format", "{{.State.Pid}}", "--", name)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		if said := bytes.TrimSpace(stderr.Bytes()); len(said) > 0 {
			err = errors.New(string(said))
			if bytes.Contains(said, []byte("no such container")) {
				err = noContainer{err}
			}
		}
		return 0, fmt.Errorf("find container %s: %w", name, err)
	}
	pid, err := strconv.Atoi(string(bytes.TrimSpace(out)))
	if err != nil || pid <= 0 {
		return 0, fmt.Errorf("find container %s: %w", name, errNotRunning)
	}
	return pid, nil
}

// followInterval is how soon a container is asked for again that is not there; it
// doubles, up to sixteen times that.
const followInterval = 250 * time.Millisecond

// attachContainer is attach for --container, and with --follow again whenever
// the container runs.
func (o *options) attachContainer(ctx context.Context) error {
	if o.detach && o.detachedFD < 0 {
		return o.goBackground(os.Args)
	}
	if o.configFile != "" {
		// While the container is down there is nothing to reload, and no reason to end.
		hangups := make(chan os.Signal, 1)
		signal.Notify(hangups, syscall.SIGHUP)
		defer signal.Stop(hangups)
	}
	wait := followInterval
	for first := true; ; first = false {
		pid, err := containerPID(ctx, o.container)
		if err == nil {
			wait = followInterval
			o.pid = pid
			err = o.attach(ctx)
			// Whoever waited for readiness knows.
			o.detach, o.readyFD, o.detachedFD, o.attached = false, -1, -1, true
		}
		switch {
		case err != nil && (first || !o.follow || !errors.Is(err, os.ErrNotExist) && !errors.Is(err, errNotRunning)):
			return err
		case err == nil && (!o.follow || o.told):
			return nil
		}
		select {
		case <-time.After(wait):
			wait = min(2*wait, 16*followInterval)
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}
