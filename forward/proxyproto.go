package forward

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"time"
)

// proxySignature begins each header of the PROXY protocol, version 2
// (haproxy.org, proxy-protocol.txt, 2.2).
const proxySignature = "\r\n\r\n\x00\r\nQUIT\n"

// writeProxyHeader tells the server at the other end of inner who is at the other
// end of outer, and where that connected to.
func writeProxyHeader(inner net.Conn, outer net.Conn) error {
	if err := inner.SetWriteDeadline(time.Now().Add(dialTimeout)); err != nil {
		return fmt.Errorf("write PROXY header: %w", err)
	}
	var client, local netip.AddrPort
	if _, ok := outer.RemoteAddr().(*net.TCPAddr); ok {
		client = clientOf(outer)
		local = unmapped(outer.LocalAddr().(*net.TCPAddr).AddrPort())
	}
	if _, err := inner.Write(proxyHeader(client, local)); err != nil {
		return fmt.Errorf("write PROXY header: %w", err)
	}
	return inner.SetWriteDeadline(time.Time{})
}

// proxyHeader returns the header for a connection from client to local, both of
// one family; zero addresses are a client without one.
func proxyHeader(client, local netip.AddrPort) []byte {
	const (
		versionProxy       = 0x21 // version 2, command PROXY
		versionLocal       = 0x20 // version 2, command LOCAL: no addresses
		unspec, tcp4, tcp6 = 0x00, 0x11, 0x21
	)
	b := []byte(proxySignature)
	switch {
	case !client.IsValid():
		return append(b, versionLocal, unspec, 0, 0)
	case client.Addr().Is4():
		b = append(b, versionProxy, tcp4, 0, 12)
	default:
		b = append(b, versionProxy, tcp6, 0, 36)
	}
	b = append(b, client.Addr().AsSlice()...)
	b = append(b, local.Addr().AsSlice()...)
	b = binary.BigEndian.AppendUint16(b, client.Port())
	return binary.BigEndian.AppendUint16(b, local.Port())
}
