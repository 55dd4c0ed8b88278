package control

import (
	"encoding/json"
	"net/http"

	"github.com/gofwd/gofwd/forward"
)

// Handler serves the state of f:
//
//	GET /v1/status   forward.Status as JSON
//
// It is safe for use by several clients at once, and goes on answering when f
// has ended.
func Handler(f *forward.Forwarder) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/status", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		enc := json.NewEncoder(w)
		enc.SetIndent("", "  ")
		_ = enc.Encode(f.Status()) // the client has gone
	})
	return mux
}
