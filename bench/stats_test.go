package main

import (
	"math"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestSummarize(t *testing.T) {
	for _, tc := range []struct {
		name   string
		values []float64
		want   interval
	}{
		{"one", []float64{3}, interval{Mid: 3, Lo: 3, Hi: 3, N: 1}},
		{"fewer than five: the whole range", []float64{5, 1, 3}, interval{Mid: 3, Lo: 1, Hi: 5, N: 3}},
		{"five: the whole range", []float64{5, 1, 3, 2, 4}, interval{Mid: 3, Lo: 1, Hi: 5, N: 5}},
		{"an even number", []float64{1, 2, 3, 4}, interval{Mid: 2.5, Lo: 1, Hi: 4, N: 4}},
		// The median is outside of x2 to x8 in (11 + 56) of 1024 cases.
		{"ten: without the extremes", []float64{1, 2, 3, 4, 5, 6, 7, 8, 9, 10}, interval{Mid: 5.5, Lo: 2, Hi: 8, N: 10}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			require.Equal(t, tc.want, summarize(tc.values))
		})
	}
	require.True(t, math.IsNaN(summarize(nil).Mid))
	values := []float64{3, 1, 2}
	summarize(values)
	require.Equal(t, []float64{3, 1, 2}, values, "the samples keep their order")
}

func TestCompareInterval(t *testing.T) {
	require.Equal(t, ahead, interval{Mid: 1.2, Lo: 1.1, Hi: 1.3, N: 5}.compare())
	require.Equal(t, behind, interval{Mid: 0.8, Lo: 0.7, Hi: 0.9, N: 5}.compare())
	require.Equal(t, same, interval{Mid: 1.2, Lo: 0.9, Hi: 1.3, N: 5}.compare())
	require.Equal(t, unknown, interval{Mid: 2, Lo: 2, Hi: 2, N: 2}.compare())
}

func TestRatioPairsRounds(t *testing.T) {
	// The machine became three times slower from round to round: the
	// medians overlap, the pairs do not.
	r := testResult("row", unitGbps, map[string][]float64{"a": {90, 30, 10}, "b": {45, 15, 5}})
	ratio, ok := r.ratio("row", "a", "b", unitGbps)
	require.True(t, ok)
	require.Equal(t, interval{Mid: 2, Lo: 2, Hi: 2, N: 3}, ratio)
	require.Equal(t, ahead, ratio.compare())

	// A round that one of them lacks is no pair.
	r.Samples[0].Values = nil
	ratio, ok = r.ratio("row", "a", "b", unitGbps)
	require.True(t, ok)
	require.Equal(t, 2, ratio.N)

	_, ok = r.ratio("row", "a", "c", unitGbps)
	require.False(t, ok)
}

func TestRatioTurnsWhereLessIsBetter(t *testing.T) {
	r := testResult("row", unitP50, map[string][]float64{"a": {10, 10, 10}, "b": {20, 20, 20}})
	ratio, ok := r.ratio("row", "a", "b", unitP50)
	require.True(t, ok)
	require.Equal(t, 2.0, ratio.Mid, "half the latency is twice as good")
}

// testResult is a result with one row, and a sample of each tool a round.
func testResult(row, unit string, values map[string][]float64) *Result {
	r := &Result{
		Machine: Machine{Cores: 2, CPU: "test", Kernel: "6.1", Rounds: 5, Seconds: 1},
		Rows:    []Row{{Name: row, Group: groupTCP, Title: "a title", Units: []string{unit}, Source: sourceKey("tcp", 4, remote)}},
	}
	for _, t := range append([]string{"a", "b"}, toolNames()...) {
		if values[t] == nil {
			continue
		}
		r.Tools = append(r.Tools, ToolInfo{Name: t, Version: "1", Source: map[string]string{sourceKey("tcp", 4, remote): kept}})
		for round, v := range values[t] {
			r.Samples = append(r.Samples, Sample{Row: row, Tool: t, Round: round, Values: map[string]float64{unit: v}})
		}
	}
	return r
}

func toolNames() []string {
	var names []string
	for _, t := range allTools() {
		names = append(names, t.name())
	}
	return names
}

// Rows that were measured before are added to those of now, which win.
func TestAdd(t *testing.T) {
	rows := plan()
	first, second := rows[0].Name, rows[1].Name
	now := testResult(second, unitGbps, map[string][]float64{toolKernel: {1, 2, 3}})
	before := testResult(first, unitGbps, map[string][]float64{toolKernel: {4, 5}, toolPasta: {6, 7}})
	old := testResult(second, unitGbps, map[string][]float64{toolKernel: {8}})
	before.Rows, before.Samples = append(before.Rows, old.Rows...), append(before.Samples, old.Samples...)
	require.NoError(t, now.add(before))
	require.Equal(t, []string{first, second}, []string{now.Rows[0].Name, now.Rows[1].Name})
	require.Equal(t, map[int]float64{0: 4, 1: 5}, now.rounds(first, toolKernel, unitGbps))
	require.Len(t, now.rounds(second, toolKernel, unitGbps), 3)
	require.NotNil(t, now.tool(toolPasta))
	require.Equal(t, 2, now.fewestRounds())
	require.Contains(t, now.describe(), "2 to 5 rounds")
	before.Machine.Gofwd = "another"
	require.ErrorContains(t, now.add(before), "another")
}
