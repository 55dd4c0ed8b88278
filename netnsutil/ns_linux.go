package netnsutil

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// ErrNotNetNS is wrapped by the error of [Open] and [OpenPID] for a file that
// exists and is not a network namespace.
var ErrNotNetNS = errors.New("not a network namespace")

// namedDir is where ip-netns(8) keeps the namespaces that have a name.
const namedDir = "/run/netns"

// NS is an open network namespace. The descriptor keeps the namespace alive,
// also after its last process and its last name have gone. The zero value is
// not usable; whoever opened an NS closes it.
type NS struct {
	file *os.File
	path string // absolute, "" for New
}

// Open opens a network namespace by path, or by name where arg has no slash:
// NAME is /run/netns/NAME as for ip-netns(8).
func Open(arg string) (*NS, error) {
	path := arg
	if !strings.Contains(arg, "/") {
		path = filepath.Join(namedDir, arg)
	}
	path, err := filepath.Abs(path) // for a daemon that leaves its directory
	if err != nil {
		return nil, fmt.Errorf("open network namespace: %w", err)
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("open network namespace: %w", err)
	}
	return FromFile(f, path)
}

// FromFile makes an NS of an open file, such as an inherited descriptor, and
// takes the file over: also with an error it is closed. path is where the file
// was opened, for String and WaitGone; "" is nowhere.
func FromFile(f *os.File, path string) (*NS, error) {
	// NS_GET_NSTYPE answers ENOTTY for anything that is not a namespace
	// (ioctl_ns(2)).
	switch kind, err := unix.IoctlRetInt(int(f.Fd()), unix.NS_GET_NSTYPE); {
	case err != nil:
		f.Close()
		return nil, fmt.Errorf("open network namespace %s: %w", path, ErrNotNetNS)
	case kind != unix.CLONE_NEWNET:
		f.Close()
		return nil, fmt.Errorf("open network namespace %s: %w, but one of another kind", path, ErrNotNetNS)
	}
	return &NS{file: f, path: path}, nil
}

// OpenPID opens the network namespace of a process. The error wraps
// [os.ErrNotExist] where there is no such process.
func OpenPID(pid int) (*NS, error) {
	return Open("/proc/" + strconv.Itoa(pid) + "/ns/net")
}

// Current opens the namespace of the calling thread.
func Current() (*NS, error) {
	return Open("/proc/thread-self/ns/net")
}

// New makes a network namespace, owned by the caller's user namespace; that
// needs CAP_SYS_ADMIN there. Nothing but the returned NS keeps it alive.
func New() (*NS, error) {
	var ns *NS
	err := onThread(func() (clean bool, err error) {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return true, fmt.Errorf("make network namespace: %w", os.NewSyscallError("unshare", err))
		}
		ns, err = Current()
		return false, err
	})
	if err != nil {
		return nil, err
	}
	ns.path = ""
	return ns, nil
}

// Fd returns the descriptor of the namespace, which stays the property of ns:
// for SysProcAttr, ioctl_ns(2) and netlink libraries.
func (ns *NS) Fd() int { return int(ns.file.Fd()) }

// Path returns the absolute path by which ns was opened, "" where there was none.
func (ns *NS) Path() string { return ns.path }

// Equal reports whether ns and other are the same namespace.
func (ns *NS) Equal(other *NS) bool {
	return netns.NsHandle(ns.Fd()).Equal(netns.NsHandle(other.Fd()))
}

// Do runs fn on a thread that is in the namespace, and returns fn's error. fn
// must not start goroutines that rely on the namespace: they would be on other
// threads. If fn calls [runtime.Goexit], as tests do that fail, so does Do.
//
// Where the way back is barred, as it is from a container's namespace to the
// host's for an ordinary user, a call costs one thread.
func (ns *NS) Do(fn func() error) error {
	return onThread(func() (clean bool, err error) {
		home, err := Current()
		if err != nil {
			return true, err
		}
		defer home.Close()
		if err := netns.Set(netns.NsHandle(ns.Fd())); err != nil {
			if home.Equal(ns) { // to enter where one is takes the right to, too
				return true, fn()
			}
			return true, fmt.Errorf("enter network namespace %s: %w", ns, os.NewSyscallError("setns", err))
		}
		err = fn()
		// setns(2): EPERM without CAP_SYS_ADMIN over home's owner.
		return netns.Set(netns.NsHandle(home.Fd())) == nil, err
	})
}

// String returns the path of the namespace, or its inode number.
func (ns *NS) String() string {
	if ns.path != "" {
		return ns.path
	}
	return netns.NsHandle(ns.Fd()).UniqueId()
}

// Close closes the descriptor; the namespace ends with its last user.
func (ns *NS) Close() error { return ns.file.Close() }
