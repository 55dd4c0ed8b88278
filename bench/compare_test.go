package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestJudge(t *testing.T) {
	was := interval{Mid: 10, Lo: 9, Hi: 11, N: 5}
	require.Equal(t, same, judge(was, interval{Mid: 8.5, Lo: 8, Hi: 9, N: 5}, false), "the spreads touch")
	require.Equal(t, behind, judge(was, interval{Mid: 8, Lo: 7, Hi: 8.9, N: 5}, false))
	require.Equal(t, ahead, judge(was, interval{Mid: 8, Lo: 7, Hi: 8.9, N: 5}, true))
	require.Equal(t, ahead, judge(was, interval{Mid: 13, Lo: 12, Hi: 14, N: 5}, false))
	require.Equal(t, behind, judge(was, interval{Mid: 13, Lo: 12, Hi: 14, N: 5}, true))
	require.Equal(t, unknown, judge(was, interval{Mid: 1, Lo: 1, Hi: 1, N: 2}, false))
}

func TestCompareResults(t *testing.T) {
	was := testResult("row", unitGbps, map[string][]float64{toolKernel: five(30), toolPasta: five(20)})
	for _, tc := range []struct {
		name        string
		values      map[string][]float64
		regressions int
	}{
		{"the same", map[string][]float64{toolKernel: five(30), toolPasta: five(20)}, 0},
		{"slower", map[string][]float64{toolKernel: five(25), toolPasta: five(20)}, 1},
		{"slower within the spread", map[string][]float64{toolKernel: {20, 30, 25, 26, 24}, toolPasta: five(20)}, 0},
		{"faster", map[string][]float64{toolKernel: five(40), toolPasta: five(20)}, 0},
		{"a peer is slower", map[string][]float64{toolKernel: five(30), toolPasta: five(2)}, 0},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, n, err := compareResults(was, testResult("row", unitGbps, tc.values))
			require.NoError(t, err)
			require.Equal(t, tc.regressions, n)
		})
	}
	other := testResult("row", unitGbps, map[string][]float64{toolKernel: five(30)})
	other.Machine.Cores = 64
	_, _, err := compareResults(was, other)
	require.ErrorContains(t, err, "different machines")
	_, _, err = compareResults(was, testResult("another row", unitGbps, map[string][]float64{toolKernel: five(30)}))
	require.ErrorContains(t, err, "no row of gofwd in common")
}

// The command line: files as they are saved, and an error for the exit status.
func TestRunCompare(t *testing.T) {
	dir := t.TempDir()
	save := func(name string, gbps float64) string {
		r := testResult("row", unitGbps, map[string][]float64{toolKernel: five(gbps)})
		sub := filepath.Join(dir, name)
		require.NoError(t, (&options{out: sub}).save(r))
		return filepath.Join(sub, "result.json")
	}
	fast, slow := save("fast", 30), save("slow", 20)
	var out strings.Builder
	require.NoError(t, run([]string{"-compare", fast, fast}, &out))
	require.Contains(t, out.String(), "1 value in common, 0 regressions")
	out.Reset()
	require.EqualError(t, run([]string{"-compare", fast, slow}, &out), "1 regression")
	require.Contains(t, out.String(), "REGRESSION")
	require.Contains(t, out.String(), "-33 %")
	require.NoError(t, run([]string{"-compare", slow, fast}, &out))
}

// Everything that a run leaves behind, the README included.
func TestSave(t *testing.T) {
	dir := t.TempDir()
	readme := filepath.Join(dir, "README.md")
	require.NoError(t, os.WriteFile(readme, []byte("<!-- bench:begin summary -->\n<!-- bench:end -->\n<!-- bench:begin charts -->\n<!-- bench:end -->\n"), 0o644))
	r := testResult(charts[0].row, unitGbps, map[string][]float64{toolKernel: five(10), toolPasta: five(20)})
	o := &options{out: filepath.Join(dir, "results", "x"), readme: readme}
	require.NoError(t, o.save(r))
	for _, name := range []string{"result.json", "bench.txt", "tcp-in.svg", "README.md"} {
		require.FileExists(t, filepath.Join(o.out, name))
	}
	text, err := os.ReadFile(readme)
	require.NoError(t, err)
	require.Contains(t, string(text), "Behind the best peer: 1 of 1 row")
	require.Contains(t, string(text), "(results/x/tcp-in.svg)", "relative to the README")

	back, err := loadResult(filepath.Join(o.out, "result.json"))
	require.NoError(t, err)
	require.Equal(t, r.Samples, back.Samples)
	require.Equal(t, r.Rows, back.Rows)
}
