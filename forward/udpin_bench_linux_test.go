package forward

import (
	"fmt"
	"net/netip"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/gofwd/gofwd/netnsutil"
)

// BenchmarkUDPInbound compares the two ways of inbound UDP: the tap, and a socket in
// the namespace for each flow, which attach --inbound-only takes, see
// inboundNS.listenUDP. A lot of datagrams
// goes in, and when all have arrived the next one; each client sends as many of them.
// Processor time is that of the whole process, client and server included, for a
// datagram.
//
//	go test ./forward -run - -bench UDPInbound -count 10 | benchstat -col /path -
func BenchmarkUDPInbound(b *testing.B) {
	for _, tt := range []struct {
		size, lot, clients int
		segment            bool
	}{
		{64, 1, 1, false},
		{64, 32, 1, false},
		{64, 32, 32, false},
		{1200, 32, 1, false},
		{1200, 32, 1, true}, // as QUIC sends
	} {
		for _, path := range []string{"tap", "kernel"} {
			name := fmt.Sprintf("size=%d/lot=%d/clients=%d/gso=%v/path=%s", tt.size, tt.lot, tt.clients, tt.segment, path)
			b.Run(name, func(b *testing.B) { benchUDPInbound(b, path == "kernel", tt.size, tt.lot, tt.clients, tt.segment) })
		}
	}
}

func benchUDPInbound(b *testing.B, kernel bool, size, lot, clients int, segment bool) {
	ns := newNS(b)
	if kernel {
		joinBridge(b, ns, "10.89.0.2", "fd00:89::2")
	}
	f, err := Start(b.Context(), Config{NetNS: ns, InboundOnly: kernel, NoTCP: !kernel, Rules: []Rule{
		{Proto: UDP, TargetPorts: PortRange{53, 53}},
	}})
	require.NoError(b, err)
	defer f.Close()
	server := udpBenchSocket(b, ns)
	require.NoError(b, unix.Bind(server, &unix.SockaddrInet4{Port: 53}))
	var fds []int
	for range clients {
		fd := udpBenchSocket(b, nil)
		require.NoError(b, unix.Connect(fd, toSockaddr(netip.AddrPortFrom(loopbackOf(true), f.Status().Rules[0].Bound[0].Port()))))
		if segment {
			require.NoError(b, unix.SetsockoptInt(fd, unix.SOL_UDP, unix.UDP_SEGMENT, size))
		}
		fds = append(fds, fd)
	}
	arrived := make(chan struct{}, 1)
	var received, awaited atomic.Int64
	var wg sync.WaitGroup
	wg.Go(func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		buf := make([]byte, 2048)
		for {
			if n, err := unix.Read(server, buf); err != nil || n != size {
				return
			}
			if received.Add(1) == awaited.Load() {
				arrived <- struct{}{}
			}
		}
	})
	payload := make([]byte, size)
	if segment {
		payload = make([]byte, size*lot)
	}
	sent, lost := 0, int64(0)
	send := func() {
		awaited.Store(received.Load() + int64(lot))
		for n := 0; n < lot; n += len(payload) / size {
			_, err := unix.Write(fds[sent%clients], payload)
			require.NoError(b, err)
			sent++
		}
		select {
		case <-arrived:
		case <-time.After(time.Second):
			// Loopback's queue is one with that of every other namespace
			// (net.core.netdev_max_backlog), and drops what does not fit.
			lost += awaited.Load() - received.Load()
		}
	}
	for range clients { // makes the flows
		send()
	}
	cpu, ops := cpuNow(), 0
	for b.Loop() {
		send()
		ops++
	}
	b.ReportMetric(float64(cpuNow()-cpu)/float64(ops*lot), "cpu-ns/datagram")
	b.ReportMetric(float64(lost)/float64(ops*lot), "lost/datagram")
	_ = unix.Shutdown(server, unix.SHUT_RDWR)
	wg.Wait()
}

// udpBenchSocket makes a blocking socket in ns, nil for the test's own.
func udpBenchSocket(b *testing.B, ns *netnsutil.NS) (fd int) {
	open := func() (err error) {
		fd, err = unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		return err
	}
	if ns == nil {
		require.NoError(b, open())
	} else {
		require.NoError(b, ns.Do(open))
	}
	b.Cleanup(func() { unix.Close(fd) })
	return fd
}
