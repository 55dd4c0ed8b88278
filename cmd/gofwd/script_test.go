package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/gofwd/gofwd/netnsutil/nstest"
)

// The scripts see gofwd as an ordinary user does, also when root runs them: in a
// user namespace, whose network is "the host", gofwd makes another one inside
// which it has no rights over that host.
func TestMain(m *testing.M) {
	if _, ok := programs[filepath.Base(os.Args[0])]; ok {
		testscript.Main(m, programs)
	}
	nstest.Main(inScripts{m})
}

// inScripts runs the tests with programs in $PATH.
type inScripts struct{ *testing.M }

func (m inScripts) Run() int {
	testscript.Main(m.M, programs)
	return 0 // not reached
}

// programs are what scripts find in $PATH besides the machine's own.
var programs = map[string]func(){
	"gofwd":        main,
	"pasta":        main,
	"pesto":        main,
	"rootlessport": main,
	"serve":        serveMain,
	"fetch":        fetchMain,
	"notified":     notifiedMain,
	"activated":    activatedMain,
	"sandboxed":    sandboxedMain,
}

func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata/script",
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
		Setup: func(env *testscript.Env) error {
			dir := filepath.Join(env.WorkDir, "run")
			env.Setenv("XDG_RUNTIME_DIR", dir)
			env.Setenv("SHELL", "/bin/sh")
			// With -race every program would take a second to end.
			env.Setenv("GORACE", "atexit_sleep_ms=0")
			return os.Mkdir(dir, 0o700)
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"exits":      exits,
			"fails":      fails,
			"eventually": eventually,
		},
	})
}

// exits CODE PROGRAM [ARG]... runs a program that is to exit with CODE.
func exits(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: exits CODE PROGRAM [ARG]...")
	}
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	got := 0
	var exit *exec.ExitError
	if err := ts.Exec(args[1], args[2:]...); errors.As(err, &exit) {
		got = exit.ExitCode()
	} else {
		ts.Check(err)
	}
	if got != want {
		ts.Fatalf("exit status %d, not %d", got, want)
	}
}

// fails CODE PROGRAM [ARG]... is exits for an error of gofwd's own: one line on
// standard error, and nothing on standard output.
func fails(ts *testscript.TestScript, neg bool, args []string) {
	exits(ts, neg, args)
	stderr := ts.ReadFile("stderr")
	if !strings.HasPrefix(stderr, "gofwd: ") || strings.Count(stderr, "\n") != 1 {
		ts.Fatalf("standard error is not one line that begins with gofwd:")
	}
	if ts.ReadFile("stdout") != "" {
		ts.Fatalf("something on standard output")
	}
}

// [!] eventually COMMAND [ARG]... waits for up to ten seconds until the shell
// command succeeds, or fails.
func eventually(ts *testscript.TestScript, neg bool, args []string) {
	var err error
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		cmd := exec.Command(args[0], args[1:]...)
		cmd.Dir = ts.Getenv("WORK")
		cmd.Env = append(os.Environ(), "XDG_RUNTIME_DIR="+ts.Getenv("XDG_RUNTIME_DIR"))
		if err = cmd.Run(); (err == nil) != neg {
			return
		}
	}
	ts.Fatalf("after ten seconds: %v", err)
}

// serve tcp|udp PORT tells every client its address, until it is killed. When it
// listens, it makes a file listening-tcpPORT or listening-udpPORT.
func serveMain() {
	network, port := os.Args[1], os.Args[2]
	listening := func() { check(os.WriteFile("listening-"+network+port, nil, 0o600)) }
	if network == "udp" {
		c, err := net.ListenPacket("udp", ":"+port)
		check(err)
		listening()
		for buf := make([]byte, 1500); ; {
			_, from, err := c.ReadFrom(buf)
			check(err)
			fmt.Fprintln(packetWriter{c, from}, from)
		}
	}
	l, err := net.Listen("tcp", ":"+port)
	check(err)
	listening()
	for {
		c, err := l.Accept()
		check(err)
		fmt.Fprintln(c, c.RemoteAddr())
		c.Close()
	}
}

type packetWriter struct {
	net.PacketConn
	to net.Addr
}

func (w packetWriter) Write(b []byte) (int, error) { return w.WriteTo(b, w.to) }

// fetch tcp|udp ADDR:PORT prints what a server answers, and says on standard
// error what the client's own address was. It tries for ten seconds.
func fetchMain() {
	var err error
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if err = fetch(os.Args[1], os.Args[2]); err == nil {
			return
		}
	}
	check(err)
}

func fetch(network, addr string) error {
	c, err := net.Dial(network, addr)
	if err != nil {
		return err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(time.Second))
	if network == "udp" {
		if _, err := c.Write([]byte("?")); err != nil {
			return err
		}
	}
	answer, err := bufio.NewReader(c).ReadString('\n')
	if err != nil {
		return err
	}
	fmt.Print(answer)
	fmt.Fprintln(os.Stderr, c.LocalAddr())
	return nil
}

// notified SOCKET COMMAND [ARG]... runs a command as systemd runs a service of
// Type=notify, and prints what it is told.
func notifiedMain() {
	c, err := net.ListenPacket("unixgram", os.Args[1])
	check(err)
	cmd := exec.Command(os.Args[2], os.Args[3:]...)
	cmd.Env = append(os.Environ(), "NOTIFY_SOCKET="+os.Args[1])
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	check(cmd.Start())
	buf := make([]byte, 1500)
	c.SetDeadline(time.Now().Add(10 * time.Second))
	n, _, err := c.ReadFrom(buf)
	check(err)
	fmt.Printf("%s\n", bytes.ReplaceAll(buf[:n], []byte(strconv.Itoa(cmd.Process.Pid)), []byte("PID")))
	check(cmd.Wait())
}

// activated NAME ADDRESS COMMAND [ARG]... becomes a command that is passed a TCP socket,
// as systemd passes it.
func activatedMain() {
	l, err := net.Listen("tcp", os.Args[2])
	check(err)
	f, err := l.(*net.TCPListener).File()
	check(err)
	if f.Fd() != listenFDsStart {
		check(syscall.Dup3(int(f.Fd()), listenFDsStart, 0))
	}
	path, err := exec.LookPath(os.Args[3])
	check(err)
	env := append(os.Environ(), "LISTEN_FDS=1", "LISTEN_FDNAMES="+os.Args[1], "LISTEN_PID="+strconv.Itoa(os.Getpid()))
	check(syscall.Exec(path, os.Args[3:], env))
}

func check(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
