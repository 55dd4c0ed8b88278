package forward

import (
	"context"
	"io"
	"log/slog"
	"net/netip"
	"time"

	"github.com/gofwd/gofwd/netnsutil"
)

// Datapath says which of the two paths inbound and outbound TCP may take.
type Datapath string

// The data paths.
const (
	// Auto takes the best path that works for each forward.
	Auto Datapath = "auto"
	// Tap is the gVisor stack on a tap in the namespace.
	Tap Datapath = "tap"
	// Kernel is transparent kernel sockets in the namespace.
	Kernel Datapath = "kernel"
)

// Config says what to forward and how. NetNS is required; every other field
// has a zero value that works.
type Config struct {
	// NetNS is the container's network namespace. The caller closes it,
	// after Close.
	NetNS *netnsutil.NS
	// Rules are the forwards to begin with.
	Rules []Rule
	// Network numbers the namespace.
	Network Network
	// Datapath restricts the choice of path; "" is Auto.
	Datapath Datapath
	// HostLoopbackToNSLoopback sends connections from the host's loopback
	// to the namespace's loopback, with 127.0.0.1 or ::1 as their source.
	HostLoopbackToNSLoopback bool
	// NoTCP, NoUDP and NoICMP forward nothing of that protocol.
	NoTCP, NoUDP, NoICMP bool
	// Capture, if not nil, is written every frame on the tap, in pcap
	// format. An error of it stops the capture, never the traffic.
	Capture io.Writer
	// Logger takes what an operator must know, and at debug level every
	// connection; nil discards it.
	Logger *slog.Logger
}

// Network is how the namespace is numbered, and what its special addresses mean.
type Network struct {
	// IfName is the tap's name; "" is tap0.
	IfName string
	// MTU of the tap in bytes; 0 is 1500.
	MTU int
	// NoIPv4 and NoIPv6 leave out a family.
	NoIPv4, NoIPv6 bool
	// Addrs are the container's addresses, at most one of each family; a
	// family without one gets 10.0.2.100/24 (the next free 10.0.N.0/24
	// where the host is in 10.0.2.0/24) and fd67:6f66:7764::100/64.
	Addrs []netip.Prefix
	// Gateways are the default gateways; the default is host 2 of the net.
	Gateways []netip.Addr
	// DNS are the addresses at which the container finds its resolver; the
	// default is host 3 of the net. Port 53 and 853 of them lead to the
	// host's own nameservers.
	DNS []netip.Addr
	// NoDNS forwards no DNS address.
	NoDNS bool
	// CopyHost copies addresses and routes of the host's main interface
	// instead, as --config-net of pasta(1).
	CopyHost bool
	// HostAlias are the addresses under which the container reaches the
	// host's main address, and sees it; the default is 169.254.1.2 and
	// fd67:6f66:7764::1. NoHostAlias is none.
	HostAlias   []netip.Addr
	NoHostAlias bool
	// MapHostLoopback are addresses under which the container reaches the
	// host's loopback; the default is none.
	MapHostLoopback []netip.Addr
}

// Forwarder is a running set of forwards.
//
//	Start ──► running ──► Close ──► closed
//	  └─ error: nothing is left        Wait returns
type Forwarder struct{}

// Start brings up everything that cfg asks for, or nothing. ctx bounds only the
// start.
func Start(ctx context.Context, cfg Config) (*Forwarder, error) { return &Forwarder{}, nil }

// RuleStatus is a forward and how it fares.
type RuleStatus struct {
	ID   int  `json:"id"`
	Rule Rule `json:"rule"`
	// Bound are the host addresses that were bound, the free port that
	// was chosen included.
	Bound []netip.AddrPort `json:"bound"`
	// Path is the way that its connections take, and Reason says why it is
	// not the best one; "" where it is.
	Path   Datapath `json:"path"`
	Reason string   `json:"reason,omitempty"`
	// Active counts open connections (UDP: flows), Total all there were.
	Active int64 `json:"active"`
	Total  int64 `json:"total"`
	// BytesIn went into the namespace, BytesOut came out of it.
	BytesIn  int64 `json:"bytes_in"`
	BytesOut int64 `json:"bytes_out"`
}

// Status is what a Forwarder is and does, for people and for JSON.
type Status struct {
	NetNS   string         `json:"netns"`
	IfName  string         `json:"ifname"`
	MTU     int            `json:"mtu"`
	Addrs   []netip.Prefix `json:"addrs"`
	Gateway []netip.Addr   `json:"gateways"`
	DNS     []netip.Addr   `json:"dns"`
	Alias   []netip.Addr   `json:"host_alias"`
	Started time.Time      `json:"started"`
	Rules   []RuleStatus   `json:"forwards"`
	// Notes are sentences an operator should read: abilities that are
	// missing and what to do about it.
	Notes []string `json:"notes,omitempty"`
}

// Status returns a snapshot.
func (f *Forwarder) Status() Status { return Status{} }

// Wait blocks until the Forwarder has ended, and returns why: nil after Close,
// or [netnsutil.ErrGone] when the namespace went away.
func (f *Forwarder) Wait() error { return nil }

// Close ends everything: listeners, then connections, then the stack, then the
// tap. It is idempotent, and returns when every goroutine has ended.
func (f *Forwarder) Close() error { return nil }
