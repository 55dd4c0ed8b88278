package netnsutil

import (
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// guarded opens a path with all its parts, and a guard.
func guarded(t *testing.T, ns *NS) (*KernelPath, <-chan string) {
	t.Helper()
	k, err := ns.OpenKernelPath()
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, k.Close()) })
	require.NoError(t, k.HoldSYN("nowhere", netip.MustParseAddrPort("127.0.0.1:1"), netip.MustParseAddrPort("[::1]:1")))
	require.NoError(t, k.ServeBehind("nowhere"))
	require.NoError(t, k.AddUDPPort(53))
	for _, f := range families {
		_, err = k.AddUDPClient(f.client, f.server)
		require.NoError(t, err)
	}
	reports := make(chan string, 100)
	require.NoError(t, k.Guard(func(what []string, err error) {
		if err != nil {
			reports <- err.Error()
			return
		}
		reports <- strings.Join(what, ", ")
	}))
	return k, reports
}

func sorted(s []string) []string { return slices.Sorted(slices.Values(s)) }

func awaitReport(t *testing.T, reports <-chan string) string {
	t.Helper()
	select {
	case r := <-reports:
		return r
	case <-time.After(5 * time.Second):
		require.Fail(t, "nothing was put back")
		return ""
	}
}

// flushRuleset is what nft(8) does at "flush ruleset": a deletion of every table.
func flushRuleset(t *testing.T, ns *NS) {
	t.Helper()
	c, err := ns.openNFT()
	require.NoError(t, err)
	defer c.CloseLasting()
	c.FlushRuleset()
	require.NoError(t, c.Flush())
}

func TestGuardPutsBack(t *testing.T) {
	inTable := func(ns *NS, k *KernelPath, fn func(c *nftables.Conn, t *nftables.Table)) {
		c, err := ns.openNFT()
		require.NoError(t, err)
		defer c.CloseLasting()
		fn(c, &nftables.Table{Name: nftTable, Family: nftables.TableFamilyINet})
		require.NoError(t, c.Flush())
	}
	flushRules := func(h *netlink.Handle) {
		for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
			rules, err := h.RuleList(family)
			require.NoError(t, err)
			for _, r := range rules {
				if r.Protocol == kernelPathProto {
					r.Family = family
					require.NoError(t, h.RuleDel(&r))
				}
			}
		}
	}
	for _, tt := range []struct {
		name string
		do   func(ns *NS, h *netlink.Handle, k *KernelPath)
		want []string // reported in the end
	}{
		{"flush ruleset", func(ns *NS, _ *netlink.Handle, _ *KernelPath) { flushRuleset(t, ns) }, []string{"nftables rules"}},
		{"delete a chain", func(ns *NS, _ *netlink.Handle, k *KernelPath) {
			inTable(ns, k, func(c *nftables.Conn, t *nftables.Table) { c.DelChain(&nftables.Chain{Table: t, Name: "behind"}) })
		}, []string{"nftables rules"}},
		{"flush a chain", func(ns *NS, _ *netlink.Handle, k *KernelPath) {
			inTable(ns, k, func(c *nftables.Conn, t *nftables.Table) { c.FlushChain(&nftables.Chain{Table: t, Name: "out"}) })
		}, []string{"nftables rules"}},
		{"delete the rules of routing", func(_ *NS, h *netlink.Handle, _ *KernelPath) { flushRules(h) }, []string{
			"IPv4 rule", "IPv4 rule of UDP port 53", "IPv6 rule", "IPv6 rule of UDP port 53",
		}},
		{"and the routes", func(_ *NS, h *netlink.Handle, k *KernelPath) {
			for _, family := range k.families {
				require.NoError(t, h.RouteDel(k.localRoute(family)))
			}
			flushRules(h)
		}, []string{"IPv4 route", "IPv6 route", "IPv4 rule", "IPv6 rule"}},
		{"delete the routes alone", func(_ *NS, h *netlink.Handle, k *KernelPath) {
			for _, family := range k.families {
				require.NoError(t, h.RouteDel(k.localRoute(family)))
			}
		}, []string{"IPv4 route", "IPv6 route"}},
		{"lo down and up", func(_ *NS, h *netlink.Handle, k *KernelPath) {
			lo, err := h.LinkByName("lo")
			require.NoError(t, err)
			require.NoError(t, h.LinkSetDown(lo))
			time.Sleep(50 * time.Millisecond) // it can't be put back meanwhile, and that is no error
			require.NoError(t, h.LinkSetUp(lo))
		}, []string{"IPv6 route"}},
		{"IPv6 off and on", func(ns *NS, _ *netlink.Handle, _ *KernelPath) {
			for _, v := range []string{"1", "0"} {
				require.NoError(t, ns.Do(func() error {
					return os.WriteFile("/proc/sys/net/ipv6/conf/lo/disable_ipv6", []byte(v), 0)
				}))
				time.Sleep(50 * time.Millisecond)
			}
		}, []string{"IPv6 route"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			ns, h := newTestNS(t)
			addNowhere(t, h)
			k, reports := guarded(t, ns)
			before := netState(t, ns, h)
			tt.do(ns, h, k)
			// What is deleted while it looks is put back at the next look.
			want, got := sorted(before), map[string]bool{}
			require.Eventually(t, func() bool {
				select {
				case r := <-reports:
					for what := range strings.SplitSeq(r, ", ") {
						require.NotContains(t, what, "restore", "an error")
						got[what] = true
					}
				default:
				}
				missing := slices.ContainsFunc(tt.want, func(w string) bool { return !got[w] })
				return !missing && slices.Equal(want, sorted(netState(t, ns, h)))
			}, 5*time.Second, 5*time.Millisecond)
			require.Empty(t, reports)
		})
	}
}

// What others have is left alone, and a firewall that deletes ours for ever costs no
// more than a transaction a second.
func TestGuardIsNoMatchForAFlusher(t *testing.T) {
	ns, h := newTestNS(t)
	addNowhere(t, h)
	_, reports := guarded(t, ns)
	c, err := ns.openNFT()
	require.NoError(t, err)
	defer c.CloseLasting()
	begin := time.Now()
	for time.Since(begin) < 1500*time.Millisecond {
		c.FlushRuleset()
		c.AddTable(&nftables.Table{Name: "firewall", Family: nftables.TableFamilyINet})
		require.NoError(t, c.Flush())
		time.Sleep(5 * time.Millisecond)
	}
	require.Equal(t, "nftables rules", awaitReport(t, reports))
	require.Equal(t, "nftables rules", awaitReport(t, reports))
	require.LessOrEqual(t, len(reports), 1)
	require.Eventually(t, func() bool {
		tables, err := c.ListTables()
		require.NoError(t, err)
		return len(tables) == 2 // theirs and ours
	}, 5*time.Second, 10*time.Millisecond)
}

// Nothing is put back after Close.
func TestGuardEndsWithThePath(t *testing.T) {
	ns, h := newTestNS(t)
	addNowhere(t, h)
	before := netState(t, ns, h)
	k, reports := guarded(t, ns)
	require.NoError(t, k.Close())
	flushRuleset(t, ns)
	require.Equal(t, before, netState(t, ns, h))
	require.Empty(t, reports)
	require.Error(t, k.Guard(func([]string, error) {}))
}
