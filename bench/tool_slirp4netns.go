package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"
)

// slirp4netns with the MTU that Podman and RootlessKit give it. It forwards IPv4
// only.
type slirp4netns struct{}

func (slirp4netns) name() string { return toolSlirp }

func (slirp4netns) path() (string, error) { return lookPath("SLIRP4NETNS", "slirp4netns") }

func (t slirp4netns) find() (string, error) {
	path, err := t.path()
	if err != nil {
		return "", err
	}
	return firstLine(path, "--version")
}

func (slirp4netns) carries(w way, _ string, ip int) bool { return ip == 4 && w != hostLoopback }

func (t slirp4netns) start(ctx context.Context, s *site) error {
	path, err := t.path()
	if err != nil {
		return err
	}
	if err := s.newContainer(ctx); err != nil {
		return err
	}
	err = s.startHelper(s.host, nil, nil, path, "--configure", "--mtu=65520", "--disable-host-loopback",
		"--netns-type=path", "--api-socket", t.socket(s), s.container.path, "tap0")
	if err != nil {
		return err
	}
	for _, p := range s.bed.tcpPorts() {
		if err := t.addForward(ctx, s, "tcp", p); err != nil {
			return err
		}
	}
	for _, p := range publishedUDP {
		if err := t.addForward(ctx, s, "udp", p); err != nil {
			return err
		}
	}
	return nil
}

func (slirp4netns) socket(s *site) string { return "/run/" + s.container.name + ".sock" }

func (t slirp4netns) addPort(ctx context.Context, s *site, port int) error {
	return t.addForward(ctx, s, "tcp", port)
}

// addForward speaks the API of slirp4netns(1): one JSON request a connection.
// The socket appears a while after the start.
func (t slirp4netns) addForward(ctx context.Context, s *site, proto string, port int) error {
	var conn net.Conn
	for {
		var err error
		if conn, err = net.Dial("unix", t.socket(s)); err == nil {
			break
		}
		if ended := s.helperEnded(); ended != nil {
			return ended
		}
		if ctx.Err() != nil || !errors.Is(err, os.ErrNotExist) {
			return err
		}
		time.Sleep(time.Millisecond)
	}
	defer conn.Close()
	request := fmt.Sprintf(`{"execute":"add_hostfwd","arguments":{"proto":%q,"host_addr":"0.0.0.0","host_port":%d,"guest_port":%d}}`,
		proto, port, port)
	if _, err := io.WriteString(conn, request); err != nil {
		return err
	}
	if err := conn.(*net.UnixConn).CloseWrite(); err != nil {
		return err
	}
	var reply struct {
		Error struct {
			Desc string `json:"desc"`
		} `json:"error"`
	}
	if err := json.NewDecoder(conn).Decode(&reply); err != nil {
		return fmt.Errorf("slirp4netns: add forward: %w", err)
	}
	if reply.Error.Desc != "" {
		return fmt.Errorf("slirp4netns: add forward: %s", reply.Error.Desc)
	}
	return nil
}
