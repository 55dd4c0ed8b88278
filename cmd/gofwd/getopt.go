package main

import (
	"fmt"
	"strings"
)

// longOption is an option as getopt_long(3) knows it. Programs that we stand in
// for parse their command lines with it, and those who call them rely on its
// habits: "--opt=val", "--opt val", "-oVAL", "-ab" for "-a -b", and long names cut
// short as long as they stay unambiguous.
type longOption struct {
	name   string
	letter byte // its short form; 0 is none
	hasArg bool
	// set takes the argument, "" without one.
	set func(arg string) error
}

// getopt gives args to options, in their order, and returns what follows: it
// stops at the first word that is no option, or behind "--". Errors have the
// words of glibc.
func getopt(options []longOption, args []string) (rest []string, err error) {
	for len(args) > 0 {
		word := args[0]
		switch {
		case word == "--":
			return args[1:], nil
		case strings.HasPrefix(word, "--"):
			args, err = getoptLong(options, word[2:], args[1:])
		case len(word) > 1 && word[0] == '-':
			args, err = getoptShort(options, word[1:], args[1:])
		default:
			return args, nil
		}
		if err != nil {
			return nil, err
		}
	}
	return nil, nil
}

// getoptLong handles one long option, and returns the words left of args.
func getoptLong(options []longOption, word string, args []string) ([]string, error) {
	name, arg, attached := strings.Cut(word, "=")
	o, err := findLong(options, name)
	if err != nil {
		return nil, err
	}
	switch {
	case attached && !o.hasArg:
		return nil, fmt.Errorf("option '--%s' doesn't allow an argument", o.name)
	case o.hasArg && !attached && len(args) == 0:
		return nil, fmt.Errorf("option '--%s' requires an argument", o.name)
	case o.hasArg && !attached:
		arg, args = args[0], args[1:]
	}
	return args, o.set(arg)
}

func findLong(options []longOption, name string) (*longOption, error) {
	var found []*longOption
	for i := range options {
		switch o := &options[i]; {
		case o.name == name:
			return o, nil
		case strings.HasPrefix(o.name, name):
			found = append(found, o)
		}
	}
	switch len(found) {
	case 0:
		return nil, fmt.Errorf("unrecognized option '--%s'", name)
	case 1:
		return found[0], nil
	}
	var b strings.Builder
	for _, o := range found {
		fmt.Fprintf(&b, " '--%s'", o.name)
	}
	return nil, fmt.Errorf("option '--%s' is ambiguous; possibilities:%s", name, b.String())
}

// getoptShort handles a word of short options, and returns the words left of
// args.
func getoptShort(options []longOption, letters string, args []string) ([]string, error) {
	for i := range len(letters) {
		o := findShort(options, letters[i])
		switch {
		case o == nil:
			return nil, fmt.Errorf("invalid option -- '%c'", letters[i])
		case !o.hasArg:
			if err := o.set(""); err != nil {
				return nil, err
			}
		case i+1 < len(letters):
			return args, o.set(letters[i+1:])
		case len(args) == 0:
			return nil, fmt.Errorf("option requires an argument -- '%c'", letters[i])
		default:
			return args[1:], o.set(args[0])
		}
	}
	return args, nil
}

func findShort(options []longOption, letter byte) *longOption {
	for i := range options {
		if options[i].letter != 0 && options[i].letter == letter {
			return &options[i]
		}
	}
	return nil
}
