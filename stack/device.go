package stack

// Device is a layer 2 network device whose frames carry a virtio-net header,
// such as a tap with IFF_VNET_HDR. Each frame is one Ethernet frame behind a
// header of vnetHdrLen bytes that says how much of the checksum and of the
// segmentation is left to do.
//
// Read and Write may be called at the same time as each other; Write may be
// called by several goroutines at once. After Close both return an error that
// wraps [net.ErrClosed], also calls that were blocked.
type Device interface {
	// Read reads one frame, scattered over bufs, and returns its length.
	// It blocks until there is one; before it does, it calls idle, which
	// reports whether other goroutines have been given work to do: then the
	// wait should leave them the processor at once.
	Read(bufs [][]byte, idle func() (goroutines bool)) (int, error)
	// Write writes one frame, gathered from bufs. It does not keep them.
	Write(bufs [][]byte) error
	// MTU is the largest IP packet that the other side takes unsegmented.
	MTU() int
	// Offloads says what may be left to the other side.
	Offloads() Offloads
	Close() error
}

// Offloads are the abilities of a [Device], probed when it was opened.
type Offloads struct {
	Checksum bool // partial checksums, both ways
	TSO      bool // TCP segmentation, IPv4 and IPv6, both ways
	USO      bool // UDP segmentation (Linux 6.2), both ways
}
