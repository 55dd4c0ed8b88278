package main

import (
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"github.com/gofwd/gofwd/forward"
)

// Exit codes. COMMAND's own code is passed on, and 128 + n where signal n ended
// it, as shells do.
const (
	exitFailure     = 1
	exitUsage       = 2
	exitNotRunnable = 126 // COMMAND is not executable, as in shells
	exitNotFound    = 127 // COMMAND does not exist, as in shells
)

// usageError is a command line that cannot be meant: exit code 2.
type usageError struct {
	err error
	see string // where the right way is described
}

func (e *usageError) Error() string { return e.err.Error() + "; see '" + e.see + "'" }
func (e *usageError) Unwrap() error { return e.err }

func usagef(cmd *cobra.Command, format string, args ...any) error {
	return &usageError{fmt.Errorf(format, args...), cmd.CommandPath() + " --help"}
}

// exitStatus ends gofwd with a code of which the user has been told already, or
// that is COMMAND's.
type exitStatus int

func (e exitStatus) Error() string { return fmt.Sprintf("exit status %d", int(e)) }

// codedError is an error with another exit code than 1.
type codedError struct {
	error
	code int
}

func (e *codedError) Unwrap() error { return e.error }

// hintedError is an error together with what to do about it.
type hintedError struct {
	error
	hint string
}

func (e *hintedError) Unwrap() error { return e.error }

// report prints err in one line, with a hint where there is one, and returns the
// exit code.
func report(w io.Writer, err error) int {
	if err == nil {
		return 0
	}
	if status, ok := errors.AsType[exitStatus](err); ok {
		return int(status)
	}
	fmt.Fprintln(w, "gofwd: "+oneLine(err))
	if _, ok := errors.AsType[*usageError](err); ok {
		return exitUsage
	}
	if coded, ok := errors.AsType[*codedError](err); ok {
		return coded.code
	}
	return exitFailure
}

// oneLine is err in one line, with a hint where there is one.
func oneLine(err error) string {
	line := err.Error()
	if h := hint(err); h != "" {
		line += "; " + h
	}
	return strings.ReplaceAll(line, "\n", "; ")
}

// hint says what to do about err, "" where we know nothing.
func hint(err error) string {
	if hinted, ok := errors.AsType[*hintedError](err); ok {
		return hinted.hint
	}
	return forward.Hint(err)
}
