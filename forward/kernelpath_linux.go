package forward

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"strings"
	"sync"
	"time"

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

	log      *slog.Logger
	restored restored

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

func openKernelPath(ns *netnsutil.NS, log *slog.Logger) (_ *kernelPath, err error) {
	path, err := ns.OpenKernelPath()
	if err != nil {
		return nil, err
	}
	k := &kernelPath{KernelPath: path, dialer: nsDialer{ns: ns, mark: path.Mark()}, log: log}
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
	if err = k.Guard(k.onRestored); err != nil {
		return nil, err
	}
	return k, nil
}

// restored is what others have deleted of the path, and was put back.
type restored struct {
	mu    sync.Mutex // guards the following fields
	times int
	what  string // the last time
	last  time.Time
	err   error // why it was not put back, the last time
}

// onRestored is called when something was put back, or could not be.
func (k *kernelPath) onRestored(what []string, err error) {
	r := &k.restored
	r.mu.Lock()
	defer r.mu.Unlock()
	if err == nil && len(what) == 0 {
		r.err = nil
		return
	}
	level := slog.LevelDebug // what happens again and again is told once
	if err != nil && r.err == nil || err == nil && r.times == 0 {
		level = slog.LevelWarn
	}
	if r.err = err; len(what) > 0 {
		r.times++
		r.what, r.last = strings.Join(what, ", "), time.Now()
	}
	if err != nil {
		k.log.Log(context.Background(), level, "routing in the namespace was deleted, and could not be restored", "err", err)
		return
	}
	k.log.Log(context.Background(), level, "routing in the namespace was deleted by somebody else, and is restored",
		"what", r.what, "hint", "does a firewall there begin with nft flush ruleset?")
}

// note is for [Status], "" if nothing was deleted.
func (k *kernelPath) note() string {
	r := &k.restored
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case r.err != nil:
		return "somebody deleted routing of the kernel path in the namespace, and it could not be restored: " + r.err.Error()
	case r.times == 0:
		return ""
	}
	return fmt.Sprintf("somebody deleted routing of the kernel path in the namespace (%s), %d times, at %s for the last time; "+
		"it was restored", r.what, r.times, r.last.Format(time.RFC3339))
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
	if k.listeners, err = k.diag.AppendListeners(k.listeners[:0]); err != nil && !errors.Is(err, netnsutil.ErrNoUDPDiag) {
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
