//go:build podman

package podman

import (
	"flag"
	"fmt"
	"net/netip"
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/gofwd/gofwd/netnsutil"
)

var updateREADME = flag.Bool("readme", false, "write the tables into README.md")

// What containers call the host.
const alias4, alias6, ulaAlias6 = "169.254.1.2", "fd67:6f66:7764::1", "fc00::2"

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
	// ula6 says that Podman gives it an IPv6 address and a host alias of its
	// own all the same.
	ula6 bool
	// conf is a file of Podman's configuration that it takes, if any, which
	// suite alone has.
	conf, suite string
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
	{name: "pasta with keep-id", start: runWith("--network=pasta", "--userns=keep-id", "--user=0:0"), copied: true},
	{name: "pasta pod", copied: true, start: func(t *testing.T, l *lab) {
		t.Helper()
		l.run(t, append([]string{"podman", "pod", "create", "--name", "pod", "--network=pasta"}, publish...)...)
		l.run(t, "podman", "run", "-d", "--pod", "pod", "localhost/web")
	}},
	{name: "bridge, IPv4 only", only4: true, start: func(t *testing.T, l *lab) {
		t.Helper()
		l.network(t, "lab4")
		runWith("--network=lab4")(t, l)
	}},
	{name: "bridge, dual stack", start: func(t *testing.T, l *lab) {
		t.Helper()
		l.network(t, "lab46", "--ipv6")
		runWith("--network=lab46")(t, l)
	}},
	{name: "bridge, dual stack, by pesto", conf: "/tools/pesto.conf", suite: "experimental", copied: true, ula6: true, start: func(t *testing.T, l *lab) {
		t.Helper()
		l.network(t, "lab46", "--ipv6")
		runWith("--network=lab46")(t, l)
	}},
	{name: "`ns:PATH`", oursOnly: true, start: func(t *testing.T, l *lab) {
		t.Helper()
		path := l.run(t, "gofwd", "netns", "add", "web")
		l.run(t, "podman", "run", "-d", "--network=ns:"+path, "localhost/web")
		l.run(t, append([]string{"gofwd", "attach", "--detach", "--netns", "web"}, publish...)...)
	}},
	{name: "none with the hook", oursOnly: true, start: func(t *testing.T, l *lab) {
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
	case m.ula6 && !is4 && want == netip.MustParseAddr(alias6):
		return netip.MustParseAddr(ulaAlias6)
	case c.remote || !m.copied || m.ula6 && !is4:
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

// role says what the address is to the client of a column. The container's own
// addresses are given.
func (c cell) role(column int, container string) string {
	own := clients[column].dst
	if clients[column].remote {
		own = clients[column].own
	}
	role, known := map[string]string{
		alias4: "host alias", alias6: "host alias", ulaAlias6: "host alias",
		host4: "the host's address", host6: "the host's address",
		client4: "the gateway's address", client6: "the gateway's address",
	}[c.saw.String()]
	switch {
	case !c.saw.IsValid():
		return "no answer"
	case c.saw.String() == own:
		role = "**own**"
	case known:
	case slices.Contains(strings.Fields(container), c.saw.String()):
		role = "the container's address"
	case c.saw.IsLinkLocalUnicast():
		role = "a link-local address"
	default:
		role = c.saw.String()
	}
	if !c.samePort {
		role += ", other port"
	}
	return role
}

// ask starts a container and asks it from everywhere. With gofwd the answers are
// checked.
func (m networkMode) ask(t *testing.T, l *lab) (rows []row) {
	t.Helper()
	if m.suite != "" && m.suite != l.suite {
		return nil
	}
	l.clean(t)
	l.conf = m.conf
	defer func() { l.conf = "" }()
	m.start(t, l)
	defer l.clean(t)
	container, _ := l.try("podman", "inspect", "--format", // a pod has no container "web"
		"{{range .NetworkSettings.Networks}}{{.IPAddress}} {{.GlobalIPv6Address}} {{end}}", "web")
	for _, network := range []string{"tcp", "udp"} {
		r := row{helper: l.helper(), modes: []string{m.name}, protocols: []string{strings.ToUpper(network)}, versions: []string{l.minor()}}
		for i, c := range clients {
			from := l.host
			if c.remote {
				from = l.client
			}
			got := l.probe(t, m, network, from, i)
			if l.ours {
				require.Equal(t, cell{m.want(i), true}, got, "Podman %s, %s, %s, client %s", l.version, m.name, network, c.name)
			}
			r.seen = append(r.seen, got.role(i, container))
		}
		rows = append(rows, r)
	}
	return rows
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
	var labs, theirs []*lab
	var versions []string
	for _, suite := range suites() {
		labs, theirs = append(labs, openLab(t, suite, true)), append(theirs, openLab(t, suite, false))
		versions = append(versions, labs[len(labs)-1].minor())
	}
	var ours, own []row
	for _, m := range networkModes {
		for i := range labs {
			ours = append(ours, m.ask(t, labs[i])...)
			if !m.oursOnly {
				own = append(own, m.ask(t, theirs[i])...)
			}
		}
	}
	publishTable(t, "podman", addressTable(append(ours, own...), versions))
}

// row is a row of the table: where all of these networks, protocols and versions of
// Podman meet, servers saw the same.
type row struct {
	helper                     string
	modes, protocols, versions []string
	seen                       []string // by column of clients
}

// fold makes one row of all that differ in one field only.
func fold(rows []row, field func(*row) *[]string) (folded []row) {
	for _, r := range rows {
		i := slices.IndexFunc(folded, func(f row) bool {
			rest := r
			*field(&f), *field(&rest) = nil, nil
			return reflect.DeepEqual(f, rest)
		})
		if i < 0 {
			i = len(folded)
			folded = append(folded, r)
			*field(&folded[i]) = nil
		}
		*field(&folded[i]) = append(*field(&folded[i]), *field(&r)...)
	}
	return folded
}

// addressTable is the table in Markdown.
func addressTable(rows []row, versions []string) string {
	rows = fold(rows, func(r *row) *[]string { return &r.protocols })
	rows = fold(rows, func(r *row) *[]string { return &r.versions })
	rows = fold(rows, func(r *row) *[]string { return &r.modes })
	var out strings.Builder
	fmt.Fprintf(&out, "Checked with Podman %s, where a row does not say otherwise:\n\n", strings.Join(versions, ", "))
	out.WriteString("| helper | network | Podman | | client on another host | on the host, by its address | on the host, by loopback |\n|---|---|---|---|---|---|---|\n")
	for _, r := range rows {
		podman := strings.Join(r.versions, ", ")
		if slices.Equal(r.versions, versions) {
			podman = ""
		}
		fmt.Fprintf(&out, "| %s | %s | %s | %s |", r.helper, strings.Join(r.modes, "; "), podman, strings.Join(r.protocols, ", "))
		for i := 0; i < len(r.seen); i += 2 { // IPv4 and IPv6 of a client
			seen := r.seen[i]
			if seen != r.seen[i+1] {
				seen = fmt.Sprintf("IPv4: %s; IPv6: %s", seen, r.seen[i+1])
			}
			fmt.Fprintf(&out, " %s |", seen)
		}
		out.WriteString("\n")
	}
	return out.String()
}

// publishTable prints a table, and with -readme puts it between its markers in
// README.md.
func publishTable(t *testing.T, marker, table string) {
	t.Helper()
	fmt.Printf("\n%s\n", table)
	if *updateREADME {
		require.NoError(t, updateTable("../../README.md", marker, table))
	}
}

// updateTable puts text between the markers of a Markdown file.
func updateTable(path, marker, text string) error {
	begin, end := "<!-- "+marker+":begin -->\n", "<!-- "+marker+":end -->"
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	before, rest, ok := strings.Cut(string(b), begin)
	_, after, ok2 := strings.Cut(rest, end)
	if !ok || !ok2 {
		return fmt.Errorf("%s: no %q and %q", path, begin, end)
	}
	return os.WriteFile(path, []byte(before+begin+text+end+after), 0o644)
}
