package forward_test

import (
	"fmt"

	"github.com/gofwd/gofwd/forward"
)

func ExampleParsePublish() {
	for _, s := range []string{"8080:80", "[::1]:5353:53/udp,tcp", "%eth0:8000-8010:9000-9010", "443"} {
		rules, err := forward.ParsePublish(s)
		fmt.Println(rules, err)
	}
	_, err := forward.ParsePublish("80-90:80")
	fmt.Println(err)
	// Output:
	// [8080:80/tcp] <nil>
	// [[::1]:5353:53/udp [::1]:5353:53/tcp] <nil>
	// [%eth0:8000-8010:9000-9010/tcp] <nil>
	// [443/tcp] <nil>
	// port rule "80-90:80": "80-90" is 11 ports and "80" is 1: both ranges need the same length
}

func ExampleParseSpec() {
	rules, err := forward.ParseSpec(forward.In, forward.TCP, "127.0.0.1/22,8000-8005:9000-9005,~8002")
	fmt.Println(rules, err)
	// Output:
	// [127.0.0.1:22:22/tcp 127.0.0.1:8000-8001:9000-9001/tcp 127.0.0.1:8003-8005:9003-9005/tcp] <nil>
}
