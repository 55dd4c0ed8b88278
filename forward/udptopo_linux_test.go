package forward

import (
	"net/netip"
	"sync"
	"testing"
	"unsafe"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// Addresses of the test's host that are no loopback addresses, though they are on
// lo; see routable.
var (
	routable4 = netip.MustParseAddr("192.0.2.7")
	routable6 = netip.MustParseAddr("2001:db8::7")
)

var addRoutable = sync.OnceValue(func() error {
	fd4, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd4)
	req, err := unix.NewIfreq("lo:1")
	if err != nil {
		return err
	}
	addr4 := routable4.As4()
	req.SetInet4Addr(addr4[:])
	if err := unix.IoctlIfreq(fd4, unix.SIOCSIFADDR, req); err != nil {
		return err
	}
	fd6, err := unix.Socket(unix.AF_INET6, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd6)
	req6 := struct { // struct in6_ifreq
		addr      [16]byte
		prefixLen uint32
		ifindex   int32
	}{routable6.As16(), 128, 1} // lo is the first interface of every namespace
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd6), unix.SIOCSIFADDR, uintptr(unsafe.Pointer(&req6)))
	if errno != 0 {
		return errno
	}
	return nil
})

// routable gives the test's host the two addresses.
func routable(t testing.TB) {
	t.Helper()
	require.NoError(t, addRoutable())
}

// setLoopbackMTU makes lo narrow until the test ends.
func setLoopbackMTU(t testing.TB, mtu uint32) {
	t.Helper()
	set := func(mtu uint32) error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		req, err := unix.NewIfreq("lo")
		if err != nil {
			return err
		}
		req.SetUint32(mtu)
		return unix.IoctlIfreq(fd, unix.SIOCSIFMTU, req)
	}
	require.NoError(t, set(mtu))
	t.Cleanup(func() { require.NoError(t, set(65536)) })
}
