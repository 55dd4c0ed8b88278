// Package podman runs gofwd under real rootless Podman, and shows what servers in
// its containers see of their clients, beside what they see with Podman's own
// helpers.
//
// The labs are Debian root file systems with Podman in them, below $LAB_DIR
// (/tmp/podman-lab), entered with namespaces of their own: see lab/README.md. They
// take root and Debian's packages, so the tests have the build tag podman:
//
//	make test-podman         Podman 5.4, under a minute
//	make test-podman-all     5.4, 5.8 and 6.1
package podman
