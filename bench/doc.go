// Command bench measures gofwd beside its peers, in one run and on one machine.
// Every performance figure of the project comes from it.
//
//	go run ./bench                                  everything
//	go run ./bench -quick                           a first impression, under two minutes
//	go run ./bench -only tcp,UDP/size=64 -tools native,gofwd-tap,pasta
//	go run ./bench -list                            what there is, and about how long it takes
//	go run ./bench -compare OLD.json NEW.json       exits with 1 on a regression
//
// It needs neither root nor a set-up: it starts itself once more as root of a
// user namespace, and measures there. A tool that is not installed is left out,
// with the reason. What it can use: Debian's iperf3, wrk, nginx-light, slirp4netns,
// systemd and uidmap, and pasta and RootlessKit as "make bench-peers" fetches them.
//
// # The lab
//
// Each sample has a site of its own, three network namespaces that are made the
// same way for all (topology_linux.go):
//
//	client ── veth ── host ─ the tool ─ container
//
// The tool publishes the same ports everywhere and is started as its users start
// it (tool_*.go: one file each). The native rows are the same loads with the
// server on the host itself. Nothing but the congestion control and the range
// of ephemeral ports differs from the system's defaults, unless the row says so.
//
// No other tool runs meanwhile, since even one that has nothing to do may hold what
// a user has only once: an idle pasta takes the memory of pipes up to
// pipe-user-pages-soft (proc(5)), and the next one that splices gets pipes of
// two pages. That case is measured too, in rows of its own: the user's pipes
// are used up.
//
// # Loads
//
// TCP throughput is iperf3(1) with writes that are not whole pages (writeSize says
// why; what the peers publish is measured by their own commands), HTTP is nginx under wrk(1). Latency, connection
// rate, datagrams, QUIC and idle connections are a generator of our own
// (load_linux.go, serve_linux.go, quic_linux.go), which is the same for all tools.
// What it can do at most is the native column; a tool that reaches that may be
// faster still.
//
//   - Latency: one byte there and back on one connection, again and again.
//   - New connections: eight at a time connect, exchange one byte and close, the
//     client first. A connection that failed is counted as failed.
//   - UDP: the highest rate that arrives with less than 1 % loss, found by
//     bisection; and what is delivered while the sender sends all that it can.
//   - QUIC: quic-go at both ends, one stream; the sender bundles datagrams
//     (UDP_SEGMENT). Encryption takes most of the time at both ends.
//   - Idle connections: each has carried one byte. Memory is the resident set
//     of the tool's processes; kernel memory is not in it. RootlessKit's
//     includes the 1.5 MB of the sleep(1) that it must run.
//   - One-shot flows: 50,000 ports ask one datagram each, as a burst of DNS
//     queries does; then memory is read. An answer after 20 ms is lost.
//   - Start: from exec to the first byte that is answered through the tool,
//     by connecting again every half millisecond. RootlessKit makes its
//     container itself, so that its start includes that, and the server's.
//   - Ports: the same, until the last of 2,000 published ports is answered.
//
// The clients have the first half of the processors, the servers the other half,
// and the tools may use all of them. With two processors that is one for
// each end and none to spare, as on a small virtual machine.
//
// The processor time of a helper is that of all its processes, from their CPU
// clocks (clock_getcpuclockid(3)), while the load ran. What the kernel does on its behalf in
// softirqs is charged to whoever was running, so it is a lower bound.
//
// # Rounds
//
// A machine that others use as well is never quiet. So a round takes one sample
// of every tool in a row before it goes to the next row, and every round begins
// with another tool. What is shown is the median of all rounds, with the range
// in which the true median lies with 90 % confidence by the order statistics
// (nothing is assumed of the distribution; five rounds: from least to
// greatest). Two tools are compared by the ratio within each round, since what
// the machine did meanwhile has hit both. Where the range of these ratios
// includes 1, the verdict is "no difference".
//
// # Proofs
//
// The server in the container is asked for the client's address as it sees it,
// for TCP and UDP and both families; a value behind which the address is
// hidden is marked with a dagger. The counters of the container's interface are
// read before and after each throughput sample: on the kernel path it carries
// none of the payload.
package main
