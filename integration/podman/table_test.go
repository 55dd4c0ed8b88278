//go:build podman

package podman

import (
	"flag"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/gofwd/gofwd/netnsutil"
)

var updateREADME = flag.Bool("readme", false, "write the table into README.md")

// What containers call the host.
const alias4, alias6 = "169.254.1.2", "fd67:6f66:7764::1"

// clients are the columns of the table.
var clients = []struct {
	name   string
	remote bool
	dst    string
	own    string // address
}{
	{"another host, IPv4", true, host4, client4},
	{"another host, IPv6", true, host6, client6},
	{"the host, IPv4", false, host4, host4},
	{"the host, IPv6", false, host6, host6},
	{"127.0.0.1", false, "127.0.0.1", alias4},
	{"::1", false, "::1", alias6},
}

// networkMode is a row of the table: a way to give a container a network.
type networkMode struct {
	name string
	// start starts it with TCP port 8080 and UDP port 5353 published.
	start func(t *testing.T, l *lab)
	// oursOnly is for ways that Podman's own helpers don't have.
	oursOnly bool
	// copied says that the container has the host's addresses, so that a
	// client there is seen as the alias.
	copied bool
	// only4 says that the container has no IPv6 address.
	only4 bool
}

var publish = []string{"-p", "8080:80", "-p", "5353:5353/udp"}

func runWith(args ...string) func(*testing.T, *lab) {
	return func(t *testing.T, l *lab) {
		t.Helper()
		argv := append([]string{"podman", "run", "-d", "--name", "web"}, args...)
		l.run(t, append(append(argv, publish...), "localhost/web")...)
	}
}

var networkModes = []networkMode{
	{name: "pasta", start: runWith("--network=pasta"), copied: true},
	{name: "pasta, keep-id", start: runWith("--network=pasta", "--userns=keep-id", "--user=0:0"), copied: true},
	{name: "pasta, pod", copied: true, start: func(t *testing.T, l *lab) {
		t.Helper()
		l.run(t, append([]string{"podman", "pod", "create", "--name", "pod", "--network=pasta"}, publish...)...)
		l.run(t, "podman", "run", "-d", "--pod", "pod", "localhost/web")
	}},
	{name: "bridge, IPv4", only4: true, start: func(t *testing.T, l *lab) {
		t.Helper()
		l.network(t, "lab4")
		runWith("--network=lab4")(t, l)
	}},
	{name: "bridge, dual stack", start: func(t *testing.T, l *lab) {
		t.Helper()
		l.network(t, "lab46", "--ipv6")
		runWith("--network=lab46")(t, l)
	}},
	{name: "ns:", oursOnly: true, start: func(t *testing.T, l *lab) {
		t.Helper()
		path := l.run(t, "gofwd", "netns", "add", "web")
		l.run(t, "podman", "run", "-d", "--network=ns:"+path, "localhost/web")
		l.run(t, append([]string{"gofwd", "attach", "--detach", "--netns", "web"}, publish...)...)
	}},
	{name: "none, hook", oursOnly: true, start: func(t *testing.T, l *lab) {
		t.Helper()
		l.run(t, "podman", "--hooks-dir", "/shared/hooks.d", "run", "-d", "--network=none",
			"--annotation", "gofwd.publish=8080:80 5353:5353/udp", "localhost/web")
	}},
}

// want is the address that the server is to see with gofwd.
func (m networkMode) want(column int) netip.Addr {
	c := clients[column]
	want := netip.MustParseAddr(c.own)
	is4 := netip.MustParseAddr(c.dst).Is4()
	switch {
	case m.only4 && !is4:
		return netip.MustParseAddr(alias4)
	case c.remote || !m.copied:
		return want
	case is4:
		return netip.MustParseAddr(alias4)
	}
	return netip.MustParseAddr(alias6)
}

// cell is what a server saw.
type cell struct {
	saw      netip.Addr
	samePort bool
}

func (c cell) String() string {
	switch {
	case !c.saw.IsValid():
		return "–"
	case c.samePort:
		return c.saw.String()
	}
	return c.saw.String() + ", other port"
}

// row asks from everywhere.
func (m networkMode) row(t *testing.T, l *lab) (cells map[string][]cell) {
	t.Helper()
	l.clean(t)
	m.start(t, l)
	defer l.clean(t)
	cells = make(map[string][]cell)
	for _, network := range []string{"tcp", "udp"} {
		for i, c := range clients {
			from := l.host
			if c.remote {
				from = l.client
			}
			cells[network] = append(cells[network], l.probe(t, m, network, from, i))
		}
	}
	return cells
}

// probe asks once there is an answer: an IPv6 address of a container on a bridge
// takes two seconds (duplicate address detection), and until then gofwd sends the
// client to the IPv4 one.
func (l *lab) probe(t *testing.T, m networkMode, network string, from *netnsutil.NS, column int) cell {
	t.Helper()
	var c cell
	for end := time.Now().Add(5 * time.Second); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		saw, port, err := l.ask(from, network, clients[column].dst)
		if err != nil {
			continue
		}
		c = cell{saw.Addr(), saw.Port() == port}
		if !l.ours || c == (cell{m.want(column), true}) {
			break
		}
	}
	return c
}

// TestClientAddresses prints and checks what a server in a container sees of its
// clients, for each network mode, with gofwd and with Podman's own helpers.
func TestClientAddresses(t *testing.T) {
	var out strings.Builder
	for _, suite := range suites() {
		l := openLab(t, suite, true)
		theirs := openLab(t, suite, false)
		fmt.Fprintf(&out, "\nPodman %s:\n\n", l.version)
		writeHead(&out)
		for _, m := range networkModes {
			var own map[string][]cell
			if !m.oursOnly {
				own = m.row(t, theirs)
			}
			ours := m.row(t, l)
			for _, network := range []string{"tcp", "udp"} {
				for i, c := range clients {
					require.Equal(t, cell{m.want(i), true}.String(), ours[network][i].String(), "Podman %s, %s, %s, client %s", l.version, m.name, network, c.name)
				}
				writeRow(&out, m.name, network, "gofwd", ours[network])
				if !m.oursOnly {
					writeRow(&out, "", "", "Podman's own", own[network])
				}
			}
		}
	}
	fmt.Print(out.String())
	if *updateREADME {
		require.NoError(t, updateTable("../../README.md", out.String()))
	}
}

func writeHead(out *strings.Builder) {
	out.WriteString("| network | | helper |")
	for _, c := range clients {
		fmt.Fprintf(out, " %s |", c.name)
	}
	out.WriteString("\n|---|---|---|" + strings.Repeat("---|", len(clients)) + "\n")
}

func writeRow(out *strings.Builder, mode, network, helper string, cells []cell) {
	fmt.Fprintf(out, "| %s | %s | %s |", mode, strings.ToUpper(network), helper)
	for _, c := range cells {
		fmt.Fprintf(out, " %s |", c)
	}
	out.WriteString("\n")
}

// updateTable puts text between the markers of a Markdown file.
func updateTable(path, text string) error {
	const begin, end = "<!-- podman:begin -->\n", "<!-- podman:end -->"
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	before, rest, ok := strings.Cut(string(b), begin)
	_, after, ok2 := strings.Cut(rest, end)
	if !ok || !ok2 {
		return fmt.Errorf("%s: no %q and %q", path, begin, end)
	}
	return os.WriteFile(path, []byte(before+begin+strings.TrimPrefix(text, "\n")+end+after), 0o644)
}
