package netnsutil

import (
	"container/list"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Inbound UDP cannot use the mark: a UDP server's socket inherits nothing from
// what it receives. Its replies are told apart by the port that they come from
// and the client that they go to:
//
//	ip rule add ipproto udp sport PORT lookup TABLE                 once per forwarded port
//	ip route add local CLIENT dev lo src SERVER table TABLE         once per active client
//
// The replies then reach a transparent socket that is bound to the client's
// address. What the server sends from that port to others is not in the table
// and goes on to the next rule, as ever. A rule with ipproto and sport needs
// Linux 4.17.

// maxUDPClients bounds the table. A route costs the kernel some 300 bytes.
const maxUDPClients = 4096

// udpRoutes are the clients with a route, the least recently used first.
type udpRoutes struct {
	table   int
	ports   map[uint16]bool              // with a rule
	clients map[netip.Addr]*list.Element // of udpClient
	lru     list.List
}

type udpClient struct{ client, server netip.Addr }

// AddUDPPort sends what UDP servers on port reply to clients with a route
// ([KernelPath.AddUDPClient]) to sockets in the namespace. Adding a port twice is
// no error.
func (k *KernelPath) AddUDPPort(port uint16) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.closed { // a closed handle would act on the thread's namespace
		return fmt.Errorf("add rule for UDP port %d: %w", port, os.ErrClosed)
	}
	for _, family := range k.families {
		if err := k.h.RuleAdd(k.udpRule(family, port)); err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("add rule for UDP port %d: %w", port, err)
		}
	}
	if k.udp.ports == nil {
		k.udp.ports = make(map[uint16]bool)
	}
	k.udp.ports[port] = true
	return nil
}

// RemoveUDPPort undoes AddUDPPort.
func (k *KernelPath) RemoveUDPPort(port uint16) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.closed {
		return nil
	}
	delete(k.udp.ports, port)
	for _, family := range k.families {
		if err := k.h.RuleDel(k.udpRule(family, port)); err != nil && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("delete rule for UDP port %d: %w", port, err)
		}
	}
	return nil
}

func (k *KernelPath) udpRule(family int, port uint16) *netlink.Rule {
	r := netlink.NewRule()
	r.Family = family
	r.Priority = k.priority
	r.IPProto = unix.IPPROTO_UDP
	r.Sport = netlink.NewRulePortRange(port, port)
	r.Table = k.udp.table
	r.Protocol = kernelPathProto
	return r
}

// AddUDPClient makes client reachable at a transparent socket for servers on
// the ports of [KernelPath.AddUDPPort]; a server that is bound to no address
// replies from server, the namespace's address that the client speaks to. It
// is to be called for every new flow: clients are ordered by their last call,
// and at the limit the oldest is evicted and returned, so that its flows can be
// closed. The zero Addr says that none was.
func (k *KernelPath) AddUDPClient(client, server netip.Addr) (evicted netip.Addr, err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.closed {
		return netip.Addr{}, fmt.Errorf("add route to UDP client %s: %w", client, os.ErrClosed)
	}
	if e := k.udp.clients[client]; e != nil {
		if e.Value.(udpClient).server == server {
			k.udp.lru.MoveToBack(e)
			return netip.Addr{}, nil
		}
		if err := k.removeUDPClientLocked(e); err != nil {
			return netip.Addr{}, err
		}
	}
	if k.udp.lru.Len() >= maxUDPClients {
		oldest := k.udp.lru.Front()
		evicted = oldest.Value.(udpClient).client
		if err := k.removeUDPClientLocked(oldest); err != nil {
			return netip.Addr{}, err
		}
	}
	c := udpClient{client, server}
	if err := k.h.RouteReplace(k.udpRoute(c)); err != nil {
		return evicted, fmt.Errorf("add route to UDP client %s: %w", client, err)
	}
	if k.udp.clients == nil {
		k.udp.clients = map[netip.Addr]*list.Element{}
	}
	k.udp.clients[client] = k.udp.lru.PushBack(c)
	return evicted, nil
}

// RemoveUDPClient undoes AddUDPClient, after the client's last flow.
func (k *KernelPath) RemoveUDPClient(client netip.Addr) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if e := k.udp.clients[client]; e != nil && !k.closed {
		return k.removeUDPClientLocked(e)
	}
	return nil
}

func (k *KernelPath) removeUDPClientLocked(e *list.Element) error {
	c := e.Value.(udpClient)
	k.udp.lru.Remove(e)
	delete(k.udp.clients, c.client)
	if err := k.h.RouteDel(k.udpRoute(c)); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("delete route to UDP client %s: %w", c.client, err)
	}
	return nil
}

func (k *KernelPath) restoreUDPClients(family int) error {
	for e := k.udp.lru.Front(); e != nil; e = e.Next() {
		if c := e.Value.(udpClient); familyOf(c.client) == family {
			if err := k.h.RouteReplace(k.udpRoute(c)); err != nil {
				return err
			}
		}
	}
	return nil
}

func (k *KernelPath) udpRoute(c udpClient) *netlink.Route {
	family, bits := unix.AF_INET, c.client.BitLen()
	if c.client.Is6() {
		family = unix.AF_INET6
	}
	return &netlink.Route{
		Family:    family,
		LinkIndex: k.lo,
		Dst:       &net.IPNet{IP: c.client.AsSlice(), Mask: net.CIDRMask(bits, bits)},
		Src:       c.server.AsSlice(),
		Type:      unix.RTN_LOCAL,
		Scope:     netlink.Scope(unix.RT_SCOPE_HOST),
		Table:     k.udp.table,
		Protocol:  kernelPathProto,
	}
}
