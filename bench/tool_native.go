package main

import (
	"context"
	"os"
	"strings"
)

// native is no tool at all: the server runs on the host itself. It shows what
// the machine, the kernel and the load generators can do.
type native struct{}

func (native) name() string { return toolNative }

func (native) find() (string, error) {
	release, err := os.ReadFile("/proc/sys/kernel/osrelease")
	return "Linux " + strings.TrimSpace(string(release)), err
}

func (native) carries(way, string, int) bool { return true }

func (native) start(ctx context.Context, s *site) error { return s.setContainer(ctx, s.host) }
