package main

import (
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// What COMMAND started and left behind ends with it, since its network does: as
// subreapers (PR_SET_CHILD_SUBREAPER(2const)), inner and outer become the parents
// of such processes. Two of them, as either may be killed. A PID namespace would
// do it too, but make COMMAND an init, which few programs are prepared for.

// adoptOrphans makes us a subreaper. main is the child that somebody else waits
// for; the others are waited for here, until the process ends.
func adoptOrphans(main int) error {
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("adopt orphans: %w", os.NewSyscallError("prctl", err))
	}
	died := make(chan os.Signal, 1)
	signal.Notify(died, unix.SIGCHLD)
	go reapOrphans(died, main)
	return nil
}

func reapOrphans(died <-chan os.Signal, main int) {
	for range died {
		for _, pid := range childrenOfUs() {
			if pid != main {
				_, _ = unix.Wait4(pid, nil, unix.WNOHANG, nil)
			}
		}
	}
}

// killOrphans kills all children, and theirs, which become ours in turn. It is
// for when main has ended.
func killOrphans() {
	for {
		pids := childrenOfUs()
		if len(pids) == 0 {
			return
		}
		for _, pid := range pids {
			_ = unix.Kill(pid, unix.SIGKILL)
		}
		for _, pid := range pids {
			for {
				if _, err := unix.Wait4(pid, nil, 0, nil); err != unix.EINTR {
					break
				}
			}
		}
	}
}

// childrenOfUs returns the processes whose parent we are (CONFIG_PROC_CHILDREN;
// each thread has its own).
func childrenOfUs() []int {
	files, _ := filepath.Glob("/proc/self/task/*/children") // the pattern is good
	var pids []int
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			continue // a thread that has ended
		}
		for field := range strings.FieldsSeq(string(b)) {
			if pid, err := strconv.Atoi(field); err == nil {
				pids = append(pids, pid)
			}
		}
	}
	return pids
}
