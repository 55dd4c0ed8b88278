package forward

import (
	"bytes"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/gofwd/gofwd/netnsutil"
)

// A client comes again from the same address and port at once, with another
// initial sequence number, while the connection before has just ended: by FIN of
// the client, which leaves a TIME_WAIT of ours in the namespace; by FIN of the
// server, which leaves the server's there; by RST.
func TestClientComesAgainFromTheSamePort(t *testing.T) {
	remote := newLAN(t)
	within(t, remote, func() { // or the client itself could not
		require.NoError(t, os.WriteFile("/proc/sys/net/ipv4/tcp_max_tw_buckets", []byte("0"), 0))
	})
	ns := newNS(t)
	seen := make(chan string, 1)
	port := serveTCP(t, ns, ":0", func(c net.Conn) {
		seen <- c.RemoteAddr().String()
		b := make([]byte, 1)
		if n, _ := c.Read(b); n == 0 || b[0] != 's' { // else the server closes first
			io.Copy(io.Discard, c)
		}
		c.Close()
	})
	f, _ := start(t, Config{NetNS: ns, Datapath: Kernel, Rules: publishTCP(8080, port)})
	for _, addrs := range [][2]string{{remote4, host4}, {remote6, host6}} {
		src := netip.MustParseAddrPort(net.JoinHostPort(addrs[0], "40000"))
		for i, how := range []string{"client", "server", "reset", "client", "reset", "server", "server", "client", "client"} {
			var c *net.TCPConn
			within(t, remote, func() {
				reuse := withOption(unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
				d := net.Dialer{Timeout: 5 * time.Second, LocalAddr: net.TCPAddrFromAddrPort(src), Control: reuse.Control}
				conn, err := d.Dial("tcp", net.JoinHostPort(addrs[1], "8080"))
				require.NoError(t, err, "%d: %s", i, how)
				c = conn.(*net.TCPConn)
			})
			c.SetDeadline(time.Now().Add(5 * time.Second))
			require.Equal(t, src.String(), next(t, seen), "%d: %s", i, how)
			switch how {
			case "client":
				require.NoError(t, c.CloseWrite())
			case "server":
				_, err := c.Write([]byte("s"))
				require.NoError(t, err)
			case "reset":
				require.NoError(t, c.SetLinger(0))
			}
			if how != "reset" {
				_, err := c.Read(make([]byte, 1))
				require.ErrorIs(t, err, io.EOF, "%d: %s", i, how)
			}
			c.Close()
			// The client's last packet and the end of the flow may cross.
			require.Eventually(t, func() bool { return f.Status().Rules[0].Active == 0 }, 5*time.Second, time.Millisecond)
		}
	}
}

// deadPeer makes a connection of a remote client to a server in the namespace, and
// cuts the client's cable. It returns the server's end.
func deadPeer(t *testing.T, host string, prepare func(f *Forwarder)) net.Conn {
	t.Helper()
	remote := newLAN(t)
	ns := newNS(t)
	conns := make(chan net.Conn, 1)
	port := serveTCP(t, ns, ":0", func(c net.Conn) { conns <- c })
	f, _ := start(t, Config{NetNS: ns, Datapath: Kernel, Rules: publishTCP(8080, port)})
	prepare(f)
	within(t, remote, func() {
		c, err := net.Dial("tcp", net.JoinHostPort(host, "8080"))
		require.NoError(t, err)
		t.Cleanup(func() { c.Close() })
	})
	server := next(t, conns)
	t.Cleanup(func() { server.Close() })
	within(t, remote, func() { ip(t, "link set lan0 down") })
	server.SetDeadline(time.Now().Add(30 * time.Second))
	return server
}

// A client that is gone without a word is found by keepalive, and the server sees
// a reset.
func TestKeepAliveEndsTheFlowOfADeadClient(t *testing.T) {
	for _, host := range []string{host4, host6} {
		t.Run(host, func(t *testing.T) {
			server := deadPeer(t, host, func(f *Forwarder) {
				f.tcp.listenersOf(f.rules.rules[0], func(l *tcpListener) {
					control(t, l, func(fd int) error { // accepted sockets inherit it
						return setOptions(fd, []option{
							{unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, 1},
							{unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, 1},
							{unix.IPPROTO_TCP, unix.TCP_KEEPCNT, 1},
						})
					})
				})
			})
			_, err := server.Read(make([]byte, 1))
			require.ErrorIs(t, err, unix.ECONNRESET)
		})
	}
}

// Kernel: there is no keepalive while data waits to be acknowledged; the flow of a
// client that is gone ends by tcp_retries2 then (tcp(7)).
func TestRetriesEndTheFlowOfADeadClient(t *testing.T) {
	const retries2 = "/proc/sys/net/ipv4/tcp_retries2"
	before, err := os.ReadFile(retries2)
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(retries2, []byte("2"), 0))
	defer os.WriteFile(retries2, before, 0)
	for _, host := range []string{host4, host6} {
		t.Run(host, func(t *testing.T) {
			server := deadPeer(t, host, func(*Forwarder) {})
			_, err := server.Write([]byte("are you there?"))
			require.NoError(t, err)
			_, err = server.Read(make([]byte, 1))
			require.ErrorIs(t, err, unix.ECONNRESET)
		})
	}
}

// Kernel: TCP_USER_TIMEOUT ends also the connection to a peer that answers, and has
// a full receive buffer (tcp_probe_timer in net/ipv4/tcp_timer.c), and without it
// such a peer may take its time. That is why it is not set: see keepAliveOptions.
func TestUserTimeoutEndsSlowReaders(t *testing.T) {
	const timeout = 300 * time.Millisecond
	write := func(options ...option) error {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		require.NoError(t, err)
		defer l.Close()
		c, err := net.Dial("tcp", l.Addr().String())
		require.NoError(t, err)
		defer c.Close()
		reader, err := l.Accept()
		require.NoError(t, err)
		defer reader.Close()
		control(t, c.(*net.TCPConn), func(fd int) error { return setOptions(fd, options) })
		c.SetWriteDeadline(time.Now().Add(8 * timeout))
		for buf := make([]byte, 1<<20); err == nil; {
			_, err = c.Write(buf)
		}
		return err
	}
	var with, without error
	var wg sync.WaitGroup
	wg.Go(func() { without = write() })
	with = write(option{unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(timeout.Milliseconds())})
	wg.Wait()
	require.ErrorIs(t, with, syscall.ETIMEDOUT)
	require.ErrorIs(t, without, os.ErrDeadlineExceeded)
}

// syncBuffer is a buffer for a logger.
type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *syncBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *syncBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// fillDescriptors leaves that many descriptors for new files until the limit, which
// it returns, is set again.
func fillDescriptors(t *testing.T, left uint64) (limit unix.Rlimit) {
	t.Helper()
	require.NoError(t, unix.Getrlimit(unix.RLIMIT_NOFILE, &limit))
	t.Cleanup(func() { unix.Setrlimit(unix.RLIMIT_NOFILE, &limit) })
	last, err := unix.FcntlInt(0, unix.F_DUPFD_CLOEXEC, 0) // the lowest that is free
	require.NoError(t, err)
	unix.Close(last)
	low := limit
	low.Cur = uint64(last) + left
	require.NoError(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &low))
	return limit
}

// Where there are no descriptors left, new clients are refused at once, which is
// logged with what to do, and those that are there go on.
func TestNoDescriptorsLeft(t *testing.T) {
	onBothPaths(t, func(t *testing.T, path Datapath) {
		remote := newLAN(t)
		ns := newNS(t)
		port := echoServer(t, ns)
		var log syncBuffer
		f, _ := start(t, Config{
			NetNS: ns, Datapath: path, Rules: publishTCP(8080, port), Logger: slog.New(slog.NewTextHandler(&log, nil)),
		})
		dial := func(host string) (c net.Conn, err error) {
			within(t, remote, func() { c, err = net.Dial("tcp", net.JoinHostPort(host, "8080")) })
			return c, err
		}
		var old []net.Conn
		for _, host := range []string{host4, host6} {
			c, err := dial(host)
			require.NoError(t, err)
			defer c.Close()
			require.NoError(t, echo(c))
			old = append(old, c)
		}
		// The next client's socket is one of ours, and made before.
		fd := -1
		within(t, remote, func() {
			var err error
			fd, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
			require.NoError(t, err)
		})
		defer unix.Close(fd)
		require.NoError(t, unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 5}))
		limit := fillDescriptors(t, 0)
		require.NoError(t, unix.Connect(fd, toSockaddr(netip.MustParseAddrPort(net.JoinHostPort(host4, "8080")))))
		if path == Kernel {
			_, err := unix.Read(fd, make([]byte, 1))
			require.ErrorIs(t, err, unix.ECONNRESET)
			require.Eventually(t, func() bool { return f.Status().Rules[0].Refused == 1 }, time.Second, time.Millisecond)
			require.Contains(t, log.String(), "too many open files")
			require.Contains(t, log.String(), "raise it (ulimit -n, LimitNOFILE= in a unit)")
		}
		for _, c := range old {
			require.NoError(t, echo(c))
		}
		require.NoError(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &limit))
		if path == Tap { // it waited
			_, err := unix.Write(fd, []byte("x"))
			require.NoError(t, err)
			_, err = unix.Read(fd, make([]byte, 1))
			require.NoError(t, err)
			require.NoError(t, unix.Shutdown(fd, unix.SHUT_RDWR))
		}
		c, err := dial(host6)
		require.NoError(t, err)
		defer c.Close()
		require.NoError(t, echo(c))
		require.Eventually(t, func() bool { return f.Status().Rules[0].Active == 3 }, 5*time.Second, time.Millisecond)
	})
}

// A connection of the container's for which there is a descriptor to dial, but none
// for the socket that its SYN becomes, ends at once and leaves no descriptor taken.
func TestNoDescriptorForAReleasedSYN(t *testing.T) {
	remote := newLAN(t)
	ns := newNS(t)
	f, _ := start(t, Config{NetNS: ns, Datapath: Kernel})
	for _, addr := range []string{remote4, remote6} {
		var l net.Listener // a server that accepts would want a descriptor, too
		within(t, remote, func() {
			var err error
			l, err = net.Listen("tcp", net.JoinHostPort(addr, "0"))
			require.NoError(t, err)
		})
		defer l.Close()
		dst := netip.MustParseAddrPort(l.Addr().String())
		err := error(unix.ECONNREFUSED)
		for try := 0; errors.Is(err, unix.ECONNREFUSED) && try < 100; try++ { // somebody else had the last one
			err = callWithOneDescriptor(t, ns, dst, func() {
				require.Eventually(t, func() bool { return f.Status().Outbound.Active == 0 }, releaseTimeout/2, time.Millisecond)
			})
		}
		require.ErrorIs(t, err, unix.ECONNRESET)
	}
}

// callWithOneDescriptor connects to dst from ns, while there is one descriptor left,
// and returns what the caller sees; then is called before there are more again.
func callWithOneDescriptor(t *testing.T, ns *netnsutil.NS, dst netip.AddrPort, then func()) error {
	t.Helper()
	family := unix.AF_INET6
	if dst.Addr().Is4() {
		family = unix.AF_INET
	}
	var fd int
	within(t, ns, func() {
		var err error
		fd, err = unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		require.NoError(t, err)
	})
	defer unix.Close(fd)
	require.NoError(t, unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 5}))
	limit := fillDescriptors(t, 1)
	defer unix.Setrlimit(unix.RLIMIT_NOFILE, &limit)
	if err := unix.Connect(fd, toSockaddr(dst)); err != nil {
		return err
	}
	_, err := unix.Read(fd, make([]byte, 1))
	then()
	return err
}

// Thousands of flows, some of them with a receiver that does not read, take little
// memory, and leave the user's other programs their share of pipes. A flow takes
// four descriptors here, two of them gofwd's.
func TestManyFlows(t *testing.T) {
	var limit unix.Rlimit
	require.NoError(t, unix.Getrlimit(unix.RLIMIT_NOFILE, &limit))
	flows := int(min(10_000, (limit.Cur-1000)/4))
	const stuck = 200 // of which each could hold a pipe in both directions
	remote := newLAN(t)
	ns := newNS(t)
	within(t, ns, func() {
		require.NoError(t, os.WriteFile("/proc/sys/net/ipv4/tcp_wmem", []byte("4096 16384 65536"), 0))
	})
	var mu sync.Mutex
	var servers []net.Conn
	ln := make(chan net.Listener, 1)
	within(t, ns, func() {
		l, err := net.Listen("tcp", ":0")
		require.NoError(t, err)
		ln <- l
	})
	l := <-ln
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			mu.Lock()
			servers = append(servers, c)
			mu.Unlock()
		}
	})
	defer func() {
		l.Close()
		wg.Wait()
		for _, c := range servers {
			c.Close()
		}
	}()
	f, _ := start(t, Config{NetNS: ns, Datapath: Kernel, Rules: publishTCP(8080, l.Addr().(*net.TCPAddr).AddrPort().Port())})
	var before, after runtime.MemStats
	runtime.GC()
	runtime.GC() // what finalizers of earlier tests have let go
	runtime.ReadMemStats(&before)
	var clients []net.Conn
	defer func() {
		for _, c := range clients {
			c.(*net.TCPConn).SetLinger(0)
			c.Close()
		}
	}()
	within(t, remote, func() {
		for i := range flows {
			c, err := net.Dial("tcp", net.JoinHostPort([]string{host4, host6}[i%2], "8080"))
			require.NoError(t, err)
			clients = append(clients, c)
		}
	})
	require.Eventually(t, func() bool { return f.Status().Rules[0].Active == int64(flows) }, 20*time.Second, 10*time.Millisecond)
	runtime.GC()
	runtime.ReadMemStats(&after)
	used := int64(after.HeapAlloc+after.StackInuse) - int64(before.HeapAlloc+before.StackInuse)
	require.Less(t, used/int64(flows), int64(8<<10), "bytes for a flow, the test's own ends included")

	buf := make([]byte, 256<<10)
	for _, c := range clients[:stuck] {
		c.SetWriteDeadline(time.Now().Add(5 * time.Millisecond))
		for {
			if _, err := c.Write(buf); err != nil {
				require.ErrorIs(t, err, os.ErrDeadlineExceeded)
				break
			}
		}
	}
	p := &f.tcp.splicer.pipes
	p.mu.Lock()
	pages, ration := p.pages, p.limit
	p.mu.Unlock()
	require.Greater(t, pages, stuck, "the test would show nothing")
	require.LessOrEqual(t, pages, ration)
	b, err := os.ReadFile("/proc/sys/fs/pipe-user-pages-soft")
	require.NoError(t, err)
	soft, err := strconv.Atoi(strings.TrimSpace(string(b)))
	require.NoError(t, err)
	require.LessOrEqual(t, ration, soft/2, "the other half is for the user's other programs")
}
