package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/gofwd/gofwd/netnsutil"
)

func newNetNSCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "netns add|rm NAME",
		Short: "make a network namespace for podman --network=ns:PATH",
		Long: `Make a network namespace that rootless Podman takes, and print its path; or
remove one. It has a name in $XDG_RUNTIME_DIR/netns, as Podman sees it, and for
root in /run/netns.`,
		Example: `  podman run -d --network=ns:"$(gofwd netns add web)" docker.io/library/nginx
  gofwd attach -p 8080:80 --detach --netns web
  gofwd netns rm web`,
		RunE: func(cmd *cobra.Command, _ []string) error { return usagef(cmd, "add or rm?") },
	}
	for _, verb := range []struct {
		name, short string
		run         func(path string) error
	}{
		{"add", "make a network namespace, and print its path", addNetNS},
		{"rm", "remove a network namespace", removeNetNS},
	} {
		cmd.AddCommand(&cobra.Command{
			Use:   verb.name + " NAME",
			Short: verb.short,
			RunE: func(cmd *cobra.Command, args []string) error {
				if len(args) != 1 || !validName(args[0]) {
					return usagef(cmd, "give one name, of letters, digits, dots, dashes and underscores")
				}
				dir, err := netNSDir()
				if err != nil {
					return err
				}
				return verb.run(filepath.Join(dir, args[0]))
			},
		})
	}
	return cmd
}

// netNSDir returns the directory for names, once we are where Podman sees them;
// else it starts this program there, and does not return.
func netNSDir() (string, error) {
	uid := os.Geteuid()
	if _, initial := outsideUID(uid); initial && uid == 0 {
		return "/run/netns", nil
	}
	if os.Getenv("_CONTAINERS_USERNS_CONFIGURED") == "" {
		return "", inPodmanUnshare()
	}
	dir := podmanNetNSDir()
	if dir == "" {
		return "", errors.New("make network namespace: XDG_RUNTIME_DIR is not set")
	}
	return dir, nil
}

// inPodmanUnshare becomes podman unshare with our own command line.
func inPodmanUnshare() error {
	podman, err := exec.LookPath("podman")
	if err != nil {
		return fmt.Errorf("enter Podman's user namespace: %w", err)
	}
	self, err := os.Executable()
	if err != nil {
		return fmt.Errorf("enter Podman's user namespace: %w", err)
	}
	argv := append([]string{"podman", "unshare", self}, os.Args[1:]...)
	return fmt.Errorf("enter Podman's user namespace: %w", syscall.Exec(podman, argv, os.Environ()))
}

// addNetNS makes a namespace that path leads to, with loopback up.
func addNetNS(path string) (err error) {
	ns, err := netnsutil.New()
	if err != nil {
		return err
	}
	defer ns.Close()
	if err := ns.Configure(netnsutil.Link{}); err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return fmt.Errorf("make network namespace: %w", err)
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_RDONLY, 0o444)
	if err != nil {
		return fmt.Errorf("make network namespace: %w", err)
	}
	f.Close()
	if err := unix.Mount(fmt.Sprintf("/proc/self/fd/%d", ns.Fd()), path, "", unix.MS_BIND, ""); err != nil {
		os.Remove(path)
		return fmt.Errorf("mount network namespace on %s: %w", path, err)
	}
	fmt.Println(path)
	return nil
}

// removeNetNS takes the name away. The namespace itself ends with its last
// process.
func removeNetNS(path string) error {
	err := unix.Unmount(path, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
	if err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("unmount %s: %w", path, err)
	}
	if err := os.Remove(path); err != nil {
		return fmt.Errorf("remove network namespace: %w", err)
	}
	return nil
}
