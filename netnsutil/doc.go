// Package netnsutil knows which thread is in which network namespace, and is
// the only package that speaks netlink.
//
// # Theory of operation
//
// A Linux network namespace belongs to a thread, not to a process. A Go
// goroutine moves between threads, so a goroutine that wants to act in another
// namespace must pin itself to its thread (runtime.LockOSThread), enter
// (setns(2)), act, and go back before it lets the thread go. [NS.Do] does just
// that. A socket keeps the namespace in which it was made for all its life, so
// only socket(2) and the like need the right thread; reads and writes do not.
//
// Going back needs CAP_SYS_ADMIN over the owner of the namespace that was left.
// Root has that, but the ordinary user's gofwd does not: it lives in the host's
// network namespace as root of a user namespace, and a container's namespace is
// a one-way street for its threads. Therefore all this happens on a thread of
// its own, which stays locked, so that the runtime ends it with its goroutine.
//
// # Namespaces and threads
//
// Entering a network namespace needs CAP_SYS_ADMIN over the user namespace
// that owns it and over one's own. An ordinary user has neither until he is in
// a user namespace of his own, and a program with several threads, as every Go
// program is, cannot enter one (setns(2), unshare(2): EINVAL). So a process that
// needs another user namespace starts itself once more inside it: see [Spawn].
package netnsutil
