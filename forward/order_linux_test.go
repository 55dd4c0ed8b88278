package forward

import (
	"fmt"
	"net"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// The server accepts clients in the order in which they came: iperf3 --bidir, for
// one, takes the first connection for the one that its client opened first.
func TestOrderOfConnections(t *testing.T) {
	f, ns := start(t, Config{Datapath: Tap})
	var l net.Listener
	require.NoError(t, ns.Do(func() (err error) {
		l, err = net.Listen("tcp", "10.0.2.100:0")
		return err
	}))
	defer l.Close()
	_, err := f.Change(Change{Add: []Rule{rule(fmt.Sprintf("8080:%d", l.Addr().(*net.TCPAddr).Port))}})
	require.NoError(t, err)
	var want, got []int
	for range 200 {
		c := dialTest(t, "tcp", "127.0.0.1:8080")
		want = append(want, c.LocalAddr().(*net.TCPAddr).Port)
	}
	require.NoError(t, l.(*net.TCPListener).SetDeadline(time.Now().Add(10*time.Second)))
	for range want {
		c, err := l.Accept()
		require.NoError(t, err)
		got = append(got, c.RemoteAddr().(*net.TCPAddr).Port)
		c.Close()
	}
	require.Equal(t, want, got)
}
