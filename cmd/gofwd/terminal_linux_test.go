package main

import (
	"bufio"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// openTerminal makes a pseudo-terminal.
func openTerminal(t *testing.T) (master, slave *os.File) {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	require.NoError(t, err)
	t.Cleanup(func() { master.Close() })
	require.NoError(t, unix.IoctlSetPointerInt(int(master.Fd()), unix.TIOCSPTLCK, 0))
	n, err := unix.IoctlGetInt(int(master.Fd()), unix.TIOCGPTN)
	require.NoError(t, err)
	slave, err = os.OpenFile("/dev/pts/"+strconv.Itoa(n), os.O_RDWR|unix.O_NOCTTY, 0)
	require.NoError(t, err)
	t.Cleanup(func() { slave.Close() })
	return master, slave
}

// What is typed reaches the command once, from the terminal, and neither ends
// gofwd nor stops it for good.
func TestTerminal(t *testing.T) {
	master, slave := openTerminal(t)
	cmd := exec.Command("gofwd", "run", "--", "sh", "-c",
		`trap "echo interrupted" INT; trap "echo continued" CONT; trap "echo end; exit 9" TERM
		echo ready; while :; do sleep 0.02; done`)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = slave, slave, slave
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	require.NoError(t, cmd.Start())
	slave.Close()
	t.Cleanup(func() { _ = cmd.Process.Kill() })

	lines := make(chan string, 100)
	go readTerminal(master, lines)
	next := func() string {
		select {
		case l := <-lines:
			return l
		case <-time.After(10 * time.Second):
			return "nothing for ten seconds"
		}
	}
	require.Equal(t, "ready", next())

	_, err := master.WriteString("\x03")
	require.NoError(t, err)
	require.Equal(t, "^Cinterrupted", next())
	// A second one would come after groupDelay.
	select {
	case l := <-lines:
		require.Fail(t, "another line", l)
	case <-time.After(3 * groupDelay):
	}

	// ^Z stops the whole job, as a shell's fg goes on with it. (Without a
	// shell it is an orphaned process group, which the terminal can't stop.)
	pgid := cmd.Process.Pid
	require.NoError(t, unix.Kill(-pgid, unix.SIGSTOP))
	var ws unix.WaitStatus
	_, err = unix.Wait4(pgid, &ws, unix.WUNTRACED, nil)
	require.NoError(t, err)
	require.True(t, ws.Stopped())
	require.NoError(t, unix.Kill(-pgid, unix.SIGCONT))
	require.Equal(t, "continued", next())

	require.NoError(t, cmd.Process.Signal(unix.SIGTERM))
	require.Equal(t, "end", next())
	require.ErrorContains(t, cmd.Wait(), "exit status 9")
}

func readTerminal(f *os.File, lines chan<- string) {
	for s := bufio.NewScanner(f); s.Scan(); {
		lines <- strings.TrimRight(s.Text(), "\r")
	}
}
