package netnsutil

import (
	"errors"
	"fmt"
	"net/netip"
	"os"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// ServeBehind lets transparent sockets without a mark speak with hosts behind the
// namespace: containers on a bridge in it. The SYN leaves by the route to the host,
// and what comes back finds the socket. As nft(8) would have it:
//
//	table inet gofwd {
//	  chain behind {
//	    type filter hook prerouting priority mangle; policy accept;
//	    iifname != TAP iifname != lo tcp flags & (syn|ack) != syn socket transparent 1 meta mark set mark & ~MASK | LOOP
//	  }
//	}
//
// The mark makes what is sent to a client's address local, for the socket that the
// kernel has looked up (nft_socket, Linux 4.18; of IPv6 as of IPv4).
func (k *KernelPath) ServeBehind(tap string) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.nft == nil {
		return fmt.Errorf("serve hosts behind the namespace: open nf_tables: %w", errors.ErrUnsupported)
	}
	if k.closed {
		return fmt.Errorf("serve hosts behind the namespace: %w", os.ErrClosed)
	}
	want := k.wanted
	want.tap, want.behind = tap, true
	if err := k.load(want); err != nil {
		return fmt.Errorf("serve hosts behind the namespace: load nftables rules: %w", err)
	}
	tapLink, err := k.h.LinkByName(tap)
	if err != nil {
		return fmt.Errorf("serve hosts behind the namespace: find %s: %w", tap, err)
	}
	k.tap = tapLink.Attrs().Index
	return nil
}

// addBehind adds the rule of ServeBehind.
func (k *KernelPath) addBehind(t *table, want nftRules) {
	c := t.chain("behind", nftables.ChainTypeFilter, nftables.ChainHookPrerouting)
	t.rule(
		c, otherIface(want.tap), otherIface("lo"), tcpFlags(tcpSYN|tcpACK, expr.CmpOpNeq, tcpSYN),
		[]expr.Any{
			&expr.Socket{Key: expr.SocketKeyTransparent, Register: 1},
			&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{1}},
		},
		k.marks.set(k.marks.loop),
	)
}

// IsBehind reports whether the namespace has a route to addr that leads neither to
// itself nor to the tap. It is false without [KernelPath.ServeBehind].
func (k *KernelPath) IsBehind(addr netip.Addr) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.closed || k.tap == 0 || !k.has(familyOf(addr)) {
		return false
	}
	routes, err := k.h.RouteGet(addr.AsSlice())
	if err != nil || len(routes) != 1 {
		return false
	}
	r := routes[0]
	return r.Type == unix.RTN_UNICAST && r.LinkIndex != k.tap && r.LinkIndex != k.lo
}

func familyOf(a netip.Addr) int {
	if a.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

// otherIface is iifname != NAME.
func otherIface(name string) []expr.Any {
	e := ifname(expr.MetaKeyIIFNAME, name)
	e[1].(*expr.Cmp).Op = expr.CmpOpNeq
	return e
}
