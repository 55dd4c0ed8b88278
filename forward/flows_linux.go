package forward

import (
	"net"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"
)

// Flow is one TCP connection or UDP flow.
type Flow struct {
	Proto Proto `json:"proto"`
	// Dir is In for what came to the host's side first.
	Dir Dir `json:"dir"`
	// Forward is the id of its forward, 0 if the container began it itself.
	Forward int `json:"forward,omitempty"`
	// Client is who began it, and Server where it leads, each with its own
	// address; Seen is the one that the server sees instead of Client's, where
	// that is another one and known.
	Client netip.AddrPort `json:"client"`
	Server netip.AddrPort `json:"server"`
	Seen   netip.AddrPort `json:"seen,omitzero"`
	Path   Datapath       `json:"path"`
	// Started is when both ends were connected; zero for UDP.
	Started time.Time `json:"started,omitzero"`
	// BytesIn went into the namespace, BytesOut came out of it. RTT is how
	// long the host's peer takes to answer. All are the kernel's (tcp_info), for
	// TCP alone.
	BytesIn  int64         `json:"bytes_in,omitempty"`
	BytesOut int64         `json:"bytes_out,omitempty"`
	RTT      time.Duration `json:"rtt_ns,omitempty"`
}

// Flows returns the flows that are open, in no order.
func (f *Forwarder) Flows() []Flow {
	flows := f.tcp.flows()
	if f.udp != nil {
		flows = append(flows, f.udp.listFlows()...)
	}
	return flows
}

// flows asks the kernel about each connection: nothing is counted per flow while
// it runs.
func (e *tcpEngine) flows() []Flow {
	e.mu.Lock()
	relays := make([]*relay, 0, len(e.relays))
	for r := range e.relays {
		relays = append(relays, r)
	}
	e.mu.Unlock()
	flows := make([]Flow, len(relays))
	for i, r := range relays {
		flows[i] = r.flow
		flows[i].ask(r.outer)
	}
	return append(flows, e.splicer.flows()...)
}

// ask fills in what the kernel knows of the host's end of the flow.
func (f *Flow) ask(outer flowConn) {
	raw, ok := rawConn(outer)
	if !ok {
		return
	}
	_ = raw.Control(func(fd uintptr) { f.askFD(int(fd)) })
}

func (f *Flow) askFD(outer int) {
	info, err := unix.GetsockoptTCPInfo(outer, unix.IPPROTO_TCP, unix.TCP_INFO)
	if err != nil {
		return // it has just ended, or is no TCP socket
	}
	f.BytesIn = int64(info.Bytes_received)
	f.BytesOut = int64(info.Bytes_sent - info.Bytes_retrans)
	f.RTT = time.Duration(info.Rtt) * time.Microsecond
}

// listFlows lists the flows of the table.
func (e *udpEngine) listFlows() []Flow {
	e.mu.Lock()
	defer e.mu.Unlock()
	flows := make([]Flow, 0, e.flows.len())
	for _, list := range []*flowList{&e.flows.queries, &e.flows.short, &e.flows.streams} {
		for f := list.front; f != nil; f = f.next {
			flows = append(flows, f.describe())
		}
	}
	return flows
}

func (f *flow) describe() Flow {
	d := Flow{Proto: UDP, Dir: In, Client: f.host.remote.addrPort(), Server: f.guest, Path: Tap}
	if f.dialled {
		d.Dir, d.Client, d.Server = Out, f.guest, f.host.remote.addrPort()
	} else if f.peer != d.Client {
		d.Seen = f.peer
	}
	if f.inside.sock != nil {
		d.Path = Kernel
	}
	if f.rule != nil {
		d.Forward = f.rule.id
	}
	return d
}

// unmapped is a with IPv4 as IPv4.
func unmapped(a netip.AddrPort) netip.AddrPort { return netip.AddrPortFrom(a.Addr().Unmap(), a.Port()) }

// remoteAddr returns the address of c's peer, if that is of TCP.
func remoteAddr(c flowConn) netip.AddrPort {
	if a, ok := c.RemoteAddr().(*net.TCPAddr); ok {
		return unmapped(a.AddrPort())
	}
	return netip.AddrPort{}
}
