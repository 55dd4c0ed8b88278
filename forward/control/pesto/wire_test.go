package pesto

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"io"
	"net/netip"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/gofwd/gofwd/forward"
)

// seen are rules as pasta sent them for specifiers, and how pesto showed them.
var seen = []struct {
	dir   forward.Dir
	proto forward.Proto
	spec  string
	wire  string
	shown string
}{
	{forward.In, forward.TCP, "8080-8082:80-82", zeros(16) + zeros(16) + zeros(16) + "1f901f920050" + "0601", "TCP [*]:8080-8082  =>  80-82"},
	{forward.In, forward.TCP, "127.0.0.1%lo/9000:90", mapped + "7f000001" + zeros(16) + "6c6f" + zeros(14) + "23282328005a" + "0600", "TCP [127.0.0.1]%lo:9000  =>  90"},
	{forward.In, forward.TCP, "0.0.0.0/7000:10.0.0.5/70", mapped + "00000000" + mapped + "0a000005" + zeros(16) + "1b581b580046" + "0600", "TCP [0.0.0.0]:7000  =>  10.0.0.5:70"},
	{forward.In, forward.TCP, "[::1]/7001", zeros(15) + "01" + zeros(16) + zeros(16) + "1b591b591b59" + "0600", "TCP [::1]:7001  =>  7001"},
	{forward.In, forward.UDP, "5355:55", zeros(16) + zeros(16) + zeros(16) + "14eb14eb0037" + "1101", "UDP [*]:5355  =>  55"},
	{forward.In, forward.TCP, "4000-4001,auto", zeros(16) + zeros(16) + zeros(16) + "0fa00fa10fa0" + "0605", "TCP [*]:4000-4001  =>  4000-4001  (auto-scan)"},
	{forward.Out, forward.TCP, "6000:60", zeros(16) + zeros(16) + "6c6f" + zeros(14) + "17701770003c" + "0601", "TCP [*]%lo:6000  =>  60"},
	{forward.Out, forward.UDP, "6001", zeros(16) + zeros(16) + "6c6f" + zeros(14) + "177117711771" + "1101", "UDP [*]%lo:6001  =>  6001"},
}

const mapped = "00000000000000000000ffff" // ::ffff:0.0.0.0/96

func zeros(n int) string { return strings.Repeat("00", n) }

func unhex(t testing.TB, s string) []byte {
	b, err := hex.DecodeString(s)
	require.NoError(t, err)
	return b
}

func TestRuleAsSeen(t *testing.T) {
	for _, s := range seen {
		parsed, err := forward.ParseSpec(s.dir, s.proto, s.spec)
		require.NoError(t, err)
		require.Len(t, parsed, 1)
		pif, r, ok := FromForward(parsed[0])
		require.True(t, ok, s.spec)
		require.Equal(t, s.dir == forward.Out, pif == Splice)
		var b bytes.Buffer
		require.NoError(t, binary.Write(&b, binary.BigEndian, r))
		require.Equal(t, s.wire, hex.EncodeToString(b.Bytes()), s.spec)
		require.Equal(t, s.shown, r.String())
		back, err := r.Forward(pif)
		require.NoError(t, err)
		require.Equal(t, parsed[0], back)
	}
}

func TestRuleShown(t *testing.T) {
	for spec, want := range map[string]string{
		"[::]/8080-8081:fd00::5/80-81": "TCP [::]:8080-8081  =>  [fd00::5]:80-81",
		"127.0.0.3/auto,~1-50000":      "TCP [127.0.0.3]:61000-65535  =>  61000-65535  (best effort)  (auto-scan)",
	} {
		parsed, err := forward.ParseSpec(forward.In, forward.TCP, spec)
		require.NoError(t, err)
		_, r, ok := FromForward(parsed[len(parsed)-1])
		require.True(t, ok)
		require.Equal(t, want, r.String())
	}
}

// What the protocol has no words for is not put into other words.
func TestNotExpressible(t *testing.T) {
	for _, s := range []string{
		"80", "unix:/run/web.sock:80", "systemd:web:80", "5432:unix:/run/db.sock/tcp,out", "8080:80/tcp,share",
		"127.0.0.1:8080:80/tcp,wait", "8080:80/tcp,proxy=v2", "8080:80/tcp,max=5",
	} {
		rules, err := forward.ParsePublish(s)
		require.NoError(t, err)
		_, _, ok := FromForward(rules[0])
		require.False(t, ok, s)
	}
	// A zone is a binding to the interface.
	_, r, ok := FromForward(forward.Rule{
		Proto: forward.TCP, Addr: netip.MustParseAddr("fe80::1%eth0"),
		Ports: forward.PortRange{First: 1, Last: 1}, TargetPorts: forward.PortRange{First: 1, Last: 1},
	})
	require.True(t, ok)
	require.Equal(t, "TCP [fe80::1]%eth0:1  =>  1", r.String())
}

func TestBadRules(t *testing.T) {
	good := Rule{First: 80, Last: 81, To: 90, Proto: tcp, Flags: DualStack}
	lo := [16]byte{'l', 'o'}
	for want, c := range map[string]struct {
		pif    PIF
		change func(*Rule)
	}{
		"":                          {Host, func(*Rule) {}},
		"neither TCP nor UDP":       {Host, func(r *Rule) { r.Proto = 22 }},
		"unknown flags 0x81":        {Host, func(r *Rule) { r.Flags |= 0x80 }},
		"port 0":                    {Host, func(r *Rule) { r.First = 0 }},
		"does not end in zero":      {Host, func(r *Rule) { r.Iface = [16]byte([]byte("0123456789abcdef")) }},
		"and both families":         {Host, func(r *Rule) { r.Addr = [16]byte{15: 1} }},
		"the container's loopback":  {Splice, func(*Rule) {}},
		"there is no table 2":       {2, func(r *Rule) { r.Iface = lo }},
		"range \"90-80\" ends":      {Host, func(r *Rule) { r.Last = 70 }},
		"different families":        {Host, func(r *Rule) { r.Flags, r.Addr[15], r.Target = 0, 1, [16]byte{10: 255, 11: 255, 12: 10} }},
		"not an interface name":     {Host, func(r *Rule) { r.Iface = [16]byte{'a', '/'} }},
		"range \"65535-0\" ends":    {Host, func(r *Rule) { r.To = 65535 }},
		"is a multicast address":    {Host, func(r *Rule) { r.Flags, r.Addr[0] = 0, 0xff }},
		"needs an address of its f": {Splice, func(r *Rule) { r.Iface, r.Target = lo, [16]byte{15: 9} }},
	} {
		r := good
		c.change(&r)
		f, err := r.Forward(c.pif)
		if err == nil {
			err = forward.Validate([]forward.Rule{f})
		}
		if want == "" {
			require.NoError(t, err)
			continue
		}
		require.ErrorContains(t, err, want)
	}
}

func TestTables(t *testing.T) {
	var rules []Rule
	for _, s := range seen {
		var r Rule
		require.NoError(t, binary.Read(bytes.NewReader(unhex(t, s.wire)), binary.BigEndian, &r))
		rules = append(rules, r)
	}
	tables := []Table{{PIF: Host, Name: "HOST", Caps: allCaps, Rules: rules[:6]}, {PIF: Splice, Name: "SPLICE", Caps: CapTCP, Rules: rules[6:]}}
	var b bytes.Buffer
	require.NoError(t, writeTables(&b, tables))
	// Up to the end of the first name, as it was seen.
	require.Equal(t, unhex(t, "626173696c3a730000000002000000800000001001484f5354"+zeros(124)), b.Bytes()[:149])
	all := bytes.Clone(b.Bytes())
	got, err := readTables(&b)
	require.NoError(t, err)
	require.Equal(t, tables, got)

	for n := range all {
		_, err := readTables(bytes.NewReader(all[:n]))
		require.Error(t, err, n)
	}
	for want, bytesAt := range map[string][2]int{"does not speak": {0, 'x'}, "version 3": {11, 3}, "other sizes": {15, 64}, "rules in a table": {153, 0xff}} {
		wrong := bytes.Clone(all)
		wrong[bytesAt[0]] = byte(bytesAt[1])
		_, err := readTables(bytes.NewReader(wrong))
		require.ErrorContains(t, err, want)
	}

	require.NoError(t, writeRules(&b, tables))
	got, err = readRules(&b)
	require.NoError(t, err)
	require.Equal(t, []Table{{PIF: Host, Rules: rules[:6]}, {PIF: Splice, Rules: rules[6:]}}, got)
	_, err = readRules(&b)
	require.ErrorIs(t, err, io.EOF)
	_, err = readRules(bytes.NewReader([]byte{1, 0, 0, 0, 0}))
	require.ErrorIs(t, err, io.ErrUnexpectedEOF)
	_, err = readRules(bytes.NewReader(bytes.Repeat([]byte{1, 0, 0, 0, 0}, 9)))
	require.ErrorContains(t, err, "too many tables")
}

func TestAddDelete(t *testing.T) {
	rule := func(spec string) Rule {
		parsed, err := forward.ParseSpec(forward.In, forward.TCP, spec)
		require.NoError(t, err)
		_, r, _ := FromForward(parsed[0])
		return r
	}
	table := Table{PIF: Host}
	require.NoError(t, table.Add(rule("8080:80")))
	require.NoError(t, table.Add(rule("8080:80")), "again is no change")
	require.NoError(t, table.Add(rule("%eth0/8081")))
	require.NoError(t, table.Add(rule("%eth1/8081")))
	require.Len(t, table.Rules, 3)
	require.EqualError(t, table.Add(rule("127.0.0.1/8080")), "add TCP [127.0.0.1]:8080  =>  8080: it overlaps TCP [*]:8080  =>  80")
	err := table.Delete(rule("8080:81"))
	require.EqualError(t, err, "delete TCP [*]:8080  =>  81: the rule that is there is TCP [*]:8080  =>  80")
	require.NotErrorIs(t, err, ErrNoRule)
	require.ErrorIs(t, table.Delete(rule("9")), ErrNoRule)
	require.NoError(t, table.Delete(rule("8080:80")))
	require.Equal(t, []Rule{rule("%eth0/8081"), rule("%eth1/8081")}, table.Rules)
}

// FuzzReadRules: whatever a client sends is an error, or says the same when it is
// written again. Rules that are valid are as good as their text.
func FuzzReadRules(f *testing.F) {
	f.Add([]byte{0})
	f.Add(unhex(f, "01ffffffff"))
	for _, s := range seen {
		pif := "01"
		if s.dir == forward.Out {
			pif = "03"
		}
		f.Add(unhex(f, pif+"00000001"+s.wire+"00"))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		r := bytes.NewReader(b)
		tables, err := readRules(r)
		if err != nil {
			return
		}
		var again bytes.Buffer
		require.NoError(t, writeRules(&again, tables))
		require.Equal(t, b[:len(b)-r.Len()], again.Bytes())
		for _, table := range tables {
			for _, rule := range table.Rules {
				require.NotEmpty(t, rule.String())
				meant, err := rule.Forward(table.PIF)
				if err != nil || forward.Validate([]forward.Rule{meant}) != nil {
					continue
				}
				pif, same, ok := FromForward(meant)
				require.True(t, ok)
				require.Equal(t, table.PIF, pif)
				back, err := same.Forward(pif)
				require.NoError(t, err)
				require.Equal(t, meant, back)
			}
		}
	})
}

// FuzzReadTables: whatever a server sends is an error, or can be shown and sent
// back.
func FuzzReadTables(f *testing.F) {
	for _, s := range seen {
		var r Rule
		require.NoError(f, binary.Read(bytes.NewReader(unhex(f, s.wire)), binary.BigEndian, &r))
		var b bytes.Buffer
		require.NoError(f, writeTables(&b, []Table{{PIF: Host, Name: "HOST", Caps: allCaps, Rules: []Rule{r}}}))
		f.Add(b.Bytes())
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		tables, err := readTables(bytes.NewReader(b))
		if err != nil {
			return
		}
		var again bytes.Buffer
		require.NoError(t, writeTables(&again, tables))
		same, err := readTables(&again)
		require.NoError(t, err)
		for i := range tables {
			// Without its zero byte a name is cut, and what was made printable
			// once is escaped again.
			if len(tables[i].Name) >= len(head{}.Name) || printable([]byte(tables[i].Name)) != tables[i].Name {
				same[i].Name = tables[i].Name
			}
		}
		require.Equal(t, tables, same)
	})
}
