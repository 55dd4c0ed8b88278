package forward

import (
	"testing"

	"github.com/stretchr/testify/require"
)

// The machine of the tests has all, twice in one namespace: nothing is left.
func TestProbe(t *testing.T) {
	ns := newNS(t)
	for range 2 {
		abilities := Probe(t.Context(), ns)
		require.Len(t, abilities, 10)
		for _, a := range abilities {
			require.True(t, a.OK, "%s: %s", a.Name, a.Reason)
		}
	}
}
