package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/gofwd/gofwd/forward"
	"github.com/gofwd/gofwd/netnsutil"
)

// The demo is three hosts on one machine, as network namespaces that belong to
// one user namespace, so that anybody can run it:
//
//	client ── veth ── host: gofwd ── tap ── container: web server, UDP echo
//
// The process itself is on "host"; whatever is to happen elsewhere is done in
// the other two namespaces. Each kind of client fetches from the container, and
// the container tells which address it saw.

func newDemoCommand() *cobra.Command {
	var inner bool
	var datapath string
	cmd := &cobra.Command{
		Use:   "demo",
		Short: "show on this machine that containers see their clients' addresses",
		Long: `Make a client, a host and a container as namespaces, publish ports of the
container on the host, and fetch from them: from the client, and from the host by
its own address and by loopback, over IPv4 and IPv6, TCP and UDP.

It needs no privileges, packages or network, and leaves nothing behind. The exit
status is 1 if the container saw another address than it should.`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if inner {
				return runDemo(cmd.Context(), cmd.OutOrStdout(), forward.Datapath(datapath))
			}
			return spawnDemo(os.Args)
		},
	}
	cmd.Flags().BoolVar(&inner, "inner", false, "")
	cmd.Flags().StringVar(&datapath, "datapath", string(forward.Auto), "`auto|tap|kernel`: the path that TCP takes")
	_ = cmd.Flags().MarkHidden("inner")
	return cmd
}

// spawnDemo starts the demo on "host", and returns how it ended.
func spawnDemo(argv []string) error {
	proc, err := netnsutil.Spawn(netnsutil.SpawnConfig{
		NewNS:     unix.CLONE_NEWNET,
		Args:      append([]string{argv[0], argv[1], "--inner"}, argv[2:]...),
		Files:     []*os.File{os.Stdin, os.Stdout, os.Stderr},
		Pdeathsig: unix.SIGKILL,
	})
	if err != nil {
		return err
	}
	state, err := proc.Wait()
	if err != nil {
		return fmt.Errorf("wait for demo: %w", err)
	}
	return waitStatus(state)
}

// Where everything is in the demo. The addresses are for documentation (RFC
// 5737, RFC 3849).
var (
	demoClient = [2]netip.Prefix{netip.MustParsePrefix("198.51.100.2/24"), netip.MustParsePrefix("2001:db8:51::2/64")}
	demoHost   = [2]netip.Prefix{netip.MustParsePrefix("198.51.100.1/24"), netip.MustParsePrefix("2001:db8:51::1/64")}
)

const demoPublish = "-p 8080:80 -p 8053:53/udp"

// demoCase is one kind of client, and what came of it.
type demoCase struct {
	client string // for people
	proto  forward.Proto
	from   *netnsutil.NS // where the client is
	to     netip.AddrPort
	// promised is the address that the container should see; the port is
	// the client's own.
	promised netip.Addr

	demoResult
}

// demoResult is what a client measured.
type demoResult struct {
	local     netip.AddrPort // the client's own end
	saw       netip.AddrPort // the client's end as the container saw it
	roundTrip time.Duration  // median
	rate      float64        // container to client, in bits per second
}

func (c *demoCase) ok() bool {
	return c.saw == netip.AddrPortFrom(c.promised, c.local.Port())
}

func runDemo(ctx context.Context, w io.Writer, datapath forward.Datapath) (err error) {
	d, err := startDemo(ctx, datapath)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.close()) }()

	status := d.forwarder.Status()
	fmt.Fprintf(w, "client %s ── host %s ── gofwd %s ──► container %s\n\n",
		demoClient[0].Addr(), demoHost[0].Addr(), demoPublish, list(addrsOf(status.Addrs)))
	cases := d.cases(status)
	for _, c := range cases {
		measure := measureTCP
		if c.proto == forward.UDP {
			measure = measureUDP
		}
		if c.demoResult, err = measure(ctx, c.from, c.to); err != nil {
			return fmt.Errorf("fetch as %s from %s/%s: %w", c.client, c.to, c.proto, err)
		}
	}
	return printDemo(w, cases, d.forwarder.Status())
}

// cases are all kinds of clients.
func (d *demo) cases(status forward.Status) []*demoCase {
	var cases []*demoCase
	for _, r := range status.Rules {
		port := r.Rule.Ports.First
		for family, host := range demoHost {
			loopback := [2]netip.Addr{netip.AddrFrom4([4]byte{127, 0, 0, 1}), netip.IPv6Loopback()}[family]
			add := func(client string, from *netnsutil.NS, to, promised netip.Addr) {
				cases = append(cases, &demoCase{
					client: client, proto: r.Rule.Proto, from: from,
					to: netip.AddrPortFrom(to, port), promised: promised,
				})
			}
			add("remote", d.client, host.Addr(), demoClient[family].Addr())
			add("host, own address", d.host, host.Addr(), host.Addr())
			for _, alias := range status.Alias {
				if alias.Is4() == loopback.Is4() {
					add("host, loopback", d.host, loopback, alias)
				}
			}
		}
	}
	return cases
}

// printDemo prints the table, and returns an error if a promise was broken.
func printDemo(w io.Writer, cases []*demoCase, status forward.Status) error {
	paths := make(map[forward.Proto]forward.Datapath)
	for _, r := range status.Rules {
		paths[r.Rule.Proto] = r.Path
	}
	broken := 0
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "CLIENT\tCONNECTS TO\tCONTAINER SAW\tPROMISED\t\tPATH\tROUND TRIP\tTHROUGHPUT")
	for _, c := range cases {
		verdict := "ok"
		if !c.ok() {
			verdict = "WRONG"
			broken++
		}
		fmt.Fprintf(t, "%s\t%s/%s\t%s\t%s\t%s\t%s\t%s\t%.2f Gb/s\n", c.client, c.to, c.proto, c.saw,
			netip.AddrPortFrom(c.promised, c.local.Port()), verdict, paths[c.proto], c.roundTrip.Round(time.Microsecond), c.rate/1e9)
	}
	t.Flush()
	for _, r := range status.Rules {
		if r.Reason != "" {
			fmt.Fprintf(w, "\n%s goes by the %s path: %s\n", r.Rule, r.Path, r.Reason)
		}
	}
	if broken > 0 {
		return fmt.Errorf("demo: %d of %d clients were seen with another address than promised", broken, len(cases))
	}
	fmt.Fprintf(w, "\nThe container saw all %d clients as promised.\n", len(cases))
	return nil
}

func addrsOf(prefixes []netip.Prefix) []netip.Addr {
	addrs := make([]netip.Addr, len(prefixes))
	for i, p := range prefixes {
		addrs[i] = p.Addr()
	}
	return addrs
}

// demo is what runs while the demo measures.
type demo struct {
	client, host, container *netnsutil.NS
	servers                 demoServers
	forwarder               *forward.Forwarder
}

// startDemo makes the hosts and starts everything on them.
func startDemo(ctx context.Context, datapath forward.Datapath) (_ *demo, err error) {
	d := &demo{}
	defer func() {
		if err != nil {
			d.close()
		}
	}()
	if d.host, err = netnsutil.Current(); err != nil {
		return nil, err
	}
	if d.client, err = netnsutil.New(); err != nil {
		return nil, err
	}
	if d.container, err = netnsutil.New(); err != nil {
		return nil, err
	}
	if err := netnsutil.Veth(
		d.client, netnsutil.Link{Name: "eth0", Addrs: demoClient[:]},
		d.host, netnsutil.Link{Name: "eth0", Addrs: demoHost[:]},
	); err != nil {
		return nil, err
	}
	if err := d.servers.start(d.container); err != nil {
		return nil, err
	}
	cfg := forward.Config{NetNS: d.container, Datapath: datapath}
	for f := range strings.SplitSeq(demoPublish, "-p ") {
		if f == "" {
			continue
		}
		rules, err := forward.ParsePublish(strings.TrimSpace(f))
		if err != nil {
			return nil, err
		}
		cfg.Rules = append(cfg.Rules, rules...)
	}
	if d.forwarder, err = forward.Start(ctx, cfg); err != nil {
		return nil, err
	}
	return d, nil
}

func (d *demo) close() error {
	var err error
	if d.forwarder != nil {
		err = d.forwarder.Close()
	}
	d.servers.close()
	for _, ns := range []*netnsutil.NS{d.client, d.host, d.container} {
		if ns != nil {
			err = errors.Join(err, ns.Close())
		}
	}
	return err
}
