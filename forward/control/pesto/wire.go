package pesto

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// magic begins what the server sends.
var magic = [8]byte{'b', 'a', 's', 'i', 'l', ':', 's'}

const (
	version = 2
	// maxRules bounds a table; pasta's has 255 rules, ours as many as there
	// are ports of both protocols.
	maxRules = 2 << 16
	// maxTables bounds their number; the largest in use is 3.
	maxTables = 8
)

// hello is the beginning of what the server sends.
type hello struct {
	Magic                         [8]byte
	Version, NameSize, IfNameSize uint32
}

// head is the beginning of a table from the server, after its number.
type head struct {
	Name  [128]byte
	Caps  Caps
	Count uint32
}

// Rule is a forward as it is on the wire. Rules are comparable, and the same
// forward is always the same Rule.
type Rule struct {
	// Addr and Target are IPv6 addresses, those of IPv4 mapped into it; zero
	// is any, or the namespace's own.
	Addr, Target [16]byte
	// Iface ends in a zero byte.
	Iface [16]byte
	// Ports First to Last go to To and those that follow it.
	First, Last, To uint16
	Proto           uint8 // as in IP
	Flags           Flags
}

// Flags say more about a [Rule].
type Flags uint8

const (
	// DualStack listens on all addresses of both families.
	DualStack Flags = 1 << iota
	// Weak is [forward.Rule].Weak.
	Weak
	// Scan is [forward.Rule].Auto.
	Scan
)

// Caps are what the rules of a table may be about.
type Caps uint32

// The capabilities.
const (
	CapIPv4 Caps = 1 << iota
	CapIPv6
	CapTCP
	CapUDP
	CapScan
	CapIface

	allCaps = CapIPv4 | CapIPv6 | CapTCP | CapUDP | CapScan | CapIface
)

// PIF is the number of a table: the interface, in pasta's sense, that its
// listeners belong to.
type PIF uint8

const (
	// Host is the table of forwards into the namespace.
	Host PIF = 1
	// Splice is that of forwards from its loopback to the host's.
	Splice PIF = 3
)

// Table is the forwards of one direction.
type Table struct {
	PIF PIF
	// Name and Caps are known of tables that came from a server.
	Name  string
	Caps  Caps
	Rules []Rule
}

// writeTables is what a server begins with.
func writeTables(w io.Writer, tables []Table) error {
	b := bufio.NewWriter(w)
	put(b, hello{magic, version, uint32(len(head{}.Name)), uint32(len(Rule{}.Iface))})
	for _, t := range tables {
		h := head{Caps: t.Caps, Count: uint32(len(t.Rules))}
		copy(h.Name[:len(h.Name)-1], t.Name)
		put(b, t.PIF)
		put(b, h)
		put(b, t.Rules)
	}
	put(b, PIF(0))
	return b.Flush()
}

// readTables reads what writeTables writes.
func readTables(r io.Reader) ([]Table, error) {
	var is hello
	if err := binary.Read(r, binary.BigEndian, &is); err != nil {
		return nil, cutShort(err)
	}
	switch {
	case is.Magic != magic:
		return nil, errors.New("it does not speak the protocol of pasta")
	case is.Version != version:
		return nil, fmt.Errorf("it speaks version %d of pasta's protocol, not %d", is.Version, version)
	case is.NameSize != uint32(len(head{}.Name)) || is.IfNameSize != uint32(len(Rule{}.Iface)):
		return nil, fmt.Errorf("its names have other sizes, %d and %d", is.NameSize, is.IfNameSize)
	}
	return readEach(r, func(t *Table) (uint32, error) {
		var h head
		err := binary.Read(r, binary.BigEndian, &h)
		name, _, _ := bytes.Cut(h.Name[:], []byte{0})
		t.Name, t.Caps = printable(name), h.Caps
		return h.Count, err
	})
}

// writeRules is a client's answer.
func writeRules(w io.Writer, tables []Table) error {
	b := bufio.NewWriter(w)
	for _, t := range tables {
		put(b, t.PIF)
		put(b, uint32(len(t.Rules)))
		put(b, t.Rules)
	}
	put(b, PIF(0))
	return b.Flush()
}

// readRules reads what writeRules writes. Where nothing comes the error is
// [io.EOF].
func readRules(r io.Reader) ([]Table, error) {
	return readEach(r, func(*Table) (count uint32, err error) {
		err = binary.Read(r, binary.BigEndian, &count)
		return count, err
	})
}

// readEach reads tables until a zero byte stands for the number of one. begin
// reads what is between a number and the rules, and returns how many follow.
func readEach(r io.Reader, begin func(*Table) (uint32, error)) (tables []Table, err error) {
	for {
		var t Table
		if err := binary.Read(r, binary.BigEndian, &t.PIF); err != nil {
			if len(tables) == 0 && errors.Is(err, io.EOF) {
				return nil, io.EOF
			}
			return nil, cutShort(err)
		}
		if t.PIF == 0 {
			return tables, nil
		}
		if len(tables) == maxTables {
			return nil, errors.New("too many tables")
		}
		count, err := begin(&t)
		if err != nil {
			return nil, cutShort(err)
		}
		if count > maxRules {
			return nil, fmt.Errorf("%d rules in a table, of at most %d", count, maxRules)
		}
		// No faster than they come: a count costs nothing.
		for range count {
			var rule Rule
			if err := binary.Read(r, binary.BigEndian, &rule); err != nil {
				return nil, cutShort(err)
			}
			t.Rules = append(t.Rules, rule)
		}
		tables = append(tables, t)
	}
}

// cutShort is the error of something that ended too early.
func cutShort(err error) error {
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return fmt.Errorf("read tables: %w", err)
}

// put writes a value of fixed size; Flush returns its errors.
func put(b *bufio.Writer, v any) { _ = binary.Write(b, binary.BigEndian, v) }
