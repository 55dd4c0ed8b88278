package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"time"

	"github.com/gofwd/gofwd/netnsutil"
)

// The ports. Every tool publishes the first group, TCP and UDP as needed, each
// under the same number on the host and in the container; the second leads from
// the container's loopback to the host's.
const (
	portIperf = 5201
	portLoad  = 5202 // TCP and UDP
	portHTTP  = 5203
	portGRO   = 5204 // UDP, the server takes bundles
	portSpare = 5205 // not published: a tool adds it at run time
	portQUIC  = 5206
	portMany  = 20001 // and the following ones, as many as the bed says

	portOutIperf = 5211
	portOutLoad  = 5212 // TCP and UDP
)

// publishedTCP and publishedUDP are what a tool forwards into the container,
// outTCP and outUDP from the container's loopback to the host's.
var (
	publishedTCP = []int{portIperf, portLoad, portHTTP}
	publishedUDP = []int{portLoad, portGRO, portQUIC}
	outTCP       = []int{portOutIperf, portOutLoad}
	outUDP       = []int{portOutLoad}
)

// bed is what a site is made with.
type bed struct {
	name    string // part of the names of its rows, e.g. "cc=reno"
	note    string // part of their titles, or empty
	sysctls []sysctl
	// container is set in the container only.
	container []sysctl
	// ports is how many TCP ports are published from portMany on.
	ports int
	// pipesHeld leaves the tool no more than the least of the user's pipes.
	pipesHeld bool
}

// noted adds the bed's note to a title.
func (b bed) noted(title string) string {
	if b.note == "" {
		return title
	}
	return title + ", " + b.note
}

// tcpPorts are the TCP ports that a tool publishes when it starts.
func (b bed) tcpPorts() []int {
	ports := slices.Clone(publishedTCP)
	for i := range b.ports {
		ports = append(ports, portMany+i)
	}
	return ports
}

// lastPort is the last of tcpPorts with a server behind it.
func (b bed) lastPort() int {
	if b.ports == 0 {
		return portLoad
	}
	return portMany + b.ports - 1
}

// site is a client host, this host and a container with one tool between them.
type site struct {
	lab  *lab
	tool tool
	bed  bed

	client, host *namespace
	// container is the host itself for the native rows.
	container *namespace
	helpers   []*process // of the tool
	servers   []*process

	began time.Time     // when the first helper was started
	ready time.Duration // from then to the first answer through the tool
}

// newSite makes the hosts, starts the tool, and waits until a connection
// through it is answered.
func (l *lab) newSite(ctx context.Context, t tool, b bed) (_ *site, err error) {
	s := &site{lab: l, tool: t, bed: b}
	defer func() {
		if err != nil {
			s.close()
		}
	}()
	l.sites++
	name := t.name() + "-" + strconv.Itoa(l.sites)
	if s.client, err = newNamespace(name + "-client"); err != nil {
		return nil, err
	}
	if s.host, err = newNamespace(name + "-host"); err != nil {
		return nil, err
	}
	if err := connect(s.client, s.host); err != nil {
		return nil, err
	}
	for _, n := range []*namespace{s.client, s.host} {
		if err := n.setSysctls(b.sysctls); err != nil {
			return nil, err
		}
	}
	if err := s.serve(ctx, s.client, append(loadServers([]int{portLoad}, []int{portLoad}, []int{portGRO}), quicServer)); err != nil {
		return nil, err
	}
	if err := s.serve(ctx, s.host, loadServers([]int{portOutLoad}, outUDP, nil)); err != nil {
		return nil, err
	}
	if b.pipesHeld {
		if err := s.serve(ctx, s.host, []string{"pipes"}); err != nil {
			return nil, err
		}
	}
	if err := t.start(ctx, s); err != nil {
		return nil, err
	}
	return s, s.awaitReady(ctx)
}

// newContainer makes an empty namespace for the tools that join one.
func (s *site) newContainer(ctx context.Context) error {
	n, err := newNamespace(fmt.Sprintf("%s-%d-container", s.tool.name(), s.lab.sites))
	if err != nil {
		return err
	}
	return s.setContainer(ctx, n)
}

// adoptContainer takes the namespace of a process that the tool started.
func (s *site) adoptContainer(ctx context.Context, pid int) error {
	ns, err := netnsutil.OpenPID(pid)
	if err != nil {
		return err
	}
	return s.setContainer(ctx, &namespace{name: fmt.Sprintf("%s-%d-container", s.tool.name(), s.lab.sites), ns: ns})
}

// setContainer makes n the container and starts the load server in it. The
// site owns n.
func (s *site) setContainer(ctx context.Context, n *namespace) error {
	s.container = n
	if err := n.setSysctls(append(s.bed.sysctls, s.bed.container...)); err != nil {
		return err
	}
	tcp := []int{portLoad, portSpare}
	if last := s.bed.lastPort(); last != portLoad {
		tcp = append(tcp, last)
	}
	return s.serve(ctx, n, append(loadServers(tcp, []int{portLoad}, []int{portGRO}), quicServer))
}

// quicServer is the argument of [serve] for QUIC.
var quicServer = "quic/" + strconv.Itoa(portQUIC)

// loadServers are the arguments of [serve] for ports of each kind.
func loadServers(tcp, udp, gro []int) []string {
	var args []string
	for kind, ports := range map[string][]int{"tcp/": tcp, "udp/": udp, "gro/": gro} {
		for _, p := range ports {
			args = append(args, kind+strconv.Itoa(p))
		}
	}
	return args
}

// serve starts a load server in a namespace.
func (s *site) serve(ctx context.Context, n *namespace, args []string) error {
	return s.startServer(ctx, n, "ready", append([]string{self, "serve"}, args...)...)
}

// startServer starts a server on the servers' processors, and waits until it
// prints want. The site ends it.
func (s *site) startServer(ctx context.Context, n *namespace, want string, argv ...string) error {
	p, err := s.lab.launcher.start(command{ns: n, cpus: s.lab.launcher.server, argv: argv})
	if err != nil {
		return err
	}
	s.servers = append(s.servers, p)
	return p.awaitOutput(ctx, want)
}

// startHelper starts a process of the tool, on any processor.
func (s *site) startHelper(n *namespace, env []string, extra []*os.File, argv ...string) error {
	if s.began.IsZero() {
		s.began = time.Now()
	}
	p, err := s.lab.launcher.start(command{ns: n, cpus: s.lab.launcher.all, argv: argv, env: env, extra: extra})
	if err != nil {
		return err
	}
	s.helpers = append(s.helpers, p)
	return nil
}

// awaitReady connects from the client until the container's server answers.
func (s *site) awaitReady(ctx context.Context) error {
	err := s.awaitAnswer(ctx, portLoad)
	if last := s.bed.lastPort(); err == nil && last != portLoad {
		err = s.awaitAnswer(ctx, last)
	}
	if !s.began.IsZero() {
		s.ready = time.Since(s.began)
	}
	return err
}

// awaitAnswer connects from the client to a published port until the server
// behind it answers, for at most five seconds.
func (s *site) awaitAnswer(ctx context.Context, port int) error {
	to := netip.AddrPortFrom(hostAddr[0].Addr(), uint16(port))
	deadline := time.Now().Add(5 * time.Second)
	for {
		got, err := s.client.ask("tcp4", to, string(askEcho))
		switch {
		case err == nil && got == string(askEcho):
			return nil
		case ctx.Err() != nil:
			return ctx.Err()
		case time.Now().After(deadline):
			return errors.Join(fmt.Errorf("no answer through %s in five seconds", s.tool.name()), err, s.helperEnded())
		}
		if err := s.helperEnded(); err != nil {
			return err
		}
		time.Sleep(500 * time.Microsecond)
	}
}

// helperEnded returns why a process of the tool has ended, or nil.
func (s *site) helperEnded() error { return anyEnded(s.helpers) }

func anyEnded(processes []*process) error {
	for _, p := range processes {
		if err := p.ended(); err != nil {
			return err
		}
	}
	return nil
}

// usage is what the processes of the tool have used.
func (s *site) usage() (usage, error) {
	pids := make([]int, len(s.helpers))
	for i, p := range s.helpers {
		pids[i] = p.pid
	}
	return usageOf(pids)
}

// ends are the two ends of a way: who connects, to what, and who serves it.
type ends struct {
	from, at *namespace
	to       netip.Addr
}

// ends returns the two ends of a way. The native rows are the same ways with
// the host in the container's place.
func (s *site) ends(w way, ip int) ends {
	f := family(ip)
	switch w {
	case remote:
		return ends{s.client, s.container, hostAddr[f].Addr()}
	case loopback:
		return ends{s.host, s.container, loopbacks[f]}
	case outside:
		return ends{s.container, s.client, clientAddr[f].Addr()}
	case hostLoopback:
		return ends{s.container, s.host, loopbacks[f]}
	}
	panic("no such way: " + string(w))
}

// sources asks the server in the container who the client is, on every inbound
// way that the tool has. The keys are those of [sourceKey].
func (s *site) sources() map[string]string {
	seen := map[string]string{}
	for _, w := range []way{remote, loopback} {
		for _, ip := range []int{4, 6} {
			for _, proto := range []string{"tcp", "udp"} {
				if !s.tool.carries(w, proto, ip) {
					continue
				}
				e := s.ends(w, ip)
				want := clientAddr[family(ip)].Addr()
				if w == loopback {
					want = loopbacks[family(ip)]
				}
				key := sourceKey(proto, ip, w)
				seen[key] = "no answer"
				got, err := e.from.ask(proto, netip.AddrPortFrom(e.to, portLoad), string(askSource))
				if err != nil {
					continue
				}
				if ap, err := unmapped(got); err == nil {
					seen[key] = ap.Addr().String()
					if ap.Addr() == want {
						seen[key] = kept
					}
				}
			}
		}
	}
	return seen
}

// close ends every process and namespace of the site.
func (s *site) close() {
	for _, p := range s.helpers {
		p.stop()
	}
	for _, p := range s.servers {
		p.stop()
	}
	if s.container != nil && s.container != s.host {
		s.container.close()
	}
	for _, n := range []*namespace{s.host, s.client} {
		if n != nil {
			n.close()
		}
	}
}
