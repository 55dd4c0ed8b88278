// Command gofwd gives a container's network namespace a network and publishes
// its ports, as an ordinary user.
//
// The library is package forward. This command adds what belongs to a process
// and not to a library: the command line, user namespaces, signals and exit
// codes, readiness, and the control socket. See outer_linux.go for how its
// processes fit together.
package main

import (
	"os"
	"path/filepath"
	"runtime"
)

// The main thread runs nothing but main: it cannot end, /proc/PID/ns is its own,
// and goroutines that take their thread into another namespace must get others.
func init() { runtime.LockOSThread() }

func main() { os.Exit(dispatch(os.Args)) }

// dispatch chooses the command line by the name that the program was called by,
// and returns the exit code.
func dispatch(argv []string) int {
	switch filepath.Base(argv[0]) {
	// The command lines of other programs: each translates its own into
	// options and ends in the same functions as ours.
	case "pasta":
		return executePasta(argv)
	case "rootlessport":
		return executeRootlessport(argv)
	case "pesto":
		return executePesto(argv)
	default:
		return execute(argv)
	}
}
