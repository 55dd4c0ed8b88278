package forward

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/gofwd/gofwd/netnsutil"
)

// maxGroupPorts bounds the ports on which one group is heard, lower ones first.
const maxGroupPorts = 64

// listeningGroups decides on which ports and interfaces the groups are heard: the
// ports of those sockets in the namespace that could have joined them, and the
// interfaces as they come and go.
type listeningGroups struct {
	// Immutable.
	ns        *netnsutil.NS
	groups    *udpGroups
	log       *slog.Logger
	ephemeral PortRange // the namespace's
	cancel    context.CancelFunc
	wg        sync.WaitGroup

	diag *netnsutil.SockDiag // the goroutine's

	mu       sync.Mutex
	problems map[*joinedGroup]string
}

// newJoinedGroups returns the groups of cfg, joined nowhere.
func newJoinedGroups(groups []Group) (all []*joinedGroup) {
	for _, g := range groups {
		all = append(all, &joinedGroup{Group: g, sockets: make(map[uint16]*udpSocket)})
	}
	return all
}

// startGroups hears the groups of engine from now on. It fails where an interface
// that was named isn't there, or the group can't be joined on it.
func startGroups(ns *netnsutil.NS, engine *udpEngine, log *slog.Logger) (*listeningGroups, error) {
	l := &listeningGroups{ns: ns, groups: engine.groups, log: log, problems: make(map[*joinedGroup]string)}
	for _, g := range l.groups.all {
		err := l.place(g)
		if err == nil {
			err = tryGroup(g)
		} else if g.Iface == "" {
			err = nil // a boot without network
		}
		if err != nil {
			return nil, fmt.Errorf("join multicast group %q: %w", g.Group, err)
		}
	}
	var err error
	if l.diag, err = ns.SockDiag(); err != nil {
		return nil, fmt.Errorf("follow the listeners of multicast groups: %w", err)
	}
	// A file of the namespace that the thread is in.
	_ = ns.Do(func() error { l.ephemeral = ephemeralPorts(); return nil })
	var ctx context.Context
	ctx, l.cancel = context.WithCancel(context.Background())
	l.wg.Add(1)
	go l.loop(ctx)
	return l, nil
}

// tryGroup joins g on any port, and leaves it.
func tryGroup(g *joinedGroup) error {
	fd, err := openGroup(g, 0)
	if err == nil {
		unix.Close(fd)
	}
	return err
}

// close returns when the goroutine has ended. The sockets are the engine's.
func (l *listeningGroups) close() {
	l.cancel()
	l.wg.Wait()
}

func (l *listeningGroups) loop(ctx context.Context) {
	defer l.wg.Done()
	defer l.diag.Close()
	watch, err := netnsutil.WatchHost(settle)
	if err != nil {
		l.log.Warn("multicast groups stay on their interfaces", "err", err)
	}
	defer watch.Close()
	changes := watch.Changes()
	poll := time.NewTicker(pollListeners)
	defer poll.Stop()
	for l.placeAll(); ; {
		l.listen()
		select {
		case <-ctx.Done():
			return
		case _, ok := <-changes:
			if !ok {
				changes = nil // there will be no more
			}
			l.placeAll()
		case <-poll.C:
		}
	}
}

func (l *listeningGroups) placeAll() {
	for _, g := range l.groups.all {
		l.report(g, l.place(g))
	}
}

// place puts a group on its interface, which may be another one than before.
func (l *listeningGroups) place(g *joinedGroup) (err error) {
	name, index := g.Iface, 0
	if name == "" {
		link, linkErr := netnsutil.HostLink()
		if name, err = link.Name, linkErr; errors.Is(err, netnsutil.ErrNoHostLink) {
			err = errNoDefaultRoute
		}
	}
	if err == nil {
		if index = ifindex(name); index == 0 {
			err = fmt.Errorf("the host has no interface %s", name)
		}
	}
	if index != g.ifindex {
		l.groups.move(g, index)
	}
	return err
}

// report keeps and logs what is in the way of a group; nil is nothing.
func (l *listeningGroups) report(g *joinedGroup, err error) {
	text := ""
	if err != nil {
		text = err.Error()
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if text != "" && l.problems[g] != text {
		l.log.Warn("a multicast group is not heard", "group", g.Group, "err", err)
	}
	l.problems[g] = text
}

// listen follows the sockets of the namespace.
func (l *listeningGroups) listen() {
	open, err := l.diag.AppendListeners(nil)
	for _, g := range l.groups.all {
		if g.ifindex == 0 {
			continue // place has said why
		}
		if err != nil { // what is heard stays so
			l.report(g, err)
			continue
		}
		wanted := l.wanted(g, open)
		have := l.groups.ports(g)
		var failure error
		for _, port := range have {
			if !slices.Contains(wanted, port) {
				l.groups.leave(g, port)
			}
		}
		for _, port := range wanted {
			if slices.Contains(have, port) {
				continue
			}
			if err := l.groups.join(g, port); err != nil {
				failure = fmt.Errorf("port %d: %w", port, err)
			}
		}
		l.report(g, failure)
	}
}

// wanted returns the ports on which a socket of the namespace may hear g. What is
// bound to all addresses may be a member or not, which the kernel tells nobody; in
// the range of ephemeral ports it is a client.
func (l *listeningGroups) wanted(g *joinedGroup, open []netnsutil.Listener) []uint16 {
	ports := make(map[uint16]bool)
	for _, o := range open {
		at, port := o.Addr.Addr().WithZone(""), o.Addr.Port()
		all := at.IsUnspecified() && (at.Is4() == g.Addr.Is4() || !o.V6Only && at.Is6())
		if o.UDP && (at == g.Addr || all && (port < l.ephemeral.First || port > l.ephemeral.Last)) {
			ports[port] = true
		}
	}
	sorted := slices.Sorted(maps.Keys(ports))
	return sorted[:min(len(sorted), maxGroupPorts)]
}

// status returns what [Status] shows.
func (l *listeningGroups) status() (all []GroupStatus) {
	for _, g := range l.groups.all {
		s := GroupStatus{Group: g.Group, Ports: l.groups.ports(g)}
		slices.Sort(s.Ports)
		l.mu.Lock()
		s.Problem = l.problems[g]
		l.mu.Unlock()
		all = append(all, s)
	}
	return all
}
