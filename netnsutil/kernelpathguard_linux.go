package netnsutil

import (
	"encoding/binary"
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
	socks   []guardSock
	changes chan struct{}
	stop    chan struct{}
	wg      sync.WaitGroup
}

// guardSock hears of changes. Those matter of which the beginning of the message does.
type guardSock struct {
	*os.File
	matters func(msg []byte) bool
}

// Guard begins to put back what others delete of the path, soon after they did:
// firewalls in a container begin with "nft flush ruleset", as nftables.service of
// Debian does, some scripts with "ip rule flush", and "ip link set lo down" takes a
// route along. The kernel announces changes of the ruleset, of the rules for routing,
// of routes and of interfaces (NFNLGRP_NFTABLES, RTNLGRP_IPV4_RULE and so on); none
// costs more than a look, and nothing is put back more than once a second. Nobody
// else's rules are touched.
//
// report is called, by a goroutine, with the names of what was put back, or the
// error of that, and with neither when nothing is missing any more after an error. It must not call Close, which ends the guard and waits for it.
// A path is guarded once.
func (k *KernelPath) Guard(report func(what []string, err error)) error {
	g := &guard{k: k, report: report, changes: make(chan struct{}, 1), stop: make(chan struct{})}
	err := k.ns.Do(func() error {
		any := func([]byte) bool { return true }
		open := func(protocol int, matters func(msg []byte) bool, groups ...int) error {
			bits := uint32(0)
			for _, group := range groups {
				bits |= 1 << (group - 1)
			}
			sock, err := netlinkGroups(protocol, bits)
			if err == nil {
				g.socks = append(g.socks, guardSock{sock, matters})
			}
			return err
		}
		err := open(unix.NETLINK_ROUTE, any, unix.RTNLGRP_IPV4_RULE, unix.RTNLGRP_IPV6_RULE)
		if err == nil {
			err = open(unix.NETLINK_ROUTE, k.isAboutRoute,
				unix.RTNLGRP_LINK, unix.RTNLGRP_IPV6_IFINFO, unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE)
		}
		if err == nil && k.nft != nil {
			err = open(unix.NETLINK_NETFILTER, any, unix.NFNLGRP_NFTABLES)
		}
		return err
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

// isAboutRoute reports whether a message of rtnetlink(7) may be of one of our local
// routes: of its deletion, or of a lo that is up. The IPv6 one goes when lo goes down
// or IPv6 is disabled (net.ipv6.conf.lo.disable_ipv6), and cannot be put back before
// that is undone.
func (k *KernelPath) isAboutRoute(msg []byte) bool {
	if len(msg) < unix.SizeofNlMsghdr+unix.SizeofRtMsg {
		return true
	}
	body := msg[unix.SizeofNlMsghdr:]
	switch binary.NativeEndian.Uint16(msg[4:]) { // nlmsg_type
	case unix.RTM_DELROUTE: // rtm_dst_len and rtm_protocol
		return body[1] == 0 && body[5] == kernelPathProto
	case unix.RTM_NEWLINK: // ifi_index and ifi_flags
		return binary.NativeEndian.Uint32(body[4:]) == uint32(k.lo) && binary.NativeEndian.Uint32(body[8:])&unix.IFF_UP != 0
	}
	return false
}

// listen turns messages that matter into changes.
func (g *guard) listen(sock guardSock) {
	buf := make([]byte, unix.SizeofNlMsghdr+unix.SizeofRtMsg)
	for {
		n, ok := readMessage(sock.File, buf)
		if !ok {
			return
		}
		if !sock.matters(buf[:n]) {
			continue
		}
		select {
		case g.changes <- struct{}{}:
		default:
		}
	}
}

func (g *guard) run() {
	failed := false
	for {
		select {
		case <-g.changes:
		case <-g.stop:
			return
		}
		pause := guardBurst
		what, err := g.k.restore()
		if len(what) > 0 || err != nil || failed {
			g.report(what, err)
		}
		if len(what) > 0 || err != nil {
			pause = guardPause
		}
		if failed = err != nil; failed {
			select {
			case g.changes <- struct{}{}: // it is tried again
			default:
			}
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
		switch err := k.h.RouteAdd(k.localRoute(family)); {
		case errors.Is(err, unix.EEXIST):
		case errors.Is(err, unix.ENETDOWN), family == unix.AF_INET6 && errors.Is(err, unix.EACCES): // see isAboutRoute
		case err == nil:
			err = k.restoreUDPClients(family) // they went with it
			fallthrough
		default:
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
