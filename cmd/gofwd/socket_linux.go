package main

import (
	"errors"
	"fmt"
	"io/fs"
	"math"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Every instance has a control socket NAME.sock in the runtime directory of its
// user. A socket that nobody listens on was left by a process that was killed;
// whoever finds it removes it.

const socketSuffix = ".sock"

var nameRE = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$`)

func validName(name string) bool { return nameRE.MatchString(name) }

// toName makes a valid name of any text.
func toName(s string) string {
	s = strings.Map(func(r rune) rune {
		if validName("a" + string(r)) {
			return r
		}
		return '-'
	}, s)
	s = strings.TrimLeft(s, "-_.")
	if len(s) > 48 {
		s = s[:48]
	}
	if s == "" {
		return "gofwd"
	}
	return s
}

// runtimeDir returns the directory for control sockets: /run/gofwd for root,
// $XDG_RUNTIME_DIR/gofwd for users, /tmp/gofwd-UID where that is not set. It is
// made if there is none, and is known to belong to the user alone.
func runtimeDir() (string, error) {
	uid := os.Geteuid()
	// In a user namespace everybody is root.
	outside, initial := outsideUID(uid)
	dir := filepath.Join(os.TempDir(), "gofwd-"+strconv.Itoa(outside))
	if xdg := os.Getenv("XDG_RUNTIME_DIR"); uid == 0 && initial {
		dir = "/run/gofwd"
	} else if xdg != "" && ownedBy(xdg, uid) {
		dir = filepath.Join(xdg, "gofwd")
	}
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return "", fmt.Errorf("make runtime directory: %w", err)
	}
	// The name under /tmp is anybody's to take.
	var st unix.Stat_t
	if err := unix.Lstat(dir, &st); err != nil {
		return "", &os.PathError{Op: "lstat", Path: dir, Err: err}
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR || int(st.Uid) != uid || st.Mode&0o077 != 0 {
		return "", &hintedError{
			fmt.Errorf("runtime directory %s: not a directory that is ours alone", dir),
			"remove it, or set XDG_RUNTIME_DIR",
		}
	}
	return dir, nil
}

func ownedBy(dir string, uid int) bool {
	var st unix.Stat_t
	return unix.Stat(dir, &st) == nil && int(st.Uid) == uid
}

// outsideUID returns who uid is in the parent of our user namespace, and whether
// this is the initial one, which has none. (The real root can make one that looks
// the same; he may.)
func outsideUID(uid int) (outside int, initial bool) {
	m, err := os.ReadFile("/proc/self/uid_map")
	if err != nil {
		return uid, false
	}
	for line := range strings.Lines(string(m)) {
		var inside, first, count int
		if _, err := fmt.Sscan(line, &inside, &first, &count); err == nil && uid >= inside && uid-inside < count {
			return first + uid - inside, inside == 0 && first == 0 && count == math.MaxUint32
		}
	}
	return uid, false
}

// listenControl makes the control socket of an instance. If name is "", it is
// made of hint, with a number where that is taken. The caller removes it at the
// end, with its ownFile.
func listenControl(name, hint string) (*net.UnixListener, ownFile, error) {
	dir, err := runtimeDir()
	if err != nil {
		return nil, ownFile{}, err
	}
	lock, err := lockDir(dir)
	if err != nil {
		return nil, ownFile{}, err
	}
	defer lock.Close()
	derived := toName(hint)
	for n := 1; ; n++ {
		try := name
		switch {
		case name != "":
		case n == 1:
			try = derived
		default:
			try = derived + "-" + strconv.Itoa(n)
		}
		path := filepath.Join(dir, try+socketSuffix)
		pid, alive := socketHolder(path)
		if alive && name == "" {
			continue
		}
		if alive {
			return nil, ownFile{}, &hintedError{
				fmt.Errorf("name %q: taken by gofwd process %d", name, pid),
				"choose another --name, or end that one",
			}
		}
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, ownFile{}, fmt.Errorf("remove stale control socket: %w", err)
		}
		l, own, err := listenUnix(path)
		if err != nil {
			return nil, ownFile{}, fmt.Errorf("make control socket: %w", err)
		}
		return l, own, nil
	}
}

// listenPesto makes the socket on which pesto is served, at a path of the user's
// choice. A stale one makes way, anything else does not. The caller removes it at
// the end, with its ownFile.
func listenPesto(path string) (_ *net.UnixListener, _ ownFile, err error) {
	if path, err = filepath.Abs(path); err != nil {
		return nil, ownFile{}, fmt.Errorf("make pesto's socket: %w", err)
	}
	lock, err := lockDir(filepath.Dir(path))
	if err != nil {
		return nil, ownFile{}, err
	}
	defer lock.Close()
	if info, err := os.Lstat(path); err == nil && info.Mode().Type() == fs.ModeSocket {
		if _, alive := socketHolder(path); alive {
			return nil, ownFile{}, fmt.Errorf("make pesto's socket: %s is in use already", path)
		}
		if err := os.Remove(path); err != nil {
			return nil, ownFile{}, fmt.Errorf("remove stale socket: %w", err)
		}
	}
	l, own, err := listenUnix(path)
	if err != nil {
		return nil, ownFile{}, fmt.Errorf("make pesto's socket: %w", err)
	}
	return l, own, nil
}

// listenUnix makes a socket for its owner alone.
func listenUnix(path string) (*net.UnixListener, ownFile, error) {
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, ownFile{}, err
	}
	l.SetUnlinkOnClose(false)
	own, err := newOwnFile(path)
	if err = errors.Join(err, os.Chmod(path, 0o600)); err != nil {
		l.Close()
		os.Remove(path)
		return nil, ownFile{}, err
	}
	return l, own, nil
}

// lockDir keeps others from taking a name in dir, or from removing one, until
// the file is closed: between finding a stale socket and removing it, somebody
// else may have found it too.
func lockDir(dir string) (*os.File, error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, fmt.Errorf("open the socket's directory: %w", err)
	}
	// In a directory that all may read, such as /tmp, anybody can hold it for ever.
	err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	for tries := 0; errors.Is(err, unix.EWOULDBLOCK) && tries < 100; tries++ {
		time.Sleep(20 * time.Millisecond)
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("lock the socket's directory: %w", &fs.PathError{Op: "flock", Path: dir, Err: err})
	}
	return f, nil
}

// removeStale removes a socket that nobody listens on.
func removeStale(path string) error {
	lock, err := lockDir(filepath.Dir(path))
	if err != nil {
		return err
	}
	defer lock.Close()
	if _, alive := socketHolder(path); alive {
		return nil
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove stale control socket: %w", err)
	}
	return nil
}

// socketHolder reports whether somebody listens on a socket, and who.
func socketHolder(path string) (pid int, alive bool) {
	c, err := net.DialTimeout("unix", path, time.Second)
	if err != nil {
		// E.g. EAGAIN: its queue is full.
		return 0, !isNobodyThere(err)
	}
	defer c.Close()
	return peerPID(c), true
}

// peerPID returns the process that listens at the other end of c, 0 if it can't
// be told (another PID namespace).
func peerPID(c net.Conn) int {
	u, ok := c.(*net.UnixConn)
	if !ok {
		return 0
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return 0
	}
	pid := 0
	_ = raw.Control(func(fd uintptr) {
		if cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
			pid = int(cred.Pid)
		}
	})
	return pid
}

// ownFile is a file that has a name only while gofwd runs.
type ownFile struct {
	path     string
	dev, ino uint64
}

func newOwnFile(path string) (ownFile, error) {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return ownFile{}, &os.PathError{Op: "lstat", Path: path, Err: err}
	}
	return ownFile{path, uint64(st.Dev), st.Ino}, nil //nolint:unconvert // Dev is 32 bits wide on some
}

// remove removes the file unless another one has its name by now.
func (f ownFile) remove() {
	if now, err := newOwnFile(f.path); err == nil && now == f {
		_ = os.Remove(f.path)
	}
}

// isNobodyThere reports whether a dial failed because the socket is stale or has
// never been there.
func isNobodyThere(err error) bool {
	return errors.Is(err, unix.ECONNREFUSED) || errors.Is(err, fs.ErrNotExist)
}
