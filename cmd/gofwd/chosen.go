package main

import (
	"fmt"
	"io"

	"github.com/gofwd/gofwd/forward"
)

// printChosen prints the free host ports that the kernel chose, for scripts:
// "0.0.0.0:49153 -> 80/tcp".
func printChosen(w io.Writer, s forward.Status) {
	for _, r := range s.Rules {
		if r.Rule.Ports != (forward.PortRange{}) || r.Rule.Socket != "" {
			continue
		}
		for n, b := range r.Bound {
			// The addresses of a port follow each other.
			port := int(r.Rule.TargetPorts.First) + n*r.Rule.TargetPorts.Len()/len(r.Bound)
			fmt.Fprintf(w, "%s -> %d/%s\n", b, port, r.Rule.Proto)
		}
	}
}
