package netnsutil

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// ErrGone is the end of a network namespace that was opened by path: its name
// was deleted or unmounted, or the process that was in it ended.
var ErrGone = errors.New("the network namespace is gone")

// goneInterval is how often WaitGone looks of its own accord. This is for the
// unmount alone, of which inotify(7) says nothing; ip-netns(8) and Podman unmount
// and delete in the same breath.
const goneInterval = 500 * time.Millisecond

// WaitGone blocks until the path by which ns was opened leads to it no longer,
// and returns [ErrGone]; or until ctx is done, and returns ctx's error. For a
// path of the form /proc/PID/ns/net that is when the process ends. A namespace
// without a path, see [New], does not go, nor does one whose path the caller may
// not see. ns itself stays usable in any case.
//
// A deletion or the end of a process is seen at once, an unmount within half a
// second.
func (ns *NS) WaitGone(ctx context.Context) error {
	if ns.path == "" {
		<-ctx.Done()
		return ctx.Err()
	}
	// The directory is held open for a caller who gives up his view of the
	// file system later on.
	dir, err := os.Open(filepath.Dir(ns.path))
	switch {
	case errors.Is(err, os.ErrNotExist):
		return ErrGone
	case errors.Is(err, os.ErrPermission): // see FromFile
		<-ctx.Done()
		return ctx.Err()
	case err != nil:
		return fmt.Errorf("watch network namespace: %w", err)
	}
	defer dir.Close()
	events, final := ns.openEvents()
	if events != nil {
		defer events.Close()
		defer context.AfterFunc(ctx, func() { _ = events.SetReadDeadline(time.Unix(1, 0)) })()
	}
	for ns.isAt(dir) {
		event, err := nextEvent(ctx, events)
		if err != nil {
			return err
		}
		if event && final {
			break
		}
	}
	return ErrGone
}

// isAt reports whether ns.path, whose directory is dir, still leads to ns. An
// error that says nothing about that, such as EACCES, is no reason to doubt it.
func (ns *NS) isAt(dir *os.File) bool {
	var there, ours unix.Stat_t
	switch err := unix.Fstatat(int(dir.Fd()), filepath.Base(ns.path), &there, 0); err {
	case nil:
		err := unix.Fstat(ns.Fd(), &ours)
		return err == nil && there.Dev == ours.Dev && there.Ino == ours.Ino
	case unix.ENOENT, unix.ENOTDIR, unix.ESRCH:
		return false
	default:
		return true
	}
}

var procPath = regexp.MustCompile(`^/proc/([0-9]+)/ns/net$`)

// openEvents opens a descriptor that becomes readable when ns may have gone, or
// if final, when it has. Nil is no such thing, and no error: the process may have
// ended, and a user has but 128 inotify instances.
func (ns *NS) openEvents() (events *os.File, final bool) {
	if m := procPath.FindStringSubmatch(ns.path); m != nil {
		pid, err := strconv.Atoi(m[1])
		if err != nil {
			return nil, false
		}
		fd, err := unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK)
		if err != nil {
			return nil, false
		}
		return os.NewFile(uintptr(fd), "pidfd"), true
	}
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, false
	}
	const mask = unix.IN_DELETE | unix.IN_MOVE | unix.IN_DELETE_SELF
	if _, err := unix.InotifyAddWatch(fd, filepath.Dir(ns.path), mask); err != nil {
		unix.Close(fd)
		return nil, false
	}
	return os.NewFile(uintptr(fd), "inotify"), false
}

// nextEvent waits for events to become readable, at most for goneInterval.
func nextEvent(ctx context.Context, events *os.File) (event bool, err error) {
	if events == nil {
		select {
		case <-ctx.Done():
		case <-time.After(goneInterval):
		}
		return false, ctx.Err()
	}
	conn, err := events.SyscallConn()
	if err != nil {
		return false, fmt.Errorf("watch network namespace: %w", err)
	}
	_ = events.SetReadDeadline(time.Now().Add(goneInterval))
	if err := ctx.Err(); err != nil { // its AfterFunc may have come before
		return false, err
	}
	var buf [4096]byte
	err = conn.Read(func(fd uintptr) bool {
		n, _ := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
		if n > 0 {
			// What inotify tells does not matter, but must be taken
			// away; a pidfd cannot be read, and only says EINVAL.
			_, _ = unix.Read(int(fd), buf[:])
		}
		return n > 0
	})
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return false, ctx.Err()
	} else if err != nil {
		return false, fmt.Errorf("watch network namespace: %w", err)
	}
	return true, nil
}
