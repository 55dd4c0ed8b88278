package forward

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/gofwd/gofwd/netnsutil"
	"github.com/gofwd/gofwd/stack"
)

// A container that configures itself: what it finds on the tap, and which
// addresses it has in the end.

// configure makes the container's end of the link what was planned, or leaves that
// to the container.
func (f *Forwarder) configure() error {
	link := f.plan.link
	if f.cfg.Network.Unconfigured {
		link = netnsutil.Link{Name: link.Name, HardwareAddr: f.cfg.Network.MAC, Down: true}
	}
	return f.cfg.NetNS.Configure(link)
}

// offerServices puts the services before what cfg has already. They run if ready
// says so, which may take a moment.
func (f *Forwarder) offerServices(cfg *stack.Config, ready func() bool) {
	s := f.services
	if s == nil {
		return
	}
	rest := cfg.UDP
	cfg.UDP = func(d *stack.Datagram) {
		switch {
		case s.takes(d):
			if ready() {
				s.answer(d)
			}
		case rest != nil:
			rest(d)
		}
	}
	if s.advertises() {
		cfg.RouterSolicit = func(from netip.Addr) {
			if ready() {
				s.solicited(from)
			}
		}
	}
}

// guestAddrs are the addresses of a container that configures itself, as they are
// now.
type guestAddrs struct {
	planned []netip.Addr                 // immutable
	read    func() ([]netip.Addr, error) // immutable
	watch   *netnsutil.HostWatch         // of the namespace; immutable
	log     *slog.Logger                 // immutable
	addrs   atomic.Pointer[[]netip.Addr]
	wg      sync.WaitGroup
}

// watchGuest begins to follow the container's addresses; close ends that.
func (f *Forwarder) watchGuest() error {
	g := &guestAddrs{planned: f.plan.addrs.guest, read: f.readGuestAddrs, log: f.log}
	err := f.cfg.NetNS.Do(func() (err error) {
		g.watch, err = netnsutil.WatchHost(0)
		return err
	})
	if err != nil {
		return fmt.Errorf("follow the container's addresses: %w", err)
	}
	if err := g.refresh(); err != nil {
		g.watch.Close()
		return fmt.Errorf("follow the container's addresses: %w", err)
	}
	g.wg.Add(1)
	go g.follow()
	f.guests = g
	return nil
}

// readGuestAddrs reads the addresses of the container's end of the tap.
func (f *Forwarder) readGuestAddrs() (addrs []netip.Addr, err error) {
	err = f.cfg.NetNS.Do(func() error {
		link, err := netnsutil.ReadLink(f.plan.link.Name)
		if errors.Is(err, os.ErrNotExist) { // on its way out, or renamed
			return nil
		}
		for _, p := range link.Addrs {
			addrs = append(addrs, p.Addr())
		}
		return err
	})
	return addrs, err
}

const (
	// guestAddrsPause is the least time between two looks, so that a container
	// that changes its addresses all the time is no work to speak of.
	guestAddrsPause = 20 * time.Millisecond
	// guestAddrsRetry is when to look again after one that failed.
	guestAddrsRetry = time.Second
)

func (g *guestAddrs) follow() {
	defer g.wg.Done()
	var again <-chan time.Time // nil unless the last look failed
	for {
		select {
		case _, open := <-g.watch.Changes():
			if !open {
				return
			}
		case <-again:
		}
		switch err := g.refresh(); {
		case err == nil:
			again = nil
		case again == nil:
			g.log.Warn("the container's addresses stay as they were", "err", err)
			fallthrough
		default:
			again = time.After(guestAddrsRetry)
		}
		time.Sleep(guestAddrsPause)
	}
}

// refresh leaves the addresses as they are if they can't be read.
func (g *guestAddrs) refresh() error {
	have, err := g.read()
	if err != nil {
		return err
	}
	addrs := choose(g.planned, have)
	g.addrs.Store(&addrs)
	return nil
}

// list returns those that were planned first, if the container has them.
func (g *guestAddrs) list() []netip.Addr { return *g.addrs.Load() }

// close is idempotent, and may be called on nil.
func (g *guestAddrs) close() {
	if g != nil {
		g.watch.Close()
		g.wg.Wait()
	}
}

// choose returns the addresses that the container has, those that were planned
// first.
func choose(planned, have []netip.Addr) []netip.Addr {
	list := slices.DeleteFunc(slices.Clone(planned), func(a netip.Addr) bool { return !slices.Contains(have, a) })
	for _, a := range have {
		if !slices.Contains(planned, a) {
			list = append(list, a)
		}
	}
	return list
}
