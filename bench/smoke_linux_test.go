package main

import (
	"os"
	"slices"
	"strings"
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

// smoke measures once, as briefly as can be, and returns the result if every
// sample could be taken. The values mean nothing.
func smoke(t *testing.T, args ...string) *Result {
	o, err := parseOptions(append([]string{"-rounds", "1", "-seconds", "0.05"}, args...))
	require.NoError(t, err)
	result, err := measure(o)
	require.NoError(t, err)
	for _, tool := range result.Tools {
		require.Empty(t, tool.Missing, tool.Name)
	}
	for _, s := range result.Samples {
		require.Empty(t, s.Err, "%s, %s", s.Row, s.Tool)
		require.NotEmpty(t, s.Values, "%s, %s", s.Row, s.Tool)
	}
	return result
}

// Every load runs, so that none rots; those that need a tool are in the test
// below.
func TestEveryRowRuns(t *testing.T) {
	result := smoke(t, "-tools", toolNative)
	for _, r := range plan() {
		if slices.Contains(r.tools, toolNative) {
			require.NotEmpty(t, result.rounds(r.Name, toolNative, r.Units[0]), r.Name)
		}
	}
}

func TestToolsAreMeasured(t *testing.T) {
	const (
		tcpRow    = "TapTCP/way=remote/load=upload/ip=4/streams=1/cc=reno"
		kernelRow = "TCP/way=remote/load=upload/ip=4/streams=1/cc=reno"
	)
	result := smoke(t, "-tools", strings.Join([]string{toolKernel, toolTap, toolFdbased}, ","),
		"-only", strings.Join([]string{"Start", "Ports/count=2000", "Idle/conns=1000", "UDP/size=64", tcpRow, kernelRow}, ","))
	for _, tool := range []string{toolKernel, toolTap} {
		for _, ip := range []int{4, 6} {
			for _, proto := range []string{"tcp", "udp"} {
				require.Equal(t, kept, result.tool(tool).Source[sourceKey(proto, ip, remote)], "%s %s%d", tool, proto, ip)
			}
		}
	}
	share, ok := result.summary(kernelRow, toolKernel, unitTapShare)
	require.True(t, ok)
	require.Less(t, share.Mid, 1.0, "the payload is not on the tap of %s", toolKernel)
	require.Equal(t, kept, result.tool(toolFdbased).Source[sourceKey("tcp", 4, remote)])
	for _, tool := range []string{toolTap, toolFdbased} {
		require.Equal(t, 1500, result.tool(tool).MTU)
		require.NotEmpty(t, result.tool(tool).Argv)
		require.NotContains(t, result.tool(tool).Argv[0][0], "/")
		share, ok := result.summary(tcpRow, tool, unitTapShare)
		require.True(t, ok)
		require.Greater(t, share.Mid, 99.0, "the payload is on the tap of %s", tool)
	}
	held, ok := result.summary("Idle/conns=1000", toolTap, unitHeld)
	require.True(t, ok)
	require.Equal(t, 1000.0, held.Mid)
	for _, unit := range []string{unitStart, unitRSS, unitAdd} {
		value, ok := result.summary("Start", toolTap, unit)
		require.True(t, ok, unit)
		require.Positive(t, value.Mid, unit)
	}
}
