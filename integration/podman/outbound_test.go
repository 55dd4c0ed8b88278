//go:build podman

package podman

import (
	"errors"
	"net"
	"testing"
)

// serveOnHost starts a server on the host's main addresses, port 8001, and another
// on its loopback only, port 8002.
func serveOnHost(t *testing.T, l *lab) {
	t.Helper()
	serveHTTP(t, l.host, net.JoinHostPort(host4, "8001"))
	serveHTTP(t, l.host, net.JoinHostPort(host6, "8001"))
	serveHTTP(t, l.host, "127.0.0.1:8002")
}

// fromEach asks from a container of each network.
func fromEach(ask func(l *lab) error, networks ...string) func(*testing.T, *lab) (string, error) {
	return func(t *testing.T, l *lab) (string, error) {
		t.Helper()
		serveOnHost(t, l)
		for _, network := range networks {
			l.clean(t)
			if err := l.web("--network=" + network); err != nil {
				return "", because("podman run fails", err)
			}
			if err := ask(l); err != nil {
				return "", because("not with "+network, err)
			}
		}
		return "", nil
	}
}

func fetches(url string) func(*lab) error {
	return func(l *lab) error { return l.fetch(url) }
}

// internet is all that a container asks of it.
func internet(l *lab) error {
	return errors.Join(
		l.fetch("http://"+net4+":8000/"), l.fetch("http://["+net6+"]:8000/"),
		l.fetchUDP(net4+":8000"), l.fetchUDP("["+net6+"]:8000"))
}

// hostLoopbackClosed is true where none of the ways to the host's loopback is open.
func hostLoopbackClosed(l *lab) error {
	for _, addr := range []string{"127.0.0.1", alias4, client4, host4} { // client4 is the gateway
		if l.fetch("http://"+addr+":8002/") == nil {
			return because("it is open at "+addr, errors.New("answered"))
		}
	}
	return nil
}

var outboundChecks = []check{
	{name: "out to the internet, TCP and UDP, IPv4 and IPv6", run: fromEach(internet, "pasta", "lab46")},
	{name: "names that the host's nameserver knows", run: fromEach(fetches("http://"+netName+":8000/"), "pasta", "lab4")},
	{name: "`host.containers.internal`", run: fromEach(fetches("http://host.containers.internal:8001/"), "pasta", "lab4")},
	{name: "the host's own address, `--network=ns:PATH`", oursOnly: true, run: func(t *testing.T, l *lab) (string, error) {
		t.Helper()
		serveOnHost(t, l)
		path := l.run(t, "gofwd", "netns", "add", "web")
		l.run(t, "gofwd", "attach", "--detach", "--netns", "web")
		if err := l.web("--network=ns:" + path); err != nil {
			return "", err
		}
		return "", errors.Join(l.fetch("http://"+host4+":8001/"), l.fetch("http://["+host6+"]:8001/"))
	}},
	{name: "the host's loopback is closed", run: fromEach(hostLoopbackClosed, "pasta")},
	{name: "… open with `--network=pasta:--map-gw`", run: fromEach(fetches("http://"+client4+":8002/"), "pasta:--map-gw")},
	{name: "… `--network=pasta:--map-host-loopback,ADDRESS`", run: fromEach(fetches("http://169.254.1.9:8002/"), "pasta:--map-host-loopback,169.254.1.9")},
	{name: "… `--network=pasta:-T,PORT`", run: fromEach(fetches("http://127.0.0.1:8002/"), "pasta:-T,8002")},
}
