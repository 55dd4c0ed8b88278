package pesto

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/gofwd/gofwd/forward"
	"github.com/gofwd/gofwd/forward/control"
)

const (
	// patience is how long a client may make others wait: many times what
	// the two messages and a change take.
	patience = 250 * time.Millisecond
	// acceptRetry is when to try again after accept(2) failed: there may be
	// descriptors again.
	acceptRetry = 100 * time.Millisecond
	// drain is for how long connections of a rule that is removed go on: as
	// with pasta, until they end by themselves.
	drain = math.MaxInt64
)

// Config says what a [Server] serves. Forwarder is required.
type Config struct {
	Forwarder *forward.Forwarder
	// NoIPv4, NoIPv6, NoTCP and NoUDP are what the Forwarder does without.
	NoIPv4, NoIPv6, NoTCP, NoUDP bool
	// Logger takes what an operator must know; nil discards it.
	Logger *slog.Logger
}

// Server lets clients of one UNIX socket see and change forwards.
type Server struct {
	cfg Config
	log *slog.Logger

	wg     sync.WaitGroup
	closed chan struct{}

	mu    sync.Mutex             // guards the following field
	conns map[io.Closer]struct{} // listeners, too; nil when closed
}

// NewServer returns a Server that listens nowhere yet.
func NewServer(cfg Config) *Server {
	s := &Server{cfg: cfg, log: cfg.Logger, closed: make(chan struct{}), conns: make(map[io.Closer]struct{})}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	return s
}

// Serve answers clients of l, which it closes, until Close; then the error wraps
// [net.ErrClosed].
func (s *Server) Serve(l *net.UnixListener) error {
	defer l.Close()
	users, err := control.NewUserListener(l, s.log)
	if err != nil {
		return fmt.Errorf("serve pesto: %w", err)
	}
	if !s.enter(l) {
		return fmt.Errorf("serve pesto: %w", net.ErrClosed)
	}
	defer s.leave(l)
	for {
		c, err := users.AcceptUnix()
		if errors.Is(err, net.ErrClosed) {
			return fmt.Errorf("serve pesto: %w", err)
		}
		if err != nil {
			s.log.Warn("a client of pesto's was not accepted", "err", err)
			s.pause(acceptRetry, nil)
			continue
		}
		done := make(chan struct{})
		if !s.enter(c) {
			c.Close()
			continue // and learn the reason from l
		}
		go s.serve(c, done)
		s.pause(patience, done)
	}
}

// pause waits for a while, but no longer than until done, or Close.
func (s *Server) pause(d time.Duration, done <-chan struct{}) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-done:
	case <-s.closed:
	}
}

// enter takes note of something to be closed, unless it is too late.
func (s *Server) enter(c io.Closer) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.conns == nil {
		return false
	}
	s.conns[c] = struct{}{}
	s.wg.Add(1)
	return true
}

func (s *Server) leave(c io.Closer) {
	s.mu.Lock()
	delete(s.conns, c)
	s.mu.Unlock()
	s.wg.Done()
}

// Close closes the listener and all connections, and waits for what is under way.
// It is idempotent.
func (s *Server) Close() error {
	s.mu.Lock()
	if s.conns != nil {
		close(s.closed)
	}
	for c := range s.conns {
		c.Close()
	}
	s.conns = nil
	s.mu.Unlock()
	s.wg.Wait()
	return nil
}

// serve has one conversation, and closes done when the next may begin.
func (s *Server) serve(c *net.UnixConn, done chan<- struct{}) {
	defer s.leave(c)
	defer c.Close()
	defer close(done)
	_ = c.SetDeadline(time.Now().Add(control.Timeout))
	shown := s.show()
	if err := writeTables(c, shown.tables); err != nil {
		return // it has gone, or does not read
	}
	tables, err := readRules(bufio.NewReader(c))
	if errors.Is(err, io.EOF) || errors.Is(err, net.ErrClosed) || errors.Is(err, os.ErrDeadlineExceeded) {
		return // it has seen enough, or says nothing
	}
	if err == nil {
		err = s.apply(shown, tables)
	}
	var answer struct{ *control.Failure } // nil: an empty object
	if err != nil {
		s.log.Warn("a change by pesto is refused, nothing has changed", "err", err)
		f := control.NewFailure(err)
		answer.Failure = &f
	}
	_ = c.SetWriteDeadline(time.Now().Add(control.Timeout)) // the change may have taken its time
	_ = json.NewEncoder(c).Encode(answer)                   // it may have gone
}

// shown is what a client has been shown.
type shown struct {
	tables []Table
	ids    map[shownRule]int
}

type shownRule struct {
	pif  PIF
	rule Rule
}

// show returns the forwards as tables.
func (s *Server) show() shown {
	caps := allCaps
	for _, lack := range []struct {
		of  Caps
		yes bool
	}{{CapIPv4, s.cfg.NoIPv4}, {CapIPv6, s.cfg.NoIPv6}, {CapTCP, s.cfg.NoTCP}, {CapUDP, s.cfg.NoUDP}} {
		if lack.yes {
			caps &^= lack.of
		}
	}
	v := shown{
		tables: []Table{{PIF: Host, Name: "HOST", Caps: caps}, {PIF: Splice, Name: "SPLICE", Caps: caps}},
		ids:    make(map[shownRule]int),
	}
	for _, r := range s.cfg.Forwarder.Status().Rules {
		pif, rule, ok := FromForward(r.Rule)
		if !ok {
			continue
		}
		v.ids[shownRule{pif, rule}] = r.ID
		for i := range v.tables {
			if t := &v.tables[i]; t.PIF == pif {
				t.Rules = append(t.Rules, rule)
			}
		}
	}
	return v
}

// apply makes the change by which what was shown becomes tables. Tables that are
// not there stay as they are.
func (s *Server) apply(v shown, tables []Table) error {
	c := forward.Change{Drain: drain}
	seen := make(map[PIF]bool)
	for _, t := range tables {
		if seen[t.PIF] {
			return fmt.Errorf("table %d is there twice", t.PIF)
		}
		seen[t.PIF] = true
		left := make(map[Rule]bool, len(t.Rules))
		for _, rule := range t.Rules {
			if left[rule] {
				return fmt.Errorf("rule %s is there twice", rule)
			}
			left[rule] = true
			r, err := rule.Forward(t.PIF)
			if err != nil {
				return err
			}
			if _, old := v.ids[shownRule{t.PIF, rule}]; !old {
				c.Add = append(c.Add, r)
			}
		}
		for old, id := range v.ids {
			if old.pif == t.PIF && !left[old.rule] {
				c.Remove = append(c.Remove, id)
			}
		}
	}
	c.Remove = s.stillThere(c.Remove)
	if len(c.Add)+len(c.Remove) == 0 {
		return nil
	}
	_, err := s.cfg.Forwarder.Change(c)
	return err
}

// stillThere returns the ids of forwards that nobody else has removed meanwhile.
func (s *Server) stillThere(ids []int) []int {
	running := make(map[int]bool)
	for _, r := range s.cfg.Forwarder.Status().Rules {
		running[r.ID] = true
	}
	return slices.DeleteFunc(ids, func(id int) bool { return !running[id] })
}
