package netnsutil_test

import (
	"testing"

	"github.com/gofwd/gofwd/netnsutil/nstest"
)

func TestMain(m *testing.M) { nstest.Main(m) }
