package main

import (
	"context"
	"encoding/json"
	"fmt"
	"math"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"
)

// self is the path under which a child finds this program: it is read between
// fork and exec, when the child is still this program.
const self = "/proc/self/exe"

// measurement is a load with its command line for people.
type measurement struct {
	command string
	run     func(ctx context.Context, s *site, seconds float64) (outcome, error)
	// about is how long that takes, in seconds; a tool that is slow or stuck
	// takes longer.
	about func(seconds float64) float64
}

// outcome is what a load measured, and how much it moved: the cost of the tool's
// processes is divided by that.
type outcome struct {
	values map[string]float64
	bytes  float64 // payload
	ops    float64 // transactions, connections, packets
}

// take runs a measurement, and adds the costs that the load cannot see: the
// processor time of the tool, and the bytes on the container's interface.
func (m measurement) take(ctx context.Context, s *site, seconds float64) (map[string]float64, error) {
	before, err := s.usage()
	if err != nil {
		return nil, err
	}
	tapBefore, _, err := s.container.tapBytes()
	if err != nil {
		return nil, err
	}
	got, err := m.run(ctx, s, seconds)
	if err != nil {
		return nil, err
	}
	after, err := s.usage()
	if err != nil {
		return nil, err
	}
	tapAfter, _, err := s.container.tapBytes()
	if err != nil {
		return nil, err
	}
	if s.tool.name() == toolNative {
		return got.values, nil // there is neither a helper nor a container
	}
	cpu := after.cpu - before.cpu
	if got.bytes > 0 {
		got.values[unitHelperPerGB] = cpu.Seconds() / (got.bytes / 1e9)
		got.values[unitTapShare] = 100 * float64(tapAfter-tapBefore) / got.bytes
	}
	if got.ops > 0 {
		got.values[unitHelperPerOp] = float64(cpu.Microseconds()) / got.ops
	}
	return got.values, nil
}

// client runs a load on the clients' processors and returns what it printed.
func (s *site) runClient(ctx context.Context, n *namespace, seconds float64, argv ...string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Duration(seconds*float64(time.Second))+20*time.Second)
	defer cancel()
	p, err := s.lab.launcher.start(command{ns: n, cpus: s.lab.launcher.client, argv: argv})
	if err != nil {
		return nil, err
	}
	defer p.stdin.Close()
	return p.output(ctx)
}

// iperf moves bytes with iperf3(1). load is what the client does: upload,
// download or both; extra are further options of the client.
func iperf(w way, ip int, load string, streams int, extra ...string) measurement {
	args := append([]string{"-P", strconv.Itoa(streams)}, extra...)
	switch load {
	case "download":
		args = append(args, "--reverse")
	case "both":
		args = append(args, "--bidir")
	}
	return measurement{
		command: "iperf3 -c ADDR -t SECONDS " + strings.Join(args, " "),
		about:   ceilSeconds,
		run: func(ctx context.Context, s *site, seconds float64) (outcome, error) {
			e := s.ends(w, ip)
			port := strconv.Itoa(choosePort(w, portIperf, portOutIperf))
			server, err := s.lab.launcher.start(command{
				ns: e.at, cpus: s.lab.launcher.server,
				argv: []string{"iperf3", "--server", "--one-off", "--forceflush", "-p", port},
			})
			if err != nil {
				return outcome{}, err
			}
			defer server.stop()
			if err := server.awaitOutput(ctx, "listening"); err != nil {
				return outcome{}, err
			}
			// iperf3 counts whole seconds. Much less is for trying out: some
			// megabytes say nothing of a rate.
			amount := []string{"-t", wholeSeconds(seconds)}
			if seconds < 0.1 {
				amount = []string{"-n", "8M"}
			}
			argv := append([]string{"iperf3", "--json", "-c", e.to.String(), "-p", port}, amount...)
			out, err := s.runClient(ctx, e.from, seconds, append(argv, args...)...)
			if msg := iperfError(out); msg != "" {
				return outcome{}, fmt.Errorf("iperf3: %s", msg)
			}
			if err != nil {
				return outcome{}, err
			}
			return parseIperf(out)
		},
	}
}

func choosePort(w way, in, out int) int {
	if w == hostLoopback {
		return out
	}
	return in
}

func ceilSeconds(seconds float64) float64 { return max(1, math.Ceil(seconds)) }

func wholeSeconds(seconds float64) string { return strconv.Itoa(int(ceilSeconds(seconds))) }

// iperfError returns the error in the JSON output of iperf3, "" where none is.
func iperfError(out []byte) string {
	var report struct {
		Error string `json:"error"`
	}
	if json.Unmarshal(out, &report) != nil {
		return ""
	}
	return report.Error
}

// parseIperf takes what the receivers counted.
func parseIperf(out []byte) (outcome, error) {
	type sum struct {
		Bytes float64 `json:"bytes"`
		Bits  float64 `json:"bits_per_second"`
	}
	var report struct {
		End struct {
			Received sum `json:"sum_received"`
			Reverse  sum `json:"sum_received_bidir_reverse"`
		} `json:"end"`
	}
	if err := json.Unmarshal(out, &report); err != nil {
		return outcome{}, fmt.Errorf("read report of iperf3: %w", err)
	}
	end := report.End
	return outcome{
		values: map[string]float64{unitGbps: (end.Received.Bits + end.Reverse.Bits) / 1e9},
		bytes:  end.Received.Bytes + end.Reverse.Bytes,
	}, nil
}

// ours is a load of [load], described there.
func ours(kind string, w way, ip int, args ...int) measurement {
	texts := make([]string, len(args))
	for i, a := range args {
		texts[i] = strconv.Itoa(a)
	}
	return measurement{
		command: strings.TrimSpace("bench load " + kind + " ADDR:PORT SECONDS " + strings.Join(texts, " ")),
		about:   func(seconds float64) float64 { return seconds },
		run: func(ctx context.Context, s *site, seconds float64) (outcome, error) {
			e := s.ends(w, ip)
			port := choosePort(w, portLoad, portOutLoad)
			if kind == "udp" && len(args) > 1 {
				port = portGRO
			}
			if kind == "quic" {
				port = portQUIC
			}
			argv := []string{self, "load", kind, netip.AddrPortFrom(e.to, uint16(port)).String(), fmt.Sprint(seconds)}
			out, err := s.runClient(ctx, e.from, seconds, append(argv, texts...)...)
			if err != nil {
				return outcome{}, err
			}
			got := outcome{values: map[string]float64{}}
			if err := json.Unmarshal(out, &got.values); err != nil {
				return outcome{}, fmt.Errorf("read report of the load generator: %w", err)
			}
			if kind == "quic" {
				got.bytes = got.values[unitGbps] / 8 * 1e9 * seconds
			}
			got.ops = (got.values[unitRate] + got.values[unitConns]) * seconds
			return got, nil
		},
	}
}

// connections is how many wrk(1) keeps open.
const connections = 64

// web asks nginx for a file of 1 KiB with wrk(1), on connections that stay open.
func web(w way, ip int) measurement {
	return measurement{
		command: fmt.Sprintf("wrk -t 1 -c %d -d SECONDS --latency http://ADDR/", connections),
		about:   ceilSeconds,
		run: func(ctx context.Context, s *site, seconds float64) (outcome, error) {
			if err := s.startWeb(ctx); err != nil {
				return outcome{}, err
			}
			e := s.ends(w, ip)
			url := "http://" + netip.AddrPortFrom(e.to, portHTTP).String() + "/"
			out, err := s.runClient(ctx, e.from, seconds, "wrk", "-t", "1", "-c", strconv.Itoa(connections),
				"-d", wholeSeconds(seconds), "--latency", url)
			if err != nil {
				return outcome{}, err
			}
			return parseWrk(string(out))
		},
	}
}

var (
	wrkRate   = regexp.MustCompile(`Requests/sec:\s+([0-9.]+)`)
	wrkP99    = regexp.MustCompile(`99%\s+([0-9.]+)(us|ms|s)\b`)
	wrkTotal  = regexp.MustCompile(`(\d+) requests in`)
	wrkErrors = regexp.MustCompile(`Socket errors: .*|Non-2xx.*`)
)

func parseWrk(out string) (outcome, error) {
	rate, p99, total := wrkRate.FindStringSubmatch(out), wrkP99.FindStringSubmatch(out), wrkTotal.FindStringSubmatch(out)
	if rate == nil || p99 == nil || total == nil {
		return outcome{}, fmt.Errorf("read report of wrk: %q", out)
	}
	if bad := wrkErrors.FindString(out); bad != "" {
		return outcome{}, fmt.Errorf("wrk: %s", bad)
	}
	number := func(s string) float64 { f, _ := strconv.ParseFloat(s, 64); return f }
	micros := map[string]float64{"us": 1, "ms": 1e3, "s": 1e6}[p99[2]]
	return outcome{
		values: map[string]float64{unitReqs: number(rate[1]), unitP99: number(p99[1]) * micros},
		ops:    number(total[1]),
	}, nil
}

const nginxConf = `
user root;
worker_processes 1;
daemon off;
error_log stderr crit;
pid %[1]s/pid;
events { worker_connections 4096; }
http {
  access_log off;
  keepalive_requests 1000000000;
  client_body_temp_path %[1]s/body;
  proxy_temp_path %[1]s/proxy;
  fastcgi_temp_path %[1]s/fastcgi;
  uwsgi_temp_path %[1]s/uwsgi;
  scgi_temp_path %[1]s/scgi;
  server { listen [::]:%[2]d ipv6only=off; root %[1]s; }
}
`

// startWeb starts nginx in the container.
func (s *site) startWeb(ctx context.Context) error {
	nginx, err := lookPath("NGINX", "nginx")
	if err != nil {
		return err
	}
	dir := filepath.Join("/run", s.host.name+"-nginx")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, "index.html"), make([]byte, 1024), 0o644); err != nil {
		return err
	}
	conf := filepath.Join(dir, "nginx.conf")
	if err := os.WriteFile(conf, fmt.Appendf(nil, nginxConf, dir, portHTTP), 0o644); err != nil {
		return err
	}
	p, err := s.lab.launcher.start(command{
		ns: s.container, cpus: s.lab.launcher.server, argv: []string{nginx, "-e", "stderr", "-c", conf},
	})
	if err != nil {
		return err
	}
	s.servers = append(s.servers, p)
	to := netip.AddrPortFrom(loopbacks[0], portHTTP)
	for ctx.Err() == nil {
		if _, err := s.container.ask("tcp4", to, "GET / HTTP/1.0\r\n\r\n"); err == nil {
			return nil
		}
		if err := p.ended(); err != nil {
			return err
		}
		time.Sleep(2 * time.Millisecond)
	}
	return ctx.Err()
}

// settle is how long a tool is left alone before its memory is read.
const settle = 300 * time.Millisecond

// idle holds n connections open and looks at what that costs the tool.
func idle(n int) measurement {
	return measurement{
		command: fmt.Sprintf("bench load idle ADDR:PORT SECONDS %d", n),
		about:   func(seconds float64) float64 { return settle.Seconds() + seconds + float64(n)/1000 },
		run: func(ctx context.Context, s *site, seconds float64) (outcome, error) {
			e := s.ends(remote, 4)
			to := netip.AddrPortFrom(e.to, portLoad).String()
			p, err := s.lab.launcher.start(command{
				ns: e.from, cpus: s.lab.launcher.client,
				argv: []string{self, "load", "idle", to, "0", strconv.Itoa(n)},
			})
			if err != nil {
				return outcome{}, err
			}
			defer p.stop()
			ctx, cancel := context.WithTimeout(ctx, time.Minute)
			defer cancel()
			line, err := p.awaitLine(ctx)
			if err != nil {
				return outcome{}, err
			}
			held, err := parseHeld(line)
			if err != nil {
				return outcome{}, err
			}
			got := outcome{values: map[string]float64{unitHeld: float64(held)}}
			if held < n*95/100 {
				return got, nil // its memory is that of fewer connections
			}
			time.Sleep(settle)
			before, err := s.usage()
			if err != nil {
				return outcome{}, err
			}
			time.Sleep(time.Duration(seconds * float64(time.Second)))
			after, err := s.usage()
			if err != nil {
				return outcome{}, err
			}
			got.values[unitRSS] = float64(after.rss) / 1e6
			got.values[unitHelperCPU] = 100 * (after.cpu - before.cpu).Seconds() / seconds
			return got, nil
		},
	}
}

// flows makes n UDP flows of one datagram each way, and looks at what is kept of
// them.
func flows(w way, n int) measurement {
	m := ours("flows", w, 4, n)
	m.about = func(float64) float64 { return settle.Seconds() + float64(n)/10_000 }
	load := m.run
	m.run = func(ctx context.Context, s *site, seconds float64) (outcome, error) {
		got, err := load(ctx, s, seconds)
		if err != nil {
			return outcome{}, err
		}
		time.Sleep(settle)
		u, err := s.usage()
		got.values[unitRSS] = float64(u.rss) / 1e6
		return got, err
	}
	return m
}

// life looks at a tool that has just been started for this sample: how long
// that took, how large it is, and how long it takes to publish one more port.
func life() measurement {
	return measurement{
		command: "connect until the server in the container answers",
		about:   func(float64) float64 { return settle.Seconds() + 0.1 },
		run: func(ctx context.Context, s *site, seconds float64) (outcome, error) {
			values := map[string]float64{unitStart: float64(s.ready.Microseconds()) / 1e3}
			time.Sleep(settle)
			u, err := s.usage()
			if err != nil {
				return outcome{}, err
			}
			values[unitRSS] = float64(u.rss) / 1e6
			if adder, ok := s.tool.(portAdder); ok {
				began := time.Now()
				if err := adder.addPort(ctx, s, portSpare); err != nil {
					return outcome{}, err
				}
				if err := s.awaitAnswer(ctx, portSpare); err != nil {
					return outcome{}, err
				}
				values[unitAdd] = float64(time.Since(began).Microseconds()) / 1e3
			}
			return outcome{values: values}, nil
		},
	}
}
