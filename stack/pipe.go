package stack

import (
	"net"
	"sync"
)

// Pipe returns the two ends of a cable: a frame written to one is read from the
// other, offloads included. It is for tests. A frame that the other end has no
// room for is dropped, as by a network card.
func Pipe(mtu int, offloads Offloads) (Device, Device) {
	ab, ba := make(chan []byte, 4096), make(chan []byte, 4096)
	done := make(chan struct{})
	once := new(sync.Once)
	return &pipe{mtu, offloads, ba, ab, done, once}, &pipe{mtu, offloads, ab, ba, done, once}
}

type pipe struct {
	mtu      int
	offloads Offloads
	in, out  chan []byte
	done     chan struct{}
	once     *sync.Once // closes done
}

func (p *pipe) Read(bufs [][]byte, idle func() bool) (int, error) {
	if len(p.in) == 0 {
		idle()
	}
	select {
	case frame := <-p.in:
		n := 0
		for _, b := range bufs {
			n += copy(b, frame[n:])
		}
		return n, nil
	case <-p.done:
		return 0, net.ErrClosed
	}
}

func (p *pipe) Write(bufs [][]byte) error {
	select {
	case <-p.done:
		return net.ErrClosed
	default:
	}
	var frame []byte
	for _, b := range bufs {
		frame = append(frame, b...)
	}
	select {
	case p.out <- frame:
	default:
	}
	return nil
}

func (p *pipe) MTU() int           { return p.mtu }
func (p *pipe) Offloads() Offloads { return p.offloads }

func (p *pipe) Close() error {
	p.once.Do(func() { close(p.done) })
	return nil
}
