package control

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"

	"github.com/gofwd/gofwd/forward"
)

// getMetrics answers in Prometheus' text format, version 0.0.4.
func (h *handler) getMetrics(w http.ResponseWriter, _ *http.Request) error {
	var b bytes.Buffer
	writeMetrics(&b, h.Forwarder.Status())
	w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
	_, _ = b.WriteTo(w)
	return nil
}

// metric is one number that each forward has.
type metric struct {
	name, kind, help string
	value            func(forward.Traffic) int64
}

var metrics = []metric{
	{"gofwd_flows_active", "gauge", "Open TCP connections and UDP flows.", func(t forward.Traffic) int64 { return t.Active }},
	{"gofwd_flows_total", "counter", "TCP connections and UDP flows there were.", func(t forward.Traffic) int64 { return t.Total }},
	{"gofwd_flows_refused_total", "counter", "Those refused by a limit of their forward, or for want of descriptors.", func(t forward.Traffic) int64 { return t.Refused }},
	{"gofwd_in_bytes_total", "counter", "Payload into the namespace.", func(t forward.Traffic) int64 { return t.BytesIn }},
	{"gofwd_out_bytes_total", "counter", "Payload out of the namespace.", func(t forward.Traffic) int64 { return t.BytesOut }},
}

func writeMetrics(w io.Writer, s forward.Status) {
	for _, m := range metrics {
		fmt.Fprintf(w, "# HELP %s %s\n# TYPE %s %s\n", m.name, m.help, m.name, m.kind)
		for _, f := range s.Rules {
			fmt.Fprintf(w, "%s{forward=%s,rule=%s,path=%s} %d\n", m.name,
				label(strconv.Itoa(f.ID)), label(f.Rule.String()), label(string(f.Path)), m.value(f.Traffic))
		}
		fmt.Fprintf(w, "%s{forward=\"\",rule=\"outbound\",path=\"\"} %d\n", m.name, m.value(s.Outbound))
	}
	for _, m := range []struct {
		name, kind, help string
		value            int64
	}{
		{"gofwd_forwards", "gauge", "Forwards that run.", int64(len(s.Rules))},
		{"gofwd_generation", "counter", "Changes of the forwards since the start.", int64(s.Generation)},
		{"gofwd_start_time_seconds", "gauge", "When it was started, in UNIX time.", s.Started.Unix()},
	} {
		fmt.Fprintf(w, "# HELP %s %s\n# TYPE %s %s\n%s %d\n", m.name, m.help, m.name, m.kind, m.name, m.value)
	}
}

// label quotes the value of a label: only these three characters are escaped.
func label(s string) string {
	return `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`, "\n", `\n`).Replace(s) + `"`
}
