package main

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"sync"
)

// logFile is a log that keeps to a size: when it is full, the oldest third goes.
type logFile struct {
	max int64

	mu   sync.Mutex // guards the following fields
	file *os.File
	size int64
}

// openLogFile opens the log at path, which may grow to max bytes, and empties it
// if fresh.
func openLogFile(path string, max int64, fresh bool) (*logFile, error) {
	flags := os.O_RDWR | os.O_CREATE | os.O_APPEND
	if fresh {
		flags |= os.O_TRUNC
	}
	f, err := os.OpenFile(path, flags, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open log file: %w", err)
	}
	st, err := f.Stat()
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("open log file: %w", err)
	}
	return &logFile{max: max, file: f, size: st.Size()}, nil
}

// Write appends b, which is whole lines.
func (l *logFile) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.size+int64(len(b)) > l.max {
		if err := l.trimLocked(); err != nil {
			return 0, err
		}
	}
	n, err := l.file.Write(b)
	l.size += int64(n)
	return n, err
}

// trimLocked keeps the newest two thirds, from the beginning of a line on.
func (l *logFile) trimLocked() error {
	keep := l.max - l.max/3
	b, err := io.ReadAll(io.NewSectionReader(l.file, max(0, l.size-keep), keep))
	if err != nil {
		return err
	}
	if i := bytes.IndexByte(b, '\n'); i >= 0 {
		b = b[i+1:]
	}
	if err := l.file.Truncate(0); err != nil {
		return err
	}
	n, err := l.file.Write(b)
	l.size = int64(n)
	return err
}
