package stack

import (
	"bytes"
	"context"
	"io"
	"net"
	"net/netip"
	"runtime"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/gofwd/gofwd/netnsutil"
	"github.com/gofwd/gofwd/netnsutil/nstest"
)

var (
	guest4   = netip.MustParseAddr("10.0.2.100")
	guest6   = netip.MustParseAddr("fd67:6f66:7764::100")
	client4  = netip.MustParseAddr("198.51.100.2")
	client6  = netip.MustParseAddr("2001:db8:1::2")
	families = []struct {
		name          string
		guest, client netip.Addr
	}{{"IPv4", guest4, client4}, {"IPv6", guest6, client6}}
)

// newTapStack makes a namespace with a tap in it and a stack at its far end.
func newTapStack(t testing.TB, cfg Config, mtu int) (*netnsutil.NS, *Stack) {
	t.Helper()
	ns, err := netnsutil.New()
	require.NoError(t, err)
	t.Cleanup(func() { ns.Close() })
	require.NoError(t, ns.Do(func() error {
		var err error
		cfg.Device, cfg.GuestMAC, err = OpenTap("tap0", mtu)
		return err
	}))
	link := nstest.Link(t, "tap0 10.0.2.100/24 fd67:6f66:7764::100/64, 0.0.0.0/0 via 10.0.2.2, ::/0 via fd67:6f66:7764::2")
	link.MTU = mtu
	require.NoError(t, ns.Configure(link))
	cfg.Guest = append(cfg.Guest, guest4, guest6)
	s, err := New(cfg)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, s.Close()) })
	return ns, s
}

func itoa(n int) string { return netip.AddrPortFrom(netip.IPv4Unspecified(), uint16(n)).String()[8:] }

func listen(t testing.TB, ns *netnsutil.NS, addr netip.Addr) (net.Listener, netip.AddrPort) {
	t.Helper()
	var l net.Listener
	require.NoError(t, ns.Do(func() (err error) {
		l, err = net.Listen("tcp", netip.AddrPortFrom(addr, 0).String())
		return err
	}))
	t.Cleanup(func() { l.Close() })
	return l, l.Addr().(*net.TCPAddr).AddrPort()
}

func TestDialTCPKeepsTheClientsAddress(t *testing.T) {
	ns, s := newTapStack(t, Config{}, 1500)
	for _, f := range families {
		t.Run(f.name, func(t *testing.T) {
			l, addr := listen(t, ns, f.guest)
			src := netip.AddrPortFrom(f.client, 40000)
			c, err := s.DialTCP(context.Background(), src, addr)
			require.NoError(t, err)
			defer c.Close()
			srv, err := l.Accept()
			require.NoError(t, err)
			defer srv.Close()
			require.Equal(t, src.String(), srv.RemoteAddr().String())

			// Half-close, both ways.
			_, err = c.Write([]byte("question"))
			require.NoError(t, err)
			require.NoError(t, c.CloseWrite())
			b, err := io.ReadAll(srv)
			require.NoError(t, err)
			require.Equal(t, "question", string(b))
			_, err = srv.Write([]byte("answer"))
			require.NoError(t, err)
			require.NoError(t, srv.Close())
			b, err = io.ReadAll(c)
			require.NoError(t, err)
			require.Equal(t, "answer", string(b))
		})
	}
}

// A read that Close interrupts ends as [Device] says, in whichever way it waits.
func TestTapClose(t *testing.T) {
	for _, parked := range []bool{false, true} {
		dev, _, err := OpenTap("tap1", 1500)
		require.NoError(t, err)
		blocked := make(chan struct{})
		read := make(chan error, 1)
		go func() {
			_, err := dev.Read([][]byte{make([]byte, 2048)}, func() bool { close(blocked); return parked })
			read <- err
		}()
		<-blocked
		require.NoError(t, dev.Close())
		require.ErrorIs(t, <-read, net.ErrClosed)
		require.ErrorIs(t, dev.Write([][]byte{make([]byte, 64)}), net.ErrClosed)
		require.NoError(t, dev.Close())
	}
}

func TestDialTCPRefused(t *testing.T) {
	_, s := newTapStack(t, Config{}, 1500)
	for _, f := range families {
		_, err := s.DialTCP(context.Background(), netip.AddrPortFrom(f.client, 0), netip.AddrPortFrom(f.guest, 9))
		require.ErrorIs(t, err, syscall.ECONNREFUSED, f.name)
	}
}

func TestAcceptAndReject(t *testing.T) {
	answer := make(chan error, 1)
	serve := func(r *TCPRequest) {
		if err := <-answer; err != nil {
			r.Reject(err)
			return
		}
		c, err := r.Accept(r.Context())
		if err != nil {
			return
		}
		io.Copy(c, c)
		c.Close()
	}
	ns, _ := newTapStack(t, Config{TCP: func(r *TCPRequest) { go serve(r) }}, 1500)
	dial := func(to netip.Addr) (net.Conn, error) {
		var c net.Conn
		err := ns.Do(func() (err error) {
			c, err = (&net.Dialer{Timeout: 2 * time.Second}).Dial("tcp", netip.AddrPortFrom(to, 80).String())
			return err
		})
		return c, err
	}
	for _, f := range families {
		for _, want := range []error{syscall.ECONNREFUSED, syscall.EHOSTUNREACH, syscall.ENETUNREACH} {
			answer <- want
			start := time.Now()
			_, err := dial(f.client)
			require.ErrorIs(t, err, want, f.name)
			require.Less(t, time.Since(start), time.Second)
		}
		answer <- nil
		c, err := dial(f.client)
		require.NoError(t, err)
		_, err = c.Write([]byte("echo"))
		require.NoError(t, err)
		require.NoError(t, c.(*net.TCPConn).CloseWrite())
		b, err := io.ReadAll(c)
		require.NoError(t, err)
		require.Equal(t, "echo", string(b))
		c.Close()
	}
}

// RST arrives as ECONNRESET, also after a FIN, and leaves as RST.
func TestReset(t *testing.T) {
	ns, s := newTapStack(t, Config{}, 1500)
	for _, f := range families {
		connect := func() (*Conn, *net.TCPConn) {
			l, addr := listen(t, ns, f.guest)
			c, err := s.DialTCP(context.Background(), netip.AddrPortFrom(f.client, 0), addr)
			require.NoError(t, err)
			srv, err := l.Accept()
			require.NoError(t, err)
			return c, srv.(*net.TCPConn)
		}
		c, srv := connect()
		require.NoError(t, srv.SetLinger(0))
		srv.Close()
		_, err := c.Read(make([]byte, 1))
		require.ErrorIs(t, err, syscall.ECONNRESET)
		c.Close()

		c, srv = connect()
		require.NoError(t, srv.CloseWrite())
		_, err = c.Read(make([]byte, 1))
		require.ErrorIs(t, err, io.EOF)
		require.NoError(t, srv.SetLinger(0))
		srv.Close()
		require.ErrorIs(t, c.AwaitReset(), syscall.ECONNRESET)
		c.Close()

		c, srv = connect()
		require.NoError(t, c.Abort())
		_, err = srv.Read(make([]byte, 1))
		require.ErrorIs(t, err, syscall.ECONNRESET)

		c, srv = connect()
		require.NoError(t, srv.CloseWrite())
		_, err = c.Read(make([]byte, 1))
		require.ErrorIs(t, err, io.EOF)
		time.AfterFunc(10*time.Millisecond, func() { c.SetReadDeadline(time.Unix(1, 0)) })
		require.NoError(t, c.AwaitReset())
		c.Close()
		srv.Close()
	}
}

// An idle connection costs little: what it needs buffers for has passed.
func TestIdleConnectionsAreSmall(t *testing.T) {
	const n, limit = 1000, 12 << 10
	ns, s := newTapStack(t, Config{}, 1500)
	l, addr := listen(t, ns, guest4)
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	for range n {
		c, err := s.DialTCP(context.Background(), netip.AddrPortFrom(client4, 0), addr)
		require.NoError(t, err)
		t.Cleanup(func() { c.Close() })
		srv, err := l.Accept()
		require.NoError(t, err)
		t.Cleanup(func() { srv.Close() })
	}
	runtime.GC()
	runtime.ReadMemStats(&after)
	each := (int64(after.HeapAlloc) - int64(before.HeapAlloc)) / n
	t.Logf("%d bytes for each connection, its server in this process included", each)
	require.Less(t, each, int64(limit))
}

func TestMain(m *testing.M) { nstest.Main(m) }

// The tap keeps a burst for as long as we do not read.
func TestTapQueue(t *testing.T) {
	ns, err := netnsutil.New()
	require.NoError(t, err)
	defer ns.Close()
	const burst = TapQueueLen - 100 // the kernel sends something of its own
	var dev Device
	require.NoError(t, ns.Do(func() (err error) {
		dev, _, err = OpenTap("tap0", 1500)
		return err
	}))
	defer dev.Close()
	link := nstest.Link(t, "tap0 10.0.2.100/24, 0.0.0.0/0 via 10.0.2.2")
	link.QueueLen = TapQueueLen
	require.NoError(t, ns.Configure(link))
	require.NoError(t, ns.Do(func() error {
		c, err := net.Dial("udp4", "239.1.2.3:7000") // a neighbour that needs no ARP
		if err != nil {
			return err
		}
		defer c.Close()
		for range burst {
			if _, err := c.Write([]byte("one of many")); err != nil {
				return err
			}
		}
		return nil
	}))
	buf := make([]byte, 2048)
	for got := 0; got < burst; {
		n, err := dev.Read([][]byte{buf}, func() bool { require.Equal(t, burst, got, "the rest is lost"); go dev.Close(); return false })
		require.NoError(t, err)
		if bytes.HasSuffix(buf[:n], []byte("one of many")) {
			got++
		}
	}
}
