package integration

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// pestoPrograms are gofwd called as pesto and, where there is a pasta with one, that
// pesto.
func pestoPrograms(t *testing.T) []pastaProgram {
	t.Helper()
	link := filepath.Join(t.TempDir(), "pesto")
	require.NoError(t, os.Symlink(os.Getenv(binEnv), link))
	programs := []pastaProgram{{name: "gofwd", path: link}}
	for _, p := range pastaPrograms(t) {
		path := filepath.Join(filepath.Dir(p.path), "pesto")
		if _, err := os.Stat(path); p.real() && err == nil {
			programs = append(programs, pastaProgram{name: "pesto", path: path, options: p.options})
		} else if p.real() {
			fmt.Printf("%s: not tried with pesto, which is not beside %s\n", t.Name(), p.path)
		}
	}
	return programs
}

// bridged puts a host with a network of its own behind the container, as Podman's
// containers are behind the namespace of all bridge networks.
func (tp *topo) bridged(t *testing.T) *node {
	t.Helper()
	n := newNode(t, "bridged")
	tp.ctr.ip(t, `
		link add br0 type bridge
		addr add 10.89.0.1/24 dev br0
		addr add fd89::1/64 dev br0 nodad
		link set br0 up
		link add port type veth peer name eth0 netns `+n.id+`
		link set port master br0 up`)
	n.ip(t, `
		addr add 10.89.0.3/24 dev eth0
		addr add fd89::3/64 dev eth0 nodad
		link set eth0 up
		route add default via 10.89.0.1
		route add default via fd89::1`)
	tp.ctr.sysctl(t, "net/ipv4/ip_forward", "1")
	tp.ctr.sysctl(t, "net/ipv6/conf/all/forwarding", "1")
	return n
}

// pastaPesto changes the ports of each pasta by each pesto.
func pastaPesto(t *testing.T, tp *topo, p pastaProgram) {
	bridged := tp.bridged(t)
	bridged.serveWho(t, 80, ipv4.any, ipv6.any)
	tp.ctr.serveWho(t, 80, ipv4.any, ipv6.any)
	tp.host.serveWho(t, 7000, ipv4.loopback)
	socket := filepath.Join(t.TempDir(), "socket")
	pid := tp.pasta(t, p, "--no-copy-addrs", "-c", socket, "-t", "8000:80")
	refused := func(dst string) {
		t.Helper()
		// What a pesto that doesn't wait asks for, comes later.
		eventually(t, dst+" is open", func() bool {
			c, err := tp.client.tryTCP(netip.Addr{}, netip.MustParseAddrPort(dst), patience)
			if err == nil {
				c.Close()
			}
			return err != nil
		})
	}
	served := func(proto, dst string) {
		t.Helper()
		eventually(t, dst+" is not served", func() bool {
			got, err := tp.client.who(t, proto, netip.Addr{}, netip.MustParseAddrPort(dst))
			return err == nil && got.by == got.local // the client's own address
		})
	}
	for i, pesto := range pestoPrograms(t) {
		run := func(code int, args ...string) result {
			t.Helper()
			r := tp.host.run(t, append(append([]string{pesto.path}, args...), socket)...)
			require.Equal(t, code, r.code, "%s %v: %s%s", pesto.name, args, r.stdout, r.stderr)
			return r
		}
		require.Regexp(t, `^pesto \S+\n`, tp.host.output(t, pesto.path, "--version"))
		require.Regexp(t, `^passt/pasta configuration \(.*\)\n  HOST\n    TCP \[\*\]:8000  =>  80 ?\n  SPLICE\n$`, run(0).stdout)

		// As Podman publishes the ports of a container on a bridge.
		port := func(n int) uint16 { return uint16(8100 + 10*i + n) }
		rules := []string{
			"-t", fmt.Sprintf("0.0.0.0/%d:10.89.0.3/80", port(0)), "-t", fmt.Sprintf("[::]/%d:fd89::3/80", port(0)),
			"-u", fmt.Sprintf("0.0.0.0/%d:10.89.0.3/80", port(0)), "-t", fmt.Sprintf("198.51.100.11/%d-%d:10.89.0.3/80-81", port(1), port(2)),
		}
		run(0, append([]string{"--add"}, rules...)...)
		v4, v6 := fmt.Sprintf("198.51.100.1:%d", port(0)), fmt.Sprintf("[2001:db8:1::1]:%d", port(0))
		served("tcp", v4)
		served("tcp", v6)
		served("udp", v4)
		served("tcp", fmt.Sprintf("198.51.100.11:%d", port(1)))
		served("tcp", "198.51.100.1:8000")

		require.NotEmpty(t, run(1, "-A", "-t", fmt.Sprintf("127.0.0.1/%d", port(0))).stderr, "a conflict")
		require.NotEmpty(t, run(1, "-D", "-t", fmt.Sprintf("0.0.0.0/%d:10.89.0.4/80", port(0))).stderr, "leads elsewhere")
		require.NotEmpty(t, run(1, "-A", "-t", "80-70").stderr)
		require.NotEmpty(t, run(1, "-C", "NOWHERE").stderr)
		run(0, append([]string{"--delete"}, rules...)...)
		refused(v4)
		refused(v6)

		run(0, "-A", "-T", "7000", "-u", "8001:80", "--show")
		eventually(t, "-T does nothing", func() bool {
			_, err := tp.ctr.who(t, "tcp", netip.Addr{}, netip.MustParseAddrPort("127.0.0.1:7000"))
			return err == nil
		})
		require.Contains(t, run(0).stdout, "SPLICE\n    TCP [*]%lo:7000  =>  7000")
		run(0, "-C", "SPLICE", "-t", "8000:80")
		require.Regexp(t, `HOST\n    TCP \[\*\]:8000  =>  80 ?\n  SPLICE\n$`, run(0).stdout)
		served("tcp", "198.51.100.1:8000")
	}
	require.NoError(t, unix.Kill(pid, unix.SIGTERM))
	requireGone(t, []int{pid})
	if !p.real() {
		require.NoFileExists(t, socket)
	}
}

// TestPestoAllOrNothing: the pesto that doesn't wait for an answer changes all or
// nothing, too, and its failure stands in nobody's way.
func TestPestoAllOrNothing(t *testing.T) {
	t.Parallel()
	tp := newTopo(t)
	socket := filepath.Join(t.TempDir(), "socket")
	tp.pasta(t, pastaPrograms(t)[0], "-c", socket)
	tp.host.listenTCP(t, ipv4.any, 8001)
	for i, pesto := range pestoPrograms(t) {
		last := fmt.Sprintf("%d", 8003+i)
		r := tp.host.run(t, pesto.path, "-A", "-t", "8000", "-t", "8001", "-t", "8002", socket)
		if !pesto.real() {
			require.Equal(t, 1, r.code)
			require.Regexp(t, fmt.Sprintf(`^bind host port 8001/tcp: in use by .* \(pid %d\); stop what uses it, or choose another port\n$`, os.Getpid()), r.stderr)
		}
		require.Zero(t, tp.host.run(t, pesto.path, "-A", "-t", last, socket).code)
		eventually(t, "not bound", func() bool { return tp.host.listening("tcp", uint16(8003+i)) })
		require.False(t, tp.host.listening("tcp", 8000))
		require.False(t, tp.host.listening("tcp", 8002))
		require.NotRegexp(t, "800[012]", tp.host.output(t, pesto.path, socket))
	}
}

// TestPestoRefusesNobody repeats what pesto was measured at with pasta, over its own
// protocol: a hundred changes, and clients of a port that they don't name. At the
// same time a client of the socket stalls.
func TestPestoRefusesNobody(t *testing.T) {
	t.Parallel()
	for _, pesto := range pestoPrograms(t) {
		t.Run(pesto.name, func(t *testing.T) {
			tp := newTopo(t)
			socket := filepath.Join(t.TempDir(), "socket")
			tp.pasta(t, pastaPrograms(t)[0], "-c", socket, "-t", "8080:80")
			tp.ctr.serveWho(t, 80, ipv4.any)
			stalled, err := net.Dial("unix", socket)
			require.NoError(t, err)
			defer stalled.Close()
			_, err = stalled.Write([]byte{1})
			require.NoError(t, err)
			count := tp.connectLoops(netip.AddrPortFrom(ipv4.host, 8080))
			begin := time.Now()
			for i := range 50 {
				rule := fmt.Sprintf("0.0.0.0/%d:80", 9000+i)
				tp.host.output(t, pesto.path, "-A", "-t", rule, "-u", rule, socket)
				tp.host.output(t, pesto.path, "-D", "-t", rule, "-u", rule, socket)
			}
			good, refused := count()
			t.Logf("100 changes in %s: %d connections, %d refused", time.Since(begin).Round(time.Millisecond), good, refused)
			require.Zero(t, refused)
			require.Greater(t, good, int64(200))
		})
	}
}

// connectLoops makes connections from the client in four tight loops, until it is
// asked how many there were, and how many were refused.
func (tp *topo) connectLoops(at netip.AddrPort) (count func() (good, refused int64)) {
	var stop atomic.Bool
	var good, refused atomic.Int64
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for !stop.Load() {
				c, err := tp.client.tryTCP(netip.Addr{}, at, patience)
				if err != nil {
					refused.Add(1)
					continue
				}
				good.Add(1)
				c.Close()
			}
		})
	}
	return func() (int64, int64) {
		stop.Store(true)
		wg.Wait()
		return good.Load(), refused.Load()
	}
}
