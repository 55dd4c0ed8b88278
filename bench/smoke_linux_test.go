package main

import (
	"os"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"
)

// TestMain plays the parts that the program plays for itself.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && slices.Contains([]string{"lab", "serve", "load"}, os.Args[1]) {
		main()
		return
	}
	os.Exit(m.Run())
}

// Every row runs once, so that none rots. The values mean nothing.
func TestEveryRowRuns(t *testing.T) {
	o, err := parseOptions([]string{"-rounds", "1", "-seconds", "0.05", "-tools", "native,gofwd-tap,fdbased"})
	require.NoError(t, err)
	result, err := measure(o)
	require.NoError(t, err)
	for _, tool := range result.Tools {
		require.Empty(t, tool.Missing, tool.Name)
	}
	byName := map[string]bool{}
	for _, s := range result.Samples {
		require.Empty(t, s.Err, "%s, %s", s.Row, s.Tool)
		require.NotEmpty(t, s.Values, "%s, %s", s.Row, s.Tool)
		byName[s.Row] = true
	}
	for _, r := range o.rows() {
		if slices.Contains(r.tools, toolNative) {
			require.True(t, byName[r.Name], "row %s has no sample", r.Name)
		}
	}
	require.Equal(t, kept, result.tool(toolFdbased).Source[sourceKey("tcp", 4, remote)])
	for _, ip := range []int{4, 6} {
		require.Equal(t, kept, result.tool(toolTap).Source[sourceKey("tcp", ip, remote)])
		require.Equal(t, kept, result.tool(toolTap).Source[sourceKey("udp", ip, remote)])
	}
	require.Equal(t, 1500, result.tool(toolFdbased).MTU)
}
