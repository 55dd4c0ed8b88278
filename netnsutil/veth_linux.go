package netnsutil

import (
	"errors"
	"fmt"
	"os"

	"github.com/vishvananda/netlink"
)

// Veth connects two namespaces by a pair of virtual Ethernet interfaces, aLink
// in a and bLink in b, and configures both as [NS.Configure] does. The pair ends
// with either namespace.
func Veth(a *NS, aLink Link, b *NS, bLink Link) error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name = aLink.Name
	veth := &netlink.Veth{LinkAttrs: attrs, PeerName: bLink.Name, PeerNamespace: netlink.NsFd(b.Fd())}
	if err := a.Do(func() error { return netlink.LinkAdd(veth) }); err != nil {
		return fmt.Errorf("make veth pair %s, %s: %w", aLink.Name, bLink.Name, os.NewSyscallError("netlink", err))
	}
	if err := errors.Join(a.Configure(aLink), b.Configure(bLink)); err != nil {
		return errors.Join(err, a.Do(func() error { return netlink.LinkDel(veth) }))
	}
	return nil
}
