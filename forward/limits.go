package forward

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// Limits bound what one forward carries. The zero value is no limit. MaxConns, Rate
// and Idle are for TCP alone. New connections that a limit or a prefix is against are
// reset, and counted as [Traffic].Refused.
type Limits struct {
	// MaxConns is how many connections may be open at once; 0 is any number.
	MaxConns int `json:"max_conns,omitempty"`
	// Rate is how many connections may begin in a second, and at once; 0 is
	// any number.
	Rate int `json:"rate,omitempty"`
	// Idle resets TCP connections that moved no byte for so long; 0 never.
	Idle Duration `json:"idle,omitempty"`
	// Allow, if not empty, are the only clients; Deny are no clients. For UDP
	// too.
	Allow Prefixes `json:"allow,omitempty"`
	Deny  Prefixes `json:"deny,omitempty"`
}

// check says what is wrong with l for a protocol.
func (l Limits) check(proto Proto) error {
	switch {
	case l.MaxConns < 0 || l.Rate < 0 || l.Idle < 0:
		return errors.New("a limit is negative")
	case proto != TCP && (l.MaxConns != 0 || l.Rate != 0 || l.Idle != 0):
		return errors.New("max, rate and idle are for tcp")
	}
	for _, list := range []Prefixes{l.Allow, l.Deny} {
		if _, err := list.parse(); err != nil {
			return err
		}
	}
	return nil
}

// gate lets clients of a rule in, or not. The zero value lets everyone in.
type gate struct {
	limits      Limits
	allow, deny prefixList

	mu     sync.Mutex // guards the following fields
	tokens float64    // connections that may begin now
	filled time.Time
}

// newGate returns the gate of limits that were checked.
func newGate(l Limits) gate {
	allow, _ := l.Allow.parse()
	deny, _ := l.Deny.parse()
	return gate{limits: l, allow: allow, deny: deny, tokens: float64(l.Rate), filled: time.Now()}
}

// allows reports whether a client may speak to the rule at all.
func (g *gate) allows(client netip.Addr) bool {
	return !g.deny.contains(client) && (len(g.allow) == 0 || g.allow.contains(client))
}

// admit counts a new connection of client, unless a limit is against it.
func (r *activeRule) admit(client netip.Addr) bool {
	g := &r.gate
	if g.limits == (Limits{}) {
		r.begin()
		return true
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if !g.allows(client) || g.limits.MaxConns > 0 && r.active.Load() >= int64(g.limits.MaxConns) || !g.tokenLocked() {
		return false
	}
	r.begin()
	return true
}

// tokenLocked takes a token out of a bucket that holds Rate of them, and is filled
// with as many a second.
func (g *gate) tokenLocked() bool {
	if g.limits.Rate == 0 {
		return true
	}
	now := time.Now()
	rate := float64(g.limits.Rate)
	g.tokens = min(rate, g.tokens+now.Sub(g.filled).Seconds()*rate)
	g.filled = now
	if g.tokens < 1 {
		return false
	}
	g.tokens--
	return true
}

// Duration is a time.Duration that is text in JSON: "1m30s".
type Duration time.Duration

// MarshalText is time.Duration.String.
func (d Duration) MarshalText() ([]byte, error) { return []byte(time.Duration(d).String()), nil }

// UnmarshalText is time.ParseDuration.
func (d *Duration) UnmarshalText(text []byte) error {
	v, err := time.ParseDuration(string(text))
	*d = Duration(v)
	return err
}

// Prefixes is a list of prefixes as text, so that rules stay comparable: sorted,
// masked, joined by "+". The zero value is none. [ParsePrefixes] makes it.
type Prefixes string

// ParsePrefixes parses addresses and prefixes joined by "+".
func ParsePrefixes(s string) (Prefixes, error) {
	if s == "" {
		return "", errors.New("no prefix is given")
	}
	var list []string
	for item := range strings.SplitSeq(s, "+") {
		p, err := netip.ParsePrefix(item)
		if err != nil {
			a, addrErr := netip.ParseAddr(item)
			if addrErr != nil || a.Zone() != "" {
				return "", fmt.Errorf("%q is not ADDR or ADDR/LEN", item)
			}
			a = a.Unmap()
			p = netip.PrefixFrom(a, a.BitLen())
		}
		if p.Addr().Is4In6() {
			return "", fmt.Errorf("%q: write it as IPv4", item)
		}
		list = append(list, p.Masked().String())
	}
	slices.Sort(list)
	return Prefixes(strings.Join(slices.Compact(list), "+")), nil
}

// MarshalText returns the text.
func (p Prefixes) MarshalText() ([]byte, error) { return []byte(p), nil }

// UnmarshalText is [ParsePrefixes]; nothing is the zero value.
func (p *Prefixes) UnmarshalText(text []byte) (err error) {
	if len(text) == 0 {
		*p = ""
		return nil
	}
	*p, err = ParsePrefixes(string(text))
	return err
}

func (p Prefixes) parse() (prefixList, error) {
	if p == "" {
		return nil, nil
	}
	again, err := ParsePrefixes(string(p))
	if err != nil {
		return nil, err
	}
	var list prefixList
	for item := range strings.SplitSeq(string(again), "+") {
		list = append(list, netip.MustParsePrefix(item))
	}
	return list, nil
}

type prefixList []netip.Prefix

func (l prefixList) contains(a netip.Addr) bool {
	a = a.Unmap().WithZone("")
	return slices.ContainsFunc(l, func(p netip.Prefix) bool { return p.Contains(a) })
}

// ruleOption is what a rule of [ParsePublish] may have after its protocol.
type ruleOption struct {
	name string
	get  func(r *Rule) string // "" if it isn't set; of a switch anything else
	// set takes what follows "=", and is nil for a switch, which turn is for.
	set  func(r *Rule, value string) error
	turn func(r *Rule)
}

// ruleOptions returns them in the order in which [Rule.String] writes them.
func ruleOptions() []ruleOption {
	return []ruleOption{
		switchOption("out", func(r *Rule) bool { return r.Dir == Out }, func(r *Rule) { r.Dir = Out }),
		switchOption("weak", func(r *Rule) bool { return r.Weak }, func(r *Rule) { r.Weak = true }),
		switchOption("auto", func(r *Rule) bool { return r.Auto }, func(r *Rule) { r.Auto = true }),
		switchOption("share", func(r *Rule) bool { return r.Share }, func(r *Rule) { r.Share = true }),
		switchOption("wait", func(r *Rule) bool { return r.Wait }, func(r *Rule) { r.Wait = true }),
		{
			name: "proxy",
			get: func(r *Rule) string {
				if r.ProxyV2 {
					return "v2"
				}
				return ""
			},
			set: func(r *Rule, value string) error {
				if value != "v2" {
					return fmt.Errorf("%q is not a version of the PROXY protocol that is spoken here: v2", value)
				}
				r.ProxyV2 = true
				return nil
			},
		},
		numberOption("max", func(r *Rule) *int { return &r.MaxConns }),
		numberOption("rate", func(r *Rule) *int { return &r.Rate }),
		{
			name: "idle",
			get: func(r *Rule) string {
				if r.Idle == 0 {
					return ""
				}
				return time.Duration(r.Idle).String()
			},
			set: func(r *Rule, value string) error {
				d, err := time.ParseDuration(value)
				if err != nil || d <= 0 {
					return fmt.Errorf("%q is not a duration such as 90s or 5m", value)
				}
				r.Idle = Duration(d)
				return nil
			},
		},
		prefixOption("allow", func(r *Rule) *Prefixes { return &r.Allow }),
		prefixOption("deny", func(r *Rule) *Prefixes { return &r.Deny }),
	}
}

func switchOption(name string, is func(*Rule) bool, turn func(*Rule)) ruleOption {
	return ruleOption{name: name, turn: turn, get: func(r *Rule) string {
		if is(r) {
			return name
		}
		return ""
	}}
}

func numberOption(name string, field func(*Rule) *int) ruleOption {
	return ruleOption{
		name: name,
		get: func(r *Rule) string {
			if *field(r) == 0 {
				return ""
			}
			return strconv.Itoa(*field(r))
		},
		set: func(r *Rule, value string) error {
			n, err := strconv.ParseUint(value, 10, 31)
			if err != nil || n == 0 {
				return fmt.Errorf("%q is not a number from 1 on", value)
			}
			*field(r) = int(n)
			return nil
		},
	}
}

func prefixOption(name string, field func(*Rule) *Prefixes) ruleOption {
	return ruleOption{
		name: name,
		get:  func(r *Rule) string { return string(*field(r)) },
		set: func(r *Rule, value string) (err error) {
			*field(r), err = ParsePrefixes(value)
			return err
		},
	}
}

// writeOptions returns ",out,max=5".
func writeOptions(r *Rule) string {
	var b strings.Builder
	for _, o := range ruleOptions() {
		value := o.get(r)
		if value == "" {
			continue
		}
		b.WriteString("," + o.name)
		if o.turn == nil {
			b.WriteString("=" + value)
		}
	}
	return b.String()
}

// parseOption sets an option of r; ok is false if word is none.
func parseOption(r *Rule, word string) (ok bool, err error) {
	name, value, valued := strings.Cut(word, "=")
	name = strings.ToLower(name)
	for _, o := range ruleOptions() {
		switch {
		case o.name != name:
			continue
		case o.turn != nil && valued:
			return true, fmt.Errorf("option %q takes no value", name)
		case o.turn != nil:
			o.turn(r)
			return true, nil
		}
		if err := o.set(r, value); err != nil {
			return true, fmt.Errorf("option %q: %w", name, err)
		}
		return true, nil
	}
	return false, nil
}
