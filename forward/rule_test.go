package forward

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// rule parses one published port.
func rule(s string) Rule {
	rules, err := ParsePublish(s)
	if err != nil || len(rules) != 1 {
		panic(fmt.Sprint(rules, err))
	}
	return rules[0]
}

func TestRuleJSON(t *testing.T) {
	for text, want := range map[string]string{
		"80":                                     `{"dir":"in","proto":"tcp","target_ports":"80"}`,
		"[fe80::1%eth0]:8000-8010:9000-9010/udp": `{"dir":"in","proto":"udp","addr":"fe80::1%eth0","ports":"8000-8010","target_ports":"9000-9010"}`,
		"0.0.0.0%lo:80:10.0.0.1:81/tcp,weak,auto": `{"dir":"in","proto":"tcp","addr":"0.0.0.0","iface":"lo","ports":"80","target":"10.0.0.1",` +
			`"target_ports":"81","weak":true,"auto":true}`,
		"5432:5432/tcp,out": `{"dir":"out","proto":"tcp","ports":"5432","target_ports":"5432"}`,
	} {
		b, err := json.Marshal(rule(text))
		require.NoError(t, err)
		require.Equal(t, want, string(b))
		var back Rule
		require.NoError(t, json.Unmarshal(b, &back))
		require.Equal(t, rule(text), back)
	}
	for _, bad := range []string{
		`{"dir":"sideways"}`, `{"proto":"sctp"}`, `{"ports":"90-80"}`, `{"ports":"x"}`, `{"target_ports":"0"}`, `{"addr":"localhost"}`,
	} {
		require.Error(t, json.Unmarshal([]byte(bad), new(Rule)), bad)
	}
	// Explicit empty values are the zero ones.
	var r Rule
	require.NoError(t, json.Unmarshal([]byte(`{"proto":"TCP","addr":"","ports":"","target":"","target_ports":"80"}`), &r))
	require.Equal(t, rule("80"), r)
}

func TestRuleStringOfNothing(t *testing.T) {
	require.Equal(t, "/proto(0)", Rule{}.String())
	require.Equal(t, "dir(7)", Dir(7).String())
	require.Equal(t, "(any free)/tcp", rule("80").endpoint())
	require.Equal(t, "127.0.0.1%lo:8080/udp", rule("127.0.0.1%lo:8080:80/udp").endpoint())
}

func TestPortRange(t *testing.T) {
	require.Equal(t, 0, PortRange{}.Len())
	require.Equal(t, 1, port(80).Len())
	require.Equal(t, 65535, PortRange{1, 65535}.Len())
	require.Equal(t, PortRange{5, 7}, PortRange{1, 7}.overlap(PortRange{5, 9}))
	require.Equal(t, PortRange{}, PortRange{1, 4}.overlap(PortRange{5, 9}))
	require.Equal(t, PortRange{}, PortRange{}.overlap(PortRange{5, 9}))
}

func TestRuleOnly(t *testing.T) {
	require.Equal(t, rule("8002:9002"), rule("8000-8010:9000-9010").only(2))
	require.Equal(t, rule("82"), rule("80-90").only(2))
}

// overlapCases is also held against the kernel, in TestOverlapsAsTheKernel.
var overlapCases = []struct {
	a, b string
	want bool
}{
	{"18080:80", "18080:81", true},
	{"18080:80", "18081:80", false},
	{"18080:80", "18080:80/udp", false},
	{"18080:80", "127.0.0.1:18080:80", true},
	{"18080:80", "0.0.0.0:18080:80", true},
	{"18080:80", "[::]:18080:80", true},
	{"18080:80", "[::1]:18080:80", true},
	{"0.0.0.0:18080:80", "127.0.0.1:18080:80", true},
	{"0.0.0.0:18080:80", "[::]:18080:80", false},
	{"0.0.0.0:18080:80", "[::1]:18080:80", false},
	{"[::]:18080:80", "[::1]:18080:80", true},
	{"[::]:18080:80", "127.0.0.1:18080:80", false},
	{"127.0.0.1:18080:80", "127.0.0.2:18080:80", false},
	{"127.0.0.1:18080:80", "127.0.0.1:18080:81", true},
	{"%lo:18080:80", "%eth0:18080:80", false},
	{"%lo:18080:80", "%lo:18080:80", true},
	{"%lo:18080:80", "18080:80", true},
	{"127.0.0.1%lo:18080:80", "127.0.0.1%eth0:18080:80", false},
	{"127.0.0.1%lo:18080:80", "127.0.0.1:18080:80", true},
	{"127.0.0.1%lo:18080:80", "0.0.0.0%eth0:18080:80", false},
	{"[fe80::1%eth0]:18080:80", "[fe80::1]%eth0:18080:80", true},
	{"[fe80::1%eth0]:18080:80", "[fe80::1%eth1]:18080:80", false},
	{"[fe80::1%eth0]:18080:80", "[::]:18080:80", true},
	{"[fe80::1%eth0]:18080:80", "%eth1:18080:80", false},
}

func TestOverlaps(t *testing.T) {
	for _, tt := range overlapCases {
		for _, proto := range []Proto{TCP, UDP} {
			a, b := rule(tt.a), rule(tt.b)
			if a.Proto == b.Proto {
				a.Proto, b.Proto = proto, proto
			}
			require.Equal(t, tt.want, Overlaps(a, b), "%s and %s", a, b)
			require.Equal(t, tt.want, Overlaps(b, a), "%s and %s", b, a)
		}
	}
	require.True(t, Overlaps(rule("80-90:80-90"), rule("85-95:85-95")))
	require.False(t, Overlaps(rule("80"), rule("80")), "free ports never overlap")
	require.False(t, Overlaps(rule("80:80"), rule("80:80/tcp,out")), "other sides")
	require.True(t, Overlaps(rule("80:80/tcp,out"), rule("80:81/tcp,out")))
}

func TestValidate(t *testing.T) {
	require.NoError(t, Validate(nil))
	ok := []Rule{
		rule("8080:80"), rule("8080:80/udp"), rule("8081-8090:81-90"), rule("8080:80/tcp,out"), rule("80"), rule("80"),
		rule("%eth0:9000:80"), rule("%eth1:9000:80"), rule("127.0.0.1:9001:80"), rule("127.0.0.2:9001:80"), rule("[::1]:9001:80"),
		rule("systemd:web:80"), rule("systemd:web:80/udp"), rule("unix:/web:80"), rule("80:80/tcp,share"), rule("80:81/tcp,share"),
	}
	require.NoError(t, Validate(ok))
	for _, tt := range []struct{ bad, want string }{
		{"8085:80", `port rules "8081-8090:81-90/tcp" and "8085:80/tcp" overlap: both listen on port 8085/tcp`},
		{"8090-8100:90-100", `port rules "8081-8090:81-90/tcp" and "8090-8100:90-100/tcp" overlap: both listen on port 8090/tcp`},
		{"1-9500:1-9500/udp", `port rules "8080:80/udp" and "1-9500:1-9500/udp" overlap: both listen on port 8080/udp`},
		{"8080:80/udp", `port rule "8080:80/udp" is given twice`},
		{"9001:80", `port rules "127.0.0.1:9001:80/tcp" and "9001:80/tcp" overlap: both listen on port 9001/tcp`},
		{"[::]:9001:80", `port rules "[::1]:9001:80/tcp" and "[::]:9001:80/tcp" overlap: both listen on port 9001/tcp`},
		{"fd:web:90", `port rules "systemd:web:80/tcp" and "fd:web:90/tcp" are for the same socket`},
	} {
		require.EqualError(t, Validate(append(slices.Clip(ok), rule(tt.bad))), tt.want)
	}
}

// Rules need not come from the parsers.
func TestValidateHandmade(t *testing.T) {
	for _, tt := range []struct {
		r    Rule
		want string
	}{
		{Rule{}, `proto(0) is neither tcp nor udp`},
		{Rule{Proto: TCP}, `port 0 cannot be forwarded`},
		{Rule{Proto: TCP, TargetPorts: PortRange{0, 80}}, `port 0 cannot be forwarded`},
		{Rule{Proto: TCP, Ports: PortRange{0, 80}, TargetPorts: PortRange{1, 81}}, `port 0 cannot be forwarded`},
		{Rule{Proto: TCP, Ports: PortRange{90, 80}, TargetPorts: port(80)}, `range "90-80" ends before it begins`},
		{Rule{Proto: TCP, Dir: 7, TargetPorts: port(80)}, `dir(7) is neither in nor out`},
		{Rule{Proto: TCP, Dir: Out, Iface: "lo", TargetPorts: port(80)}, `"%lo": a forward out of the container listens`},
		{Rule{Proto: TCP, Addr: addr("::ffff:1.2.3.4"), TargetPorts: port(80)}, `"::ffff:1.2.3.4": write it as the IPv4 address 1.2.3.4`},
		{Rule{Proto: TCP, Iface: "a/b", TargetPorts: port(80)}, `"a/b" is not an interface name`},
		{Rule{Proto: TCP, Iface: "\xff", TargetPorts: port(80)}, `is not an interface name`},
		{Rule{Proto: TCP, Addr: addr("fe80::1%a]b"), TargetPorts: port(80)}, `"a]b" is not an interface name`},
		{Rule{Proto: TCP, Addr: addr("::1"), Target: addr("::"), TargetPorts: port(80)}, `"::" cannot be a target`},
		{Rule{Proto: TCP, Addr: addr("::1"), Target: addr("fe80::1%x"), TargetPorts: port(80)}, `"fe80::1%x" cannot be a target`},
	} {
		err := Validate([]Rule{tt.r})
		require.ErrorContains(t, err, tt.want)
		require.ErrorContains(t, err, fmt.Sprintf("%q", tt.r.String()))
	}
}

// Two rules that overlap are found wherever they are among others.
func TestOverlapping(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 2))
	pick := func(from ...string) string { return from[rnd.IntN(len(from))] }
	counts := make(map[bool]int)
	for range 20000 {
		var rules []Rule
		for range 2 + rnd.IntN(3) {
			first := 1 + rnd.IntN(12)
			text := pick("", "", "127.0.0.1", "127.0.0.2", "0.0.0.0", "[::]", "[::1]", "[fe80::1%eth0]") + pick("", "", "%eth0", "%eth1")
			ports := fmt.Sprintf("%d-%d", first, first+rnd.IntN(4))
			if text != "" {
				text += ":"
			}
			text += ports + ":" + ports + pick("/tcp", "/udp") + pick("", "", ",share")
			if rnd.IntN(4) == 0 {
				text = pick("80/tcp", "fd:a:80/tcp", "systemd:a:80/udp", "systemd:b:80/tcp", "unix:/a:80/tcp", "9:9/tcp,out")
			}
			if parsed, err := ParsePublish(text); err == nil {
				rules = append(rules, parsed...)
			}
		}
		want := false
		for i, a := range rules {
			for _, b := range rules[:i] {
				want = want || Overlaps(a, b) || a == b && a.Share
			}
		}
		counts[want]++
		i, j, found := overlapping(rules)
		require.Equal(t, want, found, "%s", rules)
		if found {
			require.Less(t, i, j)
			require.True(t, Overlaps(rules[i], rules[j]) || rules[i] == rules[j], "%s, %s", rules[i], rules[j])
		}
	}
	require.Greater(t, counts[true], 1000)
	require.Greater(t, counts[false], 1000)
}

// 60,000 rules of one port each, which exclusions can make, are checked at once.
func TestValidateIsFast(t *testing.T) {
	rules := make([]Rule, 0, 60001)
	for p := range uint16(60000) {
		rules = append(rules, Rule{Proto: TCP, Addr: netip.IPv6Loopback(), Ports: port(p + 1), TargetPorts: port(p + 1)})
	}
	rules = append(rules, rule("127.0.0.1:1-65535:1-65535"))
	start := time.Now()
	require.NoError(t, Validate(rules))
	require.Less(t, time.Since(start), 5*time.Second, "60,000 rules take some 20 ms, pairwise they would take a minute")
}
