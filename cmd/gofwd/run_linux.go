package main

import (
	"context"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/gofwd/gofwd/netnsutil"
)

func newRunCommand() *cobra.Command {
	o := &options{}
	cmd := &cobra.Command{
		Use:   "run [OPTIONS] [-- COMMAND [ARG]...]",
		Short: "run a command in a network namespace of its own",
		Long: `Run COMMAND, or $SHELL, as root of a new user namespace and in a new network
namespace, which gofwd connects to the world and publishes ports of.

Its exit status is that of COMMAND, signals are passed on (not SIGHUP with --config,
which reloads that), and everything ends with it. /etc/resolv.conf is replaced for COMMAND alone.`,
		Example: `  gofwd run -p 8080:80 -- python3 -m http.server 80
  gofwd run -p 127.0.0.1:5353:53/udp -p %eth0:8443:443 -- ./server
  gofwd run`,
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := o.loadConfig(cmd.Flags()); err != nil {
				return usagef(cmd, "%w", err)
			}
			if err := o.complete(); err != nil {
				return usagef(cmd, "%w", err)
			}
			return o.run(cmd.Context(), args)
		},
	}
	own := pflag.NewFlagSet("", pflag.ContinueOnError)
	own.BoolVar(&o.mapAuto, "map-auto", false, "map your subordinate ids too, from 1 on (newuidmap(1), subuid(5))")
	o.addTo(cmd, own)
	return cmd
}

func (o *options) run(ctx context.Context, args []string) error {
	if o.inner {
		i, err := newInner(o)
		if err != nil {
			return err
		}
		if i.ns, err = netnsutil.New(); err != nil {
			return err
		}
		defer i.ns.Close()
		return i.run(ctx, args)
	}
	if o.detach && o.detachedFD < 0 {
		return o.goBackground(os.Args)
	}
	hint := "shell"
	if len(args) > 0 {
		hint = filepath.Base(args[0])
	}
	u, err := openOuter(o, os.Args, hint)
	if err != nil {
		return err
	}
	defer u.close()
	in, err := u.spawn(netnsutil.SpawnConfig{MapAuto: o.mapAuto}, nil)
	if err != nil {
		return err
	}
	defer killOrphans()
	if err := adoptOrphans(in.pid); err != nil {
		return err
	}
	return u.supervise(in, nil)
}
