package forward

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// A busy loop yields every few milliseconds, whether its turns are short or long, and
// one that mostly sleeps never does.
func TestTimeSlice(t *testing.T) {
	for _, tt := range []struct {
		name string
		turn time.Duration
		want int // yields in a second
	}{
		{"short turns", 10 * time.Microsecond, 199},
		{"long turns", 600 * time.Microsecond, 185},
		{"sleeps between turns", 2 * time.Millisecond, 0},
		{"sleeps long", 20 * time.Millisecond, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var s timeSlice
			begin := time.Now()
			got := 0
			for now := begin; now.Before(begin.Add(time.Second)); now = now.Add(tt.turn) {
				if s.turn(now) {
					got++
				}
			}
			require.InDelta(t, tt.want, got, 2)
		})
	}
}
