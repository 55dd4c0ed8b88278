package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/gofwd/gofwd/forward"
	"github.com/gofwd/gofwd/netnsutil"
)

func newDoctorCommand() *cobra.Command {
	var inner, asJSON bool
	cmd := &cobra.Command{
		Use:   "doctor",
		Short: "show what this machine lets gofwd do, and what to do about the rest",
		Long: `Try everything that gofwd needs of the kernel, in namespaces made for the purpose,
and print what works; for what does not: why, what it costs, and what to do.

The exit status is 1 if something is missing.`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if !inner {
				return spawnDemo(os.Args)
			}
			ns, err := netnsutil.New()
			if err != nil {
				return err
			}
			defer ns.Close()
			return printAbilities(cmd.OutOrStdout(), forward.Probe(cmd.Context(), ns), asJSON)
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	cmd.Flags().BoolVar(&inner, "inner", false, "")
	_ = cmd.Flags().MarkHidden("inner")
	return cmd
}

// printAbilities prints a table. The error says that something is missing.
func printAbilities(w io.Writer, abilities []forward.Ability, asJSON bool) error {
	missing := 0
	for _, a := range abilities {
		if !a.OK {
			missing++
		}
	}
	if asJSON {
		enc := json.NewEncoder(w)
		enc.SetIndent("", "  ")
		if err := enc.Encode(abilities); err != nil {
			return err
		}
	} else {
		tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
		fmt.Fprintln(tw, "ABILITY\tFOR\tHERE\tREASON")
		for _, a := range abilities {
			here := "yes"
			if !a.OK {
				here = "no"
			}
			fmt.Fprintf(tw, "%s\t%s\t%s\t%s\n", a.Name, a.For, here, a.Reason)
		}
		if err := tw.Flush(); err != nil {
			return err
		}
		for _, a := range abilities {
			if !a.OK {
				fmt.Fprintf(w, "\nwithout %s: %s\n", a.Name, a.Cost)
				if a.Remedy != "" {
					fmt.Fprintf(w, "  %s\n", a.Remedy)
				}
			}
		}
	}
	if missing > 0 {
		return fmt.Errorf("%d of %d abilities are missing", missing, len(abilities))
	}
	return nil
}
