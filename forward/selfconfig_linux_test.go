package forward

import (
	"bytes"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/gofwd/gofwd/netnsutil"
)

// Addresses that can't be read are not gone: they stay, and are read again of our
// own accord, with one line in the log.
func TestGuestAddrsUnreadable(t *testing.T) {
	var mu sync.Mutex
	have, readErr, reads := addrs("192.0.2.2"), error(nil), 0
	set := func(list []netip.Addr, err error) {
		mu.Lock()
		defer mu.Unlock()
		have, readErr = list, err
	}
	count := func() int {
		mu.Lock()
		defer mu.Unlock()
		return reads
	}
	var logged bytes.Buffer
	g := &guestAddrs{log: slog.New(slog.NewTextHandler(&logged, nil)), read: func() ([]netip.Addr, error) {
		mu.Lock()
		defer mu.Unlock()
		reads++
		return have, readErr
	}}
	require.NoError(t, g.refresh())
	watch, err := netnsutil.WatchHost(0)
	require.NoError(t, err)
	g.watch = watch
	g.wg.Add(1)
	go g.follow()
	defer g.close()

	set(nil, unix.EMFILE)
	ip(t, "addr add 192.0.2.98/32 dev lo")
	ip(t, "addr del 192.0.2.98/32 dev lo")
	require.Eventually(t, func() bool { return count() > 1 }, 5*time.Second, 10*time.Millisecond)
	time.Sleep(100 * time.Millisecond) // what the kernel has told of is looked at
	told := count()
	require.Eventually(t, func() bool { return count() > told }, 5*time.Second, 10*time.Millisecond, "no second try")
	require.Equal(t, addrs("192.0.2.2"), g.list())
	set(addrs("192.0.2.3"), nil)
	require.Eventually(t, func() bool { return slices.Equal(g.list(), addrs("192.0.2.3")) }, 5*time.Second, 10*time.Millisecond)
	g.close()
	require.Equal(t, 1, strings.Count(logged.String(), "stay as they were"), logged.String())
}

// Without the interface there are no addresses, and that is no error.
func TestGuestAddrsWithoutInterface(t *testing.T) {
	f := &Forwarder{cfg: Config{NetNS: newNS(t)}, plan: &networkPlan{link: netnsutil.Link{Name: "eth0"}}}
	list, err := f.readGuestAddrs()
	require.NoError(t, err)
	require.Empty(t, list)
}
