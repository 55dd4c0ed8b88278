package netnsutil

import (
	"encoding/binary"
	"math/bits"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/xt"
)

// marks are the two values that the kernel path gives to packets, and the bits
// that they occupy; the rest of a packet's mark stays as it is.
type marks struct {
	mask uint32
	loop uint32 // goes to a socket in the namespace, by the rule
	tap  uint32 // belongs to the stack on the tap, and must not be diverted
}

// markUse collects the mark bits that others use.
type markUse struct{ bits uint32 }

// add notes that somebody compares with or sets value under mask. A mask of all
// ones means a whole number (wg-quick's 51820), not an interest in every bit.
func (u *markUse) add(value, mask uint32) {
	u.bits |= value
	if mask != ^uint32(0) {
		u.bits |= mask
	}
}

// free returns two neighbouring bits that nobody uses. The search starts with
// those that have no well-known user (https://github.com/fwmark/registry).
func (u markUse) free() (marks, bool) {
	for _, shift := range []int{26, 24, 28, 30, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0} {
		if m := uint32(3) << shift; u.bits&m == 0 {
			return marks{mask: m, loop: 1 << shift, tap: 2 << shift}, true
		}
	}
	return marks{}, false
}

// scanNFT adds the marks of everybody's nftables rules, also of those that
// iptables-nft wrote. A namespace without nf_tables has none.
func (k *KernelPath) scanNFT(u *markUse) {
	if k.nft == nil {
		return
	}
	chains, err := k.nft.ListChains()
	if err != nil {
		return
	}
	for _, c := range chains {
		rules, err := k.nft.GetRules(c.Table, c)
		if err != nil {
			continue // deleted meanwhile
		}
		for _, r := range rules {
			u.addRule(r)
		}
	}
}

// addRule adds the constants of a rule that reads or writes a mark. Which of
// them belong to the mark is not worth following: at worst a few more bits are
// avoided.
func (u *markUse) addRule(r *nftables.Rule) {
	touchesMark := false
	for _, e := range r.Exprs {
		switch e := e.(type) {
		case *expr.Meta:
			touchesMark = touchesMark || e.Key == expr.MetaKeyMARK
		case *expr.Ct:
			touchesMark = touchesMark || e.Key == expr.CtKeyMARK
		case *expr.Match:
			if e.Name == "mark" || e.Name == "connmark" {
				u.addXT(e.Info)
			}
		case *expr.Target:
			if e.Name == "MARK" || e.Name == "CONNMARK" {
				u.addXT(e.Info)
			}
		}
	}
	if !touchesMark {
		return
	}
	for _, e := range r.Exprs {
		switch e := e.(type) {
		case *expr.Cmp:
			u.addWord(e.Data, ^uint32(0))
		case *expr.Immediate:
			u.addWord(e.Data, ^uint32(0))
		case *expr.Bitwise:
			// reg & mask ^ xor: in a match the mask is of interest, when a
			// field is set its complement. A mask that keeps most bits is
			// of the latter kind.
			if len(e.Mask) == 4 && len(e.Xor) == 4 {
				u.bits |= fewerBits(binary.NativeEndian.Uint32(e.Mask)) | binary.NativeEndian.Uint32(e.Xor)
			}
		}
	}
}

func (u *markUse) addWord(b []byte, mask uint32) {
	if len(b) == 4 {
		u.add(binary.NativeEndian.Uint32(b), mask)
	}
}

// addXT adds value and mask of an x_tables match or target: the structs of
// xt_mark and xt_connmark all begin with the two (linux/netfilter/xt_mark.h).
func (u *markUse) addXT(info xt.InfoAny) {
	if b, ok := info.(*xt.Unknown); ok && len(*b) >= 8 {
		u.add(binary.NativeEndian.Uint32((*b)[:4]), binary.NativeEndian.Uint32((*b)[4:8]))
	}
}

// fewerBits returns m or its complement, whichever has fewer bits set.
func fewerBits(m uint32) uint32 {
	if bits.OnesCount32(m) > 16 {
		return ^m
	}
	return m
}
