package main

import (
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"
)

var blockMarker = regexp.MustCompile(`(?m)^<!-- bench:(begin ([a-z0-9-]+)|end) -->$`)

// fill replaces what is between the markers of a Markdown file,
//
//	<!-- bench:begin NAME -->
//	<!-- bench:end -->
//
// by the blocks of those names. A name without a block, or markers that do not
// pair, are errors, and so is a file without any.
func fill(text string, blocks map[string]string) (string, error) {
	marks := blockMarker.FindAllStringSubmatchIndex(text, -1)
	if len(marks) == 0 {
		return "", fmt.Errorf("no marker <!-- bench:begin NAME -->")
	}
	if len(marks)%2 != 0 {
		return "", fmt.Errorf("markers do not pair: %d of them", len(marks))
	}
	var b strings.Builder
	done := 0
	for i := 0; i < len(marks); i += 2 {
		begin, end := marks[i], marks[i+1]
		if begin[4] < 0 || end[4] >= 0 {
			return "", fmt.Errorf("markers do not pair: %q, then %q", text[begin[0]:begin[1]], text[end[0]:end[1]])
		}
		name := text[begin[4]:begin[5]]
		block, ok := blocks[name]
		if !ok {
			return "", fmt.Errorf("no block %q; there are %s", name, strings.Join(slices.Sorted(maps.Keys(blocks)), ", "))
		}
		b.WriteString(text[done:begin[1]])
		b.WriteString("\n" + strings.TrimSpace(block) + "\n")
		done = end[0]
	}
	b.WriteString(text[done:])
	return b.String(), nil
}
