package forward

import (
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/insomniacslk/dhcp/dhcpv6"
	"github.com/insomniacslk/dhcp/iana"
	"github.com/insomniacslk/dhcp/rfc1035label"
	"github.com/stretchr/testify/require"
	"golang.org/x/net/icmp"

	"github.com/gofwd/gofwd/netnsutil"
	"github.com/gofwd/gofwd/stack"
)

// fakeLink keeps what the services send.
type fakeLink struct {
	mu      sync.Mutex // guards the following fields
	sent    []stack.Datagram
	adverts []netip.Addr // where to
}

func (l *fakeLink) advertised() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.adverts)
}

func (l *fakeLink) WriteUDP(d *stack.Datagram) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.sent = append(l.sent, *d)
	return nil
}

func (l *fakeLink) WriteNDP(_, to netip.Addr, _ []byte) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.adverts = append(l.adverts, to)
	return nil
}

var (
	servicesMAC = net.HardwareAddr{2, 0, 0, 0, 0, 1}
	clientMAC   = net.HardwareAddr{2, 0, 0, 0, 0, 2}
)

// everyService is all that can be told.
var everyService = Services{
	DHCP: true, DHCPv6: true, RouterAdvert: true,
	DNS:    []netip.Addr{netip.MustParseAddr("192.0.2.53"), netip.MustParseAddr("2001:db8::53")},
	Search: []string{"a.example", "b.example."}, Hostname: "web", FQDN: "web.a.example",
}

// testServices are services for 192.0.2.2/24 and 2001:db8::2/64.
func testServices(t testing.TB, cfg Services) (*services, *fakeLink) {
	t.Helper()
	plan := &networkPlan{
		link:  netnsutil.Link{MTU: 65520, Addrs: []netip.Prefix{netip.MustParsePrefix("192.0.2.2/24"), netip.MustParsePrefix("2001:db8::2/64")}},
		addrs: hostMap{gateways: []netip.Addr{netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8::1")}},
	}
	s, err := newServices(cfg, plan, slog.New(slog.DiscardHandler))
	require.NoError(t, err)
	link := &fakeLink{}
	s.link, s.mac = link, servicesMAC
	return s, link
}

// askServices sends a request and returns the reply, nil if there is none.
func askServices(t testing.TB, s *services, src, dst string, payload []byte) *stack.Datagram {
	t.Helper()
	link := s.link.(*fakeLink)
	link.sent = nil
	d := &stack.Datagram{Src: netip.MustParseAddrPort(src), Dst: netip.MustParseAddrPort(dst), Payload: payload}
	require.True(t, s.takes(d))
	s.answer(d)
	if len(link.sent) == 0 {
		return nil
	}
	require.Len(t, link.sent, 1)
	require.True(t, link.sent[0].Checksummed)
	return &link.sent[0]
}

// askDHCP sends a broadcast of a client without an address.
func askDHCP(t *testing.T, s *services, modifiers ...dhcpv4.Modifier) (*dhcpv4.DHCPv4, netip.AddrPort) {
	t.Helper()
	request, err := dhcpv4.New(append([]dhcpv4.Modifier{dhcpv4.WithHwAddr(clientMAC)}, modifiers...)...)
	require.NoError(t, err)
	d := askServices(t, s, "0.0.0.0:68", "255.255.255.255:67", request.ToBytes())
	if d == nil {
		return nil, netip.AddrPort{}
	}
	require.Equal(t, "192.0.2.1:67", d.Src.String())
	reply, err := dhcpv4.FromBytes(d.Payload)
	require.NoError(t, err)
	require.Equal(t, request.TransactionID, reply.TransactionID)
	require.Equal(t, clientMAC, reply.ClientHWAddr)
	return reply, d.Dst
}

func of(kind dhcpv4.MessageType) dhcpv4.Modifier { return dhcpv4.WithMessageType(kind) }

func wanted(ip string) dhcpv4.Modifier {
	return dhcpv4.WithOption(dhcpv4.OptRequestedIPAddress(net.ParseIP(ip)))
}

func TestDHCP(t *testing.T) {
	s, _ := testServices(t, everyService)
	server := func(ip string) dhcpv4.Modifier {
		return dhcpv4.WithOption(dhcpv4.OptServerIdentifier(net.ParseIP(ip)))
	}
	for name, tt := range map[string]struct {
		request []dhcpv4.Modifier
		want    dhcpv4.MessageType // 0: none
		yours   string
		to      string
	}{
		"discover":            {[]dhcpv4.Modifier{of(dhcpv4.MessageTypeDiscover)}, dhcpv4.MessageTypeOffer, "192.0.2.2", "192.0.2.2:68"},
		"discover, broadcast": {[]dhcpv4.Modifier{of(dhcpv4.MessageTypeDiscover), dhcpv4.WithBroadcast(true)}, dhcpv4.MessageTypeOffer, "192.0.2.2", "255.255.255.255:68"},
		"discover, rapid":     {[]dhcpv4.Modifier{of(dhcpv4.MessageTypeDiscover), dhcpv4.WithGeneric(optionRapidCommit, nil)}, dhcpv4.MessageTypeAck, "192.0.2.2", "192.0.2.2:68"},
		"selecting":           {[]dhcpv4.Modifier{of(dhcpv4.MessageTypeRequest), wanted("192.0.2.2"), server("192.0.2.1")}, dhcpv4.MessageTypeAck, "192.0.2.2", "192.0.2.2:68"},
		"selecting another":   {[]dhcpv4.Modifier{of(dhcpv4.MessageTypeRequest), wanted("192.0.2.2"), server("192.0.2.9")}, 0, "", ""},
		"init-reboot":         {[]dhcpv4.Modifier{of(dhcpv4.MessageTypeRequest), wanted("192.0.2.2")}, dhcpv4.MessageTypeAck, "192.0.2.2", "192.0.2.2:68"},
		"init-reboot, moved":  {[]dhcpv4.Modifier{of(dhcpv4.MessageTypeRequest), wanted("10.0.0.9")}, dhcpv4.MessageTypeNak, "0.0.0.0", "255.255.255.255:68"},
		"renewing":            {[]dhcpv4.Modifier{of(dhcpv4.MessageTypeRequest), dhcpv4.WithClientIP(net.IPv4(192, 0, 2, 2))}, dhcpv4.MessageTypeAck, "192.0.2.2", "192.0.2.2:68"},
		"inform":              {[]dhcpv4.Modifier{of(dhcpv4.MessageTypeInform), dhcpv4.WithClientIP(net.IPv4(192, 0, 2, 77))}, dhcpv4.MessageTypeAck, "0.0.0.0", "192.0.2.77:68"},
		"release":             {[]dhcpv4.Modifier{of(dhcpv4.MessageTypeRelease)}, 0, "", ""},
		"a reply":             {[]dhcpv4.Modifier{of(dhcpv4.MessageTypeOffer), func(d *dhcpv4.DHCPv4) { d.OpCode = dhcpv4.OpcodeBootReply }}, 0, "", ""},
		"of a relay":          {[]dhcpv4.Modifier{of(dhcpv4.MessageTypeDiscover), dhcpv4.WithGatewayIP(net.IPv4(192, 0, 2, 5))}, 0, "", ""},
		"no type":             {nil, 0, "", ""},
	} {
		t.Run(name, func(t *testing.T) {
			reply, to := askDHCP(t, s, tt.request...)
			if tt.want == 0 {
				require.Nil(t, reply)
				return
			}
			require.Equal(t, tt.want, reply.MessageType())
			require.Equal(t, tt.yours, reply.YourIPAddr.String())
			require.Equal(t, tt.to, to.String())
			require.Equal(t, "192.0.2.1", reply.ServerIdentifier().String())
			hasLease := reply.Options.Has(dhcpv4.OptionIPAddressLeaseTime)
			require.Equal(t, reply.YourIPAddr.String() != "0.0.0.0", hasLease)
			if tt.want != dhcpv4.MessageTypeNak {
				require.Equal(t, []net.IP{{192, 0, 2, 1}}, reply.Router())
			}
		})
	}
}

func TestDHCPOptions(t *testing.T) {
	s, _ := testServices(t, everyService)
	reply, _ := askDHCP(t, s, of(dhcpv4.MessageTypeDiscover), dhcpv4.WithGeneric(dhcpv4.OptionClientIdentifier, []byte("me")))
	options := reply.Options
	require.Equal(t, "ffffff00", reply.SubnetMask().String())
	require.Equal(t, []net.IP{{192, 0, 2, 53}}, reply.DNS())
	require.Equal(t, []string{"a.example", "b.example"}, reply.DomainSearch().Labels)
	require.Equal(t, "web", reply.HostName())
	require.Equal(t, []byte{0xff, 0xf0}, options.Get(dhcpv4.OptionInterfaceMTU))
	require.Equal(t, []byte{255, 255, 255, 255}, options.Get(dhcpv4.OptionIPAddressLeaseTime))
	require.Equal(t, "\x04\xff\xff\x03web\x01a\x07example\x00", string(options.Get(optionFQDN)))
	require.Equal(t, "me", string(options.Get(dhcpv4.OptionClientIdentifier)))
	require.False(t, options.Has(dhcpv4.OptionClasslessStaticRoute))

	// Nothing that is not to be told.
	s, _ = testServices(t, Services{DHCP: true, NoMTU: true})
	reply, _ = askDHCP(t, s, of(dhcpv4.MessageTypeDiscover))
	for _, code := range []dhcpv4.OptionCode{
		dhcpv4.OptionInterfaceMTU, dhcpv4.OptionDomainNameServer, dhcpv4.OptionDNSDomainSearchList, dhcpv4.OptionHostName, optionFQDN,
	} {
		require.False(t, reply.Options.Has(code), code)
	}

	// A gateway outside the net, as many hosters have.
	s.addr4 = netip.MustParsePrefix("203.0.113.7/32")
	reply, _ = askDHCP(t, s, of(dhcpv4.MessageTypeDiscover))
	routes := reply.ClasslessStaticRoute()
	require.Len(t, routes, 2)
	require.Equal(t, "route to 192.0.2.1/32 via 0.0.0.0", routes[0].String())
	require.Equal(t, "route to 0.0.0.0/0 via 192.0.2.1", routes[1].String())
}

// A client that takes no more than any host must take does without the search
// list; one that takes more gets it.
func TestDHCPMessageSize(t *testing.T) {
	cfg := everyService
	for range 6 {
		cfg.Search = append(cfg.Search, strings.Repeat("x", 60)+".example")
	}
	s, _ := testServices(t, cfg)
	reply, _ := askDHCP(t, s, of(dhcpv4.MessageTypeDiscover))
	require.False(t, reply.Options.Has(dhcpv4.OptionDNSDomainSearchList))
	require.Equal(t, "web", reply.HostName())
	reply, _ = askDHCP(t, s, of(dhcpv4.MessageTypeDiscover), dhcpv4.WithOption(dhcpv4.OptMaxMessageSize(1500)))
	require.Equal(t, s.search, reply.Options.Get(dhcpv4.OptionDNSDomainSearchList))
}

func askDHCPv6(t *testing.T, s *services, kind dhcpv6.MessageType, options ...dhcpv6.Option) *dhcpv6.Message {
	t.Helper()
	request := dhcpv6.Message{MessageType: kind, TransactionID: dhcpv6.TransactionID{1, 2, 3}, Options: dhcpv6.MessageOptions{Options: options}}
	d := askServices(t, s, "[fe80::5]:546", "[ff02::1:2]:547", request.ToBytes())
	if d == nil {
		return nil
	}
	require.Equal(t, "[fe80::1]:547", d.Src.String())
	require.Equal(t, "[fe80::5]:546", d.Dst.String())
	reply, err := dhcpv6.MessageFromBytes(d.Payload)
	require.NoError(t, err)
	require.Equal(t, request.TransactionID, reply.TransactionID)
	require.NotNil(t, reply.Options.ServerID())
	return reply
}

// ia is an association of a client, with addresses that it has already.
func ia(id byte, addrs ...string) dhcpv6.Option {
	o := &dhcpv6.OptIANA{IaId: [4]byte{id}}
	for _, a := range addrs {
		o.Options.Add(&dhcpv6.OptIAAddress{IPv6Addr: net.ParseIP(a), ValidLifetime: time.Hour})
	}
	return o
}

func TestDHCPv6(t *testing.T) {
	s, _ := testServices(t, everyService)
	client := dhcpv6.OptClientID(&dhcpv6.DUIDLL{HWType: iana.HWTypeEthernet, LinkLayerAddr: clientMAC})
	server := dhcpv6.OptServerID(s.serverID())
	other := dhcpv6.OptServerID(&dhcpv6.DUIDLL{HWType: iana.HWTypeEthernet, LinkLayerAddr: clientMAC})
	rapid := &dhcpv6.OptionGeneric{OptionCode: dhcpv6.OptionRapidCommit}
	const has, refused = "2001:db8::2", "status "
	for name, tt := range map[string]struct {
		kind    dhcpv6.MessageType
		options []dhcpv6.Option
		want    dhcpv6.MessageType // 0: none
		status  string             // of the message, "" for none
		lent    []string           // of each identity, in order; "-" for one that is taken back
	}{
		"solicit":             {dhcpv6.MessageTypeSolicit, []dhcpv6.Option{client, ia(1)}, dhcpv6.MessageTypeAdvertise, "", []string{has}},
		"solicit, rapid":      {dhcpv6.MessageTypeSolicit, []dhcpv6.Option{client, rapid, ia(1)}, dhcpv6.MessageTypeReply, "", []string{has}},
		"solicit, anonymous":  {dhcpv6.MessageTypeSolicit, []dhcpv6.Option{ia(1)}, 0, "", nil},
		"solicit of a server": {dhcpv6.MessageTypeSolicit, []dhcpv6.Option{client, server, ia(1)}, 0, "", nil},
		"request":             {dhcpv6.MessageTypeRequest, []dhcpv6.Option{client, server, ia(1, has)}, dhcpv6.MessageTypeReply, "", []string{has}},
		"request of another":  {dhcpv6.MessageTypeRequest, []dhcpv6.Option{client, other, ia(1)}, 0, "", nil},
		"request of anybody":  {dhcpv6.MessageTypeRequest, []dhcpv6.Option{client, ia(1)}, 0, "", nil},
		"two identities":      {dhcpv6.MessageTypeRequest, []dhcpv6.Option{client, server, ia(1), ia(2)}, dhcpv6.MessageTypeReply, "", []string{has, refused + "NoAddrsAvail"}},
		"renew":               {dhcpv6.MessageTypeRenew, []dhcpv6.Option{client, server, ia(1, has)}, dhcpv6.MessageTypeReply, "", []string{has}},
		"renew another":       {dhcpv6.MessageTypeRenew, []dhcpv6.Option{client, server, ia(1, "2001:db8::9")}, dhcpv6.MessageTypeReply, "", []string{has, "-2001:db8::9"}},
		"rebind":              {dhcpv6.MessageTypeRebind, []dhcpv6.Option{client, ia(1, has)}, dhcpv6.MessageTypeReply, "", []string{has}},
		"confirm":             {dhcpv6.MessageTypeConfirm, []dhcpv6.Option{client, ia(1, has)}, dhcpv6.MessageTypeReply, "Success", nil},
		"confirm, moved":      {dhcpv6.MessageTypeConfirm, []dhcpv6.Option{client, ia(1, "2001:db8:1::2")}, dhcpv6.MessageTypeReply, "NotOnLink", nil},
		"confirm nothing":     {dhcpv6.MessageTypeConfirm, []dhcpv6.Option{client, ia(1)}, 0, "", nil},
		"release":             {dhcpv6.MessageTypeRelease, []dhcpv6.Option{client, server, ia(1, has)}, dhcpv6.MessageTypeReply, "Success", nil},
		"information":         {dhcpv6.MessageTypeInformationRequest, nil, dhcpv6.MessageTypeReply, "", nil},
		"information with IA": {dhcpv6.MessageTypeInformationRequest, []dhcpv6.Option{client, ia(1)}, 0, "", nil},
		"relayed":             {dhcpv6.MessageTypeRelayForward, []dhcpv6.Option{client}, 0, "", nil},
		"a reply":             {dhcpv6.MessageTypeReply, []dhcpv6.Option{client, server}, 0, "", nil},
	} {
		t.Run(name, func(t *testing.T) {
			reply := askDHCPv6(t, s, tt.kind, tt.options...)
			if tt.want == 0 {
				require.Nil(t, reply)
				return
			}
			require.Equal(t, tt.want, reply.MessageType)
			require.Equal(t, tt.options != nil, reply.Options.ClientID() != nil)
			status := ""
			if got := reply.Options.Status(); got != nil {
				status = got.StatusCode.String()
			}
			require.Equal(t, tt.status, status)
			var lent []string
			for _, o := range reply.Options.IANA() {
				if got := o.Options.Status(); got != nil {
					lent = append(lent, refused+got.StatusCode.String())
				}
				for _, a := range o.Options.Addresses() {
					if a.ValidLifetime == 0 {
						lent = append(lent, "-"+a.IPv6Addr.String())
						continue
					}
					require.Equal(t, forEver, a.ValidLifetime)
					lent = append(lent, a.IPv6Addr.String())
				}
			}
			require.Equal(t, tt.lent, lent)
			if status == "" {
				require.Equal(t, []net.IP{net.ParseIP("2001:db8::53")}, reply.Options.DNS())
				require.Equal(t, []string{"a.example", "b.example"}, reply.Options.DomainSearchList().Labels)
				require.Equal(t, "web.a.example", reply.Options.FQDN().DomainName.Labels[0])
			}
		})
	}
}

func TestRouterAdvert(t *testing.T) {
	s, link := testServices(t, everyService)
	b := s.routerAdvert()
	m, err := icmp.ParseMessage(58, b)
	require.NoError(t, err)
	require.EqualValues(t, 134, m.Type)
	require.Equal(t, []byte{0, 0x80, 0xff, 0xff}, b[4:8], "hop limit, managed, lifetime")
	options := map[byte][]byte{}
	for rest := b[16:]; len(rest) > 0; rest = rest[int(rest[1])*8:] {
		options[rest[0]] = rest[2 : int(rest[1])*8]
	}
	require.Len(t, options, 5)
	ever := "\xff\xff\xff\xff"
	require.Equal(t, "\x40\xc0"+ever+ever+"\x00\x00\x00\x00"+string(netip.MustParseAddr("2001:db8::").AsSlice()), string(options[3]))
	require.Equal(t, []byte(servicesMAC), options[1])
	require.Equal(t, []byte{0, 0, 0, 0, 0xff, 0xf0}, options[5])
	require.Equal(t, "\x00\x00"+ever+string(netip.MustParseAddr("2001:db8::53").AsSlice()), string(options[25]))
	names, err := rfc1035label.FromBytes(options[31][6:][:len(s.search)])
	require.NoError(t, err)
	require.Equal(t, []string{"a.example", "b.example"}, names.Labels)

	link.adverts = nil
	s.solicited(netip.MustParseAddr("fe80::5"))
	s.solicited(netip.IPv6Unspecified())
	require.Equal(t, []netip.Addr{netip.MustParseAddr("fe80::5"), allNodes}, link.adverts)
}

// However much there is to tell, an advertisement fits the smallest link.
func TestRouterAdvertSize(t *testing.T) {
	cfg := everyService
	for range 40 {
		cfg.DNS = append(cfg.DNS, netip.MustParseAddr("2001:db8::54"))
		cfg.Search = append(cfg.Search, strings.Repeat("x", 40)+".example")
	}
	s, _ := testServices(t, cfg)
	require.LessOrEqual(t, len(s.routerAdvert()), 1280-40)
	require.Len(t, s.dns6, maxToldServers)
}

// Advertisements come without being asked for, soon at first and then from time to
// time, until the end.
func TestAdvertise(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, link := testServices(t, Services{RouterAdvert: true})
		s.start()
		time.Sleep(33 * time.Second)
		synctest.Wait()
		require.Equal(t, 3, link.advertised())
		time.Sleep(maxAdvertInterval)
		synctest.Wait()
		n := link.advertised()
		require.Greater(t, n, 3)
		require.LessOrEqual(t, n, 3+3)
		s.close()
		time.Sleep(time.Hour)
		require.Equal(t, n, link.advertised())
	})
}

func TestServicesConfig(t *testing.T) {
	private := &networkPlan{link: netnsutil.Link{Addrs: []netip.Prefix{netip.MustParsePrefix("192.0.2.2/24")}}}
	s, err := newServices(Services{}, private, nil)
	require.NoError(t, err)
	require.Nil(t, s, "nothing is asked for")
	s.start()
	s.close()

	for _, name := range []string{"a..example", ".example", strings.Repeat("x", 64) + ".example", "a b", strings.Repeat("x.", 127) + "xx"} {
		for _, cfg := range []Services{{DHCP: true, Hostname: name}, {DHCP: true, FQDN: name}} {
			_, err := newServices(cfg, private, nil)
			require.Error(t, err, name)
		}
		s, _ := testServices(t, Services{DHCP: true, Search: []string{name, "a.example", "."}})
		require.Equal(t, "\x01a\x07example\x00", string(s.search), name)
	}

	// Without a gateway there is no DHCP, and without IPv6 none of it; whatever
	// is not for us goes where all goes.
	s, err = newServices(everyService, private, slog.New(slog.DiscardHandler))
	require.NoError(t, err)
	require.False(t, s.advertises())
	for _, dst := range []string{"255.255.255.255:67", "[ff02::1:2]:547"} {
		require.False(t, s.takes(&stack.Datagram{Dst: netip.MustParseAddrPort(dst)}))
	}
	s, _ = testServices(t, everyService)
	for dst, want := range map[string]bool{
		"192.0.2.1:67": true, "192.0.2.9:67": false, "255.255.255.255:68": false,
		"[fe80::1]:547": true, "[2001:db8::1]:547": false,
	} {
		require.Equal(t, want, s.takes(&stack.Datagram{Dst: netip.MustParseAddrPort(dst)}), dst)
	}
}

func TestChooseGuestAddrs(t *testing.T) {
	planned := addrs("192.0.2.2", "2001:db8::2")
	require.Empty(t, choose(planned, nil))
	require.Equal(t, addrs("2001:db8::5"), choose(planned, addrs("2001:db8::5")))
	require.Equal(t, addrs("192.0.2.2", "2001:db8::2", "2001:db8::5"), choose(planned, addrs("192.0.2.2", "2001:db8::5", "2001:db8::2")))
}

// maxReply is the longest reply to a request: what there is to tell, and for what
// it costs the client to ask for one identity more, one more refusal.
func maxReply(s *services, request []byte) int {
	told := len(s.search) + len(s.fqdn) + 32*maxToldServers
	return 600 + told + 2*len(request)
}

func fuzzServices(f *testing.F, src, dst string) {
	s, link := testServices(f, everyService)
	f.Fuzz(func(t *testing.T, request []byte) {
		before := string(request)
		link.sent = nil
		d := &stack.Datagram{Src: netip.MustParseAddrPort(src), Dst: netip.MustParseAddrPort(dst), Payload: request}
		s.answer(d)
		require.Equal(t, before, string(request))
		require.LessOrEqual(t, len(link.sent), 1)
		if len(request) > maxServiceRequest {
			require.Empty(t, link.sent)
		}
		for _, reply := range link.sent {
			require.LessOrEqual(t, len(reply.Payload), maxReply(s, request))
		}
	})
}

func FuzzDHCP(f *testing.F) {
	for _, kind := range []dhcpv4.MessageType{dhcpv4.MessageTypeDiscover, dhcpv4.MessageTypeRequest, dhcpv4.MessageTypeInform} {
		m, err := dhcpv4.New(dhcpv4.WithHwAddr(clientMAC), of(kind), wanted("192.0.2.2"), dhcpv4.WithOption(dhcpv4.OptMaxMessageSize(1500)))
		require.NoError(f, err)
		f.Add(m.ToBytes())
	}
	fuzzServices(f, "0.0.0.0:68", "255.255.255.255:67")
}

func FuzzDHCPv6(f *testing.F) {
	m := dhcpv6.Message{MessageType: dhcpv6.MessageTypeSolicit}
	m.AddOption(dhcpv6.OptClientID(&dhcpv6.DUIDLL{HWType: iana.HWTypeEthernet, LinkLayerAddr: clientMAC}))
	for i := range byte(3) {
		m.AddOption(ia(i, "2001:db8::2", "2001:db8::9"))
	}
	f.Add(m.ToBytes())
	m.MessageType = dhcpv6.MessageTypeConfirm
	f.Add(m.ToBytes())
	f.Add(hostileNames())
	fuzzServices(f, "[fe80::5]:546", "[ff02::1:2]:547")
}

// hostileNames is a request with a search list of pointers that all lead to one
// long name.
func hostileNames() []byte {
	m := dhcpv6.Message{MessageType: dhcpv6.MessageTypeSolicit}
	m.AddOption(dhcpv6.OptClientID(&dhcpv6.DUIDLL{HWType: iana.HWTypeEthernet, LinkLayerAddr: clientMAC}))
	names := []byte(strings.Repeat("\x01x", 350) + "\x00")
	names = append(names, strings.Repeat("\xc0\x00", 350)...)
	m.AddOption(&dhcpv6.OptionGeneric{OptionCode: dhcpv6.OptionDomainSearchList, OptionData: names})
	m.AddOption(ia(1))
	return m.ToBytes()
}

// A request costs little more than its length, whatever is in it: names that the
// library would unfold into megabytes are not looked at.
func TestDHCPv6HostileNames(t *testing.T) {
	s, link := testServices(t, Services{DHCPv6: true})
	request := hostileNames()
	require.Less(t, len(request), maxServiceRequest)
	d := &stack.Datagram{Src: netip.MustParseAddrPort("[fe80::5]:546"), Dst: netip.MustParseAddrPort("[ff02::1:2]:547"), Payload: request}
	allocs := testing.AllocsPerRun(10, func() {
		link.sent = link.sent[:0]
		s.answer(d)
	})
	require.Len(t, link.sent, 1)
	require.Less(t, allocs, float64(200))
}
