package pesto

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"syscall"
	"time"

	"github.com/gofwd/gofwd/forward/control"
)

const (
	// answerTimeout is how long a server may take to send its tables, and to
	// answer; a change of thousands of ports takes a second.
	answerTimeout = 30 * time.Second
	// maxAnswer bounds the answer, which is one error at most.
	maxAnswer = 64 << 10
)

// Client is a conversation with a server: one look, and one change at most. It is
// for one goroutine.
type Client struct {
	conn *net.UnixConn
	// Tables are what the server has, for the caller to change.
	Tables []Table
}

// Dial asks the server at path for its tables. ctx bounds that. The caller closes
// the Client.
func Dial(ctx context.Context, path string) (*Client, error) {
	conn, err := new(net.Dialer).DialContext(ctx, "unix", path)
	if err != nil {
		return nil, err
	}
	c := &Client{conn: conn.(*net.UnixConn)}
	_ = conn.SetDeadline(time.Now().Add(answerTimeout))
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	if c.Tables, err = readTables(bufio.NewReader(conn)); err != nil {
		conn.Close()
		return nil, fmt.Errorf("ask %s: %w", path, err)
	}
	return c, nil
}

// Table returns table pif, nil if the server has none.
func (c *Client) Table(pif PIF) *Table {
	for i := range c.Tables {
		if c.Tables[i].PIF == pif {
			return &c.Tables[i]
		}
	}
	return nil
}

// errRefused is all that pasta lets us know.
var errRefused = errors.New("the server refused, and its log says why")

// Update makes c.Tables those of the server, all of it or nothing. It reports
// whether the server has acknowledged that: pasta doesn't, and may not have bound
// what was added. A refusal with a reason is a [control.Failure].
func (c *Client) Update() (acknowledged bool, err error) {
	_ = c.conn.SetDeadline(time.Now().Add(answerTimeout))
	err = writeRules(c.conn, c.Tables)
	if err == nil {
		err = c.conn.CloseWrite()
	}
	// A server that has had enough before the end may have said why.
	answer, readErr := io.ReadAll(io.LimitReader(c.conn, maxAnswer))
	if err == nil {
		err = readErr
	}
	switch {
	case len(answer) > 0:
		return parseAnswer(answer)
	case errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE):
		return false, fmt.Errorf("change forwards: %w", errRefused)
	case err != nil:
		return false, fmt.Errorf("change forwards: %w", err)
	}
	return false, nil
}

func parseAnswer(b []byte) (acknowledged bool, err error) {
	var f control.Failure
	if err := json.Unmarshal(b, &f); err != nil {
		return false, fmt.Errorf("read the answer: %w", err)
	}
	if f.Message != "" {
		return true, f
	}
	return true, nil
}

// Close ends the conversation. A server that has had no Update changes nothing.
func (c *Client) Close() error { return c.conn.Close() }
