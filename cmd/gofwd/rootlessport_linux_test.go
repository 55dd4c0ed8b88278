package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/gofwd/gofwd/netnsutil/nstest"
)

// What Podman 5.4 writes to rootlessport.
func TestRootlessportConfig(t *testing.T) {
	const text = `{"Mappings":[{"host_ip":"","container_port":80,"host_port":8080,"range":1,"protocol":"tcp"},
 {"host_ip":"0.0.0.0","container_port":5353,"host_port":5353,"range":0,"protocol":"tcp,udp"},
 {"host_ip":"127.0.0.1","container_port":80,"host_port":8443,"range":2,"protocol":"tcp"},
 {"host_ip":"::1","container_port":1,"host_port":2,"range":1,"protocol":"udp"}],
 "NetNSPath":"/run/user/5000/netns/netns-1","ExitFD":3,"ReadyFD":4,"TmpDir":"/run/user/5000/libpod/tmp",
 "ChildIP":"10.89.0.2","ContainerID":"fa8cc9","RootlessCNI":true}`
	var cfg rootlessportConfig
	require.NoError(t, json.Unmarshal([]byte(text), &cfg))
	require.Equal(t, 3, cfg.ExitFD)
	require.Equal(t, 4, cfg.ReadyFD)
	require.True(t, cfg.RootlessCNI)
	var rules []string
	for _, m := range cfg.Mappings {
		more, err := m.rules()
		require.NoError(t, err)
		for _, r := range more {
			rules = append(rules, r.String())
		}
	}
	require.Equal(t, []string{
		"8080:80/tcp", "5353:5353/tcp", "5353:5353/udp", "127.0.0.1:8443-8444:80-81/tcp", "[::1]:2:1/udp",
	}, rules)

	_, err := portMapping{HostIP: "host", HostPort: 1, ContainerPort: 1, Protocol: "tcp"}.rules()
	require.ErrorContains(t, err, `"host"`)
	_, err = portMapping{HostPort: 1, ContainerPort: 1, Protocol: "sctp"}.rules()
	require.ErrorContains(t, err, `"sctp"`)
	require.Error(t, runRootlessport(strings.NewReader("{")))
}

// As Podman calls it: in the sandbox once it is ready, for every thread, it serves,
// takes a change of addresses, and leaves nothing behind.
func TestRootlessport(t *testing.T) {
	ns, bridge := nstest.New(t), nstest.New(t)
	nstest.Veth(t, ns, "eth0 10.89.0.2/24", bridge, "eth0 10.89.0.1/24")
	serve := exec.Command("serve", "tcp", "80")
	serve.Dir = t.TempDir()
	nstest.Start(t, ns, serve)

	dir := t.TempDir()
	readyR, readyW, err := os.Pipe()
	require.NoError(t, err)
	defer readyR.Close()
	exitR, exitW, err := os.Pipe()
	require.NoError(t, err)
	orders, err := json.Marshal(rootlessportConfig{
		Mappings:  []portMapping{{HostPort: 8380, ContainerPort: 80, Protocol: "tcp"}},
		NetNSPath: fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), ns.Fd()),
		ReadyFD:   3, ExitFD: 4, TmpDir: dir, ContainerID: "fa8cc9", RootlessCNI: true,
	})
	require.NoError(t, err)
	cmd := exec.Command("rootlessport")
	cmd.Stdin = bytes.NewReader(orders)
	var said bytes.Buffer
	cmd.Stdout = &said
	cmd.Env = append(os.Environ(), "XDG_RUNTIME_DIR="+dir)
	cmd.ExtraFiles = []*os.File{readyW, exitR}
	require.NoError(t, cmd.Start())
	defer cmd.Wait()
	defer exitW.Close()
	readyW.Close()
	exitR.Close()
	ready, err := io.ReadAll(readyR)
	require.NoError(t, err)
	require.Equal(t, "1", string(ready), "%s", &said)

	statuses, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", cmd.Process.Pid))
	require.NoError(t, err)
	require.NotEmpty(t, statuses)
	for _, file := range statuses {
		b, err := os.ReadFile(file)
		require.NoError(t, err)
		for _, line := range []string{"CapEff:\t0000000000203400\n", "NoNewPrivs:\t1\n", "Seccomp:\t2\n"} {
			require.Contains(t, string(b), line)
		}
	}
	fetched := func() bool {
		out, err := exec.Command("fetch", "tcp", "127.0.0.1:8380").CombinedOutput()
		t.Logf("fetch: %s", out)
		return err == nil
	}
	require.True(t, fetched())

	// podman network connect and disconnect.
	nstest.Run(t, ns, "ip", "addr", "add", "10.90.0.3/24", "dev", "eth0")
	nstest.Run(t, ns, "ip", "addr", "del", "10.89.0.2/24", "dev", "eth0")
	reload, err := net.Dial("unixpacket", filepath.Join(dir, "rp", "fa8cc9"))
	require.NoError(t, err)
	defer reload.Close()
	_, err = io.WriteString(reload, `"10.90.0.3"`+"\n")
	require.NoError(t, err)
	answer := make([]byte, 100)
	n, err := reload.Read(answer)
	require.NoError(t, err)
	require.Equal(t, "OK", string(answer[:n]))
	require.True(t, fetched())

	exitW.Close()
	require.NoError(t, cmd.Wait())
	require.Empty(t, said.String())
	left, err := filepath.Glob(filepath.Join(dir, "*/*"))
	require.NoError(t, err)
	require.Empty(t, left)
}

// One that ends after the next of its container has begun leaves that its socket.
func TestReloadSocketOfTwo(t *testing.T) {
	cfg := rootlessportConfig{TmpDir: t.TempDir(), ContainerID: "fa8cc9"}
	path := filepath.Join(cfg.TmpDir, "rp", cfg.ContainerID)
	first, second := &rootlessport{cfg: cfg}, &rootlessport{cfg: cfg}
	for _, r := range []*rootlessport{first, second} {
		require.NoError(t, r.listenReload())
	}
	first.reload.Close()
	first.wg.Wait()
	require.FileExists(t, path)
	second.reload.Close()
	second.wg.Wait()
	require.NoFileExists(t, path)
}
