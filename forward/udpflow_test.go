package forward

import (
	"net/netip"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// testTable is a table of flows on one socket.
type testTable struct {
	flowTable
	sock   *udpSocket
	server netip.Addr // of the flows that begin
	gone   []uint16   // the peers' ports of the flows that left, in order
}

func newTestTable(limit int) *testTable {
	t := &testTable{sock: &udpSocket{id: 1}}
	t.flowTable = newFlowTable(limit, func(f *flow) { t.gone = append(t.gone, f.peer.Port()) })
	return t
}

// begin adds a flow to a peer that its port names.
func (t *testTable) begin(port uint16, now int64) *flow {
	f := &flow{
		server: t.server,
		guest:  netip.MustParseAddrPort("10.0.2.100:53"),
		peer:   netip.AddrPortFrom(netip.MustParseAddr("192.0.2.1"), port),
	}
	f.host = flowEnd{sock: t.sock, remote: sockaddrOf(f.peer, false)}
	t.add(f, now)
	return f
}

func (t *testTable) find(f *flow) (byTap, bySock *flow) {
	return t.byTap[tapKey{keyOf(f.guest), keyOf(f.peer)}], t.bySock[sockKey{t.sock.id, f.host.remote}]
}

func TestFlowTableFindsByEitherSide(t *testing.T) {
	table := newTestTable(10)
	f := table.begin(1, 0)
	byTap, bySock := table.find(f)
	require.Same(t, f, byTap)
	require.Same(t, f, bySock)
	require.True(t, table.taken(f.guest, f.peer))
	table.remove(f)
	byTap, bySock = table.find(f)
	require.Nil(t, byTap)
	require.Nil(t, bySock)
	require.Zero(t, table.len())
	require.Equal(t, []uint16{1}, table.gone)
}

func TestFlowTimeouts(t *testing.T) {
	short, stream := ticks(udpTimeout), ticks(udpStreamTimeout)
	for _, c := range []struct {
		name string
		sent []int // directions, one a second
		life int64 // from the last of them
	}{
		{"one way, once", nil, short},
		{"one way, often", []int{inbound, inbound, inbound, inbound}, short},
		{"one exchange", []int{inbound, outbound}, short},
		{"one question, many answers", []int{inbound, outbound, outbound, outbound}, short},
		{"a stream", []int{inbound, outbound, inbound, outbound}, stream},
	} {
		t.Run(c.name, func(t *testing.T) {
			table := newTestTable(10)
			f := table.begin(1, 0)
			now := int64(0)
			for _, dir := range c.sent {
				now++
				table.touch(f, dir, now)
			}
			require.False(t, table.expire(now+c.life-1, 10))
			require.Equal(t, 1, table.len())
			table.expire(now+c.life, 10)
			require.Zero(t, table.len())
		})
	}
}

func TestFlowTableEvictsTheIdlest(t *testing.T) {
	table := newTestTable(3)
	stream := table.begin(1, 0)
	for range 2 {
		table.touch(stream, inbound, 0)
		table.touch(stream, outbound, 0)
	}
	two := table.begin(2, 1)
	table.begin(3, 2)
	table.touch(two, inbound, 3)
	table.begin(4, 4)
	require.Equal(t, []uint16{3}, table.gone, "two was used later")
	table.begin(5, 5)
	table.begin(6, 6)
	require.Equal(t, []uint16{3, 2, 4}, table.gone, "a stream stays as long as there is anything else")
	require.Equal(t, 3, table.len())
}

func TestFlowTableQueries(t *testing.T) {
	table := newTestTable(3)
	query := func(port uint16, now int64) *flow {
		table.server = netip.MustParseAddr("192.0.2.53")
		defer func() { table.server = netip.Addr{} }()
		return table.begin(port, now)
	}
	f := query(1, 0)
	for i := range int64(4) {
		table.touch(f, int(i)%2, i)
	}
	require.False(t, table.expire(3+ticks(udpQueryTimeout)-1, 10))
	require.Equal(t, 1, table.len())
	table.expire(3+ticks(udpQueryTimeout), 10)
	require.Zero(t, table.len(), "queries are no stream")

	table.gone = nil
	query(1, 20)
	table.begin(2, 21)
	query(3, 22)
	for port := range uint16(3) {
		table.begin(4+port, 23)
	}
	require.Equal(t, []uint16{1, 2, 3}, table.gone)
}

func TestFlowTableEvictsStreamsAtLast(t *testing.T) {
	table := newTestTable(2)
	for port := range uint16(4) {
		f := table.begin(port, int64(port))
		for range 2 {
			table.touch(f, inbound, int64(port))
			table.touch(f, outbound, int64(port))
		}
	}
	require.Equal(t, []uint16{0, 1}, table.gone)
}

func TestFlowTableExpiresInSteps(t *testing.T) {
	table := newTestTable(100)
	for port := range uint16(100) {
		table.begin(port, 0)
	}
	require.True(t, table.expire(1000, 64))
	require.Equal(t, 36, table.len())
	require.False(t, table.expire(1000, 64))
	require.Zero(t, table.len())
}

func TestFlowTableRemoveAll(t *testing.T) {
	table := newTestTable(10)
	for port := range uint16(10) {
		table.begin(port, 0)
	}
	table.removeAll(func(f *flow) bool { return f.peer.Port()%2 == 0 })
	require.Equal(t, []uint16{0, 2, 4, 6, 8}, table.gone)
	require.Equal(t, 5, table.len())
}

// FuzzFlowTable compares the table with a simple model of what it promises.
func FuzzFlowTable(f *testing.F) {
	f.Add([]byte{0, 1, 2, 3, 64, 65, 128, 192, 255, 3, 3, 3})
	f.Fuzz(func(t *testing.T, ops []byte) {
		const limit = 4
		table := newTestTable(limit)
		live := map[uint16]*flow{}
		now := int64(0)
		for _, op := range ops {
			port := uint16(op % 16)
			switch f := live[port]; {
			case op >= 192:
				now += int64(op - 191)
				table.expire(now, limit)
			case f == nil:
				live[port] = table.begin(port, now)
			case op >= 160:
				table.remove(f)
			default:
				table.touch(f, int(op/16)%2, now)
			}
			for _, port := range table.gone {
				delete(live, port)
			}
			table.gone = nil
			require.Equal(t, len(live), table.len())
			require.LessOrEqual(t, table.len(), limit)
			require.Len(t, table.byTap, len(live))
			require.Len(t, table.bySock, len(live))
			for _, f := range live {
				byTap, bySock := table.find(f)
				require.Same(t, f, byTap)
				require.Same(t, f, bySock)
				require.Less(t, now-f.seen, int64(udpStreamTimeout/time.Second)+64)
			}
		}
	})
}

func BenchmarkFlowTableTouch(b *testing.B) {
	table := newTestTable(1 << 14)
	var flows []*flow
	for port := range uint16(1 << 14) {
		flows = append(flows, table.begin(port, 0))
	}
	b.ReportAllocs()
	i := 0
	for b.Loop() {
		f := flows[i%len(flows)]
		i += 7919
		table.touch(table.byTap[tapKey{keyOf(f.guest), keyOf(f.peer)}], inbound, int64(i>>20))
	}
}
