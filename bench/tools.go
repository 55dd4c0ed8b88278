package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
)

// tool is one way to bring a client and a server in a container together. There
// is one struct for each program, in a file of its own.
type tool interface {
	// name is the column.
	name() string
	// find returns the version of the installed tool, or why it cannot
	// take part.
	find() (version string, err error)
	// carries says whether the tool has a way for that protocol ("tcp" or
	// "udp") and IP version. Rows leave out a tool that has not.
	carries(w way, proto string, ip int) bool
	// start makes the site's container and starts the tool, without waiting
	// until it is ready.
	start(ctx context.Context, s *site) error
}

// portAdder is a tool that can publish a port at run time.
type portAdder interface {
	// addPort publishes a TCP port, and returns when the tool says that it
	// is done.
	addPort(ctx context.Context, s *site, port int) error
}

// way is where a client is and where it connects to.
type way string

const (
	remote       way = "remote"        // a client on another host, to a published port
	loopback     way = "loopback"      // a client on this host's loopback, to a published port
	outside      way = "outside"       // a client in the container, to another host
	hostLoopback way = "host-loopback" // a client in the container, to a port of its loopback that leads to the host's
)

// inbound says that the server is in the container.
func (w way) inbound() bool { return w == remote || w == loopback }

// Column names that the plan and the reports refer to.
const (
	toolNative  = "native"
	toolKernel  = "gofwd-kernel"
	toolTap     = "gofwd-tap"
	toolTap64K  = "gofwd-tap-65520"
	toolPasta   = "pasta"
	toolPasta15 = "pasta-1500"
	toolSlirp   = "slirp4netns"
	toolKit     = "rootlesskit"
	toolKitNo   = "rootlesskit-nosource"
	toolProxyd  = "socket-proxyd"
	toolFdbased = "fdbased"
)

// allTools are the columns in their order.
func allTools() []tool {
	return []tool{
		native{},
		gofwd{column: toolKernel, datapath: "kernel"},
		gofwd{column: toolTap, datapath: "tap"},
		gofwd{column: toolTap64K, datapath: "tap", mtu: 65520},
		pasta{column: toolPasta},
		pasta{column: toolPasta15, mtu: 1500},
		slirp4netns{},
		rootlesskit{column: toolKit, source: true},
		rootlesskit{column: toolKitNo},
		socketProxyd{},
		fdbased{},
	}
}

// isSubject says whether a column is gofwd.
func isSubject(tool string) bool { return strings.HasPrefix(tool, "gofwd") }

// isPeer says whether a column is a tool that does gofwd's work; the others are
// there for reference.
func isPeer(tool string) bool {
	return !isSubject(tool) && tool != toolNative && tool != toolFdbased
}

// lookPath finds a program by the environment variable env, by PATH, and in
// the directories where distributions put what is not for users.
func lookPath(env, name string) (string, error) {
	if path := os.Getenv(env); path != "" {
		return exec.LookPath(path)
	}
	if path, err := exec.LookPath(name); err == nil {
		return path, nil
	}
	for _, dir := range []string{"/usr/sbin", "/usr/lib/systemd", "/lib/systemd"} {
		if path, err := exec.LookPath(dir + "/" + name); err == nil {
			return path, nil
		}
	}
	return "", fmt.Errorf("%s is not installed (in PATH, or %s=)", name, env)
}

// firstLine runs a program and returns the first line that it prints.
func firstLine(argv ...string) (string, error) {
	out, err := exec.Command(argv[0], argv[1:]...).Output()
	if err != nil {
		return "", fmt.Errorf("run %s: %w", strings.Join(argv, " "), err)
	}
	line, _, _ := strings.Cut(string(out), "\n")
	return strings.TrimSpace(line), nil
}

// selectTools returns the tools with the given names, in the order of allTools;
// no names are all tools.
func selectTools(names []string) ([]tool, error) {
	all := allTools()
	if len(names) == 0 {
		return all, nil
	}
	var out []tool
	for _, t := range all {
		if i := slices.Index(names, t.name()); i >= 0 {
			out = append(out, t)
			names = slices.Delete(slices.Clone(names), i, i+1)
		}
	}
	if len(names) > 0 {
		return nil, fmt.Errorf("no such tool: %s", strings.Join(names, ", "))
	}
	return out, nil
}
