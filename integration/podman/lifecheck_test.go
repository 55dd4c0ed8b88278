//go:build podman

package podman

import (
	"errors"
	"fmt"
	"net"
	"os"
	"regexp"
	"strconv"
	"sync"
	"syscall"
	"testing"
	"time"
)

var lifeChecks = []check{
	{name: "20 restarts in a row, `--network=pasta`", run: restart("pasta")},
	{name: "… on a bridge", run: restart("lab4")},
	{name: "`podman network connect` and `disconnect` under load, no client hangs", run: changeNetworks},
	{name: "50 containers started at once", run: manyContainers},
	{name: "`podman stop` frees the ports and leaves nothing, `--network=pasta`", run: stopped("pasta", false)},
	{name: "… on a bridge", run: stopped("lab4", false)},
	{name: "SIGKILL of the helper frees the ports, the container starts again, `--network=pasta`", run: stopped("pasta", true)},
	{name: "… on a bridge", run: stopped("lab4", true)},
	{name: "SIGKILL of `gofwd attach`, and again: the container's network is as it was", oursOnly: true, run: attachKilled},
}

// restart counts the restarts after which the server answers.
func restart(network string) func(*testing.T, *lab) (string, error) {
	return func(t *testing.T, l *lab) (string, error) {
		t.Helper()
		if err := l.web("--network="+network, "-p", "8080:80"); err != nil {
			return "", because("podman run fails", err)
		}
		const times = 20
		var failed error
		good := 0
		for range times {
			if _, err := l.try("podman", "restart", "--time", "0", "web"); err != nil {
				failed = err
			} else {
				good++
			}
		}
		if good < times {
			return "", because("some fail", fmt.Errorf("%d of %d: %w", times-good, times, failed))
		}
		return "", because("no answer afterwards", l.asked(l.client, host4))
	}
}

// changeNetworks moves a container from network to network while clients ask it.
func changeNetworks(t *testing.T, l *lab) (string, error) {
	t.Helper()
	if err := l.web("--network=lab4", "-p", "8080:80"); err != nil {
		return "", because("podman run fails", err)
	}
	if err := l.asked(l.client, host4); err != nil {
		return "", because("no answer", err)
	}
	ld := startLoad(l.client, "http://"+host4+":8080/cgi-bin/ip")
	var err error
	for _, move := range [][2]string{{"lab4", "lab46"}, {"lab46", "lab4"}} {
		from, to := move[0], move[1]
		_, errConnect := l.try("podman", "network", "connect", to, "web")
		time.Sleep(500 * time.Millisecond)
		_, errDisconnect := l.try("podman", "network", "disconnect", from, "web")
		time.Sleep(500 * time.Millisecond)
		err = errors.Join(err, errConnect, errDisconnect)
	}
	ok, failed := ld.stop()
	t.Logf("%d requests were answered, %d failed: %v", ok, len(failed), errors.Join(failed...))
	if err != nil {
		return "", because("podman fails", err)
	}
	for _, err := range failed { // what was on its way to the old address is lost
		if os.IsTimeout(err) {
			return "", because("some hang", err)
		}
	}
	return "", because("no answer afterwards", l.asked(l.client, host4))
}

// manyContainers starts them all at the same time, on pasta and on a bridge.
func manyContainers(t *testing.T, l *lab) (string, error) {
	t.Helper()
	const many = 50
	errs := make([]error, many)
	var wg sync.WaitGroup
	for i := range many {
		network := "pasta"
		if i%2 == 1 {
			network = "lab4"
		}
		wg.Go(func() {
			_, errs[i] = l.try("podman", "run", "-d", "--network="+network, "-p", fmt.Sprintf("%d:80", 9000+i), "localhost/web")
		})
	}
	wg.Wait()
	answered := 0
	for i := range many {
		if errs[i] == nil {
			_, errs[i] = l.get(host4, strconv.Itoa(9000+i))
		}
		if errs[i] == nil {
			answered++
		}
	}
	return "", because(fmt.Sprintf("%d of %d answer", answered, many), errors.Join(errs...))
}

// stopped ends a container, or first its helpers, and looks for what is left.
func stopped(network string, kill bool) func(*testing.T, *lab) (string, error) {
	return func(t *testing.T, l *lab) (string, error) {
		t.Helper()
		before := l.traces(t, !kill) // who is killed can't remove his files
		if err := l.web("--network="+network, "-p", "8080:80", "-p", "5353:5353/udp"); err != nil {
			return "", because("podman run fails", err)
		}
		if err := l.asked(l.client, host4); err != nil {
			return "", because("no answer", err)
		}
		pids := l.helpers()
		if len(pids) == 0 {
			return "", because("no helper runs", errors.New("none found in /proc"))
		}
		if kill {
			for _, pid := range pids {
				if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
					return "", err
				}
			}
			if err := l.portsFree(); err != nil {
				return "", because("the ports stay taken", err)
			}
		}
		if _, err := l.try("podman", "stop", "--time", "0", "web"); err != nil {
			return "", because("podman stop fails", err)
		}
		if err := l.portsFree(); err != nil {
			return "", because("the ports stay taken", err)
		}
		if _, err := l.try("podman", "start", "web"); err != nil {
			return "", because("podman start fails", err)
		}
		if err := l.asked(l.client, host4); err != nil {
			return "", because("no answer after podman start", err)
		}
		l.clean(t)
		return "", l.nothingLeft(t, before, !kill)
	}
}

// portsFree waits until TCP port 8080 and UDP port 5353 can be bound.
func (l *lab) portsFree() error {
	return eventually(func() error {
		return l.host.Do(func() error {
			ln, err := net.Listen("tcp", ":8080")
			if err != nil {
				return err
			}
			ln.Close()
			c, err := net.ListenPacket("udp", ":5353")
			if err != nil {
				return err
			}
			return c.Close()
		})
	})
}

// nothingLeft waits until no helper runs and the host is as before.
func (l *lab) nothingLeft(t *testing.T, before string, files bool) error {
	t.Helper()
	err := eventually(func() error {
		if pids := l.helpers(); len(pids) > 0 {
			return fmt.Errorf("processes %v", pids)
		}
		return nil
	})
	if err != nil {
		return because("processes are left", err)
	}
	err = eventually(func() error {
		if after := l.traces(t, files); after != before {
			return fmt.Errorf("before:\n%s\nafter:\n%s", before, after)
		}
		return nil
	})
	return because("files or rules are left", err)
}

// withoutChance leaves out of traces what is another each time: ports that the
// kernel chose, and link-local addresses.
func withoutChance(traces string) string {
	return regexp.MustCompile(`(127\.0\.0\.1|\[::1\]):\d+|fe80:[0-9a-f:]+`).ReplaceAllString(traces, "*")
}

// attachKilled looks at the container's own network: rules, addresses, listeners.
func attachKilled(t *testing.T, l *lab) (string, error) {
	t.Helper()
	if err := l.web("--network=none"); err != nil {
		return "", err
	}
	pid := l.run(t, "podman", "inspect", "--format", "{{.State.Pid}}", "web")
	before := l.traces(t, true)
	inside := func() string { return traces(t, "/proc/"+pid+"/ns/net") }
	untouched := inside()
	attach := func() (attached string, err error) {
		l.run(t, "gofwd", "attach", "--detach", "--container", "web", "-p", "8080:80")
		return inside(), l.asked(l.client, host4)
	}
	first, err := attach()
	if err != nil {
		return "", err
	}
	end := func(sig syscall.Signal) error {
		for _, pid := range l.helpers() {
			if err := syscall.Kill(pid, sig); err != nil {
				return err
			}
		}
		return l.portsFree()
	}
	if err := end(syscall.SIGKILL); err != nil {
		return "", err
	}
	second, err := attach()
	if err != nil {
		return "", err
	}
	if first, second = withoutChance(first), withoutChance(second); first != second {
		return "", fmt.Errorf("the network of the container was\n%s\nand the second time\n%s", first, second)
	}
	if err := end(syscall.SIGTERM); err != nil {
		return "", err
	}
	err = eventually(func() error {
		if after := inside(); after != untouched {
			return fmt.Errorf("the network of the container was\n%s\nand is\n%s", untouched, after)
		}
		return nil
	})
	return "", errors.Join(err, l.nothingLeft(t, before, true))
}
