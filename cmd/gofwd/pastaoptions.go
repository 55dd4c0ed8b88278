package main

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"time"
)

// minLogSize is the least size of a log file: pasta's 5 pages, or stdio buffers.
const minLogSize = 40 << 10

// options is the table of all options of pasta(1).
func (p *pasta) options() []longOption {
	o, cfg, network := p.o, &p.o.config, &p.o.config.Network
	flag := func(to *bool) func(string) error {
		return func(string) error { *to = true; return nil }
	}
	word := func(to *string) func(string) error {
		return func(arg string) error { *to = arg; return nil }
	}
	verbose := func(quiet bool, level string) func(string) error {
		return func(string) error { o.quiet, o.logLevel = quiet, level; return nil }
	}
	nothing := func(string) error { return nil }
	spec := func(i int) func(string) error {
		return func(arg string) error { p.specs[i] = append(p.specs[i], arg); return nil }
	}
	list := []longOption{
		{"help", 'h', false, flag(&p.help)},
		{"version", 0, false, flag(&p.version)},

		// The process.
		{"quiet", 'q', false, verbose(true, "warn")},
		{"debug", 'd', false, verbose(false, "debug")},
		{"trace", 0, false, verbose(false, "debug")},
		{"foreground", 'f', false, flag(&p.foreground)},
		{"stderr", 'e', false, nothing},        // is where it goes
		{"chroot-fallback", 0, false, nothing}, // there is no pivot_root(2)
		{"log-file", 'l', true, word(&p.logFile)},
		{"log-size", 0, true, p.setLogSize},
		{"pcap", 'p', true, word(&o.pcap)},
		{"pid", 'P', true, word(&o.pidFile)},
		{"conf-path", 'c', true, word(&o.pestoSocket)},
		{"stats", 0, true, p.setStats},
		{"runas", 0, true, p.setRunAs},
		{"fd", 'F', true, nothing}, // of a virtual machine

		// The namespace.
		{"userns", 0, true, word(&p.userNS)},
		{"netns", 0, true, word(&p.netNS)},
		{"netns-only", 0, false, flag(&o.netNSOnly)},
		{"no-netns-quit", 0, false, flag(&cfg.IgnoreGone)},
		{"no-pidns", 0, false, flag(&p.noPIDNS)},
		{"config-net", 0, false, flag(&p.configNet)},
		{"no-copy-routes", 0, false, flag(&p.noCopyRoutes)},
		{"no-copy-addrs", 0, false, flag(&p.noCopyAddrs)},
		{"ns-ifname", 'I', true, word(&network.IfName)},
		{"mtu", 'm', true, p.setMTU},
		{"address", 'a', true, func(arg string) error { p.addrs = append(p.addrs, arg); return nil }},
		{"netmask", 'n', true, p.setNetmask},
		{"gateway", 'g', true, addAddr("gateway", &network.Gateways)},
		{"interface", 'i', true, word(&p.template)},
		{"ipv4-only", '4', false, flag(&network.NoIPv6)},
		{"ipv6-only", '6', false, flag(&network.NoIPv4)},

		// The way out.
		{"outbound", 'o', true, p.setOutbound},
		{"outbound-if4", 0, true, word(&cfg.OutboundIf4)},
		{"outbound-if6", 0, true, word(&cfg.OutboundIf6)},

		// Names and addresses with a meaning.
		{"dns-forward", 0, true, addAddr("dns-forward", &network.DNS)},
		{"dns-host", 0, true, addAddr("dns-host", &network.Nameservers)},
		{"map-host-loopback", 0, true, addAddrOrNone("map-host-loopback", &network.MapHostLoopback, &p.noMapGW)},
		{"no-map-gw", 0, false, flag(&p.noMapGW)},
		{"map-guest-addr", 0, true, addAddrOrNone("map-guest-addr", &network.HostAlias, new(bool))},

		// Ports.
		{"tcp-ports", 't', true, spec(0)},
		{"udp-ports", 'u', true, spec(1)},
		{"tcp-ns", 'T', true, spec(2)},
		{"udp-ns", 'U', true, spec(3)},
		{"host-lo-to-ns-lo", 0, false, flag(&cfg.HostLoopbackToNSLoopback)},
		{"no-splice", 0, false, flag(&p.noSplice)},
		{"splice-only", 0, false, flag(&cfg.LoopbackOnly)},
		{"freebind", 0, false, flag(&cfg.FreeBind)},
		{"no-tcp", 0, false, flag(&cfg.NoTCP)},
		{"no-udp", 0, false, flag(&cfg.NoUDP)},
		{"no-icmp", 0, false, flag(&cfg.NoICMP)},
	}
	return slices.Concat(list, p.serviceOptions(), p.refused())
}

// refused are the options of passt(1), which pasta has and refuses.
func (p *pasta) refused() []longOption {
	refuse := func(name string, letter byte, hasArg bool) longOption {
		return longOption{name, letter, hasArg, func(string) error {
			return fmt.Errorf("--%s: is for passt mode only", name)
		}}
	}
	return []longOption{
		refuse("socket", 's', true),
		refuse("socket-path", 0, true),
		refuse("one-off", '1', false),
		refuse("vhost-user", 0, false),
		refuse("print-capabilities", 0, false),
		refuse("repair-path", 0, true),
		refuse("migrate-exit", 0, false),
		refuse("migrate-no-linger", 0, false),
		refuse("no-dhcp-dns", 0, false),
		refuse("no-dhcp-search", 0, false),
	}
}

func (p *pasta) setLogSize(arg string) error {
	n, err := strconv.ParseInt(arg, 10, 32)
	if err != nil || n < minLogSize {
		return fmt.Errorf("--log-size %s: not a number from %d on", arg, minLogSize)
	}
	p.logSize = n
	return nil
}

// setStats takes a number of seconds.
func (p *pasta) setStats(arg string) error {
	n, err := strconv.ParseUint(arg, 10, 31)
	if err != nil {
		return fmt.Errorf("--stats %s: not a number of seconds", arg)
	}
	p.o.stats = time.Duration(n) * time.Second
	return nil
}

func (p *pasta) setRunAs(arg string) error {
	id, err := parseIdentity(arg)
	if err != nil {
		return fmt.Errorf("--runas %s: %w", arg, err)
	}
	p.o.runAs = &id
	return nil
}

// setOutbound takes one address of each family; of several the last one counts.
func (p *pasta) setOutbound(arg string) error {
	a, err := parseAddr(arg)
	if err != nil {
		return fmt.Errorf("--outbound %s: %w", arg, err)
	}
	addrs := &p.o.config.OutboundAddrs
	*addrs = slices.DeleteFunc(*addrs, func(old netip.Addr) bool { return old.Is4() == a.Is4() })
	*addrs = append(*addrs, a)
	return nil
}

// setNetmask takes the netmask of addresses that are given; those that are copied
// keep theirs.
func (p *pasta) setNetmask(arg string) error {
	p.netmask = arg
	_, err := parseNetmask(arg)
	return err
}

// setMTU takes 0 for the kernel's own.
func (p *pasta) setMTU(arg string) error {
	n, err := strconv.ParseUint(arg, 10, 16)
	if err != nil || n > pastaMTU {
		return fmt.Errorf("--mtu %s: not a number up to %d", arg, pastaMTU)
	}
	p.o.config.Network.MTU = int(n)
	return nil
}

// addAddr returns the setter of an option that takes one address of each family.
func addAddr(option string, to *[]netip.Addr) func(string) error {
	return func(arg string) error {
		a, err := parseAddr(arg)
		if err != nil {
			return fmt.Errorf("--%s %s: %w", option, arg, err)
		}
		*to = append(*to, a)
		return nil
	}
}

// addAddrOrNone is addAddr, but "none" sets none.
func addAddrOrNone(option string, to *[]netip.Addr, none *bool) func(string) error {
	add := addAddr(option, to)
	return func(arg string) error {
		if arg == "none" {
			*to, *none = nil, true
			return nil
		}
		return add(arg)
	}
}
