package forward

import (
	"net"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// A firewall that starts in the namespace deletes everybody's rules. Connections come
// through again, both ways, and one that was idle goes on.
func TestKernelPathSurvivesAFirewall(t *testing.T) {
	for name, script := range map[string]string{
		"nft flush ruleset": `nft flush ruleset && nft add table inet firewall`,
		"ip rule flush": `for v in -4 -6; do ip $v rule flush; ip $v rule add priority 32766 lookup main; ` +
			`ip $v rule add priority 32767 lookup default 2>/dev/null || true; done`,
	} {
		t.Run(name, func(t *testing.T) {
			remote, ns := newLAN(t), newNS(t)
			outside, inside := tellPeer(t, remote, ":0"), tellPeer(t, ns, ":0")
			echoes := echoServer(t, remote)
			f, _ := start(t, Config{NetNS: ns, Datapath: Kernel, Rules: publishTCP(8080, inside)})
			var idle net.Conn
			within(t, ns, func() {
				var err error
				idle, err = net.DialTimeout("tcp", at(remote4, echoes), 5*time.Second)
				require.NoError(t, err)
			})
			defer idle.Close()
			require.NoError(t, echo(idle))
			require.NotContains(t, strings.Join(f.Status().Notes, " "), "somebody deleted routing")

			within(t, ns, func() {
				out, err := exec.Command("sh", "-c", script).CombinedOutput()
				require.NoError(t, err, "%s", out)
			})
			for range 3 {
				for _, host := range []string{remote4, remote6} {
					begin := time.Now()
					_, _, err := ask(t, ns, "tcp", at(host, outside))
					require.NoError(t, err, host)
					require.Less(t, time.Since(begin), 2*time.Second, "one SYN may be lost")
				}
			}
			for _, host := range []string{host4, host6} {
				got, local, err := ask(t, remote, "tcp", net.JoinHostPort(host, "8080"))
				require.NoError(t, err)
				require.Equal(t, local.String(), got)
			}
			require.NoError(t, echo(idle))
			require.Equal(t, Kernel, f.Status().Rules[0].Path)
			require.Contains(t, strings.Join(f.Status().Notes, " "), "somebody deleted routing")
			if strings.HasPrefix(name, "nft") {
				within(t, ns, func() {
					out, err := exec.Command("nft", "list", "ruleset").CombinedOutput()
					require.NoError(t, err, "%s", out)
					require.Contains(t, string(out), "table inet firewall", "theirs")
					require.Contains(t, string(out), "table inet gofwd", "ours")
				})
			}
		})
	}
}
