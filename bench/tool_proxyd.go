package main

import (
	"context"
	"fmt"
	"net"
	"os"
)

// socketProxyd is systemd-socket-proxyd(8) in the container's namespace, behind
// listeners that were made on the host, as a socket unit does it. It needs one
// process for each port, and forwards TCP only.
type socketProxyd struct{}

func (socketProxyd) name() string { return toolProxyd }

func (socketProxyd) path() (string, error) { return lookPath("SOCKET_PROXYD", "systemd-socket-proxyd") }

func (t socketProxyd) find() (string, error) {
	path, err := t.path()
	if err != nil {
		return "", err
	}
	return firstLine(path, "--version")
}

func (socketProxyd) carries(w way, proto string, _ int) bool { return w.inbound() && proto == "tcp" }

func (t socketProxyd) start(ctx context.Context, s *site) error {
	path, err := t.path()
	if err != nil {
		return err
	}
	if err := s.newContainer(ctx); err != nil {
		return err
	}
	for _, port := range publishedTCP {
		if err := t.forward(s, path, port); err != nil {
			return err
		}
	}
	return nil
}

func (socketProxyd) forward(s *site, path string, port int) error {
	var listener net.Listener
	err := s.host.do(func() (err error) {
		listener, err = net.Listen("tcp", fmt.Sprintf(":%d", port))
		return err
	})
	if err != nil {
		return err
	}
	defer listener.Close()
	file, err := listener.(*net.TCPListener).File()
	if err != nil {
		return err
	}
	defer file.Close()
	// LISTEN_PID is only known to the process itself (sd_listen_fds(3)).
	err = s.startHelper(s.container, []string{"LISTEN_FDS=1"}, []*os.File{file}, "/bin/sh", "-c",
		`LISTEN_PID=$$ exec "$0" "$@"`, path, "--connections-max=20000", fmt.Sprintf("127.0.0.1:%d", port))
	return err
}
