package forward_test

import (
	"context"
	"fmt"
	"log"
	"net/netip"

	"github.com/gofwd/gofwd/forward"
	"github.com/gofwd/gofwd/netnsutil"
)

// A namespace gets a network, and its port 80 is published on the host's 8080,
// until it goes away.
func ExampleStart() {
	ns, err := netnsutil.Open("/run/user/1000/netns/web")
	if err != nil {
		log.Fatal(err)
	}
	defer ns.Close()
	rules, err := forward.ParsePublish("8080:80")
	if err != nil {
		log.Fatal(err)
	}
	f, err := forward.Start(context.Background(), forward.Config{
		NetNS: ns,
		Rules: rules,
		Network: forward.Network{
			Addrs: []netip.Prefix{netip.MustParsePrefix("10.0.9.100/24")},
		},
	})
	if err != nil {
		log.Fatal(err)
	}
	defer f.Close()
	for _, rule := range f.Status().Rules {
		fmt.Println(rule.Rule, rule.Bound, rule.Path)
	}
	fmt.Println(f.Wait())
}
