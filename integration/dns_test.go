package integration

import (
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// withEtc is a copy of what programs need of /etc, and lets a program run with it
// in place of /etc: files in it can be replaced, as editors and resolvconf do.
func withEtc(t *testing.T, resolvConf string) (dir string, wrap func(*exec.Cmd) *exec.Cmd) {
	t.Helper()
	need(t, "unshare", "mount")
	dir = t.TempDir()
	for _, name := range []string{"passwd", "group", "nsswitch.conf", "hosts", "services", "protocols", "ld.so.cache"} {
		if b, err := os.ReadFile("/etc/" + name); err == nil {
			require.NoError(t, os.WriteFile(filepath.Join(dir, name), b, 0o644))
		}
	}
	setResolvConf(t, dir, resolvConf)
	return dir, func(cmd *exec.Cmd) *exec.Cmd {
		script := `mount --bind "$0" /etc && exec "$@"`
		wrapped := exec.Command("unshare", append([]string{"-m", "sh", "-c", script, dir}, cmd.Args...)...)
		wrapped.ExtraFiles = cmd.ExtraFiles
		return wrapped
	}
}

// setResolvConf replaces resolv.conf by another file of that name.
func setResolvConf(t *testing.T, etc, content string) {
	t.Helper()
	next := filepath.Join(etc, "resolv.conf.next")
	require.NoError(t, os.WriteFile(next, []byte(content), 0o644))
	require.NoError(t, os.Rename(next, filepath.Join(etc, "resolv.conf")))
}

// startDNS is a real nameserver, dnsmasq, that knows who.test as answer and a long
// record big.test.
func (n *node) startDNS(t *testing.T, listen, answer netip.Addr) {
	t.Helper()
	need(t, "dnsmasq", "dig")
	n.start(t, "dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--user=root", "--group=",
		"--pid-file=", "--no-resolv", "--no-hosts", "--log-facility=-", "--log-queries",
		"--bind-interfaces", "--except-interface=lo", "--listen-address="+listen.String(),
		"--edns-packet-max=4096", "--address=/who.test/"+answer.String(),
		"--txt-record=big.test,"+strings.Repeat(strings.Repeat("x", 200)+",", 14)+"end")
	n.waitPort(t, "udp", 53)
	n.waitPort(t, "tcp", 53)
}

// dig asks the nameserver that the container has, for a record of the kind.
func (n *node) dig(t *testing.T, server netip.Addr, name, kind string, opts ...string) result {
	t.Helper()
	argv := append([]string{"dig", "@" + server.String(), "+tries=2", "+time=3"}, opts...)
	return n.run(t, append(argv, name, kind)...)
}

func (n *node) requireDig(t *testing.T, server, want netip.Addr, opts ...string) {
	t.Helper()
	kind := "A"
	if want.Is6() {
		kind = "AAAA"
	}
	r := n.dig(t, server, "who.test", kind, append(opts, "+short")...)
	require.Zero(t, r.code, "%s%s", r.stdout, r.stderr)
	require.Equal(t, want.String()+"\n", r.stdout, "%v", opts)
}

// waitDig asks until the answer is as wanted, after a change of resolv.conf.
func (n *node) waitDig(t *testing.T, server netip.Addr, want string) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for {
		r := n.dig(t, server, "who.test", "A", "+short")
		if r.stdout == want+"\n" {
			return
		}
		require.True(t, time.Now().Before(deadline), "the answer is not %s, but %s%s", want, r.stdout, r.stderr)
		time.Sleep(100 * time.Millisecond)
	}
}

// TestDNS: the container's DNS addresses lead to the host's nameserver, over UDP
// and TCP, for small and large answers, and follow resolv.conf.
func TestDNS(t *testing.T) {
	t.Parallel()
	tp := newTopo(t)
	tp.client.startDNS(t, ipv4.client, addr("192.0.2.11"))
	tp.client.startDNS(t, ipv6.client, addr("192.0.2.16"))
	tp.client.startDNS(t, ipv4.client2, addr("192.0.2.12"))
	etc, wrap := withEtc(t, "nameserver "+ipv4.client.String()+"\n")
	g := tp.host.startGofwdCmd(t, tp.ctr.id, wrap(gofwdCmd("attach", "--netns", tp.ctr.path)))

	eachFamily(t, func(t *testing.T, f family) {
		for _, opts := range [][]string{nil, {"+tcp"}, {"+noedns"}} {
			tp.ctr.requireDig(t, f.dns, addr("192.0.2.11"), opts...)
		}
		// Too large for a UDP answer without EDNS: truncated, and asked
		// again over TCP.
		r := tp.ctr.dig(t, f.dns, "big.test", "TXT", "+noedns", "+ignore")
		require.Contains(t, r.stdout, "flags: qr aa tc", "%s", r.stdout)
		r = tp.ctr.dig(t, f.dns, "big.test", "TXT", "+noedns")
		require.Contains(t, r.stdout, "Truncated, retrying in TCP mode", "%s", r.stdout)
		require.Contains(t, r.stdout, `"end"`)
		r = tp.ctr.dig(t, f.dns, "big.test", "TXT", "+bufsize=4096", "+ignore")
		require.Contains(t, r.stdout, `"end"`, "an answer in fragments: %s", r.stdout)
		// What the nameserver doesn't know, the container is told so.
		r = tp.ctr.dig(t, f.dns, "unknown.test", "A")
		require.Contains(t, r.stdout, "status: REFUSED", "%s", r.stdout)
	})

	// resolv.conf changes while gofwd runs: other address, other family.
	for _, c := range []struct{ nameserver, want string }{
		{ipv4.client2.String(), "192.0.2.12"},
		{ipv6.client.String(), "192.0.2.16"},
		{ipv4.client.String(), "192.0.2.11"},
	} {
		setResolvConf(t, etc, "# a comment\nsearch test\nnameserver "+c.nameserver+"\noptions edns0\n")
		eachFamily(t, func(t *testing.T, f family) {
			tp.ctr.waitDig(t, f.dns, c.want)
			tp.ctr.requireDig(t, f.dns, addr(c.want), "+tcp")
		})
	}

	// A first nameserver that does not answer, and none at all.
	setResolvConf(t, etc, "nameserver "+ipv4.silent.String()+"\nnameserver "+ipv4.client2.String()+"\n")
	tp.ctr.waitDig(t, ipv4.dns, "192.0.2.12")
	require.NoError(t, os.Remove(filepath.Join(etc, "resolv.conf")))
	r := tp.ctr.dig(t, ipv4.dns, "who.test", "A", "+short", "+tries=1", "+time=1")
	require.True(t, g.running(), "%s", r.stdout)
	setResolvConf(t, etc, "nameserver "+ipv4.client.String()+"\n")
	tp.ctr.waitDig(t, ipv4.dns, "192.0.2.11")
}

// TestDNSOnLoopback: a nameserver on the host's loopback, such as
// systemd-resolved, is the container's too; nothing else of the loopback is.
func TestDNSOnLoopback(t *testing.T) {
	t.Parallel()
	for _, nameserver := range []string{"127.0.0.53", "::1"} {
		t.Run(nameserver, func(t *testing.T) {
			t.Parallel()
			tp := newTopo(t)
			need(t, "dnsmasq", "dig")
			tp.host.start(t, "dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--user=root",
				"--group=", "--pid-file=", "--no-resolv", "--no-hosts", "--bind-interfaces",
				"--listen-address="+nameserver, "--address=/who.test/192.0.2.53")
			tp.host.waitPort(t, "udp", 53)
			_, wrap := withEtc(t, "nameserver "+nameserver+"\n")
			tp.host.startGofwdCmd(t, tp.ctr.id, wrap(gofwdCmd("attach", "--netns", tp.ctr.path)))
			go whoUDP(tp.host.listenUDP(t, addr(nameserver), 54))
			eachFamily(t, func(t *testing.T, f family) {
				tp.ctr.requireDig(t, f.dns, addr("192.0.2.53"))
				tp.ctr.requireDig(t, f.dns, addr("192.0.2.53"), "+tcp")
				require.Error(t, udpAnswers(tp.ctr, t, netip.AddrPortFrom(f.dns, 54)))
			})
		})
	}
}

// TestDNSAddress: the DNS address is where --dns and --dns-forward say.
func TestDNSAddress(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		opts []string
		at   netip.Addr
	}{
		{[]string{"--dns", "10.0.2.53"}, addr("10.0.2.53")},
		{[]string{"--dns-forward", "169.254.1.1"}, addr("169.254.1.1")},
		{[]string{"--address", "172.30.0.5/16"}, addr("172.30.0.3")},
	} {
		t.Run(fmt.Sprint(c.opts), func(t *testing.T) {
			t.Parallel()
			tp := newTopo(t)
			tp.client.startDNS(t, ipv4.client, addr("192.0.2.11"))
			_, wrap := withEtc(t, "nameserver "+ipv4.client.String()+"\n")
			tp.host.startGofwdCmd(t, tp.ctr.id,
				wrap(gofwdCmd(append([]string{"attach", "--netns", tp.ctr.path}, c.opts...)...)))
			tp.ctr.requireDig(t, c.at, addr("192.0.2.11"))
		})
	}
}
