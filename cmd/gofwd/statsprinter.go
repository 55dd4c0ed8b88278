package main

import (
	"io"
	"os"
	"time"

	"github.com/gofwd/gofwd/forward"
)

// statsPrinter prints what the forwards moved, as gofwd status --watch does, for
// pasta's --stats.
type statsPrinter struct {
	forwarder *forward.Forwarder
	every     time.Duration
	to        io.Writer

	stop, done chan struct{}
}

// startStats starts to print to standard error; nil is for never.
func startStats(every time.Duration, f *forward.Forwarder) *statsPrinter {
	if every <= 0 {
		return nil
	}
	p := &statsPrinter{forwarder: f, every: every, to: os.Stderr, stop: make(chan struct{}), done: make(chan struct{})}
	go p.run()
	return p
}

// run prints whenever something has moved, until close.
func (p *statsPrinter) run() {
	defer close(p.done)
	tick := time.NewTicker(p.every)
	defer tick.Stop()
	v := &watcher{}
	var last int64
	for {
		select {
		case <-p.stop:
			return
		case now := <-tick.C:
			s := p.forwarder.Status()
			moved := activity(s)
			if moved != last {
				v.print(p.to, []instanceStatus{{Name: "pasta", Status: s}}, now)
			}
			last = moved
		}
	}
}

// activity is a number that changes with whatever happens.
func activity(s forward.Status) int64 {
	sum := s.Outbound.Total + s.Outbound.Refused + s.Outbound.BytesIn + s.Outbound.BytesOut
	for _, r := range s.Rules {
		sum += r.Total + r.Refused + r.BytesIn + r.BytesOut
	}
	return sum
}

// close stops it, once.
func (p *statsPrinter) close() {
	if p == nil {
		return
	}
	close(p.stop)
	<-p.done
}
