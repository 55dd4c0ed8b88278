package netnsutil

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const (
	// guardPause is how long nothing is put back after something was: a firewall
	// that deletes it again and again costs one transaction in that time.
	guardPause = time.Second
	// guardBurst is how long changes are collected before they are looked at
	// again. The first is looked at at once.
	guardBurst = 10 * time.Millisecond
)

// guard notices that somebody has deleted what a kernel path is made of.
type guard struct {
	k       *KernelPath
	report  func(what []string, err error)
	socks   []*os.File
	changes chan struct{}
	stop    chan struct{}
	wg      sync.WaitGroup
}

// Guard begins to put back what others delete of the path, soon after they did:
// firewalls in a container begin with "nft flush ruleset", as nftables.service of
// Debian does, and some scripts with "ip rule flush". The kernel announces changes
// of the ruleset and of the rules for routing (NFNLGRP_NFTABLES,
// RTNLGRP_IPV4_RULE, RTNLGRP_IPV6_RULE); none costs more than a look, and nothing is
// put back more than once a second. Nobody else's rules are touched.
//
// report is called, by a goroutine, with the names of what was put back, or the
// error of that. It must not call Close, which ends the guard and waits for it.
// A path is guarded once.
func (k *KernelPath) Guard(report func(what []string, err error)) error {
	g := &guard{k: k, report: report, changes: make(chan struct{}, 1), stop: make(chan struct{})}
	err := k.ns.Do(func() error {
		rules, err := netlinkGroups(unix.NETLINK_ROUTE, 1<<(unix.RTNLGRP_IPV4_RULE-1)|1<<(unix.RTNLGRP_IPV6_RULE-1))
		if err != nil {
			return err
		}
		g.socks = append(g.socks, rules)
		if k.nft == nil {
			return nil
		}
		nft, err := netlinkGroups(unix.NETLINK_NETFILTER, 1<<(unix.NFNLGRP_NFTABLES-1))
		if err != nil {
			return err
		}
		g.socks = append(g.socks, nft)
		return nil
	})
	k.mu.Lock()
	defer k.mu.Unlock()
	if err == nil && k.closed {
		err = os.ErrClosed
	}
	if err != nil {
		for _, sock := range g.socks {
			sock.Close()
		}
		return fmt.Errorf("guard the kernel path: %w", err)
	}
	k.guard = g
	g.changes <- struct{}{} // what happened before
	for _, sock := range g.socks {
		g.wg.Go(func() { g.listen(sock) })
	}
	g.wg.Go(g.run)
	return nil
}

// listen turns messages into changes; what they say does not matter.
func (g *guard) listen(sock *os.File) {
	for readMessage(sock) {
		select {
		case g.changes <- struct{}{}:
		default:
		}
	}
}

func (g *guard) run() {
	for {
		select {
		case <-g.changes:
		case <-g.stop:
			return
		}
		pause := guardBurst
		if what, err := g.k.restore(); len(what) > 0 || err != nil {
			g.report(what, err)
			pause = guardPause
		}
		select {
		case <-time.After(pause):
		case <-g.stop:
			return
		}
	}
}

// end ends the guard and waits for it. k.closed is set.
func (g *guard) end() {
	close(g.stop)
	for _, sock := range g.socks {
		sock.Close()
	}
	g.wg.Wait()
}

// restore puts back what is missing, and names it.
func (k *KernelPath) restore() (what []string, err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.closed {
		return nil, nil
	}
	var errs []error
	put := func(name string, err error) {
		if err == nil {
			what = append(what, name)
		} else {
			errs = append(errs, fmt.Errorf("restore %s: %w", name, err))
		}
	}
	for _, family := range k.families {
		name := map[int]string{unix.AF_INET: "IPv4", unix.AF_INET6: "IPv6"}[family]
		if err := k.h.RouteAdd(k.localRoute(family)); !errors.Is(err, unix.EEXIST) {
			put(name+" route", err)
		}
		marked, ports, err := k.ownRules(family)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		if !marked {
			put(name+" rule", k.h.RuleAdd(k.markRule(family)))
		}
		for port := range k.udp.ports {
			if !ports[port] {
				put(fmt.Sprintf("%s rule of UDP port %d", name, port), k.h.RuleAdd(k.udpRule(family, port)))
			}
		}
	}
	if there, err := k.isLoaded(); err != nil {
		errs = append(errs, fmt.Errorf("look at nftables rules: %w", err))
	} else if !there {
		put("nftables rules", k.load(k.wanted))
	}
	return what, errors.Join(errs...)
}

// ownRules reports which of our rules there are: the one for the mark, and those of
// UDP ports.
func (k *KernelPath) ownRules(family int) (marked bool, ports map[uint16]bool, err error) {
	rules, err := again(func() ([]netlink.Rule, error) { return k.h.RuleList(family) })
	if err != nil {
		return false, nil, fmt.Errorf("list rules: %w", err)
	}
	ports = make(map[uint16]bool)
	for _, r := range rules {
		switch {
		case r.Protocol != kernelPathProto:
		case r.Sport != nil:
			ports[r.Sport.Start] = true
		default:
			marked = true
		}
	}
	return marked, ports, nil
}
