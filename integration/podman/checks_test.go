//go:build podman

package podman

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// check is a row of the second table: something that users do.
type check struct {
	name string
	// run does it, in a lab without containers. What it returns is for the
	// table, "yes" if it is empty.
	run func(t *testing.T, l *lab) (string, error)
	// oursOnly is for what Podman's own helpers don't have.
	oursOnly bool
}

var checks = slices.Concat(publishChecks, outboundChecks, lifeChecks)

// TestChecks does all of them with gofwd, where none may fail, and with Podman's own
// helpers, of which the table tells. With -short there is only gofwd, and no table.
func TestChecks(t *testing.T) {
	ours, own := make([][]string, len(checks)), make([][]string, len(checks))
	var versions []string
	for _, suite := range suites() {
		t.Run(suite, func(t *testing.T) {
			l, theirs := openLab(t, suite, true), openLab(t, suite, false)
			l.network(t, "lab4")
			l.network(t, "lab46", "--ipv6")
			startInternet(t, l)
			versions = append(versions, l.minor())
			for i, c := range checks {
				ours[i] = append(ours[i], l.check(t, c))
				if !testing.Short() {
					own[i] = append(own[i], theirs.check(t, c))
				}
			}
		})
	}
	if !t.Failed() && !testing.Short() {
		publishTable(t, "podman-checks", checkTable(ours, own, versions))
	}
}

// check does a check and removes what it made.
func (l *lab) check(t *testing.T, c check) (result string) {
	t.Helper()
	if c.oursOnly && !l.ours {
		return "–"
	}
	t.Run(c.name+"/"+l.helper(), func(t *testing.T) {
		l.clean(t)
		defer l.clean(t)
		var err error
		result, err = c.run(t, l)
		switch {
		case err != nil && l.ours:
			require.NoError(t, err)
		case err != nil:
			t.Log(err)
			result = "no: " + reason(err)
		case result == "":
			result = "yes"
		}
	})
	return result
}

// A failure is an error with words for the table.
type failure struct {
	reason string
	error
}

func (f failure) Unwrap() error { return f.error }

// because gives an error its words for the table. Without an error there is none.
func because(reason string, err error) error {
	if err == nil {
		return nil
	}
	return failure{reason, fmt.Errorf("%s: %w", reason, err)}
}

func reason(err error) string {
	if f := (failure{}); errors.As(err, &f) {
		return f.reason
	}
	return "it fails"
}

func checkTable(ours, own [][]string, versions []string) string {
	var out strings.Builder
	fmt.Fprintf(&out, "Checked with Podman %s, alike where nothing else is said:\n\n", strings.Join(versions, ", "))
	out.WriteString("| | gofwd | Podman's own |\n|---|---|---|\n")
	for i, c := range checks {
		fmt.Fprintf(&out, "| %s | %s | %s |\n", c.name, byVersion(ours[i], versions), byVersion(own[i], versions))
	}
	return out.String()
}

// byVersion says a result once for all versions that have it.
func byVersion(results, versions []string) string {
	var parts []string
	for i, r := range results {
		if slices.Contains(results[:i], r) {
			continue
		}
		var of []string
		for j := range results {
			if results[j] == r {
				of = append(of, versions[j])
			}
		}
		if len(of) == len(versions) {
			return r
		}
		parts = append(parts, strings.Join(of, ", ")+": "+r)
	}
	return strings.Join(parts, "; ")
}
