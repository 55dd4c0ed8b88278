package forward

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"strings"
	"syscall"

	"github.com/gofwd/gofwd/netnsutil"
)

// Error is what went wrong with a rule. Unwrap leads to the cause: to the errno,
// if it was the kernel that refused.
type Error struct {
	// Op is what was tried, such as "bind host port".
	Op string
	// Rule is the rule, narrowed to the one port that it is about where
	// there is one.
	Rule Rule
	Err  error
}

func (e *Error) Error() string { return e.Op + " " + e.Rule.endpoint() + ": " + e.Err.Error() }

func (e *Error) Unwrap() error { return e.Err }

// Hint says in one line what can be done about an error of this module, "" if
// nothing is known. It looks at the system as it is now, so it is for the moment
// when the error is shown.
func Hint(err error) string {
	var forbidden *netnsutil.ForbiddenError
	var path *fs.PathError
	var call *os.SyscallError
	var onRule *Error
	switch {
	case errors.As(err, &forbidden):
		return forbidden.Remedy
	case errors.Is(err, syscall.EMFILE):
		return filesHint()
	case errors.Is(err, syscall.ENFILE):
		return "the system's limit of open files is reached: raise fs.file-max (sysctl)"
	case errors.As(err, &onRule):
		return ruleHint(onRule)
	case errors.As(err, &path) && path.Path == "/dev/net/tun":
		return tunHint(path.Err)
	case errors.Is(err, netnsutil.ErrNotNetNS):
		return "give the path of a network namespace, such as /proc/PID/ns/net, or a name that ip-netns(8) lists"
	case errors.Is(err, netnsutil.ErrRouteTaken):
		return "the namespace has a network of its own: attach --inbound-only publishes ports and leaves that alone"
	case errors.Is(err, netnsutil.ErrOutside):
		return "start gofwd outside of the container, or in the user namespace that owns the network namespace"
	case errors.As(err, &call) && call.Syscall == "setns" && call.Err == syscall.EPERM: //nolint:errorlint // a bare errno
		return "the network namespace belongs to another user namespace: start gofwd there, with podman unshare or " +
			"nsenter --preserve-credentials --user --target PID"
	}
	return ""
}

// ruleHint is Hint for an operation on a rule.
func ruleHint(e *Error) string {
	isUnix := strings.HasPrefix(e.Rule.Socket, "unix:")
	switch {
	case isUnix && errors.Is(e.Err, syscall.EADDRINUSE):
		return "somebody listens on it, or it is no socket: choose another path"
	case isUnix && errors.Is(e.Err, syscall.EACCES):
		return "choose a directory that you may write to; in its sandbox a gofwd that runs makes UNIX sockets only where it " +
			"made one when it started, unless with --no-sandbox"
	case errors.Is(e.Err, syscall.EADDRINUSE):
		if e.Rule.free() {
			return "no free port is left in net.ipv4.ip_local_port_range: name a port"
		}
		return "stop what uses it, or choose another port"
	case errors.Is(e.Err, syscall.EACCES):
		return privilegedHint(e.Rule.Ports.First)
	case errors.Is(e.Err, syscall.EADDRNOTAVAIL) && e.Rule.Addr.IsValid():
		return fmt.Sprintf("no interface of this host has the address %s, see ip address show", e.Rule.Addr)
	case errors.Is(e.Err, syscall.ENODEV):
		return "see ip link show for the interfaces that there are"
	case errors.Is(e.Err, syscall.EPERM) && e.Rule.device() != "":
		return "before Linux 5.7 binding to an interface takes CAP_NET_RAW"
	case errors.Is(e.Err, syscall.EAFNOSUPPORT):
		return "this kernel has no IPv6"
	}
	return ""
}

// unprivilegedPortStart is the sysctl that says which ports are for everyone.
const unprivilegedPortStart = "net.ipv4.ip_unprivileged_port_start"

// privilegedHint says how to come by a port below unprivilegedPortStart.
func privilegedHint(port uint16) string {
	b, err := os.ReadFile("/proc/sys/" + strings.ReplaceAll(unprivilegedPortStart, ".", "/"))
	if err != nil {
		return ""
	}
	start, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil || int(port) >= start {
		return ""
	}
	return fmt.Sprintf("%s is %d: choose a port from there on, or as root: sysctl -w %s=%d, or let systemd bind it (socket activation)",
		unprivilegedPortStart, start, unprivilegedPortStart, port)
}

func filesHint() string {
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		return ""
	}
	return fmt.Sprintf("the limit of open files is %d, and each port takes one, each connection two: raise it (ulimit -n, LimitNOFILE= in a unit) or publish fewer ports", limit.Cur)
}

// tunHint says how to come by a tap.
func tunHint(err error) string {
	switch {
	case errors.Is(err, syscall.ENOENT), errors.Is(err, syscall.ENODEV), errors.Is(err, syscall.ENXIO):
		return "as root: modprobe tun; inside of a container, it has to be started with --device /dev/net/tun"
	case errors.Is(err, syscall.EACCES), errors.Is(err, syscall.EPERM):
		return "as root: chmod 0666 /dev/net/tun (as udev does); inside of a container, it has to be started with --device /dev/net/tun"
	}
	return ""
}
