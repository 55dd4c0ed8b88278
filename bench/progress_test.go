package main

import (
	"bytes"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

// Where there is no terminal, a line tells of a row that is done, if the last one was
// told ten seconds ago.
func TestProgressLines(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o, err := parseOptions([]string{"-only", "TCPCRR", "-tools", "native,gofwd-kernel", "-rounds", "2", "-seconds", "2"})
		require.NoError(t, err)
		rows := o.rows()
		tools, err := selectTools(o.toolNames())
		require.NoError(t, err)
		var out bytes.Buffer
		p := newProgress(&out, false, o)
		p.begin(newWorkload(rows, tools, o.rounds, o.seconds))
		for round := range o.rounds {
			for _, r := range rows {
				for _, tool := range tools {
					time.Sleep(3 * time.Second) // a machine that is slower than expected
					p.add(&Sample{Row: r.Name, Tool: tool.name(), Round: round})
				}
			}
		}
		p.end()
		require.Equal(t, `bench: 5 rows, 2 tools, 2 rounds, 20 samples: about 42 s
bench: round 1 of 2, 2 of 10 rows done in 15 s, about 45 s left
bench: round 1 of 2, 4 of 10 rows done in 27 s, about 33 s left
bench: round 2 of 2, 6 of 10 rows done in 39 s, about 21 s left
bench: round 2 of 2, 8 of 10 rows done in 51 s, about 9 s left
bench: measured for 60 s
`, out.String())
	})
}

func TestProgressBar(t *testing.T) {
	o, err := parseOptions([]string{"-only", "Start", "-rounds", "1"})
	require.NoError(t, err)
	var out bytes.Buffer
	p := newProgress(&out, true, o)
	p.begin(newWorkload(o.rows(), allTools(), o.rounds, o.seconds))
	p.add(&Sample{Row: "Start", Tool: toolTap})
	require.Contains(t, out.String(), "s left  round 1  Start  gofwd-tap")
	p.end()
	require.Equal(t, 1, strings.Count(out.String(), "\n"), "the first line alone: %q", out.String())
}

func TestRoughly(t *testing.T) {
	for d, want := range map[time.Duration]string{
		400 * time.Millisecond:                "0 s",
		99*time.Second + 400*time.Millisecond: "99 s",
		10*time.Minute + 40*time.Second:       "11 min",
		2*time.Hour + 5*time.Minute:           "2 h 5 min",
		119*time.Minute + 59*time.Second:      "2 h 0 min",
	} {
		require.Equal(t, want, roughly(d))
	}
}
