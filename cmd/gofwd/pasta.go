package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/gofwd/gofwd/forward"
	"github.com/gofwd/gofwd/netnsutil"
)

// # pasta
//
// Called as pasta, gofwd takes the command line of pasta(1), as of October 2026,
// and keeps to what its callers rely on: it returns when everything is up, exits
// with 0 or 1, is silent with --quiet, keeps no descriptor of its caller, and
// ends when the namespace's path goes away. What differs is documented in
// docs/podman.md.

const pastaUsage = `Usage: pasta [OPTION]... [COMMAND] [ARGS]...
       pasta [OPTION]... PID
       pasta [OPTION]... --netns [PATH|NAME]

This is gofwd, which takes the options of pasta(1), see there.
`

// executePasta runs the command line of pasta, and returns the exit code.
func executePasta(argv []string) int {
	err := runPasta(argv)
	var status exitStatus
	switch {
	case err == nil:
		return 0
	case errors.As(err, &status):
		return int(status)
	}
	fmt.Fprintln(os.Stderr, oneLine(err))
	return exitFailure
}

func runPasta(argv []string) error {
	p := newPasta()
	args := p.takeOwn(argv[1:])
	if p.exec != nil {
		return becomeCommand(p.exec)
	}
	if !p.o.inner && p.o.detachedFD < 0 {
		if err := closeInherited(); err != nil {
			return err
		}
	}
	rest, err := getopt(p.options(), args)
	switch {
	case err != nil:
		return fmt.Errorf("%w; see 'pasta --help'", err)
	case p.help:
		return printTo(os.Stdout, pastaUsage)
	case p.version:
		return printTo(os.Stdout, fmt.Sprintf("pasta %s\nThis is gofwd, in the place of pasta(1).\n", readVersion().Version))
	}
	if err := p.complete(rest); err != nil {
		return err
	}
	if p.o.netns == "" && p.o.pid == 0 {
		return p.o.run(context.Background(), p.command)
	}
	return p.o.attach(context.Background())
}

func printTo(w io.Writer, text string) error {
	_, err := io.WriteString(w, text)
	return err
}

// pasta is a command line of pasta on its way to options.
type pasta struct {
	o *options

	exec          []string // behind execOption
	help, version bool
	foreground    bool
	configNet     bool
	services      pastaServices
	noCopyAddrs   bool
	noCopyRoutes  bool
	noMapGW       bool
	noSplice      bool
	noPIDNS       bool
	netNS, userNS string
	template      string // --interface
	netmask       string
	addrs         []string
	logFile       string
	logSize       int64
	specs         [4][]string // of the rules, in the order of pastaDirections
	command       []string
}

// pastaDirections are the kinds of rules.
var pastaDirections = [4]struct {
	option string
	dir    forward.Dir
	proto  forward.Proto
}{
	{"-t", forward.In, forward.TCP},
	{"-u", forward.In, forward.UDP},
	{"-T", forward.Out, forward.TCP},
	{"-U", forward.Out, forward.UDP},
}

// pastaMTU is pasta's default: the largest that fits a packet with an Ethernet
// header, in whole IPv4 words.
const pastaMTU = 65520

func newPasta() *pasta {
	return &pasta{
		o: &options{
			config:   forward.Config{Datapath: forward.Auto, Network: forward.Network{MTU: pastaMTU}},
			logLevel: "info", logFormat: "text",
			readyFD: -1, exitFD: -1, detachedFD: -1, noVerb: true,
			retryPorts: podmanRetry,
		},
		logSize: 1 << 20,
	}
}

// takeOwn takes from args the options of one gofwd process to another.
func (p *pasta) takeOwn(args []string) []string {
	for ; len(args) > 0; args = args[1:] {
		name, value, _ := strings.Cut(args[0], "=")
		switch name {
		case execOption:
			p.exec = args[1:]
			return nil
		case innerOption:
			p.o.inner = true
		case innerNetNSOption:
			p.o.innerNetNS = value
		case innerSocketOption:
			p.o.innerSockets = append(p.o.innerSockets, value)
		case detachedFDOption:
			fd, err := strconv.Atoi(value)
			if err != nil {
				return args
			}
			p.o.detachedFD = fd
		default:
			return args
		}
	}
	return args
}

// complete turns what was given into options. rest are the words that follow
// pasta's options.
func (p *pasta) complete(rest []string) error {
	if err := p.chooseTarget(rest); err != nil {
		return err
	}
	o, network := p.o, &p.o.config.Network
	if network.NoIPv4 && network.NoIPv6 {
		network.NoIPv4, network.NoIPv6 = false, false // pasta: both are both
	}
	if p.noSplice && o.config.HostLoopbackToNSLoopback {
		return errors.New("--no-splice is incompatible with --host-lo-to-ns-lo")
	}
	if p.noSplice && o.config.LoopbackOnly {
		return errors.New("--splice-only is incompatible with --no-splice")
	}
	if o.stats > 0 && o.detach {
		return errors.New("--stats needs --foreground")
	}
	if p.noSplice {
		o.config.Datapath = forward.Tap
	}
	if (p.noCopyAddrs || p.noCopyRoutes) && !p.configNet {
		return errors.New("--no-copy-routes and --no-copy-addrs need --config-net")
	}
	if err := p.openLog(); err != nil {
		return err
	}
	if err := p.completeNetwork(); err != nil {
		return err
	}
	return p.completeRules()
}

// chooseTarget finds out whether a namespace is to be joined, or a command
// started in a new one.
func (p *pasta) chooseTarget(rest []string) error {
	o := p.o
	o.userNS = p.userNS
	switch {
	case p.netNS != "" && len(rest) > 0:
		return errors.New("both --netns and a PID or command are given")
	case p.netNS != "":
		o.netns = p.netNS
	case len(rest) == 1:
		if pid, err := strconv.Atoi(rest[0]); err == nil && pid > 0 {
			o.pid = pid
		}
	}
	if o.netns == "" && o.pid == 0 {
		if p.userNS != "" {
			return errors.New("--userns needs --netns or a PID")
		}
		p.command = rest
		o.quiet = o.quiet || o.logLevel != "debug" // the command has the terminal
		o.pidNS = !p.noPIDNS
		return nil
	}
	if p.noPIDNS {
		return errors.New("--no-pidns is incompatible with PID or --netns")
	}
	o.detach = !p.foreground
	return nil
}

// completeNetwork fills in what pasta takes from the host's main interface.
func (p *pasta) completeNetwork() error {
	network := &p.o.config.Network
	host, err := p.hostLink()
	if err != nil {
		return err
	}
	network.CopyHost, network.HostIfName = true, p.template
	if network.IfName == "" {
		network.IfName = host.Name // may be ""
	}
	for _, s := range p.addrs {
		prefix, err := p.prefix(s, host)
		if err != nil {
			return err
		}
		network.Addrs = append(network.Addrs, prefix)
	}
	for _, is4 := range []bool{true, false} {
		if p.noCopyAddrs {
			p.copyFirst(host, is4)
		}
	}
	if p.noCopyRoutes {
		network.Gateways = p.gateways(host)
	}
	if !p.noMapGW && len(network.MapHostLoopback) == 0 {
		network.MapHostLoopback = p.gateways(host)
	}
	network.NoHostAlias = len(network.HostAlias) == 0
	network.NoDNS = len(network.DNS) == 0
	p.completeServices()
	return nil
}

// copyFirst takes over the first of the host's addresses of a family, unless one
// was given.
func (p *pasta) copyFirst(host netnsutil.Link, is4 bool) {
	network := &p.o.config.Network
	ofFamily := func(a netip.Prefix) bool { return a.Addr().Is4() == is4 }
	if i := slices.IndexFunc(host.Addrs, ofFamily); i >= 0 && !slices.ContainsFunc(network.Addrs, ofFamily) {
		network.Addrs = append(network.Addrs, host.Addrs[i])
	}
}

// hostLink is the interface to take addresses and routes from. The zero Link is
// none: the host is offline.
func (p *pasta) hostLink() (netnsutil.Link, error) {
	if p.template != "" {
		return netnsutil.ReadLink(p.template)
	}
	link, err := netnsutil.HostLink()
	if errors.Is(err, netnsutil.ErrNoHostLink) {
		err = nil
	}
	return link, err
}

// gateways are the container's: those given, else the host's.
func (p *pasta) gateways(host netnsutil.Link) []netip.Addr {
	var list []netip.Addr
	for _, is4 := range []bool{true, false} {
		if is4 && p.o.config.Network.NoIPv4 || !is4 && p.o.config.Network.NoIPv6 {
			continue
		}
		var found netip.Addr
		for _, r := range host.Routes {
			if r.Dst.Bits() == 0 && r.Via.IsValid() && r.Via.Is4() == is4 && !found.IsValid() {
				found = r.Via
			}
		}
		for _, a := range p.o.config.Network.Gateways {
			if a.Is4() == is4 {
				found = a
			}
		}
		if found.IsValid() {
			list = append(list, found)
		}
	}
	return list
}

// prefix parses an address of --address. Without a length it gets that of the
// same address of the host, or of its class; IPv6 always has 64.
func (p *pasta) prefix(s string, host netnsutil.Link) (netip.Prefix, error) {
	text, length, hasLength := strings.Cut(s, "/")
	addr, err := netip.ParseAddr(text)
	if err != nil {
		return netip.Prefix{}, fmt.Errorf("--address %s: not an address", s)
	}
	addr = addr.Unmap()
	switch {
	case hasLength && p.netmask != "" && addr.Is4():
		return netip.Prefix{}, errors.New("--netmask, and an --address with a prefix length: one is redundant")
	case hasLength:
		bits, err := strconv.Atoi(length)
		if err != nil || bits < 0 || bits > addr.BitLen() {
			return netip.Prefix{}, fmt.Errorf("--address %s: not a prefix length", s)
		}
		if addr.Is6() {
			bits = 64
		}
		return netip.PrefixFrom(addr, bits), nil
	case addr.Is6():
		return netip.PrefixFrom(addr, 64), nil
	case p.netmask != "":
		bits, err := parseNetmask(p.netmask)
		return netip.PrefixFrom(addr, bits), err
	}
	for _, own := range host.Addrs {
		if own.Addr() == addr {
			return own, nil
		}
	}
	return netip.PrefixFrom(addr, classBits(addr)), nil
}

// parseNetmask parses a netmask of IPv4, as a length or with dots.
func parseNetmask(s string) (int, error) {
	if bits, err := strconv.Atoi(s); err == nil && bits > 0 && bits <= 32 {
		return bits, nil
	}
	if mask, err := netip.ParseAddr(s); err == nil && mask.Is4() {
		if ones, bits := net.IPMask(mask.AsSlice()).Size(); bits == 32 && ones > 0 {
			return ones, nil
		}
	}
	return 0, fmt.Errorf("--netmask %s: not a netmask", s)
}

// classBits is the length of the net that an address had before there were
// netmasks (RFC 791).
func classBits(a netip.Addr) int {
	switch first := a.As4()[0]; {
	case first < 128:
		return 8
	case first < 192:
		return 16
	case first < 224:
		return 24
	}
	return 32
}

// completeRules parses the ports. A direction of which nothing was said is
// automatic.
func (p *pasta) completeRules() error {
	var rules []forward.Rule
	for i, d := range pastaDirections {
		specs := p.specs[i]
		if len(specs) == 0 {
			specs = []string{"auto"}
		}
		for _, spec := range specs {
			if spec == "none" && len(specs) > 1 {
				return fmt.Errorf("%s none conflicts with previous options", d.option)
			}
			if d.proto == forward.TCP && p.o.config.NoTCP || d.proto == forward.UDP && p.o.config.NoUDP {
				continue
			}
			r, err := forward.ParseSpec(d.dir, d.proto, spec)
			if err != nil {
				return fmt.Errorf("%s: %w", d.option, err)
			}
			rules = append(rules, r...)
		}
	}
	p.o.config.Rules = rules
	return forward.Validate(rules)
}

// openLog opens the log file, if there is to be one. The process that stays begins
// it anew.
func (p *pasta) openLog() error {
	o := p.o
	if p.logFile == "" || o.detach && o.detachedFD < 0 && !o.inner {
		return nil
	}
	f, err := openLogFile(p.logFile, p.logSize, !o.inner)
	if err != nil {
		return err
	}
	o.logTo = f
	if o.inner {
		return nil
	}
	exe, err := os.Executable()
	if err != nil {
		exe = "pasta"
	}
	_, err = fmt.Fprintf(f, "pasta %s: %s (%d)\n", readVersion().Version, exe, os.Getpid())
	return err
}
