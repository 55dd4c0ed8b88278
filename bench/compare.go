package main

import "fmt"

// compareResults shows how gofwd's rows have changed between two results, and
// counts the regressions: rows that have become worse, and whose spreads do not
// touch. Only rows of at least three rounds are judged.
func compareResults(before, after *Result) (*table, int, error) {
	a, b := before.Machine, after.Machine
	if a.Cores != b.Cores || a.CPU != b.CPU {
		return nil, 0, fmt.Errorf("compare results: of different machines: %d × %s, %d × %s", a.Cores, a.CPU, b.Cores, b.CPU)
	}
	t := &table{head: []string{"", "tool", "unit", "before", "after", "change", ""}}
	if a.Kernel != b.Kernel {
		t.notes = append(t.notes, fmt.Sprintf("The kernel is another: %s, then %s.", a.Kernel, b.Kernel))
	}
	regressions, common := 0, 0
	for _, row := range after.Rows {
		for _, tool := range after.Tools {
			if !isSubject(tool.Name) {
				continue
			}
			for _, unit := range row.Units {
				was, ok1 := before.summary(row.Name, tool.Name, unit)
				is, ok2 := after.summary(row.Name, tool.Name, unit)
				if !ok1 || !ok2 {
					continue
				}
				common++
				switch judge(was, is, lowerIsBetter(unit)) {
				case behind:
					regressions++
					t.add(row.Title, tool.Name, unit, was.String(), is.String(), change(was, is), "REGRESSION")
				case ahead:
					t.add(row.Title, tool.Name, unit, was.String(), is.String(), change(was, is), "better")
				}
			}
		}
	}
	if common == 0 {
		return nil, 0, fmt.Errorf("compare results: they have no row of gofwd in common")
	}
	t.notes = append(t.notes, fmt.Sprintf("%s in common, %s.", plural(common, "value"), plural(regressions, "regression")))
	return t, regressions, nil
}

// judge says whether a value has become better (ahead) or worse (behind) by
// more than the spreads.
func judge(was, is interval, lower bool) verdict {
	switch {
	case was.N < 3 || is.N < 3:
		return unknown
	case is.Lo <= was.Hi && was.Lo <= is.Hi:
		return same
	case (is.Mid > was.Mid) != lower:
		return ahead
	}
	return behind
}

func change(was, is interval) string {
	if was.Mid == 0 {
		return "–"
	}
	return fmt.Sprintf("%+.0f %%", 100*(is.Mid/was.Mid-1))
}
