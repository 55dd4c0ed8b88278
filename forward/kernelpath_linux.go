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
	dialer nsDialer // to the namespace itself
	behind nsDialer // to hosts behind it

	// tap is the interface index of the tap, 0 if there is none.
	tap     int
	tapName string

	serveBehind sync.Once
	behindErr   error // of that

	mu        sync.Mutex // guards the following fields
	diag      *netnsutil.SockDiag
	listeners []netnsutil.Listener // memory for reuse

	// The stack's reading goroutine asks for the sockets of SYNs, and does not
	// wait for those who ask for listeners.
	synMu   sync.Mutex // guards the following field
	synDiag *netnsutil.SockDiag
}

func openKernelPath(ns *netnsutil.NS) (_ *kernelPath, err error) {
	path, err := ns.OpenKernelPath()
	if err != nil {
		return nil, err
	}
	k := &kernelPath{KernelPath: path, dialer: nsDialer{ns: ns, mark: path.Mark()}}
	defer func() {
		if err != nil {
			_ = k.close()
			err = fmt.Errorf("open kernel path: %w", err)
		}
	}()
	if k.diag, err = ns.SockDiag(); err != nil {
		return nil, err
	}
	if k.synDiag, err = ns.SockDiag(); err != nil {
		return nil, err
	}
	if err = ns.Do(func() error { k.dialer.ephemeral = ephemeralPorts(); return nil }); err != nil {
		return nil, err
	}
	k.behind = k.dialer
	k.behind.mark = 0
	return k, nil
}

// listener is paths.listener. Of two, such as one for each family, a mark is
// enough.
func (k *kernelPath) listener(addr netip.AddrPort) (mark uint32, ok bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.diag == nil {
		return 0, false
	}
	var err error
	if k.listeners, err = k.diag.AppendListeners(k.listeners[:0]); err != nil {
		return 0, false
	}
	for _, l := range k.listeners {
		if !l.UDP && listensOn(l, addr) {
			mark, ok = max(mark, l.Mark), true
		}
	}
	return mark, ok
}

// connecting reports whether a SYN on the tap is that of a socket of the
// namespace's kernel, which alone can be given it back. If not, a guest with a
// network stack of its own has sent it, or it was routed through the namespace.
func (k *kernelPath) connecting(src, dst netip.AddrPort) bool {
	k.synMu.Lock()
	defer k.synMu.Unlock()
	if k.synDiag == nil {
		return true
	}
	yes, err := k.synDiag.Connecting(k.tap, src, dst)
	return yes || err != nil
}

// isBehind is paths.isBehind. What it takes in the namespace is made when it is asked
// for the first time: few have anything behind them.
func (k *kernelPath) isBehind(addr netip.Addr) bool {
	k.serveBehind.Do(func() { k.behindErr = k.ServeBehind(k.tapName) })
	return k.behindErr == nil && k.IsBehind(addr)
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
	closeDiag(&k.mu, &k.diag)
	closeDiag(&k.synMu, &k.synDiag)
	return k.Close()
}

func closeDiag(mu *sync.Mutex, d **netnsutil.SockDiag) {
	mu.Lock()
	defer mu.Unlock()
	if *d != nil {
		(*d).Close()
		*d = nil
	}
}
