// Empty: a package with a .s file may declare functions without a body, which
// the linknames of spawn_linux.go need.
