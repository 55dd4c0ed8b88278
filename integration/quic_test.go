package integration

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"io"
	"math/big"
	"net"
	"net/netip"
	"path/filepath"
	"testing"
	"time"

	"github.com/quic-go/quic-go"
	"github.com/stretchr/testify/require"
)

// TestQUIC: real QUIC, which sends with UDP_SEGMENT and receives with ECN, from a
// client to a server in the container, and from the container to a server outside.
// What the container sends as super-frames crosses the tap as such.
func TestQUIC(t *testing.T) {
	t.Parallel()
	tp := newTopo(t)
	file := filepath.Join(t.TempDir(), "tap.pcap")
	g := tp.attach(t, "-p", "8443:443/udp", "--pcap", file)
	eachFamily(t, func(t *testing.T, f family) {
		seen := tp.ctr.serveQUIC(t, f.any, 443)
		local := tp.client.exchangeQUIC(t, f.client, netip.AddrPortFrom(f.host, 8443))
		require.Equal(t, local, <-seen, "the server sees its client")

		seen = tp.client.serveQUIC(t, f.client, 443)
		tp.ctr.exchangeQUIC(t, f.any, netip.AddrPortFrom(f.client, 443))
		require.Contains(t, []netip.Addr{f.host, f.host2}, (<-seen).Addr())
	})
	g.stop()
	for _, f := range []family{ipv4, ipv6} {
		// The container as server, and as client; longer than the tap's MTU.
		for _, port := range []string{"src", "dst"} {
			super := tcpdump(t, tp.host, file, "udp", "and", "src", "host", f.ctr.String(), "and", port, "port", "443", "and", "greater", "2000")
			require.NotEmpty(t, super, "%s: super-frames from the container, port 443 is %s", f.name, port)
		}
	}
}

const quicProtocol = "gofwd-test"

// serveQUIC answers each stream with what came in it, and tells who the client of
// the first connection is.
func (n *node) serveQUIC(t *testing.T, a netip.Addr, port uint16) (seen <-chan netip.AddrPort) {
	t.Helper()
	tr := &quic.Transport{Conn: n.listenUDP(t, a, port)}
	l, err := tr.Listen(&tls.Config{Certificates: []tls.Certificate{selfSigned(t)}, NextProtos: []string{quicProtocol}}, nil)
	require.NoError(t, err)
	t.Cleanup(func() { tr.Close() })
	client := make(chan netip.AddrPort, 1)
	go func() {
		conn, err := l.Accept(context.Background())
		if err != nil {
			return
		}
		client <- addrPort(conn.RemoteAddr())
		for {
			s, err := conn.AcceptStream(context.Background())
			if err != nil {
				return
			}
			go func() {
				defer s.Close()
				_, _ = io.Copy(s, s)
			}()
		}
	}()
	return client
}

// exchangeQUIC sends two streams to a serveQUIC server and back, and returns the
// client's address.
func (n *node) exchangeQUIC(t *testing.T, from netip.Addr, to netip.AddrPort) netip.AddrPort {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*patience)
	defer cancel()
	socket := n.listenUDP(t, from, 0)
	tr := &quic.Transport{Conn: socket}
	defer tr.Close()
	//nolint:gosec // The certificate is the test's own, and so is the network.
	conn, err := tr.Dial(ctx, net.UDPAddrFromAddrPort(to), &tls.Config{InsecureSkipVerify: true, NextProtos: []string{quicProtocol}}, nil)
	require.NoError(t, err)
	failed := make(chan string, 2)
	for i := range 2 {
		go func() { failed <- echoStream(ctx, conn, noise(uint64(i), 4<<20)) }()
	}
	for range 2 {
		require.Empty(t, <-failed)
	}
	require.NoError(t, conn.CloseWithError(0, ""))
	return addrPort(socket.LocalAddr())
}

// echoStream sends what by a stream, and says what was wrong with what came back.
func echoStream(ctx context.Context, conn *quic.Conn, what []byte) string {
	s, err := conn.OpenStreamSync(ctx)
	if err != nil {
		return err.Error()
	}
	go func() {
		defer s.Close()
		_, _ = s.Write(what)
	}()
	_ = s.SetReadDeadline(time.Now().Add(2 * patience))
	got, err := io.ReadAll(s)
	switch {
	case err != nil:
		return err.Error()
	case !bytes.Equal(got, what):
		return "what came back is not what was sent"
	}
	return ""
}

// selfSigned makes a certificate for anything.
func selfSigned(t *testing.T) tls.Certificate {
	t.Helper()
	public, private, err := ed25519.GenerateKey(rand.Reader)
	require.NoError(t, err)
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, public, private)
	require.NoError(t, err)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: private}
}
