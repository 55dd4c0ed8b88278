package nstest

import (
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { Main(m) }

func TestInside(t *testing.T) {
	require.Equal(t, 0, os.Getuid())
	ifaces, err := net.Interfaces()
	require.NoError(t, err)
	require.Len(t, ifaces, 1)
	require.NotZero(t, ifaces[0].Flags&net.FlagUp)
	require.NoError(t, os.MkdirAll("/run/netns", 0o755))
	f, err := os.OpenFile("/dev/net/tun", os.O_RDWR, 0)
	require.NoError(t, err)
	f.Close()
}

// Two namespaces, one listening, one dialling, over both families and at once:
// no address is tentative.
func TestVeth(t *testing.T) {
	client, server := New(t), New(t)
	Veth(t, client, "eth0 198.51.100.2/24 2001:db8:51::2/64", server,
		"eth0 198.51.100.1/24 2001:db8:51::1/64 203.0.113.1/32, 192.0.2.0/24 via 198.51.100.2")
	for _, addr := range []string{"198.51.100.1:80", "[2001:db8:51::1]:80"} {
		var l net.Listener
		var err error
		Do(t, server, func() {
			l, err = net.Listen("tcp", addr)
			require.NoError(t, err)
		})
		defer l.Close()
		var c net.Conn
		start := time.Now()
		Do(t, client, func() {
			c, err = net.DialTimeout("tcp", addr, 5*time.Second)
			require.NoError(t, err)
		})
		c.Close()
		require.Less(t, time.Since(start), 500*time.Millisecond, "by %s", addr)
	}
	require.Contains(t, Run(t, server, "ip", "-4", "route"), "192.0.2.0/24 via 198.51.100.2 dev eth0")
}

func TestCommands(t *testing.T) {
	ns := New(t)
	want, err := os.Readlink("/proc/self/fd/" + strconv.Itoa(ns.Fd()))
	require.NoError(t, err)
	require.Equal(t, want+"\n", Run(t, ns, "readlink", "/proc/self/ns/net"))

	var exit *exec.ExitError
	out, err := Output(ns, exec.Command("sh", "-c", "echo no >&2; exit 3"))
	require.ErrorAs(t, err, &exit)
	require.Equal(t, 3, exit.ExitCode())
	require.Equal(t, "no\n", out)
}

func TestStartEndsWithTheTest(t *testing.T) {
	fifo := filepath.Join(t.TempDir(), "fifo")
	require.NoError(t, unix.Mkfifo(fifo, 0o600))
	var r *os.File
	t.Run("inner", func(t *testing.T) {
		Start(t, New(t), exec.Command("sh", "-c", "exec 1>"+fifo+"; echo up; exec sleep 1000"))
		var err error
		r, err = os.Open(fifo)
		require.NoError(t, err)
		up := make([]byte, 3)
		_, err = io.ReadFull(r, up)
		require.NoError(t, err)
	})
	defer r.Close()
	n, err := r.Read(make([]byte, 1)) // the program has closed its end
	require.Zero(t, n)
	require.True(t, errors.Is(err, io.EOF))
}
