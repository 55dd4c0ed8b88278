package forward

import (
	"encoding/binary"
	"fmt"
	"maps"
	"net"
	"net/netip"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/insomniacslk/dhcp/iana"

	"github.com/gofwd/gofwd/stack"
)

var broadcast4 = netip.AddrFrom4([4]byte{255, 255, 255, 255})

// optionRapidCommit of DHCP: the client takes an acknowledgement for an offer
// (RFC 4039).
const optionRapidCommit = dhcpv4.GenericOptionCode(80)

// optionFQDN of DHCP (RFC 4702).
const optionFQDN = dhcpv4.GenericOptionCode(81)

func (s *services) isDHCP(d *stack.Datagram) bool {
	return s.DHCP && d.Dst.Port() == dhcpv4.ServerPort && s.addr4.IsValid() &&
		(d.Dst.Addr() == broadcast4 || d.Dst.Addr() == s.gateway4)
}

// answerDHCP answers a DHCP request as RFC 2131 §4.3 has it.
func (s *services) answerDHCP(d *stack.Datagram) error {
	request, err := dhcpv4.FromBytes(d.Payload)
	switch {
	case err != nil:
		return err
	case request.OpCode != dhcpv4.OpcodeBootRequest || request.HWType != iana.HWTypeEthernet || len(request.ClientHWAddr) != 6:
		return errMalformedRequest
	case !request.GatewayIPAddr.IsUnspecified():
		return errForOthers // it came by a relay, and there is none
	}
	kind, err := s.dhcpReply(request)
	if err != nil {
		return err
	}
	reply := &dhcpv4.DHCPv4{
		OpCode: dhcpv4.OpcodeBootReply, HWType: request.HWType, ClientHWAddr: request.ClientHWAddr,
		TransactionID: request.TransactionID, Flags: request.Flags,
		Options: dhcpv4.OptionsFromList(
			dhcpv4.OptMessageType(kind),
			dhcpv4.OptServerIdentifier(s.gateway4.AsSlice()),
		),
	}
	if id := request.Options.Get(dhcpv4.OptionClientIdentifier); id != nil {
		reply.UpdateOption(dhcpv4.OptGeneric(dhcpv4.OptionClientIdentifier, id)) // RFC 6842
	}
	if kind != dhcpv4.MessageTypeNak {
		s.fillLease(reply, request)
	}
	return s.link.WriteUDP(&stack.Datagram{
		Src:         netip.AddrPortFrom(s.gateway4, dhcpv4.ServerPort),
		Dst:         netip.AddrPortFrom(s.dhcpDestination(kind, request), dhcpv4.ClientPort),
		Payload:     reply.ToBytes(),
		Checksummed: true,
	})
}

// dhcpReply returns the kind of reply to a request.
func (s *services) dhcpReply(request *dhcpv4.DHCPv4) (dhcpv4.MessageType, error) {
	server, toServer := netip.AddrFromSlice(request.ServerIdentifier().To4())
	switch request.MessageType() {
	case dhcpv4.MessageTypeDiscover:
		if request.Options.Has(optionRapidCommit) {
			return dhcpv4.MessageTypeAck, nil
		}
		return dhcpv4.MessageTypeOffer, nil
	case dhcpv4.MessageTypeRequest:
		if toServer && server != s.gateway4 {
			return 0, errForOthers
		}
		wanted := request.RequestedIPAddress()
		if wanted == nil {
			wanted = request.ClientIPAddr
		}
		if !wanted.Equal(s.addr4.Addr().AsSlice()) {
			return dhcpv4.MessageTypeNak, nil
		}
		return dhcpv4.MessageTypeAck, nil
	case dhcpv4.MessageTypeInform:
		return dhcpv4.MessageTypeAck, nil
	}
	return 0, fmt.Errorf("%w: %s", errNotARequest, request.MessageType())
}

// fillLease puts into reply all that there is to tell.
func (s *services) fillLease(reply, request *dhcpv4.DHCPv4) {
	maps.Copy(reply.Options, s.dhcpOptions())
	if request.MessageType() == dhcpv4.MessageTypeInform {
		reply.ClientIPAddr = request.ClientIPAddr // the address that it has, whichever
	} else {
		reply.YourIPAddr = s.addr4.Addr().AsSlice()
		reply.UpdateOption(dhcpv4.OptGeneric(dhcpv4.OptionIPAddressLeaseTime, binary.BigEndian.AppendUint32(nil, infinite)))
	}
	if request.MessageType() == dhcpv4.MessageTypeDiscover && reply.MessageType() == dhcpv4.MessageTypeAck {
		reply.UpdateOption(dhcpv4.OptGeneric(optionRapidCommit, nil))
	}
	// What the client takes is the length of a packet; it may say so only if
	// that is more than any host must take (RFC 2132 §9.10).
	const headers, least = 20 + 8, 576
	room := least
	if n, err := request.MaxMessageSize(); err == nil {
		room = max(int(n), least)
	}
	for _, code := range []dhcpv4.OptionCode{dhcpv4.OptionDNSDomainSearchList, optionFQDN} {
		if len(reply.ToBytes())+headers > room {
			reply.Options.Del(code)
		}
	}
}

// dhcpOptions are the options that are the same for all.
func (s *services) dhcpOptions() dhcpv4.Options {
	router := net.IP(s.gateway4.AsSlice())
	options := dhcpv4.OptionsFromList(
		dhcpv4.OptSubnetMask(net.CIDRMask(s.addr4.Bits(), 32)),
		dhcpv4.OptRouter(router),
	)
	if !s.addr4.Contains(s.gateway4) {
		// Clients that know this option pass over the router's, and find
		// here how to reach it (RFC 3442).
		options.Update(dhcpv4.OptClasslessStaticRoute(
			&dhcpv4.Route{Dest: &net.IPNet{IP: router, Mask: net.CIDRMask(32, 32)}, Router: net.IPv4zero},
			&dhcpv4.Route{Dest: &net.IPNet{IP: net.IPv4zero, Mask: net.CIDRMask(0, 32)}, Router: router},
		))
	}
	if s.mtu != 0 {
		options.Update(dhcpv4.OptGeneric(dhcpv4.OptionInterfaceMTU, binary.BigEndian.AppendUint16(nil, uint16(s.mtu))))
	}
	if len(s.dns4) > 0 {
		options.Update(dhcpv4.OptDNS(netIPs(s.dns4)...))
	}
	if len(s.search) > 0 {
		options.Update(dhcpv4.OptGeneric(dhcpv4.OptionDNSDomainSearchList, s.search))
	}
	if s.Hostname != "" {
		options.Update(dhcpv4.OptHostName(s.Hostname))
	}
	if s.fqdn != nil {
		const encoded, obsolete = 4, 255 // the E bit, and what is to be in both result codes
		options.Update(dhcpv4.OptGeneric(optionFQDN, append([]byte{encoded, obsolete, obsolete}, s.fqdn...)))
	}
	return options
}

// dhcpDestination returns where a reply goes (RFC 2131 §4.1). On our link all of
// it arrives, but a client that has no address yet may insist on broadcast.
func (s *services) dhcpDestination(kind dhcpv4.MessageType, request *dhcpv4.DHCPv4) netip.Addr {
	client, _ := netip.AddrFromSlice(request.ClientIPAddr.To4())
	switch {
	case kind == dhcpv4.MessageTypeNak:
		return broadcast4
	case client.IsValid() && !client.IsUnspecified():
		return client
	case request.IsBroadcast():
		return broadcast4
	}
	return s.addr4.Addr()
}

func netIPs(addrs []netip.Addr) []net.IP {
	ips := make([]net.IP, len(addrs))
	for i, a := range addrs {
		ips[i] = a.AsSlice()
	}
	return ips
}
