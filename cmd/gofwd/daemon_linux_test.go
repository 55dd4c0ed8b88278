package main

import (
	"os"
	"path/filepath"
	"strconv"
	"testing"

	"github.com/stretchr/testify/require"
)

// A pid file goes with whoever wrote it last.
func TestPIDFileOfTwo(t *testing.T) {
	path := filepath.Join(t.TempDir(), "pid")
	first, err := openPIDFile(path)
	require.NoError(t, err)
	require.NoError(t, first.write())
	next := []byte("4194305\n") // no process id
	require.NoError(t, os.WriteFile(path, next, 0))
	first.remove()
	b, err := os.ReadFile(path)
	require.NoError(t, err)
	require.Equal(t, next, b)

	second, err := openPIDFile(path)
	require.NoError(t, err)
	require.NoError(t, second.write())
	b, err = os.ReadFile(path)
	require.NoError(t, err)
	require.Equal(t, strconv.Itoa(os.Getpid())+"\n", string(b))

	// One that is about to write to it has it too.
	third, err := openPIDFile(path)
	require.NoError(t, err)
	second.remove()
	require.NoError(t, third.write())
	require.FileExists(t, path)
	third.remove()
	require.NoFileExists(t, path)
}
