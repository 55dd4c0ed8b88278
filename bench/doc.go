// Package main measures gofwd beside its peers.
package main

func main() {}
