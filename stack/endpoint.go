package stack

import (
	"encoding/binary"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv6"
	gstack "gvisor.dev/gvisor/pkg/tcpip/stack"
)

// defaultMAC is our end of the link: locally administered, and "gofwd" in ASCII.
var defaultMAC = [6]byte{0x02, 'g', 'o', 'f', 'w', 'd'}

// maxIPLen is the longest IP packet, and not by chance the largest buffer that
// gVisor pools (buffer.MaxChunkSize): with the Ethernet header read elsewhere, a
// super-frame of 64 KiB needs one pooled buffer and no copy.
const maxIPLen = 1 << 16

// copyBelow is the size up to which a TCP packet is copied into a buffer of its
// own size, so that a queue of small segments does not hold 64 KiB for each.
const copyBelow = 16 << 10

// gsoMaxSize is the longest TCP super-segment that gVisor may build: with its
// headers it still is an IP packet.
const gsoMaxSize = maxIPLen - 1 - ip6HdrLen - 60

// endpoint is the link endpoint: it reads frames from the device, sorts them,
// and writes those of gVisor and of ours. gVisor's own fdbased does no
// segmentation offload on a tap, and stops for good at the first frame to a
// foreign MAC address; this one counts such a frame and goes on.
type endpoint struct {
	dev      Device
	mtu      int
	offloads Offloads
	guest    atomic.Pointer[[6]byte] // the container's MAC address
	own      map[netip.Addr]bool     // the container's addresses; immutable
	mac      [6]byte                 // ours; immutable
	log      *slog.Logger
	stats    *counters
	capture  capture
	frags    reassembly
	fragID   atomic.Uint32
	hdrs     sync.Pool // of *frameHdr

	udp  func(*Datagram)
	echo func(*Echo)
	idle func()                     // not nil
	syn  func(*packet, []byte) bool // reports whether it kept the SYN

	noNDP         bool
	routerSolicit func(from netip.Addr)

	// Of the reading goroutine: no packet of ours allocates.
	pkt      packet
	datagram Datagram
	ping     Echo
	waited   bool // for the frame at hand
	injected bool // into gVisor, since the last wait

	dispatcher gstack.NetworkDispatcher
	wg         sync.WaitGroup
}

var (
	_ gstack.LinkEndpoint = (*endpoint)(nil)
	_ gstack.GSOEndpoint  = (*endpoint)(nil)
)

func (e *endpoint) getHdr() *frameHdr {
	if f, ok := e.hdrs.Get().(*frameHdr); ok {
		return f
	}
	return new(frameHdr)
}

func (e *endpoint) putHdr(f *frameHdr) {
	clear(f.iov[:])
	e.hdrs.Put(f)
}

// write writes one frame to the container.
func (e *endpoint) write(iov [][]byte) error {
	e.capture.frame(iov)
	err := e.dev.Write(iov)
	if err != nil {
		e.stats.txErrors.Add(1)
		return err
	}
	n := 0
	for _, b := range iov {
		n += len(b)
	}
	e.stats.txFrames.Add(1)
	e.stats.txBytes.Add(uint64(n - vnetHdrLen))
	return nil
}

// readLoop reads frames until the device is closed.
func (e *endpoint) readLoop() {
	defer e.wg.Done()
	var head [vnetHdrLen + ethHdrLen]byte
	view := buffer.NewViewSize(maxIPLen)
	defer func() { view.Release() }()
	bufs := [][]byte{head[:], view.AsSlice()}
	for {
		n, err := e.dev.Read(bufs, e.beforeWait)
		if err != nil {
			if !errors.Is(err, net.ErrClosed) {
				e.log.Error("the container's link ended", "err", err)
			}
			return
		}
		e.capture.read(bufs, n)
		if n < len(head) {
			e.stats.malformed.Add(1)
			continue
		}
		e.stats.rxFrames.Add(1)
		e.stats.rxBytes.Add(uint64(n - vnetHdrLen))
		if e.receive(head[:], view, n-len(head)) {
			view = buffer.NewViewSize(maxIPLen)
			bufs[1] = view.AsSlice()
		}
		if e.waited { // the first frame after a wait does not wait for others
			e.waited = false
			e.idle()
		}
	}
}

// beforeWait is called when there is nothing more to read. It reports whether
// gVisor's goroutines have work since it was called last.
func (e *endpoint) beforeWait() (goroutines bool) {
	e.idle()
	goroutines, e.injected = e.injected, false
	e.waited = true
	return goroutines
}

// receive takes one frame as far as it goes. The packet is the first n bytes of
// view; receive reports whether it kept the view.
func (e *endpoint) receive(head []byte, view *buffer.View, n int) (kept bool) {
	eth := head[vnetHdrLen:]
	dst := [6]byte(eth[0:6])
	if dst != e.mac && dst[0]&1 == 0 {
		e.stats.foreignMAC.Add(1)
		return false
	}
	e.learn([6]byte(eth[6:12]))
	b := view.AsSlice()[:n]
	switch binary.BigEndian.Uint16(eth[12:]) {
	case ethTypeARP:
		e.handleARP(b)
		return false
	case ethTypeIPv4, ethTypeIPv6:
	default:
		e.stats.unknown.Add(1)
		return false
	}
	var vnet vnetHdr
	vnet.decode(head)
	p := &e.pkt
	if err := p.parse(vnet, b); err != nil {
		e.stats.malformed.Add(1)
		return false
	}
	if p.frag {
		if e.frags.add(p) {
			e.deliver(p, nil)
		}
		return false
	}
	return e.deliver(p, view)
}

// learn follows the container's MAC address, which it may change.
func (e *endpoint) learn(mac [6]byte) {
	if mac != *e.guest.Load() && mac[0]&1 == 0 {
		changed := mac // mac itself would be on the heap for every frame
		e.guest.Store(&changed)
	}
}

// deliver hands a whole packet to its protocol. view is what it lies in, nil if
// that is not the reader's; deliver reports whether it kept it.
func (e *endpoint) deliver(p *packet, view *buffer.View) (kept bool) {
	if e.own[p.dst] {
		return false // the container speaking to itself: a martian
	}
	if err := p.verify(); err != nil {
		e.stats.checksum.Add(1)
		return false
	}
	switch p.proto {
	case protoUDP:
		e.handleUDP(p)
		return false
	case protoICMP:
		return e.handleICMP(p, view)
	case protoICMPv6:
		return e.handleICMPv6(p, view)
	case protoTCP:
		flags, ok := p.tcpFlags()
		if !ok {
			e.stats.malformed.Add(1)
			return false
		}
		if flags&(header.TCPFlagSyn|header.TCPFlagAck|header.TCPFlagRst) == header.TCPFlagSyn && e.syn(p, p.ip) {
			return false
		}
		e.injected = true
		return e.inject(p.v6, p.ip, view)
	}
	e.stats.unknown.Add(1)
	return false
}

// inject gives an IP packet to gVisor; view is the buffer that it begins, or nil
// if the packet must be copied. It reports whether it kept view.
func (e *endpoint) inject(v6 bool, ip []byte, view *buffer.View) (kept bool) {
	var buf buffer.Buffer
	if view == nil || len(ip) <= copyBelow {
		buf = buffer.MakeWithData(ip)
	} else {
		view.CapLength(len(ip))
		buf, kept = buffer.MakeWithView(view), true
	}
	pkt := gstack.NewPacketBuffer(gstack.PacketBufferOptions{Payload: buf})
	proto := ipv4.ProtocolNumber
	if v6 {
		proto = ipv6.ProtocolNumber
	}
	e.dispatcher.DeliverNetworkPacket(proto, pkt)
	pkt.DecRef()
	return kept
}

// WritePackets writes gVisor's packets to the container.
func (e *endpoint) WritePackets(pkts gstack.PacketBufferList) (int, tcpip.Error) {
	n := 0
	for _, pkt := range pkts.AsSlice() {
		if err := e.writePacket(pkt); err != nil {
			return n, &tcpip.ErrAborted{}
		}
		n++
	}
	return n, nil
}

func (e *endpoint) writePacket(pkt *gstack.PacketBuffer) error {
	f := e.getHdr()
	defer e.putHdr(f)
	hdr := vnetHdr{}
	if gso := pkt.GSOOptions; gso.Type != gstack.GSONone {
		hdr.hdrLen = uint16(ethHdrLen + pkt.HeaderSize())
		if gso.NeedsCsum {
			hdr.flags = vnetNeedsCsum
			hdr.csumStart, hdr.csumOffset = ethHdrLen+gso.L3HdrLen, gso.CsumOffset
		}
		if pkt.Data().Size() > int(gso.MSS) {
			hdr.gsoSize = gso.MSS
			hdr.gsoType = vnetGSOTCPv4
			if gso.Type == gstack.GSOTCPv6 {
				hdr.gsoType = vnetGSOTCPv6
			}
		}
	}
	hdr.encode(f.buf[:])
	e.putEth(f.buf[vnetHdrLen:], pkt.NetworkProtocolNumber == ipv6.ProtocolNumber)
	iov := append(f.iov[:0], f.buf[:vnetHdrLen+ethHdrLen])
	views, offset := pkt.AsViewList()
	for v := views.Front(); v != nil; v = v.Next() {
		b := v.AsSlice()
		if offset >= len(b) {
			offset -= len(b)
			continue
		}
		iov = append(iov, b[offset:])
		offset = 0
	}
	return e.write(iov)
}

// MTU implements stack.LinkEndpoint.
func (e *endpoint) MTU() uint32 { return uint32(e.mtu) }

// GSOMaxSize implements stack.GSOEndpoint.
func (e *endpoint) GSOMaxSize() uint32 { return gsoMaxSize }

// SupportedGSO implements stack.GSOEndpoint. A type that wraps this endpoint must
// pass on both methods, or gVisor silently sends segment by segment.
func (e *endpoint) SupportedGSO() gstack.SupportedGSO {
	if e.offloads.TSO {
		return gstack.HostGSOSupported
	}
	return gstack.GSONotSupported
}

// Capabilities implements stack.LinkEndpoint: checksums of what comes in were
// verified before inject, or were never made since the packet did not leave the
// machine.
func (e *endpoint) Capabilities() gstack.LinkEndpointCapabilities {
	return gstack.CapabilityRXChecksumOffload
}

// Attach implements stack.LinkEndpoint; nil ends the reading.
func (e *endpoint) Attach(d gstack.NetworkDispatcher) {
	if d == nil {
		return
	}
	e.dispatcher = d
}

// IsAttached implements stack.LinkEndpoint.
func (e *endpoint) IsAttached() bool { return e.dispatcher != nil }

// Wait implements stack.LinkEndpoint.
func (e *endpoint) Wait() { e.wg.Wait() }

// Close implements stack.LinkEndpoint; Stack.Close closes the device.
func (e *endpoint) Close() {}

// The rest of stack.LinkEndpoint says that gVisor sees no link layer: Ethernet
// is put on and taken off here.

// SetMTU implements stack.LinkEndpoint.
func (e *endpoint) SetMTU(uint32) {}

// MaxHeaderLength implements stack.LinkEndpoint.
func (e *endpoint) MaxHeaderLength() uint16 { return 0 }

// LinkAddress implements stack.LinkEndpoint.
func (e *endpoint) LinkAddress() tcpip.LinkAddress { return "" }

// SetLinkAddress implements stack.LinkEndpoint.
func (e *endpoint) SetLinkAddress(tcpip.LinkAddress) {}

// ARPHardwareType implements stack.LinkEndpoint.
func (e *endpoint) ARPHardwareType() header.ARPHardwareType { return header.ARPHardwareNone }

// AddHeader implements stack.LinkEndpoint.
func (e *endpoint) AddHeader(*gstack.PacketBuffer) {}

// ParseHeader implements stack.LinkEndpoint.
func (e *endpoint) ParseHeader(*gstack.PacketBuffer) bool { return true }

// SetOnCloseAction implements stack.LinkEndpoint.
func (e *endpoint) SetOnCloseAction(func()) {}
