package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// order is what the program asks its lab for.
type order struct {
	Rows    []string `json:"rows"` // by name
	Tools   []string `json:"tools"`
	Rounds  int      `json:"rounds"`
	Seconds float64  `json:"seconds"`
}

// report is one line of the lab's answer.
type report struct {
	Total  *workload `json:"total,omitempty"` // what is to come
	Tool   *ToolInfo `json:"tool,omitempty"`
	Sample *Sample   `json:"sample,omitempty"`
}

// lab is the half of the program that measures. It runs as root of a user
// namespace of its own, and is told what to do and tells what it found in JSON.
type lab struct {
	order    order
	rows     []row
	tools    []tool
	infos    map[string]*ToolInfo
	launcher *launcher
	out      *json.Encoder
	sites    int // made so far
}

// runLab is main in the user namespace.
func runLab(args []string) error {
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
	defer stop()
	l := &lab{infos: map[string]*ToolInfo{}, out: json.NewEncoder(os.Stdout)}
	if err := json.Unmarshal([]byte(args[0]), &l.order); err != nil {
		return fmt.Errorf("read order: %w", err)
	}
	for _, r := range plan() {
		if slices.Contains(l.order.Rows, r.Name) {
			l.rows = append(l.rows, r)
		}
	}
	if err := furnish(); err != nil {
		return fmt.Errorf("prepare the lab's own mounts: %w", err)
	}
	var err error
	if l.launcher, err = newLauncher(); err != nil {
		return err
	}
	if err := l.findTools(); err != nil {
		return err
	}
	return l.run(ctx)
}

// furnish gives the lab an empty /run, and tells newuidmap(1) of the ids that
// the lab's own user namespace has, which are those that RootlessKit may use.
func furnish() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return os.NewSyscallError("mount", err)
	}
	if err := unix.Mount("run", "/run", "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=755"); err != nil {
		return os.NewSyscallError("mount", err)
	}
	if err := os.Mkdir("/run/netns", 0o755); err != nil {
		return err
	}
	if err := os.Setenv("XDG_RUNTIME_DIR", "/run"); err != nil {
		return err
	}
	if err := os.WriteFile("/run/subid", fmt.Appendf(nil, "root:1:%d\n", subordinateIDs()), 0o444); err != nil {
		return err
	}
	for _, path := range []string{"/etc/subuid", "/etc/subgid"} {
		if _, err := os.Stat(path); err != nil {
			continue
		}
		if err := unix.Mount("/run/subid", path, "", unix.MS_BIND, ""); err != nil {
			return os.NewSyscallError("mount", err)
		}
	}
	return nil
}

// subordinateIDs returns how many ids the lab's user namespace has beside root,
// 0 where the user who started the run has none (subuid(5)).
func subordinateIDs() (n int) {
	// The second line of the map: 1, the first id outside, their number.
	data, _ := os.ReadFile("/proc/self/uid_map")
	if fields := strings.Fields(string(data)); len(fields) >= 6 {
		n, _ = strconv.Atoi(fields[5])
	}
	return n
}

// findTools keeps the tools that are there, and says of the others why not.
func (l *lab) findTools() error {
	asked, err := selectTools(l.order.Tools)
	if err != nil {
		return err
	}
	for _, t := range asked {
		info := &ToolInfo{Name: t.name()}
		l.infos[t.name()] = info
		if info.Version, err = t.find(); err != nil {
			info.Missing = err.Error()
			if err := l.out.Encode(report{Tool: info}); err != nil {
				return err
			}
			continue
		}
		l.tools = append(l.tools, t)
	}
	return nil
}

// run runs round after round, in each row after row, in each tool after tool.
// Every round begins with another tool, so that none is always the one that
// comes after a certain other.
func (l *lab) run(ctx context.Context) error {
	total := newWorkload(l.rows, l.tools, l.order.Rounds, l.order.Seconds)
	if err := l.out.Encode(report{Total: &total}); err != nil {
		return err
	}
	for round := range l.order.Rounds {
		for i := range l.rows {
			for j := range l.tools {
				t := l.tools[(j+round)%len(l.tools)]
				if !l.rows[i].takes(t) {
					continue
				}
				sample := &Sample{Row: l.rows[i].Name, Tool: t.name(), Round: round}
				var err error
				if sample.Values, err = l.sample(ctx, &l.rows[i], t); err != nil {
					sample.Err = err.Error()
				}
				if ctx.Err() != nil {
					return nil // what has been measured counts
				}
				if err := l.out.Encode(report{Sample: sample}); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// sampleLimit is how long a sample may take beyond the load itself: a tool that
// is stuck must not stop the run.
const sampleLimit = time.Minute

// sample takes one sample, in a site of its own. No other tool is running
// meanwhile: even one with nothing to do may hold what a user has only once, as
// pasta does with the memory of pipes (pipe-user-pages-soft in proc(5)).
func (l *lab) sample(ctx context.Context, r *row, t tool) (map[string]float64, error) {
	ctx, cancel := context.WithTimeout(ctx, sampleLimit+time.Duration(l.order.Seconds*float64(time.Second)))
	defer cancel()
	s, err := l.newSite(ctx, t, r.bed)
	if err != nil {
		return nil, err
	}
	defer s.close()
	if err := l.describe(s); err != nil {
		return nil, err
	}
	values, err := r.measure.take(ctx, s, l.order.Seconds)
	if err != nil {
		err = errors.Join(err, s.helperEnded())
	}
	if err := errors.Join(err, anyEnded(s.servers)); err != nil {
		return nil, err
	}
	for unit, v := range values { // more digits would be noise
		values[unit], _ = strconv.ParseFloat(strconv.FormatFloat(v, 'g', 6, 64), 64)
	}
	return values, nil
}

// describe reports a tool when it has been started for the first time: how, and
// what the server in the container sees of a client.
func (l *lab) describe(s *site) error {
	info := l.infos[s.tool.name()]
	if info.Source != nil {
		return nil
	}
	for _, p := range s.helpers {
		// Where the program lies is of no use to a reader.
		argv := append([]string{filepath.Base(p.argv[0])}, p.argv[1:]...)
		info.Argv = append(info.Argv, argv)
	}
	if s.container != s.host {
		var err error
		if _, info.MTU, err = s.container.tapBytes(); err != nil {
			return err
		}
	}
	info.Source = s.sources()
	return l.out.Encode(report{Tool: info})
}
