package main

import (
	"math"
	"slices"

	"golang.org/x/perf/benchmath"
)

// interval is a median and its spread.
type interval struct {
	Mid, Lo, Hi float64
	N           int
}

// confidence is that of the spread. With the five rounds of a normal run it is
// the range from the least to the greatest sample: the median lies outside of
// it once in 16 times, whatever the distribution (sign test).
const confidence = 0.9

// summarize returns the median of values and its confidence interval from the
// order statistics. With fewer than five values there is none at the level of
// [confidence]; the spread is then their whole range, and [interval.compare]
// makes nothing of fewer than three.
func summarize(values []float64) interval {
	if len(values) == 0 {
		return interval{Mid: math.NaN(), Lo: math.NaN(), Hi: math.NaN()}
	}
	s := benchmath.NewSample(slices.Clone(values), &benchmath.DefaultThresholds)
	sum := benchmath.AssumeNothing.Summary(s, confidence)
	return interval{
		Mid: sum.Center,
		Lo:  max(sum.Lo, s.Values[0]),
		Hi:  min(sum.Hi, s.Values[len(values)-1]),
		N:   len(values),
	}
}

// verdict is the answer to "is a better than b?".
type verdict int

const (
	unknown verdict = iota // too few rounds
	same                   // the difference is smaller than the spread
	ahead
	behind
)

// compare reads an interval of ratios, in which more than 1 is better.
func (i interval) compare() verdict {
	switch {
	case i.N < 3:
		return unknown
	case i.Lo > 1:
		return ahead
	case i.Hi < 1:
		return behind
	}
	return same
}

// rounds returns the values of a tool in a row, by round.
func (r *Result) rounds(row, tool, unit string) map[int]float64 {
	out := map[int]float64{}
	for _, s := range r.Samples {
		if v, ok := s.Values[unit]; ok && s.Row == row && s.Tool == tool {
			out[s.Round] = v
		}
	}
	return out
}

// summary returns a tool's median in a row; ok is false where it has none.
func (r *Result) summary(row, tool, unit string) (_ interval, ok bool) {
	var values []float64
	for _, v := range r.rounds(row, tool, unit) {
		values = append(values, v)
	}
	return summarize(values), len(values) > 0
}

// ratio compares two tools pair by pair: the two samples of a round were taken
// one soon after the other, so what the machine did meanwhile cancels out. More
// than 1 says that a is better than b, in whichever direction the unit counts.
func (r *Result) ratio(row, a, b, unit string) (_ interval, ok bool) {
	as, bs := r.rounds(row, a, unit), r.rounds(row, b, unit)
	var ratios []float64
	for round, va := range as {
		vb, both := bs[round]
		if !both || va <= 0 || vb <= 0 {
			continue
		}
		if lowerIsBetter(unit) {
			va, vb = vb, va
		}
		ratios = append(ratios, va/vb)
	}
	return summarize(ratios), len(ratios) > 0
}
