package stack

import "sync/atomic"

// Stats is a snapshot of what went over the container's link, seen from the
// host: received is what the container sent.
type Stats struct {
	RxFrames    uint64 `json:"rx_frames"`
	RxBytes     uint64 `json:"rx_bytes"`
	TxFrames    uint64 `json:"tx_frames"`
	TxBytes     uint64 `json:"tx_bytes"`
	TxErrors    uint64 `json:"tx_errors"`
	RxDatagrams uint64 `json:"rx_datagrams"` // UDP, a super-frame counts once
	// Dropped frames, by reason.
	Malformed  uint64 `json:"malformed"`
	Checksum   uint64 `json:"checksum"`
	ForeignMAC uint64 `json:"foreign_mac"`
	Unknown    uint64 `json:"unknown"` // of a protocol that is not spoken here
	Fragments  uint64 `json:"fragments"`
	SYNs       uint64 `json:"syns"` // beyond the number that may be held
	// Capture counts frames that a capture was too slow to take.
	Capture uint64 `json:"capture"`
}

// counters are the live numbers behind Stats.
type counters struct {
	rxFrames, rxBytes, txFrames, txBytes, txErrors, rxDatagrams  atomic.Uint64
	malformed, checksum, foreignMAC, unknown, fragments, synDrop atomic.Uint64
	captureDrop                                                  atomic.Uint64
}

// Stats returns a snapshot.
func (s *Stack) Stats() Stats {
	c := &s.stats
	return Stats{
		RxFrames: c.rxFrames.Load(), RxBytes: c.rxBytes.Load(),
		TxFrames: c.txFrames.Load(), TxBytes: c.txBytes.Load(),
		TxErrors: c.txErrors.Load(), RxDatagrams: c.rxDatagrams.Load(),
		Malformed: c.malformed.Load(), Checksum: c.checksum.Load(),
		ForeignMAC: c.foreignMAC.Load(), Unknown: c.unknown.Load(),
		Fragments: c.fragments.Load(), SYNs: c.synDrop.Load(),
		Capture: c.captureDrop.Load(),
	}
}
