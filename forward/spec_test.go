package forward

import (
	"encoding/json"
	"net/netip"
	"os"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

func port(n uint16) PortRange { return PortRange{n, n} }

func addr(s string) netip.Addr { return netip.MustParseAddr(s) }

func TestParsePublish(t *testing.T) {
	for _, tt := range []struct {
		in, canonical string
		want          Rule
	}{
		{"80", "80/tcp", Rule{TargetPorts: port(80)}},
		{"80/udp", "80/udp", Rule{Proto: UDP, TargetPorts: port(80)}},
		{"0:80", "80/tcp", Rule{TargetPorts: port(80)}},
		{":80", "80/tcp", Rule{TargetPorts: port(80)}},
		{"80-90", "80-90/tcp", Rule{TargetPorts: PortRange{80, 90}}},
		{"8080:80", "8080:80/tcp", Rule{Ports: port(8080), TargetPorts: port(80)}},
		{"8080:80/TCP", "8080:80/tcp", Rule{Ports: port(8080), TargetPorts: port(80)}},
		{"8000-8010:9000-9010", "8000-8010:9000-9010/tcp", Rule{Ports: PortRange{8000, 8010}, TargetPorts: PortRange{9000, 9010}}},
		{"65535:1-1", "65535:1/tcp", Rule{Ports: port(65535), TargetPorts: port(1)}},
		{"127.0.0.1:8080:80", "127.0.0.1:8080:80/tcp", Rule{Addr: addr("127.0.0.1"), Ports: port(8080), TargetPorts: port(80)}},
		{"127.0.0.1::80", "127.0.0.1::80/tcp", Rule{Addr: addr("127.0.0.1"), TargetPorts: port(80)}},
		{"127.0.0.1:80", "127.0.0.1::80/tcp", Rule{Addr: addr("127.0.0.1"), TargetPorts: port(80)}},
		{"0.0.0.0:8080:80", "0.0.0.0:8080:80/tcp", Rule{Addr: addr("0.0.0.0"), Ports: port(8080), TargetPorts: port(80)}},
		{"[::]:8080:80", "[::]:8080:80/tcp", Rule{Addr: addr("::"), Ports: port(8080), TargetPorts: port(80)}},
		{"[::1]:8080:80/udp", "[::1]:8080:80/udp", Rule{Proto: UDP, Addr: addr("::1"), Ports: port(8080), TargetPorts: port(80)}},
		{"[::1]::80", "[::1]::80/tcp", Rule{Addr: addr("::1"), TargetPorts: port(80)}},
		{"[::ffff:127.0.0.1]:8080:80", "127.0.0.1:8080:80/tcp", Rule{Addr: addr("127.0.0.1"), Ports: port(8080), TargetPorts: port(80)}},
		{"*:8080:80", "8080:80/tcp", Rule{Ports: port(8080), TargetPorts: port(80)}},
		{"%eth0:8080:80", "%eth0:8080:80/tcp", Rule{Iface: "eth0", Ports: port(8080), TargetPorts: port(80)}},
		{"*%eth0::80", "%eth0::80/tcp", Rule{Iface: "eth0", TargetPorts: port(80)}},
		{"127.0.0.1%lo:8080:80", "127.0.0.1%lo:8080:80/tcp", Rule{Addr: addr("127.0.0.1"), Iface: "lo", Ports: port(8080), TargetPorts: port(80)}},
		{"[::1]%lo:8080:80", "[::1]%lo:8080:80/tcp", Rule{Addr: addr("::1"), Iface: "lo", Ports: port(8080), TargetPorts: port(80)}},
		// Inside the brackets it's a zone, outside an interface.
		{"[fe80::1%eth0]:8080:80", "[fe80::1%eth0]:8080:80/tcp", Rule{Addr: addr("fe80::1%eth0"), Ports: port(8080), TargetPorts: port(80)}},
		{"[fe80::1]%eth0:8080:80", "[fe80::1]%eth0:8080:80/tcp", Rule{Addr: addr("fe80::1"), Iface: "eth0", Ports: port(8080), TargetPorts: port(80)}},
		{"%eth0.5,x:8080:80", "%eth0.5,x:8080:80/tcp", Rule{Iface: "eth0.5,x", Ports: port(8080), TargetPorts: port(80)}},
		// What only String writes.
		{"0.0.0.0:8080:10.0.0.1:80", "0.0.0.0:8080:10.0.0.1:80/tcp", Rule{Addr: addr("0.0.0.0"), Ports: port(8080), Target: addr("10.0.0.1"), TargetPorts: port(80)}},
		{"[::]::[fd00::1]:80/udp", "[::]::[fd00::1]:80/udp", Rule{Proto: UDP, Addr: addr("::"), Target: addr("fd00::1"), TargetPorts: port(80)}},
		{"5432:5432/tcp,out", "5432:5432/tcp,out", Rule{Dir: Out, Ports: port(5432), TargetPorts: port(5432)}},
		{"1-9:1-9/udp,auto,weak", "1-9:1-9/udp,weak,auto", Rule{Proto: UDP, Ports: PortRange{1, 9}, TargetPorts: PortRange{1, 9}, Weak: true, Auto: true}},
	} {
		t.Run(tt.in, func(t *testing.T) {
			if tt.want.Proto == 0 {
				tt.want.Proto = TCP
			}
			got, err := ParsePublish(tt.in)
			require.NoError(t, err)
			require.Equal(t, []Rule{tt.want}, got)
			require.Equal(t, tt.canonical, got[0].String())
		})
	}
}

func TestParsePublishBothProtocols(t *testing.T) {
	got, err := ParsePublish("5353:53/udp,tcp")
	require.NoError(t, err)
	require.Equal(t, []Rule{
		{Proto: UDP, Ports: port(5353), TargetPorts: port(53)},
		{Proto: TCP, Ports: port(5353), TargetPorts: port(53)},
	}, got)
}

// An error is one line that quotes the whole and the piece that is wrong.
func TestParsePublishErrors(t *testing.T) {
	for in, want := range map[string]string{
		"":                       `"" is not a port from 1 to 65535`,
		"http":                   `"http" is not a port from 1 to 65535`,
		"8080:":                  `"" is not a port from 1 to 65535`,
		"80:0":                   `"0" is not a port from 1 to 65535`,
		"70000:80":               `"70000" is not a port from 1 to 65535`,
		"-1:80":                  `"" is not a port from 1 to 65535`,
		"+80:80":                 `"+80" is not an IP address`,
		"80-:80":                 `"" is not a port from 1 to 65535`,
		"90-80:80":               `range "90-80" ends before it begins`,
		"0-5:80-85":              `"0" is not a port from 1 to 65535`,
		"80-90:80":               `"80-90" is 11 ports and "80" is 1: both ranges need the same length`,
		"8080:80/sctp":           `"sctp" is not a protocol that can be forwarded: tcp or udp`,
		"8080:80/":               `"" is not a protocol that can be forwarded: tcp or udp`,
		"8080:80/weak":           `"weak" is not a protocol that can be forwarded: tcp or udp`,
		"8080:80/tcp,shard":      `"shard" is not a protocol that can be forwarded: tcp or udp`,
		"8080:80/tcp,tcp":        `"tcp" is given twice`,
		"8080:80/tcp/udp":        `"tcp/udp" is not a protocol that can be forwarded: tcp or udp`,
		"localhost:8080:80":      `"localhost" is not an IP address`,
		"300.0.0.1:8080:80":      `"300.0.0.1" is not an IP address`,
		"::1:8080:80":            `too many colons; an IPv6 address goes in brackets`,
		"fe80::1:8080:80":        `"fe80" is not an IP address; an IPv6 address goes in brackets`,
		"[::1:8080:80":           `"[" lacks its closing bracket`,
		"[127.0.0.1]:8080:80":    `"127.0.0.1" is not an IPv6 address`,
		"[::1]x:8080:80":         `"x" is not %IFACE`,
		"[::1]%:8080:80":         `"%" is not %IFACE`,
		"%:8080:80":              `"%" is not %IFACE`,
		"%abcdefghijklmnop:1:80": `"%abcdefghijklmnop" is not %IFACE`,
		"%a b:8080:80":           `"%a b" is not %IFACE`,
		"[fe80::1]:8080:80":      `"fe80::1" is link-local and needs its interface: [fe80::1%IFACE]`,
		"[::1%lo]:8080:80":       `"::1%lo": only link-local addresses have a zone; an interface goes outside the brackets: [::1]%lo`,
		"[::1%a\nb]:8080:80":     `"a\nb" is not an interface name`,
		"[fe80::1%a]%b:8080:80":  `"[fe80::1%a]%b": zone and interface differ`,
		"224.0.0.1:8080:80":      `"224.0.0.1" is a multicast address`,
		"8080:10.0.0.1:80":       `target "10.0.0.1" needs an address of its family to listen on, such as 0.0.0.0`,
		"8080:[fd00::1]:80":      `target "fd00::1" needs an address of its family to listen on, such as [::]`,
		"0.0.0.0:1:[fd00::1]:80": `target "fd00::1" and "0.0.0.0" are of different families`,
		"0.0.0.0:1:224.0.0.1:80": `"224.0.0.1" cannot be a target: give a plain unicast address`,
		"0.0.0.0:1:80:80":        `"80" is not an IP address`,
		"127.0.0.1:1:80/tcp,out": `"127.0.0.1": a forward out of the container listens on the container's loopback, and on no other address or interface`,
		"80\n:80":                `"80\n" is not an IP address`,
	} {
		t.Run(in, func(t *testing.T) {
			rules, err := ParsePublish(in)
			require.ErrorContains(t, err, want)
			require.True(t, strings.HasSuffix(err.Error(), want), "%v", err)
			require.True(t, strings.HasPrefix(err.Error(), "port rule "), "%v", err)
			require.NotContains(t, err.Error(), "\n")
			require.Nil(t, rules)
		})
	}
}

func TestParseSpec(t *testing.T) {
	for _, tt := range []struct {
		in   string
		want []string // as Rule.String
	}{
		{"none", nil},
		{"8080", []string{"8080:8080/tcp"}},
		{"22,80:8080", []string{"22:22/tcp", "80:8080/tcp"}},
		{"80,22", []string{"22:22/tcp", "80:80/tcp"}},
		{"8080-8080:80-80", []string{"8080:80/tcp"}}, // Podman
		{"22-80:32-90", []string{"22-80:32-90/tcp"}},
		{"127.0.0.1/8080", []string{"127.0.0.1:8080:8080/tcp"}},
		{"0.0.0.0/8080", []string{"0.0.0.0:8080:8080/tcp"}},
		{"::1/8080-8080:80-80", []string{"[::1]:8080:80/tcp"}}, // Podman: no brackets
		{"[::1]/8080", []string{"[::1]:8080:8080/tcp"}},
		{"[::]/8080", []string{"[::]:8080:8080/tcp"}},
		{"::ffff:127.0.0.1/8080", []string{"127.0.0.1:8080:8080/tcp"}},
		{"80:fd00::1/80", []string{"[80:fd00::1]:80:80/tcp"}},
		{"*/80", []string{"80:80/tcp"}},
		{"/80", []string{"80:80/tcp"}},
		{"%lo/80", []string{"%lo:80:80/tcp"}},
		{"*%lo/80", []string{"%lo:80:80/tcp"}},
		{"192.0.2.1%eth0/22,80", []string{"192.0.2.1%eth0:22:22/tcp", "192.0.2.1%eth0:80:80/tcp"}},
		{"fe80::1%lo/80", []string{"[fe80::1]%lo:80:80/tcp"}},
		{"[fe80::1]%lo/80", []string{"[fe80::1]%lo:80:80/tcp"}},
		{"[fe80::1%lo]/80", []string{"[fe80::1%lo]:80:80/tcp"}},
		{"0.0.0.0/8080:10.89.0.5/80", []string{"0.0.0.0:8080:10.89.0.5:80/tcp"}}, // Podman 6.1
		{"[::]/8080:fd00::5/80", []string{"[::]:8080:[fd00::5]:80/tcp"}},
		{"[::]/8080:[fd00::5]/80", []string{"[::]:8080:[fd00::5]:80/tcp"}},
		{"[::]/80:fd00::5", []string{"[::]:80:[fd00::5]:80/tcp"}},
		{"0.0.0.0/80-82:10.0.0.1/90-92,99", []string{"0.0.0.0:80-82:10.0.0.1:90-92/tcp", "0.0.0.0:99:99/tcp"}},
		{"8080:0.0.0.0/80", []string{"8080:80/tcp"}},
		{"8080:::/80", []string{"8080:80/tcp"}},
		{"8000-8005,~8002", []string{"8000-8001:8000-8001/tcp", "8003-8005:8003-8005/tcp"}},
		{"~8000,~8005,8000-8005:9000-9005", []string{"8001-8004:9001-9004/tcp"}},
		{"~1-3,~2,~2-4,1-9", []string{"5-9:5-9/tcp"}},
		{"80,~80", nil},
		{"~1-65535", nil},
		{"80-82,auto", []string{"80-82:80-82/tcp,auto"}},
		{"auto,80", []string{"80:80/tcp,auto"}},
		{"all", []string{"1-32767:1-32767/tcp,weak", "61000-65535:61000-65535/tcp,weak"}},
		{"~80", []string{"1-79:1-79/tcp,weak", "81-32767:81-32767/tcp,weak", "61000-65535:61000-65535/tcp,weak"}},
		{"auto", []string{"1-32767:1-32767/tcp,weak,auto", "61000-65535:61000-65535/tcp,weak,auto"}},
		{"auto,auto,~1-32766,~61000-65535", []string{"32767:32767/tcp,weak,auto"}},
		{"::1/all,auto,~1-60999", []string{"[::1]:61000-65535:61000-65535/tcp,weak,auto"}},
		{"0.0.0.0/all:10.0.0.1,~2-65535", []string{"0.0.0.0:1:10.0.0.1:1/tcp,weak"}},
	} {
		t.Run(tt.in, func(t *testing.T) {
			got, err := parseSpec(Rule{Proto: TCP}, tt.in, PortRange{32768, 60999})
			require.NoError(t, err)
			var text []string
			for _, r := range got {
				text = append(text, r.String())
			}
			require.Equal(t, tt.want, text)
		})
	}
}

func TestParseSpecErrors(t *testing.T) {
	for in, want := range map[string]string{
		"":                         `"" is not a port from 1 to 65535`,
		"0":                        `"0" is not a port from 1 to 65535`,
		"80-70":                    `range "80-70" ends before it begins`,
		"70000":                    `"70000" is not a port from 1 to 65535`,
		"80:0":                     `"0" is not a port from 1 to 65535`,
		"80-90:80":                 `"80-90" is 11 ports and "80" is 1: both ranges need the same length`,
		"22,25:26-27":              `"25" is 1 ports and "26-27" is 2: both ranges need the same length`,
		"1.2.3.4/80-82:10.0.0.1/9": `"80-82" is 3 ports and "9" is 1: both ranges need the same length`,
		"80,":                      `"" is not a port from 1 to 65535`,
		",80":                      `"" is not a port from 1 to 65535`,
		"80-":                      `"" is not a port from 1 to 65535`,
		"80:":                      `"" is not a port from 1 to 65535`,
		"+80":                      `"+80" is not a port from 1 to 65535`,
		"%lo":                      `"%lo" is not a port from 1 to 65535`,
		"80,none":                  `"none" is not a port from 1 to 65535`,
		"~80:81":                   `"80:81" is not a port from 1 to 65535`,
		"::1/":                     `"" is not a port from 1 to 65535`,
		"22,22":                    `"22" and "22" overlap`,
		"80-90,85":                 `"80-90" and "85" overlap`,
		"all,80":                   `"all" and "80" overlap`,
		"all,all":                  `"all" and "all" overlap`,
		"80:10.0.0.1":              `target "10.0.0.1" needs an address of its family to listen on, such as 0.0.0.0`,
		"22,80:10.0.0.1/80":        `target "10.0.0.1" needs an address of its family to listen on, such as 0.0.0.0`,
		"all:10.0.0.1/80":          `"10.0.0.1/80" is not an IP address`,
		"0.0.0.0/80:fd00::1":       `target "fd00::1" and "0.0.0.0" are of different families`,
		"::/80:10.0.0.1":           `target "10.0.0.1" and "::" are of different families`,
		"0.0.0.0/80:224.0.0.1":     `"224.0.0.1" cannot be a target: give a plain unicast address`,
		"0.0.0.0/80:/80":           `"" is not an IP address`,
		"0.0.0.0/80:10.0.0.1/":     `"" is not a port from 1 to 65535`,
		"1.2.3/80":                 `"1.2.3" is not an IP address`,
		"eth0/80":                  `"eth0" is not an IP address`,
		"[::1/80":                  `"[::1" lacks its closing bracket`,
		"[::1%lo]/80":              `"::1%lo": only link-local addresses have a zone; an interface goes outside the brackets: [::1]%lo`,
		"fe80::1/80":               `"fe80::1" is link-local and needs its interface: [fe80::1%IFACE]`,
	} {
		t.Run(in, func(t *testing.T) {
			rules, err := ParseSpec(In, TCP, in)
			require.ErrorContains(t, err, want)
			require.True(t, strings.HasSuffix(err.Error(), want), "%v", err)
			require.True(t, strings.HasPrefix(err.Error(), "port specifier "), "%v", err)
			require.Nil(t, rules)
		})
	}
}

func TestParseSpecOut(t *testing.T) {
	got, err := ParseSpec(Out, UDP, "53:5353")
	require.NoError(t, err)
	require.Equal(t, []Rule{{Dir: Out, Proto: UDP, Ports: port(53), TargetPorts: port(5353)}}, got)
	for _, in := range []string{"127.0.0.1/53", "::1/53", "%lo/53"} {
		_, err := ParseSpec(Out, UDP, in)
		require.ErrorContains(t, err, "a forward out of the container listens on the container's loopback")
	}
	_, err = ParseSpec(Out, TCP, "80:10.0.0.1/80")
	require.Error(t, err)
}

// "all" leaves out what the kernel gives to outgoing connections.
func TestParseSpecReadsEphemeralRange(t *testing.T) {
	const file = "/proc/sys/net/ipv4/ip_local_port_range"
	old, err := os.ReadFile(file)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, os.WriteFile(file, old, 0o600)) })
	require.NoError(t, os.WriteFile(file, []byte("1024 65000"), 0o600))
	got, err := ParseSpec(In, TCP, "all")
	require.NoError(t, err)
	require.Len(t, got, 2)
	require.Equal(t, PortRange{1, 1023}, got[0].Ports)
	require.Equal(t, PortRange{65001, 65535}, got[1].Ports)
}

func FuzzParsePublish(f *testing.F) {
	for _, s := range []string{
		"80", "8080:80/udp", "127.0.0.1:8000-8010:9000-9010/tcp,udp", "[::1]%lo::80", "[fe80::1%eth0]%eth0:1:2",
		"0.0.0.0:1:10.0.0.1:80", "[::]:1:[fd00::1]:80/tcp,weak,auto", "1:1/udp,out", "*%a[b:1:1",
		"unix:/run/a:b/c.sock:80/tcp,deny=fd00::/8", "systemd:web:80/udp,allow=10.0.0.0/8+::1", "fd:x:1", "5432:unix:/tcp,out/x/tcp,out",
		"80:80/tcp,max=5,rate=3,idle=90s,proxy=v2,share", "%eth0:80:80/udp,wait", "unix:80", "1:unix:/,", "systemd::1", "%a,b%c:80", "[::ffff:1.2.3.4]:1:1",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		rules, err := ParsePublish(s)
		if err != nil {
			require.NotContains(t, err.Error(), "\n")
			return
		}
		checkParsed(t, rules)
	})
}

func FuzzParseSpec(f *testing.F) {
	for _, s := range []string{
		"none", "all", "auto", "22,80:8080", "~1-1000,~80", "::1/8080-8080:80-80", "[::]/8080:fd00::5/80,99", "*%lo/80-90,~85,auto",
		"192.0.2.1%eth0/1-5:10.0.0.1/2-6", "80:fd00::1/80", "0.0.0.0/all:10.0.0.1,~2-65535", "fe80::1%a,b/1", "1,3,5,7-65535,~9,~11",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		for _, dir := range []Dir{In, Out} {
			rules, err := ParseSpec(dir, UDP, s)
			if err != nil {
				require.NotContains(t, err.Error(), "\n")
				continue
			}
			// Each rule holds a port of its own.
			require.LessOrEqual(t, len(rules), 65535)
			checkParsed(t, rules)
		}
	})
}

// checkParsed checks what is true of all rules that come out of the parsers.
func checkParsed(t *testing.T, rules []Rule) {
	t.Helper()
	require.NoError(t, Validate(rules))
	for _, r := range rules {
		again, err := ParsePublish(r.String())
		require.NoError(t, err)
		require.Equal(t, []Rule{r}, again)

		b, err := json.Marshal(r)
		require.NoError(t, err)
		var back Rule
		require.NoError(t, json.Unmarshal(b, &back))
		require.Equal(t, r, back)
	}
}
