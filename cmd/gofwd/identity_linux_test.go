package main

import (
	"testing"

	"github.com/stretchr/testify/require"
)

func TestParseIdentity(t *testing.T) {
	for s, want := range map[string]identity{
		"0":          {0, 0},
		"1000":       {1000, 1000},
		"1000:5":     {1000, 5},
		"root":       {0, 0},
		"root:7":     {0, 7},
		"1000:root":  {1000, 0},
		"4294967294": {4294967294, 4294967294},
	} {
		got, err := parseIdentity(s)
		require.NoError(t, err, s)
		require.Equal(t, want, got, s)
	}
	for s, want := range map[string]string{
		"":               "no such user",
		"-1":             "no such user",
		"4294967295":     "no such user", // is "leave it as it is" to setresuid(2)
		"no-such-user":   "no such user",
		"0:":             "no such group",
		"0:no-such-gang": "no such group",
	} {
		_, err := parseIdentity(s)
		require.ErrorContains(t, err, want, s)
	}
}
