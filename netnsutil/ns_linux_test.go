package netnsutil_test

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/gofwd/gofwd/netnsutil"
	"github.com/gofwd/gofwd/netnsutil/nstest"
)

func threadNS(t *testing.T) string {
	t.Helper()
	s, err := os.Readlink("/proc/thread-self/ns/net")
	require.NoError(t, err)
	return s
}

func TestDo(t *testing.T) {
	ns := nstest.New(t)
	home := threadNS(t)
	sentinel := errors.New("fn's own")
	require.Equal(t, sentinel, ns.Do(func() error {
		require.NotEqual(t, home, threadNS(t))
		// Within one namespace, another and back.
		return nstest.Host(t).Do(func() error {
			require.Equal(t, home, threadNS(t))
			return sentinel
		})
	}))
	require.Equal(t, home, threadNS(t))
}

// A test that fails inside of Do ends, and does not hang.
func TestDoGoexit(t *testing.T) {
	ns := nstest.New(t)
	ended := make(chan bool, 1)
	go func() {
		defer func() { ended <- true }()
		_ = ns.Do(func() error { runtime.Goexit(); return nil })
		ended <- false
	}()
	require.True(t, <-ended)
}

// The main thread of the process, which /proc/PID/ns shows, stays at home.
func TestDoSparesMainThread(t *testing.T) {
	ns := nstest.New(t)
	home, err := os.Readlink("/proc/self/ns/net")
	require.NoError(t, err)
	for range 200 {
		require.NoError(t, ns.Do(func() error {
			got, err := os.Readlink("/proc/self/ns/net")
			require.Equal(t, home, got)
			return err
		}))
	}
}

func TestOpen(t *testing.T) {
	for name, tt := range map[string]struct {
		arg string
		is  error
	}{
		"missing":         {"/run/netns/none", os.ErrNotExist},
		"no such name":    {"none", os.ErrNotExist},
		"a regular file":  {"/proc/self/exe", netnsutil.ErrNotNetNS},
		"a directory":     {"/", netnsutil.ErrNotNetNS},
		"another kind":    {"/proc/self/ns/user", netnsutil.ErrNotNetNS},
		"a terminal-like": {"/dev/null", netnsutil.ErrNotNetNS},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := netnsutil.Open(tt.arg)
			require.ErrorIs(t, err, tt.is)
			require.ErrorContains(t, err, "open network namespace")
		})
	}
	_, err := netnsutil.OpenPID(1 << 30)
	require.ErrorIs(t, err, os.ErrNotExist)

	current, err := netnsutil.Current()
	require.NoError(t, err)
	defer current.Close()
	require.True(t, current.Equal(nstest.Host(t)))
	require.False(t, current.Equal(nstest.New(t)))
}

func BenchmarkDo(b *testing.B) {
	ns := nstest.New(b)
	b.ReportAllocs()
	for b.Loop() {
		if err := ns.Do(func() error { return nil }); err != nil {
			b.Fatal(err)
		}
	}
}

func TestFromFile(t *testing.T) {
	ns := nstest.New(t)
	f, err := os.Open(fmt.Sprintf("/proc/self/fd/%d", ns.Fd()))
	require.NoError(t, err)
	same, err := netnsutil.FromFile(f, "/run/netns/x")
	require.NoError(t, err)
	defer same.Close()
	require.True(t, same.Equal(ns))
	require.Equal(t, "/run/netns/x", same.String())

	null, err := os.Open(os.DevNull)
	require.NoError(t, err)
	_, err = netnsutil.FromFile(null, "")
	require.ErrorIs(t, err, netnsutil.ErrNotNetNS)
	require.ErrorIs(t, null.Close(), os.ErrClosed)
}
