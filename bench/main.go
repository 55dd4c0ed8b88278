package main

import (
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

func main() {
	if err := run(os.Args[1:], os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// run is the program. Its first argument may name a part that it plays for
// itself in another process.
func run(args []string, stdout io.Writer) error {
	if len(args) > 0 {
		switch args[0] {
		case "lab":
			return runLab(args[1:])
		case "serve":
			return serve(args[1:])
		case "load":
			return load(args[1:])
		}
	}
	opt, err := parseOptions(args)
	if err != nil {
		return err
	}
	switch {
	case opt.list:
		for _, r := range opt.rows() {
			fmt.Fprintf(stdout, "%-10s %-70s %s\n", r.Group, r.Name, r.Title)
		}
		tools, err := selectTools(opt.toolNames())
		if err != nil {
			return err
		}
		fmt.Fprintf(os.Stderr, "%s, if every tool is there\n", newWorkload(opt.rows(), tools, opt.rounds, opt.seconds))
		return nil
	case opt.compare:
		return runCompare(opt.args, stdout)
	}
	result, err := opt.result()
	if err != nil {
		return err
	}
	result.writeText(stdout)
	return opt.save(result)
}

// options are the command line.
type options struct {
	only, tools   string
	rounds        int
	seconds       float64
	quick, all    bool
	list, compare bool
	from, add     string
	out, readme   string
	args          []string
}

func parseOptions(args []string) (*options, error) {
	o := new(options)
	f := flag.NewFlagSet("bench", flag.ContinueOnError)
	f.StringVar(&o.only, "only", "", "run only the rows whose group or name contains one of these `words`, separated by commas")
	f.StringVar(&o.tools, "tools", "", "run only these tools, separated by commas; native is always worth having")
	f.IntVar(&o.rounds, "rounds", 5, "take this many samples of every value")
	f.Float64Var(&o.seconds, "seconds", 1, "each this long; iperf3 counts whole ones")
	f.BoolVar(&o.quick, "quick", false, "a few rows of gofwd, pasta and native in under two minutes")
	f.BoolVar(&o.all, "all", false, "fail when a tool is missing")
	f.BoolVar(&o.list, "list", false, "list the rows, say about how long they take, and exit")
	f.BoolVar(&o.compare, "compare", false, "compare two results, OLD.json NEW.json; fail on a regression of gofwd")
	f.StringVar(&o.from, "from", "", "show this result.json instead of measuring")
	f.StringVar(&o.add, "add", "", "add the rows of this result.json, of the same commit, that are not measured now")
	f.StringVar(&o.out, "out", "", "write JSON, benchmark text, a page and charts into `dir`; \"auto\" names one in bench/results")
	f.StringVar(&o.readme, "readme", "", "fill the benchmark markers of this Markdown `file`; needs -out")
	if err := f.Parse(args); err != nil {
		return nil, err
	}
	o.args = f.Args()
	switch {
	case o.compare && len(o.args) != 2:
		return nil, fmt.Errorf("-compare takes two files")
	case !o.compare && len(o.args) > 0:
		return nil, fmt.Errorf("unexpected argument %q", o.args[0])
	case o.rounds < 1 || o.seconds <= 0:
		return nil, fmt.Errorf("-rounds and -seconds must be positive")
	case o.readme != "" && o.out == "":
		return nil, fmt.Errorf("-readme needs -out")
	}
	if o.quick {
		o.rounds = min(o.rounds, 3)
		if o.tools == "" {
			o.tools = strings.Join([]string{toolNative, toolKernel, toolTap, toolPasta}, ",")
		}
	}
	if _, err := selectTools(o.toolNames()); err != nil {
		return nil, err
	}
	if len(o.rows()) == 0 {
		return nil, fmt.Errorf("no row matches -only %s", o.only)
	}
	return o, nil
}

// result measures, or reads what was measured before.
func (o *options) result() (*Result, error) {
	var r *Result
	var err error
	if o.from != "" {
		r, err = loadResult(o.from)
	} else {
		r, err = measure(o)
	}
	if err != nil || o.add == "" {
		return r, err
	}
	other, err := loadResult(o.add)
	if err != nil {
		return nil, err
	}
	return r, r.add(other)
}

// toolNames returns the tools that were asked for; none means all.
func (o *options) toolNames() []string { return words(o.tools) }

// rows returns the rows that were asked for.
func (o *options) rows() []row {
	var out []row
	for _, r := range plan() {
		matches := func(word string) bool { return r.Group == word || strings.Contains(r.Name, word) }
		if o.quick && !r.quick || o.only != "" && !slices.ContainsFunc(words(o.only), matches) {
			continue
		}
		out = append(out, r)
	}
	return out
}

func words(list string) []string {
	return strings.FieldsFunc(list, func(c rune) bool { return c == ',' || c == ' ' })
}

func runCompare(files []string, stdout io.Writer) error {
	before, err := loadResult(files[0])
	if err != nil {
		return err
	}
	after, err := loadResult(files[1])
	if err != nil {
		return err
	}
	t, regressions, err := compareResults(before, after)
	if err != nil {
		return err
	}
	t.text(stdout)
	if regressions > 0 {
		return fmt.Errorf("%s", plural(regressions, "regression"))
	}
	return nil
}

// save writes the result in all its forms.
func (o *options) save(r *Result) error {
	if o.out == "" {
		return nil
	}
	dir := o.out
	if dir == "auto" {
		m := r.Machine
		dir = filepath.Join("bench/results", fmt.Sprintf("%s-%s-%dcores", m.Date.Format("2006-01-02"), m.Kernel, m.Cores))
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	charts, err := r.drawCharts()
	if err != nil {
		return err
	}
	files := map[string][]byte{}
	if files["result.json"], err = r.json(); err != nil {
		return err
	}
	var text strings.Builder
	if err := r.writeBench(&text); err != nil {
		return err
	}
	files["bench.txt"] = []byte(text.String())
	for _, c := range charts {
		files[c.name] = c.svg
	}
	files["README.md"] = []byte(r.page(charts))
	for name, data := range files {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o644); err != nil {
			return err
		}
	}
	fmt.Fprintln(os.Stderr, "written to", dir)
	if o.readme == "" {
		return nil
	}
	readme, err := os.ReadFile(o.readme)
	if err != nil {
		return err
	}
	rel, err := filepath.Rel(filepath.Dir(o.readme), dir)
	if err != nil {
		return err
	}
	filled, err := fill(string(readme), r.blocks(charts, rel))
	if err != nil {
		return fmt.Errorf("fill %s: %w", o.readme, err)
	}
	return os.WriteFile(o.readme, []byte(filled), 0o644)
}
