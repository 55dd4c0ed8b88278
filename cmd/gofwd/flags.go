package main

import (
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/gofwd/gofwd/forward"
)

// options is the command line of run and attach: what to forward, and how the
// process behaves.
type options struct {
	config forward.Config // without NetNS, Capture and Logger

	publish        []string // -p
	tcpIn, udpIn   []string // -t, -u
	tcpOut, udpOut []string // -T, -U
	only4, only6   bool
	dns            []netip.Addr
	noDNS          bool

	wait bool // every rule that can wait for its address does

	configFile    string
	configEntries []configEntry // as loaded
	cliPorts      [5][]string   // portLists without those of the file

	mapAuto   bool   // run
	netns     string // attach
	pid       int    // attach
	container string // attach
	follow    bool   // attach

	name      string
	pcap      string
	detach    bool
	pidFile   string
	readyFD   int
	exitFD    int
	quiet     bool
	noSandbox bool
	logLevel  string
	logFormat string

	// Of pasta alone.
	userNS      string    // --userns
	netNSOnly   bool      // join no user namespace, and make none
	pidNS       bool      // COMMAND gets a PID namespace
	runAs       *identity // nil: who we are
	stats       time.Duration
	pestoSocket string    // --conf-path
	logTo       io.Writer // nil: standard error
	noVerb      bool      // options follow the program's name at once
	// retryPorts is for how long busy ports are tried again.
	retryPorts time.Duration

	told bool // set when somebody told us to end

	// Of one gofwd process to another, see outer_linux.go and
	// daemon_linux.go.
	inner        bool
	innerNetNS   string
	innerSockets []string
	detachedFD   int

	// With --follow what is opened by the first attach is for the next ones too.
	attached bool
	capture  *os.File         // nil without --pcap
	sockets  []forward.Socket // that systemd passed
}

// flagSection is a group of flags under a title, as --help and the man page
// show them.
type flagSection struct {
	title string
	*pflag.FlagSet
}

// addTo gives cmd the flags of o, and remembers their sections.
func (o *options) addTo(cmd *cobra.Command, own *pflag.FlagSet) {
	for _, s := range o.sections(own) {
		s.VisitAll(func(f *pflag.Flag) {
			f.Annotations = map[string][]string{sectionAnnotation: {s.title}}
		})
		s.SortFlags = false
		cmd.Flags().AddFlagSet(s.FlagSet)
	}
	cmd.Flags().SortFlags = false
	// What follows the first argument is COMMAND's.
	cmd.Flags().SetInterspersed(false)
	for _, hidden := range []string{"inner", "inner-netns", "inner-socket", "detached-fd"} {
		_ = cmd.Flags().MarkHidden(hidden)
	}
	completeWords(cmd, "datapath", "auto", "tap", "kernel")
	completeWords(cmd, "log-level", "debug", "info", "warn", "error")
	completeWords(cmd, "log-format", "text", "json")
}

func completeWords(cmd *cobra.Command, flag string, words ...string) {
	_ = cmd.RegisterFlagCompletionFunc(flag, cobra.FixedCompletions(words, cobra.ShellCompDirectiveNoFileComp))
}

// sections is the table of all flags that run and attach share; own are those of
// one of them alone.
func (o *options) sections(own *pflag.FlagSet) []flagSection {
	cfg, network := &o.config, &o.config.Network

	ports := pflag.NewFlagSet("", pflag.ContinueOnError)
	ports.StringArrayVarP(&o.publish, "publish", "p", nil, "`[[ADDR][%IFACE]:][HOST:]CONTAINER[/PROTO]`: publish a port, tcp unless PROTO says udp; ranges as 8000-8010:9000-9010; IPv6 in brackets; without HOST on a free port, which is printed; gofwd(1) has the options of a rule")
	ports.StringArrayVarP(&o.tcpIn, "tcp-ports", "t", nil, "`SPEC`: publish TCP ports as pasta(1) does: none, auto, all, or [[ADDR][%IFACE]/]PORT[-PORT][:PORT[-PORT]],..., with ~PORT[-PORT] to leave out")
	ports.StringArrayVarP(&o.udpIn, "udp-ports", "u", nil, "`SPEC`: publish UDP ports, likewise")
	ports.StringArrayVarP(&o.tcpOut, "tcp-ns", "T", nil, "`SPEC`: forward TCP ports of the container's loopback to the host's")
	ports.StringArrayVarP(&o.udpOut, "udp-ns", "U", nil, "`SPEC`: forward UDP ports of the container's loopback to the host's")
	ports.BoolVar(&o.wait, "wait", false, "publish on addresses and interfaces that aren't there yet when they come, and follow them when they go and return")
	ports.BoolVar(&cfg.HostLoopbackToNSLoopback, "host-lo-to-ns-lo", false, "clients on the host's loopback reach the container's loopback, and are seen as 127.0.0.1 or ::1")

	net := pflag.NewFlagSet("", pflag.ContinueOnError)
	net.Var(&addrsFlag[netip.Prefix]{to: &network.Addrs, parse: parsePrefix}, "address", "`ADDR[/LEN]`: the container's address, one of each family (default 10.0.2.100/24, or in 10.0.3.0/24 and so on where the host is in that net, and fd67:6f66:7764::100/64)")
	net.Var(&addrsFlag[netip.Addr]{to: &network.Gateways, parse: parseAddr}, "gateway", "`ADDR`: its default gateway, one of each family (default host 2 of the net)")
	net.Var(&addrsFlag[netip.Addr]{to: &o.dns, none: &o.noDNS, parse: parseAddr}, "dns", "`ADDR|none`: its nameserver (default host 3 of the net, with --config-net 169.254.1.1 and fd67:6f66:7764::3); one in the container's net leads to the host's nameservers; another run puts into resolv.conf as it is, and attach refuses")
	net.Var(&addrsFlag[netip.Addr]{to: &network.DNS, parse: parseAddr}, "dns-forward", "`ADDR`: an address whose ports 53 and 853 lead to the host's nameservers (default that of --dns)")
	net.BoolVar(&network.CopyHost, "config-net", false, "copy addresses and routes of the host's main interface instead")
	net.StringVar(&network.IfName, "ifname", "tap0", "`NAME`: the container's interface")
	net.IntVar(&network.MTU, "mtu", 1500, "`BYTES`: MTU of the interface; large segments make more than 1500 unnecessary")
	net.BoolVarP(&o.only4, "ipv4-only", "4", false, "no IPv6")
	net.BoolVarP(&o.only6, "ipv6-only", "6", false, "no IPv4")
	net.Var(&addrsFlag[netip.Addr]{to: &network.HostAlias, none: &network.NoHostAlias, parse: parseAddr}, "host-alias", "`ADDR|none`: what the container calls the host's main address, one of each family (default 169.254.1.2 and fd67:6f66:7764::1)")
	net.Var(&addrsFlag[netip.Addr]{to: &network.MapHostLoopback, none: new(bool), parse: parseAddr}, "map-host-loopback", "`ADDR|none`: what the container calls the host's loopback (default none: it does not reach it)")
	net.Var(&addrsFlag[netip.Addr]{to: &cfg.OutboundAddrs, parse: parseAddr}, "outbound", "`ADDR`: the host's address that the world sees of what the container begins, one of each family (default as the host's routing has it)")
	net.StringVar(&cfg.OutboundIf4, "outbound-if4", "", "`IFACE`: the host's interface by which that leaves, for IPv4")
	net.StringVar(&cfg.OutboundIf6, "outbound-if6", "", "`IFACE`: the same for IPv6")
	net.Var(&addrsFlag[forward.Destination]{to: &cfg.Allow, parse: forward.ParseDestination}, "allow", "`DEST`: what the container may speak to although --deny names it, or if there is no --deny all it may speak to; an address, a prefix, *, host (the host's addresses) or loopback (its loopback), and :PORT[-PORT]")
	net.Var(&addrsFlag[forward.Destination]{to: &cfg.Deny, parse: forward.ParseDestination}, "deny", "`DEST`: what it may not speak to, such as 192.168.0.0/16, host or *:25; it is told so by ICMP. Its nameserver is always allowed, and so is where -T and -U lead")
	net.Var(&addrsFlag[forward.Group]{to: &cfg.Multicast, parse: forward.ParseGroup, list: true}, "multicast", "`GROUP[%IFACE],...`: multicast groups of the host's network that the container takes part in, such as 224.0.0.251 or ff02::fb%eth0, on the ports that it listens on; without IFACE on that of the default route")
	net.BoolVar(&cfg.NoTCP, "no-tcp", false, "forward no TCP")
	net.BoolVar(&cfg.NoUDP, "no-udp", false, "forward no UDP")
	net.BoolVar(&cfg.NoICMP, "no-icmp", false, "forward no ping")
	net.StringVar((*string)(&cfg.Datapath), "datapath", string(forward.Auto), "`auto|tap|kernel`: the path that TCP takes: sockets of the kernel in the namespace, which are faster, or the tap; auto is kernel wherever it can be")

	process := pflag.NewFlagSet("", pflag.ContinueOnError)
	process.StringVar(&o.name, "name", "", "`NAME`: what gofwd status calls this instance (default after the command or the namespace)")
	process.StringVar(&o.configFile, "config", "", "`FILE`: read options from a TOML file too, by their long names: publish = [\"8080:80\"]; the command line wins, and adds to those that may be given several times; ports in it are read anew on SIGHUP and by gofwd reload, and a change of anything else takes a restart")
	process.BoolVar(&o.detach, "detach", false, "go to the background, and return when ready; the log, and what COMMAND prints, go on only into files: >out.txt 2>gofwd.log")
	process.StringVar(&o.pidFile, "pid-file", "", "`FILE`: write the process id to it when ready, and remove it at the end, with --follow whenever the container ends")
	process.IntVar(&o.readyFD, "ready-fd", -1, "`FD`: write 1 to this descriptor when ready, and close it unless it is 1 or 2")
	process.IntVar(&o.exitFD, "exit-fd", -1, "`FD`: end when this descriptor can be read or is closed at its other end")
	process.StringVar(&o.pcap, "pcap", "", "`FILE`: capture the container's interface to it; TCP then takes the tap path, which is slower, unless --datapath kernel keeps it off there")
	process.BoolVarP(&o.quiet, "quiet", "q", false, "print only warnings and errors")
	process.StringVar(&o.logLevel, "log-level", "info", "`debug|info|warn|error`: log from here on; debug logs every connection")
	process.StringVar(&o.logFormat, "log-format", "text", "`text|json`: how to log")
	process.BoolVar(&o.noSandbox, "no-sandbox", false, "keep all privileges while running")
	process.BoolVar(&o.inner, "inner", false, "")
	process.StringVar(&o.innerNetNS, "inner-netns", "", "")
	process.StringArrayVar(&o.innerSockets, "inner-socket", nil, "")
	process.IntVar(&o.detachedFD, "detached-fd", -1, "")

	return []flagSection{
		{ownSection, own},
		{"Ports", ports},
		{"Network", net},
		{"Process", process},
	}
}

// complete checks what the flags say together, and fills in o.config.
func (o *options) complete() error {
	network := &o.config.Network
	if o.only4 && o.only6 {
		return errors.New("--ipv4-only and --ipv6-only exclude each other")
	}
	network.NoIPv4, network.NoIPv6 = o.only6, o.only4
	if network.MTU < 68 || network.MTU > 65521 {
		return fmt.Errorf("--mtu %d: not between 68 and 65521", network.MTU)
	}
	if n := len(network.IfName); n == 0 || n > 15 {
		return fmt.Errorf("--ifname %q: not between 1 and 15 bytes", network.IfName)
	}
	switch o.config.Datapath {
	case forward.Auto, forward.Tap, forward.Kernel:
	default:
		return fmt.Errorf("--datapath %q: not auto, tap or kernel", o.config.Datapath)
	}
	if _, err := o.level(); err != nil {
		return err
	}
	if o.logFormat != "text" && o.logFormat != "json" {
		return fmt.Errorf("--log-format %q: not text or json", o.logFormat)
	}
	if o.name != "" && !validName(o.name) {
		return fmt.Errorf("--name %q: not a letter or digit and then at most 62 letters, digits, dots, dashes and underscores", o.name)
	}
	addrs := make([]netip.Addr, len(network.Addrs))
	for i, p := range network.Addrs {
		addrs[i] = p.Addr()
	}
	if err := errors.Join(
		oneOfEach("address", addrs),
		oneOfEach("gateway", network.Gateways),
		oneOfEach("host-alias", network.HostAlias),
		oneOfEach("outbound", o.config.OutboundAddrs),
	); err != nil {
		return err
	}
	if err := o.completeDNS(); err != nil {
		return err
	}
	return o.completeRules()
}

// defaultNets are those of an address that --address does not say, to tell
// whether a nameserver is in it.
var defaultNets = []netip.Prefix{netip.MustParsePrefix("10.0.2.0/24"), netip.MustParsePrefix("fd67:6f66:7764::/64")}

// completeDNS makes nameservers in the container's own net ours: nobody else
// could answer there.
func (o *options) completeDNS() error {
	network := &o.config.Network
	if o.noDNS {
		if len(o.dns)+len(network.DNS) > 0 {
			return errors.New("--dns none excludes other --dns and --dns-forward")
		}
		network.NoDNS = true
		return nil
	}
	nets := slices.Concat(network.Addrs, defaultNets)
	for _, a := range o.dns {
		i := slices.IndexFunc(nets, func(p netip.Prefix) bool { return p.Addr().Is4() == a.Is4() })
		if nets[i].Masked().Contains(a) && !slices.Contains(network.DNS, a) {
			network.DNS = append(network.DNS, a)
		}
	}
	return nil
}

// completeRules parses the ports.
func (o *options) completeRules() error {
	var rules []forward.Rule
	for _, s := range o.publish {
		r, err := forward.ParsePublish(s)
		if err != nil {
			return err
		}
		rules = append(rules, r...)
	}
	for _, flag := range []struct {
		specs []string
		dir   forward.Dir
		proto forward.Proto
	}{
		{o.tcpIn, forward.In, forward.TCP},
		{o.udpIn, forward.In, forward.UDP},
		{o.tcpOut, forward.Out, forward.TCP},
		{o.udpOut, forward.Out, forward.UDP},
	} {
		for _, s := range flag.specs {
			r, err := forward.ParseSpec(flag.dir, flag.proto, s)
			if err != nil {
				return err
			}
			rules = append(rules, r...)
		}
	}
	if o.wait {
		for i := range rules {
			rules[i] = rules[i].Waiting()
		}
	}
	o.config.Rules = rules
	return forward.Validate(rules)
}

// addrsFlag is a flag that takes one more address each time, and "none" where
// there may be none.
type addrsFlag[T any] struct {
	to    *[]T
	none  *bool // nil: not without
	parse func(string) (T, error)
	list  bool // takes several at once, with commas between
}

func (f *addrsFlag[T]) Set(s string) error {
	if s == "none" && f.none != nil {
		*f.none = true
		return nil
	}
	words := []string{s}
	if f.list {
		words = strings.Split(s, ",")
	}
	var values []T
	for _, word := range words {
		v, err := f.parse(word)
		if err != nil {
			return err
		}
		values = append(values, v)
	}
	*f.to = append(*f.to, values...)
	return nil
}

func (f *addrsFlag[T]) String() string { return "" }
func (f *addrsFlag[T]) Type() string   { return "address" }

// oneOfEach refuses two addresses of one family.
func oneOfEach(flag string, addrs []netip.Addr) error {
	for i, a := range addrs {
		for _, b := range addrs[:i] {
			if a.Is4() == b.Is4() {
				return fmt.Errorf("--%s %s and %s: only one of each family", flag, b, a)
			}
		}
	}
	return nil
}

func parseAddr(s string) (netip.Addr, error) {
	a, err := netip.ParseAddr(s)
	if err != nil || a.Zone() != "" {
		return netip.Addr{}, errors.New("not an IP address")
	}
	return a.Unmap(), nil
}

// parsePrefix parses ADDR or ADDR/LEN; without LEN it is that of the default
// networks.
func parsePrefix(s string) (netip.Prefix, error) {
	if a, err := parseAddr(s); err == nil {
		if a.Is4() {
			return netip.PrefixFrom(a, 24), nil
		}
		return netip.PrefixFrom(a, 64), nil
	}
	p, err := netip.ParsePrefix(s)
	if err != nil || p.Addr().Is4In6() {
		return netip.Prefix{}, errors.New("not ADDR or ADDR/LEN")
	}
	return p, nil
}
