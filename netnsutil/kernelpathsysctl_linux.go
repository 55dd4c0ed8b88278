package netnsutil

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
)

// sysctlPaths are the switches that the kernel path needs on, below
// /proc/sys/net. Their order is the order of bits in the note that
// [KernelPath.localRoute] carries.
var sysctlPaths = [...]string{
	"ipv4/tcp_fwmark_accept", // an accepted socket inherits the mark; IPv6 too
	"ipv4/fwmark_reflect",    // the RST of a closed port and ICMP errors carry it
	"ipv6/fwmark_reflect",
}

// sysctl is an on/off switch of a namespace. The open file stays in that
// namespace, and lets a process put the switch back that can neither enter the
// namespace nor open files any more.
type sysctl struct {
	file *os.File // nil where the kernel has no such switch
	was  bool
}

// openSysctl opens a switch of the calling thread's namespace.
func openSysctl(path string) (*sysctl, error) {
	f, err := os.OpenFile("/proc/sys/net/"+path, os.O_RDWR, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return &sysctl{}, nil
	}
	if err != nil {
		return nil, fmt.Errorf("open sysctl: %w", err)
	}
	var b [16]byte
	n, err := f.ReadAt(b[:], 0)
	if n == 0 {
		f.Close()
		return nil, fmt.Errorf("read sysctl: %w", err)
	}
	return &sysctl{file: f, was: !bytes.HasPrefix(b[:n], []byte("0"))}, nil
}

// openSysctls opens the switches of the kernel path. Where leftovers of an
// earlier process were found, what that one had found counts.
func (k *KernelPath) openSysctls(was uint, found bool) error {
	return k.ns.Do(func() error {
		for i, path := range sysctlPaths {
			s, err := openSysctl(path)
			if err != nil {
				return err
			}
			if found {
				s.was = was&(1<<i) != 0
			}
			k.sysctls = append(k.sysctls, s)
		}
		return nil
	})
}

func (s *sysctl) set() error { return s.write("1") }

// restore puts the switch back to what it was and closes it.
func (s *sysctl) restore() error {
	if s.file == nil {
		return nil
	}
	defer s.file.Close()
	if s.was {
		return nil
	}
	return s.write("0")
}

func (s *sysctl) write(v string) error {
	if s.file == nil {
		return nil
	}
	if _, err := s.file.WriteAt([]byte(v), 0); err != nil {
		return fmt.Errorf("write sysctl: %w", err)
	}
	return nil
}
