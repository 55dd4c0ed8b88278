package forward

import (
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// A port in use is an error that names who has it, whichever of its addresses
// is in the way.
func TestHolder(t *testing.T) {
	for _, tt := range []struct{ held, wanted, beside string }{
		{"127.0.0.1:8080:80", "8080:81", "8081:80"},
		{"0.0.0.0:8080:80", "127.0.0.1:8080:81", "8080:80/udp"},
		{"[::1]:8080:80", "[::]:8080:81", "127.0.0.1:8080:80"},
		{"8080:80", "127.0.0.1:8080:81", "8080:80/udp"},
		{"8080:80", "%lo:8080:81", "8081:80"},
		{"8080:80/udp", "[::1]:8080:80/udp", "8080:80"},
		{"127.0.0.1:8080:80/udp", "127.0.0.1:8080:80/udp", "127.0.0.3:8080:80/udp"},
	} {
		t.Run(tt.held+" "+tt.wanted, func(t *testing.T) {
			inNewNS(t, func() {
				pid := inOtherProcess(t, rule(tt.held))
				bind(t, &binder{}, tt.beside) // not in the way
				_, err := (&binder{}).bindAll([]Rule{rule(tt.wanted)})
				require.ErrorIs(t, err, unix.EADDRINUSE)
				require.EqualError(t, err, fmt.Sprintf("bind host port %s: in use by sleep (pid %d)", rule(tt.wanted).endpoint(), pid))
				require.Equal(t, "stop what uses it, or choose another port", Hint(err))
				bare := &Error{Op: "bind host port", Rule: rule(tt.wanted), Err: unix.EADDRINUSE}
				require.EqualError(t, NameHolder(bare), err.Error())
			})
		})
	}
}

// inOtherProcess hands the socket of r to a process that does nothing with it,
// and returns its id.
func inOtherProcess(t *testing.T, r Rule) int {
	t.Helper()
	bindings, err := (&binder{}).bindAll([]Rule{r})
	require.NoError(t, err)
	l := bindings[0].listeners[0]
	defer l.Close()
	var file *os.File
	if l.tcp != nil {
		file, err = l.tcp.File()
	} else {
		file, err = l.udp.File()
	}
	require.NoError(t, err)
	defer file.Close()
	cmd := exec.Command("sleep", "60")
	cmd.ExtraFiles = []*os.File{file}
	require.NoError(t, cmd.Start())
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	return cmd.Process.Pid
}

// An outgoing connection can be in the way, and is found.
func TestHolderConnection(t *testing.T) {
	inNewNS(t, func() {
		server := bind(t, &binder{}, "127.0.0.1:8080:80")[0].listeners[0]
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		require.NoError(t, err)
		defer unix.Close(fd)
		require.NoError(t, unix.Bind(fd, &unix.SockaddrInet4{Port: 9000, Addr: [4]byte{127, 0, 0, 1}}))
		require.NoError(t, unix.Connect(fd, &unix.SockaddrInet4{Port: int(server.addr().Port()), Addr: [4]byte{127, 0, 0, 1}}))
		_, err = (&binder{}).bindAll([]Rule{rule("9000:80")})
		require.EqualError(t, err, fmt.Sprintf("bind host port 9000/tcp: in use by forward.test (pid %d)", os.Getpid()))
	})
}

// A socket that was only bound is in no list; then the kernel's word is all.
func TestHolderUnknown(t *testing.T) {
	inNewNS(t, func() {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		require.NoError(t, err)
		defer unix.Close(fd)
		require.NoError(t, unix.Bind(fd, &unix.SockaddrInet4{Port: 9000}))
		_, err = (&binder{}).bindAll([]Rule{rule("9000:80")})
		require.EqualError(t, err, "bind host port 9000/tcp: address already in use")
	})
	// No process of ours has this inode.
	require.Equal(t, "a process of uid 33", holderOf([]procSocket{{inode: 1, uid: 33}}).String())
}

func TestParseProcSocket(t *testing.T) {
	for line, want := range map[string]procSocket{
		"   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 651 1 0000000073057993 100 0 0 10 0": {
			local: netip.MustParseAddrPort("127.0.0.1:8080"), listen: true, uid: 1000, inode: 651,
		},
		"  14: 00000000000000000000000001000000:0035 00000000000000000000000000000000:0000 07 00000000:00000000 00:00000000 00000000     0        0 7 2 0 0": {
			local: netip.MustParseAddrPort("[::1]:53"), inode: 7,
		},
	} {
		got, ok := parseProcSocket(line)
		require.True(t, ok, line)
		require.Equal(t, want, got)
	}
	for _, line := range []string{
		"", "sl local_address", "0: 0100007F 0:0 0A 0:0 00:0 0 0 0 1", "0: 0100007:1F90 0:0 0A 0:0 00:0 0 0 0 1",
		"0: X100007F:1F90 0:0 0A 0:0 00:0 0 0 0 1", "0: 0100007F:1F90 0:0 0A 0:0 00:0 0 x 0 1", "0: 0100007F:1F90 0:0 0A 0:0 00:0 0 0 0 x",
		"0: 0100007F01:1F90 0:0 0A 0:0 00:0 0 0 0 1", "0: 0100007F0100007F:1F90 0:0 0A 0:0 00:0 0 0 0 1",
	} {
		_, ok := parseProcSocket(line)
		require.False(t, ok, line)
	}
}
