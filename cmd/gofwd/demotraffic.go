package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/gofwd/gofwd/netnsutil"
)

const (
	demoRoundTrips = 50
	demoTransfer   = 300 * time.Millisecond // of throughput, per client
	demoTimeout    = 5 * time.Second        // for an answer
	demoSilence    = 200 * time.Millisecond // after which a datagram won't come
	demoDatagram   = 1400                   // bytes
)

// demoServers are the container's: a web server on port 80, and a UDP server on
// port 53. Both tell a client which address it has, and send as fast as they can
// when asked to.
type demoServers struct {
	web *http.Server
	udp net.PacketConn
	wg  sync.WaitGroup
}

// start starts the servers in ns.
func (s *demoServers) start(ns *netnsutil.NS) error {
	var tcp net.Listener
	err := ns.Do(func() (err error) {
		if tcp, err = net.Listen("tcp", ":80"); err != nil {
			return err
		}
		if s.udp, err = net.ListenPacket("udp", ":53"); err != nil {
			tcp.Close()
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("start servers: %w", err)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("/whoami", func(w http.ResponseWriter, r *http.Request) { _, _ = io.WriteString(w, r.RemoteAddr) })
	mux.HandleFunc("/zeros", serveZeros)
	s.web = &http.Server{Handler: mux}
	s.wg.Add(2)
	go s.serveWeb(tcp)
	go s.serveUDP()
	return nil
}

func (s *demoServers) close() {
	if s.web != nil {
		s.web.Close()
	}
	if s.udp != nil {
		s.udp.Close()
	}
	s.wg.Wait()
}

func (s *demoServers) serveWeb(l net.Listener) {
	defer s.wg.Done()
	_ = s.web.Serve(l)
}

func serveZeros(w http.ResponseWriter, r *http.Request) {
	zeros := make([]byte, 1<<20)
	for r.Context().Err() == nil {
		if _, err := w.Write(zeros); err != nil {
			return
		}
	}
}

// serveUDP answers a datagram with its sender's address. One that says "zeros"
// is answered with many.
func (s *demoServers) serveUDP() {
	defer s.wg.Done()
	buf, zeros := make([]byte, demoDatagram), make([]byte, demoDatagram)
	for {
		n, from, err := s.udp.ReadFrom(buf)
		if err != nil {
			return
		}
		if string(buf[:n]) != "zeros" {
			_, _ = s.udp.WriteTo([]byte(from.String()), from)
			continue
		}
		for end := time.Now().Add(demoTransfer); time.Now().Before(end); {
			_, _ = s.udp.WriteTo(zeros, from)
		}
	}
}

// dialFrom connects from a namespace: its socket is made there.
func dialFrom(ctx context.Context, ns *netnsutil.NS, network string, to netip.AddrPort) (c net.Conn, err error) {
	err = ns.Do(func() (err error) {
		c, err = (&net.Dialer{Timeout: demoTimeout}).DialContext(ctx, network, to.String())
		return err
	})
	return c, err
}

// measureTCP fetches from the web server at to, over one connection.
func measureTCP(ctx context.Context, from *netnsutil.NS, to netip.AddrPort) (r demoResult, err error) {
	conn, err := dialFrom(ctx, from, "tcp", to)
	if err != nil {
		return r, err
	}
	defer conn.Close()
	reader := bufio.NewReader(conn)
	get := func(path string) (io.ReadCloser, error) {
		if err := conn.SetDeadline(time.Now().Add(demoTimeout)); err != nil {
			return nil, err
		}
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+to.String()+path, nil)
		if err != nil {
			return nil, err
		}
		if err := req.Write(conn); err != nil {
			return nil, err
		}
		resp, err := http.ReadResponse(reader, req)
		if err != nil {
			return nil, err
		}
		return resp.Body, nil
	}
	r, err = roundTrips(conn, func() (string, error) {
		body, err := get("/whoami")
		if err != nil {
			return "", err
		}
		defer body.Close()
		seen, err := io.ReadAll(body)
		return string(seen), err
	})
	if err != nil {
		return r, err
	}
	body, err := get("/zeros")
	if err != nil {
		return r, err
	}
	r.rate, err = rateOf(body)
	return r, err
}

// measureUDP exchanges datagrams with the UDP server at to.
func measureUDP(ctx context.Context, from *netnsutil.NS, to netip.AddrPort) (r demoResult, err error) {
	conn, err := dialFrom(ctx, from, "udp", to)
	if err != nil {
		return r, err
	}
	defer conn.Close()
	buf := make([]byte, demoDatagram)
	if r, err = roundTrips(conn, func() (string, error) {
		n, err := askUDP(conn, "whoami", buf)
		return string(buf[:n]), err
	}); err != nil {
		return r, err
	}
	begin := time.Now()
	total, err := askUDP(conn, "zeros", buf)
	if err != nil {
		return r, err
	}
	// To the end, so that it is not in the way of the next client.
	last := time.Now()
	for {
		if err := conn.SetDeadline(time.Now().Add(demoSilence)); err != nil {
			return r, err
		}
		n, err := conn.Read(buf)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			break
		} else if err != nil {
			return r, err
		}
		last, total = time.Now(), total+n
	}
	r.rate = float64(total) * 8 / last.Sub(begin).Seconds()
	return r, nil
}

// askUDP sends a datagram and reads what comes. A datagram may get lost, so it is
// sent again after a while.
func askUDP(c net.Conn, question string, answer []byte) (n int, err error) {
	for end := time.Now().Add(demoTimeout); time.Now().Before(end); {
		if err := c.SetDeadline(time.Now().Add(demoSilence)); err != nil {
			return 0, err
		}
		if _, err = c.Write([]byte(question)); err != nil {
			return 0, err
		}
		if n, err = c.Read(answer); !errors.Is(err, os.ErrDeadlineExceeded) {
			return n, err
		}
	}
	return 0, err
}

// roundTrips asks the container over c, again and again, which address it sees.
func roundTrips(c net.Conn, ask func() (string, error)) (demoResult, error) {
	r := demoResult{}
	var err error
	if r.local, err = netip.ParseAddrPort(c.LocalAddr().String()); err != nil {
		return r, err
	}
	times := make([]time.Duration, demoRoundTrips)
	for i := range times {
		begin := time.Now()
		seen, err := ask()
		if err != nil {
			return r, err
		}
		times[i] = time.Since(begin)
		if r.saw, err = netip.ParseAddrPort(seen); err != nil {
			return r, fmt.Errorf("container answered %q: %w", seen, err)
		}
	}
	slices.Sort(times)
	r.roundTrip = times[len(times)/2]
	return r, nil
}

// rateOf reads from r for the time of a transfer, and returns the bits per
// second that came.
func rateOf(r io.Reader) (float64, error) {
	buf := make([]byte, 256<<10)
	total := 0
	begin := time.Now()
	for time.Since(begin) < demoTransfer-demoTransfer/10 {
		n, err := r.Read(buf)
		if err != nil {
			return 0, err
		}
		total += n
	}
	return float64(total) * 8 / time.Since(begin).Seconds(), nil
}
