// Package nstest gives tests network namespaces to play with, without root. It
// is for tests only.
//
//	func TestMain(m *testing.M) { nstest.Main(m) }
//
//	func TestPing(t *testing.T) {
//		client, server := nstest.New(t), nstest.New(t)
//		nstest.Veth(t, client, "eth0 198.51.100.2/24", server, "eth0 198.51.100.1/24")
//		nstest.Run(t, client, "ping", "-c1", "198.51.100.1")
//	}
package nstest

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/gofwd/gofwd/netnsutil"
)

// inside is set in the environment of a test binary that Main has started.
const inside = "GOFWD_NSTEST_INSIDE"

// Main runs the tests of a package in a user, network and mount namespace of
// their own, by starting the test binary once more; it does not return. There,
// whoever runs the tests is root, and has:
//
//   - an empty network with loopback up, as "the host" of the tests;
//   - an empty /run, so that ip-netns(8) and daemons find their place.
//
// /dev/net/tun can be opened if the machine lets the user (it is 0666 wherever
// udev rules).
//
// m is the [*testing.M], or what runs it.
func Main(m interface{ Run() int }) {
	if os.Getenv(inside) == "" {
		os.Exit(reexec())
	}
	if err := setUp(); err != nil {
		fmt.Fprintln(os.Stderr, "nstest:", err)
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// reexec runs the test binary in new namespaces, and returns its exit code.
func reexec() int {
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Args[0] = os.Args[0]
	cmd.Env = append(os.Environ(), inside+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  unix.CLONE_NEWUSER | unix.CLONE_NEWNET | unix.CLONE_NEWNS,
		UidMappings: []syscall.SysProcIDMap{{HostID: os.Getuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{HostID: os.Getgid(), Size: 1}},
		Pdeathsig:   syscall.SIGKILL,
	}
	// A timeout of "go test" comes as SIGQUIT, for a dump of the goroutines.
	sigs := make(chan os.Signal, 1)
	signal.Notify(sigs, unix.SIGINT, unix.SIGTERM, unix.SIGQUIT)
	if err := cmd.Start(); err != nil {
		fmt.Fprintln(os.Stderr, "nstest: start tests in new namespaces:", err)
		return 1
	}
	go passSignals(sigs, cmd.Process)
	var exit *exec.ExitError
	if err := cmd.Wait(); errors.As(err, &exit) && exit.Exited() {
		return exit.ExitCode()
	} else if err != nil {
		fmt.Fprintln(os.Stderr, "nstest:", err)
		return 1
	}
	return 0
}

func passSignals(sigs <-chan os.Signal, to *os.Process) {
	for sig := range sigs {
		_ = to.Signal(sig)
	}
}

// setUp furnishes the new namespaces.
func setUp() error {
	if err := unix.Mount("none", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	if err := unix.Mount("tmpfs", "/run", "tmpfs", 0, "mode=755"); err != nil {
		return fmt.Errorf("mount /run: %w", err)
	}
	ns, err := netnsutil.Current()
	if err != nil {
		return err
	}
	defer ns.Close()
	return ns.Configure(netnsutil.Link{})
}

// Host opens the network namespace that the tests run in.
func Host(tb testing.TB) *netnsutil.NS {
	tb.Helper()
	ns, err := netnsutil.OpenPID(os.Getpid())
	require.NoError(tb, err)
	tb.Cleanup(func() { ns.Close() })
	return ns
}

// New makes a network namespace with loopback up. It ends with the test.
func New(tb testing.TB) *netnsutil.NS {
	tb.Helper()
	ns, err := netnsutil.New()
	require.NoError(tb, err)
	tb.Cleanup(func() { ns.Close() })
	require.NoError(tb, ns.Configure(netnsutil.Link{}))
	return ns
}

// Do runs fn on a thread in ns. fn may fail the test.
func Do(tb testing.TB, ns *netnsutil.NS, fn func()) {
	tb.Helper()
	require.NoError(tb, ns.Do(func() error { fn(); return nil }))
}

// Link parses the short form of a link: a name, addresses, and routes after a
// comma each.
//
//	"eth0"
//	"eth0 198.51.100.2/24 2001:db8:51::2/64, 0.0.0.0/0 via 198.51.100.1, 192.0.2.0/24"
func Link(tb testing.TB, spec string) netnsutil.Link {
	tb.Helper()
	parts := strings.Split(spec, ",")
	words := strings.Fields(parts[0])
	require.NotEmpty(tb, words, "link %q", spec)
	link := netnsutil.Link{Name: words[0]}
	for _, word := range words[1:] {
		p, err := netip.ParsePrefix(word)
		require.NoError(tb, err, "link %q", spec)
		link.Addrs = append(link.Addrs, p)
	}
	for _, part := range parts[1:] {
		dst, via, ok := strings.Cut(strings.TrimSpace(part), " via ")
		p, err := netip.ParsePrefix(dst)
		require.NoError(tb, err, "link %q", spec)
		r := netnsutil.Route{Dst: p}
		if ok {
			r.Via, err = netip.ParseAddr(via)
			require.NoError(tb, err, "link %q", spec)
		}
		link.Routes = append(link.Routes, r)
	}
	return link
}

// Configure makes a link, in its short form, true in ns: [netnsutil.NS.Configure].
func Configure(tb testing.TB, ns *netnsutil.NS, spec string) {
	tb.Helper()
	require.NoError(tb, ns.Configure(Link(tb, spec)))
}

// Veth joins two namespaces by a pair of interfaces, given in their short form.
// They are up when it returns, and their addresses can be used. The test's end
// removes them.
func Veth(tb testing.TB, a *netnsutil.NS, aSpec string, b *netnsutil.NS, bSpec string) {
	tb.Helper()
	aLink, bLink := Link(tb, aSpec), Link(tb, bSpec)
	require.NoError(tb, netnsutil.Veth(a, aLink, b, bLink))
	tb.Cleanup(func() {
		// A namespace that ends takes its time, and the name stays taken
		// as long. The test may have removed it.
		attrs := netlink.NewLinkAttrs()
		attrs.Name = aLink.Name
		_ = a.Do(func() error { return netlink.LinkDel(&netlink.Veth{LinkAttrs: attrs}) })
	})
	waitUsable(tb, a, aLink)
	waitUsable(tb, b, bLink)
}

// waitUsable waits until packets get through. The kernel leaves two things to
// its work queues: to see that the peer is up (linkwatch_event), and to join the
// multicast group at which an IPv6 address is asked for (addrconf_dad_work, also
// without duplicate address detection).
func waitUsable(tb testing.TB, ns *netnsutil.NS, link netnsutil.Link) {
	tb.Helper()
	usable := false
	for start := time.Now(); !usable; time.Sleep(time.Millisecond) {
		require.Less(tb, time.Since(start), 5*time.Second, "interface %s does not come up", link.Name)
		require.NoError(tb, ns.Do(func() error {
			l, err := netlink.LinkByName(link.Name)
			if err != nil {
				return err
			}
			groups, err := os.ReadFile("/proc/thread-self/net/igmp6")
			if err != nil {
				return err
			}
			usable = l.Attrs().OperState == netlink.OperUp
			for _, p := range link.Addrs {
				if p.Addr().Is6() {
					a := p.Addr().As16()
					group := fmt.Sprintf(" ff0200000000000000000001ff%x ", a[13:]) // RFC 4291, 2.7.1
					usable = usable && strings.Contains(string(groups), group)
				}
			}
			return nil
		}))
	}
}

// Start starts cmd in ns. The test's end kills it, if it has not ended by then;
// who waits for it earlier calls cmd.Wait.
func Start(tb testing.TB, ns *netnsutil.NS, cmd *exec.Cmd) {
	tb.Helper()
	require.NoError(tb, start(ns, cmd), "start %s", cmd)
	tb.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
}

func start(ns *netnsutil.NS, cmd *exec.Cmd) error {
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL // for tests that are killed
	return ns.Do(cmd.Start)
}

// Run runs a command in ns to its end, and returns what it wrote. The test fails
// unless it exits with 0.
func Run(tb testing.TB, ns *netnsutil.NS, name string, args ...string) string {
	tb.Helper()
	out, err := Output(ns, exec.CommandContext(tb.Context(), name, args...))
	require.NoError(tb, err, "%s %s\n%s", name, strings.Join(args, " "), out)
	return out
}

// Output runs cmd in ns to its end, and returns its output, standard error
// included, and the error of [exec.Cmd.Wait].
func Output(ns *netnsutil.NS, cmd *exec.Cmd) (string, error) {
	var out strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := start(ns, cmd); err != nil {
		return "", err
	}
	err := cmd.Wait()
	return out.String(), err
}
