package main

import (
	"cmp"
	"fmt"
	"io"
	"time"

	"github.com/schollz/progressbar/v3"
)

// workload is how much a run has to do.
type workload struct {
	Rounds  int `json:"rounds"`
	Tools   int `json:"tools"`
	Rows    int `json:"rows"`
	Samples int `json:"samples"`
	// Seconds is about how long that takes.
	Seconds float64 `json:"about_seconds"`
}

// newWorkload returns what a run of these rows and tools has to do.
func newWorkload(rows []row, tools []tool, rounds int, seconds float64) workload {
	w := workload{Rounds: rounds, Tools: len(tools)}
	for i := range rows {
		samples := 0
		for _, t := range tools {
			if rows[i].takes(t) {
				samples += rounds
			}
		}
		if samples > 0 {
			w.Rows++
		}
		w.Samples += samples
		w.Seconds += float64(samples) * rows[i].about(seconds)
	}
	return w
}

// String is for the first line of a run.
func (w workload) String() string {
	return fmt.Sprintf("%s, %s, %s, %s: about %s", plural(w.Rows, "row"), plural(w.Tools, "tool"),
		plural(w.Rounds, "round"), plural(w.Samples, "sample"), roughly(time.Duration(w.Seconds*float64(time.Second))))
}

// progress shows how far a run is: on a terminal by a bar, elsewhere by a line
// now and then.
type progress struct {
	out     io.Writer
	bar     *progressbar.ProgressBar // nil where out is no terminal
	lengths map[string]float64       // of a sample, by row; in seconds

	total    workload
	rows     int     // done, each once a round
	seconds  float64 // of the total's, done
	last     *Sample
	began    time.Time
	reported time.Time
}

// progressPause is the least time between two lines.
const progressPause = 10 * time.Second

func newProgress(out io.Writer, terminal bool, o *options) *progress {
	p := &progress{out: out, lengths: make(map[string]float64)}
	for _, r := range o.rows() {
		p.lengths[r.Name] = r.about(o.seconds)
	}
	if terminal {
		p.bar = progressbar.NewOptions(1, progressbar.OptionSetWriter(out), progressbar.OptionShowCount(),
			progressbar.OptionSetPredictTime(false), progressbar.OptionClearOnFinish())
	}
	return p
}

// begin is called when it is known what there is to do.
func (p *progress) begin(total workload) {
	p.total, p.began = total, time.Now()
	p.reported = p.began
	fmt.Fprintf(p.out, "bench: %s\n", total)
	if p.bar != nil {
		p.bar.ChangeMax(total.Samples)
	}
}

// add is called after each sample.
func (p *progress) add(s *Sample) {
	p.seconds += p.lengths[s.Row]
	if p.last != nil && (s.Row != p.last.Row || s.Round != p.last.Round) {
		p.rows++
		p.report()
	}
	p.last = s
	if p.bar != nil {
		p.bar.Describe(fmt.Sprintf("about %s left  round %d  %s  %s", roughly(p.left()), s.Round+1, s.Row, s.Tool))
		_ = p.bar.Add(1)
	}
}

// report prints a line, unless the last one is not long ago.
func (p *progress) report() {
	now := time.Now()
	if p.bar != nil || now.Sub(p.reported) < progressPause {
		return
	}
	p.reported = now
	fmt.Fprintf(p.out, "bench: round %d of %d, %d of %s done in %s, about %s left\n", p.last.Round+1, p.total.Rounds,
		p.rows, plural(p.total.Rows*p.total.Rounds, "row"), roughly(now.Sub(p.began)), roughly(p.left()))
}

// left is how long the rest takes if it is as much slower or faster than expected
// as what is done.
func (p *progress) left() time.Duration {
	passed := time.Since(p.began)
	return time.Duration(float64(passed) * (p.total.Seconds/cmp.Or(p.seconds, p.total.Seconds) - 1))
}

// end is called after the last sample.
func (p *progress) end() {
	if p.bar != nil {
		_ = p.bar.Finish()
	} else if p.last != nil {
		fmt.Fprintf(p.out, "bench: measured for %s\n", roughly(time.Since(p.began)))
	}
}

// roughly writes a time with the precision that an estimate has.
func roughly(d time.Duration) string {
	switch {
	case d < 100*time.Second:
		return fmt.Sprintf("%d s", int(d.Round(time.Second).Seconds()))
	case d < 100*time.Minute:
		return fmt.Sprintf("%d min", int(d.Round(time.Minute).Minutes()))
	}
	d = d.Round(time.Minute)
	return fmt.Sprintf("%d h %d min", d/time.Hour, d%time.Hour/time.Minute)
}
