package main

import (
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// sectionAnnotation is the flag annotation that names the section of --help and
// of the man page in which the flag is shown.
const sectionAnnotation = "gofwd_section"

// ownSection is the section of flags that only one command has.
const ownSection = "Options"

// usageWidth is the column at which --help breaks lines.
const usageWidth = 80

// flagSections returns the flags that cmd shows, by section, in the order in
// which they were added.
func flagSections(cmd *cobra.Command) []flagSection {
	var sections []flagSection
	cmd.NonInheritedFlags().VisitAll(func(f *pflag.Flag) {
		if f.Hidden || f.Name == "help" {
			return
		}
		title := ownSection
		if s := f.Annotations[sectionAnnotation]; len(s) > 0 {
			title = s[0]
		}
		i := slices.IndexFunc(sections, func(s flagSection) bool { return s.title == title })
		if i < 0 {
			i = len(sections)
			set := pflag.NewFlagSet("", pflag.ContinueOnError)
			set.SortFlags = false
			sections = append(sections, flagSection{title, set})
		}
		sections[i].AddFlag(f)
	})
	return sections
}

// printUsage is what --help shows below a command's description.
func printUsage(cmd *cobra.Command) error {
	w := cmd.OutOrStderr()
	fmt.Fprintf(w, "Usage:\n  %s\n", usageLine(cmd))
	if cmd.HasExample() {
		fmt.Fprintf(w, "\nExamples:\n%s\n", cmd.Example)
	}
	if cmd.HasAvailableSubCommands() {
		fmt.Fprintln(w, "\nCommands:")
		printCommands(w, cmd)
		fmt.Fprintf(w, "\nMore about one of them: %s COMMAND --help\n", cmd.CommandPath())
	}
	for _, s := range flagSections(cmd) {
		fmt.Fprintf(w, "\n%s:\n", s.title)
		s.VisitAll(func(f *pflag.Flag) {
			head, text := describeFlag(f)
			fmt.Fprintf(w, "  %s\n%s", head, wrap(text, "        ", usageWidth))
		})
	}
	return nil
}

// describeFlag returns "-m, --mtu BYTES" and what it is for. The usage text of a
// flag with a value begins with the value's name: "`BYTES`: text".
func describeFlag(f *pflag.Flag) (head, text string) {
	value, text := pflag.UnquoteUsage(f)
	head = "--" + f.Name
	if f.Shorthand != "" {
		head = "-" + f.Shorthand + ", " + head
	}
	if f.NoOptDefVal == "" {
		head += " " + value
		text = strings.TrimPrefix(text, value+": ")
	}
	switch f.DefValue {
	case "", "false", "[]", "-1", "0":
	default:
		text += " (default " + f.DefValue + ")"
	}
	return head, text
}

// wrap breaks text into lines of up to width columns, each after indent.
func wrap(text, indent string, width int) string {
	var b strings.Builder
	column := 0
	for word := range strings.FieldsSeq(text) {
		switch {
		case column == 0:
			b.WriteString(indent)
			column = len(indent)
		case column+1+len(word) > width:
			b.WriteString("\n" + indent)
			column = len(indent)
		default:
			b.WriteByte(' ')
			column++
		}
		b.WriteString(word)
		column += len(word)
	}
	return b.String() + "\n"
}

func printCommands(w io.Writer, cmd *cobra.Command) {
	for _, sub := range cmd.Commands() {
		if sub.IsAvailableCommand() {
			fmt.Fprintf(w, "  %-*s %s\n", cmd.NamePadding(), sub.Name(), sub.Short)
		}
	}
}

// usageLine is a command's synopsis; its Use says everything.
func usageLine(cmd *cobra.Command) string {
	if !cmd.HasParent() {
		return cmd.Name() + " COMMAND [OPTIONS]"
	}
	return strings.TrimSpace(cmd.Parent().CommandPath() + " " + cmd.Use)
}
