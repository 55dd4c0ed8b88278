package main

import (
	"context"
	"fmt"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
)

// pasta as Podman starts it, with the ports of the run.
type pasta struct {
	column string
	mtu    int // 0: its default, 65520
}

func (p pasta) name() string { return p.column }

func (p pasta) path() (string, error) { return lookPath("PASTA", "pasta") }

func (p pasta) find() (string, error) {
	path, err := p.path()
	if err != nil {
		return "", err
	}
	return firstLine(path, "--version")
}

func (pasta) carries(way, string, int) bool { return true }

func (p pasta) start(ctx context.Context, s *site) error {
	path, err := p.path()
	if err != nil {
		return err
	}
	if err := s.newContainer(ctx); err != nil {
		return err
	}
	argv := []string{
		path, "--foreground", "--quiet", "--config-net", "--netns", s.container.path,
		"-t", ports(s.bed.tcpPorts()), "-u", ports(publishedUDP), "-T", ports(outTCP), "-U", ports(outUDP),
		"--conf-path", p.socket(s),
	}
	if p.mtu != 0 {
		argv = append(argv, "--mtu", strconv.Itoa(p.mtu))
	}
	return s.startHelper(s.host, nil, nil, argv...)
}

func (pasta) socket(s *site) string { return "/run/" + s.container.name + ".sock" }

// addPort uses pesto, which comes with pasta.
func (p pasta) addPort(ctx context.Context, s *site, port int) error {
	path, err := p.path()
	if err != nil {
		return err
	}
	pesto := filepath.Join(filepath.Dir(path), "pesto")
	out, err := exec.CommandContext(ctx, pesto, "--add", "-t", strconv.Itoa(port), p.socket(s)).CombinedOutput()
	if err != nil {
		return fmt.Errorf("pesto: %w: %s", err, out)
	}
	return nil
}

// ports writes ports as pasta's -t does, and gofwd's: each by itself, but a row
// of many as a range: pasta takes no more than 255 rules.
func ports(numbers []int) string {
	var texts []string
	for len(numbers) > 0 {
		n := 1
		for n < len(numbers) && numbers[n] == numbers[0]+n {
			n++
		}
		if n < 10 {
			n = 1
		}
		text := strconv.Itoa(numbers[0])
		if n > 1 {
			text += "-" + strconv.Itoa(numbers[n-1])
		}
		texts, numbers = append(texts, text), numbers[n:]
	}
	return strings.Join(texts, ",")
}
