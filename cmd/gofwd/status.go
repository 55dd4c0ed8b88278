package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/gofwd/gofwd/forward"
	"github.com/gofwd/gofwd/forward/control"
)

// instanceStatus is what one instance says about itself, and who it is.
type instanceStatus struct {
	Name string `json:"name"`
	PID  int    `json:"pid"`
	forward.Status
}

func newStatusCommand() *cobra.Command {
	var asJSON, watch bool
	cmd := &cobra.Command{
		Use:   "status [--json|--watch] [NAME]",
		Short: "show what runs",
		Long: `Show the instances of gofwd that run, or the one called NAME: their forwards, the
path that connections take and why, how many there are, and how many bytes went
in and out.`,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) > 1 {
				return usagef(cmd, "unexpected argument %q", args[1])
			}
			if len(args) == 1 && !validName(args[0]) {
				return usagef(cmd, "%q is not a name; gofwd status lists those that there are", args[0])
			}
			return nil
		},
		ValidArgsFunction: completeInstances,
		RunE: func(cmd *cobra.Command, args []string) error {
			name := ""
			if len(args) > 0 {
				name = args[0]
			}
			if watch && asJSON {
				return usagef(cmd, "--json and --watch exclude each other")
			}
			if watch {
				return (&watcher{name: name}).watch(cmd.Context(), cmd.OutOrStdout())
			}
			return showStatus(cmd.Context(), cmd.OutOrStdout(), name, asJSON)
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON: an array, or with NAME an object")
	cmd.Flags().BoolVarP(&watch, "watch", "w", false, "show rates too, again and again until ^C or q: in place on a terminal")
	return cmd
}

func showStatus(ctx context.Context, w io.Writer, name string, asJSON bool) error {
	all, err := findInstances(ctx, name)
	switch {
	case err != nil:
		return err
	case asJSON && name != "":
		return printJSON(w, all[0])
	case asJSON:
		return printJSON(w, all)
	}
	for i, s := range all {
		if i > 0 {
			fmt.Fprintln(w)
		}
		s.print(w)
	}
	return nil
}

// findInstances asks the instance called name, or all if that is "".
func findInstances(ctx context.Context, name string) ([]instanceStatus, error) {
	dir, err := runtimeDir()
	if err != nil {
		return nil, err
	}
	names := []string{name}
	if name == "" {
		if names, err = instanceNames(dir); err != nil {
			return nil, err
		}
	}
	all := []instanceStatus{}
	for _, n := range names {
		socket := filepath.Join(dir, n+socketSuffix)
		s, err := queryStatus(ctx, socket)
		if isNobodyThere(err) {
			if err := removeStale(socket); err != nil {
				return nil, err
			}
		}
		switch {
		case err == nil:
			s.Name = n
			all = append(all, s)
		case name == "" && ctx.Err() == nil && errors.Is(err, context.DeadlineExceeded):
			fmt.Fprintf(os.Stderr, "gofwd: %s does not answer: it is stopped, or hangs\n", n)
		case name == "" && errors.As(err, new(control.Failure)):
			fmt.Fprintf(os.Stderr, "gofwd: ask %s for its status: %v\n", n, err)
		case !isNobodyThere(err) && !isEnding(err):
			return nil, fmt.Errorf("ask %s for its status: %w", n, err)
		case name != "":
			return nil, &hintedError{fmt.Errorf("no gofwd named %q runs", name), "gofwd status lists those that do"}
		}
	}
	return all, nil
}

// instanceNames lists the sockets of a runtime directory.
func instanceNames(dir string) ([]string, error) {
	sockets, err := filepath.Glob(filepath.Join(dir, "*"+socketSuffix))
	if err != nil {
		return nil, fmt.Errorf("list instances: %w", err)
	}
	for i, s := range sockets {
		sockets[i] = strings.TrimSuffix(filepath.Base(s), socketSuffix)
	}
	return sockets, nil
}

func completeInstances(_ *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	const noFiles = cobra.ShellCompDirectiveNoFileComp
	dir, err := runtimeDir()
	if err != nil || len(args) > 0 {
		return nil, noFiles
	}
	names, err := instanceNames(dir)
	if err != nil {
		return nil, noFiles
	}
	return names, noFiles
}

// queryStatus asks the instance behind a control socket.
func queryStatus(ctx context.Context, socket string) (instanceStatus, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	var s instanceStatus
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		c, err := new(net.Dialer).DialContext(ctx, "unix", socket)
		if err == nil {
			s.PID = peerPID(c)
		}
		return c, err
	}
	client := &http.Client{Transport: &http.Transport{DialContext: dial, DisableKeepAlives: true}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://gofwd/v1/status", nil)
	if err != nil {
		return s, err
	}
	resp, err := client.Do(req)
	if err != nil {
		return s, errors.Unwrap(err) // a url.Error, and there is no such URL
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return s, readFailure(resp)
	}
	return s, json.NewDecoder(resp.Body).Decode(&s.Status)
}

// isEnding reports whether err is that of an instance that ended while it was
// asked.
func isEnding(err error) bool {
	return errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) ||
		errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF)
}

// print shows an instance to people.
func (s *instanceStatus) print(w io.Writer) {
	fmt.Fprintf(w, "%s: pid %d, namespace %s, up %s\n", s.Name, s.PID, s.NetNS, time.Since(s.Started).Round(time.Second))
	fmt.Fprintf(w, "  %s mtu %d, %s, gateway %s, dns %s, host alias %s\n", s.IfName, s.MTU,
		list(s.Addrs), list(s.Gateway), list(s.DNS), list(s.Alias))
	if len(s.Rules) > 0 {
		t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
		fmt.Fprintln(t, "  FORWARD\tBOUND\tPATH\tACTIVE\tTOTAL\tIN\tOUT\tWHY")
		for _, r := range s.Rules {
			fmt.Fprintf(t, "  %s\t%s\t%s\t%d\t%d\t%s\t%s\t%s\n", r.Rule, boundText(r), r.Path,
				r.Active, r.Total, byteSize(r.BytesIn), byteSize(r.BytesOut), whyText(r))
		}
		t.Flush()
	}
	for _, g := range s.Groups {
		fmt.Fprintf(w, "  multicast %s\n", groupText(g))
	}
	for _, n := range s.Notes {
		fmt.Fprintln(w, "  note: "+n)
	}
}

// groupText says on which ports the container hears a group, or why not.
func groupText(g forward.GroupStatus) string {
	switch {
	case g.Problem != "":
		return fmt.Sprintf("%s: %s", g.Group, g.Problem)
	case len(g.Ports) == 0:
		return fmt.Sprintf("%s, nothing listens", g.Group)
	}
	ports := make([]string, len(g.Ports))
	for i, p := range g.Ports {
		ports[i] = strconv.Itoa(int(p))
	}
	return fmt.Sprintf("%s port %s", g.Group, strings.Join(ports, " "))
}

// list joins values for people; none is "none".
func list[T fmt.Stringer](values []T) string {
	if len(values) == 0 {
		return "none"
	}
	words := make([]string, len(values))
	for i, v := range values {
		words[i] = v.String()
	}
	return strings.Join(words, " ")
}

// byteSize is n in a unit that leaves up to four digits.
func byteSize(n int64) string {
	if n < 1000 {
		return fmt.Sprintf("%d B", n)
	}
	f, unit := float64(n), -1
	for f >= 999.95 && unit < 4 {
		f, unit = f/1000, unit+1
	}
	return fmt.Sprintf("%.1f %cB", f, "kMGTP"[unit])
}

func printJSON(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	return e.Encode(v)
}
