package main

import (
	"bytes"
	"os"
	"os/signal"
	"sync"
	"unicode/utf8"

	"golang.org/x/sys/unix"
)

// screen is a terminal on which something is drawn again and again, on its second
// screen (xterm's alternate buffer): when it is closed the terminal is as it was.
type screen struct {
	out, in *os.File
	modes   *unix.Termios  // to go back to; nil if in is no terminal
	resized chan os.Signal // the terminal has another size
	quit    chan struct{}  // closed when q is typed, or nobody types any more
	stop    *os.File       // ends readKeys when it is closed
	wg      sync.WaitGroup
}

// What a terminal understands (ECMA-48, and xterm's private modes).
const (
	enterScreen = "\x1b[?1049h\x1b[?25l\x1b[2J" // second screen, no cursor, empty
	leaveScreen = "\x1b[?25h\x1b[?1049l"
	drawHome    = "\x1b[H" // to the top
	eraseLine   = "\x1b[K" // from here to its end
	eraseBelow  = "\x1b[J"
)

// openScreen takes the terminal out over, and the keyboard where in is one.
func openScreen(out, in *os.File) (*screen, error) {
	s := &screen{out: out, in: in, resized: make(chan os.Signal, 1), quit: make(chan struct{})}
	if modes, err := unix.IoctlGetTermios(int(in.Fd()), unix.TCGETS); err == nil {
		keys := *modes
		keys.Lflag &^= unix.ICANON | unix.ECHO // a key at a time, ^C as ever
		keys.Cc[unix.VMIN], keys.Cc[unix.VTIME] = 1, 0
		keys.Cc[unix.VSUSP] = 0 // no ^Z: the shell would get the second screen
		wait, stop, err := os.Pipe()
		if err != nil {
			return nil, err
		}
		if err := unix.IoctlSetTermios(int(in.Fd()), unix.TCSETS, &keys); err != nil {
			wait.Close()
			stop.Close()
			return nil, os.NewSyscallError("tcsetattr", err)
		}
		s.modes, s.stop = modes, stop
		s.wg.Add(1)
		go s.readKeys(wait)
	}
	signal.Notify(s.resized, unix.SIGWINCH)
	if _, err := out.WriteString(enterScreen); err != nil {
		s.close()
		return nil, err
	}
	return s, nil
}

// readKeys waits for q, until wait's other end is closed.
func (s *screen) readKeys(wait *os.File) {
	defer s.wg.Done()
	defer wait.Close()
	fds := []unix.PollFd{{Fd: int32(s.in.Fd()), Events: unix.POLLIN}, {Fd: int32(wait.Fd())}}
	for {
		if _, err := unix.Poll(fds, -1); err != nil && err != unix.EINTR || fds[1].Revents != 0 {
			return
		}
		if fds[0].Revents == 0 {
			continue
		}
		key := make([]byte, 16)
		n, err := unix.Read(int(s.in.Fd()), key)
		if err == unix.EINTR {
			continue
		}
		if err != nil || n == 0 || bytes.ContainsAny(key[:n], "qQ") {
			close(s.quit)
			return
		}
	}
}

// draw shows as much of text as there is room for. Each line is erased only from
// where it ends: nothing flickers, as it would if the whole screen were.
func (s *screen) draw(text []byte) error {
	lines := bytes.Split(bytes.TrimSuffix(text, []byte("\n")), []byte("\n"))
	if size, err := unix.IoctlGetWinsize(int(s.out.Fd()), unix.TIOCGWINSZ); err == nil && size.Row > 0 && size.Col > 0 {
		lines = lines[:min(len(lines), int(size.Row))]
		for i := range lines {
			lines[i] = firstRunes(lines[i], int(size.Col))
		}
	}
	b := []byte(drawHome)
	for i, line := range lines {
		if i > 0 {
			b = append(b, '\n') // the terminal adds the carriage return
		}
		b = append(append(b, line...), eraseLine...)
	}
	_, err := s.out.Write(append(b, eraseBelow...))
	return err
}

// firstRunes returns what of line fits into n columns.
func firstRunes(line []byte, n int) []byte {
	end := 0
	for range n {
		_, size := utf8.DecodeRune(line[end:])
		end += size
	}
	return line[:end]
}

// close gives the terminal back.
func (s *screen) close() {
	signal.Stop(s.resized)
	_, _ = s.out.WriteString(leaveScreen)
	if s.modes != nil {
		s.stop.Close()
		s.wg.Wait()
		_ = unix.IoctlSetTermios(int(s.in.Fd()), unix.TCSETS, s.modes)
	}
}
