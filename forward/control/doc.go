// Package control serves a Forwarder over a UNIX socket, as HTTP with JSON: its
// state, and changes of its forwards. openapi.yaml describes the API; its
// /v1/info and /v1/ports are those of RootlessKit, for clients made for that.
//
// # Theory of operation
//
// A [Server] takes connections of the user that it belongs to, and no others:
// whoever may change forwards may publish any port of the container.
//
// A change is answered after it is true, and has changed nothing if the answer is
// an error. Whoever sends half a request or reads no answer is dropped after
// [Timeout]; until then he costs a goroutine. At [MaxConns] connections the one
// that has been without a complete request for longest makes way, and where nearly all
// have one, another is told that there are too many. Nothing in the data path ever
// waits for a client.
//
// Some answers have no end: events, captures, and leases, which are forwards that
// last as long as the connection that made them.
package control
