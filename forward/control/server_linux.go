package control

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/gofwd/gofwd/forward"
)

const (
	// Timeout is how long a client may take to send a request, and to take a
	// piece of the answer.
	Timeout = 10 * time.Second
	// MaxConns is how many connections a Server has at once.
	MaxConns = 512
	// maxBusy is how many requests are answered at once; others are told so.
	maxBusy = MaxConns - 64
	// idleTimeout is how long a connection may rest between two requests.
	idleTimeout = time.Minute
)

// Config says what a [Server] serves. Forwarder is required.
type Config struct {
	Forwarder *forward.Forwarder
	// Version is that of the program, for /v1/info.
	Version string
	// PID is a process in the namespace, for /v1/info; 0 if there is none.
	PID int
	// Reload, if not nil, is POST /v1/reload: it reads the program's
	// configuration anew, and applies it.
	Reload func() error
	// Logger takes what an operator must know; nil discards it.
	Logger *slog.Logger
}

// Server answers clients on UNIX sockets.
type Server struct {
	http *http.Server
	log  *slog.Logger

	mu    sync.Mutex // guards the following fields, and those of conns that are said to be
	conns map[*conn]struct{}
	busy  int // how many of them are
}

// NewServer returns a Server that listens nowhere yet.
func NewServer(cfg Config) *Server {
	s := &Server{log: cfg.Logger, conns: make(map[*conn]struct{})}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	base, end := context.WithCancel(context.Background())
	s.http = &http.Server{
		Handler:        newHandler(cfg),
		ReadTimeout:    Timeout,
		WriteTimeout:   Timeout,
		IdleTimeout:    idleTimeout,
		MaxHeaderBytes: 16 << 10,
		ErrorLog:       slog.NewLogLogger(s.log.Handler(), slog.LevelDebug),
		BaseContext:    func(net.Listener) context.Context { return base },
		ConnContext:    func(ctx context.Context, c net.Conn) context.Context { return context.WithValue(ctx, connKey{}, c) },
	}
	s.http.RegisterOnShutdown(end)
	return s
}

// Serve answers clients of l, which it closes, until Close; then the error is
// [http.ErrServerClosed].
func (s *Server) Serve(l *net.UnixListener) error {
	users, err := NewUserListener(l, s.log)
	if err != nil {
		l.Close()
		return fmt.Errorf("serve control socket: %w", err)
	}
	return s.http.Serve(&listener{users, s})
}

// Close closes the listeners and all connections, and ends all leases. It is
// idempotent, and waits a second at most for requests under way.
func (s *Server) Close() error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	if err := s.http.Shutdown(ctx); errors.Is(err, context.DeadlineExceeded) {
		return s.http.Close()
	} else if err != nil {
		return err
	}
	return nil
}

// usersOf returns the users that may use l: our own, and the one that made it
// listen. The second may be another, who gave us the socket, or have no number in
// our user namespace; then his clients don't either, and the mode of the socket
// has to keep the others away.
func usersOf(l *net.UnixListener) ([2]uint32, error) {
	own := uint32(os.Geteuid())
	owner, err := peerUser(l)
	return [2]uint32{own, owner}, err
}

// peerUser returns who is at the other end of a socket, or who made it listen:
// that is whom its clients see at their other end (SO_PEERCRED in unix(7)).
func peerUser(c syscall.Conn) (uint32, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *unix.Ucred
	var credErr error
	if err := raw.Control(func(fd uintptr) {
		cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil {
		return 0, err
	}
	if credErr != nil {
		return 0, os.NewSyscallError("getsockopt", credErr)
	}
	return cred.Uid, nil
}

// UserListener accepts clients of the right user, and hangs up on others: our own
// user, or the one who made the socket listen.
type UserListener struct {
	*net.UnixListener
	uids [2]uint32
	log  *slog.Logger
}

// NewUserListener returns l for clients of the right user. log is told of others;
// nil discards that.
func NewUserListener(l *net.UnixListener, log *slog.Logger) (*UserListener, error) {
	uids, err := usersOf(l)
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	return &UserListener{l, uids, log}, err
}

// AcceptUnix waits for a client of the right user.
func (l *UserListener) AcceptUnix() (*net.UnixConn, error) {
	for {
		c, err := l.UnixListener.AcceptUnix()
		if err != nil {
			return nil, err
		}
		uid, err := peerUser(c)
		if err == nil && (uid == l.uids[0] || uid == l.uids[1]) {
			return c, nil
		}
		l.log.Warn("a client of another user was turned away", "uid", uid, "err", err)
		c.Close()
	}
}

// Accept is AcceptUnix.
func (l *UserListener) Accept() (net.Conn, error) {
	c, err := l.AcceptUnix()
	if err != nil {
		return nil, err // no typed nil
	}
	return c, nil
}

// listener makes its connections known to the server.
type listener struct {
	*UserListener
	server *Server
}

func (l *listener) Accept() (net.Conn, error) {
	c, err := l.AcceptUnix()
	if err != nil {
		return nil, err
	}
	return l.server.enter(c), nil
}

// conn is a client's connection, and the descriptors that came by it.
type conn struct {
	*net.UnixConn
	server *Server

	// The server's mu guards these.
	since time.Time
	busy  bool // a complete request is being answered
	gone  bool // it has made way

	mu    sync.Mutex // guards files
	files []*os.File
}

// enter adds a connection. If they are too many, the oldest that isn't busy goes.
func (s *Server) enter(u *net.UnixConn) *conn {
	c := &conn{UnixConn: u, server: s, since: time.Now()}
	var oldest *conn
	s.mu.Lock()
	if len(s.conns) >= MaxConns {
		for other := range s.conns {
			if (oldest == nil || other.since.Before(oldest.since)) && !other.busy {
				oldest = other
			}
		}
	}
	if oldest != nil {
		oldest.gone = true
	}
	s.conns[c] = struct{}{}
	s.mu.Unlock()
	if oldest != nil {
		oldest.Close()
	}
	return c
}

var errTooMany = fmt.Errorf("%d requests are being answered, open leases, event streams and captures among them, and no more can be: end some", maxBusy)

// begin says that a complete request is to be answered, if that can be. It may be called
// on nil, for a connection that isn't ours.
func (c *conn) begin() error {
	if c == nil {
		return nil
	}
	s := c.server
	s.mu.Lock()
	defer s.mu.Unlock()
	if c.busy {
		return nil
	}
	if s.busy >= maxBusy || c.gone {
		return errTooMany
	}
	c.busy = true
	s.busy++
	return nil
}

// end says that no request is being answered. The clock of the connection starts anew.
func (c *conn) end() {
	s := c.server
	s.mu.Lock()
	defer s.mu.Unlock()
	c.since = time.Now()
	if c.busy {
		c.busy = false
		s.busy--
	}
}

// maxFiles is how many descriptors a client may have sent that no request of his
// has asked for; the kernel's limit for one message is 253.
const maxFiles = 64

// Read reads, and keeps the descriptors that come along (SCM_RIGHTS in unix(7)).
func (c *conn) Read(b []byte) (int, error) {
	if len(b) == 0 {
		return 0, nil
	}
	oob := make([]byte, unix.CmsgSpace(maxFiles*4))
	n, oobn, _, _, err := c.ReadMsgUnix(b, oob)
	if oobn > 0 {
		c.keep(oob[:oobn])
	}
	if n == 0 && err == nil {
		err = io.EOF
	}
	return max(n, 0), err // which is -1 with an error
}

func (c *conn) keep(oob []byte) {
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, m := range messages {
		fds, err := unix.ParseUnixRights(&m)
		if err != nil {
			continue
		}
		for _, fd := range fds {
			if len(c.files) == maxFiles {
				unix.Close(fd)
				continue
			}
			unix.CloseOnExec(fd)
			c.files = append(c.files, os.NewFile(uintptr(fd), "descriptor from a client"))
		}
	}
}

// takeFiles returns the descriptors that have come. The caller closes them.
func (c *conn) takeFiles() []*os.File {
	c.mu.Lock()
	defer c.mu.Unlock()
	files := c.files
	c.files = nil
	return files
}

func (c *conn) Close() error {
	c.server.mu.Lock()
	delete(c.server.conns, c)
	c.server.mu.Unlock()
	for _, f := range c.takeFiles() {
		f.Close()
	}
	return c.UnixConn.Close()
}

// waitHangup calls gone when the other end of a socket has been closed or will write no
// more, whatever is still to be read, or when f is closed.
func waitHangup(f *os.File, gone func()) {
	defer gone()
	raw, err := f.SyscallConn()
	if err != nil {
		return
	}
	_ = raw.Read(func(fd uintptr) bool {
		p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLRDHUP}}
		n, err := unix.Poll(p, 0)
		return n > 0 || err != nil && err != unix.EINTR
	})
}

type connKey struct{}

// connOf returns the connection that a request came by, nil if it isn't ours.
func connOf(ctx context.Context) *conn {
	c, _ := ctx.Value(connKey{}).(*conn)
	return c
}
