package forward

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"
)

// Proto is a transport protocol.
type Proto uint8

// The protocols that can be forwarded.
const (
	TCP Proto = iota + 1
	UDP
)

// String returns "tcp" or "udp".
func (p Proto) String() string {
	switch p {
	case TCP:
		return "tcp"
	case UDP:
		return "udp"
	}
	return "proto(" + strconv.Itoa(int(p)) + ")"
}

// MarshalText is [Proto.String], for JSON.
func (p Proto) MarshalText() ([]byte, error) { return []byte(p.String()), nil }

// UnmarshalText takes what MarshalText gives, in either case.
func (p *Proto) UnmarshalText(text []byte) (err error) {
	*p, err = parseProto(string(text))
	return err
}

// Dir is the direction of a forward. The zero value is In.
type Dir uint8

const (
	// In is from the host into the namespace: -p, -t, -u.
	In Dir = iota
	// Out is from the namespace's loopback to the host's loopback: -T, -U.
	Out
)

// String returns "in" or "out".
func (d Dir) String() string {
	switch d {
	case In:
		return "in"
	case Out:
		return "out"
	}
	return "dir(" + strconv.Itoa(int(d)) + ")"
}

// MarshalText is [Dir.String], for JSON.
func (d Dir) MarshalText() ([]byte, error) { return []byte(d.String()), nil }

// UnmarshalText takes what MarshalText gives.
func (d *Dir) UnmarshalText(text []byte) error {
	switch string(text) {
	case "in":
		*d = In
	case "out":
		*d = Out
	default:
		return fmt.Errorf("%q is not a direction: in or out", text)
	}
	return nil
}

// PortRange is the ports First to Last, both included. The zero value is no
// port: as the Ports of a [Rule] it asks for free ones.
type PortRange struct{ First, Last uint16 }

// Len returns how many ports r has, 0 for the zero value.
func (r PortRange) Len() int {
	if r == (PortRange{}) {
		return 0
	}
	return int(r.Last) - int(r.First) + 1
}

// String returns "80" or "80-90", and "" for the zero value.
func (r PortRange) String() string {
	switch {
	case r == PortRange{}:
		return ""
	case r.First == r.Last:
		return strconv.Itoa(int(r.First))
	}
	return strconv.Itoa(int(r.First)) + "-" + strconv.Itoa(int(r.Last))
}

// MarshalText is [PortRange.String], for JSON.
func (r PortRange) MarshalText() ([]byte, error) { return []byte(r.String()), nil }

// UnmarshalText takes what MarshalText gives.
func (r *PortRange) UnmarshalText(text []byte) (err error) {
	if len(text) == 0 {
		*r = PortRange{}
		return nil
	}
	*r, err = parseRange(string(text))
	return err
}

// check says what is wrong with r, other than that it may be zero.
func (r PortRange) check() error {
	switch {
	case r.First == 0:
		return errors.New("port 0 cannot be forwarded")
	case r.First > r.Last:
		return fmt.Errorf("range %q ends before it begins", r)
	}
	return nil
}

// overlap returns the ports that r and o have in common, zero if none.
func (r PortRange) overlap(o PortRange) PortRange {
	both := PortRange{max(r.First, o.First), min(r.Last, o.Last)}
	if both.First > both.Last {
		return PortRange{}
	}
	return both
}

// Rule is one forward: a range of ports on the listening side, and where they
// go. Rules are comparable; [ParsePublish] and [ParseSpec] make them from text.
type Rule struct {
	Dir   Dir   `json:"dir"`
	Proto Proto `json:"proto"`
	// Addr is the address to listen on. The zero Addr is every address of
	// both families, 0.0.0.0 every IPv4 address, :: every IPv6 address. A
	// link-local address has a zone, or else Iface is set.
	Addr netip.Addr `json:"addr,omitzero"`
	// Iface binds the listener to one interface (SO_BINDTODEVICE); ""
	// does not.
	Iface string `json:"iface,omitempty"`
	// Ports are the ports to listen on; zero lets the kernel choose.
	Ports PortRange `json:"ports,omitzero"`
	// Target is the address in the namespace; the zero Addr is the
	// container's own of the client's family, or its loopback (Out: the
	// host's loopback). It is of the same family as Addr.
	Target netip.Addr `json:"target,omitzero"`
	// TargetPorts is as long as Ports.
	TargetPorts PortRange `json:"target_ports"`
	// Weak makes a port that cannot be bound a warning; it is an error
	// only if none of the rule's ports can.
	Weak bool `json:"weak,omitempty"`
	// Auto publishes only those ports that have a listener on the target
	// side, and follows them.
	Auto bool `json:"auto,omitempty"`
	// Socket is the listening socket where that is not bound by Addr, Iface
	// and Ports, which are zero then: "unix:PATH" is made at PATH, and removed
	// with the rule; "systemd:NAME" and "fd:NAME" are those of that name in
	// Config.Sockets and Change.Sockets.
	Socket string `json:"socket,omitempty"`
	// TargetSocket is a UNIX socket of the host that a rule with Dir Out
	// leads to; "" leads to Target.
	TargetSocket string `json:"target_socket,omitempty"`
	// Share lets other rules with Share have the same port. Clients are led
	// to them in turn, and a TCP connection that one does not take goes to the
	// next; with other instances of the same user the port is shared by
	// SO_REUSEPORT, and the kernel spreads the clients over them.
	Share bool `json:"share,omitempty"`
	// Wait publishes when the address or the interface is there, and follows
	// it when it goes and returns; without it, that they are missing is an
	// error.
	Wait bool `json:"wait,omitempty"`
	// ProxyV2 tells the server the client's address by the PROXY protocol,
	// version 2. For TCP.
	ProxyV2 bool `json:"proxy_v2,omitempty"`
	Limits
}

// String returns the rule as [ParsePublish] takes it: "127.0.0.1:8080:80/tcp".
func (r Rule) String() string {
	if r.TargetSocket != "" {
		return r.Ports.String() + ":unix:" + r.TargetSocket + "/" + r.Proto.String() + writeOptions(&r)
	}
	if r.Socket != "" {
		return r.Socket + ":" + r.TargetPorts.String() + "/" + r.Proto.String() + writeOptions(&r)
	}
	var b strings.Builder
	listen := r.listenAddr()
	if listen != "" {
		b.WriteString(listen + ":")
	}
	if ports := r.Ports.String(); ports != "" || listen != "" || r.Target.IsValid() {
		b.WriteString(ports + ":")
	}
	if r.Target.IsValid() {
		b.WriteString(bracketed(r.Target) + ":")
	}
	b.WriteString(r.TargetPorts.String() + "/" + r.Proto.String())
	b.WriteString(writeOptions(&r))
	return b.String()
}

// listenAddr returns where the rule listens but for the ports: "" for anywhere,
// else "127.0.0.1", "[::1]%lo", "%eth0".
func (r Rule) listenAddr() string {
	s := bracketed(r.Addr)
	if r.Iface != "" {
		s += "%" + r.Iface
	}
	return s
}

// endpoint returns where the rule listens, for messages: "127.0.0.1:8080/tcp".
func (r Rule) endpoint() string {
	if r.Socket != "" {
		return r.Socket
	}
	s, ports := r.listenAddr(), r.Ports.String()
	if ports == "" {
		ports = "(any free)"
	}
	if s != "" {
		s += ":"
	}
	return s + ports + "/" + r.Proto.String()
}

// bracketed returns an address as it stands before a colon, "" for the zero Addr.
func bracketed(a netip.Addr) string {
	switch {
	case !a.IsValid():
		return ""
	case a.Is4():
		return a.String()
	}
	return "[" + a.String() + "]"
}

// only narrows r to its i-th port.
func (r Rule) only(i int) Rule {
	if r.Ports != (PortRange{}) {
		port := r.Ports.First + uint16(i)
		r.Ports = PortRange{port, port}
	}
	port := r.TargetPorts.First + uint16(i)
	r.TargetPorts = PortRange{port, port}
	return r
}

// device returns the interface that the rule's sockets are bound to, "" if they
// are not. A zone does that too: the kernel binds a socket with a link-local
// address to the interface of its scope (ipv6(7)).
func (r Rule) device() string {
	if r.Iface != "" {
		return r.Iface
	}
	return r.Addr.Zone()
}

// check says what is wrong with r, taken by itself.
func (r Rule) check() error {
	if r.Proto != TCP && r.Proto != UDP {
		return fmt.Errorf("%s is neither tcp nor udp", r.Proto)
	}
	if err := r.TargetPorts.check(); err != nil {
		return err
	}
	if r.Ports != (PortRange{}) {
		if err := r.Ports.check(); err != nil {
			return err
		}
		if got, want := r.Ports.Len(), r.TargetPorts.Len(); got != want {
			return fmt.Errorf("%q is %d ports and %q is %d: both ranges need the same length", r.Ports, got, r.TargetPorts, want)
		}
	}
	switch {
	case r.Dir == Out && (r.Addr.IsValid() || r.Iface != ""):
		return fmt.Errorf("%q: a forward out of the container listens on the container's loopback, and on no other address or interface", r.listenAddr())
	case r.Dir != In && r.Dir != Out:
		return fmt.Errorf("%s is neither in nor out", r.Dir)
	}
	if err := cmp.Or(r.checkSockets(), r.checkOptions(), r.Limits.check(r.Proto)); err != nil {
		return err
	}
	if err := r.checkListen(); err != nil {
		return err
	}
	return r.checkTarget()
}

// free reports whether the kernel is to choose the ports.
func (r Rule) free() bool { return r.Ports == PortRange{} && r.Socket == "" }

// canWait reports whether r is for an address or an interface that may be missing.
func (r Rule) canWait() bool {
	return r.Dir == In && r.Socket == "" && !r.free() && (r.Iface != "" || r.Addr.IsValid() && !r.Addr.IsUnspecified())
}

// Waiting returns r with Wait, if it is for an address or an interface of the host.
func (r Rule) Waiting() Rule {
	r.Wait = r.Wait || r.canWait()
	return r
}

// socketName tells the sockets of rules apart: "systemd:web" and "fd:web" are the
// same one.
func (r Rule) socketName() string {
	if kind, name, _ := strings.Cut(r.Socket, ":"); kind == "systemd" || kind == "fd" {
		return "fd:" + name
	}
	return r.Socket
}

func (r Rule) checkSockets() error {
	kind, name, _ := strings.Cut(r.Socket, ":")
	switch {
	case r.Socket == "":
	case kind != "unix" && kind != "systemd" && kind != "fd":
		return fmt.Errorf("socket %q is none of unix:PATH, systemd:NAME and fd:NAME", r.Socket)
	case name == "":
		return fmt.Errorf("socket %q has no name", r.Socket)
	case !printable(name):
		return fmt.Errorf("socket %q: the name has unprintable characters", r.Socket)
	case kind == "unix":
		if err := checkSocketPath(name); err != nil {
			return err
		}
	}
	switch {
	case r.Socket == "" && r.TargetSocket == "":
		return nil
	case r.Socket != "" && (r.Addr.IsValid() || r.Iface != "" || r.Ports != PortRange{} || r.Dir != In || r.Auto || r.Wait || r.Share):
		return fmt.Errorf("socket %q is bound already: no address, interface, port, or option about them goes with it", r.Socket)
	case r.Socket != "" && r.TargetPorts.Len() != 1:
		return fmt.Errorf("socket %q leads to one port", r.Socket)
	case kind == "unix" && r.Proto != TCP, r.TargetSocket != "" && r.Proto != TCP:
		return errors.New("a UNIX socket is for tcp")
	case r.TargetSocket == "":
		return nil
	case r.Dir != Out || r.Ports.Len() != 1 || r.Target.IsValid() || r.Auto:
		return fmt.Errorf("UNIX socket %q: only one port of the container's loopback can lead to it", r.TargetSocket)
	}
	return checkSocketPath(r.TargetSocket)
}

// printable reports whether a terminal, and JSON, can show s as it is.
func printable(s string) bool {
	return utf8.ValidString(s) && !strings.ContainsFunc(s, func(c rune) bool { return !unicode.IsPrint(c) })
}

// checkSocketPath says what is wrong with the path of a UNIX socket (unix(7)).
func checkSocketPath(path string) error {
	const sunPathSize = 108
	switch {
	case !strings.HasPrefix(path, "/"):
		return fmt.Errorf("UNIX socket %q: the path has to begin with a slash", path)
	case len(path) >= sunPathSize:
		return fmt.Errorf("UNIX socket %q: the path has %d bytes, and the kernel takes %d", path, len(path), sunPathSize-1)
	case !printable(path):
		return fmt.Errorf("UNIX socket %q: the path has unprintable characters", path)
	}
	return nil
}

func (r Rule) checkOptions() error {
	switch {
	case r.ProxyV2 && (r.Proto != TCP || r.Dir != In):
		return errors.New("the PROXY protocol is for tcp into the container")
	case r.Idle != 0 && (r.Dir != In || strings.HasPrefix(r.Socket, "unix:")):
		return errors.New("idle is for connections into the container whose client is not a UNIX socket")
	case r.Wait && !r.canWait():
		return errors.New("wait is for a named port on an address or an interface of the host")
	case r.Auto && r.Ports == PortRange{}:
		return errors.New("auto needs the ports of the host")
	case r.Share && r.free():
		return errors.New("a port can be shared only if it is named")
	}
	return nil
}

func (r Rule) checkListen() error {
	zone := r.Addr.Zone()
	for _, name := range []string{zone, r.Iface} {
		if name != "" && !validIface(name) {
			return fmt.Errorf("%q is not an interface name", name)
		}
	}
	switch {
	case r.Addr.Is4In6():
		return fmt.Errorf("%q: write it as the IPv4 address %s", r.Addr, r.Addr.Unmap())
	case r.Addr.IsMulticast():
		return fmt.Errorf("%q is a multicast address", r.Addr)
	case zone == "" && r.Iface == "" && r.Addr.Is6() && r.Addr.IsLinkLocalUnicast():
		return fmt.Errorf("%q is link-local and needs its interface: [%s%%IFACE]", r.Addr, r.Addr)
	case zone != "" && !r.Addr.IsLinkLocalUnicast():
		return fmt.Errorf("%q: only link-local addresses have a zone; an interface goes outside the brackets: [%s]%%%s", r.Addr, r.Addr.WithZone(""), zone)
	case zone != "" && r.Iface != "" && zone != r.Iface:
		return fmt.Errorf("%q: zone and interface differ", r.listenAddr())
	}
	return nil
}

func (r Rule) checkTarget() error {
	switch {
	case !r.Target.IsValid():
		return nil
	case r.Target.Is4In6() || r.Target.Zone() != "" || r.Target.IsMulticast() || r.Target.IsUnspecified():
		return fmt.Errorf("%q cannot be a target: give a plain unicast address", r.Target)
	case !r.Addr.IsValid():
		wildcard := netip.IPv6Unspecified()
		if r.Target.Is4() {
			wildcard = netip.IPv4Unspecified()
		}
		return fmt.Errorf("target %q needs an address of its family to listen on, such as %s", r.Target, bracketed(wildcard))
	case r.Target.Is4() != r.Addr.Is4():
		return fmt.Errorf("target %q and %q are of different families", r.Target, r.Addr)
	}
	return nil
}

// validIface reports whether the kernel allows name as that of an interface
// (dev_valid_name in net/core/dev.c), a terminal can show it, and it does not end
// the brackets that it may be in as a zone.
func validIface(name string) bool {
	const ifNameSize = 16 // IFNAMSIZ, the closing zero byte included
	return name != "" && len(name) < ifNameSize && utf8.ValidString(name) && name != "." && name != ".." &&
		!strings.ContainsFunc(name, func(c rune) bool { return c == '/' || c == ':' || c == ' ' || c == ']' || !unicode.IsPrint(c) })
}

// Overlaps reports whether the kernel would refuse one of a and b because of
// the other: same protocol and side, a port in common, an address in common,
// and the same interface or one of them without. Free ports never overlap.
func Overlaps(a, b Rule) bool {
	if a.Socket != "" || b.Socket != "" {
		return a.socketName() == b.socketName() && a.Proto == b.Proto
	}
	if a.Share && b.Share {
		return false
	}
	if a.Dir != b.Dir || a.Proto != b.Proto || a.Ports.overlap(b.Ports) == (PortRange{}) {
		return false
	}
	if da, db := a.device(), b.device(); da != "" && db != "" && da != db {
		return false
	}
	return addrsOverlap(a.Addr, b.Addr)
}

// addrsOverlap reports whether a socket can be reached at both a and b, in the
// sense of [Rule].Addr.
func addrsOverlap(a, b netip.Addr) bool {
	switch {
	case !a.IsValid() || !b.IsValid():
		return true
	case a.Is4() != b.Is4():
		return false
	}
	return a.IsUnspecified() || b.IsUnspecified() || a.WithZone("") == b.WithZone("")
}

// Validate checks each rule by itself, and that no two overlap. Its errors quote
// what is wrong and name the rules.
func Validate(rules []Rule) error {
	for _, r := range rules {
		if err := r.check(); err != nil {
			return fmt.Errorf("port rule %q: %w", r, err)
		}
	}
	if i, j, found := overlapping(rules); found {
		return overlapError(rules[i], rules[j])
	}
	return nil
}

// overlapping finds two of rules that overlap or are the same, the earlier one first.
// It takes n log n, as long as no port has many addresses, interfaces or shares.
func overlapping(rules []Rule) (i, j int, found bool) {
	var order []int
	for i, r := range rules {
		if !r.free() {
			order = append(order, i)
		}
	}
	slices.SortStableFunc(order, func(i, j int) int {
		a, b := rules[i], rules[j]
		return cmp.Or(cmp.Compare(a.socketName(), b.socketName()), cmp.Compare(a.Proto, b.Proto),
			cmp.Compare(a.Dir, b.Dir), cmp.Compare(a.Ports.First, b.Ports.First))
	})
	for n, i := range order {
		a := rules[i]
		for _, j := range order[n+1:] {
			b := rules[j]
			if b.socketName() != a.socketName() || b.Proto != a.Proto ||
				a.Socket == "" && (b.Dir != a.Dir || b.Ports.First > a.Ports.Last) {
				break
			}
			if Overlaps(a, b) || a == b && a.Share {
				return min(i, j), max(i, j), true
			}
		}
	}
	return 0, 0, false
}

func overlapError(a, b Rule) error {
	if a == b {
		return fmt.Errorf("port rule %q is given twice", a)
	}
	if a.Socket != "" {
		return fmt.Errorf("port rules %q and %q are for the same socket", a, b)
	}
	return fmt.Errorf("port rules %q and %q overlap: both listen on port %s/%s", a, b, a.Ports.overlap(b.Ports), a.Proto)
}
