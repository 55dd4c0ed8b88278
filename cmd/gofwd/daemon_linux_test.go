package main

import (
	"os"
	"path/filepath"
	"strconv"
	"testing"

	"github.com/stretchr/testify/require"
)

// A pid file goes with the last one that has it: from when that has opened it, not only
// from when it has written to it.
func TestPIDFileOfTwo(t *testing.T) {
	path := filepath.Join(t.TempDir(), "pid")
	first, err := openPIDFile(path)
	require.NoError(t, err)
	require.NoError(t, first.write())
	second, err := openPIDFile(path)
	require.NoError(t, err)
	first.remove()
	require.NoError(t, second.write())
	b, err := os.ReadFile(path)
	require.NoError(t, err)
	require.Equal(t, strconv.Itoa(os.Getpid())+"\n", string(b))
	second.remove()
	require.NoFileExists(t, path)
}
