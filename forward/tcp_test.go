package forward

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// newTestEngine returns an engine whose namespace is servers by destination, and
// whose host is the tests'.
func newTestEngine(t *testing.T, servers map[string]func() (flowConn, error)) *tcpEngine {
	p := &paths{addrs: testHostMap(), tap: fakeDialer{name: "tap", servers: servers}}
	s, err := newSplicer(nil)
	require.NoError(t, err)
	e := newTCPEngine(p, &nameservers{}, s, nil, slog.New(slog.DiscardHandler))
	t.Cleanup(e.close)
	return e
}

// listenTCP publishes a port of the engine's namespace on the tests' loopback.
func listenTCP(t *testing.T, e *tcpEngine) (addr string, rule *activeRule) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	rule = newActiveRule(e.ctx, 1, Rule{Proto: TCP})
	e.listen(ln.(*net.TCPListener), rule, 80)
	return ln.Addr().String(), rule
}

const guestServer = "10.0.2.100:80"

func TestTCPCloseEndsEverything(t *testing.T) {
	server, inner := tcpPair(t)
	e := newTestEngine(t, map[string]func() (flowConn, error){guestServer: func() (flowConn, error) { return inner, nil }})
	dials := onceDialer{dialer: e.paths.tap, free: make(chan struct{}, 1), hangs: make(chan struct{})}
	dials.free <- struct{}{}
	e.paths.tap = dials
	addr, rule := listenTCP(t, e)

	open, err := net.Dial("tcp", addr) // relayed
	require.NoError(t, err)
	defer open.Close()
	_, err = open.Write([]byte("x"))
	require.NoError(t, err)
	_, err = io.ReadFull(server, make([]byte, 1))
	require.NoError(t, err)
	dialling, err := net.Dial("tcp", addr) // waits for its server
	require.NoError(t, err)
	defer dialling.Close()
	<-dials.hangs
	require.EqualValues(t, 2, rule.active.Load())

	e.close()
	e.close()
	for _, c := range []net.Conn{open, server, dialling} {
		_, err = c.Read(make([]byte, 1))
		require.ErrorIs(t, err, syscall.ECONNRESET)
	}
	_, err = net.Dial("tcp", addr)
	require.ErrorIs(t, err, syscall.ECONNREFUSED)
	require.Zero(t, rule.active.Load())
	require.EqualValues(t, 2, rule.total.Load())
	require.EqualValues(t, 1, rule.bytesIn.Load())

	ln, err := net.Listen("tcp", "127.0.0.1:0") // too late
	require.NoError(t, err)
	e.listen(ln.(*net.TCPListener), rule, 80)
	_, err = net.Dial("tcp", ln.Addr().String())
	require.ErrorIs(t, err, syscall.ECONNREFUSED)
}

// onceDialer dials once, and from then on hangs until the context ends.
type onceDialer struct {
	dialer
	free  chan struct{}
	hangs chan struct{}
}

func (d onceDialer) DialTCP(ctx context.Context, src, dst netip.AddrPort) (flowConn, error) {
	select {
	case <-d.free:
		return d.dialer.DialTCP(ctx, src, dst)
	default:
	}
	close(d.hangs)
	<-ctx.Done()
	return nil, ctx.Err()
}

// Without descriptors the clients wait; as soon as there are some, they are
// served. The listener never stops.
func TestTCPAcceptWithoutDescriptors(t *testing.T) {
	e := newTestEngine(t, nil) // refuses
	addr, _ := listenTCP(t, e)
	var limit syscall.Rlimit
	require.NoError(t, syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit))
	// Several, since somebody else's descriptor may be closed meanwhile, which
	// serves one.
	var clients [5]int
	for i := range clients {
		fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM, 0)
		require.NoError(t, err)
		defer syscall.Close(fd)
		clients[i] = fd
	}
	none := limit
	none.Cur = uint64(slices.Max(clients[:]) + 1)
	require.NoError(t, syscall.Setrlimit(syscall.RLIMIT_NOFILE, &none))
	restore := sync.OnceFunc(func() { syscall.Setrlimit(syscall.RLIMIT_NOFILE, &limit) })
	defer restore()
	to := netip.MustParseAddrPort(addr)
	fd := -1
	for _, client := range clients {
		for {
			low, err := syscall.Dup(client)
			if err != nil {
				require.ErrorIs(t, err, syscall.EMFILE)
				break
			}
			defer syscall.Close(low)
		}
		require.NoError(t, syscall.Connect(client, &syscall.SockaddrInet4{Addr: to.Addr().As4(), Port: int(to.Port())}))
		require.NoError(t, syscall.SetNonblock(client, true))
		time.Sleep(50 * time.Millisecond)
		if _, err := syscall.Read(client, make([]byte, 1)); errors.Is(err, syscall.EAGAIN) {
			fd = client
			break
		}
	}
	require.NotEqual(t, -1, fd, "none waits")
	restore()
	require.Eventually(t, func() bool {
		_, err := syscall.Read(fd, make([]byte, 1))
		return err == syscall.ECONNRESET
	}, 5*time.Second, 10*time.Millisecond)
}

// fakeRequest is a held SYN, and what became of it.
type fakeRequest struct {
	request
	far      *net.TCPConn // the container's end, once accepted
	rejected chan error
	accepted chan struct{}
}

func newFakeRequest(t *testing.T, ctx context.Context, dst string) *fakeRequest {
	far, near := tcpPair(t)
	r := &fakeRequest{far: far, rejected: make(chan error, 1), accepted: make(chan struct{})}
	r.request = request{
		src: netip.MustParseAddrPort("10.0.2.100:5555"), dst: netip.MustParseAddrPort(dst), ctx: ctx,
		accept: func(context.Context) (flowConn, error) {
			close(r.accepted)
			return near, nil
		},
		reject: func(err error) { r.rejected <- err },
	}
	return r
}

// The container is answered as the dial was, and not before.
func TestTCPOutboundDialsFirst(t *testing.T) {
	e := newTestEngine(t, nil)
	answer := make(chan error)
	far, near := tcpPair(t)
	dialled := make(chan string, 1)
	e.dialHost = func(_ context.Context, dst netip.AddrPort) (flowConn, error) {
		dialled <- dst.String()
		if err := <-answer; err != nil {
			return nil, err
		}
		return near, nil
	}

	for _, errno := range []error{syscall.ECONNREFUSED, syscall.EHOSTUNREACH, syscall.ETIMEDOUT} {
		r := newFakeRequest(t, t.Context(), "198.51.100.1:80")
		go e.serveRequest(r.request)
		require.Equal(t, "198.51.100.1:80", <-dialled)
		answer <- refused("connect", errno)
		require.ErrorIs(t, <-r.rejected, errno)
	}

	r := newFakeRequest(t, t.Context(), "169.254.1.2:80") // the alias
	go e.serveRequest(r.request)
	require.Equal(t, "192.0.2.10:80", <-dialled)
	select {
	case <-r.accepted:
		require.Fail(t, "accepted before the dial was")
	case <-time.After(20 * time.Millisecond):
	}
	answer <- nil
	<-r.accepted
	_, err := r.far.Write([]byte("ping"))
	require.NoError(t, err)
	got := make([]byte, 4)
	_, err = io.ReadFull(far, got)
	require.NoError(t, err)
	require.Equal(t, "ping", string(got))
	require.EqualValues(t, 1, e.outbound.active.Load())
	require.NoError(t, far.Close())
	require.NoError(t, r.far.Close())
	require.Eventually(t, func() bool { return e.outbound.active.Load() == 0 }, 5*time.Second, time.Millisecond)
}

// A container that gives up, or reuses the ports, ends the dial for them.
func TestTCPOutboundGivenUp(t *testing.T) {
	e := newTestEngine(t, nil)
	dialling := make(chan struct{})
	e.dialHost = func(ctx context.Context, _ netip.AddrPort) (flowConn, error) {
		close(dialling)
		<-ctx.Done()
		return nil, ctx.Err()
	}
	ctx, cancel := context.WithCancel(t.Context())
	r := newFakeRequest(t, ctx, "198.51.100.1:80")
	go e.serveRequest(r.request)
	<-dialling
	cancel()
	require.ErrorIs(t, <-r.rejected, context.Canceled)

	e.close()
	r = newFakeRequest(t, t.Context(), "198.51.100.1:80")
	e.serveRequest(r.request)
	require.Error(t, <-r.rejected)
}
