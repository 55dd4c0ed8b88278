package main

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
)

// pastaServices are the options about what a container may ask that configures
// itself.
type pastaServices struct {
	noDHCP, noDHCPv6, noNDP, noRA bool
	dhcpDNS, dhcpSearch           bool
	dns                           []netip.Addr
	search                        []string
	ownDNS, ownSearch             bool // dns or search was given, if only as none
}

func (p *pasta) serviceOptions() []longOption {
	s, network := &p.services, &p.o.config.Network
	flag := func(to *bool) func(string) error {
		return func(string) error { *to = true; return nil }
	}
	name := func(to *string) func(string) error {
		return func(arg string) error { *to = arg; return nil }
	}
	return []longOption{
		{"mac-addr", 'M', true, setMAC("mac-addr", &network.GatewayMAC)},
		{"ns-mac-addr", 0, true, setMAC("ns-mac-addr", &network.MAC)},
		{"dns", 'D', true, s.addDNS},
		{"search", 'S', true, s.addSearch},
		{"dhcp-dns", 0, false, flag(&s.dhcpDNS)},
		{"dhcp-search", 0, false, flag(&s.dhcpSearch)},
		{"hostname", 'H', true, name(&network.Services.Hostname)},
		{"fqdn", 0, true, name(&network.Services.FQDN)},
		{"no-dhcp", 0, false, flag(&s.noDHCP)},
		{"no-dhcpv6", 0, false, flag(&s.noDHCPv6)},
		{"no-ndp", 0, false, flag(&s.noNDP)},
		{"no-ra", 0, false, flag(&s.noRA)},
	}
}

func setMAC(option string, to *net.HardwareAddr) func(string) error {
	return func(arg string) error {
		mac, err := net.ParseMAC(arg)
		if err != nil || len(mac) != 6 {
			return fmt.Errorf("--%s %s: not a MAC address", option, arg)
		}
		*to = mac
		return nil
	}
}

// addDNS takes an address, or "none" or nothing for none at all.
func (s *pastaServices) addDNS(arg string) error {
	s.ownDNS = true
	if arg == "" || arg == "none" {
		s.dns = nil
		return nil
	}
	return addAddr("dns", &s.dns)(arg)
}

// addSearch takes domains, with spaces between them.
func (s *pastaServices) addSearch(arg string) error {
	s.ownSearch = true
	if arg == "" || arg == "none" {
		s.search = nil
		return nil
	}
	s.search = append(s.search, strings.Fields(arg)...)
	return nil
}

// completeServices switches on what is not switched off. What the host's
// resolv.conf has is told as it is now.
func (p *pasta) completeServices() {
	s, network := &p.services, &p.o.config.Network
	network.Unconfigured = !p.configNet
	network.NoNDP = s.noNDP || p.o.config.NoICMP
	services := &network.Services
	services.DHCP, services.DHCPv6 = !s.noDHCP, !s.noDHCPv6
	services.RouterAdvert = !s.noRA && !network.NoNDP && !p.configNet
	services.NoMTU = network.MTU == 0

	// Without the file, there are no servers to tell.
	text, _ := os.ReadFile(resolvConfPath)
	host := parseResolvConf(string(text))
	if !s.ownDNS {
		s.dns = p.reachable(host.servers)
	}
	if !s.ownSearch {
		s.search = host.search
	}
	if s.dhcpDNS {
		services.DNS = s.dns
	}
	if s.dhcpSearch {
		services.Search = s.search
	}
}

// reachable returns the addresses at which the container finds the host's
// nameservers: for one on the host's loopback that is where DNS is forwarded from,
// or else where the host's loopback is.
func (p *pasta) reachable(servers []netip.Addr) []netip.Addr {
	network := &p.o.config.Network
	var list []netip.Addr
	for _, server := range servers {
		if !server.IsLoopback() {
			list = append(list, server)
			continue
		}
		for _, others := range [][]netip.Addr{network.DNS, network.MapHostLoopback} {
			if i := indexOfFamily(others, server); i >= 0 {
				list = append(list, others[i])
				break
			}
		}
	}
	return list
}

func indexOfFamily(addrs []netip.Addr, like netip.Addr) int {
	for i, a := range addrs {
		if a.Is4() == like.Is4() {
			return i
		}
	}
	return -1
}

// hostResolver is what of a resolv.conf(5) is told to others.
type hostResolver struct {
	servers []netip.Addr
	search  []string
}

func parseResolvConf(text string) hostResolver {
	var r hostResolver
	for line := range strings.Lines(text) {
		fields := strings.Fields(line)
		if len(fields) < 2 {
			continue
		}
		switch fields[0] {
		case "nameserver":
			if a, err := netip.ParseAddr(fields[1]); err == nil && !a.IsUnspecified() && a.Zone() == "" {
				r.servers = append(r.servers, a.Unmap())
			}
		case "search", "domain": // the last one counts
			r.search = nil
			for _, name := range fields[1:] {
				if name = strings.Trim(name, "."); name != "" {
					r.search = append(r.search, name)
				}
			}
		}
	}
	return r
}
