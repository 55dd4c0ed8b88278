package netnsutil

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// nftTable is the name of our table, in the inet family. A table of that name
// is ours: it is replaced when a kernel path is opened and deleted by Close.
const nftTable = "gofwd"

// TCP flags, byte 13 of the header (RFC 9293, 3.1).
const (
	tcpFIN = 0x01
	tcpSYN = 0x02
	tcpRST = 0x04
	tcpACK = 0x10
)

// HoldSYN diverts TCP connections that the container begins to two transparent
// listeners in the namespace, all but their first packet: SYNs leave by the tap
// as before. A SYN that is written back into the tap reaches a listener, which
// must be at listen (127.0.0.1:PORT, [::1]:PORT; SO_MARK is [KernelPath.Mark],
// and the wildcard address would collide with clients whose own port is PORT).
// From then on the container's segments go over lo, and the tap sees none.
//
// As nft(8) would have it:
//
//	table inet gofwd {
//	  chain out {
//	    type route hook output priority mangle; policy accept;
//	    oifname TAP tcp flags & (syn|ack) != syn mark & MASK != TAP meta mark set mark & ~MASK | LOOP
//	  }
//	  chain pre {
//	    type filter hook prerouting priority mangle; policy accept;
//	    iifname TAP tcp flags & (syn|ack) != syn                           meta mark set mark & ~MASK | TAP accept
//	    iifname TAP tcp flags & (syn|ack) == syn fib saddr type != local   meta mark set mark & ~MASK | TAP accept
//	    iifname TAP tcp flags & (syn|ack) == syn nfproto ipv4              meta mark set mark & ~MASK | LOOP tproxy ip to LISTEN accept
//	    iifname lo  mark & MASK == LOOP tcp flags & (fin|syn|rst|ack) == ack nfproto ipv4 tproxy ip to LISTEN accept
//	    ... and the last two for ipv6
//	  }
//	}
//
// The first two rules of pre and the exception in out leave connections alone
// that the stack on the tap has with the container: whatever comes from there
// and is not a SYN of the container's own is marked TAP, an accepted socket
// inherits that mark (tcp_fwmark_accept) and so does a RST (fwmark_reflect).
// The last rule is for SYN cookies: with them the kernel forgets that the SYN
// was diverted, and the cookie's ACK must find the listener again.
func (k *KernelPath) HoldSYN(tap string, listen ...netip.AddrPort) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.closed {
		return fmt.Errorf("hold SYNs: %w", os.ErrClosed)
	}
	if k.nft == nil {
		return fmt.Errorf("hold SYNs: open nf_tables: %w", errors.ErrUnsupported)
	}
	// What comes in on the tap has the container's own address as source: a
	// martian, unless this is set. IPv6 does not mind.
	err := k.ns.Do(func() (err error) {
		k.acceptLocal, err = openSysctl("ipv4/conf/" + tap + "/accept_local")
		if err != nil {
			return err
		}
		return k.acceptLocal.set()
	})
	if err != nil {
		return fmt.Errorf("hold SYNs: %w", err)
	}
	want := k.wanted
	want.tap, want.listen = tap, listen
	if err := k.load(want); err != nil {
		return fmt.Errorf("hold SYNs: load nftables rules: %w", err)
	}
	return nil
}

// nftRules are the rules of our table. Without listen and behind there is no table.
type nftRules struct {
	tap    string
	listen []netip.AddrPort // of HoldSYN
	behind bool             // ServeBehind
}

// table is a table in the making.
type table struct {
	*nftables.Table
	c     *nftables.Conn
	rules map[string]int // how many, by chain
}

func (t *table) chain(name string, typ nftables.ChainType, hook *nftables.ChainHook) *nftables.Chain {
	accept := nftables.ChainPolicyAccept
	t.rules[name] = 0
	return t.c.AddChain(&nftables.Chain{
		Name: name, Table: t.Table, Policy: &accept, Type: typ, Hooknum: hook, Priority: nftables.ChainPriorityMangle,
	})
}

func (t *table) rule(c *nftables.Chain, parts ...[]expr.Any) {
	t.rules[c.Name]++
	t.c.AddRule(&nftables.Rule{Table: t.Table, Chain: c, Exprs: slices.Concat(parts...)})
}

// load loads rules in one transaction, in place of those that are there: deleting
// what does not exist is an error, so the table is added first. After an error
// everything is as it was. k.mu is locked.
func (k *KernelPath) load(want nftRules) error {
	t := &table{
		Table: &nftables.Table{Name: nftTable, Family: nftables.TableFamilyINet}, c: k.nft, rules: make(map[string]int),
	}
	k.nft.AddTable(t.Table)
	k.nft.DelTable(t.Table)
	k.nft.AddTable(t.Table)
	if len(want.listen) > 0 {
		k.addHold(t, want)
	}
	if want.behind {
		k.addBehind(t, want)
	}
	if err := k.nft.Flush(); err != nil {
		return err
	}
	k.wanted, k.loaded = want, t.rules
	return nil
}

// isLoaded reports whether the rules that were loaded are still there. k.mu is
// locked.
func (k *KernelPath) isLoaded() (bool, error) {
	for chain, n := range k.loaded {
		t := &nftables.Table{Name: nftTable, Family: nftables.TableFamilyINet}
		rules, err := k.nft.GetRules(t, &nftables.Chain{Name: chain, Table: t})
		if err != nil && !errors.Is(err, unix.ENOENT) {
			return false, err
		}
		if len(rules) < n {
			return false, nil
		}
	}
	return true, nil
}

// addHold adds the rules of HoldSYN.
func (k *KernelPath) addHold(t *table, want nftRules) {
	out := t.chain("out", nftables.ChainTypeRoute, nftables.ChainHookOutput)
	pre := t.chain("pre", nftables.ChainTypeFilter, nftables.ChainHookPrerouting)
	oif, iif, lo := ifname(expr.MetaKeyOIFNAME, want.tap), ifname(expr.MetaKeyIIFNAME, want.tap), ifname(expr.MetaKeyIIFNAME, "lo")
	syn := tcpFlags(tcpSYN|tcpACK, expr.CmpOpEq, tcpSYN)
	notSYN := tcpFlags(tcpSYN|tcpACK, expr.CmpOpNeq, tcpSYN)
	onlyACK := tcpFlags(tcpFIN|tcpSYN|tcpRST|tcpACK, expr.CmpOpEq, tcpACK)
	m := k.marks

	t.rule(out, oif, notSYN, m.match(expr.CmpOpNeq, m.tap), m.set(m.loop))
	t.rule(pre, iif, notSYN, m.set(m.tap), verdictAccept())
	t.rule(pre, iif, syn, sourceNotLocal(), m.set(m.tap), verdictAccept())
	for _, l := range want.listen {
		t.rule(pre, iif, syn, nfproto(l), m.set(m.loop), tproxy(l), verdictAccept())
	}
	for _, l := range want.listen {
		t.rule(pre, lo, m.match(expr.CmpOpEq, m.loop), onlyACK, nfproto(l), tproxy(l), verdictAccept())
	}
}

// deleteTable deletes our table, if there is one.
func (k *KernelPath) deleteTable() error {
	if k.nft == nil {
		return nil
	}
	t := &nftables.Table{Name: nftTable, Family: nftables.TableFamilyINet}
	k.nft.AddTable(t)
	k.nft.DelTable(t)
	if err := k.nft.Flush(); err != nil {
		return fmt.Errorf("delete nftables table: %w", err)
	}
	return nil
}

// openNFT opens a lasting connection to nf_tables in ns. It is not made by
// nftables.WithNetNSFd, which fails where the thread may not go back, as for an
// ordinary user's gofwd under Podman.
func (ns *NS) openNFT() (c *nftables.Conn, err error) {
	err = ns.Do(func() error {
		c, err = nftables.New(nftables.AsLasting())
		return err
	})
	if err != nil {
		return nil, err
	}
	// A kernel without nf_tables answers a whole transaction with one error
	// (nfnetlink_rcv_batch), and Flush would wait for ever for one to each message.
	if _, err := c.ListTables(); err != nil {
		_ = c.CloseLasting()
		return nil, fmt.Errorf("ask nf_tables: %w", err)
	}
	return c, nil
}

// ProbeNFT reports what the kernel lacks for [KernelPath.HoldSYN]: errNFT is
// nil if it has nf_tables with route chains, errTProxy if it has the tproxy
// expression too. The transactions leave nothing behind.
func (ns *NS) ProbeNFT() (errNFT, errTProxy error) {
	try := func(exprs []expr.Any) error {
		c, err := ns.openNFT()
		if err != nil {
			return err
		}
		defer func() { _ = c.CloseLasting() }()
		t := c.AddTable(&nftables.Table{Name: nftTable + "-probe", Family: nftables.TableFamilyINet})
		c.AddChain(&nftables.Chain{
			Name: "out", Table: t, Type: nftables.ChainTypeRoute,
			Hooknum: nftables.ChainHookOutput, Priority: nftables.ChainPriorityMangle,
		})
		pre := c.AddChain(&nftables.Chain{
			Name: "pre", Table: t, Type: nftables.ChainTypeFilter,
			Hooknum: nftables.ChainHookPrerouting, Priority: nftables.ChainPriorityMangle,
		})
		c.AddRule(&nftables.Rule{Table: t, Chain: pre, Exprs: exprs})
		c.DelTable(t)
		return c.Flush()
	}
	if err := try(sourceNotLocal()); err != nil {
		return err, err
	}
	l := netip.MustParseAddrPort("127.0.0.1:1")
	return nil, try(append(append(tcpFlags(tcpSYN, expr.CmpOpEq, tcpSYN), nfproto(l)...), tproxy(l)...))
}

// match compares the bits of the mark that are ours.
func (m marks) match(op expr.CmpOp, value uint32) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyMARK, Register: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: word(m.mask), Xor: word(0)},
		&expr.Cmp{Op: op, Register: 1, Data: word(value)},
	}
}

// set sets the bits of the mark that are ours.
func (m marks) set(value uint32) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyMARK, Register: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: word(^m.mask), Xor: word(value)},
		&expr.Meta{Key: expr.MetaKeyMARK, SourceRegister: true, Register: 1},
	}
}

func ifname(key expr.MetaKey, name string) []expr.Any {
	var b [unix.IFNAMSIZ]byte
	copy(b[:], name)
	return []expr.Any{
		&expr.Meta{Key: key, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: b[:]},
	}
}

func tcpFlags(mask byte, op expr.CmpOp, value byte) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.IPPROTO_TCP}},
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 13, Len: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 1, Mask: []byte{mask}, Xor: []byte{0}},
		&expr.Cmp{Op: op, Register: 1, Data: []byte{value}},
	}
}

func sourceNotLocal() []expr.Any {
	return []expr.Any{
		&expr.Fib{Register: 1, FlagSADDR: true, ResultADDRTYPE: true},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: word(unix.RTN_LOCAL)},
	}
}

func nfproto(l netip.AddrPort) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{nfprotoOf(l)}},
	}
}

func tproxy(to netip.AddrPort) []expr.Any {
	return []expr.Any{
		&expr.Immediate{Register: 1, Data: to.Addr().AsSlice()},
		&expr.Immediate{Register: 2, Data: binaryutil.BigEndian.PutUint16(to.Port())},
		&expr.TProxy{Family: nfprotoOf(to), TableFamily: unix.NFPROTO_INET, RegAddr: 1, RegPort: 2},
	}
}

func nfprotoOf(l netip.AddrPort) byte {
	if l.Addr().Is4() {
		return unix.NFPROTO_IPV4
	}
	return unix.NFPROTO_IPV6
}

func verdictAccept() []expr.Any { return []expr.Any{&expr.Verdict{Kind: expr.VerdictAccept}} }

// word is a register of 32 bits: host byte order.
func word(v uint32) []byte { return binary.NativeEndian.AppendUint32(nil, v) }
