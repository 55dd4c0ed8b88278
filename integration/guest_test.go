package integration

import (
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/gofwd/gofwd/stack/stacktest"
)

// TestGuest: a container that does as gVisor does, which takes the tap's addresses away
// and speaks on a packet socket, is reached by curl, sees its clients, and gets out, by
// a gofwd that was started as for any other. TestRunsc has gVisor itself.
func TestGuest(t *testing.T) {
	t.Parallel()
	need(t, "curl")
	tp := newTopo(t)
	g := tp.attach(t, "-p", "8080:80")
	guest := stacktest.NewGuest(t, tp.ctr.ns, "tap0")
	ln, err := guest.ListenTCP(80)
	require.NoError(t, err)
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			host, _, _ := net.SplitHostPort(c.RemoteAddr().String())
			_, _ = c.Read(make([]byte, 1000))
			_, _ = io.WriteString(c, "HTTP/1.0 200 OK\r\n\r\n"+host)
			c.Close()
		}
	})
	t.Cleanup(func() { ln.Close(); wg.Wait() })
	eachFamily(t, func(t *testing.T, f family) {
		for range 2 {
			out := tp.client.output(t, "curl", "-sS", "--max-time", "10", "--interface", f.client2.String(), url(f.host, 8080))
			require.Equal(t, f.client2.String(), strings.TrimSpace(out))
		}
		go greetHTTP(tp.client.listenTCP(t, f.client, 8000), "hello from the client")
		c, err := guest.DialTCP(t.Context(), netip.AddrPortFrom(f.client, 8000))
		require.NoError(t, err)
		defer c.Close()
		_, err = io.WriteString(c, "GET / HTTP/1.0\r\n\r\n")
		require.NoError(t, err)
		answer, err := io.ReadAll(c)
		require.NoError(t, err)
		require.Contains(t, string(answer), "hello from the client")
	})
	out := tp.host.output(t, os.Getenv(binEnv), "status", g.name)
	require.Contains(t, out, "but a guest does")
	require.Contains(t, out, "2 connections were not begun by the namespace's kernel")
}
