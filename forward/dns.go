package forward

import (
	"bufio"
	"bytes"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
)

// resolvConf is where the host's nameservers are written (resolv.conf(5)).
const resolvConf = "/etc/resolv.conf"

const (
	// resolvConfAge is for how long what was read is taken for true.
	resolvConfAge = time.Second
	// nameserverPenalty is for how long a nameserver that failed is asked
	// only if all others failed, too.
	nameserverPenalty = 30 * time.Second
)

// nameservers are the host's nameservers, as resolv.conf has them now. DNS
// itself is not parsed: what the container asks its DNS address is sent to the
// one that next returns, over UDP or TCP.
type nameservers struct {
	path string // of resolv.conf; "" if the servers are given

	mu      sync.Mutex // guards the following fields
	checked time.Time
	file    os.FileInfo // as it was read last; nil before
	servers []netip.Addr
	failure map[netip.Addr]time.Time // the last one of each
}

// newNameservers returns those given, or the host's.
func newNameservers(given []netip.Addr) *nameservers {
	if len(given) > 0 {
		return &nameservers{servers: given}
	}
	return &nameservers{path: resolvConf}
}

// next returns the nameserver to ask now: the first that has not failed of
// late, or the one whose failure is the longest ago. The error is ENETUNREACH
// on a host that has none.
func (n *nameservers) next() (netip.Addr, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.refreshLocked()
	var best netip.Addr
	for _, s := range n.servers {
		failed := n.failure[s]
		if time.Since(failed) >= nameserverPenalty {
			return s, nil
		}
		if !best.IsValid() || failed.Before(n.failure[best]) {
			best = s
		}
	}
	if !best.IsValid() {
		return netip.Addr{}, syscall.ENETUNREACH
	}
	return best, nil
}

// report says whether server answered. One that did not, or answered with an ICMP
// error or RST, is asked later. Of a server that is not the host's nothing is kept.
func (n *nameservers) report(server netip.Addr, answered bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	switch {
	case answered:
		delete(n.failure, server)
	case slices.Contains(n.servers, server):
		if n.failure == nil {
			n.failure = make(map[netip.Addr]time.Time)
		}
		n.failure[server] = time.Now()
	}
}

// refreshLocked reads resolv.conf again if it is another file than last time,
// or was written since. It is looked at by its name each time, since it is
// usually replaced, or a symbolic link to what is. While it is missing or names
// no nameserver, as while it is being written, those read last are kept.
func (n *nameservers) refreshLocked() {
	if n.path == "" || time.Since(n.checked) < resolvConfAge {
		return
	}
	n.checked = time.Now()
	file, err := os.Stat(n.path)
	if err != nil || n.file != nil && os.SameFile(file, n.file) &&
		file.ModTime().Equal(n.file.ModTime()) && file.Size() == n.file.Size() {
		return
	}
	text, err := os.ReadFile(n.path)
	if err != nil {
		return
	}
	n.file = file
	if servers := parseNameservers(text); len(servers) > 0 {
		n.servers = servers
		n.failure = nil
	}
}

// parseNameservers returns the addresses of the nameserver lines of a
// resolv.conf. What is not an address is passed over, as by the resolver.
func parseNameservers(text []byte) []netip.Addr {
	var servers []netip.Addr
	lines := bufio.NewScanner(bytes.NewReader(text))
	for lines.Scan() {
		fields := strings.Fields(lines.Text())
		if len(fields) < 2 || fields[0] != "nameserver" {
			continue
		}
		if addr, err := netip.ParseAddr(fields[1]); err == nil && !addr.IsUnspecified() && !addr.IsMulticast() {
			servers = append(servers, addr.Unmap())
		}
	}
	return servers
}
