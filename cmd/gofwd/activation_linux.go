package main

import (
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/gofwd/gofwd/forward"
)

// listenFDsStart is the first descriptor that systemd passes
// (SD_LISTEN_FDS_START, sd_listen_fds(3)).
const listenFDsStart = 3

// takeListenFDs takes over the sockets that systemd, or systemd-socket-activate(1),
// passed to this process, and what says so in the environment: COMMAND is not to
// take them for its own.
func takeListenFDs() ([]forward.Socket, error) {
	pid, count := os.Getenv("LISTEN_PID"), os.Getenv("LISTEN_FDS")
	names := strings.Split(os.Getenv("LISTEN_FDNAMES"), ":")
	if pid != strconv.Itoa(os.Getpid()) {
		return nil, nil
	}
	for _, name := range []string{"LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PIDFDID"} {
		os.Unsetenv(name)
	}
	n, err := strconv.Atoi(count)
	if err != nil || n < 0 {
		return nil, fmt.Errorf("LISTEN_FDS %q: not a number of sockets", count)
	}
	sockets := make([]forward.Socket, n)
	for i := range sockets {
		fd := listenFDsStart + i
		if _, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err != nil {
			return nil, fmt.Errorf("LISTEN_FDS %d: there is no descriptor %d", n, fd)
		}
		unix.CloseOnExec(fd)
		name := "unknown" // as sd_listen_fds_with_names(3)
		if i < len(names) && names[i] != "" {
			name = names[i]
		}
		sockets[i] = forward.Socket{Name: name, File: os.NewFile(uintptr(fd), "socket "+name)}
	}
	return sockets, nil
}
