package main

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"github.com/stretchr/testify/require"

	"github.com/gofwd/gofwd/forward"
)

func TestReport(t *testing.T) {
	cmd := &cobra.Command{Use: "gofwd"}
	for _, tt := range []struct {
		err  error
		line string
		code int
	}{
		{nil, "", 0},
		{errors.New("open x: no"), "gofwd: open x: no\n", 1},
		{errors.Join(errors.New("a"), errors.New("b")), "gofwd: a; b\n", 1},
		{usagef(cmd, "bad %d", 1), "gofwd: bad 1; see 'gofwd --help'\n", 2},
		{&hintedError{errors.New("no"), "do this"}, "gofwd: no; do this\n", 1},
		{exitStatus(42), "", 42},
		{fmt.Errorf("wrapped: %w", exitStatus(42)), "", 42},
		{notRunnable("x", &exec.Error{Name: "x", Err: exec.ErrNotFound}), "gofwd: run x: executable file not found in $PATH\n", 127},
		{notRunnable("x", &fs.PathError{Op: "fork/exec", Path: "x", Err: os.ErrPermission}), "gofwd: run x: permission denied\n", 126},
	} {
		var b bytes.Buffer
		require.Equal(t, tt.code, report(&b, tt.err), "%v", tt.err)
		require.Equal(t, tt.line, b.String())
	}
}

func TestNames(t *testing.T) {
	for _, s := range []string{"a", "web", "web-2", "9.x_y", strings.Repeat("a", 63)} {
		require.True(t, validName(s), s)
	}
	for _, s := range []string{"", ".", "..", "-a", ".a", "a/b", "a b", "ä", strings.Repeat("a", 64)} {
		require.False(t, validName(s), s)
	}
	for in, want := range map[string]string{
		"web": "web", "": "gofwd", "..": "gofwd", "a b/ü": "a-b--", "-x": "x",
		strings.Repeat("a", 99): strings.Repeat("a", 48),
	} {
		require.Equal(t, want, toName(in))
		require.True(t, validName(toName(in)))
	}
}

func TestResolvConf(t *testing.T) {
	host := "# made by hand\nnameserver 127.0.0.53\n  search  example.org\texample.com\noptions edns0 trust-ad\nsortlist 130.155.160.0\nsearch\n"
	servers := []netip.Addr{netip.MustParseAddr("10.0.2.3"), netip.MustParseAddr("fd67:6f66:7764::3")}
	require.Equal(t, "# gofwd\nnameserver 10.0.2.3\nnameserver fd67:6f66:7764::3\nsearch example.org example.com\noptions edns0 trust-ad\n",
		string(makeResolvConf([]byte(host), servers)))
}

// The man page and --help are made of the same text.
func TestManPage(t *testing.T) {
	root := newRootCommand()
	page := manPage(root)
	for _, cmd := range root.Commands() {
		if !cmd.IsAvailableCommand() {
			continue
		}
		require.Contains(t, page, `"gofwd `+cmd.Name()+`"`)
		for _, s := range flagSections(cmd) {
			s.VisitAll(func(f *pflag.Flag) {
				head, _ := describeFlag(f)
				require.Contains(t, page, escapeMan(head))
			})
		}
	}
	require.NotContains(t, page, `\-\-inner`)
	for line := range strings.Lines(page) {
		if strings.HasPrefix(line, ".") {
			require.Regexp(t, `^\.(TH|SH|SS|SY|YS|PP|TP|B|I|nf|fi)( "|\n)`, line)
		}
	}
}

// A broken promise is the demo's failure, and is pointed out.
func TestDemoBroken(t *testing.T) {
	own := netip.MustParseAddrPort("198.51.100.2:40000")
	good := &demoCase{client: "remote", proto: forward.TCP, promised: own.Addr(), demoResult: demoResult{local: own, saw: own}}
	var b bytes.Buffer
	require.NoError(t, printDemo(&b, []*demoCase{good}, forward.Status{}))
	for _, saw := range []string{"10.0.2.2:40000", "198.51.100.2:40001"} {
		bad := *good
		bad.saw = netip.MustParseAddrPort(saw)
		b.Reset()
		require.ErrorContains(t, printDemo(&b, []*demoCase{good, &bad}, forward.Status{}), "1 of 2 clients")
		require.Contains(t, b.String(), "WRONG")
	}
}

func TestByteSize(t *testing.T) {
	for n, want := range map[int64]string{
		0: "0 B", 999: "999 B", 1000: "1.0 kB", 999_949: "999.9 kB", 999_950: "1.0 MB", 1_500_000_000: "1.5 GB", 1 << 62: "4611.7 PB",
	} {
		require.Equal(t, want, byteSize(n))
	}
}
