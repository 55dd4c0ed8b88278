package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/gofwd/gofwd/forward"
	"github.com/gofwd/gofwd/forward/control"
)

// client speaks to the control socket of one instance. The API is described in
// forward/control/openapi.yaml.
type client struct {
	name string // of the instance
	http *http.Client
	pid  int // of the process that answers; known after the first request
}

// answerTimeout is how long an instance may take to answer; a change of its
// forwards takes milliseconds.
const answerTimeout = 30 * time.Second

func newClient(name, socket string) *client {
	c := &client{name: name}
	c.http = &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			conn, err := new(net.Dialer).DialContext(ctx, "unix", socket)
			if err == nil {
				c.pid = peerPID(conn)
			}
			return conn, err
		},
	}}
	return c
}

// openClient returns a client for the instance called name, or if that is "" for
// the only one that runs.
func openClient(name string) (*client, error) {
	dir, err := runtimeDir()
	if err != nil {
		return nil, err
	}
	if name == "" {
		if name, err = onlyInstance(dir); err != nil {
			return nil, err
		}
	}
	if !validName(name) {
		return nil, fmt.Errorf("--name %q: not a name; gofwd status lists those that there are", name)
	}
	return newClient(name, filepath.Join(dir, name+socketSuffix)), nil
}

func onlyInstance(dir string) (string, error) {
	names, err := instanceNames(dir)
	if err != nil {
		return "", err
	}
	var alive []string
	for _, n := range names {
		if _, there := socketHolder(filepath.Join(dir, n+socketSuffix)); there {
			alive = append(alive, n)
		}
	}
	switch len(alive) {
	case 0:
		return "", errors.New("no gofwd runs")
	case 1:
		return alive[0], nil
	}
	return "", &hintedError{fmt.Errorf("several instances of gofwd run: %s", strings.Join(alive, ", ")), "choose one with --name"}
}

// open makes a request, and returns the body of an answer that is no error.
func (c *client) open(ctx context.Context, method, path string, in any) (io.ReadCloser, error) {
	var body io.Reader
	if in != nil {
		b, err := json.Marshal(in)
		if err != nil {
			return nil, err
		}
		body = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://gofwd"+path, body)
	if err != nil {
		return nil, err
	}
	resp, err := c.http.Do(req)
	if err != nil {
		err = errors.Unwrap(err) // a url.Error, and there is no such URL
		if isNobodyThere(err) {
			return nil, &hintedError{fmt.Errorf("no gofwd named %q runs", c.name), "gofwd status lists those that do"}
		}
		return nil, fmt.Errorf("ask %s: %w", c.name, err)
	}
	if resp.StatusCode < 300 {
		return resp.Body, nil
	}
	defer resp.Body.Close()
	return nil, explain(readFailure(resp))
}

// readFailure returns the error that an answer is.
func readFailure(resp *http.Response) (f control.Failure) {
	if err := json.NewDecoder(resp.Body).Decode(&f); err != nil || f.Message == "" {
		f.Message = resp.Status
	}
	return f
}

// explain says about a failure what the instance could not: who has the port.
func explain(f control.Failure) error {
	if b := f.Busy; b != nil {
		return forward.NameHolder(&forward.Error{Op: b.Op, Rule: b.Rule, Err: unix.EADDRINUSE})
	}
	return f
}

// do makes a request, and puts the answer into out unless that is nil.
func (c *client) do(ctx context.Context, method, path string, in, out any) error {
	ctx, cancel := context.WithTimeout(ctx, answerTimeout)
	defer cancel()
	body, err := c.open(ctx, method, path, in)
	if err != nil {
		return err
	}
	defer body.Close()
	if out == nil {
		return nil
	}
	if err := json.NewDecoder(body).Decode(out); err != nil {
		return fmt.Errorf("read the answer of %s: %w", c.name, err)
	}
	return nil
}

// nameFlag adds --name, which chooses the instance.
func nameFlag(cmd *cobra.Command, name *string) {
	cmd.Flags().StringVar(name, "name", "", "`NAME`: the instance; not needed where only one runs")
	_ = cmd.RegisterFlagCompletionFunc("name", func(cmd *cobra.Command, _ []string, word string) ([]string, cobra.ShellCompDirective) {
		return completeInstances(cmd, nil, word)
	})
}
