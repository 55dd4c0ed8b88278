package netnsutil_test

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/gofwd/gofwd/netnsutil"
	"github.com/gofwd/gofwd/netnsutil/nstest"
)

// mountNS binds a new network namespace to a file, as ip-netns(8) and Podman do,
// and opens it by that name.
func mountNS(t *testing.T) (*netnsutil.NS, string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "netns")
	require.NoError(t, os.WriteFile(path, nil, 0o600))
	made := nstest.New(t)
	require.NoError(t, unix.Mount(fmt.Sprintf("/proc/self/fd/%d", made.Fd()), path, "", unix.MS_BIND, ""))
	t.Cleanup(func() { _ = unix.Unmount(path, unix.MNT_DETACH) })
	ns, err := netnsutil.Open(path)
	require.NoError(t, err)
	t.Cleanup(func() { ns.Close() })
	return ns, path
}

// gone starts to wait, lets the wait settle, does what it is told, and returns
// how long WaitGone took from then on.
func gone(t *testing.T, ns *netnsutil.NS, do func()) time.Duration {
	t.Helper()
	done := make(chan error, 1)
	go func() { done <- ns.WaitGone(t.Context()) }()
	select {
	case err := <-done:
		require.FailNow(t, "it is there", "%v", err)
	case <-time.After(goneSettle):
	}
	start := time.Now()
	do()
	select {
	case err := <-done:
		require.ErrorIs(t, err, netnsutil.ErrGone)
	case <-time.After(5 * time.Second):
		require.FailNow(t, "it is gone, and nobody sees it")
	}
	return time.Since(start)
}

// goneSettle is longer than one look of WaitGone's own.
const goneSettle = 600 * time.Millisecond

func TestWaitGone(t *testing.T) {
	const atOnce, atLast = 100 * time.Millisecond, time.Second
	t.Run("deleted", func(t *testing.T) {
		ns, path := mountNS(t)
		require.Less(t, gone(t, ns, func() {
			// As ip-netns(8).
			require.NoError(t, unix.Unmount(path, unix.MNT_DETACH))
			require.NoError(t, os.Remove(path))
		}), atOnce)
	})
	t.Run("unmounted", func(t *testing.T) {
		ns, path := mountNS(t)
		require.Less(t, gone(t, ns, func() { require.NoError(t, unix.Unmount(path, unix.MNT_DETACH)) }), atLast)
	})
	t.Run("replaced", func(t *testing.T) {
		ns, path := mountNS(t)
		other := nstest.New(t)
		require.Less(t, gone(t, ns, func() {
			require.NoError(t, unix.Mount(fmt.Sprintf("/proc/self/fd/%d", other.Fd()), path, "", unix.MS_BIND, ""))
		}), atLast)
		require.NoError(t, unix.Unmount(path, unix.MNT_DETACH))
	})
	t.Run("with its directory", func(t *testing.T) {
		ns, path := mountNS(t)
		require.Less(t, gone(t, ns, func() {
			require.NoError(t, unix.Unmount(path, unix.MNT_DETACH))
			require.NoError(t, os.RemoveAll(filepath.Dir(path)))
		}), atOnce)
	})
	t.Run("before", func(t *testing.T) {
		ns, path := mountNS(t)
		require.NoError(t, unix.Unmount(path, unix.MNT_DETACH))
		require.ErrorIs(t, ns.WaitGone(t.Context()), netnsutil.ErrGone)
		require.NoError(t, os.RemoveAll(filepath.Dir(path)))
		require.ErrorIs(t, ns.WaitGone(t.Context()), netnsutil.ErrGone)
	})
	t.Run("neighbours do not matter", func(t *testing.T) {
		ns, path := mountNS(t)
		ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
		defer cancel()
		done := make(chan error, 1)
		go func() { done <- ns.WaitGone(ctx) }()
		for i := range 20 {
			other := fmt.Sprintf("%s%d", path, i)
			require.NoError(t, os.WriteFile(other, nil, 0o600))
			require.NoError(t, os.Remove(other))
		}
		require.ErrorIs(t, <-done, context.DeadlineExceeded)
	})
	t.Run("process ended", func(t *testing.T) {
		cmd := exec.Command("sleep", "1000")
		nstest.Start(t, nstest.New(t), cmd)
		ns, err := netnsutil.OpenPID(cmd.Process.Pid)
		require.NoError(t, err)
		defer ns.Close()
		require.Less(t, gone(t, ns, func() { require.NoError(t, cmd.Process.Kill()) }), atOnce)
		require.Error(t, cmd.Wait())
		require.ErrorIs(t, ns.WaitGone(t.Context()), netnsutil.ErrGone)
	})
}

// A file deleted in another mount namespace takes its mounts in ours along
// (Linux 3.18, commit 8ed936b5671b): Podman's files are mounted in Podman's own.
func TestWaitGoneDeletedElsewhere(t *testing.T) {
	ns, path := mountNS(t)
	require.Less(t, gone(t, ns, func() {
		cmd := exec.Command("unshare", "--mount", "sh", "-c", `umount "$0" && rm "$0"`, path)
		out, err := cmd.CombinedOutput()
		require.NoError(t, err, "%s", out)
	}), 200*time.Millisecond)
}

func TestWaitGoneContext(t *testing.T) {
	mounted, _ := mountNS(t)
	for name, ns := range map[string]*netnsutil.NS{"named": mounted, "nameless": nstest.New(t), "ours": nstest.Host(t)} {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := context.WithCancel(t.Context())
			done := make(chan error, 1)
			go func() { done <- ns.WaitGone(ctx) }()
			time.Sleep(20 * time.Millisecond)
			start := time.Now()
			cancel()
			require.ErrorIs(t, <-done, context.Canceled)
			require.Less(t, time.Since(start), 100*time.Millisecond)
			require.ErrorIs(t, ns.WaitGone(ctx), context.Canceled)
		})
	}
}
