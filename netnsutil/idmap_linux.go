package netnsutil

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/user"
	"strconv"
	"strings"
)

// idMapper returns a function that gives a process in a new user namespace its
// ids: root there is the caller, and with auto the caller's subordinate ids
// follow from 1 on. What auto lacks is found out before anything is started.
func idMapper(auto bool) (func(pid int) error, error) {
	uid, gid := os.Geteuid(), os.Getegid()
	if !auto {
		return func(pid int) error { return mapOne(pid, uid, gid) }, nil
	}
	name := ""
	if u, err := user.LookupId(strconv.Itoa(uid)); err == nil {
		name = u.Username
	}
	uids, err := newMapCommand("newuidmap", "/etc/subuid", uid, uid, name)
	if err != nil {
		return nil, err
	}
	gids, err := newMapCommand("newgidmap", "/etc/subgid", gid, uid, name)
	if err != nil {
		return nil, err
	}
	return func(pid int) error {
		if err := uids.run(pid); err != nil {
			return err
		}
		return gids.run(pid)
	}, nil
}

// mapOne maps uid and gid to 0, which needs no privilege as long as
// setgroups(2) is given up (user_namespaces(7)).
func mapOne(pid, uid, gid int) error {
	for _, f := range []struct{ name, value string }{
		{"setgroups", "deny"},
		{"uid_map", fmt.Sprintf("0 %d 1", uid)},
		{"gid_map", fmt.Sprintf("0 %d 1", gid)},
	} {
		if err := os.WriteFile(fmt.Sprintf("/proc/%d/%s", pid, f.name), []byte(f.value), 0); err != nil {
			return fmt.Errorf("map ids into user namespace: %w", err)
		}
	}
	return nil
}

// mapCommand is a run of newuidmap(1) or newgidmap(1), but for the pid.
type mapCommand struct {
	path string
	args []string
}

// newMapCommand prepares to map id to 0, and from 1 on the ranges that table
// (subuid(5)) gives to the user.
func newMapCommand(tool, table string, id, uid int, name string) (mapCommand, error) {
	path, err := exec.LookPath(tool)
	if err != nil {
		return mapCommand{}, fmt.Errorf("map subordinate ids: %w (Debian's package is uidmap)", err)
	}
	f, err := os.Open(table)
	if err != nil {
		return mapCommand{}, fmt.Errorf("map subordinate ids: %w", err)
	}
	defer f.Close()
	ranges, err := parseSubIDs(f, uid, name)
	if err != nil {
		return mapCommand{}, fmt.Errorf("map subordinate ids: %s: %w", table, err)
	}
	if len(ranges) == 0 {
		return mapCommand{}, fmt.Errorf("map subordinate ids: user %d has no range in %s, see usermod(8) --add-subuids", uid, table)
	}
	args := []string{"0", strconv.Itoa(id), "1"}
	inside := uint64(1)
	for _, r := range ranges {
		args = append(args, strconv.FormatUint(inside, 10), strconv.FormatUint(r.first, 10), strconv.FormatUint(r.count, 10))
		inside += r.count
	}
	return mapCommand{path, args}, nil
}

func (c mapCommand) run(pid int) error {
	out, err := exec.Command(c.path, append([]string{strconv.Itoa(pid)}, c.args...)...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("map subordinate ids: %s: %w: %s", c.path, err, bytes.TrimSpace(out))
	}
	return nil
}

// idRange is count ids from first on.
type idRange struct{ first, count uint64 }

// parseSubIDs reads the ranges of a user from a table of lines
// "name-or-uid:first:count" (subuid(5)). name may be "".
func parseSubIDs(table io.Reader, uid int, name string) ([]idRange, error) {
	var ranges []idRange
	lines := bufio.NewScanner(table)
	for lines.Scan() {
		line := strings.TrimSpace(lines.Text())
		who, rest, ok := strings.Cut(line, ":")
		if !ok || who == "" || who != name && who != strconv.Itoa(uid) {
			continue // comments, other users
		}
		first, count, _ := strings.Cut(rest, ":")
		var r idRange
		var err1, err2 error
		r.first, err1 = strconv.ParseUint(first, 10, 32)
		r.count, err2 = strconv.ParseUint(count, 10, 32)
		if err1 != nil || err2 != nil {
			return nil, fmt.Errorf("malformed line %q", line)
		}
		if r.count > 0 {
			ranges = append(ranges, r)
		}
	}
	return ranges, lines.Err()
}
