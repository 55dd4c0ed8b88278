package main

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/spf13/pflag"
	"github.com/stretchr/testify/require"

	"github.com/gofwd/gofwd/forward"
)

// configured parses a command line with a configuration file.
func configured(t *testing.T, text string, args ...string) (*options, string, error) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "web.toml")
	require.NoError(t, os.WriteFile(file, []byte(text), 0o600))
	o := &options{}
	cmd := newRunCommand()
	cmd.ResetFlags()
	o.addTo(cmd, pflag.NewFlagSet("", pflag.ContinueOnError))
	require.NoError(t, cmd.ParseFlags(append([]string{"--config", file}, args...)))
	if err := o.loadConfig(cmd.Flags()); err != nil {
		return o, file, err
	}
	return o, file, o.complete()
}

func ruleTexts(rules []forward.Rule) (texts []string) {
	for _, r := range rules {
		texts = append(texts, r.String())
	}
	return texts
}

func TestConfig(t *testing.T) {
	text := `# The web server.
publish = [
  "8080:80",            # its port
  "127.0.0.1:5353:53/udp",
]
tcp-ns = "5432"
mtu = 9000
no-icmp = true
multicast = ["224.0.0.251", "ff02::fb%eth0"]
address = ["10.9.0.5/16", "fd00::5/64"]
deny = ["host", "*:25"]
`
	o, file, err := configured(t, text, "-p", "8443:443", "--mtu", "1400")
	require.NoError(t, err)
	require.Equal(t, []string{"8443:443/tcp", "8080:80/tcp", "127.0.0.1:5353:53/udp", "5432:5432/tcp,out"}, ruleTexts(o.config.Rules))
	require.Equal(t, 1400, o.config.Network.MTU, "the command line wins")
	require.True(t, o.config.NoICMP)
	require.Len(t, o.config.Multicast, 2)
	require.Len(t, o.config.Network.Addrs, 2)
	require.Len(t, o.config.Deny, 2)

	write := func(s string) { require.NoError(t, os.WriteFile(file, []byte(s), 0o600)) }
	rules, err := o.rereadPorts()
	require.NoError(t, err)
	require.Equal(t, o.config.Rules, rules)
	write(text[:len(text)-len("deny = [\"host\", \"*:25\"]\n")])
	_, err = o.rereadPorts()
	require.ErrorContains(t, err, "deny can't change while gofwd runs")
	write("publish = '9090:90'\nmtu = 9001\n")
	_, err = o.rereadPorts()
	require.EqualError(t, err, file+":2: mtu can't change while gofwd runs: restart it")
	write(text + "udp-ns = 53\n")
	rules, err = o.rereadPorts()
	require.NoError(t, err)
	require.Len(t, rules, 5)
}

func TestConfigErrors(t *testing.T) {
	for text, want := range map[string]string{
		"publish = [\n  '80:80',\n  'x',\n]":     `:3: publish: port rule "x"`,
		"publish = ['80:80', '80:81']":           "overlap",
		"\ntcp-ports = '9-8'":                    ":2: tcp-ports: port specifier",
		"mtu = 'big'":                            ":1: mtu:",
		"mtu = [1, 2]":                           ":1: mtu takes one value",
		"help = true":                            `:1: there is no option "help"`,
		"inner = true":                           `:1: there is no option "inner"`,
		"color = 'red'":                          `:1: there is no option "color"`,
		"# x\n\nready-fd = 3":                    ":3: ready-fd can be given on the command line only",
		"config = 'other.toml'":                  ":1: config can be given on the command line only",
		"mtu = 1\nmtu = 2":                       ":2:",
		"publish = [":                            ":1:",
		"a = b":                                  ":1:",
		"[ports]\npublish = '80'":                `:1: "ports" is a table`,
		"ports.publish = '80'":                   `:1: "ports" is a table`,
		"mtu = 1.5":                              ":1: mtu: the value is none of",
		"publish = [['80']]":                     "an array in an array",
		"address = ['10.9.0.5/16',\n'nonsense']": ":2: address: not ADDR",
		"mtu = 10\x00":                           ":1:",
		"name = 'a b'":                           "--name",
	} {
		_, file, err := configured(t, text)
		require.Error(t, err, text)
		require.Contains(t, err.Error(), want, text)
		if want[0] == ':' {
			require.Contains(t, err.Error(), file+want[:2])
		}
	}
	_, err := readConfig("/dev/zero")
	require.ErrorContains(t, err, "not a file")
	_, err = readConfig("/no/such/file")
	require.ErrorIs(t, err, os.ErrNotExist)
}

func FuzzParseConfig(f *testing.F) {
	for _, s := range []string{"publish = ['80']", "a = 1\nb = true", "[x]\n", "a = \"\\u00e9\"", "a.b = 1", "a = [1,[2]]", "a = {b = 1}", "'' = ''"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		entries, err := parseConfig("f", b)
		if err != nil {
			return
		}
		for _, e := range entries {
			require.Positive(t, e.line)
			for _, v := range e.values {
				require.GreaterOrEqual(t, v.line, e.line)
			}
		}
	})
}
