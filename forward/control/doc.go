// Package control serves the state of a Forwarder as HTTP over a UNIX socket.
package control
