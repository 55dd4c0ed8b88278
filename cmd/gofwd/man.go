package main

import (
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// newManCommand prints gofwd(1), one page with all verbs, made from the same
// text as --help.
func newManCommand() *cobra.Command {
	return &cobra.Command{
		Use:    "man",
		Short:  "print the man page, gofwd(1)",
		Hidden: true,
		Args:   noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			_, err := io.WriteString(cmd.OutOrStdout(), manPage(cmd.Root()))
			return err
		},
	}
}

func manPage(root *cobra.Command) string {
	m := &manWriter{}
	m.macro("TH", "GOFWD", "1", "", "gofwd "+readVersion().Version, "User Commands")
	m.macro("SH", "NAME")
	m.line(root.Name() + " - " + root.Short)
	m.macro("SH", "SYNOPSIS")
	for _, cmd := range verbs(root) {
		m.macro("SY", cmd.CommandPath())
		m.line(strings.TrimSpace(strings.TrimPrefix(cmd.Use, cmd.Name())))
		m.macro("YS")
	}
	m.macro("SH", "DESCRIPTION")
	m.paragraphs(root.Long)
	m.macro("SH", "COMMANDS")
	for _, cmd := range verbs(root) {
		m.command(cmd)
	}
	m.macro("SH", "OPTIONS OF RUN AND ATTACH")
	run, _, _ := root.Find([]string{"run"})
	for _, s := range flagSections(run) {
		if s.title != ownSection {
			m.macro("SS", s.title)
			s.VisitAll(m.flag)
		}
	}
	m.macro("SH", "PORT RULES")
	m.line("Besides addresses and ports, a rule may have as the host's side:")
	for _, r := range hostSides {
		m.item(r[0], r[1])
	}
	m.macro("PP")
	m.line("Options follow the protocol, as in 8080:80/tcp,max=100,share:")
	for _, r := range ruleOptions {
		m.item(r[0], r[1])
	}
	m.macro("SH", "EXIT STATUS")
	for _, e := range exitStatuses {
		m.item(e[0], e[1])
	}
	m.macro("SH", "FILES")
	m.item("$XDG_RUNTIME_DIR/gofwd/NAME.sock", "the control socket of an instance; /run/gofwd/NAME.sock for root, $TMPDIR/gofwd-UID/NAME.sock (/tmp) for users without $XDG_RUNTIME_DIR. hook.log beside it says why gofwd hook failed. It speaks HTTP; GET /openapi.yaml describes it.")
	m.macro("SH", "SEE ALSO")
	m.line("pasta(1), podman-run(1), user_namespaces(7), network_namespaces(7)")
	return m.String()
}

// verbs returns the commands below cmd, with those below them.
func verbs(cmd *cobra.Command) (all []*cobra.Command) {
	for _, sub := range cmd.Commands() {
		if sub.IsAvailableCommand() {
			all = append(append(all, sub), verbs(sub)...)
		}
	}
	return all
}

var hostSides = [][2]string{
	{"systemd:NAME:PORT", "the sockets of that name which systemd passed (FileDescriptorName=, systemd.socket(5)), also below 1024."},
	{"unix:PATH:PORT", "a UNIX socket, which is made; one that nobody listens on is replaced. While gofwd runs it makes some only in directories where it made one when it started, unless with --no-sandbox."},
	{"PORT:unix:PATH", "with -T: the container's port PORT leads to a UNIX socket of the host."},
}

var ruleOptions = [][2]string{
	{"max=N", "so many TCP connections at once."},
	{"rate=N", "so many new TCP connections a second."},
	{"idle=DURATION", "TCP connections that moved no byte for so long are reset."},
	{"allow=PREFIX+...", "clients that may connect, and no others."},
	{"deny=PREFIX+...", "clients that may not."},
	{"proxy=v2", "tell the TCP server its client by the PROXY protocol."},
	{"share", "rules with it may have the same port. Those of one instance take turns, and one that takes no connection is passed over; among several instances of one user the kernel chooses (SO_REUSEPORT)."},
	{"auto", "published only while the container listens."},
	{"wait", "published when the address or the interface is there."},
	{"weak", "ports that can't be bound are left out; it is an error only if none can."},
	{"out", "from the container's loopback to the host's, as -T and -U make it."},
}

var exitStatuses = [][2]string{
	{"0", "success; attach: the namespace is gone, or gofwd was told to end."},
	{"1", "a failure, which one line on standard error describes."},
	{"2", "the command line is wrong."},
	{"126, 127", "run: COMMAND cannot be executed; does not exist."},
	{"other", "run: the exit status of COMMAND; 128+N where signal N ended it, or the process that forwards."},
}

// manWriter writes man(7).
type manWriter struct{ strings.Builder }

func (m *manWriter) command(cmd *cobra.Command) {
	m.macro("SS", usageLine(cmd))
	text := cmd.Long
	if text == "" {
		text = strings.ToUpper(cmd.Short[:1]) + cmd.Short[1:] + "."
	}
	m.paragraphs(text)
	for _, s := range flagSections(cmd) {
		if s.title == ownSection {
			s.VisitAll(m.flag)
		}
	}
	if cmd.HasExample() {
		m.macro("PP")
		m.macro("I", "Examples:")
		m.macro("PP")
		m.macro("nf")
		for l := range strings.Lines(cmd.Example) {
			m.line(strings.TrimRight(l, "\n"))
		}
		m.macro("fi")
	}
}

func (m *manWriter) flag(f *pflag.Flag) { m.item(describeFlag(f)) }

func (m *manWriter) item(term, text string) {
	m.macro("TP")
	m.macro("B", term)
	m.line(text)
}

func (m *manWriter) paragraphs(text string) {
	for i, p := range strings.Split(strings.TrimSpace(text), "\n\n") {
		if i > 0 {
			m.macro("PP")
		}
		m.line(p)
	}
}

// macro writes a request, with its arguments quoted.
func (m *manWriter) macro(name string, args ...string) {
	m.WriteString("." + name)
	for _, a := range args {
		fmt.Fprintf(m, ` "%s"`, strings.ReplaceAll(escapeMan(a), `"`, `\(dq`))
	}
	m.WriteByte('\n')
}

// line writes text. A dot or quote at the start of a line would be a request.
func (m *manWriter) line(text string) {
	for l := range strings.Lines(escapeMan(text)) {
		if strings.HasPrefix(l, ".") || strings.HasPrefix(l, "'") {
			m.WriteString(`\&`)
		}
		m.WriteString(l)
	}
	m.WriteByte('\n')
}

func escapeMan(s string) string {
	return strings.NewReplacer(`\`, `\e`, "-", `\-`).Replace(s)
}
