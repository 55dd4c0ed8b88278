// Command bench measures gofwd beside its peers, in one run.
package main
