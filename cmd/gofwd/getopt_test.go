package main

import (
	"errors"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// recorder makes options that write down what they are given.
func recorder(got *[]string) []longOption {
	options := []longOption{
		{name: "debug", letter: 'd'},
		{name: "dns", letter: 'D', hasArg: true},
		{name: "dns-forward", hasArg: true},
		{name: "netns", hasArg: true},
		{name: "netns-only"},
		{name: "tcp-ports", letter: 't', hasArg: true},
		{name: "bad"},
	}
	for i := range options {
		name := options[i].name
		options[i].set = func(arg string) error {
			*got = append(*got, name+"="+arg)
			if name == "bad" {
				return errors.New("it is bad")
			}
			return nil
		}
	}
	return options
}

func TestGetopt(t *testing.T) {
	for _, tt := range []struct{ args, got, rest, err string }{
		{"", "", "", ""},
		{"--dns=1 --dns 2 -D3 -D 4", "dns=1 dns=2 dns=3 dns=4", "", ""},
		{"-dd -dt80", "debug= debug= debug= tcp-ports=80", "", ""},
		{"-dt 80 x -d", "debug= tcp-ports=80", "x -d", ""},
		{"-d -- -d", "debug=", "-d", ""},
		{"- -d", "", "- -d", ""},
		{"--deb --tcp=1 --dns-f 2 --netns=x", "debug= tcp-ports=1 dns-forward=2 netns=x", "", ""},
		{"--dns=", "dns=", "", ""},
		{"--netns --netns-only", "netns=--netns-only", "", ""},
		{"--d", "", "", "option '--d' is ambiguous; possibilities: '--debug' '--dns' '--dns-forward'"},
		{"--frob=1", "", "", "unrecognized option '--frob'"},
		{"--debug=1", "", "", "option '--debug' doesn't allow an argument"},
		{"-d --dns", "debug=", "", "option '--dns' requires an argument"},
		{"-dD", "debug=", "", "option requires an argument -- 'D'"},
		{"-dx", "debug=", "", "invalid option -- 'x'"},
		{"--bad -d", "bad=", "", "it is bad"},
	} {
		var got []string
		rest, err := getopt(recorder(&got), strings.Fields(tt.args))
		require.Equal(t, tt.got, strings.Join(got, " "), tt.args)
		require.Equal(t, tt.rest, strings.Join(rest, " "), tt.args)
		if tt.err == "" {
			require.NoError(t, err, tt.args)
		} else {
			require.EqualError(t, err, tt.err, tt.args)
		}
	}
}

func FuzzGetopt(f *testing.F) {
	f.Add("--dns=1 -dt80 -- x")
	f.Fuzz(func(t *testing.T, line string) {
		var got []string
		args := strings.Split(line, " ")
		rest, err := getopt(recorder(&got), args)
		require.LessOrEqual(t, len(rest), len(args))
		if err != nil {
			require.Nil(t, rest)
		}
	})
}
