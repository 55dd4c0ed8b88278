package forward

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"strings"
	"sync"
	"time"

	"github.com/insomniacslk/dhcp/rfc1035label"

	"github.com/gofwd/gofwd/stack"
)

// Services are what a container that configures itself finds on its link: servers
// that tell it the numbers of [Network]. The zero value answers nothing.
//
// There is one address of each family to be had, for ever, and whoever asks gets
// it; nothing is remembered of those who asked.
type Services struct {
	// DHCP answers DHCP for IPv4 (RFC 2131). Without an IPv4 gateway there is
	// none.
	DHCP bool
	// DHCPv6 answers DHCPv6 (RFC 8415).
	DHCPv6 bool
	// RouterAdvert makes us an IPv6 router that advertises the net of the
	// container's address, 64 bits long, for addresses of the container's own
	// choice (RFC 4861, 4862).
	RouterAdvert bool
	// NoMTU leaves the MTU to the container.
	NoMTU bool
	// DNS are the nameservers to tell, the first 8 of each family.
	DNS []netip.Addr
	// Search are the domains in which to look for names. What is none, or does
	// not fit into 512 bytes with those before it, is left out.
	Search []string
	// Hostname is told by DHCP, and FQDN, the name with its domain, by DHCP
	// and DHCPv6; "" is none.
	Hostname, FQDN string
}

// Limits of what is told. An advertisement must fit any link: fragments of it are
// not accepted (RFC 6980).
const (
	maxToldServers = 8
	maxToldSearch  = 512
)

// maxServiceRequest is the longest request that is looked at, as large as a frame
// of Ethernet carries; clients send some 300 bytes.
const maxServiceRequest = 1500

// infinite is how long everything that is told is valid: in DHCP, DHCPv6 and router
// advertisements, 32 bits of it are for ever.
const infinite = 1<<32 - 1

// serviceLink is what the services need of a [stack.Stack].
type serviceLink interface {
	WriteUDP(*stack.Datagram) error
	WriteNDP(from, to netip.Addr, message []byte) error
}

// services answers on the tap. It holds no state: a request costs one reply, or
// nothing.
type services struct {
	Services
	link     serviceLink
	mac      net.HardwareAddr // ours
	mtu      int              // 0 is not told
	addr4    netip.Prefix     // zero without IPv4, or without DHCP
	gateway4 netip.Addr
	addr6    netip.Prefix // zero without IPv6
	router   netip.Addr   // our link-local address
	dns4     []netip.Addr
	dns6     []netip.Addr
	search   []byte // in DNS's encoding
	fqdn     []byte
	log      *slog.Logger

	stop context.CancelFunc // nil before start
	wg   sync.WaitGroup
}

// defaultRouter is our link-local address where the gateway's is none.
var defaultRouter = netip.MustParseAddr("fe80::1")

// newServices returns services for a container that is numbered by plan, nil if it
// gets none.
func newServices(cfg Services, plan *networkPlan, log *slog.Logger) (*services, error) {
	if !cfg.DHCP && !cfg.DHCPv6 && !cfg.RouterAdvert {
		return nil, nil
	}
	s := &services{Services: cfg, router: defaultRouter, log: log}
	if !cfg.NoMTU {
		s.mtu = plan.link.MTU
	}
	for _, name := range []string{cfg.Hostname, cfg.FQDN} {
		if err := checkDomain(name); err != nil {
			return nil, fmt.Errorf("tell the container its name: %w", err)
		}
	}
	s.gateway4, _ = ofFamily(plan.addrs.gateways, true)
	for _, p := range plan.link.Addrs {
		switch {
		case p.Addr().Is4() && !s.addr4.IsValid() && s.gateway4.IsValid():
			s.addr4 = p
		case p.Addr().Is6() && !s.addr6.IsValid():
			s.addr6 = p
		}
	}
	if gateway, ok := ofFamily(plan.addrs.gateways, false); ok && gateway.IsLinkLocalUnicast() {
		s.router = gateway
	}
	s.dns4, s.dns6 = addrsOf(cfg.DNS, true), addrsOf(cfg.DNS, false)
	s.dns4 = s.dns4[:min(len(s.dns4), maxToldServers)]
	s.dns6 = s.dns6[:min(len(s.dns6), maxToldServers)]
	s.search = encodeSearch(cfg.Search, log)
	if cfg.FQDN != "" {
		s.fqdn = encodeDomain(cfg.FQDN)
	}
	return s, nil
}

// encodeSearch returns as many domains as may be told.
func encodeSearch(names []string, log *slog.Logger) []byte {
	var all []byte
	for _, name := range names {
		b := encodeDomain(name)
		err := checkDomain(name)
		switch {
		case err != nil:
		case len(b) == 1:
			err = errors.New("it is empty")
		case len(all)+len(b) > maxToldSearch:
			err = fmt.Errorf("the list is longer than %d bytes", maxToldSearch)
		default:
			all = append(all, b...)
			continue
		}
		log.Warn("search domain not told to the container", "domain", name, "err", err)
	}
	return all
}

// start begins to advertise; close ends that. Both do nothing without services.
func (s *services) start() {
	if s == nil || !s.advertises() {
		return
	}
	var ctx context.Context
	ctx, s.stop = context.WithCancel(context.Background())
	s.wg.Add(1)
	go s.advertise(ctx)
}

func (s *services) close() {
	if s != nil && s.stop != nil {
		s.stop()
		s.wg.Wait()
	}
}

// advertises reports whether we are a router.
func (s *services) advertises() bool { return s.RouterAdvert && s.addr6.IsValid() }

// checkDomain refuses what is no name for DNS (RFC 1035 §2.3.4); "" is none.
func checkDomain(name string) error {
	name = strings.TrimSuffix(name, ".")
	if name == "" {
		return nil
	}
	if len(name) > 253 {
		return fmt.Errorf("%q is longer than 253 bytes", name)
	}
	for label := range strings.SplitSeq(name, ".") {
		if len(label) < 1 || len(label) > 63 || strings.ContainsFunc(label, func(r rune) bool { return r <= ' ' }) {
			return fmt.Errorf("%q is not a domain name", name)
		}
	}
	return nil
}

// encodeDomain returns a domain name as DNS has it.
func encodeDomain(name string) []byte {
	labels := rfc1035label.Labels{Labels: []string{strings.TrimSuffix(name, ".")}}
	return labels.ToBytes()
}

// takes reports whether d is for one of the services. It is asked of every
// datagram from the container.
func (s *services) takes(d *stack.Datagram) bool { return s.isDHCP(d) || s.isDHCPv6(d) }

// answer answers a datagram that takes said to be ours. It is called by the
// goroutine that reads the tap, once everything is up, and never blocks.
func (s *services) answer(d *stack.Datagram) {
	if len(d.Payload) > maxServiceRequest || d.SegmentSize != 0 {
		return
	}
	answer := s.answerDHCP
	if s.isDHCPv6(d) {
		answer = s.answerDHCPv6
	}
	if err := answer(d); err != nil {
		s.log.Debug("container's request not answered", "from", d.Src, "to", d.Dst, "err", err)
	}
}

// Reasons for no answer.
var (
	errMalformedRequest = errors.New("malformed")
	errForOthers        = errors.New("for another server")
	errNotARequest      = errors.New("not a request")
)

// solicited answers a router solicitation. It is called as answer is.
func (s *services) solicited(from netip.Addr) {
	if !from.IsLinkLocalUnicast() {
		from = allNodes // RFC 4861 §6.2.6: the sender has no address yet
	}
	if err := s.link.WriteNDP(s.router, from, s.routerAdvert()); err != nil {
		s.log.Debug("router advertisement not sent", "to", from, "err", err)
	}
}

// Router advertisements that nobody asked for: a few in the beginning, then from
// time to time (RFC 4861 §6.2.1, §6.2.4 and §10).
const (
	initialAdverts        = 3
	initialAdvertInterval = 16 * time.Second
	minAdvertInterval     = 200 * time.Second
	maxAdvertInterval     = 600 * time.Second
)

// advertise sends router advertisements until ctx ends.
func (s *services) advertise(ctx context.Context) {
	defer s.wg.Done()
	for n := 1; ; n++ {
		// While the link is down this fails; the container will solicit.
		_ = s.link.WriteNDP(s.router, allNodes, s.routerAdvert())
		interval := initialAdvertInterval
		if n >= initialAdverts {
			interval = minAdvertInterval + rand.N(maxAdvertInterval-minAdvertInterval)
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(interval):
		}
	}
}
