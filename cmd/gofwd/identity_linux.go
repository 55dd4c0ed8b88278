package main

import (
	"errors"
	"fmt"
	"os/user"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// identity is a user and a group to run as.
type identity struct{ uid, gid int }

// parseIdentity parses UID[:GID] or LOGIN[:GROUP]. Without a group a login has its
// own, and a UID the GID of the same number.
func parseIdentity(s string) (id identity, err error) {
	name, group, hasGroup := strings.Cut(s, ":")
	if id.uid, err = parseID(name); err == nil {
		id.gid = id.uid
	} else {
		u, lookupErr := user.Lookup(name)
		if lookupErr != nil {
			return id, errors.New("no such user")
		}
		if id.uid, err = parseID(u.Uid); err == nil {
			id.gid, err = parseID(u.Gid)
		}
	}
	if err != nil || !hasGroup {
		return id, err
	}
	if id.gid, err = parseID(group); err == nil {
		return id, nil
	}
	g, err := user.LookupGroup(group)
	if err != nil {
		return id, errors.New("no such group")
	}
	id.gid, err = parseID(g.Gid)
	return id, err
}

// parseID parses a UID or GID. The greatest number is none (setresuid(2)).
func parseID(s string) (int, error) {
	n, err := strconv.ParseUint(s, 10, 32)
	if err != nil || n == 1<<32-1 {
		return 0, fmt.Errorf("%q is not an id", s)
	}
	return int(n), nil
}

// become makes all threads of the process run as id, without other groups where it can. What
// /proc has of the process stays its own, for the maps of user namespaces
// (PR_SET_DUMPABLE(2const)).
func (id identity) become() error {
	// Package syscall's act on all threads. In a user namespace that forbids it
	// no groups can be dropped (user_namespaces(7)).
	if err := syscall.Setgroups(nil); err != nil && !errors.Is(err, unix.EPERM) {
		return fmt.Errorf("run as %d:%d: setgroups: %w", id.uid, id.gid, err)
	}
	if err := syscall.Setresgid(id.gid, id.gid, id.gid); err != nil {
		return fmt.Errorf("run as %d:%d: setresgid: %w", id.uid, id.gid, err)
	}
	if err := syscall.Setresuid(id.uid, id.uid, id.uid); err != nil {
		return fmt.Errorf("run as %d:%d: setresuid: %w", id.uid, id.gid, err)
	}
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("run as %d:%d: prctl: %w", id.uid, id.gid, err)
	}
	return nil
}
