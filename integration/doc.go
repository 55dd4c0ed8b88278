// Package integration holds the tests that drive real programs through gofwd.
package integration
