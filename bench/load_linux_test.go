package main

import (
	"net"
	"os"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// udpServer is the server half on loopback.
func udpServer(t *testing.T, gro bool) string {
	conn, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	require.NoError(t, err)
	require.NoError(t, tuneUDP(conn, gro))
	errc := make(chan error, 1)
	go serveUDP(conn, errc)
	t.Cleanup(func() {
		conn.Close()
		require.ErrorIs(t, <-errc, net.ErrClosed)
	})
	return conn.LocalAddr().String()
}

func tcpServer(t *testing.T) string {
	l, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	require.NoError(t, err)
	errc := make(chan error, 1)
	go serveTCP(l, errc)
	t.Cleanup(func() {
		l.Close()
		require.ErrorIs(t, <-errc, net.ErrClosed)
	})
	return l.Addr().String()
}

// What arrives is counted exactly, and a rate is kept.
func TestFloodCounts(t *testing.T) {
	conn, err := net.Dial("udp", udpServer(t, false))
	require.NoError(t, err)
	defer conn.Close()
	f := &flood{conn: conn.(*net.UDPConn), size: 64, segments: 1}
	sent, err := f.send(42, 2000, 100*time.Millisecond)
	require.NoError(t, err)
	require.Positive(t, sent)
	require.LessOrEqual(t, sent, 200, "the rate is not exceeded")
	bytes, elapsed, err := f.count(42)
	require.NoError(t, err)
	require.Equal(t, uint64(sent*64), bytes)
	require.Positive(t, elapsed)
	bytes, _, err = f.count(43)
	require.NoError(t, err)
	require.Zero(t, bytes, "another run is counted apart")
}

// UDP_SEGMENT out and UDP_GRO in: the datagrams are the same ones.
func TestFloodSegments(t *testing.T) {
	conn, err := net.Dial("udp", udpServer(t, true))
	require.NoError(t, err)
	defer conn.Close()
	f := &flood{conn: conn.(*net.UDPConn), size: 1000, segments: 40}
	require.NoError(t, control(f.conn, func(fd int) error {
		return unix.SetsockoptInt(fd, unix.IPPROTO_UDP, unix.UDP_SEGMENT, f.size)
	}))
	sent, err := f.send(7, 4000, 50*time.Millisecond)
	require.NoError(t, err)
	require.Zero(t, sent%40)
	bytes, _, err := f.count(7)
	require.NoError(t, err)
	require.Equal(t, uint64(sent*1000), bytes)
}

func TestLoads(t *testing.T) {
	tcp, udp := tcpServer(t), udpServer(t, false)
	const d = 50 * time.Millisecond
	for _, tc := range []struct {
		name  string
		run   func() (map[string]float64, error)
		units []string
	}{
		{"tcprr", func() (map[string]float64, error) { return requestResponse("tcp", tcp, d) }, []string{unitRate, unitP50, unitP99, unitP999}},
		{"udprr", func() (map[string]float64, error) { return requestResponse("udp", udp, d) }, []string{unitRate, unitP50, unitP99, unitP999}},
		{"crr", func() (map[string]float64, error) { return connectRequestResponse(tcp, d, 4) }, []string{unitConns, unitP50}},
		{"flows", func() (map[string]float64, error) { return oneShotFlows(udp, 20) }, []string{unitAnswered}},
		{"udp", func() (map[string]float64, error) { return floodUDP(udp, d, 512, 1) }, []string{unitBlastPPS}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			values, err := tc.run()
			require.NoError(t, err)
			for _, u := range tc.units {
				require.Positive(t, values[u], u)
			}
		})
	}
}

func TestTrialIsGood(t *testing.T) {
	require.True(t, trialResult{sent: 1000, delivered: 995, loss: 0.005}.good())
	require.False(t, trialResult{sent: 1000, delivered: 980, loss: 0.02}.good())
	require.False(t, trialResult{sent: 1000, delivered: 800}.good(), "nothing is lost, but the queue grows")
}

func TestCRRReportsRefusal(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	l.Close()
	_, err = connectRequestResponse(l.Addr().String(), time.Millisecond, 1)
	require.ErrorIs(t, err, unix.ECONNREFUSED)
}

func TestPercentiles(t *testing.T) {
	times := make([]time.Duration, 1000)
	for i := range times {
		times[999-i] = time.Duration(i+1) * time.Microsecond
	}
	require.Equal(t, map[string]float64{unitP50: 501, unitP99: 991, unitP999: 1000}, percentiles(times))
	require.Empty(t, percentiles(nil))
}

func TestSplitCPUs(t *testing.T) {
	set := func(cpus ...int) (s unix.CPUSet) {
		for _, c := range cpus {
			s.Set(c)
		}
		return s
	}
	client, server := splitCPUs(set(0, 1))
	require.Equal(t, [2]unix.CPUSet{set(0), set(1)}, [2]unix.CPUSet{client, server})
	client, server = splitCPUs(set(2, 5, 70))
	require.Equal(t, [2]unix.CPUSet{set(2), set(5, 70)}, [2]unix.CPUSet{client, server})
	client, server = splitCPUs(set(3))
	require.Equal(t, client, server)
}

func TestParseStat(t *testing.T) {
	fields, err := parseStat([]byte("12 (a ) b) (c) S 1 12 12 0 -1 4194560 100 0 0 0 7 8 0 0 20 0 1 0 99 1000 25 18446744073709551615 1\n"))
	require.NoError(t, err)
	require.Equal(t, "1", fields[statPPID])
	require.Equal(t, "25", fields[statRSS])
	_, err = parseStat([]byte("12 (x) S 1"))
	require.Error(t, err)
}

// The CPU clock of another process may be read, and counts in less than the ticks
// of /proc/PID/stat (clock_getcpuclockid(3)).
func TestCPUTime(t *testing.T) {
	mine, err := cpuTime(os.Getpid())
	require.NoError(t, err)
	require.Positive(t, mine%(10*time.Millisecond), "whole ticks")
	_, err = cpuTime(os.Getppid())
	require.NoError(t, err)
	_, err = cpuTime(1 << 22) // PID_MAX_LIMIT, proc(5): none has it
	require.ErrorIs(t, err, unix.ESRCH)
}

// A process that burns time and memory is seen, also as a grandchild.
func TestUsageOf(t *testing.T) {
	before, err := usageOf([]int{os.Getpid()})
	require.NoError(t, err)
	ballast := make([]byte, 64<<20)
	for i := 0; i < len(ballast); i += 4096 {
		ballast[i] = 1
	}
	for began := time.Now(); time.Since(began) < 60*time.Millisecond; {
		ballast[0]++
	}
	after, err := usageOf([]int{os.Getppid()})
	require.NoError(t, err)
	require.Greater(t, after.cpu-before.cpu, 20*time.Millisecond)
	require.Greater(t, after.rss, int64(60<<20))
}

func TestParseIperf(t *testing.T) {
	got, err := parseIperf([]byte(`{"end":{"sum_received":{"bytes":1000,"bits_per_second":8e9},"sum_received_bidir_reverse":{"bytes":500,"bits_per_second":4e9}}}`))
	require.NoError(t, err)
	require.Equal(t, outcome{values: map[string]float64{unitGbps: 12}, bytes: 1500}, got)
	require.Equal(t, "unable to connect", iperfError([]byte(`{"error":"unable to connect"}`)))
	require.Empty(t, iperfError(nil))
}

func TestParseWrk(t *testing.T) {
	const out = `Running 1s test @ http://127.0.0.1:5203/
  Latency Distribution
     50%  341.00us
     99%    1.59ms
  25734 requests in 1.10s, 31.02MB read
Requests/sec:  23394.21
`
	got, err := parseWrk(out)
	require.NoError(t, err)
	require.Equal(t, outcome{values: map[string]float64{unitReqs: 23394.21, unitP99: 1590}, ops: 25734}, got)
	_, err = parseWrk(out + "  Socket errors: connect 0, read 3, write 0, timeout 0\n")
	require.ErrorContains(t, err, "read 3")
	_, err = parseWrk("unable to connect")
	require.Error(t, err)
}
