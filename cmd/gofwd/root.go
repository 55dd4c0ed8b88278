package main

import (
	"fmt"
	"os"
	"strings"

	"github.com/spf13/cobra"
)

// execute runs our own command line, and returns the exit code.
func execute(argv []string) int {
	root := newRootCommand()
	root.SetArgs(argv[1:])
	return report(os.Stderr, root.Execute())
}

func newRootCommand() *cobra.Command {
	root := &cobra.Command{
		Use:   "gofwd",
		Short: "give a container a network and publish its ports, without root",
		Long: `gofwd gives a network namespace a network and publishes its ports, as an
ordinary user. Servers in it see the addresses of their clients.`,
		// Errors are printed in one place, report, and in one line.
		SilenceErrors:              true,
		SilenceUsage:               true,
		SuggestionsMinimumDistance: 2,
		CompletionOptions:          cobra.CompletionOptions{DisableDefaultCmd: true},
		Args:                       noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return usagef(cmd, "no command given")
		},
	}
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return usagef(cmd, "%w", err)
	})
	root.SetUsageFunc(printUsage)
	root.AddCommand(
		newRunCommand(),
		newAttachCommand(),
		newNetNSCommand(),
		newHookCommand(),
		newDemoCommand(),
		newDoctorCommand(),
		newStatusCommand(),
		newPsCommand(),
		newPortsCommand(),
		newCaptureCommand(),
		newReloadCommand(),
		newVersionCommand(),
		newCompletionCommand(),
		newManCommand(),
	)
	return root
}

// noArgs refuses arguments; on the root they are verbs that don't exist.
func noArgs(cmd *cobra.Command, args []string) error {
	switch {
	case len(args) == 0:
		return nil
	case cmd.HasParent():
		return usagef(cmd, "unexpected argument %q", args[0])
	}
	err := fmt.Sprintf("unknown command %q", args[0])
	if near := cmd.SuggestionsFor(args[0]); len(near) > 0 {
		err += ", did you mean " + strings.Join(near, " or ")
	}
	return usagef(cmd, "%s", err)
}

func newCompletionCommand() *cobra.Command {
	shells := []string{"bash", "zsh", "fish"}
	return &cobra.Command{
		Use:   "completion bash|zsh|fish",
		Short: "print a shell's completion script",
		Example: `  gofwd completion bash > ~/.local/share/bash-completion/completions/gofwd
  gofwd completion zsh > "${fpath[1]}/_gofwd"
  gofwd completion fish > ~/.config/fish/completions/gofwd.fish`,
		ValidArgs: shells,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) != 1 {
				return usagef(cmd, "name one shell: %s", strings.Join(shells, ", "))
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			root, out := cmd.Root(), cmd.OutOrStdout()
			switch args[0] {
			case "bash":
				return root.GenBashCompletionV2(out, true)
			case "zsh":
				return root.GenZshCompletion(out)
			case "fish":
				return root.GenFishCompletion(out, true)
			}
			return usagef(cmd, "no completion for shell %q, only for %s", args[0], strings.Join(shells, ", "))
		},
	}
}
