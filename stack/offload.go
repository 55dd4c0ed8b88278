package stack

import "encoding/binary"

// vnetHdrLen is the size of struct virtio_net_hdr, the default of
// TUNSETVNETHDRSZ (include/uapi/linux/virtio_net.h).
const vnetHdrLen = 10

// Flags and kinds of segmentation of struct virtio_net_hdr.
const (
	vnetNeedsCsum = 1 // the checksum field holds only the pseudo header's sum
	vnetDataValid = 2 // somebody already checked it

	vnetGSONone  = 0
	vnetGSOTCPv4 = 1
	vnetGSOTCPv6 = 4
	vnetGSOUDPL4 = 5    // UDP_SEGMENT, Linux 6.2
	vnetGSOECN   = 0x80 // may be set beside the TCP kinds
)

// vnetHdr is struct virtio_net_hdr: what is left to do on a frame. Its integers
// are in the byte order of the machine (TUNSETVNETLE is not set).
type vnetHdr struct {
	flags, gsoType uint8
	hdrLen         uint16 // a hint only; wireguard-go saw the whole packet's length
	gsoSize        uint16
	csumStart      uint16
	csumOffset     uint16
}

func (h *vnetHdr) decode(b []byte) {
	_ = b[vnetHdrLen-1]
	h.flags, h.gsoType = b[0], b[1]
	h.hdrLen = binary.NativeEndian.Uint16(b[2:])
	h.gsoSize = binary.NativeEndian.Uint16(b[4:])
	h.csumStart = binary.NativeEndian.Uint16(b[6:])
	h.csumOffset = binary.NativeEndian.Uint16(b[8:])
}

func (h *vnetHdr) encode(b []byte) {
	_ = b[vnetHdrLen-1]
	b[0], b[1] = h.flags, h.gsoType
	binary.NativeEndian.PutUint16(b[2:], h.hdrLen)
	binary.NativeEndian.PutUint16(b[4:], h.gsoSize)
	binary.NativeEndian.PutUint16(b[6:], h.csumStart)
	binary.NativeEndian.PutUint16(b[8:], h.csumOffset)
}
