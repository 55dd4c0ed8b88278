package main

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/signal"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

func newCaptureCommand() *cobra.Command {
	var name string
	var id int
	cmd := &cobra.Command{
		Use:   "capture [--forward ID] [--name NAME] FILE|-",
		Short: "capture the packets of a container, or of one forward",
		Long: `Write the packets that the container sees to FILE in pcap format, until ^C; with
--forward those that have the protocol and the port in the container of that
forward, whoever they are of. They are seen on both paths: on the tap, and on the
container's loopback, where those of the kernel path are. Packets that the reader
is too slow for are missing.`,
		Example: `  gofwd capture --forward 1 web.pcap
  gofwd capture - | tcpdump -nr -`,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) != 1 {
				return usagef(cmd, "give one FILE, or - for standard output")
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			path := "/v1/capture"
			if cmd.Flags().Changed("forward") {
				if id < 1 {
					return usagef(cmd, "--forward %d: not an id", id)
				}
				path += fmt.Sprintf("?forward=%d", id)
			}
			return capture(cmd, name, path, args[0])
		},
	}
	nameFlag(cmd, &name)
	cmd.Flags().IntVar(&id, "forward", 0, "`ID`: of one forward only, see gofwd ports list")
	_ = cmd.RegisterFlagCompletionFunc("forward", (&portsOptions{}).completeIDs)
	return cmd
}

func capture(cmd *cobra.Command, name, path, file string) (err error) {
	ctx, stop := signal.NotifyContext(cmd.Context(), unix.SIGINT, unix.SIGTERM)
	defer stop()
	c, err := openClient(name)
	if err != nil {
		return err
	}
	frames, err := c.open(ctx, http.MethodGet, path, nil)
	if err != nil {
		return err
	}
	defer frames.Close()
	w := cmd.OutOrStdout()
	if file != "-" {
		f, err := openCapture(file)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, f.Close()) }()
		w = f
	} else if isTerminal(w) {
		return errors.New("standard output is a terminal; give a FILE, or pipe it into tcpdump -nr -")
	}
	fmt.Fprintln(os.Stderr, "gofwd: capturing, end with ^C")
	if _, err := io.Copy(w, frames); err != nil && ctx.Err() == nil {
		return fmt.Errorf("capture: %w", err)
	}
	return nil
}
