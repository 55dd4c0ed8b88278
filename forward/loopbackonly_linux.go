package forward

import "github.com/gofwd/gofwd/netnsutil"

// startLoopback is startStack without a stack, for [Config].LoopbackOnly: all that
// there is are ordinary sockets on both sides.
func (f *Forwarder) startLoopback() error {
	if err := f.cfg.NetNS.Configure(netnsutil.Link{}); err != nil { // loopback
		return err
	}
	dns, local := newNameservers(nil), localDialer{f.cfg.NetNS}
	// Nobody but a client of the host's loopback finds an address here.
	addrs := &hostMap{loopbackToLoopback: true, mainAddr: netnsutil.MainAddr, nameserver: dns.next}
	f.plan = &networkPlan{addrs: *addrs}
	f.paths = &paths{addrs: addrs, local: local, noTap: true}
	splicer, err := newSplicer(nil)
	if err != nil {
		return err
	}
	f.tcp = newTCPEngine(f.paths, dns, splicer, nil, f.log)
	f.tcp.events = &f.events
	if f.cfg.NoUDP {
		return nil
	}
	f.udp, err = newUDPEngine(udpConfig{
		Stack: noTap{}, Source: addrs.source, Destination: addrs.destination, Guest: addrs.guestOf,
		Inside: local.listenUDP, LoopbackInside: true,
		MTU: maxMTU, Outbound: &f.tcp.outbound, Logger: f.log,
	})
	return err
}
