package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"slices"
	"time"
)

// Result is one run: what it ran on, with which tools, and every single sample.
// Everything that is shown is computed from it.
type Result struct {
	Machine Machine    `json:"machine"`
	Tools   []ToolInfo `json:"tools"`
	Rows    []Row      `json:"rows"`
	Samples []Sample   `json:"samples"`
}

// Machine is what a reader needs to judge the numbers.
type Machine struct {
	Date   time.Time `json:"date"`
	Kernel string    `json:"kernel"`
	CPU    string    `json:"cpu"`
	Cores  int       `json:"cores"`
	// User is "root" or "an ordinary user": who started the run. The tools
	// run in a user namespace in either case.
	User string `json:"user"`
	// Gofwd is the commit that was measured.
	Gofwd string `json:"gofwd"`
	// DefaultCC is the host's congestion control.
	DefaultCC string `json:"default_cc"`
	// Sysctls are those that decide about throughput, as found.
	Sysctls map[string]string `json:"sysctls"`
	// MaxFiles is the hard limit of open files that the tools got.
	MaxFiles uint64 `json:"max_files"`
	// Rounds were asked for; a row may have fewer, see [Result.fewestRounds].
	Rounds  int     `json:"rounds"`
	Seconds float64 `json:"seconds"`
}

// ToolInfo is a tool as it was found and started.
type ToolInfo struct {
	Name    string `json:"name"`
	Version string `json:"version,omitempty"`
	// Missing says why the tool took no part.
	Missing string `json:"missing,omitempty"`
	// Argv are the commands that were started, one for each process.
	Argv [][]string `json:"argv,omitempty"`
	// MTU is that of the container's interface, 0 where it has none.
	MTU int `json:"mtu,omitempty"`
	// Source is the client's address as the server in the container saw
	// it, by [sourceKey]: "kept", or the address that it saw instead.
	Source map[string]string `json:"source,omitempty"`
}

// kept is the entry of ToolInfo.Source for an address that came through.
const kept = "kept"

// sourceKey is the key of ToolInfo.Source, e.g. "tcp4 remote".
func sourceKey(proto string, ip int, w way) string { return fmt.Sprintf("%s%d %s", proto, ip, w) }

// Row is one question, which every tool answers once a round.
type Row struct {
	// Name is that of a Go benchmark, without the tool:
	// TCP/way=remote/load=upload/ip=4/streams=1/cc=reno.
	Name string `json:"name"`
	// Group is the table in which the row is shown.
	Group string `json:"group"`
	Title string `json:"title"`
	// Units are those that are shown; tools are judged by the first.
	Units []string `json:"units"`
	// Source is the [sourceKey] of the row, "" where there is no client.
	Source string `json:"source,omitempty"`
	// Command is the load that was run.
	Command string `json:"command,omitempty"`
}

// Sample is what one tool answered in one round.
type Sample struct {
	Row    string             `json:"row"`
	Tool   string             `json:"tool"`
	Round  int                `json:"round"`
	Values map[string]float64 `json:"values,omitempty"` // by unit
	Err    string             `json:"error,omitempty"`
}

// lowerIsBetter tells the units in which less is better from the others.
func lowerIsBetter(unit string) bool {
	switch unit {
	case unitP50, unitP99, unitP999, unitHelperPerGB, unitHelperPerOp, unitHelperCPU,
		unitRSS, unitStart, unitAdd, unitFailed, unitLoss, unitTapShare:
		return true
	}
	return false
}

// The units. Those that start with "helper" are the processor time of the
// tool's own processes.
const (
	unitGbps        = "Gb/s"
	unitPPS         = "pkt/s"       // at less than 1 % loss
	unitBlastPPS    = "blast-pkt/s" // delivered while the sender sends what it can
	unitRate        = "trans/s"     // request and response on an open connection
	unitConns       = "conn/s"      // connect, request, response, close
	unitReqs        = "req/s"
	unitP50         = "p50-µs"
	unitP99         = "p99-µs"
	unitP999        = "p99.9-µs"
	unitHelperPerGB = "helper-s/GB"
	unitHelperPerOp = "helper-µs/op"
	unitHelperCPU   = "helper-%"  // of one core
	unitTapShare    = "tap-%"     // bytes on the container's interface, of the payload
	unitRSS         = "MB-RSS"    // resident memory of the tool's processes
	unitHeld        = "conn-held" // idle connections that were held open
	unitAnswered    = "answered"  // UDP flows that got their answer
	unitStart       = "ms-start"  // from exec to the first byte answered
	unitAdd         = "ms-add"    // from the command to the first byte answered
	unitFailed      = "failed"
	unitLoss        = "loss-%"
)

// loadResult reads a result as [Result.save] wrote it.
func loadResult(path string) (*Result, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("read result: %w", err)
	}
	r := new(Result)
	if err := json.Unmarshal(data, r); err != nil {
		return nil, fmt.Errorf("read result %s: %w", path, err)
	}
	return r, nil
}

// add adds the rows of another result that r lacks, and their samples.
func (r *Result) add(other *Result) error {
	if r.Machine.Gofwd != other.Machine.Gofwd || r.Machine.Kernel != other.Machine.Kernel {
		return fmt.Errorf("add rows: they are of gofwd %s on Linux %s, and these of %s on %s",
			other.Machine.Gofwd, other.Machine.Kernel, r.Machine.Gofwd, r.Machine.Kernel)
	}
	have := make(map[string]bool)
	for _, row := range r.Rows {
		have[row.Name] = true
	}
	rows := make(map[string]Row)
	for _, row := range append(slices.Clone(r.Rows), other.Rows...) {
		if _, ok := rows[row.Name]; !ok {
			rows[row.Name] = row
		}
	}
	r.Rows = nil
	for _, p := range plan() { // the order in which they are shown
		if row, ok := rows[p.Name]; ok {
			r.Rows = append(r.Rows, row)
		}
	}
	for _, s := range other.Samples {
		if !have[s.Row] {
			r.Samples = append(r.Samples, s)
		}
	}
	for _, t := range other.Tools {
		if r.tool(t.Name) == nil {
			r.addTool(t)
		}
	}
	r.Machine.Rounds = max(r.Machine.Rounds, other.Machine.Rounds)
	r.Machine.Seconds = min(r.Machine.Seconds, other.Machine.Seconds)
	return nil
}

// fewestRounds returns how many samples the row has that has the fewest, of the tool
// that has the most there.
func (r *Result) fewestRounds() int {
	rounds := make(map[string]int)
	for _, s := range r.Samples {
		rounds[s.Row] = max(rounds[s.Row], s.Round+1)
	}
	if len(rounds) == 0 {
		return 0
	}
	return slices.Min(slices.Collect(maps.Values(rounds)))
}

// json returns the result as a file with one tool, row or sample a line, so that
// two of them can be told apart by diff.
func (r *Result) json() ([]byte, error) {
	var b bytes.Buffer
	machine, err := json.MarshalIndent(r.Machine, "", " ")
	if err != nil {
		return nil, err
	}
	fmt.Fprintf(&b, "{\"machine\": %s", machine)
	if err := writeLines(&b, "tools", r.Tools); err != nil {
		return nil, err
	}
	if err := writeLines(&b, "rows", r.Rows); err != nil {
		return nil, err
	}
	if err := writeLines(&b, "samples", r.Samples); err != nil {
		return nil, err
	}
	b.WriteString("\n}\n")
	return b.Bytes(), nil
}

// writeLines writes a member of an object whose value is an array.
func writeLines[T any](b *bytes.Buffer, name string, values []T) error {
	fmt.Fprintf(b, ",\n%q: [", name)
	for i, v := range values {
		if i > 0 {
			b.WriteByte(',')
		}
		line, err := json.Marshal(v)
		if err != nil {
			return err
		}
		b.WriteByte('\n')
		b.Write(line)
	}
	b.WriteByte(']')
	return nil
}

// tool returns the description of a tool by name; it is nil for one that was
// not asked for.
func (r *Result) tool(name string) *ToolInfo {
	for i := range r.Tools {
		if r.Tools[i].Name == name {
			return &r.Tools[i]
		}
	}
	return nil
}
