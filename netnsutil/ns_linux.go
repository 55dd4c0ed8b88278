package netnsutil

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
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
	path string // as given to Open, "" for New and Current
}

// Open opens a network namespace by path, or by name where arg has no slash:
// NAME is /run/netns/NAME as for ip-netns(8).
func Open(arg string) (*NS, error) {
	path := arg
	if !strings.Contains(arg, "/") {
		path = filepath.Join(namedDir, arg)
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("open network namespace: %w", err)
	}
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
	err := onThrowawayThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("make network namespace: %w", os.NewSyscallError("unshare", err))
		}
		var err error
		ns, err = Current()
		return err
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

// Path returns the path by which ns was opened, "" where there was none.
func (ns *NS) Path() string { return ns.path }

// Equal reports whether ns and other are the same namespace.
func (ns *NS) Equal(other *NS) bool {
	return netns.NsHandle(ns.Fd()).Equal(netns.NsHandle(other.Fd()))
}

// Do runs fn on a thread that is in the namespace, and returns fn's error. The
// thread is the caller's own: fn must neither start goroutines that rely on
// the namespace nor block for long. Cost on an idle machine: two setns(2), some
// 4 µs.
//
// If there is no way back, which takes a change of the process's capabilities
// meanwhile, the error says so, and the calling goroutine must end: it is still
// in the namespace.
func (ns *NS) Do(fn func() error) (err error) {
	runtime.LockOSThread()
	home, err := Current()
	if err != nil {
		runtime.UnlockOSThread()
		return err
	}
	defer home.Close()
	if err := netns.Set(netns.NsHandle(ns.Fd())); err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("enter network namespace %s: %w", ns, os.NewSyscallError("setns", err))
	}
	defer func() {
		if errBack := netns.Set(netns.NsHandle(home.Fd())); errBack != nil {
			// The thread is poisoned. It stays locked, so that it ends
			// with its goroutine and never runs another.
			err = fmt.Errorf("leave network namespace %s: %w", ns, errors.Join(os.NewSyscallError("setns", errBack), err))
			return
		}
		runtime.UnlockOSThread()
	}()
	return fn()
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

// onThrowawayThread runs fn on a thread of its own that ends with it, for what
// cannot be undone (unshare) or what must not touch the caller's thread.
func onThrowawayThread(fn func() error) error {
	errc := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the runtime ends the thread
		errc <- fn()
	}()
	return <-errc
}
