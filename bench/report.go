package main

import (
	"cmp"
	"fmt"
	"io"
	"math"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"

	"golang.org/x/perf/benchfmt"
)

// table is a heading and cells, for a terminal or for Markdown.
type table struct {
	head  []string
	cells [][]string
	notes []string
}

func (t *table) add(cells ...string) { t.cells = append(t.cells, cells) }

// markdown returns the table as GitHub understands it.
func (t *table) markdown() string {
	var b strings.Builder
	line := func(cells []string) {
		b.WriteString("| " + strings.Join(cells, " | ") + " |\n")
	}
	line(t.head)
	align := make([]string, len(t.head))
	for i := range align {
		align[i] = "---:"
	}
	align[0] = "---"
	line(align)
	for _, row := range t.cells {
		line(row)
	}
	for _, n := range t.notes {
		b.WriteString("\n" + n + "\n")
	}
	return b.String()
}

// text writes the table for a terminal.
func (t *table) text(w io.Writer) {
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, row := range append([][]string{t.head}, t.cells...) {
		fmt.Fprintln(tw, strings.Join(row, "\t"))
	}
	tw.Flush()
	for _, n := range t.notes {
		fmt.Fprintln(w, n)
	}
}

// number writes a value with three significant digits.
func number(v float64) string {
	switch a := math.Abs(v); {
	case a >= 1e6:
		return digits(v/1e6) + "M"
	case a >= 1e4:
		return digits(v/1e3) + "k"
	}
	return digits(v)
}

func digits(v float64) string {
	switch a := math.Abs(v); {
	case a >= 100:
		return strconv.FormatFloat(v, 'f', 0, 64)
	case a >= 10:
		return strconv.FormatFloat(v, 'f', 1, 64)
	case a == 0:
		return "0"
	case a >= 1:
		return strconv.FormatFloat(v, 'f', 2, 64)
	}
	return strconv.FormatFloat(v, 'g', 2, 64)
}

// String writes the median and how far the spread reaches from it, e.g.
// "31.2 ±4%".
func (i interval) String() string {
	switch {
	case i.N == 0:
		return "–"
	case i.N == 1 || i.Mid == 0:
		return number(i.Mid)
	}
	return fmt.Sprintf("%s ±%.0f%%", number(i.Mid), 100*max(i.Hi/i.Mid-1, 1-i.Lo/i.Mid))
}

// factor writes a ratio with its spread, e.g. "1.82× (1.75–1.90)".
func (i interval) factor() string {
	if i.N == 1 {
		return fmt.Sprintf("%.2f×", i.Mid)
	}
	return fmt.Sprintf("%.2f× (%.2f–%.2f)", i.Mid, i.Lo, i.Hi)
}

// columnsOf returns the tools that have a value in one of the rows.
func (r *Result) columnsOf(rows []Row) []string {
	var out []string
	for _, t := range r.Tools {
		for _, row := range rows {
			if slices.ContainsFunc(row.Units, func(u string) bool { _, ok := r.summary(row.Name, t.Name, u); return ok }) {
				out = append(out, t.Name)
				break
			}
		}
	}
	return out
}

// rowsOf returns the rows of a group.
func (r *Result) rowsOf(group string) []Row {
	var rows []Row
	for _, row := range r.Rows {
		if row.Group == group {
			rows = append(rows, row)
		}
	}
	return rows
}

// hiddenSource marks a value of a tool whose server does not see the client's
// address in that row.
const hiddenSource = " †"

// groupTable shows all units of all rows of a group, tool beside tool.
func (r *Result) groupTable(group string) *table {
	rows := r.rowsOf(group)
	tools := r.columnsOf(rows)
	t := &table{head: append([]string{groupTitles[group], "unit"}, tools...)}
	hides := false
	for _, row := range rows {
		title := row.Title
		for _, unit := range row.Units {
			cells := []string{title, unit}
			title = "" // once a row
			for _, tool := range tools {
				got, ok := r.summary(row.Name, tool, unit)
				cell := got.String()
				if ok && r.hides(tool, row) {
					cell, hides = cell+hiddenSource, true
				}
				cells = append(cells, cell)
			}
			t.add(cells...)
		}
	}
	if hides {
		t.notes = append(t.notes, "† the server does not see the client's address")
	}
	t.notes = append(t.notes, r.failures(rows)...)
	return t
}

// failures says which samples of some rows could not be taken, each reason once.
func (r *Result) failures(rows []Row) []string {
	type failure struct{ tool, err string }
	titles := map[failure][]string{}
	for _, row := range rows {
		for _, s := range r.Samples {
			if s.Row == row.Name && s.Err != "" {
				f := failure{s.Tool, s.Err}
				titles[f] = append(titles[f], row.Title)
			}
		}
	}
	var notes []string
	for f, in := range titles {
		note := fmt.Sprintf("Failed: %s, %s: %s", f.tool, in[0], f.err)
		if more := len(in) - 1; more > 0 {
			note += fmt.Sprintf(" (and %s more)", plural(more, "sample"))
		}
		notes = append(notes, note)
	}
	slices.Sort(notes)
	return notes
}

// hides says whether the server behind a tool sees another address than the
// client's. Clients on the loopback are left out: there it should be another.
func (r *Result) hides(tool string, row Row) bool {
	info := r.tool(tool)
	return info != nil && strings.HasSuffix(row.Source, " "+string(remote)) && info.Source[row.Source] != kept
}

// standing is how gofwd fares in a row.
type standing struct {
	row     Row
	subject string
	peer    string // the best peer, "" where none has the row
	gofwd   interval
	best    interval // of that peer
	// vsPeer, vsPasta and vsNative are pairwise ratios, more than 1 is
	// better; N is 0 where there is no pair.
	vsPeer, vsPasta, vsNative interval
}

// subjectOf returns the gofwd column that stands for gofwd in a row: the path
// that it takes by itself.
func (r *Result) subjectOf(row Row) string {
	for _, tool := range []string{toolKernel, toolTap} {
		if _, ok := r.summary(row.Name, tool, row.Units[0]); ok {
			return tool
		}
	}
	return ""
}

// standings compares gofwd in every row with the best of its peers: the losses
// first, the greatest first of all.
func (r *Result) standings() []standing {
	var out []standing
	for _, row := range r.Rows {
		unit := row.Units[0]
		s := standing{row: row, subject: r.subjectOf(row)}
		if s.subject == "" {
			continue
		}
		s.gofwd, _ = r.summary(row.Name, s.subject, unit)
		s.vsPasta, _ = r.ratio(row.Name, s.subject, toolPasta, unit)
		s.vsNative, _ = r.ratio(row.Name, s.subject, toolNative, unit)
		for _, t := range r.Tools {
			if !isPeer(t.Name) {
				continue
			}
			vs, ok := r.ratio(row.Name, s.subject, t.Name, unit)
			if ok && (s.peer == "" || vs.Mid < s.vsPeer.Mid) {
				s.peer, s.vsPeer = t.Name, vs
				s.best, _ = r.summary(row.Name, t.Name, unit)
			}
		}
		out = append(out, s)
	}
	order := map[verdict]int{behind: 0, unknown: 1, same: 2, ahead: 3}
	slices.SortStableFunc(out, func(a, b standing) int {
		if c := cmp.Compare(order[a.vsPeer.compare()], order[b.vsPeer.compare()]); c != 0 {
			return c
		}
		return cmp.Compare(a.vsPeer.Mid, b.vsPeer.Mid)
	})
	return out
}

// verdicts are the headings of the summary, in its order.
var verdicts = []struct {
	verdict verdict
	title   string
}{
	{behind, "Behind the best peer"},
	{unknown, "Not decided: too few rounds, or no peer"},
	{same, "No difference: smaller than the spread"},
	{ahead, "Ahead of the best peer"},
}

func (r *Result) summaryTable(standings []standing) *table {
	t := &table{head: []string{"", "unit", "path", "gofwd", "best peer", "", "÷ best peer", "÷ pasta", "÷ native"}}
	for _, s := range standings {
		peer := s.peer
		if peer != "" && r.hides(peer, s.row) {
			peer += hiddenSource
		}
		t.add(groupPrefixes[s.row.Group]+s.row.Title, s.row.Units[0], strings.TrimPrefix(s.subject, "gofwd-"), s.gofwd.String(), s.best.String(), peer,
			factorOr(s.vsPeer), factorOr(s.vsPasta), factorOr(s.vsNative))
	}
	return t
}

func factorOr(i interval) string {
	if i.N == 0 {
		return "–"
	}
	return i.factor()
}

// sourceTable shows what the server saw of its client, and how much of the
// payload of the TCP rows was on the container's interface.
func (r *Result) sourceTable() *table {
	t := &table{head: []string{"The client's address, as the server sees it"}}
	var keys []string
	for _, proto := range []string{"tcp", "udp"} {
		for _, ip := range []int{4, 6} {
			keys = append(keys, sourceKey(proto, ip, remote))
		}
	}
	t.head = append(t.head, keys...)
	t.head = append(t.head, sourceKey("tcp", 4, loopback), "TCP bytes on the container's interface, % of the payload")
	for _, tool := range r.Tools {
		if tool.Source == nil || tool.Name == toolNative {
			continue
		}
		cells := []string{tool.Name}
		for _, key := range append(slices.Clone(keys), sourceKey("tcp", 4, loopback)) {
			cells = append(cells, cmp.Or(tool.Source[key], "–"))
		}
		t.add(append(cells, r.tapShare(tool.Name))...)
	}
	return t
}

// tapShare returns the range of the share over all samples of a tool.
func (r *Result) tapShare(tool string) string {
	lo, hi := math.Inf(1), math.Inf(-1)
	for _, s := range r.Samples {
		if v, ok := s.Values[unitTapShare]; ok && s.Tool == tool {
			lo, hi = min(lo, v), max(hi, v)
		}
	}
	if lo > hi {
		return "–"
	}
	return fmt.Sprintf("%.1f to %.1f", lo, hi)
}

// toolTable shows every tool: version, MTU, command, or why it is missing.
func (r *Result) toolTable() *table {
	t := &table{head: []string{"Tool", "version", "MTU", "command"}}
	for _, tool := range r.Tools {
		mtu, argv := "–", ""
		if tool.MTU != 0 {
			mtu = strconv.Itoa(tool.MTU)
		}
		for _, a := range tool.Argv {
			argv = strings.Join(a, " ")
		}
		if argv != "" {
			argv = "`" + strings.ReplaceAll(argv, "|", "\\|") + "`"
		}
		t.add(tool.Name, cmp.Or(tool.Version, "not measured: "+tool.Missing), mtu, argv)
	}
	return t
}

// describe returns what was measured, and how, in one sentence.
func (r *Result) describe() string {
	m := &r.Machine
	rounds := plural(m.Rounds, "round")
	if fewest := r.fewestRounds(); fewest < m.Rounds {
		rounds = fmt.Sprintf("%d to %s", fewest, rounds)
	}
	return fmt.Sprintf("%s, Linux %s, %d cores (%s), gofwd %s, started by %s, host's congestion control %s, %s, %g s each (iperf3: %s); median and spread (%d %% interval).",
		m.Date.Format("2006-01-02"), m.Kernel, m.Cores, m.CPU, m.Gofwd, m.User, m.DefaultCC, rounds, m.Seconds, wholeSeconds(m.Seconds), int(100*confidence))
}

// writeText prints the whole result.
func (r *Result) writeText(w io.Writer) {
	fmt.Fprintln(w, r.describe())
	for _, g := range groups {
		if len(r.rowsOf(g)) > 0 {
			fmt.Fprintln(w)
			r.groupTable(g).text(w)
		}
	}
	fmt.Fprintln(w)
	r.sourceTable().text(w)
	standings := r.standings()
	for _, v := range verdicts {
		if some := withVerdict(standings, v.verdict); len(some) > 0 {
			fmt.Fprintf(w, "\n%s:\n", v.title)
			r.summaryTable(some).text(w)
		}
	}
	for _, t := range r.Tools {
		if t.Missing != "" {
			fmt.Fprintf(w, "\nNot measured: %s: %s", t.Name, t.Missing)
		}
	}
	fmt.Fprintln(w)
}

func withVerdict(standings []standing, v verdict) []standing {
	var out []standing
	for _, s := range standings {
		if s.vsPeer.compare() == v {
			out = append(out, s)
		}
	}
	return out
}

// blocks returns the Markdown of the result by the names that a README refers
// to: "machine", "summary", "charts", "source", "tools", each group, and "tables",
// which is all groups, the sources and the tools.
func (r *Result) blocks(charts []chartFile, dir string) map[string]string {
	blocks := map[string]string{
		"summary": r.summaryBlock(),
		"source":  r.sourceTable().markdown(),
		"tools":   r.toolTable().markdown(),
		"machine": r.describe() + "\n",
	}
	var b strings.Builder
	for _, g := range groups {
		if len(r.rowsOf(g)) > 0 {
			blocks[g] = r.groupTable(g).markdown()
			b.WriteString(folded(groupTitles[g], blocks[g]))
		}
	}
	b.WriteString(folded("What the server sees of its client", blocks["source"]))
	b.WriteString(folded("The tools", blocks["tools"]))
	blocks["tables"] = b.String()
	b.Reset()
	for _, c := range charts {
		fmt.Fprintf(&b, "![%s](%s/%s)\n", c.title, dir, c.name)
	}
	blocks["charts"] = b.String()
	return blocks
}

// page returns everything as one Markdown file, for the folder of the result.
func (r *Result) page(charts []chartFile) string {
	blocks := r.blocks(charts, ".")
	var b strings.Builder
	fmt.Fprintf(&b, "# gofwd beside its peers, %s\n\nMade by `go run ./bench`; its documentation has the method.\n", r.Machine.Date.Format("2 January 2006"))
	for _, name := range []string{"machine", "summary", "charts", "tables"} {
		b.WriteString("\n" + blocks[name])
	}
	return b.String()
}

// summaryBlock shows the losses, and folds the rest.
func (r *Result) summaryBlock() string {
	var b strings.Builder
	standings := r.standings()
	for i, v := range verdicts {
		some := withVerdict(standings, v.verdict)
		if len(some) == 0 {
			continue
		}
		md := r.summaryTable(some).markdown()
		if i == 0 {
			fmt.Fprintf(&b, "**%s: %d of %d rows** (a ratio above 1 says that gofwd is better)\n\n%s\n", v.title, len(some), len(standings), md)
			continue
		}
		b.WriteString(folded(fmt.Sprintf("%s: %d of %d rows", v.title, len(some), len(standings)), md))
	}
	return b.String()
}

// folded is Markdown that shows its text when its title is clicked on.
func folded(title, text string) string {
	return fmt.Sprintf("<details><summary><b>%s</b></summary>\n\n%s\n</details>\n\n", title, text)
}

// writeBench writes the samples as text that benchstat reads; try
// benchstat -col /tool.
func (r *Result) writeBench(w io.Writer) error {
	bw := benchfmt.NewWriter(w)
	units := map[string]bool{}
	for _, s := range r.Samples {
		res := &benchfmt.Result{
			Config: []benchfmt.Config{
				{Key: "kernel", Value: []byte(r.Machine.Kernel), File: true},
				{Key: "cpu", Value: []byte(r.Machine.CPU), File: true},
				{Key: "gofwd", Value: []byte(r.Machine.Gofwd), File: true},
			},
			Name:  benchfmt.Name(s.Row + "/tool=" + s.Tool),
			Iters: 1,
		}
		for unit, v := range s.Values {
			res.Values = append(res.Values, benchfmt.Value{Value: v, Unit: unit})
			units[unit] = true
		}
		if len(res.Values) == 0 {
			continue
		}
		slices.SortFunc(res.Values, func(a, b benchfmt.Value) int { return cmp.Compare(a.Unit, b.Unit) })
		if err := bw.Write(res); err != nil {
			return err
		}
	}
	for unit := range units {
		better := "higher"
		if lowerIsBetter(unit) {
			better = "lower"
		}
		meta := &benchfmt.UnitMetadata{UnitMetadataKey: benchfmt.UnitMetadataKey{Unit: unit, Key: "better"}, OrigUnit: unit, Value: better}
		if err := bw.Write(meta); err != nil {
			return err
		}
	}
	return nil
}
