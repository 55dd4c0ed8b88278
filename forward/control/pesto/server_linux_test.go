package pesto

import (
	"context"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/gofwd/gofwd/forward"
	"github.com/gofwd/gofwd/forward/control"
	"github.com/gofwd/gofwd/netnsutil"
	"github.com/gofwd/gofwd/netnsutil/nstest"
)

func TestMain(m *testing.M) { nstest.Main(m) }

// rig is a Forwarder with pesto's socket.
type rig struct {
	f      *forward.Forwarder
	ns     *netnsutil.NS
	server *Server
	socket string
}

func newRig(t *testing.T, rules ...string) *rig {
	t.Helper()
	r := &rig{ns: nstest.New(t), socket: filepath.Join(t.TempDir(), "s")}
	cfg := forward.Config{NetNS: r.ns}
	for _, s := range rules {
		parsed, err := forward.ParsePublish(s)
		require.NoError(t, err)
		cfg.Rules = append(cfg.Rules, parsed...)
	}
	var err error
	r.f, err = forward.Start(t.Context(), cfg)
	require.NoError(t, err)
	t.Cleanup(func() { r.f.Close() })
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: r.socket, Net: "unix"})
	require.NoError(t, err)
	r.server = NewServer(Config{Forwarder: r.f, NoUDP: true})
	served := make(chan error)
	go func() { served <- r.server.Serve(l) }()
	t.Cleanup(func() {
		require.NoError(t, r.server.Close())
		require.NoError(t, r.server.Close())
		require.ErrorIs(t, <-served, net.ErrClosed)
	})
	return r
}

func (r *rig) dial(t *testing.T) *Client {
	t.Helper()
	c, err := Dial(t.Context(), r.socket)
	require.NoError(t, err)
	t.Cleanup(func() { c.Close() })
	return c
}

// wire returns the rule of a specifier.
func wire(t *testing.T, spec string) Rule {
	t.Helper()
	parsed, err := forward.ParseSpec(forward.In, forward.TCP, spec)
	require.NoError(t, err)
	require.Len(t, parsed, 1)
	_, rule, ok := FromForward(parsed[0])
	require.True(t, ok)
	return rule
}

// add adds rules by a conversation of its own.
func (r *rig) add(t *testing.T, specs ...string) error {
	t.Helper()
	c := r.dial(t)
	for _, s := range specs {
		require.NoError(t, c.Table(Host).Add(wire(t, s)))
	}
	return requireAcknowledged(t, c)
}

func requireAcknowledged(t *testing.T, c *Client) error {
	t.Helper()
	acknowledged, err := c.Update()
	require.True(t, acknowledged, "%v", err)
	return err
}

// rules returns what is forwarded, as the Forwarder knows it.
func (r *rig) rules() (list []string) {
	for _, s := range r.f.Status().Rules {
		list = append(list, s.Rule.String())
	}
	return list
}

// echo starts an echo server in the namespace.
func (r *rig) echo(t *testing.T, port int) {
	t.Helper()
	var l net.Listener
	require.NoError(t, r.ns.Do(func() (err error) { l, err = net.Listen("tcp", fmt.Sprintf(":%d", port)); return err }))
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() { defer c.Close(); io.Copy(c, c) }()
		}
	}()
}

func connect(port int) (net.Conn, error) {
	return net.DialTimeout("tcp", fmt.Sprintf("127.0.0.1:%d", port), 10*time.Second)
}

func requireEcho(t *testing.T, c net.Conn) {
	t.Helper()
	require.NoError(t, c.SetDeadline(time.Now().Add(10*time.Second)))
	_, err := c.Write([]byte("ping"))
	require.NoError(t, err)
	b := make([]byte, 4)
	_, err = io.ReadFull(c, b)
	require.NoError(t, err)
	require.Equal(t, "ping", string(b))
}

// An update is true when it has been acknowledged, and says what it was shown.
func TestUpdate(t *testing.T) {
	r := newRig(t, "8080:80")
	r.echo(t, 80)
	require.NoError(t, r.add(t, "8081:80", "127.0.0.1/8082-8083:80-81"))
	c, err := connect(8081)
	require.NoError(t, err)
	defer c.Close()
	requireEcho(t, c)

	d := r.dial(t)
	require.Equal(t, []Table{
		{PIF: Host, Name: "HOST", Caps: allCaps &^ CapUDP, Rules: []Rule{wire(t, "8080:80"), wire(t, "8081:80"), wire(t, "127.0.0.1/8082-8083:80-81")}},
		{PIF: Splice, Name: "SPLICE", Caps: allCaps &^ CapUDP},
	}, d.Tables)
	require.NoError(t, d.Table(Host).Delete(wire(t, "8081:80")))
	require.NoError(t, requireAcknowledged(t, d))
	_, err = connect(8081)
	require.Error(t, err)
	requireEcho(t, c) // what is connected stays, as with pasta

	d = r.dial(t)
	d.Table(Host).Rules = nil
	d.Table(Splice).Rules = []Rule{{Iface: [16]byte{'l', 'o'}, First: 70, Last: 70, To: 71, Proto: udp, Flags: DualStack}}
	require.NoError(t, requireAcknowledged(t, d))
	require.Equal(t, []string{"70:71/udp,out"}, r.rules())
}

// A change of which one rule can't be is not made, and leaves nothing behind.
func TestAllOrNothing(t *testing.T) {
	r := newRig(t, "8080:80")
	other, err := net.Listen("tcp", "127.0.0.1:9001")
	require.NoError(t, err)
	err = r.add(t, "127.0.0.1/9000", "127.0.0.1/9001", "127.0.0.1/9002")
	var failure control.Failure
	require.ErrorAs(t, err, &failure)
	require.Contains(t, failure.Message, "bind host port 127.0.0.1:9001/tcp")
	require.NotNil(t, failure.Busy)
	require.Equal(t, []string{"8080:80/tcp"}, r.rules())
	_, err = connect(9000)
	require.Error(t, err)
	require.NoError(t, r.add(t, "127.0.0.1/9002"), "the next one is not its heir")
	other.Close()
	require.NoError(t, r.add(t, "127.0.0.1/9001"))

	d := r.dial(t)
	d.Table(Host).Rules = append(d.Table(Host).Rules, wire(t, "8080:81"))
	require.ErrorContains(t, requireAcknowledged(t, d), "overlaps forward 1")
	d = r.dial(t)
	d.Table(Host).Rules = append(d.Table(Host).Rules, wire(t, "8080:80"))
	require.ErrorContains(t, requireAcknowledged(t, d), "is there twice")
	d = r.dial(t)
	d.Tables = append(d.Tables, Table{PIF: 7, Rules: []Rule{wire(t, "1")}})
	require.ErrorContains(t, requireAcknowledged(t, d), "there is no table 7")
	d = r.dial(t)
	d.Tables = append(d.Tables, Table{PIF: Host})
	require.ErrorContains(t, requireAcknowledged(t, d), "table 1 is there twice")
	require.Equal(t, []string{"8080:80/tcp", "127.0.0.1:9002:9002/tcp", "127.0.0.1:9001:9001/tcp"}, r.rules())
}

// Clients that were shown the same tables both get what they meant.
func TestTwoClients(t *testing.T) {
	r := newRig(t, "8080:80", "8081:80")
	first, second, third := r.dial(t), r.dial(t), r.dial(t)
	require.NoError(t, first.Table(Host).Add(wire(t, "9000")))
	require.NoError(t, first.Table(Host).Delete(wire(t, "8080:80")))
	require.NoError(t, second.Table(Host).Add(wire(t, "9001")))
	require.NoError(t, second.Table(Host).Delete(wire(t, "8080:80")))
	require.NoError(t, third.Table(Host).Add(wire(t, "9001:1")))
	require.NoError(t, requireAcknowledged(t, first))
	require.NoError(t, requireAcknowledged(t, second))
	require.ErrorContains(t, requireAcknowledged(t, third), "overlaps")
	require.Equal(t, []string{"8081:80/tcp", "9000:9000/tcp", "9001:9001/tcp"}, r.rules())
}

// A rule that the protocol has no words for is not shown, and survives.
func TestHiddenRules(t *testing.T) {
	hidden := "unix:" + filepath.Join(t.TempDir(), "web") + ":80/tcp"
	r := newRig(t, hidden, "8080:80/tcp,max=3", "8081:80")
	d := r.dial(t)
	require.Equal(t, []Rule{wire(t, "8081:80")}, d.Table(Host).Rules)
	d.Table(Host).Rules = nil
	require.NoError(t, requireAcknowledged(t, d))
	require.Equal(t, []string{hidden, "8080:80/tcp,max=3"}, r.rules())
}

// pesto goes without waiting. The next client sees what it has sent, and a client
// that makes others wait is overtaken.
func TestHastyAndSlow(t *testing.T) {
	r := newRig(t)
	slow, err := net.Dial("unix", r.socket)
	require.NoError(t, err)
	defer slow.Close()
	_, err = slow.Write([]byte{1})
	require.NoError(t, err)
	begin := time.Now()
	for i := range 20 {
		d := r.dial(t)
		require.Len(t, d.Table(Host).Rules, i)
		require.NoError(t, d.Table(Host).Add(wire(t, fmt.Sprintf("%d", 9000+i))))
		require.NoError(t, writeRules(d.conn, d.Tables))
		d.Close()
	}
	require.Len(t, r.dial(t).Table(Host).Rules, 20)
	require.Less(t, time.Since(begin), control.Timeout)

	// What it takes for Close to come through.
	require.NoError(t, r.server.Close())
	_, err = io.ReadAll(slow)
	require.NoError(t, err)
}

func TestManyRules(t *testing.T) {
	r := newRig(t)
	var specs []string
	for i := range 1000 {
		specs = append(specs, fmt.Sprintf("127.0.0.1/%d:%d", 10000+2*i, 20000+i))
	}
	require.NoError(t, r.add(t, specs...))
	d := r.dial(t)
	require.Len(t, d.Table(Host).Rules, 1000)
	d.Table(Host).Rules = d.Table(Host).Rules[:1]
	require.NoError(t, requireAcknowledged(t, d))
	require.Len(t, r.rules(), 1)
}

// Of 100 changes, clients of a port that they don't name notice nothing.
func TestUnrelatedPort(t *testing.T) {
	r := newRig(t, "8080:80")
	r.echo(t, 80)
	var stop atomic.Bool
	var good, failed atomic.Int64
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for !stop.Load() {
				c, err := connect(8080)
				if err != nil {
					failed.Add(1)
					continue
				}
				good.Add(1)
				c.Close()
			}
		})
	}
	for i := range 50 {
		spec := fmt.Sprintf("127.0.0.1/%d:80", 9000+i)
		require.NoError(t, r.add(t, spec))
		d := r.dial(t)
		require.NoError(t, d.Table(Host).Delete(wire(t, spec)))
		require.NoError(t, requireAcknowledged(t, d))
	}
	stop.Store(true)
	wg.Wait()
	require.Zero(t, failed.Load())
	require.Positive(t, good.Load())
}

func TestDialErrors(t *testing.T) {
	r := newRig(t)
	_, err := Dial(t.Context(), r.socket+"no")
	require.ErrorContains(t, err, "no such file")
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err = Dial(ctx, r.socket)
	require.Error(t, err)

	// Servers of another kind: one that hangs up, and one that resets.
	for want, serve := range map[string]func(c net.Conn){
		"unexpected EOF": func(net.Conn) {},
		"does not speak": func(c net.Conn) { c.Write(make([]byte, 64)) },
		"and its log says": func(c net.Conn) {
			_ = writeTables(c, []Table{{PIF: Host}})
			io.ReadFull(c, make([]byte, 1)) // and the rest stays unread
		},
	} {
		l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
		require.NoError(t, err)
		go func() {
			if c, err := l.Accept(); err == nil {
				serve(c)
				c.Close()
			}
		}()
		c, err := Dial(t.Context(), l.Addr().String())
		if err == nil {
			require.NoError(t, c.Table(Host).Add(wire(t, "80")))
			var acknowledged bool
			acknowledged, err = c.Update()
			require.False(t, acknowledged)
			c.Close()
		}
		require.ErrorContains(t, err, want)
		l.Close()
	}
}
