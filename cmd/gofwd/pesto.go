package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"github.com/gofwd/gofwd/forward"
	"github.com/gofwd/gofwd/forward/control"
	"github.com/gofwd/gofwd/forward/control/pesto"
)

// # pesto
//
// Called as pesto, gofwd takes the command line of pesto(1), as of October 2026,
// and changes the forwards of a pasta that was started with -c, ours or the other.
// What differs is documented in docs/podman.md.

const pestoUsage = `Usage: pesto [OPTION]... PATH

Show and change the forwards of the pasta that was started with -c PATH.

  -A, --add             add the specifiers that follow
  -D, --delete          delete the specifiers that follow
  -C, --clear TABLE     delete all forwards in HOST (-t, -u) or SPLICE (-T, -U)
  -t, --tcp-ports SPEC  TCP ports into the namespace
  -u, --udp-ports SPEC  UDP ports into the namespace
  -T, --tcp-ns SPEC     TCP ports from the namespace's loopback to the host's
  -U, --udp-ns SPEC     UDP ports likewise
  -s, --show            show the forwards before and after
  -d, --debug           print what is going on
  -h, --help            show this help and exit
      --version         show the version and exit

Without -A and -D the specifiers replace the tables that they are for. SPEC is that
of pasta(1). All of it is done, or nothing. Without anything to do the forwards are
shown.
`

// executePesto runs the command line of pesto, and returns the exit code.
func executePesto(argv []string) int {
	if err := runPesto(context.Background(), argv[1:], os.Stdout, os.Stderr); err != nil {
		fmt.Fprintln(os.Stderr, oneLine(err))
		return exitFailure
	}
	return 0
}

func runPesto(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	p := &pestoCommand{stdout: stdout, stderr: stderr}
	if err := p.parse(args); err != nil {
		return err
	}
	switch {
	case p.help:
		return printTo(stdout, pestoUsage)
	case p.version:
		return printTo(stdout, fmt.Sprintf("pesto %s\nThis is gofwd, in the place of pesto(1).\n", readVersion().Version))
	}
	return p.run(ctx)
}

// pestoCommand is a command line of pesto.
type pestoCommand struct {
	stdout, stderr io.Writer

	help, version bool
	show, debug   bool
	path          string
	// steps are what to do to the tables, in the order of the command line.
	steps []func(*pesto.Client) error

	mode    pestoMode
	given   [len(pastaDirections)]bool // options that had a specifier
	cleared []pesto.PIF                // by being replaced
}

// pestoMode is what specifiers are for.
type pestoMode int

const (
	pestoReplace pestoMode = iota
	pestoAdd
	pestoDelete
)

func (p *pestoCommand) options() []longOption {
	flag := func(to *bool) func(string) error {
		return func(string) error { *to = true; return nil }
	}
	mode := func(m pestoMode) func(string) error {
		return func(string) error { p.mode = m; return nil }
	}
	spec := func(i int) func(string) error {
		return func(arg string) error { return p.addSpec(i, arg) }
	}
	return []longOption{
		{"add", 'A', false, mode(pestoAdd)},
		{"delete", 'D', false, mode(pestoDelete)},
		{"clear", 'C', true, p.addClear},
		{"tcp-ports", 't', true, spec(0)},
		{"udp-ports", 'u', true, spec(1)},
		{"tcp-ns", 'T', true, spec(2)},
		{"udp-ns", 'U', true, spec(3)},
		{"show", 's', false, flag(&p.show)},
		{"debug", 'd', false, flag(&p.debug)},
		{"help", 'h', false, flag(&p.help)},
		{"version", 0, false, flag(&p.version)},
	}
}

// parse takes options before the path, and behind it: unlike pasta, pesto has no
// command to start.
func (p *pestoCommand) parse(args []string) error {
	for {
		rest, err := getopt(p.options(), args)
		switch {
		case err != nil:
			return fmt.Errorf("%w; see 'pesto --help'", err)
		case len(rest) == 0:
			if p.path == "" && !p.help && !p.version {
				return errors.New("no socket is given; see 'pesto --help'")
			}
			return nil
		case p.path != "":
			return fmt.Errorf("sockets %s and %s are given, and there can be one; see 'pesto --help'", p.path, rest[0])
		}
		p.path, args = rest[0], rest[1:]
	}
}

// pestoTables are the tables by name.
var pestoTables = map[string]pesto.PIF{"HOST": pesto.Host, "SPLICE": pesto.Splice}

// addClear is --clear.
func (p *pestoCommand) addClear(name string) error {
	pif, ok := pestoTables[name]
	if !ok {
		return fmt.Errorf("--clear %s: there is no such table: HOST or SPLICE", name)
	}
	p.addStep(pif, func(t *pesto.Table) error { t.Rules = nil; return nil })
	return nil
}

func (p *pestoCommand) addStep(pif pesto.PIF, do func(*pesto.Table) error) {
	p.steps = append(p.steps, func(c *pesto.Client) error {
		t := c.Table(pif)
		if t == nil {
			return fmt.Errorf("%s has no table %d", p.path, pif)
		}
		return do(t)
	})
}

// addSpec is -t, -u, -T or -U.
func (p *pestoCommand) addSpec(i int, spec string) error {
	d := pastaDirections[i]
	if spec == "none" && (p.given[i] || p.mode == pestoDelete) {
		return fmt.Errorf("%s none conflicts with previous options", d.option)
	}
	p.given[i] = true
	parsed, err := forward.ParseSpec(d.dir, d.proto, spec)
	if err != nil {
		return fmt.Errorf("%s: %w", d.option, err)
	}
	pif := pesto.Host
	if d.dir == forward.Out {
		pif = pesto.Splice
	}
	if p.mode == pestoReplace && !slices.Contains(p.cleared, pif) {
		p.cleared = append(p.cleared, pif)
		p.addStep(pif, func(t *pesto.Table) error { t.Rules = nil; return nil })
	}
	do := (*pesto.Table).Add
	if p.mode == pestoDelete {
		do = p.deleteRule
	}
	for _, r := range parsed {
		_, rule, ok := pesto.FromForward(r)
		if !ok {
			return fmt.Errorf("%s %s: pesto's protocol has no words for it; see 'gofwd ports --help'", d.option, spec)
		}
		p.addStep(pif, func(t *pesto.Table) error { return do(t, rule) })
	}
	return nil
}

// deleteRule deletes a rule. That there is none to delete, is said, and as good.
func (p *pestoCommand) deleteRule(t *pesto.Table, r pesto.Rule) error {
	err := t.Delete(r)
	if errors.Is(err, pesto.ErrNoRule) {
		fmt.Fprintln(p.stderr, err)
		return nil
	}
	return err
}

// run shows the tables, or changes them.
func (p *pestoCommand) run(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, answerTimeout)
	defer cancel()
	c, err := pesto.Dial(ctx, p.path)
	if err != nil {
		return err
	}
	defer c.Close()
	p.printDebug("connected to %s", p.path)
	for _, t := range c.Tables {
		p.printDebug("table %d: %s, %d rules, capabilities %#x", t.PIF, t.Name, len(t.Rules), t.Caps)
	}
	if len(p.steps) == 0 && p.mode == pestoReplace && !slices.Contains(p.given[:], true) {
		return p.print("passt/pasta configuration", c.Tables)
	}
	if p.show {
		if err := p.print("Previous configuration", c.Tables); err != nil {
			return err
		}
	}
	before := make([][]pesto.Rule, len(c.Tables))
	for i, t := range c.Tables {
		before[i] = slices.Clone(t.Rules)
	}
	for _, do := range p.steps {
		if err := do(c); err != nil {
			return err
		}
	}
	if err := p.update(c, before); err != nil {
		return err
	}
	if p.show {
		return p.print("Updated configuration", c.Tables)
	}
	return nil
}

// update makes the tables those of the server, unless they are: pasta would close
// all its listeners and open them again.
func (p *pestoCommand) update(c *pesto.Client, before [][]pesto.Rule) error {
	changed := false
	for i, t := range c.Tables {
		changed = changed || !slices.Equal(t.Rules, before[i])
	}
	if !changed {
		p.printDebug("there is nothing to change")
		return nil
	}
	acknowledged, err := c.Update()
	if failure, ok := errors.AsType[control.Failure](err); ok {
		return explain(failure)
	}
	if err == nil && !acknowledged {
		p.printDebug("the server took the change, and does not say what became of it")
	}
	return err
}

// printDebug is --debug.
func (p *pestoCommand) printDebug(format string, args ...any) {
	if p.debug {
		fmt.Fprintf(p.stderr, format+"\n", args...)
	}
}

// print shows tables, as pesto does.
func (p *pestoCommand) print(title string, tables []pesto.Table) error {
	var b strings.Builder
	fmt.Fprintf(&b, "%s (%s)\n", title, p.path)
	for _, t := range tables {
		fmt.Fprintf(&b, "  %s\n", t.Name)
		for _, r := range t.Rules {
			fmt.Fprintf(&b, "    %s\n", r)
		}
	}
	return printTo(p.stdout, b.String())
}
