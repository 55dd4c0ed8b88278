package forward

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// busyError is EADDRINUSE that knows who has the port.
type busyError struct {
	holder holder
	err    error
}

func (e *busyError) Error() string { return "in use by " + e.holder.String() }

func (e *busyError) Unwrap() error { return e.err }

// holder is who has a socket.
type holder struct {
	pid  int    // 0 if it can't be known: another user's
	name string // of the process
	uid  int    // who made the socket
}

func (h holder) String() string {
	if h.pid == 0 {
		return fmt.Sprintf("a process of uid %d", h.uid)
	}
	return fmt.Sprintf("%s (pid %d)", h.name, h.pid)
}

// nameHolder returns the cause of e, which is EADDRINUSE, with the holder of the
// port where /proc tells.
func (b *binder) nameHolder(e *Error) error {
	var sockets []procSocket
	if e.Rule.Dir == In {
		sockets = socketsOn(e.Rule)
	} else if err := b.ns.Do(func() error { sockets = socketsOn(e.Rule); return nil }); err != nil {
		return e.Err
	}
	if len(sockets) == 0 { // it has just gone, or never did more than bind(2)
		return e.Err
	}
	return &busyError{holder: holderOf(sockets), err: e.Err}
}

// procSocket is a line of /proc/net/{tcp,udp}{,6}.
type procSocket struct {
	local  netip.AddrPort
	listen bool
	uid    int
	inode  uint64
}

// socketsOn returns the sockets in the thread's namespace that can be what is in
// the way of a rule of one port, listeners first.
func socketsOn(r Rule) []procSocket {
	var listeners, others []procSocket
	for _, file := range []string{r.Proto.String(), r.Proto.String() + "6"} {
		f, err := os.Open("/proc/thread-self/net/" + file)
		if err != nil {
			continue
		}
		lines := bufio.NewScanner(f)
		lines.Scan() // the heading
		for lines.Scan() {
			s, ok := parseProcSocket(lines.Text())
			if !ok || s.local.Port() != r.Ports.First || s.inode == 0 || !mayConflict(s.local.Addr(), r) {
				continue
			}
			if s.listen {
				listeners = append(listeners, s)
			} else {
				others = append(others, s)
			}
		}
		f.Close()
	}
	return append(listeners, others...)
}

// mayConflict reports whether a socket bound to addr can be in the way of r.
// /proc doesn't tell whether one on :: is for IPv4 too.
func mayConflict(addr netip.Addr, r Rule) bool {
	want := r.Addr
	if r.Dir == Out {
		return addr.IsLoopback() || addr.IsUnspecified()
	}
	if addr == netip.IPv6Unspecified() {
		return true
	}
	return addrsOverlap(addr.Unmap(), want)
}

// parseProcSocket parses
//
//	0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 12345 ...
//	   local         remote        st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
func parseProcSocket(line string) (s procSocket, ok bool) {
	f := strings.Fields(line)
	if len(f) < 10 {
		return s, false
	}
	if s.local, ok = parseProcAddr(f[1]); !ok {
		return s, false
	}
	s.listen = f[3] == "0A" // TCP_LISTEN
	var err error
	if s.uid, err = strconv.Atoi(f[7]); err != nil {
		return s, false
	}
	s.inode, err = strconv.ParseUint(f[9], 10, 64)
	return s, err == nil
}

// parseProcAddr parses 0100007F:1F90: the address as 32-bit words in the byte
// order of the machine.
func parseProcAddr(s string) (netip.AddrPort, bool) {
	host, portHex, _ := strings.Cut(s, ":")
	port, err := strconv.ParseUint(portHex, 16, 16)
	if err != nil {
		return netip.AddrPort{}, false
	}
	var raw []byte
	for ; len(host) >= 8; host = host[8:] {
		word, err := strconv.ParseUint(host[:8], 16, 32)
		if err != nil {
			return netip.AddrPort{}, false
		}
		raw = binary.NativeEndian.AppendUint32(raw, uint32(word))
	}
	addr, ok := netip.AddrFromSlice(raw)
	return netip.AddrPortFrom(addr, uint16(port)), ok && host == ""
}

// holderOf returns who has the first of the sockets that belongs to a process
// whose descriptors we may read, or else the user of the first.
func holderOf(sockets []procSocket) holder {
	links := make(map[string]int)
	for i, s := range sockets {
		links["socket:["+strconv.FormatUint(s.inode, 10)+"]"] = i
	}
	best, found := len(sockets), holder{uid: sockets[0].uid}
	for _, pid := range pids() {
		if n := lowestLink(pid, links); n < best {
			best, found = n, holder{pid: pid, name: processName(pid), uid: sockets[n].uid}
		}
	}
	return found
}

// pids returns all processes, in ascending order: of several that share a
// socket the lowest is most likely the main one.
func pids() (pids []int) {
	dir, err := os.Open("/proc")
	if err != nil {
		return nil
	}
	defer dir.Close()
	names, _ := dir.Readdirnames(-1)
	for _, name := range names {
		if pid, err := strconv.Atoi(name); err == nil {
			pids = append(pids, pid)
		}
	}
	slices.Sort(pids)
	return pids
}

// lowestLink returns the lowest of the values of links that a descriptor of the
// process leads to.
func lowestLink(pid int, links map[string]int) int {
	lowest := len(links)
	dir := filepath.Join("/proc", strconv.Itoa(pid), "fd")
	f, err := os.Open(dir)
	if err != nil {
		return lowest // gone, or another user's
	}
	defer f.Close()
	names, _ := f.Readdirnames(-1)
	buf := make([]byte, 64)
	for _, name := range names {
		n, err := unix.Readlink(dir+"/"+name, buf)
		if err != nil {
			continue
		}
		if i, ok := links[string(buf[:n])]; ok {
			lowest = min(lowest, i)
		}
	}
	return lowest
}

// processName returns the name of a process as ps(1) shows it.
func processName(pid int) string {
	dir := filepath.Join("/proc", strconv.Itoa(pid))
	comm, err := os.ReadFile(filepath.Join(dir, "comm"))
	if err != nil {
		return "a process"
	}
	name := strings.TrimSpace(string(comm))
	if name != "exe" {
		return name
	}
	// It started itself anew by /proc/self/exe, as RootlessKit, Podman's
	// rootlessport and we do.
	if program, err := os.Readlink(filepath.Join(dir, "exe")); err == nil {
		name = filepath.Base(program)
	}
	return name
}

// NameHolder returns e with the holder of its port named in its cause, if e is
// about a busy port of the host and /proc tells who has it. [Start] does so
// already; this is for the process that started the one where Start failed, when
// that is in a user namespace and may not look at the host's processes.
func NameHolder(e *Error) *Error {
	if e.Rule.Dir != In || !errors.Is(e.Err, unix.EADDRINUSE) {
		return e
	}
	named := *e
	named.Err = (&binder{}).nameHolder(&Error{Op: e.Op, Rule: e.Rule, Err: unix.EADDRINUSE})
	return &named
}
