// Package forward publishes ports of a network namespace on the host, and gives
// the namespace a way out. It is the package to embed.
//
// # Theory of operation
//
// The way of an inbound connection, and the order of the files:
//
//	host listener → accept → path choice → dial (the client's address as source) → relay → half-close
//	listen          tcp      path           nsdial | stack                          relay   relay
//
// A path is a dialer. There are two: "tap", a gVisor stack at the far end of a
// tap in the namespace (package stack), and "kernel", a transparent kernel
// socket made in the namespace. The choice is one function, in path.go.
//
// Outbound connections are dialled before the container's handshake is
// completed (outbound.go): what the world refuses, the container sees refused.
// UDP has no connections; its engine (udp.go) keeps a table of flows instead.
package forward
