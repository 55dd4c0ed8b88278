package forward

import (
	"net/netip"
	"sync"
	"sync/atomic"
	"time"
)

// markedServers are those servers that set a mark of their own, so that their
// replies don't find back to a transparent socket. The zero value is empty.
type markedServers struct {
	count atomic.Int32 // len(seen)
	mu    sync.Mutex   // guards the following field
	seen  map[netip.AddrPort]time.Time
}

// markAge is how long a server is believed to be what it was. To look costs 50 µs.
const markAge = 5 * time.Second

// has reports whether the server at addr sets a mark. It looks anew for those
// that had one some time ago; markOf as in paths.
func (m *markedServers) has(addr netip.AddrPort, markOf func(netip.AddrPort) uint32) bool {
	if m.count.Load() == 0 {
		return false
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	looked, ok := m.seen[addr]
	switch {
	case !ok:
		return false
	case time.Since(looked) < markAge:
		return true
	case markOf(addr) != 0:
		m.seen[addr] = time.Now()
		return true
	}
	delete(m.seen, addr)
	m.count.Add(-1)
	return false
}

func (m *markedServers) add(addr netip.AddrPort) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.seen == nil {
		m.seen = make(map[netip.AddrPort]time.Time)
	}
	if _, ok := m.seen[addr]; !ok {
		m.count.Add(1)
	}
	m.seen[addr] = time.Now()
}
