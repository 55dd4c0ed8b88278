// Command gofwd gives a container's network namespace a network and publishes
// its ports, as an ordinary user.
package main

func main() {}
