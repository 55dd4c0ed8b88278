package main

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"io"
	"math/big"
	"net"
	"time"

	"github.com/quic-go/quic-go"
)

// quicProtocol is what the load generator and the load server speak over QUIC: one
// stream, whose bytes are counted, and answered by their number.
const quicProtocol = "gofwd-bench"

// quicMemory is the flow-control window of a connection, in bytes: more than a
// second needs at 1 Gb/s.
const quicMemory = 128 << 20

func quicConfig() *quic.Config {
	return &quic.Config{
		InitialStreamReceiveWindow: quicMemory, MaxStreamReceiveWindow: quicMemory,
		InitialConnectionReceiveWindow: quicMemory, MaxConnectionReceiveWindow: quicMemory,
	}
}

// serveQUIC counts what comes on each connection to conn.
func serveQUIC(conn *net.UDPConn, errc chan<- error) {
	cert, err := selfSigned()
	if err != nil {
		errc <- err
		return
	}
	l, err := quic.Listen(conn, &tls.Config{Certificates: []tls.Certificate{cert}, NextProtos: []string{quicProtocol}}, quicConfig())
	if err != nil {
		errc <- err
		return
	}
	for {
		c, err := l.Accept(context.Background())
		if err != nil {
			errc <- err
			return
		}
		go countStream(c)
	}
}

func countStream(c *quic.Conn) {
	s, err := c.AcceptStream(context.Background())
	if err != nil {
		return
	}
	n, err := io.Copy(io.Discard, s)
	if err != nil {
		return
	}
	_ = binary.Write(s, binary.BigEndian, n)
	_ = s.Close()
}

// uploadQUIC sends by one stream for d, and takes what the server has counted.
func uploadQUIC(addr string, d time.Duration) (map[string]float64, error) {
	ctx, cancel := context.WithTimeout(context.Background(), d+10*time.Second)
	defer cancel()
	//nolint:gosec // It is our own server, in a namespace of ours.
	c, err := quic.DialAddr(ctx, addr, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{quicProtocol}}, quicConfig())
	if err != nil {
		return nil, err
	}
	defer func() { _ = c.CloseWithError(0, "") }()
	s, err := c.OpenStreamSync(ctx)
	if err != nil {
		return nil, err
	}
	began := time.Now()
	for buf := make([]byte, 1<<20); time.Since(began) < d; {
		if _, err := s.Write(buf); err != nil {
			return nil, err
		}
	}
	if err := s.Close(); err != nil {
		return nil, err
	}
	var n int64
	if err := binary.Read(s, binary.BigEndian, &n); err != nil {
		return nil, err
	}
	return map[string]float64{unitGbps: float64(n) * 8 / 1e9 / time.Since(began).Seconds()}, nil
}

// selfSigned makes a certificate for anything.
func selfSigned() (tls.Certificate, error) {
	public, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return tls.Certificate{}, err
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(24 * time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, public, private)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: private}, err
}
