package main

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
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
