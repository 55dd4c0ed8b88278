package control

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"strconv"
	"time"

	"github.com/gofwd/gofwd/forward"
)

// stream is an answer in pieces. Each has Timeout to be taken.
type stream struct {
	http.ResponseWriter
	control *http.ResponseController
}

// newStream begins an answer, which the client sees at once.
func newStream(w http.ResponseWriter, contentType string) (*stream, error) {
	s := &stream{w, http.NewResponseController(w)}
	_ = s.control.SetWriteDeadline(time.Now().Add(Timeout))
	w.Header().Set("Content-Type", contentType)
	w.WriteHeader(http.StatusOK)
	return s, s.control.Flush()
}

func (s *stream) Write(b []byte) (int, error) {
	_ = s.control.SetWriteDeadline(time.Now().Add(Timeout))
	n, err := s.ResponseWriter.Write(b)
	if err == nil {
		err = s.control.Flush()
	}
	return n, err
}

// untilGone returns a context that ends with the client's connection. The request's
// own does not, once the client has sent a byte past the request: net/http keeps that
// for the next request, and reads no further.
func untilGone(r *http.Request) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(r.Context())
	if c := connOf(ctx); c != nil {
		if f, err := c.File(); err == nil {
			context.AfterFunc(ctx, func() { f.Close() })
			go waitHangup(f, cancel)
		}
	}
	return ctx, cancel
}

// ndjson is a JSON value in each line.
const ndjson = "application/x-ndjson"

// getEvents tells what happens until the client has enough.
func (h *handler) getEvents(w http.ResponseWriter, r *http.Request) error {
	sub := h.Forwarder.Subscribe()
	defer sub.Close()
	s, err := newStream(w, ndjson)
	if err != nil {
		return nil //nolint:nilerr // the client has gone
	}
	ctx, cancel := untilGone(r)
	defer cancel()
	lines := json.NewEncoder(s)
	for {
		select {
		case <-ctx.Done():
			return nil
		case e, ok := <-sub.C():
			if !ok {
				return nil
			}
			err := lines.Encode(e)
			if lost := sub.Lost(); lost > 0 && err == nil {
				err = lines.Encode(forward.Event{Time: time.Now(), Type: forward.EventsLost, Lost: lost})
			}
			if err != nil {
				return nil //nolint:nilerr // the client has gone
			}
		}
	}
}

// getCapture sends frames until the client has enough.
func (h *handler) getCapture(w http.ResponseWriter, r *http.Request) error {
	id := 0
	if text := r.URL.Query().Get("forward"); text != "" {
		var err error
		if id, err = strconv.Atoi(text); err != nil || id < 1 {
			return badRequest{fmt.Errorf("%q is not an id", text)}
		}
	}
	frames := &lazyStream{w: w}
	ctx, cancel := untilGone(r)
	defer cancel()
	if err := h.Forwarder.Capture(ctx, id, frames); frames.s == nil {
		return err
	}
	return nil // too late for an error: the client has gone
}

// lazyStream begins the answer with the first byte: until then it may be an error.
type lazyStream struct {
	w http.ResponseWriter
	s *stream
}

func (l *lazyStream) Write(b []byte) (int, error) {
	if l.s == nil {
		s, err := newStream(l.w, "application/vnd.tcpdump.pcap")
		if err != nil {
			return 0, err
		}
		l.s = s
	}
	return l.s.Write(b)
}

// lease answers with what was changed, and when the client has gone removes what
// he added.
func (h *handler) lease(w http.ResponseWriter, r *http.Request, changed forward.Changed, drain time.Duration) error {
	defer h.endLease(changed.New, drain)
	s, err := newStream(w, ndjson)
	if err != nil || json.NewEncoder(s).Encode(changed) != nil {
		return nil
	}
	ctx, cancel := untilGone(r)
	defer cancel()
	<-ctx.Done()
	return nil
}

// endLease removes those of the forwards that are still there.
func (h *handler) endLease(ids []int, drain time.Duration) {
	if _, err := h.Forwarder.Change(forward.Change{Remove: ids, Drain: drain}); err == nil {
		return
	}
	for _, id := range ids { // somebody else was faster with one of them
		_ = h.Forwarder.Remove(id, drain)
	}
}
