package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// rootlesskit with its builtin port driver, over slirp4netns as in its own
// documentation of the driver (docs/port.md). What leaves the container goes
// through slirp4netns, which has a column of its own.
type rootlesskit struct {
	column string
	// source keeps the client's address, for TCP (--source-ip-transparent).
	source bool
}

func (r rootlesskit) name() string { return r.column }

func (rootlesskit) path() (string, error) { return lookPath("ROOTLESSKIT", "rootlesskit") }

func (r rootlesskit) find() (string, error) {
	path, err := r.path()
	if err != nil {
		return "", err
	}
	if _, err := lookPath("SLIRP4NETNS", "slirp4netns"); err != nil {
		return "", err
	}
	if _, err := exec.LookPath("newuidmap"); err != nil {
		return "", fmt.Errorf("rootlesskit needs newuidmap(1): %w", err)
	}
	if subordinateIDs() == 0 {
		return "", errors.New("rootlesskit needs subordinate ids for the user who starts the run (subuid(5))")
	}
	return firstLine(path, "--version")
}

func (rootlesskit) carries(w way, _ string, _ int) bool { return w.inbound() }

func (r rootlesskit) start(ctx context.Context, s *site) error {
	path, err := r.path()
	if err != nil {
		return err
	}
	argv := []string{
		path, "--state-dir", r.stateDir(s), "--net=slirp4netns", "--mtu=65520",
		"--disable-host-loopback", "--port-driver=builtin",
		"--source-ip-transparent=" + strconv.FormatBool(r.source),
	}
	for _, p := range s.bed.tcpPorts() {
		argv = append(argv, "-p", fmt.Sprintf("0.0.0.0:%d:%d/tcp4", p, p), "-p", fmt.Sprintf("[::]:%d:%d/tcp6", p, p))
	}
	for _, p := range publishedUDP {
		argv = append(argv, "-p", fmt.Sprintf("0.0.0.0:%d:%d/udp4", p, p), "-p", fmt.Sprintf("[::]:%d:%d/udp6", p, p))
	}
	if err := s.startHelper(s.host, nil, nil, append(argv, "sleep", "infinity")...); err != nil {
		return err
	}
	pid, err := r.childPID(ctx, s)
	if err != nil {
		return err
	}
	return s.adoptContainer(ctx, pid)
}

func (r rootlesskit) stateDir(s *site) string {
	return filepath.Join("/run", fmt.Sprintf("%s-%d", r.column, s.lab.sites))
}

// childPID waits until the process that holds the container's namespace is
// known.
func (r rootlesskit) childPID(ctx context.Context, s *site) (int, error) {
	for {
		data, err := os.ReadFile(filepath.Join(r.stateDir(s), "child_pid"))
		if pid, parseErr := strconv.Atoi(strings.TrimSpace(string(data))); err == nil && parseErr == nil {
			return pid, nil
		}
		if err := s.helperEnded(); err != nil {
			return 0, err
		}
		if ctx.Err() != nil {
			return 0, ctx.Err()
		}
		time.Sleep(time.Millisecond)
	}
}

func (r rootlesskit) addPort(ctx context.Context, s *site, port int) error {
	path, err := lookPath("ROOTLESSCTL", "rootlessctl")
	if err != nil {
		return err
	}
	out, err := exec.CommandContext(ctx, path, "--socket", filepath.Join(r.stateDir(s), "api.sock"),
		"add-ports", fmt.Sprintf("0.0.0.0:%d:%d/tcp4", port, port)).CombinedOutput()
	if err != nil {
		return fmt.Errorf("rootlessctl: %w: %s", err, out)
	}
	return nil
}
