package main

import (
	"context"
	"fmt"
	"os/exec"
	"strconv"
)

// gofwd with one of its data paths.
type gofwd struct {
	column   string
	datapath string
	mtu      int // 0: its default
}

func (g gofwd) name() string { return g.column }

func (g gofwd) path() (string, error) { return lookPath("GOFWD", "gofwd") }

func (g gofwd) find() (string, error) {
	path, err := g.path()
	if err != nil {
		return "", err
	}
	return firstLine(path, "version")
}

func (gofwd) carries(way, string, int) bool { return true }

func (g gofwd) start(ctx context.Context, s *site) error {
	path, err := g.path()
	if err != nil {
		return err
	}
	if err := s.newContainer(ctx); err != nil {
		return err
	}
	argv := []string{
		path, "attach", "--netns", s.container.path, "--name", s.container.name,
		"--datapath", g.datapath, "--log-level", "error",
	}
	if g.mtu != 0 {
		argv = append(argv, "--mtu", strconv.Itoa(g.mtu))
	}
	for _, p := range s.bed.tcpPorts() {
		argv = append(argv, "-p", fmt.Sprintf("%d:%d", p, p))
	}
	for _, p := range publishedUDP {
		argv = append(argv, "-p", fmt.Sprintf("%d:%d/udp", p, p))
	}
	argv = append(argv, "-T", ports(outTCP), "-U", ports(outUDP))
	return s.startHelper(s.host, nil, nil, argv...)
}

func (g gofwd) addPort(ctx context.Context, s *site, port int) error {
	path, err := g.path()
	if err != nil {
		return err
	}
	out, err := exec.CommandContext(ctx, path, "ports", "add", "--name", s.container.name, fmt.Sprintf("%d:%d", port, port)).CombinedOutput()
	if err != nil {
		return fmt.Errorf("gofwd ports add: %w: %s", err, out)
	}
	return nil
}
