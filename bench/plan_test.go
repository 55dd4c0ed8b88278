package main

import (
	"slices"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestPlanIsConsistent(t *testing.T) {
	names := map[string]*row{}
	rows := plan()
	beds := map[string]bed{}
	for i := range rows {
		r := &rows[i]
		require.Nil(t, names[r.Name], "two rows are called %s", r.Name)
		names[r.Name] = r
		require.Contains(t, groups, r.Group, r.Name)
		require.NotEmpty(t, r.Title, r.Name)
		require.NotEmpty(t, r.Units, r.Name)
		require.NotEmpty(t, r.Command, r.Name)
		require.Positive(t, r.measure.about(1), r.Name)
		for _, tool := range r.tools {
			require.Contains(t, toolNames(), tool, r.Name)
		}
		if have, ok := beds[r.bed.name]; ok {
			require.Equal(t, have, r.bed, "beds are told apart by their names")
		}
		beds[r.bed.name] = r.bed
	}
	for _, g := range groups {
		require.NotEmpty(t, groupTitles[g])
		require.True(t, slices.ContainsFunc(rows, func(r row) bool { return r.Group == g }), "group %s has rows", g)
	}
	for _, c := range charts {
		require.NotNil(t, names[c.row], "chart %s shows row %s", c.name, c.row)
		require.Contains(t, names[c.row].Units, c.unit, c.name)
	}
}

func TestTitles(t *testing.T) {
	require.Equal(t, "container → remote client, a download", wayTitle(remote, "download"))
	require.Equal(t, "container → outside", wayTitle(outside, "upload"))
}

func TestOptions(t *testing.T) {
	o, err := parseOptions([]string{"-only", "udp,Start", "-tools", "native,pasta"})
	require.NoError(t, err)
	for _, r := range o.rows() {
		require.True(t, r.Group == groupUDP || r.Name == "Start", r.Name)
	}
	quick, err := parseOptions([]string{"-quick"})
	require.NoError(t, err)
	require.Equal(t, []string{toolNative, toolKernel, toolTap, toolPasta}, quick.toolNames())
	tools, err := selectTools(quick.toolNames())
	require.NoError(t, err)
	require.Less(t, newWorkload(quick.rows(), tools, quick.rounds, quick.seconds).Seconds, 120.0, "two minutes")

	for want, args := range map[string][]string{
		"no row matches":      {"-only", "nonsense"},
		"no such tool: kite":  {"-tools", "native,kite"},
		"takes two files":     {"-compare", "one.json"},
		"unexpected argument": {"tcp"},
		"must be positive":    {"-rounds", "0"},
		"needs -out":          {"-readme", "README.md"},
	} {
		_, err := parseOptions(args)
		require.ErrorContains(t, err, want)
	}
}
