package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/gofwd/gofwd/forward"
	"github.com/gofwd/gofwd/netnsutil"
)

func newAttachCommand() *cobra.Command {
	o := &options{}
	cmd := &cobra.Command{
		Use:   "attach [OPTIONS] --netns PATH|NAME | --pid PID | --container NAME|ID",
		Short: "connect a network namespace that exists",
		Long: `Connect a network namespace that exists to the world, and publish ports of it:
one that podman --network=ns:PATH or ip-netns(8) made, or that of a process or
container.

It ends when the namespace goes away (not with --follow), or when it is told to
(SIGTERM, --exit-fd), and leaves the namespace as it was.`,
		Example: `  gofwd attach -p 8080:80 --netns web
  gofwd attach -p 8080:80 --follow --detach --container web
  gofwd attach -p 8080:80 --detach --pid "$(podman inspect -f '{{.State.Pid}}' web)"`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			err := o.loadConfig(cmd.Flags())
			if err == nil {
				err = o.complete()
			}
			targets := 0
			for _, given := range []bool{o.netns != "", o.pid != 0, o.container != ""} {
				if given {
					targets++
				}
			}
			switch {
			case err != nil:
			case targets != 1:
				err = errors.New("give one of --netns, --pid and --container")
			case o.follow && o.container == "":
				err = errors.New("--follow needs --container")
			case o.follow && o.exitFD >= 0:
				err = errors.New("--follow and --exit-fd exclude each other")
			case o.pid < 0:
				err = fmt.Errorf("--pid %d: not a process id", o.pid)
			case o.config.InboundOnly:
				err = o.refuseTapOptions(cmd.Flags())
			default:
				err = o.refuseForeignDNS()
			}
			if err != nil {
				return usagef(cmd, "%w", err)
			}
			if o.container != "" && !o.inner {
				return o.attachContainer(cmd.Context())
			}
			return o.attach(cmd.Context())
		},
	}
	own := pflag.NewFlagSet("", pflag.ContinueOnError)
	own.StringVar(&o.netns, "netns", "", "`PATH|NAME`: the network namespace; NAME is of gofwd netns add, or /run/netns/NAME")
	own.IntVar(&o.pid, "pid", 0, "`PID`: that of a process")
	own.StringVar(&o.container, "container", "", "`NAME|ID`: that of a container that Podman runs")
	own.BoolVar(&o.follow, "follow", false, "attach again within four seconds whenever that container starts again; it has to run when gofwd starts. While it is down there is no pid file and nothing in gofwd status, and what gofwd ports add has added is gone")
	own.BoolVar(&o.config.InboundOnly, "inbound-only", false, "the namespace has a network, as that of a container on a bridge: publish ports, and leave the rest alone; excludes what is about the rest, such as --deny")
	o.addTo(cmd, own)
	return cmd
}

// refuseTapOptions refuses, with --inbound-only, what is about the tap or about what the
// container begins.
func (o *options) refuseTapOptions(flags *pflag.FlagSet) error {
	const why = "exclude each other: the container's network is its own, and there is no tap"
	for _, name := range []string{
		"address", "gateway", "dns", "dns-forward", "config-net", "ifname", "mtu", "host-alias", "map-host-loopback",
		"outbound", "outbound-if4", "outbound-if6", "allow", "deny", "pcap",
	} {
		if flags.Changed(name) {
			return fmt.Errorf("--inbound-only and --%s %s", name, why)
		}
	}
	if o.config.Datapath == forward.Tap {
		return fmt.Errorf("--inbound-only and --datapath tap %s", why)
	}
	return nil
}

// refuseForeignDNS refuses nameservers that are not ours: attach writes no
// resolv.conf that could name them.
func (o *options) refuseForeignDNS() error {
	for _, a := range o.dns {
		if !slices.Contains(o.config.Network.DNS, a) {
			return fmt.Errorf("--dns %s: outside of the container's net, and attach leaves resolv.conf alone; "+
				"to answer at that address give --dns-forward", a)
		}
	}
	return nil
}

func (o *options) attach(ctx context.Context) error {
	if o.inner {
		i, err := newInner(o)
		if err != nil {
			return err
		}
		defer i.ns.Close()
		return i.attach(ctx)
	}
	if o.detach && o.detachedFD < 0 {
		return o.goBackground(os.Args)
	}
	ns, userNS, err := o.openTarget()
	if err != nil {
		return err
	}
	defer ns.Close()
	hint := filepath.Base(o.netns)
	if o.pid != 0 {
		hint = "pid-" + strconv.Itoa(o.pid)
	}
	if o.container != "" {
		hint = o.container
	}
	u, err := openOuter(o, os.Args, hint)
	if err != nil {
		return err
	}
	defer u.close()
	if userNS == nil && !o.follow {
		in, err := u.serveHere(ctx, ns)
		if err != nil {
			return err
		}
		return u.supervise(in, nil)
	}
	if userNS != nil {
		defer userNS.Close()
	}
	in, err := u.spawn(netnsutil.SpawnConfig{UserNS: userNS}, ns)
	if err != nil {
		return o.explainEntry(err)
	}
	if o.config.IgnoreGone {
		return u.supervise(in, nil)
	}
	// Inner may not be allowed to see the path of the namespace.
	ctx, cancel := context.WithCancel(ctx)
	gone := make(chan struct{})
	go waitGone(ctx, ns, gone)
	err = u.supervise(in, gone)
	cancel()
	<-gone
	return err
}

// waitGone closes gone when ns has gone, or can't be watched any more.
func waitGone(ctx context.Context, ns *netnsutil.NS, gone chan<- struct{}) {
	defer close(gone)
	_ = ns.WaitGone(ctx)
}

// openTarget opens the namespace to attach to, and the user namespace that owns
// it unless that is our own.
func (o *options) openTarget() (ns *netnsutil.NS, userNS *os.File, err error) {
	if o.pid == 0 {
		ns, err = openNetNS(o.netns)
	} else if ns, err = netnsutil.OpenPID(o.pid); errors.Is(err, fs.ErrNotExist) {
		return nil, nil, &noProcessError{o.pid}
	}
	if err != nil {
		return nil, nil, o.explainEntry(err)
	}
	userNS, err = o.ownerToJoin(ns)
	if err != nil {
		ns.Close()
		return nil, nil, o.explainEntry(err)
	}
	return ns, userNS, nil
}

// noProcessError is about a process that has ended.
type noProcessError struct{ pid int }

func (e *noProcessError) Error() string {
	return fmt.Sprintf("attach to process %d: no such process", e.pid)
}
func (e *noProcessError) Unwrap() error { return fs.ErrNotExist }

// ownerToJoin returns the user namespace that owns ns, or nil if it is our own
// and there is nothing to join.
func (o *options) ownerToJoin(ns *netnsutil.NS) (*os.File, error) {
	here, err := netnsutil.Current()
	if err != nil {
		return nil, err
	}
	defer here.Close()
	if here.Equal(ns) {
		return nil, fmt.Errorf("attach to network namespace %s: it is our own, the host's", ns)
	}
	var owner *os.File
	switch {
	case o.netNSOnly:
		return nil, nil
	case o.userNS != "":
		owner, err = os.Open(o.userNS)
	default:
		owner, err = netnsutil.OwnerUserNS(ns)
	}
	if err != nil {
		return nil, err
	}
	if !netnsutil.SameUserNS(owner) {
		return owner, nil
	}
	owner.Close()
	// Only the attempt tells whether we have the capabilities.
	return nil, ns.Do(func() error { return nil })
}

// explainEntry says how else the namespace could be entered.
func (o *options) explainEntry(err error) error {
	var forbidden *netnsutil.ForbiddenError
	switch {
	case errors.As(err, &forbidden):
		return err
	case errors.Is(err, netnsutil.ErrNotNetNS) && o.netns != "":
		// A file below /run/user that ought to be one is a mount point
		// that only Podman's mount namespace has a mount on.
		return &hintedError{err, "if podman made it, run: podman unshare " + o.commandLine()}
	case errors.Is(err, fs.ErrPermission), errors.Is(err, netnsutil.ErrOutside):
		return &hintedError{err, "if it is a container's, run: podman unshare " + o.commandLine() + "; if it is root's, run that as root"}
	}
	return err
}

// commandLine is how the user called gofwd, for a shell.
func (o *options) commandLine() string {
	words := []string{filepath.Base(os.Args[0])}
	for _, a := range os.Args[1:] {
		if strings.HasPrefix(a, detachedFDOption+"=") {
			continue
		}
		if !plainWord.MatchString(a) {
			a = "'" + strings.ReplaceAll(a, "'", `'\''`) + "'"
		}
		words = append(words, a)
	}
	return strings.Join(words, " ")
}

// plainWord is what no shell takes for anything else.
var plainWord = regexp.MustCompile(`^[A-Za-z0-9_@%+=:,./-]+$`)
