package forward

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/gofwd/gofwd/netnsutil"
)

func TestError(t *testing.T) {
	err := fmt.Errorf("start: %w", &Error{Op: "bind host port", Rule: rule("127.0.0.1%lo:8080:80"), Err: syscall.EACCES})
	require.EqualError(t, err, "start: bind host port 127.0.0.1%lo:8080/tcp: permission denied")
	require.ErrorIs(t, err, os.ErrPermission)
}

func TestHint(t *testing.T) {
	tun := func(err error) error {
		return fmt.Errorf("start: %w", &fs.PathError{Op: "open", Path: "/dev/net/tun", Err: err})
	}
	for _, tt := range []struct {
		err  error
		want string
	}{
		{tun(syscall.ENOENT), "modprobe tun"},
		{tun(syscall.ENODEV), "modprobe tun"},
		{tun(syscall.EACCES), "chmod 0666 /dev/net/tun"},
		{tun(syscall.EPERM), "--device /dev/net/tun"},
		{syscall.ENFILE, "fs.file-max"},
		{fmt.Errorf("x: %w", netnsutil.ErrNotNetNS), "/proc/PID/ns/net"},
		{fmt.Errorf("x: %w", netnsutil.ErrOutside), "user namespace that owns"},
		{os.NewSyscallError("setns", syscall.EPERM), "podman unshare"},
		{&netnsutil.ForbiddenError{Setting: "s", Remedy: "do this", Err: syscall.EPERM}, "do this"},
		{&Error{Rule: rule("%eth0:80:80"), Err: syscall.EPERM}, "before Linux 5.7"},
	} {
		require.Contains(t, Hint(tt.err), tt.want, "%v", tt.err)
		require.NotContains(t, Hint(tt.err), "\n")
	}
	for _, err := range []error{
		nil, errors.New("anything"), syscall.EACCES, os.NewSyscallError("connect", syscall.EPERM),
		&fs.PathError{Op: "open", Path: "/etc/shadow", Err: syscall.EACCES}, tun(syscall.EBUSY),
		// Not because of its number: ports from 1024 on are for everyone.
		&Error{Rule: rule("8080:80"), Err: syscall.EACCES},
		&Error{Rule: rule("8080:80"), Err: syscall.EPERM},
	} {
		require.Empty(t, Hint(err), "%v", err)
	}
}
