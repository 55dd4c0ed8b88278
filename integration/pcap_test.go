package integration

import (
	"net/netip"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// tcpdump reads a capture file. It insists on becoming another user when it is
// root, which a user namespace with one user forbids: so it gets one in which it
// is not root.
func tcpdump(t *testing.T, n *node, file string, filter ...string) string {
	t.Helper()
	need(t, "tcpdump", "unshare")
	argv := []string{"unshare", "-U", "--map-user=1000", "--map-group=1000", "tcpdump", "-n", "-r", file}
	return n.output(t, append(argv, filter...)...)
}

// TestPcap: tcpdump reads our capture, and finds both directions of TCP, UDP and
// ping, v4 and v6, with checksums that it does not doubt.
func TestPcap(t *testing.T) {
	t.Parallel()
	need(t, "ping")
	tp := newTopo(t)
	file := filepath.Join(t.TempDir(), "tap.pcap")
	g := tp.attach(t, "-p", "8080:80", "-p", "8080:80/udp", "--pcap", file)
	tp.ctr.serveWho(t, 80, ipv4.any, ipv6.any)
	var names []string
	eachFamily(t, func(t *testing.T, f family) {
		for _, proto := range []string{"tcp", "udp"} {
			got, err := tp.client.who(t, proto, f.client, netip.AddrPortFrom(f.host, 8080))
			require.NoError(t, err)
			names = append(names, proto+" "+got.local.String())
		}
		tp.ctr.output(t, "ping", f.flag, "-n", "-c", "1", f.client.String())
	})
	g.stop()
	for _, f := range []family{ipv4, ipv6} {
		for _, proto := range []string{"tcp", "udp"} {
			for _, filter := range [][]string{
				{proto, "and", "src", "host", f.client.String(), "and", "dst", "port", "80"},
				{proto, "and", "dst", "host", f.client.String(), "and", "src", "port", "80"},
			} {
				require.NotEmpty(t, tcpdump(t, tp.host, file, filter...), "%v", filter)
			}
		}
	}
	require.Contains(t, tcpdump(t, tp.host, file, "icmp"), "echo reply")
	require.Contains(t, tcpdump(t, tp.host, file, "icmp6"), "echo reply")
	require.NotEmpty(t, tcpdump(t, tp.host, file, "arp"))
}

// TestPcapDiskFull: a disk that fills up ends the capture with a warning, and
// nothing else.
func TestPcapDiskFull(t *testing.T) {
	t.Parallel()
	tp := newTopo(t)
	small := t.TempDir()
	require.NoError(t, unix.Mount("tmpfs", small, "tmpfs", 0, "size=64k"))
	t.Cleanup(func() { unix.Unmount(small, unix.MNT_DETACH) })
	file := filepath.Join(small, "tap.pcap")
	g := tp.attach(t, "-p", "8080:80", "--pcap", file)
	l := tp.ctr.listenTCP(t, ipv4.any, 80)
	client, server := pair(t, tp.client, netip.AddrPortFrom(ipv4.host, 8080), l)
	requireTransfer(t, client, server, noise(7, 1<<20))
	g.waitLog(t, `(?i)capture.*no space left on device`)
	requireTransfer(t, server, client, noise(8, 1<<20))
	client, server = pair(t, tp.client, netip.AddrPortFrom(ipv4.host, 8080), l)
	requireEcho(t, client, server)
	// What was written until then can be read.
	info, err := os.Stat(file)
	require.NoError(t, err)
	require.Positive(t, info.Size())
}
