package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"github.com/pelletier/go-toml/v2"
	"github.com/pelletier/go-toml/v2/unstable"
	"github.com/spf13/pflag"

	"github.com/gofwd/gofwd/forward"
)

// configEntry is one line of a configuration file: an option by its long name.
type configEntry struct {
	key  string
	line int
	// values is one value, or those of an array.
	values []configValue
}

type configValue struct {
	text string
	line int
}

// configError is what is wrong with a configuration file.
type configError struct {
	file string
	line int
	err  error
}

func (e *configError) Error() string { return fmt.Sprintf("%s:%d: %v", e.file, e.line, e.err) }
func (e *configError) Unwrap() error { return e.err }

// notInConfig are options that are about one process and its parent.
var notInConfig = []string{"config", "ready-fd", "exit-fd"}

// loadConfig sets the options of --config. The command line wins over the file, and
// of options that may be given several times both count.
func (o *options) loadConfig(flags *pflag.FlagSet) error {
	o.cliPorts = o.portLists()
	for i := range o.cliPorts {
		o.cliPorts[i] = slices.Clone(o.cliPorts[i])
	}
	if o.configFile == "" {
		return nil
	}
	// The inner process may be somewhere else by the time it reads it again.
	path, err := filepath.Abs(o.configFile)
	if err != nil {
		return fmt.Errorf("read configuration: %w", err)
	}
	o.configFile = path
	entries, err := readConfig(path)
	if err != nil {
		return err
	}
	given := make(map[string]bool)
	flags.Visit(func(f *pflag.Flag) { given[f.Name] = true })
	for _, e := range entries {
		f := flags.Lookup(e.key)
		if f == nil || f.Hidden || e.key == "help" {
			return &configError{path, e.line, fmt.Errorf("there is no option %q", e.key)}
		}
		if slices.Contains(notInConfig, e.key) {
			return &configError{path, e.line, fmt.Errorf("%s can be given on the command line only", e.key)}
		}
		if given[e.key] && !repeatable(f) {
			continue
		}
		if len(e.values) != 1 && !repeatable(f) {
			return &configError{path, e.line, fmt.Errorf("%s takes one value", e.key)}
		}
		for _, v := range e.values {
			err := checkPort(e.key, v.text)
			if err == nil {
				err = f.Value.Set(v.text)
			}
			if err != nil {
				return &configError{path, v.line, fmt.Errorf("%s: %w", e.key, err)}
			}
		}
		f.Changed = true
	}
	o.configEntries = entries
	return nil
}

// repeatable reports whether an option may be given several times.
func repeatable(f *pflag.Flag) bool {
	return f.Value.Type() == "stringArray" || f.Value.Type() == "address"
}

// portOptions are the options that may change while gofwd runs.
var portOptions = []string{"publish", "tcp-ports", "udp-ports", "tcp-ns", "udp-ns"}

// portLists are their values.
func (o *options) portLists() [5][]string {
	return [...][]string{o.publish, o.tcpIn, o.udpIn, o.tcpOut, o.udpOut}
}

func (o *options) setPortLists(l [5][]string) {
	o.publish, o.tcpIn, o.udpIn, o.tcpOut, o.udpOut = l[0], l[1], l[2], l[3], l[4]
}

// checkPort parses a port, so that a mistake has its line.
func checkPort(key, text string) error {
	dirs := []forward.Dir{0, forward.In, forward.In, forward.Out, forward.Out}
	protos := []forward.Proto{0, forward.TCP, forward.UDP, forward.TCP, forward.UDP}
	i := slices.Index(portOptions, key)
	var err error
	switch {
	case i == 0:
		_, err = forward.ParsePublish(text)
	case i > 0:
		_, err = forward.ParseSpec(dirs[i], protos[i], text)
	}
	return err
}

// rereadPorts returns the rules of the command line and of the file as it is now.
// Of everything else a change is an error: it takes a restart.
func (o *options) rereadPorts() ([]forward.Rule, error) {
	entries, err := readConfig(o.configFile)
	if err != nil {
		return nil, err
	}
	lists := o.cliPorts
	for _, e := range entries {
		i := slices.Index(portOptions, e.key)
		if i < 0 {
			if !o.sameEntry(e) {
				return nil, &configError{o.configFile, e.line, fmt.Errorf("%s can't change while gofwd runs: restart it", e.key)}
			}
			continue
		}
		for _, v := range e.values {
			if err := checkPort(e.key, v.text); err != nil {
				return nil, &configError{o.configFile, v.line, fmt.Errorf("%s: %w", e.key, err)}
			}
			lists[i] = append(slices.Clip(lists[i]), v.text)
		}
	}
	for _, old := range o.configEntries {
		if !slices.Contains(portOptions, old.key) && !slices.ContainsFunc(entries, func(e configEntry) bool { return e.key == old.key }) {
			return nil, fmt.Errorf("%s: %s can't change while gofwd runs: restart it", o.configFile, old.key)
		}
	}
	again := options{wait: o.wait}
	again.setPortLists(lists)
	if err := again.completeRules(); err != nil {
		return nil, fmt.Errorf("%s: %w", o.configFile, err)
	}
	return again.config.Rules, nil
}

// sameEntry reports whether the file said the same when gofwd started.
func (o *options) sameEntry(e configEntry) bool {
	return slices.ContainsFunc(o.configEntries, func(old configEntry) bool {
		return old.key == e.key && slices.EqualFunc(old.values, e.values, func(a, b configValue) bool { return a.text == b.text })
	})
}

// maxConfig bounds the file, which may be anything that was named by mistake.
const maxConfig = 16 << 20

// readConfig reads a TOML file with options at its top.
func readConfig(path string) ([]configEntry, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, fmt.Errorf("read configuration: %w", err)
	}
	if !info.Mode().IsRegular() || info.Size() > maxConfig {
		return nil, fmt.Errorf("read configuration: %s is not a file of up to 16 MiB", path)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("read configuration: %w", err)
	}
	return parseConfig(path, b)
}

func parseConfig(path string, b []byte) (entries []configEntry, err error) {
	// What is no TOML the decoder says best; it doesn't tell the lines of what is.
	var any map[string]any
	if err := toml.Unmarshal(b, &any); err != nil {
		if syntax, ok := errors.AsType[*toml.DecodeError](err); ok {
			line, _ := syntax.Position()
			return nil, &configError{path, line, errors.New(syntax.Error())}
		}
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	p := &unstable.Parser{}
	p.Reset(b)
	for p.NextExpression() {
		n := p.Expression()
		key := n.Key()
		key.Next()
		e := configEntry{key: string(key.Node().Data), line: lineOf(p, key.Node(), 1)}
		if n.Kind != unstable.KeyValue || key.Next() {
			return nil, &configError{path, e.line, fmt.Errorf("%q is a table; options stand by themselves", e.key)}
		}
		if e.values, err = configValues(p, n.Value(), e.line); err != nil {
			return nil, &configError{path, e.line, fmt.Errorf("%s: %w", e.key, err)}
		}
		entries = append(entries, e)
	}
	return entries, p.Error()
}

// configValues returns the value, or the values of an array, as text.
func configValues(p *unstable.Parser, n *unstable.Node, line int) (values []configValue, err error) {
	switch n.Kind {
	case unstable.String, unstable.Integer, unstable.Bool:
		return []configValue{{string(n.Data), lineOf(p, n, line)}}, nil
	case unstable.Array:
		items := n.Children()
		for items.Next() {
			item := items.Node()
			if item.Kind == unstable.Array {
				return nil, errors.New("an array in an array")
			}
			v, err := configValues(p, item, line)
			if err != nil {
				return nil, err
			}
			line = v[0].line
			values = append(values, v...)
		}
		return values, nil
	}
	return nil, errors.New("the value is none of string, whole number, true, false and an array of those")
}

// lineOf returns the line that a node begins in, or known where it can't be told.
func lineOf(p *unstable.Parser, n *unstable.Node, known int) int {
	if n.Raw.Length == 0 {
		return known
	}
	return p.Shape(n.Raw).Start.Line
}
