package main

import (
	"context"
	"strconv"
)

// fdbased is gVisor's netstack on a plain tap with its stock link endpoint: what
// a Go program gets that does no more than gVisor's own examples. The program is
// in bench/fdbased.
type fdbased struct{}

func (fdbased) name() string { return toolFdbased }

func (fdbased) path() (string, error) { return lookPath("FDBASED", "fdbased") }

func (t fdbased) find() (string, error) {
	path, err := t.path()
	if err != nil {
		return "", err
	}
	return firstLine(path, "-version")
}

func (fdbased) carries(w way, proto string, ip int) bool {
	return proto == "tcp" && ip == 4 && w != hostLoopback
}

func (t fdbased) start(ctx context.Context, s *site) error {
	path, err := t.path()
	if err != nil {
		return err
	}
	if err := s.newContainer(ctx); err != nil {
		return err
	}
	argv := []string{path, "-netns", s.container.path, "-mtu", "1500"}
	for _, p := range publishedTCP {
		argv = append(argv, "-p", strconv.Itoa(p))
	}
	return s.startHelper(s.host, nil, nil, argv...)
}
