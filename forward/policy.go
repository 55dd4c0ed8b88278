package forward

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"
)

// Destination is a set of destinations of what the container begins itself.
type Destination struct {
	// Class is "host" for the host's own addresses, "loopback" for its
	// loopback, by whatever name the container has for them, and "" for
	// Prefix.
	Class string
	// Prefix is a set of addresses, as the container names them or as they
	// are on the host; the zero Prefix is all.
	Prefix netip.Prefix
	// Ports are the ports meant; zero is all, and the only ones for ping.
	Ports PortRange
}

// The classes of [Destination].
const (
	ClassHost     = "host"
	ClassLoopback = "loopback"
)

// ParseDestination parses PREFIX[:PORTS], where PREFIX is an address, a prefix, *,
// host or loopback, and PORTS a port or a range. An IPv6 PREFIX stands in brackets
// if PORTS follow.
func ParseDestination(s string) (d Destination, err error) {
	where, ports := s, ""
	if rest, bracketed := strings.CutPrefix(s, "["); bracketed {
		var closed bool
		if where, ports, closed = strings.Cut(rest, "]"); !closed || ports != "" && ports[0] != ':' {
			return d, fmt.Errorf("destination %q: give [PREFIX] or [PREFIX]:PORTS", s)
		}
	} else if strings.Count(s, ":") == 1 {
		i := strings.IndexByte(s, ':')
		where, ports = s[:i], s[i:]
	}
	if ports != "" {
		if d.Ports, err = parseRange(ports[1:]); err != nil {
			return d, fmt.Errorf("destination %q: %w", s, err)
		}
	}
	switch where {
	case ClassHost, ClassLoopback:
		d.Class = where
	case "*":
	default:
		p, err := ParsePrefixes(where)
		if err != nil || strings.Contains(where, "+") {
			return d, fmt.Errorf("destination %q: %q is not an address, a prefix, *, host or loopback", s, where)
		}
		d.Prefix = netip.MustParsePrefix(string(p))
	}
	return d, nil
}

// String returns what ParseDestination parses.
func (d Destination) String() string {
	where := d.Class
	switch {
	case where != "":
	case !d.Prefix.IsValid():
		where = "*"
	default:
		where = d.Prefix.String()
	}
	if d.Ports == (PortRange{}) {
		return where
	}
	if d.Prefix.Addr().Is6() {
		where = "[" + where + "]"
	}
	return where + ":" + d.Ports.String()
}

// check says what is wrong with d.
func (d Destination) check() error {
	switch {
	case d.Class != "" && d.Class != ClassHost && d.Class != ClassLoopback:
		return fmt.Errorf("destination class %q is neither host nor loopback", d.Class)
	case d.Class != "" && d.Prefix.IsValid():
		return errors.New("a destination is a class or a prefix")
	case d.Ports != PortRange{}:
		return d.Ports.check()
	}
	return nil
}

// policy says which destinations the container may speak to. The nil policy is all.
type policy struct {
	allow, deny []Destination
	local       *hostAddrs
}

// newPolicy returns the policy of a Config.
func newPolicy(allow, deny []Destination, local *hostAddrs) (*policy, error) {
	for _, d := range slices.Concat(allow, deny) {
		if err := d.check(); err != nil {
			return nil, err
		}
	}
	if len(allow) == 0 && len(deny) == 0 {
		return nil, nil
	}
	return &policy{allow: allow, deny: deny, local: local}, nil
}

// allows reports whether the container may speak to what it calls dst, and the host
// to. What is allowed by name is not denied by another; what is neither is denied
// only if nothing is denied by name.
func (p *policy) allows(dst, to netip.AddrPort) bool {
	switch {
	case p == nil, p.names(p.allow, dst, to):
		return true
	case len(p.deny) == 0:
		return false
	}
	return !p.names(p.deny, dst, to)
}

func (p *policy) names(list []Destination, dst, to netip.AddrPort) bool {
	return slices.ContainsFunc(list, func(d Destination) bool {
		if d.Ports != (PortRange{}) && (to.Port() < d.Ports.First || to.Port() > d.Ports.Last) {
			return false
		}
		switch {
		case d.Class == ClassLoopback:
			return to.Addr().IsLoopback()
		case d.Class == ClassHost:
			return !to.Addr().IsLoopback() && p.local.has(to.Addr())
		case !d.Prefix.IsValid():
			return true
		}
		return d.Prefix.Contains(dst.Addr().Unmap().WithZone("")) || d.Prefix.Contains(to.Addr().WithZone(""))
	})
}

// hostAddrs are the host's own addresses.
type hostAddrs struct {
	read func() ([]netip.Prefix, error)

	mu    sync.Mutex // guards the following fields
	addrs []netip.Prefix
	asked time.Time
}

// localAge is for how long the host's addresses are taken for true.
const localAge = time.Second

// has reports whether addr is one of the host's own.
func (h *hostAddrs) has(addr netip.Addr) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if time.Since(h.asked) > localAge {
		if addrs, err := h.read(); err == nil {
			h.addrs, h.asked = addrs, time.Now()
		}
	}
	return slices.ContainsFunc(h.addrs, func(l netip.Prefix) bool { return l.Addr() == addr.WithZone("") })
}
