package forward

import (
	"bytes"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv6"
	"github.com/insomniacslk/dhcp/iana"

	"github.com/gofwd/gofwd/stack"
)

// dhcpv6Group is where clients look for servers (RFC 8415 §7.1).
var dhcpv6Group = netip.MustParseAddr("ff02::1:2")

// forEver is how long addresses are lent.
const forEver = infinite * time.Second

func (s *services) isDHCPv6(d *stack.Datagram) bool {
	return s.DHCPv6 && d.Dst.Port() == dhcpv6.DefaultServerPort && s.addr6.IsValid() &&
		(d.Dst.Addr() == dhcpv6Group || d.Dst.Addr() == s.router)
}

// rawOptions parses options, but not what is in them: the library would parse that
// all the way down, needed or not, and DNS names that point at each other are work
// that grows with the square of the request.
func rawOptions(b []byte) (dhcpv6.Options, error) {
	var options dhcpv6.Options
	err := options.FromBytesWithParser(b, func(code dhcpv6.OptionCode, data []byte) (dhcpv6.Option, error) {
		return &dhcpv6.OptionGeneric{OptionCode: code, OptionData: data}, nil
	})
	return options, err
}

// rawOption returns the content of the first option with that code, nil if there is
// none.
func rawOption(options dhcpv6.Options, code dhcpv6.OptionCode) []byte {
	if o, ok := options.GetOne(code).(*dhcpv6.OptionGeneric); ok && o.OptionData != nil {
		return o.OptionData
	}
	return nil
}

// serverID is the same for every gofwd with the same MAC address, so that the
// next one takes over the leases.
func (s *services) serverID() dhcpv6.DUID {
	return &dhcpv6.DUIDLL{HWType: iana.HWTypeEthernet, LinkLayerAddr: s.mac}
}

// answerDHCPv6 answers a DHCPv6 request as RFC 8415 §18.3 has it.
func (s *services) answerDHCPv6(d *stack.Datagram) error {
	const header = 4 // type, and transaction ID
	if len(d.Payload) < header {
		return errMalformedRequest
	}
	kind := dhcpv6.MessageType(d.Payload[0])
	request, err := rawOptions(d.Payload[header:])
	if err != nil {
		return err
	}
	if err := s.checkDHCPv6(kind, request); err != nil {
		return err
	}
	reply := &dhcpv6.Message{MessageType: dhcpv6.MessageTypeReply, TransactionID: dhcpv6.TransactionID(d.Payload[1:header])}
	if id := rawOption(request, dhcpv6.OptionClientID); id != nil {
		reply.AddOption(&dhcpv6.OptionGeneric{OptionCode: dhcpv6.OptionClientID, OptionData: id})
	}
	reply.AddOption(dhcpv6.OptServerID(s.serverID()))
	switch kind {
	case dhcpv6.MessageTypeConfirm:
		status, err := s.confirm(request)
		if err != nil {
			return err
		}
		reply.AddOption(&dhcpv6.OptStatusCode{StatusCode: status})
	case dhcpv6.MessageTypeRelease, dhcpv6.MessageTypeDecline:
		reply.AddOption(&dhcpv6.OptStatusCode{StatusCode: iana.StatusSuccess})
	default:
		if kind == dhcpv6.MessageTypeSolicit {
			if request.GetOne(dhcpv6.OptionRapidCommit) != nil {
				reply.AddOption(&dhcpv6.OptionGeneric{OptionCode: dhcpv6.OptionRapidCommit})
			} else {
				reply.MessageType = dhcpv6.MessageTypeAdvertise
			}
		}
		s.lend(reply, request)
		s.fillDHCPv6(reply)
	}
	return s.link.WriteUDP(&stack.Datagram{
		Src:         netip.AddrPortFrom(s.router, dhcpv6.DefaultServerPort),
		Dst:         netip.AddrPortFrom(d.Src.Addr(), dhcpv6.DefaultClientPort),
		Payload:     reply.ToBytes(),
		Checksummed: true,
	})
}

// checkDHCPv6 returns an error for what is to be discarded (RFC 8415 §16).
func (s *services) checkDHCPv6(kind dhcpv6.MessageType, request dhcpv6.Options) error {
	client, server := rawOption(request, dhcpv6.OptionClientID), rawOption(request, dhcpv6.OptionServerID)
	ours := bytes.Equal(server, s.serverID().ToBytes())
	switch kind {
	case dhcpv6.MessageTypeSolicit, dhcpv6.MessageTypeConfirm, dhcpv6.MessageTypeRebind:
		if client == nil || server != nil {
			return errMalformedRequest
		}
	case dhcpv6.MessageTypeRequest, dhcpv6.MessageTypeRenew, dhcpv6.MessageTypeRelease, dhcpv6.MessageTypeDecline:
		if client == nil || server == nil {
			return errMalformedRequest
		}
		if !ours {
			return errForOthers
		}
	case dhcpv6.MessageTypeInformationRequest:
		if slices.ContainsFunc([]dhcpv6.OptionCode{dhcpv6.OptionIANA, dhcpv6.OptionIATA, dhcpv6.OptionIAPD},
			func(ia dhcpv6.OptionCode) bool { return request.GetOne(ia) != nil }) {
			return errMalformedRequest // §16.12: it asks for no addresses
		}
		if server != nil && !ours {
			return errForOthers
		}
	default:
		return fmt.Errorf("%w: %s", errNotARequest, kind)
	}
	return nil
}

// identity is one association of a client with addresses, IA_NA.
type identity struct {
	id    [4]byte
	addrs []netip.Addr
}

// identities returns what a request has of them, but for the malformed.
func identities(request dhcpv6.Options) []identity {
	var list []identity
	for _, o := range request.Get(dhcpv6.OptionIANA) {
		const header = 12 // ID, T1, T2
		b := o.(*dhcpv6.OptionGeneric).OptionData
		if len(b) < header {
			continue
		}
		options, err := rawOptions(b[header:])
		if err != nil {
			continue
		}
		ia := identity{id: [4]byte(b)}
		for _, o := range options.Get(dhcpv6.OptionIAAddr) {
			if b := o.(*dhcpv6.OptionGeneric).OptionData; len(b) >= 16 {
				ia.addrs = append(ia.addrs, netip.AddrFrom16([16]byte(b)))
			}
		}
		list = append(list, ia)
	}
	return list
}

// lend gives our address to the first identity of a request, and takes back
// whatever other addresses that has. For the others there is none.
func (s *services) lend(reply *dhcpv6.Message, request dhcpv6.Options) {
	own := s.addr6.Addr()
	for i, ia := range identities(request) {
		lent := &dhcpv6.OptIANA{IaId: ia.id}
		if i > 0 {
			lent.Options.Add(&dhcpv6.OptStatusCode{StatusCode: iana.StatusNoAddrsAvail})
			reply.AddOption(lent)
			continue
		}
		lent.T1, lent.T2 = forEver, forEver
		lent.Options.Add(&dhcpv6.OptIAAddress{IPv6Addr: own.AsSlice(), PreferredLifetime: forEver, ValidLifetime: forEver})
		for _, a := range ia.addrs {
			if a != own {
				lent.Options.Add(&dhcpv6.OptIAAddress{IPv6Addr: a.AsSlice()})
			}
		}
		reply.AddOption(lent)
	}
}

// confirm says whether a client that may have been moved to another link has
// addresses of ours.
func (s *services) confirm(request dhcpv6.Options) (iana.StatusCode, error) {
	asked := false
	net := netip.PrefixFrom(s.addr6.Addr(), 64)
	for _, ia := range identities(request) {
		for _, a := range ia.addrs {
			asked = true
			if !net.Contains(a) {
				return iana.StatusNotOnLink, nil
			}
		}
	}
	if !asked {
		return 0, errMalformedRequest // and it must not be answered
	}
	return iana.StatusSuccess, nil
}

// fillDHCPv6 puts into reply what there is to tell besides addresses.
func (s *services) fillDHCPv6(reply *dhcpv6.Message) {
	if len(s.dns6) > 0 {
		reply.AddOption(dhcpv6.OptDNS(netIPs(s.dns6)...))
	}
	if len(s.search) > 0 {
		reply.AddOption(&dhcpv6.OptionGeneric{OptionCode: dhcpv6.OptionDomainSearchList, OptionData: s.search})
	}
	if s.fqdn != nil {
		// No flags: nobody updates any DNS (RFC 4704 §4.1).
		reply.AddOption(&dhcpv6.OptionGeneric{OptionCode: dhcpv6.OptionFQDN, OptionData: append([]byte{0}, s.fqdn...)})
	}
}
