package forward

import (
	"cmp"
	"net/netip"
	"slices"
)

// conflicting reports whether any two of rules overlap, or are the same. It takes
// n log n, also where many have one port, none or a socket; to find out which two it
// is takes n².
func conflicting(rules []Rule) bool {
	order := make([]*Rule, len(rules))
	for i := range rules {
		order[i] = &rules[i]
	}
	slices.SortFunc(order, func(a, b *Rule) int { return cmp.Compare(a.Ports.First, b.Ports.First) })
	type socket struct {
		proto Proto
		name  string
	}
	sockets := make(map[socket]bool)
	shared := make(map[Rule]bool)
	last, lastShared := make(map[spot]uint16), make(map[spot]uint16) // of the ports of the rules so far
	for _, r := range order {
		if r.Socket != "" {
			s := socket{r.Proto, r.socketName()}
			if sockets[s] {
				return true
			}
			sockets[s] = true
			continue
		}
		if r.free() {
			continue
		}
		is, meets := r.spots()
		for _, s := range meets {
			if last[s] >= r.Ports.First || !r.Share && lastShared[s] >= r.Ports.First {
				return true
			}
		}
		into := last
		if r.Share {
			if shared[*r] {
				return true
			}
			shared[*r], into = true, lastShared
		}
		for _, s := range is {
			into[s] = max(into[s], r.Ports.Last)
		}
	}
	return false
}

// spot is a place to listen at, or many: of addresses and devices a rule doesn't have.
type spot struct {
	dir    Dir
	proto  Proto
	device string
	addr   netip.Addr
}

// What no rule has, for all that rules may have.
const anyDevice = "/"

var (
	any4    = netip.MustParseAddr("::ffff:0.0.0.4")
	any6    = netip.MustParseAddr("::ffff:0.0.0.6")
	anyAddr = netip.MustParseAddr("::ffff:0.0.0.0")
)

// spots returns where r is, and where another one is that overlaps it: at least at
// one of those.
func (r *Rule) spots() (is, meets [6]spot) {
	everywhere, addr := netip.Addr{}, r.Addr.WithZone("")
	family, wildcard := any6, netip.IPv6Unspecified()
	if addr.Is4() {
		family, wildcard = any4, netip.IPv4Unspecified()
	}
	isAddrs, meetsAddrs := [3]netip.Addr{addr, family, anyAddr}, [3]netip.Addr{addr, wildcard, everywhere}
	switch {
	case !addr.IsValid():
		isAddrs[1], meetsAddrs = anyAddr, [3]netip.Addr{anyAddr, anyAddr, anyAddr}
	case addr.IsUnspecified():
		meetsAddrs[0] = family
	}
	isDevices, meetsDevices := [2]string{r.device(), anyDevice}, [2]string{r.device(), ""}
	if r.device() == "" {
		meetsDevices = [2]string{anyDevice, anyDevice}
	}
	for i := range is {
		is[i] = spot{r.Dir, r.Proto, isDevices[i%2], isAddrs[i/2]}
		meets[i] = spot{r.Dir, r.Proto, meetsDevices[i%2], meetsAddrs[i/2]}
	}
	return is, meets
}
