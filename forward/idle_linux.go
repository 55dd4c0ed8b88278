package forward

import (
	"time"

	"golang.org/x/sys/unix"
)

// idleLoop resets the connections of rule that have been idle for too long. The
// kernel knows when each moved its last byte (tcp_info): nothing is counted while
// they run, and one look at all of them each quarter of the limit will do.
func (e *tcpEngine) idleLoop(rule *activeRule) {
	defer e.wg.Done()
	limit := time.Duration(rule.rule.Idle)
	look := time.NewTicker(max(limit/4, 10*time.Millisecond))
	defer look.Stop()
	for {
		select {
		case <-rule.ctx.Done():
			return
		case <-look.C:
		}
		for _, r := range e.relaysOf(rule) {
			if idleFor(r.outer) >= limit {
				r.abort(endIdle)
			}
		}
	}
}

// watchesIdle reports whether idleLoop looks after the connections of r; nil is no
// rule. Those are relayed where it finds them.
func (r *activeRule) watchesIdle() bool { return r != nil && r.rule.Idle != 0 }

// relaysOf returns the connections of rule.
func (e *tcpEngine) relaysOf(rule *activeRule) (relays []*relay) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for r := range e.relays {
		if r.rule == rule {
			relays = append(relays, r)
		}
	}
	return relays
}

// idleFor returns for how long no byte went by c, 0 if that isn't known.
func idleFor(c flowConn) time.Duration {
	raw, ok := rawConn(c)
	if !ok {
		return 0
	}
	var info *unix.TCPInfo
	err := raw.Control(func(fd uintptr) { info, _ = unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO) })
	if err != nil || info == nil {
		return 0
	}
	return time.Duration(min(info.Last_data_sent, info.Last_data_recv)) * time.Millisecond
}
