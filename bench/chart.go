package main

import (
	"bytes"
	"fmt"
	"image/color"
	"strconv"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/text"
	"gonum.org/v1/plot/vg"
	_ "gonum.org/v1/plot/vg/vgsvg" // the output format
)

// chart is one question and the row that answers it.
type chart struct {
	name, title, row, unit string
}

// charts are the questions that the README shows.
var charts = []chart{
	{"tcp-in", "A remote client uploads to the container", "TCP/way=remote/load=upload/ip=4/streams=1/cc=reno", unitGbps},
	{"tcp-download", "A remote client downloads from the container", "TCP/way=remote/load=download/ip=4/streams=1/cc=reno", unitGbps},
	{"tcp-out", "The container uploads to the outside", "TCP/way=outside/load=upload/ip=4/streams=1/cc=reno", unitGbps},
	{"tcp-cpu", "Processor time of the helper for a download", "TCP/way=remote/load=download/ip=4/streams=1/cc=reno", unitHelperPerGB},
	{"tcp-tap", "TCP through the tap, remote client", "TapTCP/way=remote/load=upload/ip=4/streams=1/cc=reno", unitGbps},
	{"latency", "Request and response on an open connection, median", "TCPRR/way=remote/ip=4", unitP50},
	{"conns", "New connections", "TCPCRR/way=remote/ip=4/flows=8", unitConns},
	{"http", "HTTP requests to nginx", "HTTP/way=remote/ip=4/conns=64", unitReqs},
	{"udp", "UDP, 64 bytes, less than 1 % loss", "UDP/size=64/way=remote/ip=4", unitPPS},
	{"start", "Start: exec to the first byte answered", "Start", unitStart},
	{"memory", "Memory at 10,000 idle connections", "Idle/conns=10000", unitRSS},
}

// chartFile is a chart that was drawn.
type chartFile struct {
	name, title string
	svg         []byte
}

// drawCharts draws the charts for which the result has rows.
func (r *Result) drawCharts() ([]chartFile, error) {
	var out []chartFile
	for _, c := range charts {
		var bars []bar
		for _, t := range r.Tools {
			if got, ok := r.summary(c.row, t.Name, c.unit); ok {
				bars = append(bars, bar{t.Name, got})
			}
		}
		if len(bars) == 0 {
			continue
		}
		better := "more is better"
		if lowerIsBetter(c.unit) {
			better = "less is better"
		}
		svg, err := drawBars(c.title, c.unit+", "+better, bars)
		if err != nil {
			return nil, fmt.Errorf("draw chart %s: %w", c.name, err)
		}
		out = append(out, chartFile{c.name + ".svg", c.title, svg})
	}
	return out, nil
}

// bar is one tool's value.
type bar struct {
	label string
	value interval
}

// The colours of gofwd, of the reference columns, and of the peers.
var (
	blue  = color.RGBA{0x1f, 0x6f, 0xb4, 0xff}
	pale  = color.RGBA{0xd5, 0xd5, 0xd5, 0xff}
	grey  = color.RGBA{0x8c, 0x8c, 0x8c, 0xff}
	black = color.RGBA{0x20, 0x20, 0x20, 0xff}
)

func colorOf(tool string) color.Color {
	switch {
	case isSubject(tool):
		return blue
	case isPeer(tool):
		return grey
	}
	return pale
}

// drawBars draws horizontal bars, the first one on top, each with its spread
// and its median in figures.
func drawBars(title, axis string, bars []bar) ([]byte, error) {
	p := plot.New()
	p.Title.Text = title
	p.Title.Padding = vg.Points(8)
	p.X.Label.Text = axis
	p.X.Label.Padding = vg.Points(4)
	p.X.Min = 0
	p.X.Tick.Marker = plot.TickerFunc(plainTicks)
	for _, style := range []*text.Style{&p.Title.TextStyle, &p.X.Label.TextStyle, &p.X.Tick.Label, &p.Y.Tick.Label} {
		style.Font.Variant = "Sans"
	}
	names := make([]string, len(bars))
	points := spread{}
	labels := plotter.XYLabels{}
	for i, b := range bars {
		at := len(bars) - 1 - i
		names[at] = b.label
		chart, err := plotter.NewBarChart(plotter.Values{b.value.Mid}, vg.Points(14))
		if err != nil {
			return nil, err
		}
		chart.Horizontal = true
		chart.XMin = float64(at)
		chart.Color = colorOf(b.label)
		chart.LineStyle.Width = 0
		p.Add(chart)
		points.XYs = append(points.XYs, plotter.XY{X: b.value.Mid, Y: float64(at)})
		points.XErrors = append(points.XErrors, struct{ Low, High float64 }{b.value.Mid - b.value.Lo, b.value.Hi - b.value.Mid})
		labels.XYs = append(labels.XYs, plotter.XY{X: b.value.Hi, Y: float64(at)})
		labels.Labels = append(labels.Labels, number(b.value.Mid))
	}
	whiskers, err := plotter.NewXErrorBars(points)
	if err != nil {
		return nil, err
	}
	whiskers.Color = black
	figures, err := plotter.NewLabels(labels)
	if err != nil {
		return nil, err
	}
	for i := range figures.TextStyle {
		figures.TextStyle[i].YAlign = -0.4
		figures.TextStyle[i].Font.Variant = "Sans"
	}
	figures.Offset.X = vg.Points(5)
	p.Add(whiskers, figures)
	p.NominalY(names...)
	p.X.Max *= 1.1 // room for the last figure
	to, err := p.WriterTo(18*vg.Centimeter, vg.Length(len(bars))*vg.Points(22)+vg.Points(70), "svg")
	if err != nil {
		return nil, err
	}
	var b bytes.Buffer
	_, err = to.WriteTo(&b)
	// The reader may lack the font; Arial and Helvetica have its widths.
	svg := bytes.ReplaceAll(b.Bytes(), []byte("Liberation Sans"), []byte("Liberation Sans,Arial,Helvetica,sans-serif"))
	return svg, err
}

// plainTicks writes 25 rather than 25.00.
func plainTicks(lo, hi float64) []plot.Tick {
	ticks := plot.DefaultTicks{}.Ticks(lo, hi)
	for i := range ticks {
		if ticks[i].Label != "" {
			ticks[i].Label = strconv.FormatFloat(ticks[i].Value, 'g', 6, 64)
		}
	}
	return ticks
}

// spread are the values that [plotter.NewXErrorBars] wants.
type spread struct {
	plotter.XYs
	plotter.XErrors
}
