package forward

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"
	"unsafe"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/gofwd/gofwd/netnsutil"
)

// inNewNS runs fn in a network namespace of its own, on the test's goroutine: fn
// must not call t.Run, whose goroutine is on another thread.
func inNewNS(t *testing.T, fn func()) {
	t.Helper()
	require.NoError(t, newNS(t).Do(func() error { fn(); return nil }))
}

// newNS makes a network namespace with lo up.
func newNS(t testing.TB) *netnsutil.NS {
	t.Helper()
	ns, err := netnsutil.New()
	require.NoError(t, err)
	t.Cleanup(func() { ns.Close() })
	require.NoError(t, ns.Do(loopbackUp))
	return ns
}

// ip runs ip(8) in the thread's network namespace.
func ip(t testing.TB, args string) {
	t.Helper()
	out, err := exec.Command("ip", strings.Fields(args)...).CombinedOutput()
	require.NoError(t, err, "ip %s: %s", args, out)
}

// bind binds rules as a whole, and closes them with the test.
func bind(t *testing.T, b *binder, rules ...string) []binding {
	t.Helper()
	bindings, err := b.bindAll(parseRules(rules))
	require.NoError(t, err)
	t.Cleanup(func() {
		for _, b := range bindings {
			closeAll(b.listeners)
		}
	})
	return bindings
}

func parseRules(texts []string) (rules []Rule) {
	for _, text := range texts {
		rules = append(rules, rule(text))
	}
	return rules
}

// reachable reports whether l is what answers at dst.
func reachable(t *testing.T, l *boundListener, dst string) bool {
	t.Helper()
	c, err := net.Dial(l.rule.Proto.String(), dst)
	if err != nil {
		return false
	}
	defer c.Close()
	if l.tcp != nil {
		l.tcp.SetDeadline(time.Now().Add(time.Second))
		in, err := l.tcp.AcceptTCP()
		if err != nil {
			return false
		}
		defer in.Close()
		return in.RemoteAddr().String() == c.LocalAddr().String()
	}
	c.Write([]byte("ping"))
	l.udp.SetDeadline(time.Now().Add(50 * time.Millisecond))
	buf := make([]byte, 100)
	n, _, err := l.udp.ReadFromUDPAddrPort(buf)
	return err == nil && string(buf[:n]) == "ping"
}

// The zero Addr is both families on one socket, 0.0.0.0 and :: are one each,
// whatever net.ipv6.bindv6only says.
func TestListenFamilies(t *testing.T) {
	for _, tt := range []struct {
		rule           string
		b              binder
		local          string
		v4, v6, second bool // by 127.0.0.1, ::1, 127.0.0.2
	}{
		{rule: "8080:80", local: "[::]:8080", v4: true, v6: true, second: true},
		{rule: "0.0.0.0:8080:80", local: "0.0.0.0:8080", v4: true, second: true},
		{rule: "[::]:8080:80", local: "[::]:8080", v6: true},
		{rule: "127.0.0.1:8080:80", local: "127.0.0.1:8080", v4: true},
		{rule: "127.0.0.2:8080:80", local: "127.0.0.2:8080", second: true},
		{rule: "[::1]:8080:80", local: "[::1]:8080", v6: true},
		{rule: "%lo:8080:80", local: "[::]:8080", v4: true, v6: true, second: true},
		{rule: "8080:80", b: binder{noIPv6: true}, local: "0.0.0.0:8080", v4: true, second: true},
		{rule: "8080:80", b: binder{noIPv4: true}, local: "[::]:8080", v6: true},
	} {
		for _, proto := range []string{"/tcp", "/udp"} {
			t.Run(tt.rule+proto+" "+tt.local, func(t *testing.T) {
				inNewNS(t, func() {
					require.NoError(t, os.WriteFile("/proc/sys/net/ipv6/bindv6only", []byte("1"), 0))
					bindings := bind(t, &tt.b, tt.rule+proto)
					require.Len(t, bindings, 1)
					require.Len(t, bindings[0].listeners, 1)
					l := bindings[0].listeners[0]
					require.Equal(t, tt.local, l.addr().String())
					require.Equal(t, rule(tt.rule+proto), l.rule)
					require.Equal(t, tt.v4, reachable(t, l, "127.0.0.1:8080"))
					require.Equal(t, tt.v6, reachable(t, l, "[::1]:8080"))
					require.Equal(t, tt.second, reachable(t, l, "127.0.0.2:8080"))
				})
			})
		}
	}
	_, err := (&binder{noIPv6: true}).bindAll([]Rule{rule("[::1]:8080:80")})
	require.EqualError(t, err, "bind host port [::1]:8080/tcp: this family of addresses is switched off")
}

// overEthernet makes the pair of interfaces eth0 and eth1 in the thread's
// namespace, with fe80::1 on both.
func overEthernet(t *testing.T) {
	t.Helper()
	ip(t, "link add eth0 type veth peer eth1")
	for _, dev := range []string{"eth0", "eth1"} {
		ip(t, "link set "+dev+" up")
		ip(t, "address add fe80::1/64 dev "+dev+" nodad")
	}
}

func TestListenOnInterface(t *testing.T) {
	inNewNS(t, func() {
		overEthernet(t)
		for _, proto := range []string{"/tcp", "/udp"} {
			lo := bind(t, &binder{}, "%lo:8080:80"+proto)[0].listeners[0]
			eth := bind(t, &binder{}, "%eth0:8080:80"+proto)[0].listeners[0]
			require.True(t, reachable(t, lo, "127.0.0.1:8080"))
			require.True(t, reachable(t, lo, "[::1]:8080"))
			lo.Close()
			require.False(t, reachable(t, eth, "127.0.0.1:8080"))
			require.False(t, reachable(t, eth, "[::1]:8080"))
			for _, zoned := range []string{"[fe80::1%eth0]:8081:80", "[fe80::1]%eth0:8082:80"} {
				l := bind(t, &binder{}, zoned+proto)[0].listeners[0]
				// The name of the zone is package net's, which remembers
				// the interfaces of another test's namespace for a minute.
				addr := l.addr().Addr()
				require.NotEmpty(t, addr.Zone())
				require.Equal(t, "fe80::1", addr.WithZone("").String())
			}
		}
		for _, missing := range []string{"%eth7:8080:80", "[fe80::1%eth7]:8080:80/udp"} {
			_, err := (&binder{}).bindAll([]Rule{rule(missing)})
			require.ErrorIs(t, err, unix.ENODEV)
			require.EqualError(t, err, "bind host port "+rule(missing).endpoint()+`: interface "eth7": no such device`)
			require.Equal(t, "see ip link show for the interfaces that there are", Hint(err))
		}
	})
}

// Kernel: which of two sockets with one port is refused is what Overlaps says.
func TestOverlapsAsTheKernel(t *testing.T) {
	inNewNS(t, func() {
		overEthernet(t)
		for _, tt := range overlapCases {
			for _, proto := range []Proto{TCP, UDP} {
				a, b := rule(tt.a), rule(tt.b)
				if a.Proto == b.Proto {
					a.Proto, b.Proto = proto, proto
				}
				for range 2 {
					first, err := (&binder{}).bindAll([]Rule{a})
					require.NoError(t, err)
					second, err := (&binder{}).bindAll([]Rule{b})
					if tt.want {
						require.ErrorIs(t, err, unix.EADDRINUSE, "%s, then %s", a, b)
					} else {
						require.NoError(t, err, "%s, then %s", a, b)
						closeAll(second[0].listeners)
					}
					closeAll(first[0].listeners)
					a, b = b, a
				}
			}
		}
	})
}

// Kernel: socket(2) says EAFNOSUPPORT where IPv6 was left out at boot
// (ipv6.disable=1), which a seccomp filter plays here.
func TestListenWithoutIPv6(t *testing.T) {
	var bindings []binding
	var explicit error
	onOwnThread(func() {
		denyIPv6(t)
		bindings = bind(t, &binder{}, "18080:80", "18080:80/udp")
		_, explicit = (&binder{}).bindAll([]Rule{rule("[::]:18082:80")})
	})
	require.Equal(t, "0.0.0.0:18080", bindings[0].listeners[0].addr().String())
	require.True(t, reachable(t, bindings[0].listeners[0], "127.0.0.1:18080"))
	require.True(t, reachable(t, bindings[1].listeners[0], "127.0.0.1:18080"))
	require.ErrorIs(t, explicit, unix.EAFNOSUPPORT)
	require.Equal(t, "this kernel has no IPv6", Hint(explicit))
}

// Kernel: ::1 is not there where IPv6 is disabled (net.ipv6.conf.lo.disable_ipv6).
func TestListenInNamespaceWithoutIPv6(t *testing.T) {
	ns := newNS(t)
	require.NoError(t, ns.Do(func() error {
		return os.WriteFile("/proc/sys/net/ipv6/conf/lo/disable_ipv6", []byte("1"), 0)
	}))
	bindings := bind(t, &binder{ns: ns}, "18081:80/tcp,out")
	require.Len(t, bindings[0].listeners, 1)
	require.Equal(t, "127.0.0.1:18081", bindings[0].listeners[0].addr().String())
}

// onOwnThread runs fn on a thread that ends with it.
func onOwnThread(fn func()) {
	var wg sync.WaitGroup
	wg.Go(func() {
		runtime.LockOSThread() // for good
		fn()
	})
	wg.Wait()
}

// denyIPv6 makes socket(AF_INET6) fail on the calling thread, for its lifetime.
func denyIPv6(t *testing.T) {
	t.Helper()
	const nrOffset, arg0Offset = 0, 16 // struct seccomp_data, little endian
	filter := []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: nrOffset},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: unix.SYS_SOCKET, Jf: 3},
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: arg0Offset},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: unix.AF_INET6, Jf: 1},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ERRNO | uint32(unix.EAFNOSUPPORT)},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW},
	}
	prog := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	require.NoError(t, unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
	_, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, 0, uintptr(unsafe.Pointer(&prog)))
	require.Zero(t, errno)
}

// usePorts makes the kernel choose free ports from these, in the thread's
// namespace.
func usePorts(t *testing.T, first, last int) {
	t.Helper()
	require.NoError(t, os.WriteFile("/proc/sys/net/ipv4/ip_local_port_range", []byte(fmt.Sprint(first, last)), 0))
}

// A free port is free for every socket that is to have it.
func TestFreePorts(t *testing.T) {
	inNewNS(t, func() {
		usePorts(t, 40000, 40003)
		bind(t, &binder{}, "127.0.0.1:40000:1/udp", "[::1]:40001:1/udp", "40002:1/udp")
		got := bind(t, &binder{}, "80", "%lo::81", "80/udp")
		for i := range got {
			require.Len(t, got[i].listeners, 1)
		}
		require.EqualValues(t, 40003, got[0].listeners[0].addr().Port(), "the only one that is free for UDP too")
		require.EqualValues(t, 40003, got[2].listeners[0].addr().Port())
		require.Equal(t, rule("40003:80/udp"), got[2].listeners[0].rule)
		require.NotEqualValues(t, 40003, got[1].listeners[0].addr().Port(), "another rule")

		_, err := (&binder{}).bindAll(parseRules([]string{"82", "82/udp"}))
		require.ErrorIs(t, err, unix.EADDRINUSE)
		require.EqualError(t, err, "bind host port (any free)/tcp: address already in use")
		require.Contains(t, Hint(err), "no free port is left in net.ipv4.ip_local_port_range")
	})
}

func TestFreePortsForRange(t *testing.T) {
	got := bind(t, &binder{}, "127.0.0.1::80-83", "127.0.0.1::80-83/udp")
	require.Len(t, got[0].listeners, 4)
	for i, l := range got[0].listeners {
		require.EqualValues(t, 80+i, l.rule.TargetPorts.First)
		require.Equal(t, l.addr(), got[1].listeners[i].addr())
	}
}

// After an error nothing is left bound.
func TestBindAllOrNothing(t *testing.T) {
	inNewNS(t, func() {
		busy := bind(t, &binder{}, "127.0.0.1:8082:80")
		rules := parseRules([]string{"8080:80", "8080:80/udp", "80", "5432:5432/tcp,out", "8081-8090:81-90"})
		b := &binder{ns: newNS(t)}
		_, err := b.bindAll(rules)
		require.ErrorIs(t, err, unix.EADDRINUSE)
		var failed *Error
		require.ErrorAs(t, err, &failed)
		require.Equal(t, rule("8082:82"), failed.Rule)

		closeAll(busy[0].listeners)
		again, err := b.bindAll(rules)
		require.NoError(t, err, "nothing of the first attempt is in the way")
		total := 0
		for _, got := range again {
			total += len(got.listeners)
			closeAll(got.listeners)
		}
		require.Equal(t, 1+1+1+2+10, total)
	})
}

func TestBindWeak(t *testing.T) {
	inNewNS(t, func() {
		bind(t, &binder{}, "8081:80", "8083:80")
		got := bind(t, &binder{}, "8080-8083:8080-8083/tcp,weak")[0]
		require.Len(t, got.listeners, 2)
		require.Len(t, got.failed, 2)
		require.ErrorIs(t, got.failed[0], unix.EADDRINUSE)
		require.Equal(t, "8081/tcp", got.failed[0].Rule.endpoint())

		_, err := (&binder{}).bindAll([]Rule{rule("8080-8083:8080-8083/tcp,weak")})
		require.EqualError(t, err, "bind any of 8080-8083/tcp: address already in use")

		auto := bind(t, &binder{}, "8084-8090:8084-8090/tcp,weak,auto")[0]
		require.Empty(t, auto.listeners, "follows the container's listeners")
	})
}

// The container's loopback is both of its addresses, and nobody else's.
func TestBindOut(t *testing.T) {
	ns := newNS(t)
	for _, text := range []string{"5432:5432/tcp,out", "5353:53/udp,out", "5433/tcp,out"} {
		got := bind(t, &binder{ns: ns}, text)[0].listeners
		require.Len(t, got, 2)
		v4, v6 := got[0], got[1]
		require.Equal(t, "127.0.0.1", v4.addr().Addr().String())
		require.Equal(t, "::1", v6.addr().Addr().String())
		require.Equal(t, v4.addr().Port(), v6.addr().Port())
		require.False(t, reachable(t, v4, v4.addr().String()), "in the host's namespace")
		require.NoError(t, ns.Do(func() error {
			require.True(t, reachable(t, v4, v4.addr().String()))
			require.True(t, reachable(t, v6, v6.addr().String()))
			return nil
		}))
	}
	_, err := (&binder{ns: ns}).bindAll([]Rule{rule("5432:1/tcp,out")})
	require.ErrorContains(t, err, "bind container port 5432/tcp: in use by forward.test (pid ")
}

func TestBindOutWithoutIPv6(t *testing.T) {
	ns := newNS(t)
	require.NoError(t, ns.Do(func() error {
		return os.WriteFile("/proc/sys/net/ipv6/conf/all/disable_ipv6", []byte("1"), 0)
	}))
	got := bind(t, &binder{ns: ns}, "5432:5432/tcp,out", "5432/udp,out")
	for _, b := range got {
		require.Len(t, b.listeners, 1)
		require.True(t, b.listeners[0].addr().Addr().Is4())
	}
}

// Binding below ip_unprivileged_port_start takes CAP_NET_BIND_SERVICE, which root
// of these tests has to give up.
func TestBindPrivilegedPort(t *testing.T) {
	ns := newNS(t)
	var err, weak error
	var all []binding
	require.NoError(t, ns.Do(func() error {
		runtime.LockOSThread() // once more than Do: the thread ends with this
		dropCap(t, unix.CAP_NET_BIND_SERVICE)
		require.NoError(t, os.WriteFile("/proc/sys/net/ipv4/ip_unprivileged_port_start", []byte("900"), 0))
		_, err = (&binder{}).bindAll([]Rule{rule("127.0.0.1:80:80")})
		_, weak = (&binder{}).bindAll([]Rule{rule("80-81:80-81/udp,weak")})
		all = bind(t, &binder{}, "898-901:898-901/tcp,weak")
		require.Equal(t, "net.ipv4.ip_unprivileged_port_start is 900: choose a port from there on, or as root: "+
			"sysctl -w net.ipv4.ip_unprivileged_port_start=80, or let systemd bind it (socket activation)", Hint(err))
		return nil
	}))
	require.ErrorIs(t, err, os.ErrPermission)
	require.EqualError(t, err, "bind host port 127.0.0.1:80/tcp: permission denied")
	require.EqualError(t, weak, "bind any of 80-81/udp: permission denied")
	require.Len(t, all[0].listeners, 2)
	require.Len(t, all[0].failed, 2)
}

// dropCap takes a capability from the calling thread, for its lifetime.
func dropCap(t *testing.T, capability uint) {
	t.Helper()
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	require.NoError(t, unix.Capget(&header, &data[0]))
	data[capability/32].Effective &^= 1 << (capability % 32)
	data[capability/32].Permitted &^= 1 << (capability % 32)
	require.NoError(t, unix.Capset(&header, &data[0]))
}

func TestBindForeignAddress(t *testing.T) {
	for _, text := range []string{"203.0.113.5:8080:80", "[2001:db8::5]:8080:80/udp"} {
		_, err := (&binder{}).bindAll([]Rule{rule(text)})
		require.EqualError(t, err, "bind host port "+rule(text).endpoint()+": cannot assign requested address")
		require.Equal(t, "no interface of this host has the address "+rule(text).Addr.String()+", see ip address show", Hint(err))
	}
}

// The end of RLIMIT_NOFILE is an error for weak rules too: the ports would
// otherwise depend on what else is open. If it can be foreseen nothing is bound.
func TestBindTooManyFiles(t *testing.T) {
	open, err := os.ReadDir("/proc/self/fd")
	require.NoError(t, err)
	const limit = 100
	require.Less(t, len(open), limit-10)
	busy, err := net.Listen("tcp", ":20001")
	require.NoError(t, err)
	defer busy.Close()
	tried := false
	b := &binder{makeRoom: func(Rule) bool { tried = true; return false }}
	for rules, want := range map[string]string{
		"20001-20200:1-200/tcp,weak": `^bind ports: 200 sockets are needed, and \d+ are allowed: too many open files$`,
		"20002-20062:1-61/tcp,weak":  `^bind host port 20\d+/tcp: too many open files$`,
	} {
		restore := limitFiles(t, limit)
		var fill []*os.File // all but ten
		for n := len(open); n < limit-10; n++ {
			f, _ := os.Open("/dev/null")
			fill = append(fill, f)
		}
		_, err := b.bindAll([]Rule{rule(rules)})
		hint := Hint(err)
		for _, f := range fill {
			f.Close()
		}
		restore()
		require.ErrorIs(t, err, unix.EMFILE)
		require.Regexp(t, want, err.Error())
		require.Contains(t, hint, "the limit of open files is 100,")
		require.False(t, tried)
	}
	bind(t, &binder{}, "20002-20201:1-200")
}

// limitFiles bounds the descriptors of this process until restore is called.
func limitFiles(t *testing.T, n uint64) (restore func()) {
	t.Helper()
	var old unix.Rlimit
	require.NoError(t, unix.Getrlimit(unix.RLIMIT_NOFILE, &old))
	require.NoError(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: n, Max: old.Max}))
	return func() { require.NoError(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &old)) }
}
