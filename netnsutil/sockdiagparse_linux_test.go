package netnsutil

import (
	"encoding/binary"
	"net/netip"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// nlmsg makes a netlink message.
func nlmsg(kind uint16, seq uint32, payload ...[]byte) []byte {
	b := make([]byte, unix.SizeofNlMsghdr)
	for _, p := range payload {
		b = append(b, p...)
	}
	binary.NativeEndian.PutUint32(b, uint32(len(b)))
	binary.NativeEndian.PutUint16(b[4:], kind)
	binary.NativeEndian.PutUint32(b[8:], seq)
	return b
}

// diagMsg makes a struct inet_diag_msg of an IPv6 socket bound to [2001:db8::1]:80.
func diagMsg() []byte {
	b := make([]byte, 72)
	b[0] = unix.AF_INET6
	binary.BigEndian.PutUint16(b[4:], 80)
	copy(b[8:], netip.MustParseAddr("2001:db8::1").AsSlice())
	return b
}

func TestParseListeners(t *testing.T) {
	v6only := []byte{4: 1, 7: 0}
	binary.NativeEndian.PutUint16(v6only, 5)
	binary.NativeEndian.PutUint16(v6only[2:], inetDiagV6Only)
	errno := make([]byte, 20)
	binary.NativeEndian.PutUint32(errno, ^uint32(unix.ENOENT)+1) // -ENOENT

	for name, tt := range map[string]struct {
		in   []byte
		want int
		done bool
		err  error
	}{
		"one socket":      {nlmsg(unix.SOCK_DIAG_BY_FAMILY, 7, diagMsg(), v6only), 1, false, nil},
		"done":            {nlmsg(unix.NLMSG_DONE, 7, make([]byte, 4)), 0, true, nil},
		"stale":           {nlmsg(unix.NLMSG_DONE, 6, make([]byte, 4)), 0, false, nil},
		"error":           {nlmsg(unix.NLMSG_ERROR, 7, errno), 0, true, unix.ENOENT},
		"short":           {nlmsg(unix.SOCK_DIAG_BY_FAMILY, 7, diagMsg()[:71]), 0, true, errDiagMessage},
		"cut":             {nlmsg(unix.SOCK_DIAG_BY_FAMILY, 7, diagMsg())[:60], 0, true, errDiagMessage},
		"bad attribute":   {nlmsg(unix.SOCK_DIAG_BY_FAMILY, 7, diagMsg(), []byte{0, 0, 0, 0}), 0, true, errDiagMessage},
		"short error":     {nlmsg(unix.NLMSG_ERROR, 7), 0, true, errDiagMessage},
		"length of zero":  {make([]byte, 16), 0, true, errDiagMessage},
		"less than that":  {make([]byte, 3), 0, true, errDiagMessage},
		"two and the end": {append(append(nlmsg(unix.SOCK_DIAG_BY_FAMILY, 7, diagMsg()), nlmsg(unix.SOCK_DIAG_BY_FAMILY, 7, diagMsg())...), nlmsg(unix.NLMSG_DONE, 7)...), 2, true, nil},
	} {
		t.Run(name, func(t *testing.T) {
			list, done, err := parseListeners(nil, tt.in, 7, false)
			require.Equal(t, tt.err, err)
			require.Equal(t, tt.done, done)
			require.Len(t, list, tt.want)
		})
	}
	list, _, _ := parseListeners(nil, nlmsg(unix.SOCK_DIAG_BY_FAMILY, 7, diagMsg(), v6only), 7, true)
	require.Equal(t, []Listener{{UDP: true, Addr: netip.MustParseAddrPort("[2001:db8::1]:80"), V6Only: true}}, list)
}

func TestParseState(t *testing.T) {
	noent := make([]byte, 20)
	binary.NativeEndian.PutUint32(noent, ^uint32(unix.ENOENT)+1) // -ENOENT
	state, ok, err := parseState(nlmsg(unix.SOCK_DIAG_BY_FAMILY, 7, diagMsg()), 7)
	require.NoError(t, err)
	require.True(t, ok)
	require.Zero(t, state)
	for name, tt := range map[string]struct {
		in  []byte
		err error
	}{
		"stale":         {nlmsg(unix.SOCK_DIAG_BY_FAMILY, 6, diagMsg()), nil},
		"error":         {nlmsg(unix.NLMSG_ERROR, 7, noent), unix.ENOENT},
		"short error":   {nlmsg(unix.NLMSG_ERROR, 7), errDiagMessage},
		"another kind":  {nlmsg(unix.NLMSG_DONE, 7, diagMsg()), errDiagMessage},
		"short":         {nlmsg(unix.SOCK_DIAG_BY_FAMILY, 7), errDiagMessage},
		"no header":     {nil, errDiagMessage},
		"length of one": {nlmsg(unix.NLMSG_ERROR, 7, noent)[:20], errDiagMessage},
	} {
		t.Run(name, func(t *testing.T) {
			_, ok, err := parseState(tt.in, 7)
			require.Equal(t, tt.err, err)
			require.False(t, ok)
		})
	}
}

func FuzzParseListeners(f *testing.F) {
	f.Add(nlmsg(unix.SOCK_DIAG_BY_FAMILY, 1, diagMsg(), []byte{5, 0, inetDiagV6Only, 0, 1, 0, 0, 0}))
	f.Add(append(nlmsg(unix.SOCK_DIAG_BY_FAMILY, 1, diagMsg()), nlmsg(unix.NLMSG_DONE, 1)...))
	f.Fuzz(func(t *testing.T, b []byte) {
		_, _, _ = parseState(b, 1)
		list, _, _ := parseListeners(nil, b, 1, false)
		require.LessOrEqual(t, len(list)*(unix.SizeofNlMsghdr+72), len(b)+3)
	})
}
