package main

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

const resolvConfPath = "/etc/resolv.conf"

// resolvConf is what the command finds in /etc/resolv.conf: our nameservers and
// the host's search list. Nil leaves the host's file.
func (i *inner) resolvConf() []byte {
	servers := i.opts.dns
	if len(servers) == 0 {
		servers = i.forwarder.Status().DNS
	}
	if len(servers) == 0 {
		return nil
	}
	host, err := os.ReadFile(resolvConfPath)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		i.log.Warn("the host's search list is not known", "err", err)
	}
	return makeResolvConf(host, servers)
}

// makeResolvConf is the host's resolv.conf(5) with other nameservers.
func makeResolvConf(host []byte, servers []netip.Addr) []byte {
	var b bytes.Buffer
	b.WriteString("# gofwd\n")
	for _, s := range servers {
		fmt.Fprintf(&b, "nameserver %s\n", s)
	}
	for line := range strings.Lines(string(host)) {
		fields := strings.Fields(line)
		if len(fields) < 2 {
			continue
		}
		switch fields[0] {
		case "search", "domain", "options":
			b.WriteString(strings.Join(fields, " ") + "\n")
		}
	}
	return b.Bytes()
}

// mountFile puts a file with the given content over path, in the mount namespace
// of the calling thread. Nothing of it has a name that others see, so nothing is
// left behind whenever the process ends. A symbolic link is covered itself,
// wherever it leads to, if anywhere: move_mount(2) follows none.
func mountFile(path string, content []byte) error {
	// The file is on a file system of its own, which needs a place only
	// for as long as it is written.
	const scratch = "/tmp"
	if err := unix.Mount("gofwd", scratch, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=0755,size=1m"); err != nil {
		return fmt.Errorf("mount tmpfs on %s: %w", scratch, err)
	}
	file := filepath.Join(scratch, filepath.Base(path))
	err := os.WriteFile(file, content, 0o644)
	tree := -1
	if err == nil {
		tree, err = unix.OpenTree(unix.AT_FDCWD, file, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
		err = os.NewSyscallError("open_tree", err)
	}
	if err := errors.Join(err, unix.Unmount(scratch, unix.MNT_DETACH)); err != nil {
		return fmt.Errorf("make %s: %w", path, err)
	}
	defer unix.Close(tree)
	if err := unix.MoveMount(tree, "", unix.AT_FDCWD, path, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return fmt.Errorf("mount over %s: %w", path, err)
	}
	return nil
}
