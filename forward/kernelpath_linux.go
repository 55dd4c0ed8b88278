package forward

import (
	"fmt"
	"net/netip"
	"sync"

	"github.com/gofwd/gofwd/netnsutil"
)

// kernelPath is what the kernel path needs of a namespace: its routing, and eyes
// for the servers in it.
type kernelPath struct {
	*netnsutil.KernelPath
	dialer nsDialer

	mu        sync.Mutex // guards the following fields
	diag      *netnsutil.SockDiag
	listeners []netnsutil.Listener // memory for reuse
}

func openKernelPath(ns *netnsutil.NS) (*kernelPath, error) {
	k, err := ns.OpenKernelPath()
	if err != nil {
		return nil, err
	}
	diag, err := ns.SockDiag()
	if err != nil {
		k.Close()
		return nil, fmt.Errorf("open kernel path: %w", err)
	}
	return &kernelPath{KernelPath: k, dialer: nsDialer{ns: ns, mark: k.Mark()}, diag: diag}, nil
}

// markOf returns the mark of the server at an address of the namespace, 0 if it
// has none or there is no server.
func (k *kernelPath) markOf(addr netip.AddrPort) uint32 {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.diag == nil {
		return 0
	}
	var err error
	if k.listeners, err = k.diag.AppendListeners(k.listeners[:0]); err != nil {
		return 0
	}
	for _, l := range k.listeners {
		if !l.UDP && l.Mark != 0 && listensOn(l, addr) {
			return l.Mark
		}
	}
	return 0
}

// listensOn reports whether a connection to addr may be the listener's.
func listensOn(l netnsutil.Listener, addr netip.AddrPort) bool {
	if l.Addr.Port() != addr.Port() {
		return false
	}
	at := l.Addr.Addr()
	return at == addr.Addr() || at.IsUnspecified() && (at.Is4() == addr.Addr().Is4() || at.Is6() && !l.V6Only)
}

// close ends the path, after the last of its sockets.
func (k *kernelPath) close() error {
	k.mu.Lock()
	k.diag.Close()
	k.diag = nil
	k.mu.Unlock()
	return k.Close()
}
