package main

import (
	"fmt"
	"io"
	"log/slog"
	"os"
)

// level is the level of the log: --log-level, and at least warnings with -q.
func (o *options) level() (slog.Level, error) {
	var l slog.Level
	if err := l.UnmarshalText([]byte(o.logLevel)); err != nil {
		return l, fmt.Errorf("--log-level %q: not debug, info, warn or error", o.logLevel)
	}
	if o.quiet {
		l = max(l, slog.LevelWarn)
	}
	return l, nil
}

// logger returns the log that the options ask for.
func (o *options) logger() *slog.Logger {
	var w io.Writer = os.Stderr
	if o.logTo != nil {
		w = o.logTo
	}
	level, err := o.level()
	if err != nil {
		level = slog.LevelInfo // complete has refused it
	}
	opts := &slog.HandlerOptions{Level: level}
	if o.logFormat == "json" {
		return slog.New(slog.NewJSONHandler(w, opts))
	}
	return slog.New(slog.NewTextHandler(w, opts))
}
