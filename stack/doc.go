// Package stack is the far end of a container's tap: everything that answers
// when the container sends a frame.
//
// # Theory of operation
//
//	container │ tap ── Device ── endpoint ─┬─ ARP, NDP            neigh.go ─► Config.RouterSolicit
//	          │                            ├─ fragments           fragment.go ─► endpoint again
//	          │                            ├─ TCP SYN, held       syn.go ─► Config.TCP
//	          │                            ├─ TCP, the rest       gVisor ─► Conn
//	          │                            ├─ UDP                 udp.go ─► Config.UDP
//	          │                            └─ ICMP echo           icmp.go ─► Config.Echo
//
// One goroutine reads frames from the device and takes each as far as it can
// without blocking. Ethernet ends here: gVisor is given IP packets, and only
// those of TCP, since that is the protocol that needs a state machine. UDP and
// ICMP are parsed in place and handed on without an endpoint or goroutine for
// each flow.
//
// The container talks to any address in the world and gVisor must take each
// as its own: its network interface is promiscuous and may spoof. In the other
// direction the host dials the container with the client's address as source
// ([Stack.DialTCP], [Stack.WriteUDP]); the container's replies come back to the
// tap, since its default route points there.
//
// A frame buffer belongs to the device reader: what is to live longer than the
// callback is copied.
package stack
