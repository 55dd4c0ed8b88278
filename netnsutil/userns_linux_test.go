package netnsutil

import (
	"fmt"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

func TestWhyForbidden(t *testing.T) {
	const (
		limit    = "sys/user/max_user_namespaces"
		debian   = "sys/kernel/unprivileged_userns_clone"
		apparmor = "sys/kernel/apparmor_restrict_unprivileged_userns"
	)
	for name, tt := range map[string]struct {
		files   map[string]string
		errno   unix.Errno
		setting string
	}{
		"limit":               {map[string]string{limit: "0\n"}, unix.ENOSPC, "user.max_user_namespaces=0"},
		"limit reached":       {map[string]string{limit: "3\n"}, unix.ENOSPC, "user.max_user_namespaces=3"},
		"Debian's switch":     {map[string]string{debian: "0\n", apparmor: "1\n"}, unix.EPERM, "kernel.unprivileged_userns_clone=0"},
		"switch is on":        {map[string]string{debian: "1\n"}, unix.EPERM, ""},
		"AppArmor":            {map[string]string{debian: "1\n", apparmor: "1\n"}, unix.EACCES, "kernel.apparmor_restrict_unprivileged_userns=1"},
		"AppArmor is allowed": {map[string]string{apparmor: "0\n"}, unix.EPERM, ""},
		"seccomp":             {map[string]string{"self/status": "Name:\tx\nSeccomp:\t2\nSeccomp_filters:\t1\n"}, unix.EPERM, "a seccomp filter"},
		"no seccomp":          {map[string]string{"self/status": "Name:\tx\nSeccomp:\t0\n"}, unix.EPERM, ""},
		"another error":       {map[string]string{limit: "0\n", debian: "0\n", apparmor: "1\n"}, unix.EINVAL, ""},
	} {
		t.Run(name, func(t *testing.T) {
			proc := fstest.MapFS{}
			for name, value := range tt.files {
				proc[name] = &fstest.MapFile{Data: []byte(value)}
			}
			setting, remedy := whyForbidden(proc, tt.errno)
			require.Equal(t, tt.setting, setting)
			require.Equal(t, setting == "", remedy == "")
		})
	}
}

func TestParseSubIDs(t *testing.T) {
	const table = "# comment\n\nroot:1:2\nalice:100000:65536\nbob:165536:65536\n1000:300000:10\nalice:400000:0\nalice:500000:1\n"
	for name, tt := range map[string]struct {
		table string
		uid   int
		user  string
		want  []idRange
		err   string
	}{
		"by name and uid": {table, 1000, "alice", []idRange{{100000, 65536}, {300000, 10}, {500000, 1}}, ""},
		"by uid":          {table, 1000, "", []idRange{{300000, 10}}, ""},
		"none":            {table, 7, "carol", nil, ""},
		"name prefix":     {"alice2:1:2\n", 1, "alice", nil, ""},
		"malformed":       {"alice:x:2\n", 1, "alice", nil, `malformed line "alice:x:2"`},
		"short":           {"alice:1\n", 1, "alice", nil, `malformed line "alice:1"`},
		"not ours":        {"bob:x\n", 1, "alice", nil, ""},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := parseSubIDs(strings.NewReader(tt.table), tt.uid, tt.user)
			if tt.err != "" {
				require.EqualError(t, err, tt.err)
				return
			}
			require.NoError(t, err)
			require.Equal(t, tt.want, got)
		})
	}
}

func FuzzParseSubIDs(f *testing.F) {
	f.Add("alice:100000:65536\n1000:1:1\n")
	f.Add("alice:-1:99999999999\n")
	f.Fuzz(func(t *testing.T, table string) {
		ranges, err := parseSubIDs(strings.NewReader(table), 1000, "alice")
		if err != nil {
			require.NotContains(t, fmt.Sprint(err), "\n")
			return
		}
		for _, r := range ranges {
			require.NotZero(t, r.count)
			require.LessOrEqual(t, max(r.first, r.count), uint64(1<<32-1))
		}
	})
}
