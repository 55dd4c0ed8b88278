package main

import (
	"encoding/xml"
	"errors"
	"io"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/perf/benchfmt"
)

func TestNumber(t *testing.T) {
	for v, want := range map[float64]string{
		0: "0", 0.0123: "0.012", 0.25: "0.25", 1.234: "1.23", 31.24: "31.2", 312.4: "312", 3124: "3124",
		31240: "31.2k", 3124000: "3.12M",
	} {
		require.Equal(t, want, number(v))
	}
	require.Equal(t, "10.0 ±20%", interval{Mid: 10, Lo: 8, Hi: 11, N: 5}.String())
	require.Equal(t, "1.82× (1.75–1.90)", interval{Mid: 1.82, Lo: 1.75, Hi: 1.9, N: 5}.factor())
}

func five(v float64) []float64 { return []float64{v, v * 1.01, v * 0.99, v * 1.02, v * 0.98} }

// manyRows has a row in which gofwd loses, one that is undecided, and two in
// which it wins.
func manyRows() *Result {
	r := testResult("wins", unitGbps, map[string][]float64{toolNative: five(40), toolKernel: five(30), toolPasta: five(15), toolKit: five(20)})
	for _, more := range []struct {
		name   string
		values map[string][]float64
	}{
		{"loses", map[string][]float64{toolNative: five(40), toolKernel: five(10), toolPasta: five(20)}},
		{"draws", map[string][]float64{toolNative: five(40), toolKernel: five(20), toolPasta: {10, 40, 20, 21, 19}}},
		{"wins-more", map[string][]float64{toolNative: five(40), toolKernel: five(30), toolPasta: five(1)}},
		{"loses-more", map[string][]float64{toolNative: five(40), toolTap: five(1), toolPasta: five(20)}},
	} {
		other := testResult(more.name, unitGbps, more.values)
		other.Rows[0].Title = more.name
		r.Rows = append(r.Rows, other.Rows...)
		r.Samples = append(r.Samples, other.Samples...)
		for _, tool := range other.Tools {
			r.addTool(tool)
		}
	}
	return r
}

func TestLossesComeFirst(t *testing.T) {
	var names []string
	standings := manyRows().standings()
	for _, s := range standings {
		names = append(names, s.row.Name)
	}
	require.Equal(t, []string{"loses-more", "loses", "draws", "wins", "wins-more"}, names)
	require.Equal(t, toolTap, standings[0].subject, "the tap stands for gofwd where there is no kernel path")
	require.Equal(t, toolKit, standings[3].peer, "the best peer, not the first")
	require.InDelta(t, 1.5, standings[3].vsPeer.Mid, 0.01)
	require.InDelta(t, 2, standings[3].vsPasta.Mid, 0.01)
	require.InDelta(t, 0.75, standings[3].vsNative.Mid, 0.01)

	block := manyRows().summaryBlock()
	require.Less(t, strings.Index(block, "| loses |"), strings.Index(block, "<details>"), "losses are not folded")
	require.Less(t, strings.Index(block, "<details>"), strings.Index(block, "| wins-more |"))
	require.Contains(t, block, "Behind the best peer: 2 of 5 rows")
}

func TestHiddenSourceIsMarked(t *testing.T) {
	r := testResult("row", unitGbps, map[string][]float64{toolKernel: five(30), toolKit: five(40)})
	r.tool(toolKit).Source[r.Rows[0].Source] = "127.0.0.1"
	cells := r.groupTable(groupTCP).cells[0]
	require.NotContains(t, cells[2], hiddenSource)
	require.Contains(t, cells[3], hiddenSource)
	require.Contains(t, r.summaryBlock(), toolKit+hiddenSource)
	require.Contains(t, r.sourceTable().markdown(), "127.0.0.1")
}

func TestFailuresAreShown(t *testing.T) {
	r := testResult("row", unitGbps, map[string][]float64{toolKernel: five(30)})
	for round := range 2 {
		r.Samples = append(r.Samples, Sample{Row: "row", Tool: toolPasta, Round: round, Err: "it fell over"})
	}
	require.Contains(t, r.groupTable(groupTCP).notes, "Failed: pasta, a title: it fell over (and 1 sample more)")
}

func TestTapShare(t *testing.T) {
	r := testResult("row", unitTapShare, map[string][]float64{toolKernel: {0, 0.04}, toolTap: {103, 104.26}})
	require.Equal(t, "0.0 to 0.0", r.tapShare(toolKernel))
	require.Equal(t, "103.0 to 104.3", r.tapShare(toolTap))
	require.Equal(t, "–", r.tapShare(toolPasta))
}

func TestTableMarkdown(t *testing.T) {
	table := &table{head: []string{"x", "a"}, notes: []string{"a note"}}
	table.add("row", "1")
	require.Equal(t, "| x | a |\n| --- | ---: |\n| row | 1 |\n\na note\n", table.markdown())
}

func TestBenchTextIsReadByBenchfmt(t *testing.T) {
	var b strings.Builder
	require.NoError(t, manyRows().writeBench(&b))
	read := benchfmt.NewReader(strings.NewReader(b.String()), "test")
	results := 0
	for read.Scan() {
		switch rec := read.Result().(type) {
		case *benchfmt.Result:
			results++
			_, parts := rec.Name.Parts()
			require.Contains(t, string(parts[len(parts)-1]), "/tool=")
			require.Equal(t, unitGbps, rec.Values[0].Unit)
		case *benchfmt.SyntaxError:
			t.Fatal(rec)
		}
	}
	require.NoError(t, read.Err())
	require.Len(t, manyRows().Samples, results)
	require.Contains(t, b.String(), "Unit Gb/s better=higher")
}

func TestChartIsSVG(t *testing.T) {
	r := testResult(charts[0].row, charts[0].unit, map[string][]float64{toolNative: five(40), toolKernel: five(30), toolPasta: {1, 5, 3, 2, 4}})
	files, err := r.drawCharts()
	require.NoError(t, err)
	require.Len(t, files, 1)
	require.Equal(t, "tcp-in.svg", files[0].name)
	dec := xml.NewDecoder(strings.NewReader(string(files[0].svg)))
	text := ""
	for {
		tok, err := dec.Token()
		if errors.Is(err, io.EOF) {
			break
		}
		require.NoError(t, err)
		if data, ok := tok.(xml.CharData); ok {
			text += string(data) + "\n"
		}
	}
	for _, want := range []string{toolKernel, toolPasta, "30.0", charts[0].title, "more is better"} {
		require.Contains(t, text, want)
	}
	require.Contains(t, r.blocks(files, "bench/results/x")["charts"], "(bench/results/x/tcp-in.svg)")
}

func TestFill(t *testing.T) {
	const readme = "# x\n<!-- bench:begin a -->\nold\n<!-- bench:end -->\nkept\n<!-- bench:begin b-1 -->\n<!-- bench:end -->\nend\n"
	blocks := map[string]string{"a": "new $1\n", "b-1": "| t |\n", "c": ""}
	got, err := fill(readme, blocks)
	require.NoError(t, err)
	require.Equal(t, "# x\n<!-- bench:begin a -->\nnew $1\n<!-- bench:end -->\nkept\n<!-- bench:begin b-1 -->\n| t |\n<!-- bench:end -->\nend\n", got)
	again, err := fill(got, blocks)
	require.NoError(t, err)
	require.Equal(t, got, again, "filling twice changes nothing")

	for text, want := range map[string]string{
		"nothing here": "no marker",
		"<!-- bench:begin z -->\n<!-- bench:end -->":         `no block "z"; there are a, b-1, c`,
		"<!-- bench:begin a -->\n":                           "do not pair",
		"<!-- bench:end -->\n<!-- bench:begin a -->":         "do not pair",
		"<!-- bench:begin a -->\n<!-- bench:begin b-1 -->\n": "do not pair",
	} {
		_, err := fill(text, blocks)
		require.ErrorContains(t, err, want)
	}
}
