//go:build podman

package podman

import (
	"bytes"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/gofwd/gofwd/netnsutil"
)

// The host of the labs and the client beside it, see lab/setup.sh.
const (
	host4, host6     = "203.0.113.1", "2001:db8:71::1"
	client4, client6 = "203.0.113.2", "2001:db8:71::2"
)

// skipVar, set to 1, skips these tests where a lab can't be built. Nothing else
// does.
const skipVar = "GOFWD_SKIP_PODMAN"

// lab is one version of Podman.
type lab struct {
	suite    string
	ours     bool   // gofwd is the helper
	conf     string // a file of Podman's configuration on top of the lab's, if any
	version  string
	client   *netnsutil.NS
	host     *netnsutil.NS
	lastPort uint16
}

func labDir() string {
	if dir := os.Getenv("LAB_DIR"); dir != "" {
		return dir
	}
	return "/tmp/podman-lab"
}

func suites() []string {
	if s := os.Getenv("PODMAN_SUITES"); s != "" {
		return strings.Fields(s)
	}
	return []string{"trixie"}
}

// TestMain builds gofwd and the labs.
func TestMain(m *testing.M) {
	if err := setUp(); err != nil {
		fmt.Fprintln(os.Stderr, "the Podman lab can't be built:", err)
		if os.Getenv(skipVar) == "1" {
			fmt.Fprintln(os.Stderr, "skipped, as "+skipVar+"=1 says")
			os.Exit(0)
		}
		fmt.Fprintln(os.Stderr, "set "+skipVar+"=1 to do without")
		os.Exit(1)
	}
	os.Exit(m.Run())
}

func setUp() error {
	if os.Geteuid() != 0 {
		return fmt.Errorf("it takes root to build one; Podman itself runs as an ordinary user there")
	}
	for _, tool := range []string{"curl", "dnsmasq", "ip", "nft", "nsenter", "ss", "tshark"} {
		if _, err := exec.LookPath(tool); err != nil {
			return err
		}
	}
	setup := exec.Command("lab/setup.sh", suites()...)
	setup.Stdout, setup.Stderr = os.Stdout, os.Stderr
	if err := setup.Run(); err != nil {
		return fmt.Errorf("lab/setup.sh: %w", err)
	}
	bin := filepath.Join(labDir(), "shared", "bin")
	if err := os.MkdirAll(bin, 0o755); err != nil {
		return err
	}
	build := exec.Command("go", "build", "-trimpath", "-o", filepath.Join(bin, "gofwd"), "../../cmd/gofwd")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("build gofwd: %w\n%s", err, out)
	}
	for _, name := range []string{"pasta", "rootlessport", "pesto"} {
		link := filepath.Join(bin, name)
		_ = os.Remove(link)
		if err := os.Symlink("gofwd", link); err != nil {
			return err
		}
	}
	return installHook()
}

// installHook puts the hook's file where the labs see it, with gofwd's path there.
func installHook() error {
	hook, err := os.ReadFile("../../contrib/hooks.d/gofwd.json")
	if err != nil {
		return err
	}
	dir := filepath.Join(labDir(), "shared", "hooks.d")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	hook = bytes.ReplaceAll(hook, []byte("/usr/bin/gofwd"), []byte("/shared/bin/gofwd"))
	return os.WriteFile(filepath.Join(dir, "gofwd.json"), hook, 0o644)
}

func openLab(t *testing.T, suite string, ours bool) *lab {
	t.Helper()
	l := &lab{suite: suite, ours: ours, lastPort: 20000}
	for name, ns := range map[string]**netnsutil.NS{"client": &l.client, "labhost": &l.host} {
		var err error
		*ns, err = netnsutil.Open(name)
		require.NoError(t, err)
		t.Cleanup(func() { (*ns).Close() })
	}
	l.version = strings.TrimPrefix(l.run(t, "podman", "--version"), "podman version ")
	return l
}

// minor is Podman's version without its patch level.
func (l *lab) minor() string {
	return l.version[:strings.LastIndexByte(l.version, '.')]
}

func (l *lab) helper() string {
	if l.ours {
		return "gofwd"
	}
	return "Podman's own"
}

// cmd is a command in the lab, as the ordinary user.
func (l *lab) cmd(argv ...string) *exec.Cmd {
	cmd := exec.Command("lab/run-as-user.sh", append([]string{l.suite}, argv...)...)
	env := ""
	if l.ours {
		env = "CONTAINERS_HELPER_BINARY_DIR=/shared/bin PATH=/shared/bin:/usr/bin:/bin:/usr/sbin:/sbin"
	}
	if l.conf != "" {
		env += " CONTAINERS_CONF_OVERRIDE=" + l.conf
	}
	cmd.Env = append(os.Environ(), "LAB_NETNS=labhost", "LAB_ENV="+env)
	return cmd
}

// try runs a command in the lab and returns what it printed.
func (l *lab) try(argv ...string) (string, error) {
	var stdout, stderr bytes.Buffer
	cmd := l.cmd(argv...)
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	if err != nil {
		err = fmt.Errorf("%s: %w: %s", strings.Join(argv, " "), err, bytes.TrimSpace(stderr.Bytes()))
	}
	return strings.TrimSpace(stdout.String()), err
}

func (l *lab) run(t *testing.T, argv ...string) string {
	t.Helper()
	out, err := l.try(argv...)
	require.NoError(t, err)
	return out
}

// clean removes all containers, and what a test before may have left.
func (l *lab) clean(t *testing.T) {
	t.Helper()
	l.run(t, "podman", "rm", "--all", "--force", "--depend", "--time", "0")
	l.run(t, "podman", "pod", "rm", "--all", "--force", "--time", "0")
	if l.ours {
		_, _ = l.try("gofwd", "netns", "rm", "web") // there may be none
	}
}

// network makes a bridge network once.
func (l *lab) network(t *testing.T, name string, args ...string) {
	t.Helper()
	if _, err := l.try("podman", "network", "exists", name); err != nil {
		l.run(t, append(append([]string{"podman", "network", "create"}, args...), name)...)
	}
}

var clientRE = regexp.MustCompile(`client=\[?([0-9a-f:.]+)(?:%\w+)?\]? port=(\d+)`)

// ask asks a container's server who it thinks that we are, from a port of our own
// choice. The answer is of HTTP on 8080, or of UDP on 5353.
func (l *lab) ask(from *netnsutil.NS, network, dst string) (saw netip.AddrPort, port uint16, err error) {
	l.lastPort++
	var c net.Conn
	err = from.Do(func() error {
		d := net.Dialer{Timeout: time.Second, Control: func(_, _ string, c syscall.RawConn) error {
			return c.Control(func(fd uintptr) { _ = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1) })
		}}
		port, request := "8080", "GET /cgi-bin/ip HTTP/1.0\r\n\r\n"
		if network == "udp" {
			d.LocalAddr, port, request = &net.UDPAddr{Port: int(l.lastPort)}, "5353", "who am I"
		} else {
			d.LocalAddr = &net.TCPAddr{Port: int(l.lastPort)}
		}
		if c, err = d.Dial(network, net.JoinHostPort(dst, port)); err != nil {
			return err
		}
		_, err = c.Write([]byte(request))
		return err
	})
	if err != nil {
		return saw, 0, err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(time.Second))
	var answer []byte
	for buf := make([]byte, 1024); !clientRE.Match(answer); {
		n, err := c.Read(buf)
		if answer = append(answer, buf[:n]...); err != nil {
			return saw, 0, fmt.Errorf("%q: %w", answer, err)
		}
	}
	m := clientRE.FindSubmatch(answer)
	saw, err = netip.ParseAddrPort(net.JoinHostPort(string(m[1]), string(m[2])))
	return netip.AddrPortFrom(saw.Addr().Unmap(), saw.Port()), l.lastPort, err
}
