package stack

import (
	"errors"
	"fmt"
	"net"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// tunPath is the clone device of the tun driver.
const tunPath = "/dev/net/tun"

// TapQueueLen is how long the queue of a tap should be, in frames. The kernel's 1000
// are over in the few milliseconds for which a busy machine may not let us run, and
// what comes then is lost: with these more small datagrams a second arrive without
// loss (bench, UDP/way=outside). Full of the longest frames it is 256 MiB.
const TapQueueLen = 4096

// tap is a [Device] on a tap interface. Closing it removes the interface, since
// it is not persistent: also when the process is killed, so that the container
// sees ENETUNREACH at once rather than a link that leads nowhere.
//
// It has one queue. With more of them (IFF_MULTI_QUEUE) there can be a reader for
// each core. Two of them, on two cores which the sender and the receiver share with
// us, were slower rather than faster: 0.85 to 1.0 times the rate (bench, TapTCP with
// 1 and 8 streams, TCPCRR on the tap), and a datagram's reader would need locks.
type tap struct {
	mtu      int
	offloads Offloads

	readMu sync.Mutex // held while reading; Close waits for it
	bufs   [][]byte   // of the read at hand
	wait   *tapWait

	writeMu sync.RWMutex // read-locked while writing, locked to close
	fd      int          // -1 once closed; then still open while readMu is held
}

// OpenTap makes a tap interface of that name in the network namespace of the
// calling thread (see netnsutil.NS.Do), and returns it with its MAC address. mtu
// is what the interface is going to be configured for; its link is still down, and
// its queue short (see [TapQueueLen]).
// The error wraps [os.ErrNotExist] or [os.ErrPermission] where /dev/net/tun is
// missing or forbidden, and EBUSY where the name is taken.
func OpenTap(name string, mtu int) (Device, net.HardwareAddr, error) {
	fd, err := unix.Open(tunPath, unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, nil, &os.PathError{Op: "open", Path: tunPath, Err: err}
	}
	t, mac, err := newTap(fd, name, mtu)
	if err != nil {
		unix.Close(fd)
		return nil, nil, fmt.Errorf("make tap %s: %w", name, err)
	}
	return t, mac, nil
}

func newTap(fd int, name string, mtu int) (*tap, net.HardwareAddr, error) {
	ifr, err := unix.NewIfreq(name)
	if err != nil {
		return nil, nil, err
	}
	ifr.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr); err != nil {
		return nil, nil, os.NewSyscallError("TUNSETIFF", err)
	}
	offloads, err := probeOffloads(fd)
	if err != nil {
		return nil, nil, err
	}
	ifi, err := net.InterfaceByName(name)
	if err != nil {
		return nil, nil, err
	}
	t := &tap{mtu: mtu, offloads: offloads, fd: fd}
	if t.wait, err = newTapWait(fd, t.tryRead); err != nil {
		return nil, nil, err
	}
	return t, ifi.HardwareAddr, nil
}

// probeOffloads asks for all offloads and settles for those that the kernel
// takes: it refuses the whole set if it knows not all of it (TUNSETOFFLOAD,
// EINVAL). USO came with Linux 6.2.
func probeOffloads(fd int) (Offloads, error) {
	const tso = unix.TUN_F_CSUM | unix.TUN_F_TSO4 | unix.TUN_F_TSO6 | unix.TUN_F_TSO_ECN
	const uso = unix.TUN_F_USO4 | unix.TUN_F_USO6
	if unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, tso|uso) == nil {
		return Offloads{Checksum: true, TSO: true, USO: true}, nil
	}
	if unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, tso) == nil {
		return Offloads{Checksum: true, TSO: true}, nil
	}
	return Offloads{}, os.NewSyscallError("TUNSETOFFLOAD", unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, 0))
}

// Read implements [Device].
func (t *tap) Read(bufs [][]byte, idle func() bool) (int, error) {
	t.readMu.Lock()
	defer t.readMu.Unlock()
	t.bufs = bufs
	for {
		n, err := t.tryRead()
		if !errors.Is(err, unix.EAGAIN) {
			return n, err
		}
		if idle() {
			return t.wait.parked()
		}
		t.wait.alone()
	}
}

// tryRead reads a frame, if there is one.
func (t *tap) tryRead() (int, error) {
	t.writeMu.RLock()
	fd := t.fd
	t.writeMu.RUnlock()
	if fd < 0 {
		return 0, net.ErrClosed
	}
	for {
		n, err := unix.Readv(fd, t.bufs)
		if err != unix.EINTR {
			return n, err
		}
	}
}

// Write never waits: a tap has no limit on what it takes (its sk_sndbuf is
// INT_MAX), the frame goes through the container's stack before write(2) ends.
func (t *tap) Write(bufs [][]byte) error {
	t.writeMu.RLock()
	defer t.writeMu.RUnlock()
	if t.fd < 0 {
		return net.ErrClosed
	}
	for {
		_, err := unix.Writev(t.fd, bufs)
		if err == unix.EINTR {
			continue
		}
		return err
	}
}

func (t *tap) MTU() int           { return t.mtu }
func (t *tap) Offloads() Offloads { return t.offloads }

// Close implements [Device]. It waits for calls that it interrupts.
func (t *tap) Close() error {
	t.writeMu.Lock()
	fd := t.fd
	t.fd = -1
	t.writeMu.Unlock()
	if fd < 0 {
		return nil
	}
	t.wait.end()
	t.readMu.Lock()
	defer t.readMu.Unlock()
	t.wait.close()
	return os.NewSyscallError("close", unix.Close(fd))
}
