package control

import (
	"bytes"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strconv"
	"syscall"
	"time"

	"github.com/gofwd/gofwd/forward"
)

//go:embed openapi.yaml
var openAPI []byte

// maxBody bounds a request: 65,535 rules of 60 bytes have room.
const maxBody = 4 << 20

// handler answers requests.
type handler struct {
	Config
	mux *http.ServeMux
}

// Handler serves f on any server of package net/http, without a check of who
// asks and without descriptors; [Server] has both.
func Handler(f *forward.Forwarder) http.Handler { return newHandler(Config{Forwarder: f}) }

func newHandler(cfg Config) *handler {
	h := &handler{Config: cfg, mux: http.NewServeMux()}
	for pattern, fn := range h.routes() {
		h.mux.HandleFunc(pattern, answer(fn))
	}
	return h
}

// routes is the whole API, but for what openapi.yaml says of it.
func (h *handler) routes() map[string]func(http.ResponseWriter, *http.Request) error {
	return map[string]func(http.ResponseWriter, *http.Request) error{
		"GET /v1/info":          h.getInfo,
		"GET /v1/ports":         h.getPorts,
		"POST /v1/ports":        h.postPort,
		"PUT /v1/ports":         h.putPorts,
		"DELETE /v1/ports/{id}": h.deletePort,
		"GET /v1/status":        h.getStatus,
		"POST /v1/forwards":     h.postForwards,
		"GET /v1/flows":         h.getFlows,
		"GET /v1/events":        h.getEvents,
		"GET /v1/capture":       h.getCapture,
		"POST /v1/reload":       h.postReload,
		"GET /metrics":          h.getMetrics,
		"GET /openapi.yaml":     h.getOpenAPI,
	}
}

func (h *handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if c := connOf(r.Context()); c != nil {
		defer c.end()
		defer func() { // what this request did not name is not the next one's
			for _, f := range c.takeFiles() {
				f.Close()
			}
		}()
		hasBody := r.Method == http.MethodPost || r.Method == http.MethodPut
		if !hasBody || r.ContentLength == 0 { // else readJSON begins
			if err := c.begin(); err != nil {
				writeError(w, err)
				return
			}
		}
	}
	h.mux.ServeHTTP(w, r)
}

// answer makes a handler of one that returns errors.
func answer(fn func(http.ResponseWriter, *http.Request) error) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if err := fn(w, r); err != nil {
			writeError(w, err)
		}
	}
}

// badRequest is what is wrong with a request, rather than with the world.
type badRequest struct{ error }

func (e badRequest) Unwrap() error { return e.error }

// Busy is the port of an error that is about a port in use. Who has it, the
// client may be able to find out, and gofwd not: see [forward.NameHolder].
type Busy struct {
	Op   string       `json:"op"`
	Rule forward.Rule `json:"rule"`
}

// Failure is an error as clients are told it, in RootlessKit's shape.
type Failure struct {
	// Message is the error, with a hint where there is one.
	Message string `json:"message"`
	// Busy, if not nil, says more about a port in use.
	Busy *Busy `json:"busy,omitempty"`
}

// NewFailure returns what a client is told of err.
func NewFailure(err error) Failure {
	f := Failure{Message: err.Error()}
	if hint := forward.Hint(err); hint != "" {
		f.Message += "; " + hint
	}
	var onRule *forward.Error
	if errors.As(err, &onRule) && errors.Is(err, syscall.EADDRINUSE) {
		f.Busy = &Busy{onRule.Op, onRule.Rule}
	}
	return f
}

func (f Failure) Error() string { return f.Message }

func writeError(w http.ResponseWriter, err error) { writeJSON(w, statusOf(err), NewFailure(err)) }

func statusOf(err error) int {
	var tooLong *http.MaxBytesError
	var conflict *forward.ConflictError
	switch {
	case errors.As(err, &tooLong):
		return http.StatusRequestEntityTooLarge
	case errors.As(err, new(badRequest)):
		return http.StatusBadRequest
	case errors.As(err, &conflict), errors.Is(err, syscall.EADDRINUSE):
		return http.StatusConflict
	case errors.Is(err, forward.ErrNoForward):
		return http.StatusNotFound
	case errors.Is(err, forward.ErrGeneration):
		return http.StatusPreconditionFailed
	case errors.Is(err, syscall.EACCES), errors.Is(err, syscall.EPERM):
		return http.StatusForbidden
	case errors.Is(err, errors.ErrUnsupported):
		return http.StatusNotImplemented
	case errors.Is(err, net.ErrClosed), errors.Is(err, errTooMany), errors.Is(err, syscall.EMFILE), errors.Is(err, syscall.ENFILE):
		return http.StatusServiceUnavailable
	}
	return http.StatusBadRequest
}

func writeJSON(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	mayWrite(w)
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(v) // the client has gone
}

// mayWrite gives an answer its time anew: a change may have taken what there was.
func mayWrite(w http.ResponseWriter) {
	_ = http.NewResponseController(w).SetWriteDeadline(time.Now().Add(Timeout)) // of a connection, as ours are
}

// strict reads one JSON value, which has no field that v doesn't have.
func strict(r io.Reader, v any) error {
	d := json.NewDecoder(r)
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return err
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return errors.New("something follows the JSON value")
	}
	return nil
}

// readJSON reads the whole body, which must be one JSON value of v's shape.
func readJSON(w http.ResponseWriter, r *http.Request, v any) error {
	control := http.NewResponseController(w)
	_ = control.SetReadDeadline(time.Now().Add(Timeout))
	if err := strict(http.MaxBytesReader(w, r.Body, maxBody), v); err != nil {
		return fmt.Errorf("read request: %w", badRequest{err})
	}
	// Whoever waits for the end of a stream must not meet that deadline.
	_ = control.SetReadDeadline(time.Time{})
	return connOf(r.Context()).begin()
}

func (h *handler) getStatus(w http.ResponseWriter, _ *http.Request) error {
	writeJSON(w, http.StatusOK, h.Forwarder.Status())
	return nil
}

func (h *handler) getFlows(w http.ResponseWriter, _ *http.Request) error {
	writeJSON(w, http.StatusOK, h.Forwarder.Flows())
	return nil
}

func (h *handler) getOpenAPI(w http.ResponseWriter, _ *http.Request) error {
	w.Header().Set("Content-Type", "application/yaml")
	_, _ = w.Write(openAPI)
	return nil
}

func (h *handler) postReload(w http.ResponseWriter, _ *http.Request) error {
	if h.Reload == nil {
		return fmt.Errorf("reload: started without --config, so there is no file to read anew: %w", errors.ErrUnsupported)
	}
	if err := h.Reload(); err != nil {
		return err
	}
	mayWrite(w)
	w.WriteHeader(http.StatusNoContent)
	return nil
}

// rules are rules in a request: each is text as for -p, or an object as in
// forward.RuleStatus. One text may be several rules.
type rules []forward.Rule

func (l *rules) UnmarshalJSON(b []byte) error {
	*l = rules{} // null and [] are not the same as nothing
	var items []json.RawMessage
	if err := json.Unmarshal(b, &items); err != nil {
		return err
	}
	for _, item := range items {
		var text string
		if json.Unmarshal(item, &text) == nil {
			parsed, err := forward.ParsePublish(text)
			if err != nil {
				return err
			}
			*l = append(*l, parsed...)
			continue
		}
		var r forward.Rule
		if err := strict(bytes.NewReader(item), &r); err != nil {
			return err
		}
		*l = append(*l, r)
	}
	return nil
}

// duration is a time.Duration as text: "30s".
type duration time.Duration

func (d *duration) UnmarshalText(b []byte) error {
	v, err := time.ParseDuration(string(b))
	if err == nil && v < 0 {
		err = fmt.Errorf("%q is negative", b)
	}
	*d = duration(v)
	return err
}

// putPorts replaces all forwards.
func (h *handler) putPorts(w http.ResponseWriter, r *http.Request) error {
	var q struct {
		Forwards   rules    `json:"forwards"`
		Generation uint64   `json:"generation"`
		Drain      duration `json:"drain"`
	}
	if err := readJSON(w, r, &q); err != nil {
		return err
	}
	if q.Forwards == nil {
		return badRequest{errNoForwards}
	}
	changed, err := h.Forwarder.Change(forward.Change{
		Replace: true, Add: q.Forwards, Generation: q.Generation, Drain: time.Duration(q.Drain),
	})
	if err != nil {
		return err
	}
	writeJSON(w, http.StatusOK, changed)
	return nil
}

// postForwards adds and removes forwards.
func (h *handler) postForwards(w http.ResponseWriter, r *http.Request) error {
	var q struct {
		Add        rules    `json:"add"`
		Remove     []int    `json:"remove"`
		Generation uint64   `json:"generation"`
		Drain      duration `json:"drain"`
		FDs        []string `json:"fds"`
		Lease      bool     `json:"lease"`
	}
	if err := readJSON(w, r, &q); err != nil {
		return err
	}
	files, err := namedFiles(r, q.FDs)
	if err != nil {
		return err
	}
	changed, err := h.Forwarder.Change(forward.Change{
		Add: q.Add, Remove: q.Remove, Generation: q.Generation, Drain: time.Duration(q.Drain), Sockets: files,
	})
	closeFiles(files) // at once: for the time of a lease they would listen on when the forward is removed
	if err != nil {
		return err
	}
	if q.Lease {
		return h.lease(w, r, changed, time.Duration(q.Drain))
	}
	writeJSON(w, http.StatusOK, changed)
	return nil
}

// namedFiles gives the descriptors that came with the request their names.
func namedFiles(r *http.Request, names []string) ([]forward.Socket, error) {
	var files []*os.File
	if c := connOf(r.Context()); c != nil {
		files = c.takeFiles()
	}
	if len(files) != len(names) {
		for _, f := range files {
			f.Close()
		}
		return nil, badRequest{fmt.Errorf("%d descriptors are named, and %d came", len(names), len(files))}
	}
	sockets := make([]forward.Socket, len(names))
	for i, f := range files {
		sockets[i] = forward.Socket{Name: names[i], File: f}
	}
	return sockets, nil
}

func closeFiles(sockets []forward.Socket) {
	for _, s := range sockets {
		s.File.Close()
	}
}

// deletePort removes a forward.
func (h *handler) deletePort(w http.ResponseWriter, r *http.Request) error {
	id, err := strconv.Atoi(r.PathValue("id"))
	if err != nil {
		return badRequest{fmt.Errorf("%q is not an id", r.PathValue("id"))}
	}
	var drain duration
	if text := r.URL.Query().Get("drain"); text != "" {
		if err := drain.UnmarshalText([]byte(text)); err != nil {
			return badRequest{err}
		}
	}
	err = h.Forwarder.Remove(id, time.Duration(drain))
	mayWrite(w)
	return err
}
