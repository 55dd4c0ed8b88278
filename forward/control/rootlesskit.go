package control

import (
	"cmp"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"strings"

	"github.com/gofwd/gofwd/forward"
)

// The API of RootlessKit, as pkg/api/openapi.yaml there describes it.

const rootlessKitAPI = "1.1.1"

type portInfo struct {
	ID   int      `json:"id"`
	Spec portSpec `json:"spec"`
}

// portSpec is one port. Proto tcp and udp listen on all addresses of both
// families also if ParentIP is 0.0.0.0; tcp4, tcp6, udp4 and udp6 of one.
type portSpec struct {
	Proto      string `json:"proto,omitempty"`
	ParentIP   string `json:"parentIP,omitempty"`
	ParentPort int    `json:"parentPort,omitempty"`
	ChildIP    string `json:"childIP,omitempty"`
	ChildPort  int    `json:"childPort,omitempty"`
}

// rule returns what s asks for.
func (s portSpec) rule() (r forward.Rule, err error) {
	switch strings.TrimRight(s.Proto, "46") {
	case "tcp":
		r.Proto = forward.TCP
	case "udp":
		r.Proto = forward.UDP
	default:
		return r, fmt.Errorf("proto %q is none of tcp, tcp4, tcp6, udp, udp4 and udp6", s.Proto)
	}
	if r.Ports, err = onePort("parentPort", s.ParentPort); err != nil {
		return r, err
	}
	if r.TargetPorts, err = onePort("childPort", s.ChildPort); err != nil {
		return r, err
	}
	if r.Addr, err = optionalAddr("parentIP", s.ParentIP); err != nil {
		return r, err
	}
	if r.Target, err = optionalAddr("childIP", s.ChildIP); err != nil {
		return r, err
	}
	if r.Target.IsUnspecified() {
		r.Target = netip.Addr{}
	}
	switch wild := !r.Addr.IsValid() || r.Addr.IsUnspecified(); {
	case strings.HasSuffix(s.Proto, "4"):
		if wild {
			r.Addr = netip.IPv4Unspecified()
		}
		if !r.Addr.Is4() {
			return r, fmt.Errorf("parentIP %q is none of %s", s.ParentIP, s.Proto)
		}
	case strings.HasSuffix(s.Proto, "6"):
		if wild {
			r.Addr = netip.IPv6Unspecified()
		}
		if !r.Addr.Is6() {
			return r, fmt.Errorf("parentIP %q is none of %s", s.ParentIP, s.Proto)
		}
	case wild && r.Target.IsValid():
		// A target has one family, and so have its clients.
		r.Addr = netip.IPv6Unspecified()
		if r.Target.Is4() {
			r.Addr = netip.IPv4Unspecified()
		}
	case wild:
		r.Addr = netip.Addr{}
	}
	return r, nil
}

func onePort(name string, port int) (forward.PortRange, error) {
	if port < 1 || port > 65535 {
		return forward.PortRange{}, fmt.Errorf("%s %d is not a port from 1 to 65535", name, port)
	}
	return forward.PortRange{First: uint16(port), Last: uint16(port)}, nil
}

func optionalAddr(name, s string) (netip.Addr, error) {
	if s == "" {
		return netip.Addr{}, nil
	}
	a, err := netip.ParseAddr(s)
	if err != nil {
		return a, fmt.Errorf("%s %q is not an IP address", name, s)
	}
	return a.Unmap(), nil
}

// portInfos lists the ports of forwards: each of a range by itself, under the
// range's id. What has no port of the host on that API is left out.
func portInfos(forwards []forward.RuleStatus) []portInfo {
	infos := []portInfo{}
	for _, f := range forwards {
		r := f.Rule
		if r.Dir != forward.In || r.Socket != "" || r.Auto {
			continue
		}
		spec := portSpec{Proto: r.Proto.String(), ParentIP: r.Addr.WithZone("").String(), ChildPort: int(r.TargetPorts.First)}
		switch {
		case !r.Addr.IsValid():
			spec.ParentIP = "0.0.0.0"
		case r.Addr.IsUnspecified() && !r.Target.IsValid():
			spec.Proto += map[bool]string{true: "4", false: "6"}[r.Addr.Is4()]
		}
		if r.Target.IsValid() {
			spec.ChildIP = r.Target.String()
		}
		for i := range r.TargetPorts.Len() {
			at := spec
			at.ChildPort += i
			at.ParentPort = int(r.Ports.First) + i
			if r.Ports == (forward.PortRange{}) {
				if i >= len(f.Bound) {
					break
				}
				at.ParentPort = int(f.Bound[i].Port())
			}
			infos = append(infos, portInfo{f.ID, at})
		}
	}
	return infos
}

func (h *handler) getPorts(w http.ResponseWriter, _ *http.Request) error {
	writeJSON(w, http.StatusOK, portInfos(h.Forwarder.Status().Rules))
	return nil
}

func (h *handler) postPort(w http.ResponseWriter, r *http.Request) error {
	var spec portSpec
	if err := readJSON(w, r, &spec); err != nil {
		return err
	}
	rule, err := spec.rule()
	if err != nil {
		return badRequest{err}
	}
	added, err := h.Forwarder.Add(rule)
	if err != nil {
		return err
	}
	writeJSON(w, http.StatusCreated, portInfo{added.ID, spec})
	return nil
}

// info is the answer to /v1/info.
type info struct {
	APIVersion    string `json:"apiVersion"`
	Version       string `json:"version"`
	StateDir      string `json:"stateDir"`
	ChildPID      int    `json:"childPID"`
	NetworkDriver struct {
		Driver         string       `json:"driver"`
		DNS            []netip.Addr `json:"dns,omitempty"`
		ChildIP        netip.Addr   `json:"childIP,omitzero"`
		DynamicChildIP bool         `json:"dynamicChildIP,omitempty"`
	} `json:"networkDriver"`
	PortDriver struct {
		Driver                  string   `json:"driver"`
		Protos                  []string `json:"protos"`
		DisallowLoopbackChildIP bool     `json:"disallowLoopbackChildIP,omitempty"`
	} `json:"portDriver"`
}

func (h *handler) getInfo(w http.ResponseWriter, _ *http.Request) error {
	status := h.Forwarder.Status()
	i := info{APIVersion: rootlessKitAPI, Version: cmp.Or(h.Version, "unknown"), ChildPID: h.PID}
	i.NetworkDriver.Driver, i.NetworkDriver.DNS = "gofwd", status.DNS
	if len(status.Addrs) > 0 {
		i.NetworkDriver.ChildIP = status.Addrs[0].Addr()
	}
	i.PortDriver.Driver, i.PortDriver.Protos = "gofwd", []string{"tcp", "tcp4", "tcp6", "udp", "udp4", "udp6"}
	writeJSON(w, http.StatusOK, i)
	return nil
}

var errNoForwards = errors.New(`"forwards" is missing; to remove all, give an empty array`)
