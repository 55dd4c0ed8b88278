package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
)

// publishAnnotation holds the ports of a container that the hook publishes,
// separated by blanks, each as of -p.
const publishAnnotation = "gofwd.publish"

// maxHookLog is how large the hook's log may get before it begins anew.
const maxHookLog = 1 << 20

// containerState is what an OCI hook reads from standard input (runtime-spec,
// "State").
type containerState struct {
	ID          string            `json:"id"`
	PID         int               `json:"pid"`
	Annotations map[string]string `json:"annotations"`
}

func newHookCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "hook",
		Short: "publish the ports of a container that is being created (OCI hook)",
		Long: `Read a container's state from standard input, as the OCI runtime writes it to a
createRuntime hook, and attach to its network namespace with the ports of its
annotation ` + publishAnnotation + `. The container does not start if that fails; the
reason is in hook.log in gofwd's runtime directory ($XDG_RUNTIME_DIR/gofwd), since
the runtime throws away what a hook prints.`,
		Example: `  podman --hooks-dir /usr/local/share/gofwd/hooks.d run --network=none \
    --annotation gofwd.publish="8080:80 5353:53/udp" docker.io/library/nginx`,
		Args: noArgs,
		RunE: func(_ *cobra.Command, _ []string) error {
			err := runHook(os.Stdin)
			if err != nil {
				logHook(err)
			}
			return err
		},
	}
}

func runHook(stdin io.Reader) error {
	var state containerState
	if err := json.NewDecoder(stdin).Decode(&state); err != nil {
		return fmt.Errorf("read the container's state: %w", err)
	}
	argv, err := state.attachArgs()
	if argv == nil || err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return fmt.Errorf("container %s: %w", state.ID, err)
	}
	// The namespace belongs to the user namespace that we are in.
	out, err := exec.Command(self, argv...).CombinedOutput()
	if err != nil {
		if said := strings.TrimPrefix(strings.TrimSpace(string(out)), "gofwd: "); said != "" {
			err = errors.New(said)
		}
		return fmt.Errorf("container %s: %w", state.ID, err)
	}
	return nil
}

// attachArgs returns the arguments that make gofwd publish the container's ports,
// nil if it asks for none.
func (s *containerState) attachArgs() ([]string, error) {
	ports := strings.Fields(s.Annotations[publishAnnotation])
	if len(ports) == 0 {
		return nil, nil
	}
	if s.PID <= 0 || s.ID == "" {
		return nil, fmt.Errorf("container %q has no process yet: the hook is for the stage createRuntime", s.ID)
	}
	args := []string{
		"attach", "--detach", "--quiet", "--name", toName(shortID(s.ID)),
		"--netns", fmt.Sprintf("/proc/%d/ns/net", s.PID),
	}
	for _, p := range ports {
		args = append(args, "-p", p)
	}
	return args, nil
}

// shortID is a container's id as Podman shows it.
func shortID(id string) string { return id[:min(12, len(id))] }

// logHook writes why the hook failed to where the documentation says.
func logHook(err error) {
	dir, dirErr := runtimeDir()
	if dirErr != nil {
		return
	}
	flags := os.O_CREATE | os.O_APPEND | os.O_WRONLY
	path := filepath.Join(dir, "hook.log")
	if st, statErr := os.Stat(path); statErr == nil && st.Size() > maxHookLog {
		flags |= os.O_TRUNC
	}
	f, openErr := os.OpenFile(path, flags, 0o600)
	if openErr != nil {
		return
	}
	defer f.Close()
	fmt.Fprintf(f, "%s %s\n", time.Now().Format(time.RFC3339), oneLine(err))
}
