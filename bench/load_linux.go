package main

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/net/ipv4"
	"golang.org/x/sys/unix"
)

// load is the load generator, a process of its own so that it can be pinned:
//
//	load KIND ADDR:PORT SECONDS [FLOWS | SIZE [SEGMENTS]]
//
// It prints the values that it measured as JSON. [serve] is at the other end.
func load(args []string) error {
	raiseFileLimit()
	if len(args) < 3 {
		return errors.New("load: too few arguments")
	}
	kind, addr := args[0], args[1]
	seconds, err := strconv.ParseFloat(args[2], 64)
	if err != nil {
		return fmt.Errorf("parse seconds: %w", err)
	}
	numbers := make([]int, 2)
	for i, arg := range args[3:] {
		if numbers[i], err = strconv.Atoi(arg); err != nil {
			return fmt.Errorf("parse argument: %w", err)
		}
	}
	d := time.Duration(seconds * float64(time.Second))
	var values map[string]float64
	switch kind {
	case "tcprr", "udprr":
		values, err = requestResponse(kind[:3], addr, d)
	case "crr":
		values, err = connectRequestResponse(addr, d, numbers[0])
	case "udp":
		values, err = floodUDP(addr, d, numbers[0], max(1, numbers[1]))
	case "quic":
		values, err = uploadQUIC(addr, d)
	case "flows":
		values, err = oneShotFlows(addr, numbers[0])
	case "idle":
		return holdIdle(addr, numbers[0])
	default:
		err = fmt.Errorf("load: unknown kind %q", kind)
	}
	if err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(values)
}

// requestResponse sends one byte and waits for it to come back, on one
// connection or UDP flow, as neper's tcp_rr and netperf's TCP_RR do.
func requestResponse(network, addr string, d time.Duration) (map[string]float64, error) {
	conn, err := net.Dial(network, addr)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	var times []time.Duration
	lost := 0
	buf := []byte{askEcho}
	began := time.Now()
	for now := began; now.Sub(began) < d; {
		if err := conn.SetReadDeadline(now.Add(time.Second)); err != nil {
			return nil, err
		}
		if _, err := conn.Write(buf); err != nil {
			return nil, err
		}
		_, err := conn.Read(buf)
		after := time.Now()
		switch {
		case err == nil:
			times = append(times, after.Sub(now))
		case network == "udp" && errors.Is(err, os.ErrDeadlineExceeded):
			lost++
		default:
			return nil, err
		}
		now = after
	}
	values := percentiles(times)
	values[unitRate] = float64(len(times)) / time.Since(began).Seconds()
	if network == "udp" {
		values[unitLoss] = 100 * float64(lost) / float64(lost+len(times))
	}
	return values, nil
}

func percentiles(times []time.Duration) map[string]float64 {
	values := map[string]float64{}
	if len(times) == 0 {
		return values
	}
	slices.Sort(times)
	for unit, p := range map[string]float64{unitP50: 0.5, unitP99: 0.99, unitP999: 0.999} {
		values[unit] = float64(times[int(p*float64(len(times)))].Nanoseconds()) / 1e3
	}
	return values
}

// connectRequestResponse opens a connection for each request, from flows
// goroutines at a time, as neper's tcp_crr and netperf's TCP_CRR do. The client
// closes first.
func connectRequestResponse(addr string, d time.Duration, flows int) (map[string]float64, error) {
	var failed atomic.Int64
	var first atomic.Pointer[error]
	times := make([][]time.Duration, flows)
	var wg sync.WaitGroup
	began := time.Now()
	for i := range flows {
		wg.Go(func() {
			for time.Since(began) < d {
				start := time.Now()
				if err := exchange(addr); err != nil {
					failed.Add(1)
					first.CompareAndSwap(nil, &err)
					continue
				}
				times[i] = append(times[i], time.Since(start))
			}
		})
	}
	wg.Wait()
	all := slices.Concat(times...)
	if len(all) == 0 {
		return nil, fmt.Errorf("no connection succeeded: %w", *first.Load())
	}
	values := percentiles(all)
	values[unitConns] = float64(len(all)) / time.Since(began).Seconds()
	values[unitFailed] = float64(failed.Load())
	return values, nil
}

// exchange is one connection with one request and its answer.
func exchange(addr string) error {
	dialer := net.Dialer{Timeout: 5 * time.Second, KeepAlive: -1}
	conn, err := dialer.Dial("tcp", addr)
	if err != nil {
		return err
	}
	defer conn.Close()
	return echo(conn)
}

// echo sends one byte and waits for it to come back, for at most five seconds.
func echo(conn net.Conn) error {
	if err := conn.SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
		return err
	}
	buf := []byte{askEcho}
	if _, err := conn.Write(buf); err != nil {
		return err
	}
	_, err := io.ReadFull(conn, buf)
	return err
}

// holdIdle opens n connections, each of which has carried one byte each way,
// says how many there are, and holds them until standard input ends.
func holdIdle(addr string, n int) error {
	conns := make([]net.Conn, n)
	var next, held atomic.Int64
	var wg sync.WaitGroup
	for range 32 {
		wg.Go(func() {
			for i := next.Add(1) - 1; i < int64(n); i = next.Add(1) - 1 {
				conn, err := net.DialTimeout("tcp", addr, 5*time.Second)
				if err != nil {
					continue
				}
				conns[i] = conn
				if echo(conn) == nil {
					held.Add(1)
				}
			}
		})
	}
	wg.Wait()
	fmt.Printf("held %d\n", held.Load())
	_, err := io.Copy(io.Discard, os.Stdin)
	return err
}

// oneShotFlows asks one question each from n ports, as a burst of DNS queries
// does, and counts the answers.
func oneShotFlows(addr string, n int) (map[string]float64, error) {
	var next, answered atomic.Int64
	var wg sync.WaitGroup
	for range 64 {
		wg.Go(func() {
			for next.Add(1) <= int64(n) {
				if askOnce(addr) == nil {
					answered.Add(1)
				}
			}
		})
	}
	wg.Wait()
	return map[string]float64{unitAnswered: float64(answered.Load())}, nil
}

// askOnce is one UDP flow with one datagram each way. An answer that takes longer
// than 20 ms counts as lost.
func askOnce(addr string) error {
	conn, err := net.Dial("udp", addr)
	if err != nil {
		return err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(20 * time.Millisecond)); err != nil {
		return err
	}
	buf := []byte{askEcho}
	if _, err := conn.Write(buf); err != nil {
		return err
	}
	_, err = conn.Read(buf)
	return err
}

// flood sends datagrams of one size to the sink of a load server.
type flood struct {
	conn *net.UDPConn
	size int // of a datagram
	// segments is how many datagrams go in one message: more than 1 is
	// UDP_SEGMENT, the kernel cuts them apart.
	segments int
}

// floodUDP finds the packet rate that arrives with less than 1 % loss, in
// trials of a tenth of d each: first everything that the sender can send, then
// by bisection between that and a 64th of it, on a logarithmic scale, to 2 %.
func floodUDP(addr string, d time.Duration, size, segments int) (map[string]float64, error) {
	c, err := net.Dial("udp", addr)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	f := &flood{conn: c.(*net.UDPConn), size: size, segments: segments}
	if segments > 1 {
		err := control(f.conn, func(fd int) error {
			return os.NewSyscallError("setsockopt UDP_SEGMENT", unix.SetsockoptInt(fd, unix.IPPROTO_UDP, unix.UDP_SEGMENT, size))
		})
		if err != nil {
			return nil, err
		}
	}
	trial := max(d/10, 50*time.Millisecond)
	blast, err := f.trial(math.Inf(1), trial)
	if err != nil {
		return nil, err
	}
	values := map[string]float64{unitBlastPPS: blast.delivered, unitLoss: 100 * blast.loss}
	if blast.good() {
		values[unitPPS] = blast.delivered
	} else if values[unitPPS], err = f.search(blast.sent, trial); err != nil {
		return nil, err
	}
	values[unitGbps] = values[unitPPS] * float64(size) * 8 / 1e9
	return values, nil
}

// search returns the highest rate below most that is good; 0 where none is.
func (f *flood) search(most float64, d time.Duration) (best float64, _ error) {
	lo, hi := math.Log(most/64), math.Log(most)
	for range 8 {
		mid := (lo + hi) / 2
		got, err := f.trial(math.Exp(mid), d)
		if err != nil {
			return 0, err
		}
		if got.good() {
			best, lo = max(best, got.delivered), mid
		} else {
			hi = mid
		}
	}
	return best, nil
}

// trialResult are packets a second as the two ends saw them, and the share that
// was lost.
type trialResult struct{ sent, delivered, loss float64 }

// good says that the receiver kept up: it got 99 % of the packets, and not much
// later than they were sent, as it would from a queue that fills.
func (t trialResult) good() bool { return t.loss < 0.01 && t.delivered > 0.95*t.sent }

// trial sends at a rate for some time and asks how much arrived.
func (f *flood) trial(rate float64, d time.Duration) (trialResult, error) {
	run := rand.Uint64()
	began := time.Now()
	sent, err := f.send(run, rate, d)
	took := time.Since(began)
	if err != nil {
		return trialResult{}, err
	}
	time.Sleep(20 * time.Millisecond) // let the queues on the way drain
	bytes, elapsed, err := f.count(run)
	if err != nil {
		return trialResult{}, err
	}
	arrived := float64(bytes) / float64(f.size)
	return trialResult{
		sent:      float64(sent) / took.Seconds(),
		delivered: arrived / max(took, elapsed).Seconds(),
		loss:      max(0, 1-arrived/float64(sent)),
	}, nil
}

// send sends datagrams in batches: as many at a time as are due.
func (f *flood) send(run uint64, rate float64, d time.Duration) (sent int, _ error) {
	payload := make([]byte, f.size*f.segments)
	for i := 0; i < len(payload); i += f.size {
		payload[i] = askSink
		binary.BigEndian.PutUint64(payload[i+1:], run)
	}
	msgs := make([]ipv4.Message, udpBatch)
	for i := range msgs {
		msgs[i].Buffers = [][]byte{payload}
	}
	pc := ipv4.NewPacketConn(f.conn) // sendmmsg(2) is the same for both families
	began := time.Now()
	for elapsed := time.Nanosecond; elapsed < d; elapsed = time.Since(began) {
		due := min(rate*elapsed.Seconds()-float64(sent), 1e6) / float64(f.segments)
		if due < 1 {
			_ = unix.Nanosleep(&unix.Timespec{Nsec: 20_000}, nil)
			continue
		}
		n, err := pc.WriteBatch(msgs[:min(udpBatch, int(due))], 0)
		// A full queue is loss like any other; a refusal is an error, but
		// one that belongs to an earlier datagram.
		if err != nil && !errors.Is(err, unix.ENOBUFS) {
			return 0, err
		}
		sent += n * f.segments
	}
	return sent, nil
}

// count asks the server what has arrived, until it answers: question and answer
// may be lost, or wait behind what was sent before.
func (f *flood) count(run uint64) (bytes uint64, elapsed time.Duration, _ error) {
	ask := binary.BigEndian.AppendUint64([]byte{askCount}, run)
	buf := make([]byte, 64)
	for range 100 {
		if _, err := f.conn.Write(ask); err != nil {
			return 0, 0, err
		}
		if err := f.conn.SetReadDeadline(time.Now().Add(100 * time.Millisecond)); err != nil {
			return 0, 0, err
		}
		n, err := f.conn.Read(buf)
		if err == nil && n == sinkHeader+16 && binary.BigEndian.Uint64(buf[1:]) == run {
			elapsed := binary.BigEndian.Uint64(buf[sinkHeader+8:])
			return binary.BigEndian.Uint64(buf[sinkHeader:]), time.Duration(elapsed), nil
		}
	}
	return 0, 0, errors.New("the UDP server does not answer")
}

// parseHeld reads what holdIdle prints.
func parseHeld(out string) (int, error) {
	return strconv.Atoi(strings.TrimSpace(strings.TrimPrefix(out, "held")))
}
