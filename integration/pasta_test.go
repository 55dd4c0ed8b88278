package integration

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// gofwd is called as pasta here, and beside it the real one, if $PASTA or the PATH
// has it: each row below holds for both, but where it says why not.

// pastaEnv names a pasta to compare with.
const pastaEnv = "PASTA"

// pastaProgram is something that takes pasta's command line.
type pastaProgram struct {
	name    string // "gofwd" or "pasta"
	path    string
	options []string // of its --help; nil for gofwd
}

func (p pastaProgram) real() bool { return p.options != nil }

// pastaPrograms are gofwd and, where there is one, pasta. That there is none is
// told at the end, and skips nothing: gofwd is what is tested.
func pastaPrograms(t *testing.T) []pastaProgram {
	t.Helper()
	link := filepath.Join(t.TempDir(), "pasta")
	require.NoError(t, os.Symlink(os.Getenv(binEnv), link))
	programs := []pastaProgram{{name: "gofwd", path: link}}
	path := os.Getenv(pastaEnv)
	if path == "" {
		path, _ = exec.LookPath("pasta")
	}
	if path == "" {
		fmt.Printf("%s: not compared with pasta, which is neither in $%s nor in the PATH\n", t.Name(), pastaEnv)
		return programs
	}
	help, err := exec.Command(path, "--help").CombinedOutput()
	require.NoError(t, err, "%s --help: %s", path, help)
	return append(programs, pastaProgram{name: "pasta", path: path, options: optionsIn(string(help))})
}

// optionsIn are the long options that a pasta --help describes.
func optionsIn(help string) []string {
	var options []string
	for _, m := range regexp.MustCompile(`(?m)^\s+(?:-[A-Za-z0-9],? )?(--[a-z0-9-]+)`).FindAllStringSubmatch(help, -1) {
		options = append(options, m[1])
	}
	return options
}

// knownPastaOptions are those that have a row.
func knownPastaOptions(t *testing.T) []string {
	t.Helper()
	b, err := os.ReadFile("testdata/pasta-options.txt")
	require.NoError(t, err)
	options := optionsIn(regexp.MustCompile(`(?m)^`).ReplaceAllString(string(b), "  "))
	require.Greater(t, len(options), 50)
	return options
}

// TestPastaHelp: every option that pasta has is in a row, with an effect that is
// observed, and no row is about another one. A pasta with options that are not in
// the list is newer than the list.
func TestPastaHelp(t *testing.T) {
	t.Parallel()
	var rows []string
	for _, r := range slices.Concat(pastaCommands, pastaRefused) {
		rows = append(rows, strings.Fields(r.options)...)
	}
	for _, r := range pastaDaemons {
		rows = append(rows, strings.Fields(r.options)...)
	}
	known := knownPastaOptions(t)
	for _, o := range known {
		require.Contains(t, rows, o, "this option has no row")
	}
	deprecated := []string{"--stderr"} // accepted, but not in --help
	for _, o := range rows {
		require.Contains(t, slices.Concat(known, deprecated), o, "this row is about no option of pasta")
	}
	for _, p := range pastaPrograms(t) {
		for _, o := range p.options {
			require.Contains(t, known, o, "%s has an option that is not in testdata/pasta-options.txt", p.path)
		}
	}
}

// pastaCommand is a row: a command in a namespace of its own.
type pastaCommand struct {
	options string // that it is about
	args    string // DIR is a directory for files, PORT a free port, ASK testdata/ask.sh
	script  string // the command, for sh -c; "" is none
	want    string // standard output matches
	not     string // standard output does not match
	code    int
	stderr  string // standard error matches; "" matches everything
	ours    string // why it holds for gofwd alone
}

const (
	lookAddrs  = "ip -o addr show scope global"
	lookRoutes = "ip route; ip -6 route"
	// askClient asks the client what it sees: not at the address that is the
	// host's gateway, which pasta takes for the host's loopback.
	askClient = "socat - TCP:198.51.100.3:7000; "
	silently  = " || echo nothing"
)

var pastaCommands = []pastaCommand{
	{options: "--help", args: "-h", want: `^Usage: `},
	{options: "--help", args: "--help", want: `PID`},
	{options: "--version", args: "--version", want: `^pasta \S+\n`},

	{options: "--debug", args: "--config-net -d", script: askClient + "sleep 0.2", stderr: `.`},
	{options: "--trace", args: "--config-net --trace", script: askClient + "sleep 0.2", stderr: `.`},
	{options: "--quiet --debug", args: "--config-net -d -q", script: askClient + "sleep 0.2", stderr: `^$`},
	{options: "--stats", args: "--config-net -f --stats 1", script: askClient + "sleep 1.5; " + askClient, stderr: `.`},
	{options: "--runas", args: "--runas 0:0", script: "id -u", want: `^0\n`},
	{options: "--runas", args: "--runas 12345", script: "true", code: 1, stderr: `.`}, // not in our user namespace
	{options: "--runas", args: "--runas no-such-user", script: "true", code: 1, stderr: `--runas.*no-such-user`},
	{options: "--pcap", args: "--config-net -p DIR/pcap", script: "ping -q -c 1 198.51.100.3 >&2; sleep 0.1; wc -c <DIR/pcap", want: `^\s*[1-9]\d\d+\n`},
	{options: "--stderr", args: "-e --stderr", script: "echo works", want: `works`},
	{options: "--chroot-fallback", args: "--chroot-fallback", script: "echo works", want: `works`},
	{options: "--fd", args: "-F 9", script: "echo works", want: `works`, ours: "it polls the descriptor"},
	{options: "--no-pidns", script: "echo $$; ls /proc", want: `(?s)^1\n1\n`},
	{options: "--no-pidns", args: "--no-pidns", script: "echo $$", not: `^1\n`},
	{options: "--netns-only", args: "--netns-only", script: "readlink /proc/self/ns/user", want: `^USERNS\n`},
	{options: "--netns-only", script: "readlink /proc/self/ns/user", not: `^USERNS\n`},

	{options: "--config-net", args: "--config-net", script: lookAddrs, want: `198\.51\.100\.1/24`},
	{options: "--config-net", script: lookAddrs, not: `198\.51\.100\.1/24`},
	{options: "--ns-ifname", args: "--config-net -I foo7", script: lookAddrs, want: `foo7 +inet 198`},
	{options: "--ns-ifname", args: "--config-net", script: lookAddrs, want: `eth0 +inet 198`},
	{options: "--mtu", args: "--config-net -m 1400", script: "ip link show eth0", want: `mtu 1400`},
	{options: "--mtu", args: "--config-net", script: "ip link show eth0", want: `mtu 65520`},
	{options: "--mtu", args: "-m 70000", script: "true", code: 1, stderr: `70000`},
	{options: "--address", args: "--config-net -a 192.0.2.77 -a 2001:db8:77::7", script: lookAddrs, want: `(?s)192\.0\.2\.77/24.*2001:db8:77::7/64`, not: `198\.51|2001:db8:1:`},
	{options: "--address --netmask", args: "--config-net -a 192.0.2.77 -n 255.255.255.240", script: lookAddrs, want: `192\.0\.2\.77/28`},
	{options: "--netmask", args: "--config-net -a 192.0.2.77 -n 28", script: lookAddrs, want: `192\.0\.2\.77/28`},
	{options: "--netmask", args: "-n 300", script: "true", code: 1, stderr: `300`},
	{options: "--gateway", args: "--config-net -a 192.0.2.77 -g 192.0.2.65", script: lookRoutes, want: `default via 192\.0\.2\.65`},
	{options: "--interface", args: "--config-net -i eth1", script: lookAddrs, want: `eth1 +inet 203\.0\.113\.1/24`},
	{options: "--interface", args: "-i nosuch0", script: "true", code: 1, stderr: `nosuch0`},
	{options: "--ipv4-only", args: "--config-net -4", script: lookAddrs, want: `198\.51`, not: `2001:`},
	{options: "--ipv6-only", args: "--config-net -6", script: lookAddrs, want: `2001:`, not: `198\.51`},
	{options: "--no-copy-routes", args: "--config-net", script: lookRoutes, want: `(?s)default via 198.*198\.18\.0\.0/15 via`},
	{options: "--no-copy-routes", args: "--config-net --no-copy-routes", script: lookRoutes, want: `default via 198`, not: `198\.18\.0\.0/15`},
	{options: "--no-copy-addrs", args: "--config-net", script: lookAddrs, want: `(?s)198\.51\.100\.1/24.*198\.51\.100\.11/24`},
	{options: "--no-copy-addrs", args: "--config-net --no-copy-addrs", script: lookAddrs, want: `198\.51\.100\.1/24`, not: `198\.51\.100\.11/24`},
	{options: "--no-copy-addrs", args: "--no-copy-addrs", script: "true", code: 1, stderr: `--config-net`},
	{options: "--splice-only", args: "--splice-only", script: "ip -o link", want: `^1: lo: <LOOPBACK,UP,.*\n$`},

	{options: "--outbound", args: "--config-net", script: askClient, want: `^198\.51\.100\.1:`},
	{options: "--outbound", args: "--config-net -o 198.51.100.11 -o 2001:db8:1::11", script: askClient + "socat - TCP:[2001:db8:1::3]:7000", want: `^198\.51\.100\.11:\d+\n\[2001:db8:1::11\]:`},
	{options: "--outbound", args: "-o nonsense", script: "true", code: 1, stderr: `nonsense`},
	{options: "--outbound-if4", args: "--config-net -i eth0 --outbound-if4 eth1", script: askClient, want: `^203\.0\.113\.1:`},
	{options: "--outbound-if6", args: "--config-net -i eth0 --outbound-if6 eth1", script: "socat - TCP:[2001:db8:1::3]:7000", want: `^\[2001:db8:2::1\]:`},
	{options: "--map-host-loopback", args: "--config-net --map-host-loopback 198.51.100.99", script: "socat - TCP:198.51.100.99:7001", want: `^127\.0\.0\.1:`},
	{options: "--no-map-gw", args: "--config-net", script: "socat - TCP:198.51.100.2:7001", want: `^127\.0\.0\.1:`},
	{options: "--no-map-gw", args: "--config-net --no-map-gw", script: "socat - TCP:198.51.100.2:7001" + silently, want: `^nothing`},
	{options: "--map-guest-addr", args: "--config-net --map-guest-addr 169.254.1.2", script: "socat - TCP:169.254.1.2:7002", want: `^198\.51\.100\.1:`},
	{options: "--dns-forward --dns-host", args: "--config-net --dns-forward 169.254.1.1 --dns-host 198.51.100.3", script: "socat - TCP:169.254.1.1:53", want: `^198\.51\.100\.1:`},
	{options: "--dns-forward", args: "--config-net --dns-host 198.51.100.3", script: "socat - TCP:169.254.1.1:53,connect-timeout=1" + silently, want: `^nothing`},
	{options: "--no-tcp", args: "--config-net --no-tcp", script: "socat - TCP:198.51.100.3:7000,connect-timeout=1" + silently, want: `^nothing`},
	{options: "--no-udp", args: "--config-net", script: "echo who | socat -t 5 - UDP:198.51.100.3:7003", want: `^198\.51\.100\.1:`},
	{options: "--no-udp", args: "--config-net --no-udp", script: "echo who | socat -t 1 - UDP:198.51.100.3:7003 | grep ." + silently, want: `^nothing`},
	{options: "--no-icmp", args: "--config-net", script: "ping -q -c 1 198.51.100.3", want: ` 1 received`},
	{options: "--no-icmp", args: "--config-net --no-icmp", script: "ping -q -c 1 -W 1 198.51.100.3" + silently, want: ` 0 received`},
	{options: "--freebind", args: "-t 192.0.2.123/PORT", script: "echo works", code: 1, stderr: `192\.0\.2\.123`},
	{options: "--freebind", args: "--freebind -t 192.0.2.123/PORT", script: "echo works", want: `works`},

	// What a container that configures itself is told.
	{options: "--config-net", script: "ASK dhcp", want: `(?s)ip=198\.51\.100\.1\n.*mask=24\nmtu=65520\n.*router=198\.51\.100\.2\n`, not: `dns=|hostname=|search=`},
	{options: "--mtu", args: "-m 1400", script: "ASK dhcp", want: `mtu=1400`},
	{options: "--mtu", args: "-m 0", script: "ASK dhcp", want: `router=`, not: `mtu=`},
	{options: "--address --gateway", args: "-a 192.0.2.77/28 -g 192.0.2.65", script: "ASK dhcp", want: `(?s)ip=192\.0\.2\.77\n.*mask=28\n.*router=192\.0\.2\.65\n`},
	{options: "--dns --dhcp-dns", args: "-D 192.0.2.53 --dns 192.0.2.54 --dhcp-dns", script: "ASK dhcp", want: `dns=192\.0\.2\.53 192\.0\.2\.54\n`},
	{options: "--dns", args: "-D 192.0.2.53", script: "ASK dhcp", want: `router=`, not: `dns=`},
	{options: "--dns", args: "-D none --dhcp-dns", script: "ASK dhcp", want: `router=`, not: `dns=`},
	{options: "--dns --dhcp-dns", args: "-D 2001:db8::53 --dhcp-dns", script: "ASK router", want: `DNS server +: 2001:db8::53`},
	{options: "--search --dhcp-search", args: "-S a.test --dhcp-search", script: "ASK dhcp", want: `search=a\.test\n`},
	{options: "--search --dhcp-search", args: "-S a.test --dhcp-search", script: "ASK router", want: `search list +: a\.test`, ours: "without nameservers it tells the routers' clients no domains"},
	{options: "--search", args: "-S a.test", script: "ASK dhcp", want: `router=`, not: `search=`},
	{options: "--hostname", args: "-H name7", script: "ASK dhcp", want: `hostname=name7\n`},
	{options: "--hostname", args: "-H name7", script: "hostname", want: `^name7\n`},
	{options: "--hostname", script: "hostname", want: `^pasta-`},
	{options: "--fqdn", args: "--fqdn name7.test", script: "ASK dhcp", want: `opt81=04ffff056e616d65370474657374`},
	{options: "--no-dhcp", args: "--no-dhcp", script: "ASK dhcp" + silently, want: `nothing`},
	{options: "--no-ra", script: "ASK router", want: `Prefix +: 2001:db8:1::`},
	{options: "--no-ra", args: "--no-ra", script: "ASK router" + silently, want: `nothing`},
	{options: "--no-ra --config-net", args: "--config-net", script: "ASK router" + silently, want: `nothing`},
	{options: "--no-dhcpv6", script: "ASK dhcpv6", want: `ia_addr1=2001:db8:1::11\n`},
	{options: "--dns --dhcp-dns --fqdn", args: "-D 2001:db8::53 --dhcp-dns --fqdn name7.test", script: "ASK dhcpv6", want: `(?s)fqdn=name7\.test\n.*name_servers=2001:db8::53\n`},
	{options: "--search --dhcp-search", args: "-S a.test --dhcp-search", script: "ASK dhcpv6", want: `domain_search=a\.test\n`},
	{options: "--no-dhcpv6", args: "--no-dhcpv6", script: "ASK dhcpv6" + silently, want: `nothing`},
	{options: "--no-ndp", args: "--config-net", script: "ping -q -c 1 2001:db8:1::3; ip neigh", want: ` 1 received`},
	{options: "--no-ndp", args: "--config-net --no-ndp", script: "ping -q -c 1 -W 1 2001:db8:1::3; ip -6 neigh", want: `INCOMPLETE|FAILED`},
	{options: "--no-ndp --no-icmp", args: "--config-net --no-icmp", script: "ping -q -c 1 -W 1 2001:db8:1::3; ip -6 neigh", want: `INCOMPLETE|FAILED`},
	{options: "--mac-addr", args: "--config-net -M 9a:55:9a:55:9a:56", script: "ping -q -c 1 198.51.100.2 >&2; ip neigh show 198.51.100.2", want: `9a:55:9a:55:9a:56`},
	{options: "--ns-mac-addr", args: "--ns-mac-addr 9a:55:9a:55:9a:58", script: "ip -o link show eth0", want: `9a:55:9a:55:9a:58`, not: `[<,]UP`},
	{options: "--ns-mac-addr", args: "--config-net --ns-mac-addr 9a:55:9a:55:9a:58", script: "ip -o link show eth0", want: `(?s)[<,]UP.*9a:55:9a:55:9a:58`},
	{options: "--mac-addr", args: "-M 9a:55", script: "true", code: 1, stderr: `9a:55`},
	{options: "--dns", args: "-D nonsense", script: "true", code: 1, stderr: `nonsense`},

	// The command line as getopt_long(3) has it, and exit codes.
	{args: "--ns-if=foo8 --config-n", script: "ip -o link", want: `foo8`},
	{args: "-4Ifoo9", script: "ip -o link", want: `foo9`},
	{args: "--no-d", code: 1, stderr: `option '--no-d' is ambiguous; possibilities: '--no-dhcp`},
	{args: "--frobnicate", code: 1, stderr: `unrecognized option '--frobnicate'`},
	{args: "-Z", code: 1, stderr: `invalid option -- 'Z'`},
	{args: "--debug=3", code: 1, stderr: `option '--debug' doesn't allow an argument`},
	{args: "--mtu", code: 1, stderr: `option '--mtu' requires an argument`},
	{args: "-m", code: 1, stderr: `option requires an argument -- 'm'`},
	{args: "--splice-only --no-splice", script: "true", code: 1, stderr: `--splice-only is incompatible with --no-splice`},
	{args: "--no-splice --host-lo-to-ns-lo", script: "true", code: 1, stderr: `incompatible`},
	{args: "--netns /x --no-pidns", code: 1, stderr: `--no-pidns is incompatible with PID or --netns`},
	{script: "exit 7", code: 7},
	{args: "--no-pidns", script: "kill -9 $$", code: 128 + 9},
}

// pastaRefused are options of passt(1), which pasta refuses as well.
var pastaRefused = []pastaCommand{
	{args: "-s DIR/socket"},
	{args: "--one-off"},
	{args: "--repair-path DIR/socket"},
	{args: "--migrate-exit"},
	{args: "--migrate-no-linger"},
	{args: "--no-dhcp-dns"},
	{args: "--no-dhcp-search"},
}

// TestPastaCommands runs each row.
func TestPastaCommands(t *testing.T) {
	t.Parallel()
	need(t, "socat", "ping", "udhcpc", "dhcpcd", "rdisc6")
	tp := newTopo(t)
	tp.host.ip(t, `
		route add 198.18.0.0/15 via 198.51.100.3
		route add default via 203.0.113.2 dev eth1 metric 5000
		route add default via 2001:db8:2::2 dev eth1 metric 5000`)
	tp.client.serveWho(t, 7000, ipv4.any, ipv6.any)
	tp.client.serveWho(t, 7003, ipv4.client2) // UDP answers from there
	tp.client.serveWho(t, 53, ipv4.any)
	tp.host.serveWho(t, 7001, ipv4.loopback)
	tp.host.serveWho(t, 7002, ipv4.any)
	userNS, err := os.Readlink("/proc/self/ns/user")
	require.NoError(t, err)
	programs := pastaPrograms(t)
	for _, row := range pastaCommands {
		row.want, row.not = strings.ReplaceAll(row.want, "USERNS", regexp.QuoteMeta(userNS)), strings.ReplaceAll(row.not, "USERNS", regexp.QuoteMeta(userNS))
		for _, p := range programs {
			if !p.does(row.options) || p.real() && row.ours != "" {
				continue
			}
			t.Run(p.name+" "+row.args, func(t *testing.T) {
				t.Parallel()
				row.check(t, tp.host, p)
			})
		}
	}
}

// does reports whether the program is new enough to have the options.
func (p pastaProgram) does(options string) bool {
	return !p.real() || !slices.ContainsFunc(strings.Fields(options), func(o string) bool {
		return o != "--stderr" && !slices.Contains(p.options, o)
	})
}

func (r pastaCommand) check(t *testing.T, n *node, p pastaProgram) {
	t.Helper()
	got := p.run(t, n, r.args, r.script)
	require.Equal(t, r.code, got.code, "%s: %s%s", r.script, got.stdout, got.stderr)
	require.Regexp(t, r.want, got.stdout, "%s: %s", r.script, got.stderr)
	if r.not != "" {
		require.NotRegexp(t, r.not, got.stdout)
	}
	require.Regexp(t, r.stderr, got.stderr)
}

// run runs the program with arguments and a command, and forwards no ports but
// those that are asked for.
func (p pastaProgram) run(t *testing.T, n *node, args, script string) result {
	t.Helper()
	port := "8088"
	if p.real() {
		port = "8089" // both run at once
	}
	wd, err := os.Getwd()
	require.NoError(t, err)
	given := strings.NewReplacer("DIR", t.TempDir(), "PORT", port, "ASK", filepath.Join(wd, "testdata/ask.sh"))
	argv := []string{p.path}
	if script != "" {
		argv = append(argv, noPortsBut(args)...)
	}
	argv = append(argv, strings.Fields(given.Replace(args))...)
	if script != "" {
		argv = append(argv, "sh", "-c", given.Replace(script))
	}
	return n.run(t, argv...)
}

// noPortsBut are the options that forward no ports, but of kinds that are in args.
func noPortsBut(args string) []string {
	var none []string
	for _, kind := range []string{"-t", "-u", "-T", "-U"} {
		if !slices.Contains(strings.Fields(args), kind) {
			none = append(none, kind, "none")
		}
	}
	return none
}

// TestPastaRefused: what gofwd does not do ends with exit code 1 and says by name
// what it is. Nothing is left out without a word.
func TestPastaRefused(t *testing.T) {
	t.Parallel()
	host := newNode(t, "host")
	gofwd := pastaPrograms(t)[0]
	for _, row := range pastaRefused {
		t.Run(row.args, func(t *testing.T) {
			t.Parallel()
			got := gofwd.run(t, host, row.args, "echo works")
			require.Equal(t, 1, got.code, "%s%s", got.stdout, got.stderr)
			require.Empty(t, got.stdout)
			require.Regexp(t, `^--[a-z0-9-]+: `, got.stderr)
		})
	}
}

// TestPastaShell: without a command it is $SHELL.
func TestPastaShell(t *testing.T) {
	t.Parallel()
	host := newNode(t, "host")
	for _, p := range pastaPrograms(t) {
		t.Run(p.name, func(t *testing.T) {
			t.Parallel()
			shell := filepath.Join(t.TempDir(), "shell")
			require.NoError(t, os.WriteFile(shell, []byte("#!/bin/sh\necho shell with $# arguments, as $$\n"), 0o700))
			cmd := exec.Command(p.path, noPortsBut("")...)
			cmd.Env = append(os.Environ(), "SHELL="+shell)
			r := host.runCmd(t, cmd)
			require.Zero(t, r.code, r.stderr)
			require.Equal(t, "shell with 0 arguments, as 1\n", r.stdout)
		})
	}
}

// TestPastaSignals: a command that is an init gets what it catches, and is ended by
// what it does not catch, as it would be if it were none: the kernel keeps that
// from an init (pid_namespaces(7)).
func TestPastaSignals(t *testing.T) {
	t.Parallel()
	host := newNode(t, "host")
	p := pastaPrograms(t)[0]
	for _, tt := range []struct {
		script string
		signal unix.Signal
		group  bool // as ^C
		code   int
	}{
		{"echo there; exec sleep 1000", unix.SIGTERM, false, 128 + 15},
		{"echo there; exec sleep 1000", unix.SIGINT, true, 128 + 2},
		{"trap 'exit 5' TERM; echo there; sleep 1000 & wait", unix.SIGTERM, false, 5},
		{"trap 'exit 6' INT; echo there; sleep 1000 & wait", unix.SIGINT, true, 6},
		{"trap '' HUP; echo there; sleep 0.5; exit 7", unix.SIGHUP, false, 7},
		// As an init does that waits for signals with sigwait(3).
		{`exec env --block-signal=TERM awk 'BEGIN { print "there"; fflush(); system("sleep 0.5"); exit 8 }'`, unix.SIGTERM, false, 8},
		{"echo there; exec sleep 1000", unix.SIGKILL, false, -1},
	} {
		t.Run(fmt.Sprintf("%s %s", unix.SignalName(tt.signal), tt.script), func(t *testing.T) {
			t.Parallel()
			proc := host.start(t, append(append([]string{p.path}, noPortsBut("")...), "sh", "-c", tt.script)...)
			proc.waitLog(t, "there")
			family := children(proc.cmd.Process.Pid)
			pid := proc.cmd.Process.Pid
			if tt.group {
				pid = -pid // startCmd makes it a process group
			}
			require.NoError(t, unix.Kill(pid, tt.signal))
			require.Equal(t, tt.code, proc.exit(t, patience))
			requireGone(t, family)
		})
	}
}
