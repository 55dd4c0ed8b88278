// Package podman runs gofwd under real rootless Podman, and shows what servers in
// its containers see of their clients, and what else works, beside what does with
// Podman's own helpers.
//
// The labs are Debian root file systems with Podman in them, below $LAB_DIR
// (/tmp/podman-lab), entered with namespaces of their own: see lab/README.md. They
// take root and Debian's packages (dnsmasq-base and tshark too), so the tests have
// the build tag podman:
//
//	make test-podman           Podman 5.4
//	make test-podman-all       5.4, 5.8 and 6.1, and all of it with Podman's own helpers too
//	make test-podman-readme    the same, and its tables go into README.md
package podman
