package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/net/ipv6"
	"golang.org/x/sys/unix"
)

// What a client may ask of the load server, as the first byte of a TCP
// connection or of a datagram.
const (
	askEcho   = 'e' // send everything back
	askSource = 's' // tell the address that I come from
	askSink   = 'd' // UDP: count the bytes of this run
	askCount  = 'q' // UDP: how many bytes were counted in this run, in how many nanoseconds?
)

// sinkHeader is the length of what a datagram to the sink begins with: the ask,
// and the number of the run.
const sinkHeader = 1 + 8

// serve is the load server. It listens on the given ports of every address,
// each written as tcp/5202, udp/5202, gro/5204 for UDP with UDP_GRO, or quic/5206,
// and says "ready". "pipes" holds the memory of pipes that its user may have.
func serve(args []string) error {
	raiseFileLimit()
	errc := make(chan error)
	for _, arg := range args {
		kind, port, _ := strings.Cut(arg, "/")
		if kind == "pipes" {
			if err := holdPipes(); err != nil {
				return fmt.Errorf("hold the user's pipes: %w", err)
			}
			continue
		}
		number, err := strconv.ParseUint(port, 10, 16)
		if err != nil {
			return fmt.Errorf("parse port %q: %w", arg, err)
		}
		if kind == "tcp" {
			l, err := net.ListenTCP("tcp", &net.TCPAddr{Port: int(number)})
			if err != nil {
				return err
			}
			go serveTCP(l, errc)
			continue
		}
		conn, err := net.ListenUDP("udp", &net.UDPAddr{Port: int(number)})
		if err != nil {
			return err
		}
		if err := tuneUDP(conn, kind == "gro"); err != nil {
			return err
		}
		if kind == "quic" {
			go serveQUIC(conn, errc)
			continue
		}
		go serveUDP(conn, errc)
	}
	fmt.Println("ready")
	go func() { // and there is always one that waits for something
		_, err := io.Copy(io.Discard, os.Stdin)
		errc <- err
	}()
	return <-errc
}

// holdPipes makes pipes, as large as they may be, until a new one gets fewer
// than the usual 16 pages: the user has used up pipe-user-pages-soft (proc(5)).
// They stay as long as the process.
func holdPipes() error {
	usual := 16 * os.Getpagesize()
	for {
		var p [2]int
		if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
			return os.NewSyscallError("pipe2", err)
		}
		size, err := unix.FcntlInt(uintptr(p[0]), unix.F_GETPIPE_SZ, 0)
		if err != nil {
			return os.NewSyscallError("fcntl F_GETPIPE_SZ", err)
		}
		if size < usual {
			return nil
		}
		// Refused to the last ones, which then fill the rest by 16 pages each.
		_, _ = unix.FcntlInt(uintptr(p[0]), unix.F_SETPIPE_SZ, 1<<20)
	}
}

func serveTCP(l *net.TCPListener, errc chan<- error) {
	for {
		conn, err := l.AcceptTCP()
		if errors.Is(err, unix.ECONNABORTED) || errors.Is(err, unix.EMFILE) {
			continue
		}
		if err != nil {
			errc <- err
			return
		}
		go answerTCP(conn)
	}
}

func answerTCP(conn *net.TCPConn) {
	defer conn.Close()
	buf := make([]byte, 1024)
	for {
		n, err := conn.Read(buf)
		if err != nil {
			return
		}
		if buf[0] == askSource {
			_, _ = io.WriteString(conn, conn.RemoteAddr().String())
			return
		}
		if _, err := conn.Write(buf[:n]); err != nil {
			return
		}
	}
}

// udpBatch is how many datagrams go through one recvmmsg(2) or sendmmsg(2).
const udpBatch = 32

// tuneUDP asks for as large a receive buffer as net.core.rmem_max allows, and
// for datagrams in bundles where the sender sent them so.
func tuneUDP(conn *net.UDPConn, gro bool) error {
	if err := conn.SetReadBuffer(4 << 20); err != nil {
		return err
	}
	if !gro {
		return nil
	}
	return control(conn, func(fd int) error {
		return os.NewSyscallError("setsockopt UDP_GRO", unix.SetsockoptInt(fd, unix.IPPROTO_UDP, unix.UDP_GRO, 1))
	})
}

// control runs fn on the socket of conn.
func control(conn *net.UDPConn, fn func(fd int) error) error {
	raw, err := conn.SyscallConn()
	if err != nil {
		return err
	}
	var inner error
	if err := raw.Control(func(fd uintptr) { inner = fn(int(fd)) }); err != nil {
		return err
	}
	return inner
}

func serveUDP(conn *net.UDPConn, errc chan<- error) {
	pc := ipv6.NewPacketConn(conn)
	msgs := make([]ipv6.Message, udpBatch)
	for i := range msgs {
		msgs[i].Buffers = [][]byte{make([]byte, 1<<16)}
	}
	counts := map[uint64]*tally{}
	for {
		n, err := pc.ReadBatch(msgs, 0)
		if errors.Is(err, unix.ECONNREFUSED) {
			continue // an answer of ours met a client that has gone
		}
		if err != nil {
			errc <- err
			return
		}
		now := time.Now()
		for i := range msgs[:n] {
			answerUDP(conn, msgs[i].Buffers[0][:msgs[i].N], msgs[i].Addr, counts, now)
		}
	}
}

// tally is what arrived in a run, and when.
type tally struct {
	bytes       uint64
	first, last time.Time
}

func answerUDP(conn *net.UDPConn, data []byte, from net.Addr, counts map[uint64]*tally, now time.Time) {
	if len(data) == 0 {
		return
	}
	var run uint64
	if len(data) >= sinkHeader {
		run = binary.BigEndian.Uint64(data[1:])
	}
	// A reply that cannot be sent is one that was lost.
	switch data[0] {
	case askSink:
		if counts[run] == nil {
			counts[run] = &tally{first: now}
		}
		counts[run].bytes += uint64(len(data))
		counts[run].last = now
	case askCount:
		var t tally
		if counts[run] != nil {
			t = *counts[run]
		}
		answer := binary.BigEndian.AppendUint64(data[:sinkHeader:sinkHeader], t.bytes)
		answer = binary.BigEndian.AppendUint64(answer, uint64(t.last.Sub(t.first)))
		_, _ = conn.WriteTo(answer, from)
	case askSource:
		_, _ = conn.WriteTo([]byte(from.String()), from)
	default:
		_, _ = conn.WriteTo(data, from)
	}
}

// raiseFileLimit takes as many open files as the hard limit allows.
func raiseFileLimit() {
	var lim unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_NOFILE, &lim) == nil {
		lim.Cur = lim.Max
		_ = unix.Setrlimit(unix.RLIMIT_NOFILE, &lim)
	}
}

// unmapped returns an address as people write it, without ::ffff: or a zone.
func unmapped(text string) (netip.AddrPort, error) {
	ap, err := netip.ParseAddrPort(text)
	return netip.AddrPortFrom(ap.Addr().Unmap().WithZone(""), ap.Port()), err
}
