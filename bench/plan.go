package main

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// row is a [Row] and how it is measured.
type row struct {
	Row
	bed   bed
	tools []string
	// way, proto and ip are what a tool must carry to take part.
	way   way
	proto string
	ip    int
	// quick rows are those of a quick run.
	quick   bool
	measure measurement
}

// takes says whether a tool takes part in the row.
func (r *row) takes(t tool) bool {
	return slices.Contains(r.tools, t.name()) && t.carries(r.way, r.proto, r.ip)
}

// about is how long a sample takes, in seconds, with its site.
func (r *row) about(seconds float64) float64 { return 0.1 + r.measure.about(seconds) }

// The groups, each a table, in the order in which they are shown.
const (
	groupTCP       = "tcp"       // TCP throughput
	groupLatency   = "latency"   // request and response
	groupConns     = "conns"     // new connections
	groupHTTP      = "http"      // nginx and wrk
	groupUDP       = "udp"       // datagrams
	groupTap       = "tap"       // TCP through a tap
	groupCC        = "cc"        // TCP throughput with the host's congestion control
	groupPublished = "published" // what the peers publish, by their commands
	groupLife      = "life"      // start, memory, idle connections
)

var groupTitles = map[string]string{
	groupTCP:       "TCP throughput",
	groupLatency:   "Latency: one byte there and back",
	groupConns:     "New connections: connect, one byte there and back, close",
	groupHTTP:      "HTTP: nginx, 1 KiB, asked by wrk on 64 connections",
	groupUDP:       "UDP",
	groupTap:       "TCP through the tap, by its MTU",
	groupCC:        "TCP throughput, the host's own congestion control",
	groupPublished: "What the peers publish, by their own commands",
	groupLife:      "Start, memory, idle connections",
}

// groupPrefixes tell rows of several groups apart in one table.
var groupPrefixes = map[string]string{
	groupLatency: "latency: ", groupConns: "new connections: ", groupHTTP: "HTTP: ", groupUDP: "UDP: ",
	groupTap: "tap: ", groupCC: "host's congestion control: ",
}

var groups = []string{
	groupTCP, groupLatency, groupConns, groupHTTP, groupUDP, groupTap, groupCC, groupPublished, groupLife,
}

// The columns of the ordinary rows, and of those that compare taps.
var (
	columns    = []string{toolNative, toolKernel, toolTap, toolPasta, toolSlirp, toolKit, toolKitNo, toolProxyd}
	tapColumns = []string{toolNative, toolTap, toolTap64K, toolPasta, toolPasta15, toolSlirp, toolFdbased}
	lifeRows   = []string{toolKernel, toolTap, toolPasta, toolSlirp, toolKit, toolProxyd}
)

// The beds. Congestion control is set, since it decides about more than the
// tool does: reno is in every kernel and every namespace may have it.
var (
	reno    = bed{name: "cc=reno", sysctls: []sysctl{{"net/ipv4/tcp_congestion_control", "reno"}}}
	asFound = bed{name: "cc=default"}
	// pipesHeld is a user one of whose programs, such as an idle pasta, holds
	// all memory of pipes that a user may have.
	pipesHeld = bed{
		name: "cc=reno/pipes=held", note: "the user's pipes are used up", sysctls: reno.sysctls, pipesHeld: true,
	}
	// pastaTuned is what passt's own tests set in the container before
	// they measure (test/perf/pasta_tcp).
	pastaTuned = bed{name: "cc=default/sysctl=pasta", note: "with pasta's sysctls", container: []sysctl{
		{"net/ipv4/tcp_rmem", "131072 524288 134217728"},
		{"net/ipv4/tcp_wmem", "131072 524288 134217728"},
		{"net/ipv4/tcp_timestamps", "0"},
	}}
)

// wayTitle names where bytes or requests of a client's load go.
func wayTitle(w way, load string) string {
	ends := map[way][2]string{
		remote:       {"remote client", "container"},
		loopback:     {"host loopback", "container"},
		outside:      {"container", "outside"},
		hostLoopback: {"container loopback", "host loopback"},
	}[w]
	switch load {
	case "download":
		return ends[1] + " → " + ends[0] + ", a download"
	case "both":
		return ends[0] + " ⇄ " + ends[1]
	}
	return ends[0] + " → " + ends[1]
}

func plural(n int, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	return fmt.Sprintf("%d %ss", n, noun)
}

// plan returns all rows in the order in which they run.
func plan() []row {
	rows := slices.Concat(
		throughput(), latency(), conns(), http(), udp(), tapRows(), hostCC(), published(), lifeAndMemory(),
	)
	for i := range rows {
		r := &rows[i]
		r.Command = r.measure.command
		if r.way.inbound() && r.Group != groupLife {
			r.Source = sourceKey(r.proto, r.ip, r.way)
		}
	}
	return rows
}

// stream is a row of TCP throughput.
func stream(group string, b bed, tools []string, w way, load string, ip, streams int) row {
	return row{
		Row: Row{
			Name:  fmt.Sprintf("TCP/way=%s/load=%s/ip=%d/streams=%d/%s", w, load, ip, streams, b.name),
			Group: group, Units: []string{unitGbps, unitHelperPerGB},
			Title: b.noted(fmt.Sprintf("%s, IPv%d, %s", wayTitle(w, load), ip, plural(streams, "stream"))),
		},
		bed: b, tools: tools, way: w, proto: "tcp", ip: ip,
		measure: iperf(w, ip, load, streams, "-l", strconv.Itoa(writeSize)),
	}
}

// writeSize is how much iperf3 writes at a time: a little less than its 128 KiB.
// Those are whole pages, and after the one byte of its protocol that comes first the
// kernel copies each from an address that ends in 000 to one that ends in 001. That
// is what AMD's "rep movsb" is several times slower at (glibc's bug 30994). Over the
// loopback of a helper it lasts for the whole transfer, since the kernel's buffers
// are whole pages too; native, it ends with the first odd segment. It is the sender's
// time, whichever helper there is, and would be all that the rows show. One row
// has iperf3's own size.
const writeSize = 131_000

func throughput() []row {
	quick := map[string]bool{
		"TCP/way=remote/load=upload/ip=4/streams=1/cc=reno":   true,
		"TCP/way=remote/load=download/ip=4/streams=1/cc=reno": true,
		"TCP/way=loopback/load=upload/ip=4/streams=1/cc=reno": true,
		"TCP/way=outside/load=upload/ip=4/streams=1/cc=reno":  true,
	}
	var rows []row
	add := func(w way, load string, ip int, streams ...int) {
		for _, n := range streams {
			r := stream(groupTCP, reno, columns, w, load, ip, n)
			r.quick = quick[r.Name]
			rows = append(rows, r)
		}
	}
	for _, ip := range []int{4, 6} {
		add(remote, "upload", ip, 1, 8)
		add(remote, "download", ip, 1, 8)
		add(loopback, "upload", ip, 1)
		add(loopback, "download", ip, 1)
		add(outside, "upload", ip, 1, 8)
		add(outside, "download", ip, 1, 8)
	}
	add(remote, "upload", 4, 32)
	add(remote, "both", 4, 1)
	add(outside, "upload", 4, 32)
	add(outside, "both", 4, 1)
	add(hostLoopback, "upload", 4, 1)
	add(hostLoopback, "download", 4, 1)
	own := stream(groupTCP, reno, columns, remote, "download", 4, 1)
	own.Name += "/writes=128K"
	own.Title += ", iperf3's own writes"
	own.measure = iperf(remote, 4, "download", 1)
	return append(rows, own,
		stream(groupTCP, pipesHeld, columns, remote, "upload", 4, 1),
		stream(groupTCP, pipesHeld, columns, remote, "upload", 4, 8),
		stream(groupTCP, pipesHeld, columns, remote, "download", 4, 1),
	)
}

// forWays makes a row for each of the ways by which requests go.
func forWays(make func(w way, ip int) row) []row {
	var rows []row
	for _, w := range []way{remote, loopback, outside} {
		for _, ip := range []int{4, 6} {
			if w == loopback && ip == 6 {
				continue
			}
			r := make(w, ip)
			r.bed, r.tools, r.way, r.ip = reno, columns, w, ip
			rows = append(rows, r)
		}
	}
	return rows
}

func latency() []row {
	return forWays(func(w way, ip int) row {
		return row{
			Row: Row{
				Name:  fmt.Sprintf("TCPRR/way=%s/ip=%d", w, ip),
				Group: groupLatency, Units: []string{unitP50, unitP99, unitP999},
				Title: fmt.Sprintf("%s, IPv%d", wayTitle(w, ""), ip),
			},
			proto: "tcp", quick: w == remote && ip == 4,
			measure: ours("tcprr", w, ip),
		}
	})
}

// crrFlows is how many connections are under way at a time.
const crrFlows = 8

func conns() []row {
	return forWays(func(w way, ip int) row {
		return row{
			Row: Row{
				Name:  fmt.Sprintf("TCPCRR/way=%s/ip=%d/flows=%d", w, ip, crrFlows),
				Group: groupConns, Units: []string{unitConns, unitHelperPerOp, unitFailed},
				Title: fmt.Sprintf("%s, IPv%d", wayTitle(w, ""), ip),
			},
			proto: "tcp", quick: w == remote && ip == 4,
			measure: ours("crr", w, ip, crrFlows),
		}
	})
}

func http() []row {
	var rows []row
	for _, ip := range []int{4, 6} {
		rows = append(rows, row{
			Row: Row{
				Name:  fmt.Sprintf("HTTP/way=%s/ip=%d/conns=%d", remote, ip, connections),
				Group: groupHTTP, Units: []string{unitReqs, unitP99},
				Title: fmt.Sprintf("%s, IPv%d", wayTitle(remote, ""), ip),
			},
			bed: reno, tools: columns, way: remote, proto: "tcp", ip: ip,
			measure: web(remote, ip),
		})
	}
	return rows
}

func udp() []row {
	var rows []row
	for _, w := range []way{remote, outside} {
		for _, ip := range []int{4, 6} {
			add := func(name, title string, quick bool, m measurement, units ...string) {
				rows = append(rows, row{
					Row: Row{
						Name:  fmt.Sprintf("%s/way=%s/ip=%d", name, w, ip),
						Group: groupUDP, Units: units,
						Title: fmt.Sprintf("%s, IPv%d, %s", wayTitle(w, ""), ip, title),
					},
					bed: reno, tools: columns, way: w, proto: "udp", ip: ip, quick: quick && ip == 4 && w == remote,
					measure: m,
				})
			}
			// 1452 is what fits into an IPv6 packet of 1500 bytes.
			full := 1472 - 20*family(ip)
			for _, size := range []int{64, 512, full} {
				add(fmt.Sprintf("UDP/size=%d", size), plural(size, "byte"), size == 64,
					ours("udp", w, ip, size), unitPPS, unitBlastPPS)
			}
			segments := 65507 / full
			add(fmt.Sprintf("UDPGSO/size=%d", full), fmt.Sprintf("%d bytes, UDP_SEGMENT", full), false,
				ours("udp", w, ip, full, segments), unitGbps)
			add("QUIC", "QUIC by quic-go, one stream", false, ours("quic", w, ip), unitGbps, unitHelperPerGB)
			add("UDPRR", "latency", false, ours("udprr", w, ip), unitP50, unitP99)
		}
	}
	return rows
}

func tapRows() []row {
	var rows []row
	for _, w := range []way{remote, outside} {
		for _, n := range []int{1, 8} {
			for _, load := range []string{"upload", "download"} {
				r := stream(groupTap, reno, tapColumns, w, load, 4, n)
				r.Name = "Tap" + r.Name
				rows = append(rows, r)
			}
		}
	}
	return rows
}

func hostCC() []row {
	var rows []row
	for _, w := range []way{remote, outside} {
		for _, load := range []string{"upload", "download"} {
			for _, n := range []int{1, 8} {
				rows = append(rows, stream(groupCC, asFound, columns, w, load, 4, n))
			}
		}
	}
	return append(rows, stream(groupCC, asFound, columns, loopback, "upload", 4, 1))
}

// published are rows that the peers publish, by the commands that they give.
func published() []row {
	var rows []row
	for _, b := range []bed{asFound, pastaTuned} {
		add := func(who, title string, w way, streams int, extra ...string) {
			r := stream(groupPublished, b, columns, w, "upload", 4, streams)
			r.Name = strings.Replace(r.Name, "TCP", "Published/by="+who, 1)
			r.Title = b.noted(who + ": " + title)
			r.measure = iperf(w, 4, "upload", streams, extra...)
			rows = append(rows, r)
		}
		// passt, test/perf/pasta_tcp; its -O0.1 needs an iperf3 that
		// omits fractions of a second.
		add("pasta", "host to ns, splice", loopback, 4, "-Z", "-w", "4M", "-l", "1M")
		add("pasta", "ns to host, splice", hostLoopback, 4, "-Z", "-w", "4M", "-l", "1M")
		add("pasta", "host to ns, tap", remote, 2, "-Z", "-w", "1M")
		add("pasta", "ns to host, tap", outside, 2, "-Z", "-w", "1M")
		// RootlessKit, docs/port.md and docs/network.md.
		add("rootlesskit", "parent to child", loopback, 1)
		add("rootlesskit", "child to host", outside, 1)
	}
	return rows
}

func lifeAndMemory() []row {
	base := row{bed: reno, tools: lifeRows, way: remote, proto: "tcp", ip: 4}
	start := base
	start.Row = Row{Name: "Start", Group: groupLife, Units: []string{unitStart, unitRSS, unitAdd}, Title: "start; one more port"}
	start.measure = life()
	start.quick = true
	// The ports are rules of one port each, but for pasta, which takes no more
	// than 255 rules and gets a range.
	many := base
	many.tools = []string{toolKernel, toolTap, toolPasta, toolSlirp, toolKit}
	many.bed.name, many.bed.ports = "cc=reno/ports=2000", 2000
	many.Row = Row{
		Name: "Ports/count=2000", Group: groupLife, Units: start.Units,
		Title: "the same with 2,000 published ports",
	}
	many.measure = life()
	rows := []row{start, many}
	for _, n := range []int{1000, 10000} {
		r := base
		r.Row = Row{
			Name: fmt.Sprintf("Idle/conns=%d", n), Group: groupLife,
			Units: []string{unitRSS, unitHelperCPU, unitHeld},
			Title: fmt.Sprintf("%d idle connections", n),
		}
		r.measure = idle(n)
		rows = append(rows, r)
	}
	burst := base
	burst.way, burst.proto = outside, "udp"
	burst.Row = Row{
		Name: "OneShotFlows/way=outside/flows=50000", Group: groupLife, Units: []string{unitRSS, unitAnswered},
		Title: "after 50,000 UDP flows of one datagram each way, container → outside",
	}
	burst.measure = flows(outside, 50_000)
	return append(rows, burst)
}
