package netnsutil

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// ErrOutside is wrapped by the error of [OwnerUserNS] for a network namespace
// whose owner is neither the caller's user namespace nor below it: from here it
// can be neither entered nor joined.
var ErrOutside = errors.New("owned by a user namespace outside of our own")

// OwnerUserNS opens the user namespace that owns ns, and in which it takes
// CAP_SYS_ADMIN to enter ns. The caller closes it.
func OwnerUserNS(ns *NS) (*os.File, error) {
	fd, err := unix.IoctlRetInt(ns.Fd(), unix.NS_GET_USERNS)
	if err == unix.EPERM { // ioctl_ns(2)
		return nil, fmt.Errorf("network namespace %s: %w", ns, ErrOutside)
	} else if err != nil {
		return nil, fmt.Errorf("find owner of network namespace %s: %w", ns, os.NewSyscallError("ioctl", err))
	}
	return os.NewFile(uintptr(fd), "user namespace"), nil
}

// UserNSOfPID opens the user namespace of a process. The caller closes it.
func UserNSOfPID(pid int) (*os.File, error) {
	f, err := os.Open("/proc/" + strconv.Itoa(pid) + "/ns/user")
	if err != nil {
		return nil, fmt.Errorf("open user namespace: %w", err)
	}
	return f, nil
}

// SameUserNS reports whether f is the user namespace that the caller is in.
func SameUserNS(f *os.File) bool {
	theirs, err := f.Stat()
	if err != nil {
		return false
	}
	ours, err := os.Stat("/proc/self/ns/user")
	return err == nil && os.SameFile(theirs, ours)
}

// ForbiddenError says that the system is set up not to let the caller have user
// namespaces. Unwrap leads to the errno.
type ForbiddenError struct {
	// Setting is what forbids it, e.g. kernel.unprivileged_userns_clone=0.
	Setting string
	// Remedy is what to do about it, in one sentence.
	Remedy string
	// Err is what failed.
	Err error
}

func (e *ForbiddenError) Error() string {
	return e.Err.Error() + " (" + e.Setting + ")"
}

func (e *ForbiddenError) Unwrap() error { return e.Err }

// forbidden turns the error of a step towards a new user namespace into a
// [*ForbiddenError] where a setting explains it.
func forbidden(err error) error {
	var errno syscall.Errno
	if !errors.As(err, &errno) {
		return err
	}
	if setting, remedy := whyForbidden(os.DirFS("/proc"), errno); setting != "" {
		return &ForbiddenError{Setting: setting, Remedy: remedy, Err: err}
	}
	return err
}

// whyForbidden looks in proc for the setting that explains errno; "" is none.
func whyForbidden(proc fs.FS, errno syscall.Errno) (setting, remedy string) {
	read := func(name string) string {
		b, _ := fs.ReadFile(proc, name) // a file that the kernel lacks forbids nothing
		return strings.TrimSpace(string(b))
	}
	switch errno {
	case unix.ENOSPC: // namespaces(7): a limit of /proc/sys/user
		setting = "user.max_user_namespaces=" + read("sys/user/max_user_namespaces")
		return setting, "as root: sysctl -w user.max_user_namespaces=15000"
	case unix.EPERM, unix.EACCES:
	default:
		return "", ""
	}
	// Only in kernels with a patch of Debian's and Arch's.
	if read("sys/kernel/unprivileged_userns_clone") == "0" {
		return "kernel.unprivileged_userns_clone=0", "as root: sysctl -w kernel.unprivileged_userns_clone=1"
	}
	// Ubuntu since 23.10. The namespace itself is granted to an unconfined
	// program, but then without capabilities, so that a later step fails.
	if read("sys/kernel/apparmor_restrict_unprivileged_userns") == "1" {
		return "kernel.apparmor_restrict_unprivileged_userns=1", "install an AppArmor profile that allows this program userns, " +
			"or as root: sysctl -w kernel.apparmor_restrict_unprivileged_userns=0"
	}
	// E.g. inside of a container: Docker's default profile denies them.
	if strings.Contains(read("self/status"), "\nSeccomp:\t2\n") {
		return "a seccomp filter", "run it outside of the container, or let the container's seccomp profile allow clone and unshare"
	}
	return "", ""
}
