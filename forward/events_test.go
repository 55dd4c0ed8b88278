package forward

import (
	"testing"

	"github.com/stretchr/testify/require"
)

// What says that events were lost comes where they are missing.
func TestEventsLostInTheirPlace(t *testing.T) {
	var hub eventHub
	sub := hub.subscribe()
	n := 0
	publish := func(events int) {
		for range events {
			n++
			hub.publish(Event{Type: FlowOpened, Flow: &Flow{Forward: n}})
		}
	}
	expect := func(first, last int) {
		t.Helper()
		for i := first; i <= last; i++ {
			require.Zero(t, sub.Lost())
			require.Equal(t, i, (<-sub.C()).Flow.Forward)
		}
	}
	publish(eventQueue + 3)
	expect(1, 10)
	publish(1)
	expect(11, eventQueue)
	require.Equal(t, Event{Type: EventsLost, Lost: 3}, <-sub.C())
	expect(n, n)
	require.Zero(t, sub.Lost())

	publish(eventQueue + 5) // and then nothing more
	expect(n-eventQueue-4, n-5)
	require.EqualValues(t, 5, sub.Lost())
	publish(1)
	expect(n, n)
	require.Empty(t, sub.C())

	publish(eventQueue + 1)
	expect(n-eventQueue, n-eventQueue)
	publish(1) // there is room for one: the notice
	expect(n-eventQueue, n-2)
	require.Equal(t, Event{Type: EventsLost, Lost: 1}, <-sub.C())
	require.EqualValues(t, 1, sub.Lost())
}
