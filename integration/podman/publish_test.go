//go:build podman

package podman

import (
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

var publishChecks = []check{
	{name: "one interface: `--network=pasta:-t,%eth0/8080:80`", run: func(t *testing.T, l *lab) (string, error) {
		t.Helper()
		if err := l.web("--network=pasta:-t,%eth0/8080:80"); err != nil {
			return "", because("podman run fails", err)
		}
		return "", onEth0Only(l)
	}},
	{name: "… `gofwd attach -p %eth0:8080:80`", oursOnly: true, run: func(t *testing.T, l *lab) (string, error) {
		t.Helper()
		if err := l.web("--network=none"); err != nil {
			return "", err
		}
		l.run(t, "gofwd", "attach", "--detach", "--container", "web", "-p", "%eth0:8080:80")
		return "", onEth0Only(l)
	}},
	{name: "port 80 without any right, from a socket that systemd passed", oursOnly: true, run: publishActivated},
	{name: "`--network=pasta:-t,auto`: a server that starts later", run: func(t *testing.T, l *lab) (string, error) {
		t.Helper()
		if err := l.web("--network=pasta:-t,auto"); err != nil {
			return "", because("podman run fails", err)
		}
		if err := l.refused(l.client, host4, "8080"); err != nil {
			return "", because("the port is open before", err)
		}
		if _, err := l.try("podman", "exec", "-d", "web", "httpd", "-f", "-p", "8080", "-h", "/www"); err != nil {
			return "", err
		}
		if err := l.asked(l.client, host4); err != nil {
			return "", because("no answer", err)
		}
		return "", because("no answer over IPv6", l.asked(l.client, host6))
	}},
	{name: "`--network=pasta:--pcap,FILE`, read by tshark", run: capture},
}

// onEth0Only is nil if clients get through on eth0 and not by loopback.
func onEth0Only(l *lab) error {
	return errors.Join(
		because("no answer over IPv4", l.asked(l.client, host4)),
		because("no answer over IPv6", l.asked(l.client, host6)),
		because("open on lo too", errors.Join(l.refused(l.host, "127.0.0.1", "8080"), l.refused(l.host, "::1", "8080"))))
}

// publishActivated passes a socket on port 80 as systemd does: sd_listen_fds(3).
func publishActivated(t *testing.T, l *lab) (string, error) {
	t.Helper()
	if err := l.web("--network=none"); err != nil {
		return "", err
	}
	var ln net.Listener
	err := l.host.Do(func() (err error) {
		ln, err = net.Listen("tcp", "[::]:80")
		return err
	})
	if err != nil {
		return "", err
	}
	defer ln.Close()
	f, err := ln.(*net.TCPListener).File()
	if err != nil {
		return "", err
	}
	defer f.Close()
	cmd := l.cmd("sh", "-c", `LISTEN_PID=$$ LISTEN_FDS=1 LISTEN_FDNAMES=web exec gofwd attach --container web -p systemd:web:80`)
	cmd.ExtraFiles = []*os.File{f}
	startProcess(t, cmd)
	for _, addr := range []string{host4, host6} {
		if err := l.getFrom(addr, "80"); err != nil {
			return "", err
		}
	}
	return "", nil
}

// getFrom waits until a client on another host gets its own address from a server.
func (l *lab) getFrom(addr, port string) error {
	own := client4
	if addr == host6 {
		own = client6
	}
	return eventually(func() error {
		answer, err := l.get(addr, port)
		if err == nil && !strings.Contains(answer, own) {
			err = errors.New("the server saw " + answer)
		}
		return err
	})
}

// get waits until a client on another host gets an answer.
func (l *lab) get(addr, port string) (answer string, err error) {
	err = eventually(func() error {
		out, err := exec.Command("nsenter", "--net=/run/netns/client", "curl", "-gsSf", "-m", "3",
			"http://"+net.JoinHostPort(addr, port)+"/cgi-bin/ip").CombinedOutput()
		answer = string(out)
		return err
	})
	return answer, err
}

// capture has a client name a host, and finds that name in the capture.
func capture(t *testing.T, l *lab) (string, error) {
	t.Helper()
	const name = "web.example.org"
	l.run(t, "rm", "-f", "web.pcap")
	if err := l.web("--network=pasta:--pcap,/home/lab/web.pcap", "-p", "8080:80"); err != nil {
		return "", because("podman run fails", err)
	}
	if err := l.asked(l.client, host4); err != nil {
		return "", because("no answer", err)
	}
	curl := exec.Command("nsenter", "--net=/run/netns/client", "curl", "-sS", "-m", "5", "-H", "Host: "+name, "http://"+host4+":8080/cgi-bin/ip")
	if out, err := curl.CombinedOutput(); err != nil {
		return "", because("no answer", errors.New(string(out)))
	}
	l.clean(t) // what was captured is written by now
	pcap := filepath.Join(labDir(), l.suite, "rootfs/home/lab/web.pcap")
	out, err := exec.Command("tshark", "-r", pcap, "-Y", `http.host == "`+name+`"`, "-T", "fields", "-e", "ip.src", "-e", "http.request.uri").CombinedOutput()
	if err != nil {
		return "", because("tshark can't read it", errors.New(string(out)))
	}
	if want := client4 + "\t/cgi-bin/ip"; !strings.Contains(string(out), want) {
		return "", because("the request is not in it", errors.New(string(out)))
	}
	return "", nil
}
