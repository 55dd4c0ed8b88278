// Package integration holds the tests that drive real programs through gofwd:
// curl against nginx, dig against dnsmasq, udhcpc, dhcpcd, rdisc6, iperf3, socat,
// ping, traceroute and tcpdump, and containers under gVisor's runsc ("make runsc"), on
// hosts that are network namespaces (see topo_test.go).
//
// They need user namespaces and /dev/net/tun, and run alike as root and as an
// ordinary user. A program that is missing skips its tests, and the reason is
// printed; with GOFWD_CI=1 in the environment that is a failure.
package integration
