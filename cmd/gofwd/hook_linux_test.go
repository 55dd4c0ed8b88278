package main

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestHookArgs(t *testing.T) {
	s := containerState{ID: "0123456789abcdef", PID: 42}
	args, err := s.attachArgs()
	require.NoError(t, err)
	require.Nil(t, args, "a container that asks for nothing")

	s.Annotations = map[string]string{publishAnnotation: " 8080:80  5353:53/udp "}
	args, err = s.attachArgs()
	require.NoError(t, err)
	require.Equal(t, "attach --detach --quiet --name 0123456789ab --netns /proc/42/ns/net -p 8080:80 -p 5353:53/udp", strings.Join(args, " "))

	s.PID = 0
	_, err = s.attachArgs()
	require.ErrorContains(t, err, "createRuntime")

	require.Error(t, runHook(strings.NewReader("not JSON")))
	require.NoError(t, runHook(strings.NewReader(`{"ociVersion":"1.0.2","id":"x","pid":1}`)))
}
