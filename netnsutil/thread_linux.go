package netnsutil

import (
	"runtime"

	"golang.org/x/sys/unix"
)

// onThread runs fn on a thread that runs nothing else meanwhile, and returns its
// error. The thread ends with fn, unless fn says that it leaves it clean: in the
// namespaces in which it found it.
//
// The runtime takes no part in this: new threads are never cloned from one that
// is locked, and a thread whose goroutine ends locked ends too
// (runtime.LockOSThread).
func onThread(fn func() (clean bool, err error)) error {
	j := threadJob{fn: fn, done: make(chan struct{})}
	go j.run()
	<-j.done
	if !j.returned {
		runtime.Goexit()
	}
	return j.err
}

type threadJob struct {
	fn       func() (clean bool, err error)
	done     chan struct{}
	returned bool // rather than called runtime.Goexit
	err      error
}

func (j *threadJob) run() {
	defer close(j.done)
	runtime.LockOSThread()
	if unix.Gettid() == unix.Getpid() {
		// The main thread cannot end, it would stay in the namespace for
		// good, and /proc/PID/ns is the main thread's. While it waits
		// here it is not chosen again.
		defer runtime.UnlockOSThread()
		j.err = onThread(j.fn)
		j.returned = true
		return
	}
	clean, err := j.fn()
	j.returned, j.err = true, err
	if clean {
		runtime.UnlockOSThread()
	}
}
