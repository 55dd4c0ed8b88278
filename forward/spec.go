package forward

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
)

// ParsePublish parses what Docker and Podman users give to -p:
//
//	[[ADDR][%IFACE]:][HOST:]CONTAINER[/PROTO[,PROTO]]
//
// HOST and CONTAINER are a port or a range of the same length, 8000-8010; without
// HOST, or with HOST 0, the kernel chooses free ports. ADDR is an IPv4 address or
// an IPv6 address in brackets, * or nothing for all of both families; % inside
// the brackets is a zone, outside an interface. PROTO is tcp (the default) or
// udp; with both there are two rules.
//
// What [Rule.String] writes is understood as well. Beyond the above that is
// HOST:TARGET:CONTAINER, where TARGET is an address in the namespace; sockets
// that are not bound by address,
//
//	unix:PATH:CONTAINER       a UNIX socket, made at PATH
//	systemd:NAME:CONTAINER    those of this name that were passed, by systemd
//	fd:NAME:CONTAINER         or otherwise: Config.Sockets, Change.Sockets; it is the same
//	PORT:unix:PATH/tcp,out    a UNIX socket of the host, at a port of the container
//
// and options after PROTO, each after a comma: "out", "weak", "auto", "share",
// "wait", "proxy=v2", "max=N", "rate=N", "idle=DURATION", "allow=PREFIX+PREFIX",
// "deny=PREFIX+PREFIX". They are the fields of [Rule].
//
// The rules are valid, in the sense of [Validate]. An error quotes s and the
// piece of it that is wrong.
func ParsePublish(s string) ([]Rule, error) {
	rules, err := parsePublish(s)
	if err != nil {
		return nil, fmt.Errorf("port rule %q: %w", s, err)
	}
	return rules, nil
}

func parsePublish(s string) ([]Rule, error) {
	if r, err := parseSocketRule(s); r != nil || err != nil {
		return r, err
	}
	r := Rule{Proto: TCP}
	protos := []Proto{TCP}
	head, suffix, found := strings.Cut(s, "/")
	var err error
	if found {
		if protos, err = parseSuffix(&r, suffix); err != nil {
			return nil, err
		}
	}
	fields := splitColons(head)
	if len(fields) > 1 && strings.Trim(fields[0], "0123456789-") != "" {
		if r.Addr, r.Iface, err = parseListen(fields[0]); err != nil {
			if len(fields) > 3 && !strings.HasPrefix(head, "[") {
				err = fmt.Errorf("%w; an IPv6 address goes in brackets", err)
			}
			return nil, err
		}
		fields = fields[1:]
	}
	host, target, container := "", "", fields[len(fields)-1]
	switch len(fields) {
	case 1:
	case 2:
		host = fields[0]
	case 3:
		host, target = fields[0], fields[1]
		if r.Target, err = parseTarget(target); err != nil {
			return nil, err
		}
	default:
		return nil, errors.New("too many colons; an IPv6 address goes in brackets")
	}
	if host != "" && host != "0" {
		if r.Ports, err = parseRange(host); err != nil {
			return nil, err
		}
	}
	if r.TargetPorts, err = parseRange(container); err != nil {
		return nil, err
	}
	rules := make([]Rule, len(protos))
	for i, proto := range protos {
		rules[i] = r
		rules[i].Proto = proto
	}
	return rules, r.check()
}

// parseSuffix parses what follows the slash of a published port: protocols, then
// options, which it sets in r.
func parseSuffix(r *Rule, s string) (protos []Proto, err error) {
	for i, word := range strings.Split(s, ",") {
		if i > 0 {
			if ok, err := parseOption(r, word); err != nil {
				return nil, err
			} else if ok {
				continue
			}
		}
		proto, err := parseProto(word)
		if err != nil {
			return nil, err
		}
		if slices.Contains(protos, proto) {
			return nil, fmt.Errorf("%q is given twice", word)
		}
		protos = append(protos, proto)
	}
	return protos, nil
}

// parseSocketRule parses a rule with a socket that is not bound by address; nil
// is a rule without. PATH may have any character, so what follows it is looked
// for from the end.
func parseSocketRule(s string) ([]Rule, error) {
	kind, rest, _ := strings.Cut(s, ":")
	r := Rule{Proto: TCP}
	switch {
	case kind == "unix" || kind == "systemd" || kind == "fd":
		i := strings.LastIndexByte(rest, ':')
		for i >= 0 && strings.Contains(rest[i:], "=") { // of an IPv6 prefix in an option
			i = strings.LastIndexByte(rest[:i], ':')
		}
		if i < 0 {
			return nil, fmt.Errorf("no port of the container follows %q", s)
		}
		r.Socket = kind + ":" + rest[:i]
		rest = rest[i+1:]
	case strings.HasPrefix(rest, "unix:"):
		var err error
		if r.Ports, err = parseRange(kind); err != nil {
			return nil, err
		}
		path := strings.TrimPrefix(rest, "unix:")
		rest = kind
		if i := strings.LastIndex(path, "/tcp,out"); i >= 0 {
			path, rest = path[:i], kind+path[i:]
		}
		r.Dir, r.TargetSocket = Out, path
	default:
		return nil, nil
	}
	ports, suffix, found := strings.Cut(rest, "/")
	if found {
		protos, err := parseSuffix(&r, suffix)
		if err != nil {
			return nil, err
		}
		if len(protos) > 1 {
			return nil, errors.New("one socket has one protocol")
		}
		r.Proto = protos[0]
	}
	var err error
	if r.TargetPorts, err = parseRange(ports); err != nil {
		return nil, err
	}
	return []Rule{r}, r.check()
}

// splitColons splits at colons, except for those in brackets at the beginning
// of a field.
func splitColons(s string) (fields []string) {
	for {
		from := 0
		if strings.HasPrefix(s, "[") {
			from = max(0, strings.IndexByte(s, ']'))
		}
		i := strings.IndexByte(s[from:], ':')
		if i < 0 {
			return append(fields, s)
		}
		fields = append(fields, s[:from+i])
		s = s[from+i+1:]
	}
}

// ParseSpec parses the port specifier of pasta(1) that follows -t and -u (dir In)
// and -T and -U (dir Out):
//
//	none
//	[[ADDR][%IFACE]/]CHUNK[,CHUNK...]
//
//	CHUNK: RANGE[:RANGE]          8080  8000-8010  8000-8010:9000-9010
//	       RANGE:TARGET[/RANGE]   to another address in the namespace
//	       PORT:unix:PATH         -T: to a UNIX socket of the host, alone in its list
//	       ~RANGE                 but not these
//	       all[:TARGET]           all ports but the ephemeral ones
//	       auto                   only while something listens there
//
// IPv6 addresses may do without brackets. Without any RANGE or with all, the
// rules are weak, and leave out the ports that the kernel gives to outgoing
// connections (net.ipv4.ip_local_port_range, read for the purpose).
//
// The rules are valid, in the sense of [Validate], and in the order of their
// ports; "none" is no rule. An error quotes spec and the piece of it that is
// wrong.
func ParseSpec(dir Dir, proto Proto, spec string) ([]Rule, error) {
	rules, err := parseSpec(Rule{Dir: dir, Proto: proto}, spec, ephemeralPorts())
	if err != nil {
		return nil, fmt.Errorf("port specifier %q: %w", spec, err)
	}
	return rules, nil
}

// ephemeralPorts returns the ports that the kernel chooses from.
func ephemeralPorts() PortRange {
	r := PortRange{32768, 60999} // the kernel's default, ip(7)
	b, err := os.ReadFile("/proc/sys/net/ipv4/ip_local_port_range")
	if err != nil {
		return r
	}
	if f := strings.Fields(string(b)); len(f) == 2 {
		if read, err := parseRange(f[0] + "-" + f[1]); err == nil {
			return read
		}
	}
	return r
}

// parseSpec parses spec into copies of r.
func parseSpec(r Rule, spec string, ephemeral PortRange) ([]Rule, error) {
	if spec == "none" {
		return nil, nil
	}
	if port, path, found := strings.Cut(spec, ":unix:"); found && r.Dir == Out && r.Proto == TCP {
		var err error
		if r.Ports, err = parseRange(port); err != nil {
			return nil, err
		}
		r.TargetPorts, r.TargetSocket = r.Ports, path
		return []Rule{r}, r.check()
	}
	listen, list := splitSpec(spec)
	var err error
	if r.Addr, r.Iface, err = parseListen(listen); err != nil {
		return nil, err
	}
	var (
		include []Rule
		exclude []PortRange
		all     string // the chunk
	)
	for chunk := range strings.SplitSeq(list, ",") {
		name, target, hasTarget := strings.Cut(chunk, ":")
		switch {
		case chunk == "auto":
			r.Auto = true
		case name == "all" && all != "":
			return nil, fmt.Errorf("%q and %q overlap", all, chunk)
		case name == "all":
			all = chunk
			if hasTarget {
				if r.Target, err = parseTarget(target); err != nil {
					return nil, err
				}
			}
		case strings.HasPrefix(chunk, "~"):
			ports, err := parseRange(chunk[1:])
			if err != nil {
				return nil, err
			}
			exclude = append(exclude, ports)
		default:
			mapped, err := parseMap(r, chunk)
			if err != nil {
				return nil, err
			}
			include = append(include, mapped)
		}
	}
	switch {
	case len(include) == 0:
		r.Weak = true
		r.Ports = PortRange{1, 65535}
		r.TargetPorts = r.Ports
		include = append(include, r)
		exclude = append(exclude, ephemeral)
	case all != "":
		return nil, fmt.Errorf("%q and %q overlap", all, include[0].Ports)
	}
	for i := range include {
		include[i].Auto = r.Auto // wherever in the list it stood
		if err := include[i].check(); err != nil {
			return nil, err
		}
	}
	return subtract(include, exclude)
}

// splitSpec cuts a specifier into the address to listen on and the list of
// ports. A slash may also be that of a target, 8080:10.0.0.1/80; there a port
// stands before the first colon. 80:fd00::1/80 can be read either way, and is
// taken for an address, as pasta does.
func splitSpec(spec string) (listen, list string) {
	before, after, found := strings.Cut(spec, "/")
	if !found {
		return "", spec
	}
	if _, err := netip.ParseAddr(before); err == nil {
		return before, after
	}
	name, _, mapped := strings.Cut(before, ":")
	name, _, _ = strings.Cut(name, ",")
	_, err := parseRange(name)
	if mapped && (err == nil || name == "all" || name == "auto" || strings.HasPrefix(name, "~")) {
		return "", spec
	}
	return before, after
}

// parseMap parses one RANGE[:TARGET[/RANGE]] or RANGE:RANGE of a specifier into
// a copy of r.
func parseMap(r Rule, chunk string) (Rule, error) {
	from, to, mapped := strings.Cut(chunk, ":")
	var err error
	if r.Ports, err = parseRange(from); err != nil {
		return r, err
	}
	r.TargetPorts = r.Ports
	if !mapped {
		return r, nil
	}
	target, ports, both := strings.Cut(to, "/")
	if !both && strings.Trim(to, "0123456789-") == "" {
		r.TargetPorts, err = parseRange(to)
		return r, err
	}
	if r.Target, err = parseTarget(target); err != nil {
		return r, err
	}
	if both {
		r.TargetPorts, err = parseRange(ports)
	}
	return r, err
}

// subtract returns rules, of which no two may overlap, without the excluded
// ports, and sorts both.
func subtract(rules []Rule, exclude []PortRange) (left []Rule, err error) {
	slices.SortFunc(rules, func(a, b Rule) int { return cmp.Compare(a.Ports.First, b.Ports.First) })
	slices.SortFunc(exclude, func(a, b PortRange) int { return cmp.Compare(a.First, b.First) })
	for i, r := range rules {
		if i > 0 && rules[i-1].Ports.Last >= r.Ports.First {
			return nil, fmt.Errorf("%q and %q overlap", rules[i-1].Ports, r.Ports)
		}
		shift := int(r.TargetPorts.First) - int(r.Ports.First)
		part := func(first, last int) Rule {
			p := r
			p.Ports = PortRange{uint16(first), uint16(last)}
			p.TargetPorts = PortRange{uint16(first + shift), uint16(last + shift)}
			return p
		}
		first, last := int(r.Ports.First), int(r.Ports.Last)
		for _, hole := range exclude {
			if int(hole.Last) < first {
				continue
			}
			if int(hole.First) > last {
				break
			}
			if int(hole.First) > first {
				left = append(left, part(first, int(hole.First)-1))
			}
			first = int(hole.Last) + 1
		}
		if first <= last {
			left = append(left, part(first, last))
		}
	}
	return left, nil
}

// parseListen parses [ADDR|*][%IFACE]. An IPv6 address may stand in brackets,
// and then have a zone.
func parseListen(s string) (addr netip.Addr, iface string, err error) {
	host, rest := s, ""
	if strings.HasPrefix(s, "[") {
		i := strings.IndexByte(s, ']')
		if i < 0 {
			return addr, "", fmt.Errorf("%q lacks its closing bracket", s)
		}
		if host, rest = s[1:i], s[i+1:]; !strings.Contains(host, ":") {
			return addr, "", fmt.Errorf("%q is not an IPv6 address", host)
		}
	} else if i := strings.IndexByte(s, '%'); i >= 0 {
		host, rest = s[:i], s[i:]
	}
	if rest != "" {
		iface = strings.TrimPrefix(rest, "%")
		if iface == rest || !validIface(iface) {
			return addr, "", fmt.Errorf("%q is not %%IFACE", rest)
		}
	}
	if host != "" && host != "*" {
		addr, err = parseAddr(host)
	}
	return addr, iface, err
}

// parseTarget parses an address in the namespace. An IPv6 address may stand in
// brackets; 0.0.0.0 and :: are the container's own, as without a target.
func parseTarget(s string) (netip.Addr, error) {
	host := s
	if strings.HasPrefix(s, "[") && strings.HasSuffix(s, "]") && strings.Contains(s, ":") {
		host = s[1 : len(s)-1]
	}
	addr, err := parseAddr(host)
	if err != nil || addr.IsUnspecified() {
		return netip.Addr{}, err
	}
	return addr, nil
}

// parseAddr is netip.ParseAddr with an error for people. IPv4 in the guise of
// IPv6 (::ffff:192.0.2.1) becomes plain IPv4.
func parseAddr(s string) (netip.Addr, error) {
	addr, err := netip.ParseAddr(s)
	if err != nil {
		return addr, fmt.Errorf("%q is not an IP address", s)
	}
	return addr.Unmap(), nil
}

// parseRange parses "80" and "80-90".
func parseRange(s string) (r PortRange, err error) {
	first, last, isRange := strings.Cut(s, "-")
	if r.First, err = parsePort(first); err != nil {
		return PortRange{}, err
	}
	if r.Last = r.First; isRange {
		if r.Last, err = parsePort(last); err != nil {
			return PortRange{}, err
		}
	}
	return r, r.check()
}

func parsePort(s string) (uint16, error) {
	n, err := strconv.ParseUint(s, 10, 16)
	if err != nil || n == 0 {
		return 0, fmt.Errorf("%q is not a port from 1 to 65535", s)
	}
	return uint16(n), nil
}

func parseProto(s string) (Proto, error) {
	switch strings.ToLower(s) {
	case "tcp":
		return TCP, nil
	case "udp":
		return UDP, nil
	}
	return 0, fmt.Errorf("%q is not a protocol that can be forwarded: tcp or udp", s)
}
