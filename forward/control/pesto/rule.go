package pesto

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"

	"github.com/gofwd/gofwd/forward"
)

const (
	tcp, udp = 6, 17 // RFC 9293, RFC 768
	// loopback is the interface that all rules of the table Splice are bound
	// to, in the namespace.
	loopback = "lo"
)

// FromForward returns r as a rule on the wire, and the number of its table. It
// reports false for a rule that the protocol has no words for: it can be neither
// shown nor named.
func FromForward(r forward.Rule) (PIF, Rule, bool) {
	plain := forward.Rule{
		Dir: r.Dir, Proto: r.Proto, Addr: r.Addr, Iface: r.Iface, Ports: r.Ports,
		Target: r.Target, TargetPorts: r.TargetPorts, Weak: r.Weak, Auto: r.Auto,
	}
	if r != plain || r.Ports == (forward.PortRange{}) {
		return 0, Rule{}, false
	}
	pif, iface := Host, r.Iface
	if r.Dir == forward.Out {
		pif, iface = Splice, loopback
	}
	if iface == "" {
		iface = r.Addr.Zone() // which binds to the interface as well
	}
	w := Rule{First: r.Ports.First, Last: r.Ports.Last, To: r.TargetPorts.First, Proto: tcp}
	if r.Proto == forward.UDP {
		w.Proto = udp
	}
	if len(iface) >= len(w.Iface) {
		return 0, Rule{}, false
	}
	copy(w.Iface[:], iface)
	if r.Addr.IsValid() {
		w.Addr = r.Addr.As16()
	} else {
		w.Flags |= DualStack
	}
	if r.Target.IsValid() {
		w.Target = r.Target.As16()
	}
	if r.Weak {
		w.Flags |= Weak
	}
	if r.Auto {
		w.Flags |= Scan
	}
	return pif, w, true
}

// Forward returns what a rule of table pif means. An error says what is wrong
// with it, as far as [forward.Validate] would not.
func (r Rule) Forward(pif PIF) (forward.Rule, error) {
	f := forward.Rule{
		Ports:       forward.PortRange{First: r.First, Last: r.Last},
		TargetPorts: forward.PortRange{First: r.To, Last: r.To + (r.Last - r.First)},
		Weak:        r.Flags&Weak != 0,
		Auto:        r.Flags&Scan != 0,
	}
	switch r.Proto {
	case tcp:
		f.Proto = forward.TCP
	case udp:
		f.Proto = forward.UDP
	default:
		return f, fmt.Errorf("rule %s: %d is neither TCP nor UDP", r, r.Proto)
	}
	iface, rest, ends := bytes.Cut(r.Iface[:], []byte{0})
	switch {
	case r.Flags&^(DualStack|Weak|Scan) != 0:
		return f, fmt.Errorf("rule %s: unknown flags %#x", r, uint8(r.Flags))
	case r.First == 0:
		return f, fmt.Errorf("rule %s: port 0 cannot be forwarded", r)
	case !ends || len(bytes.Trim(rest, "\x00")) > 0:
		return f, fmt.Errorf("rule %s: the name of the interface does not end in zero bytes", r)
	case r.Flags&DualStack != 0 && r.Addr != [16]byte{}:
		return f, fmt.Errorf("rule %s: an address, and both families", r)
	}
	if r.Target != [16]byte{} {
		f.Target = netip.AddrFrom16(r.Target).Unmap()
	}
	switch pif {
	case Host:
		f.Dir, f.Iface = forward.In, string(iface)
		if r.Flags&DualStack == 0 {
			f.Addr = netip.AddrFrom16(r.Addr).Unmap()
		}
		return f, nil
	case Splice:
		f.Dir = forward.Out
		if r.Flags&DualStack == 0 || string(iface) != loopback {
			return f, fmt.Errorf("rule %s: it does not listen on the container's loopback", r)
		}
		return f, nil
	}
	return f, fmt.Errorf("there is no table %d", pif)
}

// String returns the rule as pesto(1) shows it: "TCP [*]:8080  =>  10.0.0.5:80".
func (r Rule) String() string {
	var b []byte
	switch r.Proto {
	case tcp:
		b = append(b, "TCP"...)
	case udp:
		b = append(b, "UDP"...)
	default:
		b = fmt.Appendf(b, "protocol %d", r.Proto)
	}
	if r.Flags&DualStack != 0 {
		b = append(b, " [*]"...)
	} else {
		b = fmt.Appendf(b, " [%s]", netip.AddrFrom16(r.Addr).Unmap())
	}
	if iface, _, _ := bytes.Cut(r.Iface[:], []byte{0}); len(iface) > 0 {
		b = append(append(b, '%'), printable(iface)...)
	}
	b = append(append(append(b, ':'), ports(r.First, r.Last)...), "  =>  "...)
	if r.Target != [16]byte{} {
		target := netip.AddrPortFrom(netip.AddrFrom16(r.Target).Unmap(), r.To).String()
		b = append(b, target...)
		if last := r.To + (r.Last - r.First); last != r.To {
			b = append(append(b, '-'), strconv.Itoa(int(last))...)
		}
	} else {
		b = append(b, ports(r.To, r.To+(r.Last-r.First))...)
	}
	if r.Flags&Weak != 0 {
		b = append(b, "  (best effort)"...)
	}
	if r.Flags&Scan != 0 {
		b = append(b, "  (auto-scan)"...)
	}
	return string(b)
}

// printable is a name as a terminal can show it.
func printable(name []byte) string {
	q := strconv.QuoteToASCII(string(name))
	return q[1 : len(q)-1]
}

func ports(first, last uint16) string {
	return forward.PortRange{First: first, Last: last}.String()
}

// ErrNoRule is about a rule that is not in a table.
var ErrNoRule = errors.New("there is no such rule")

// Add adds a rule, unless it is there already. It refuses one that overlaps
// another, in the sense of [forward.Overlaps].
func (t *Table) Add(r Rule) error {
	if slices.Contains(t.Rules, r) {
		return nil
	}
	if other, found := t.overlapping(r); found {
		return fmt.Errorf("add %s: it overlaps %s", r, other)
	}
	t.Rules = append(t.Rules, r)
	return nil
}

// Delete removes a rule. If it isn't there the error wraps [ErrNoRule], but not if
// another is that overlaps it.
func (t *Table) Delete(r Rule) error {
	if i := slices.Index(t.Rules, r); i >= 0 {
		t.Rules = slices.Delete(t.Rules, i, i+1)
		return nil
	}
	if other, found := t.overlapping(r); found {
		return fmt.Errorf("delete %s: the rule that is there is %s", r, other)
	}
	return fmt.Errorf("delete %s: %w", r, ErrNoRule)
}

func (t *Table) overlapping(r Rule) (Rule, bool) {
	f, err := r.Forward(t.PIF)
	i := slices.IndexFunc(t.Rules, func(other Rule) bool {
		o, otherErr := other.Forward(t.PIF)
		return err == nil && otherErr == nil && forward.Overlaps(f, o)
	})
	if i < 0 {
		return Rule{}, false
	}
	return t.Rules[i], true
}
