package main

import (
	"bufio"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
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

// screenTest is gofwd status --watch on a terminal, and what it has written there.
type screenTest struct {
	cmd           *exec.Cmd
	master, slave *os.File
	mu            sync.Mutex
	written       strings.Builder
}

func watchOnTerminal(t *testing.T, name string) *screenTest {
	t.Helper()
	s := &screenTest{}
	s.master, s.slave = openTerminal(t)
	s.resize(t, 24, 60)
	s.cmd = exec.Command("gofwd", "status", "--watch", name)
	s.cmd.Stdin, s.cmd.Stdout, s.cmd.Stderr = s.slave, s.slave, s.slave
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	require.NoError(t, s.cmd.Start())
	t.Cleanup(func() { _ = s.cmd.Process.Kill() })
	go s.collect()
	return s
}

func (s *screenTest) collect() {
	for buf := make([]byte, 4096); ; {
		n, err := s.master.Read(buf)
		if err != nil {
			return
		}
		s.mu.Lock()
		s.written.Write(buf[:n])
		s.mu.Unlock()
	}
}

func (s *screenTest) text() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.written.String()
}

func (s *screenTest) resize(t *testing.T, rows, cols uint16) {
	t.Helper()
	require.NoError(t, unix.IoctlSetWinsize(int(s.master.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Row: rows, Col: cols}))
}

// frames returns the lines of each drawing.
func (s *screenTest) frames() (frames [][]string) {
	for _, f := range strings.Split(s.text(), drawHome)[1:] {
		f, _, complete := strings.Cut(f, eraseBelow)
		if complete {
			frames = append(frames, strings.Split(strings.ReplaceAll(f, eraseLine, ""), "\r\n"))
		}
	}
	return frames
}

// status --watch draws in place, as wide as the terminal is, and gives the terminal
// back as it was, however it ends.
func TestWatchOnTerminal(t *testing.T) {
	t.Setenv("XDG_RUNTIME_DIR", t.TempDir())
	ready, w, err := os.Pipe()
	require.NoError(t, err)
	run := exec.Command("gofwd", "run", "--name", "watched", "--ready-fd", "3", "-p", "127.0.0.1::80", "--", "sleep", "1000")
	run.ExtraFiles = []*os.File{w}
	require.NoError(t, run.Start())
	w.Close()
	t.Cleanup(func() { _ = run.Process.Signal(unix.SIGTERM); _ = run.Wait() })
	_, err = ready.Read(make([]byte, 1))
	require.NoError(t, err)

	for name, end := range map[string]func(s *screenTest) error{
		"q":       func(s *screenTest) error { _, err := s.master.WriteString("q"); return err },
		"^C":      func(s *screenTest) error { _, err := s.master.WriteString("\x03"); return err },
		"SIGTERM": func(s *screenTest) error { return s.cmd.Process.Signal(unix.SIGTERM) },
	} {
		t.Run(name, func(t *testing.T) {
			s := watchOnTerminal(t, "watched")
			widest := func() int {
				n := 0
				if frames := s.frames(); len(frames) > 0 {
					for _, line := range frames[len(frames)-1] {
						n = max(n, len(line))
					}
				}
				return n
			}
			require.Eventually(t, func() bool { return len(s.frames()) >= 2 }, 10*time.Second, 10*time.Millisecond)
			require.True(t, strings.HasPrefix(s.text(), enterScreen))
			require.Contains(t, strings.Join(s.frames()[0], "\n"), "watched")
			require.Equal(t, 60, widest())
			s.resize(t, 3, 40)
			require.Eventually(t, func() bool { return widest() == 40 }, 10*time.Second, 10*time.Millisecond)
			require.Len(t, s.frames()[len(s.frames())-1], 3)

			require.NoError(t, end(s))
			require.NoError(t, s.cmd.Wait())
			after, err := unix.IoctlGetTermios(int(s.slave.Fd()), unix.TCGETS)
			require.NoError(t, err)
			require.NotZero(t, after.Lflag&unix.ICANON)
			require.NotZero(t, after.Lflag&unix.ECHO)
			require.Eventually(t, func() bool { return strings.HasSuffix(s.text(), leaveScreen) }, 5*time.Second, 10*time.Millisecond)
		})
	}
	t.Run("a pipe", func(t *testing.T) {
		cmd := exec.Command("gofwd", "status", "--watch", "watched")
		out, err := cmd.StdoutPipe()
		require.NoError(t, err)
		require.NoError(t, cmd.Start())
		lines := bufio.NewScanner(out)
		for tables := 0; tables < 2 && lines.Scan(); {
			require.NotContains(t, lines.Text(), "\x1b")
			if strings.HasPrefix(lines.Text(), "watched ") && strings.Contains(lines.Text(), "outbound") {
				tables++
			}
		}
		require.NoError(t, lines.Err())
		require.NoError(t, cmd.Process.Signal(unix.SIGTERM))
		require.NoError(t, cmd.Wait())
	})
}
