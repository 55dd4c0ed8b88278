package forward

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// captureSnap is the longest frame that a capture has: the kernel's largest
// super-frame but for BIG TCP, and its headers.
const captureSnap = 1 << 17

// Capture writes frames to w in pcap format until ctx ends, the Forwarder is closed,
// or w fails, and returns w's error: nil after the others. They are all, if id is 0,
// or those with the protocol and the port in the namespace of one forward, whoever
// they are of. Of an id that no forward has the error wraps [ErrNoForward], and the
// errno where it may not listen. It begins with the file's header, which says that
// frames are caught from now on.
//
// They are those that the container's own kernel sees, on the tap and, for the
// kernel path, on its loopback. Frames that w is too slow for are missing; the
// traffic doesn't wait.
func (f *Forwarder) Capture(ctx context.Context, id int, w io.Writer) error {
	match := func([]byte) bool { return true }
	if id != 0 {
		rules, _ := f.rules.list()
		var found *activeRule
		for _, r := range rules {
			if r.id == id {
				found = r
			}
		}
		if found == nil {
			return fmt.Errorf("capture forward %d: %w", id, ErrNoForward)
		}
		match = found.rule.matchFrame
	}
	var fd int
	err := f.cfg.NetNS.Do(func() (err error) {
		fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, int(htons(unix.ETH_P_ALL)))
		return os.NewSyscallError("socket", err)
	})
	if err != nil {
		return fmt.Errorf("capture: %w", err)
	}
	_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, udpBuffer)
	sock := os.NewFile(uintptr(fd), "packet socket")
	defer sock.Close()
	end := func() { _ = sock.SetReadDeadline(time.Unix(1, 0)) }
	defer context.AfterFunc(ctx, end)()
	defer context.AfterFunc(f.ctx, end)()
	return captureFrames(sock, match, w)
}

func htons(v uint16) uint16 { return binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, v)) }

// captureFrames copies frames that match until the socket's deadline.
func captureFrames(sock *os.File, match func([]byte) bool, w io.Writer) error {
	const linkTypeEthernet = 1 // lo has Ethernet headers too
	if _, err := w.Write(pcapHeader(linkTypeEthernet, captureSnap)); err != nil {
		return err
	}
	raw, err := sock.SyscallConn()
	if err != nil {
		return err
	}
	const recordLen = 16
	buf := make([]byte, recordLen+captureSnap)
	for {
		var n int
		var from unix.Sockaddr
		var recvErr error
		err := raw.Read(func(fd uintptr) bool {
			n, from, recvErr = unix.Recvfrom(int(fd), buf[recordLen:], 0)
			return !errors.Is(recvErr, unix.EAGAIN)
		})
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded):
			return nil
		case err != nil:
			return err
		case errors.Is(recvErr, unix.ENETDOWN): // an interface went; the others stay
			continue
		case recvErr != nil:
			return os.NewSyscallError("recvfrom", recvErr)
		}
		ll, ok := from.(*unix.SockaddrLinklayer)
		// What leaves by lo arrives there, and would be there twice.
		if !ok || ll.Hatype == unix.ARPHRD_LOOPBACK && ll.Pkttype == unix.PACKET_OUTGOING || !match(buf[recordLen:recordLen+n]) {
			continue
		}
		putPcapRecord(buf, time.Now(), n)
		if _, err := w.Write(buf[:recordLen+n]); err != nil {
			return err
		}
	}
}

// pcapHeader begins a file of frames with times in nanoseconds
// (draft-ietf-opsawg-pcap).
func pcapHeader(linkType, snap uint32) []byte {
	ne := binary.NativeEndian
	h := ne.AppendUint32(nil, 0xa1b23c4d)
	h = ne.AppendUint16(h, 2)
	h = ne.AppendUint16(h, 4)
	h = append(h, 0, 0, 0, 0, 0, 0, 0, 0)
	h = ne.AppendUint32(h, snap)
	return ne.AppendUint32(h, linkType)
}

// putPcapRecord puts the header of a frame of n bytes into b.
func putPcapRecord(b []byte, when time.Time, n int) {
	ne := binary.NativeEndian
	ne.PutUint32(b[0:], uint32(when.Unix()))
	ne.PutUint32(b[4:], uint32(when.Nanosecond()))
	ne.PutUint32(b[8:], uint32(n))
	ne.PutUint32(b[12:], uint32(n))
}

// matchFrame reports whether an Ethernet frame in the namespace is of the rule.
// Fragments but for the first don't tell, and don't match.
func (r Rule) matchFrame(frame []byte) bool {
	const ethernet = 14
	if len(frame) < ethernet {
		return false
	}
	packet := frame[ethernet:]
	var proto byte
	var src, dst netip.Addr
	switch binary.BigEndian.Uint16(frame[12:]) {
	case unix.ETH_P_IP:
		if len(packet) < 20 || binary.BigEndian.Uint16(packet[6:])&0x1fff != 0 {
			return false
		}
		proto = packet[9]
		src, dst = netip.AddrFrom4([4]byte(packet[12:])), netip.AddrFrom4([4]byte(packet[16:]))
		packet = packet[min(len(packet), int(packet[0]&0xf)*4):]
	case unix.ETH_P_IPV6:
		if len(packet) < 40 {
			return false
		}
		proto = packet[6]
		src, dst = netip.AddrFrom16([16]byte(packet[8:])), netip.AddrFrom16([16]byte(packet[24:]))
		packet = packet[40:]
	}
	want := map[Proto]byte{TCP: unix.IPPROTO_TCP, UDP: unix.IPPROTO_UDP}
	if proto != want[r.Proto] || len(packet) < 4 {
		return false
	}
	sport, dport := binary.BigEndian.Uint16(packet), binary.BigEndian.Uint16(packet[2:])
	ports, target := r.TargetPorts, r.Target
	if r.Dir == Out {
		ports, target = r.Ports, netip.Addr{}
	}
	at := func(a netip.Addr, port uint16) bool {
		return ports.First <= port && port <= ports.Last && (!target.IsValid() || a == target) && (r.Dir == In || a.IsLoopback())
	}
	return at(src, sport) || at(dst, dport)
}
