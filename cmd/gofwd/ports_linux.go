package main

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/gofwd/gofwd/forward"
)

// portsOptions is what the commands below ports share.
type portsOptions struct {
	name   string
	asJSON bool
	drain  time.Duration
}

func newPortsCommand() *cobra.Command {
	o := &portsOptions{}
	cmd := &cobra.Command{
		Use:   "ports COMMAND",
		Short: "show and change what is published, while it runs",
		Long: `Show and change the forwards of an instance that runs. A change is made as a
whole or not at all, and is true when the command returns. No other forward
notices: no listener is closed that isn't named.`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return usagef(cmd, "no command given") },
	}
	cmd.AddCommand(o.list(), o.add(), o.remove(), o.set())
	for _, sub := range cmd.Commands() {
		nameFlag(sub, &o.name)
		sub.Flags().BoolVar(&o.asJSON, "json", false, "print JSON")
	}
	return cmd
}

func (o *portsOptions) list() *cobra.Command {
	return &cobra.Command{
		Use:   "list [--json] [--name NAME]",
		Short: "list the forwards, with their ids",
		Args:  noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := openClient(o.name)
			if err != nil {
				return err
			}
			var s forward.Status
			if err := c.do(cmd.Context(), http.MethodGet, "/v1/status", nil, &s); err != nil {
				return err
			}
			return o.print(cmd.OutOrStdout(), forward.Changed{Generation: s.Generation, Rules: s.Rules})
		},
	}
}

func (o *portsOptions) add() *cobra.Command {
	return &cobra.Command{
		Use:   "add [--json] [--name NAME] PORT...",
		Short: "publish ports, as run -p does",
		Long: `Publish ports, all of them or none, and print the forwards with their ids. One
that is published already stays as it is.`,
		Example: "  gofwd ports add 8080:80 127.0.0.1:5353:53/udp",
		Args:    someArgs("PORT"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := checkPorts(args); err != nil {
				return usagef(cmd, "%w", err)
			}
			return o.change(cmd, http.MethodPost, "/v1/forwards", map[string]any{"add": args})
		},
	}
}

func (o *portsOptions) remove() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "rm [--drain TIME] [--json] [--name NAME] ID|PORT...",
		Short: "end forwards",
		Long: `End forwards, all of them or none. ID is that of ports list; PORT is a forward as
that shows it, such as 8080:80/tcp or 5432:5432/tcp,out, and has a colon or a
slash.`,
		Example:           "  gofwd ports rm --drain 30s 8080:80",
		Args:              someArgs("ID or PORT"),
		ValidArgsFunction: o.completeIDs,
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := openClient(o.name)
			if err != nil {
				return err
			}
			ids, err := c.findForwards(cmd, args)
			if err != nil {
				return err
			}
			return o.change(cmd, http.MethodPost, "/v1/forwards", map[string]any{"remove": ids, "drain": o.drain.String()})
		},
	}
	o.drainFlag(cmd)
	return cmd
}

func (o *portsOptions) set() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "set [--drain TIME] [--json] [--name NAME] [PORT]...",
		Short: "publish these ports and no others",
		Long: `Publish these ports and no others, all in one step. Those that are published
already stay as they are; where only the container's port changes, no client is
refused.`,
		Example: "  gofwd ports set 8080:81 8443:443",
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := checkPorts(args); err != nil {
				return usagef(cmd, "%w", err)
			}
			return o.change(cmd, http.MethodPut, "/v1/ports", map[string]any{"forwards": append([]string{}, args...), "drain": o.drain.String()})
		},
	}
	o.drainFlag(cmd)
	return cmd
}

func (o *portsOptions) drainFlag(cmd *cobra.Command) {
	cmd.Flags().DurationVar(&o.drain, "drain", 0, "`TIME`: how long connections of what ends may go on, such as 30s; without, they are reset")
}

// change asks for a change, and prints what became of it.
func (o *portsOptions) change(cmd *cobra.Command, method, path string, request any) error {
	c, err := openClient(o.name)
	if err != nil {
		return err
	}
	var changed forward.Changed
	if err := c.do(cmd.Context(), method, path, request, &changed); err != nil {
		return err
	}
	return o.print(cmd.OutOrStdout(), changed)
}

// print shows forwards to people, or to programs.
func (o *portsOptions) print(w io.Writer, changed forward.Changed) error {
	if o.asJSON {
		return printJSON(w, changed)
	}
	if len(changed.Rules) == 0 {
		return nil
	}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "ID\tFORWARD\tBOUND\tPATH\tWHY")
	for _, r := range changed.Rules {
		fmt.Fprintf(t, "%d\t%s\t%s\t%s\t%s\n", r.ID, r.Rule, boundText(r), r.Path, whyText(r))
	}
	return t.Flush()
}

// boundText is where a forward listens.
func boundText(r forward.RuleStatus) string {
	switch n := len(r.Bound); {
	case n == 1:
		return r.Bound[0].String()
	case n > 1:
		return fmt.Sprintf("%s and %d more", r.Bound[0], n-1)
	case r.Rule.Socket != "":
		return r.Rule.Socket
	}
	return "-"
}

// whyText is what is not as good as it might be about a forward.
func whyText(r forward.RuleStatus) string {
	why := r.Reason
	if n := len(r.Problems); n > 0 {
		if why != "" {
			why += "; "
		}
		why += r.Problems[0]
		if n > 1 {
			why += fmt.Sprintf(" and %d more", n-1)
		}
	}
	return why
}

// checkPorts finds mistakes before an instance is asked.
func checkPorts(args []string) error {
	for _, a := range args {
		if _, err := forward.ParsePublish(a); err != nil {
			return err
		}
	}
	return nil
}

// findForwards returns the ids that args mean.
func (c *client) findForwards(cmd *cobra.Command, args []string) (ids []int, err error) {
	var s forward.Status
	for _, a := range args {
		if id, err := strconv.Atoi(a); err == nil {
			ids = append(ids, id)
			continue
		}
		rules, err := forward.ParsePublish(a)
		if err != nil {
			return nil, usagef(cmd, "%w", err)
		}
		if s.Rules == nil {
			if err := c.do(cmd.Context(), http.MethodGet, "/v1/status", nil, &s); err != nil {
				return nil, err
			}
		}
		for _, want := range rules {
			id := idOf(s.Rules, want)
			if id == 0 {
				return nil, &hintedError{fmt.Errorf("no forward is %q", want), "gofwd ports list shows them"}
			}
			ids = append(ids, id)
		}
	}
	return ids, nil
}

func idOf(rules []forward.RuleStatus, want forward.Rule) int {
	for _, r := range rules {
		if r.Rule == want {
			return r.ID
		}
	}
	return 0
}

func (o *portsOptions) completeIDs(cmd *cobra.Command, _ []string, _ string) ([]string, cobra.ShellCompDirective) {
	const noFiles = cobra.ShellCompDirectiveNoFileComp
	c, err := openClient(o.name)
	if err != nil {
		return nil, noFiles
	}
	return c.completeForwards(cmd.Context()), noFiles
}

// completeForwards offers the ids of forwards, described by their rules.
func (c *client) completeForwards(ctx context.Context) (words []string) {
	if ctx == nil {
		ctx = context.Background()
	}
	var s forward.Status
	if c.do(ctx, http.MethodGet, "/v1/status", nil, &s) != nil {
		return nil
	}
	for _, r := range s.Rules {
		words = append(words, fmt.Sprintf("%d\t%s", r.ID, r.Rule))
	}
	return words
}

// someArgs refuses to have none.
func someArgs(what string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) == 0 {
			return usagef(cmd, "no %s given", what)
		}
		return nil
	}
}

func newReloadCommand() *cobra.Command {
	var name string
	cmd := &cobra.Command{
		Use:   "reload [--name NAME]",
		Short: "read --config anew",
		Long: `Make the forwards of an instance those of its command line and of its --config
FILE as it is now, all of them or, after an error, none. Those that ports add has
added end. SIGHUP does the same, and logs errors. Connections of forwards that end
are reset; all others go on.`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := openClient(name)
			if err != nil {
				return err
			}
			return c.do(cmd.Context(), http.MethodPost, "/v1/reload", nil, nil)
		},
	}
	nameFlag(cmd, &name)
	return cmd
}
