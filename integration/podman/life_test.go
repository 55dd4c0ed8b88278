//go:build podman

package podman

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// eachSuite runs a test for each version of Podman, with gofwd as its helper.
func eachSuite(t *testing.T, test func(t *testing.T, l *lab)) {
	for _, suite := range suites() {
		t.Run(suite, func(t *testing.T) {
			l := openLab(t, suite, true)
			l.clean(t)
			t.Cleanup(func() { l.clean(t) })
			test(t, l)
		})
	}
}

// answers waits until the published server answers.
func (l *lab) answers(t *testing.T) {
	t.Helper()
	require.Eventually(t, func() bool {
		_, _, err := l.ask(l.client, "tcp", host4)
		return err == nil
	}, 5*time.Second, 20*time.Millisecond)
}

// A busy port is an error of podman run that names who has it.
func TestBusyPort(t *testing.T) {
	eachSuite(t, func(t *testing.T, l *lab) {
		l.network(t, "lab4")
		l.run(t, "podman", "run", "-d", "--network=pasta", "-p", "8080:80", "localhost/web")
		for _, network := range []string{"pasta", "lab4"} {
			_, err := l.try("podman", "run", "-d", "--network="+network, "-p", "8080:80", "localhost/web")
			require.ErrorContains(t, err, "bind host port 8080/tcp: in use by ")
		}
	})
}

// attach --follow stays with a container through restarts, in every mode of user
// namespaces.
func TestFollow(t *testing.T) {
	eachSuite(t, func(t *testing.T, l *lab) {
		for _, userns := range []string{"host", "keep-id", "auto", "nomap"} {
			l.clean(t)
			l.run(t, "podman", "run", "-d", "--name", "web", "--network=none", "--user=0:0", "--userns="+userns, "localhost/web")
			l.run(t, "gofwd", "attach", "--container", "web", "--follow", "--detach", "--pid-file", "follow.pid", "-p", "8080:80")
			l.answers(t)
			l.run(t, "podman", "restart", "--time", "0", "web")
			l.answers(t)
			l.run(t, "sh", "-c", "kill $(cat follow.pid)")
			require.Eventually(t, func() bool {
				_, _, err := l.ask(l.client, "tcp", host4)
				return err != nil
			}, 5*time.Second, 20*time.Millisecond)
		}
	})
}

// A hook that fails keeps the container from starting, and says why where the
// documentation says.
func TestHookFails(t *testing.T) {
	eachSuite(t, func(t *testing.T, l *lab) {
		l.run(t, "sh", "-c", "rm -f $XDG_RUNTIME_DIR/gofwd/hook.log")
		_, err := l.try("podman", "--hooks-dir", "/shared/hooks.d", "run", "-d", "--network=none",
			"--annotation", "gofwd.publish=8080:80:90:100", "localhost/web")
		require.ErrorContains(t, err, "error executing hook")
		require.Contains(t, l.run(t, "sh", "-c", "cat $XDG_RUNTIME_DIR/gofwd/hook.log"), "8080:80:90:100")
	})
}
