package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/signal"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/gofwd/gofwd/forward"
)

// watchInterval is how often status --watch looks.
const watchInterval = time.Second

// watcher is status --watch: what instances do, again and again.
type watcher struct {
	name   string // "" is all
	before map[watchedForward]forward.Traffic
	when   time.Time
}

// watchedForward names a forward of an instance; 0 is all that the container began.
type watchedForward struct {
	instance string
	id       int
}

// watch shows status until ctx ends or q is typed: in place on a terminal, one table
// after the other elsewhere.
func (v *watcher) watch(ctx context.Context, w io.Writer) error {
	ctx, stop := signal.NotifyContext(ctx, unix.SIGINT, unix.SIGTERM, unix.SIGHUP)
	defer stop()
	draw := func(text []byte) error {
		_, err := fmt.Fprintf(w, "%s\n", text)
		return err
	}
	var quit chan struct{}
	var resized chan os.Signal
	if isTerminal(w) {
		s, err := openScreen(w.(*os.File), os.Stdin)
		if err != nil {
			return fmt.Errorf("take over the terminal: %w", err)
		}
		defer s.close()
		draw, quit, resized = s.draw, s.quit, s.resized
	}
	tick := time.NewTicker(watchInterval)
	defer tick.Stop()
	for {
		all, err := findInstances(ctx, v.name)
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return err
		}
		var b bytes.Buffer
		v.print(&b, all, time.Now())
		again := true
		for again {
			if draw(b.Bytes()) != nil {
				return nil // the reader has gone
			}
			select {
			case <-ctx.Done():
				return nil
			case <-quit:
				return nil
			case <-resized:
			case <-tick.C:
				again = false
			}
		}
	}
}

// print shows one table with what moved since the last one.
func (v *watcher) print(w io.Writer, all []instanceStatus, now time.Time) {
	seconds := now.Sub(v.when).Seconds()
	fmt.Fprintf(w, "%s\n\n", now.Format(time.TimeOnly))
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "INSTANCE\tID\tFORWARD\tPATH\tACTIVE\tTOTAL\tNEW/s\tIN/s\tOUT/s\tWHY")
	after := make(map[watchedForward]forward.Traffic)
	row := func(key watchedForward, what string, path forward.Datapath, now forward.Traffic, why string) {
		after[key] = now
		fresh, in, out := "-", "-", "-"
		if old, known := v.before[key]; known && seconds > 0 {
			rate := func(n int64) int64 { return int64(float64(n) / seconds) }
			fresh = fmt.Sprint(rate(now.Total - old.Total))
			in, out = byteSize(rate(now.BytesIn-old.BytesIn)), byteSize(rate(now.BytesOut-old.BytesOut))
		}
		id := "-"
		if key.id > 0 {
			id = fmt.Sprint(key.id)
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%d\t%d\t%s\t%s\t%s\t%s\n", key.instance, id, what, path, now.Active, now.Total, fresh, in, out, why)
	}
	for _, s := range all {
		for _, r := range s.Rules {
			row(watchedForward{s.Name, r.ID}, r.Rule.String(), r.Path, r.Traffic, whyText(r))
		}
		row(watchedForward{s.Name, 0}, "outbound", "", s.Outbound, "")
	}
	t.Flush()
	v.before, v.when = after, now
}

// isTerminal reports whether w is a terminal.
func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}

// newPsCommand lists instances in one line each.
func newPsCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "ps",
		Short: "list what runs, in a line each",
		Args:  noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			all, err := findInstances(cmd.Context(), "")
			if err != nil {
				return err
			}
			t := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 0, 2, ' ', 0)
			fmt.Fprintln(t, "NAME\tPID\tUP\tFORWARDS\tACTIVE\tNAMESPACE")
			for _, s := range all {
				active := s.Outbound.Active
				for _, r := range s.Rules {
					active += r.Active
				}
				fmt.Fprintf(t, "%s\t%d\t%s\t%d\t%d\t%s\n", s.Name, s.PID, time.Since(s.Started).Round(time.Second), len(s.Rules), active, s.NetNS)
			}
			return t.Flush()
		},
	}
}
