// Package forward publishes ports of a network namespace on the host, and gives
// the namespace a way out. It is the package to embed.
//
// # Theory of operation
//
// The way of an inbound connection, and the order of the files:
//
//	host listener → accept         → path choice → dial (the client's address as source) → relay → half-close
//	listen          kernelin | tcp   path           nsdial | stack                          splice | relay
//
// A path is a dialer. There are two: "tap", a gVisor stack at the far end of a
// tap in the namespace (package stack), and "kernel", a transparent kernel
// socket made in the namespace, which also reaches hosts behind it, such as
// containers on a bridge. The choice is one function, in path.go; where it turns out
// to have been wrong, since the server is no socket of the namespace's kernel,
// detour.go makes another one.
//
// Outbound connections are dialled before the container's handshake is
// completed (outbound.go, heldsyn_linux.go on the kernel path): what the world refuses, the container sees refused.
// UDP has no connections; its engine (udp.go) keeps a table of flows instead, and
// ping (echo_linux.go) one of requests.
//
// What an address means on the other side is decided once for all of them: the
// numbers of the container in network.go, the tables of addresses in hostmap.go,
// and the host's nameservers in dns.go.
//
// # Threads
//
// What wakes for every packet is no goroutine that the runtime wakes: a Forwarder has
// threads that wait in the kernel themselves, one for the tap, GOMAXPROCS but at most
// eight for flows on the kernel path (splicer_linux.go) and two to four for UDP (udpin.go). They
// sleep unless there is traffic. Whoever embeds many Forwarders counts that many
// threads for each.
//
// # Limits
//
// Sources are kept for every client but those that hostMap.source lists. Each TCP
// flow takes a descriptor on the tap path and two on the kernel path; where there are
// none left, clients of the kernel path are reset, those of the tap path wait in the
// backlog, and what the container begins is refused. Copy buffers are
// bounded by bufferBudget, UDP flows by MaxFlows of udpConfig, pings on their way
// by pingsInFlight. Multicasts leave the namespace; of those of others
// only the groups of Config.Multicast get in.
package forward
