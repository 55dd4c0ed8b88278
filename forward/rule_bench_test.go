package forward

import (
	"fmt"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"
)

// manyRules are n rules without a conflict.
var manyRules = map[string]func(i int) Rule{
	"ports":   func(i int) Rule { return Rule{Ports: port(uint16(i + 1))} },
	"free":    func(int) Rule { return Rule{} },
	"sockets": func(i int) Rule { return Rule{Socket: fmt.Sprintf("systemd:%d", i)} },
}

func makeRules(kind string, n int) (rules []Rule) {
	for i := range n {
		r := manyRules[kind](i)
		r.Proto, r.TargetPorts = TCP, port(uint16(i+1))
		rules = append(rules, r)
	}
	return rules
}

// BenchmarkValidate is about what is checked before anything starts, and at each
// change.
func BenchmarkValidate(b *testing.B) {
	for kind := range manyRules {
		for _, n := range []int{2000, 20000} {
			rules := makeRules(kind, n)
			b.Run(fmt.Sprintf("%s/%d", kind, n), func(b *testing.B) {
				b.ReportAllocs()
				for b.Loop() {
					require.NoError(b, Validate(rules))
				}
			})
		}
	}
}

// BenchmarkPlan is about what a change costs before it is made: all rules lead
// elsewhere from now on, or half of them are new.
func BenchmarkPlan(b *testing.B) {
	for _, n := range []int{2000, 20000} {
		rules := makeRules("ports", n)
		led := slices.Clone(rules)
		for i := range led {
			led[i].TargetPorts = port(uint16(i + 2))
		}
		s := &ruleSet{tcp: &tcpEngine{ctx: b.Context()}, paths: &paths{addrs: &hostMap{}}}
		for name, c := range map[string]struct {
			running []Rule
			Change
		}{
			"lead elsewhere": {rules, Change{Add: led, Replace: true}},
			"double":         {rules[:n/2], Change{Add: rules[n/2:]}},
		} {
			s.rules = nil
			for i, r := range c.running {
				s.rules = append(s.rules, newActiveRule(b.Context(), i, r))
			}
			b.Run(fmt.Sprintf("%s/%d", name, n), func(b *testing.B) {
				for b.Loop() {
					p, err := s.plan(c.Change)
					require.NoError(b, err)
					for _, r := range p.enter {
						r.stop()
					}
				}
			})
		}
	}
}
