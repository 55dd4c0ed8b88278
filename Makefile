build:
	CGO_ENABLED=0 go build -trimpath -o gofwd ./cmd/gofwd
.PHONY: build

# Tools, at fixed versions: built on first use, kept in Go's caches.
golangci-lint := go run github.com/golangci/golangci-lint/v2/cmd/golangci-lint@v2.15.0
gotestsum     := go run gotest.tools/gotestsum@v1.13.0
govulncheck   := go run golang.org/x/vuln/cmd/govulncheck@v1.9.0

# The race detector needs a C compiler; the product never does.
race := $(if $(shell command -v $(shell go env CC) 2>/dev/null),-race)
# What to test, and how.
PKGS      ?= ./...
TESTFLAGS ?=

test: ## all tests, as root or not; ends with a list of those that were skipped, and why
	$(if $(race),,@echo "no C compiler: testing without the race detector")
	$(gotestsum) --format pkgname-and-test-fails -- -count=1 -shuffle=on $(race) $(TESTFLAGS) $(PKGS)
.PHONY: test

lint: ## golangci-lint, gofumpt, and a tidy go.mod
	go mod tidy -diff
	$(golangci-lint) run ./...
.PHONY: lint

fmt: ## gofumpt and goimports
	$(golangci-lint) fmt ./...
.PHONY: fmt

FUZZTIME ?= 20s

fuzz: ## each fuzz test for FUZZTIME
	@set -e; for pkg in $$(go list ./...); do \
		for f in $$(go test -list '^Fuzz' $$pkg | grep '^Fuzz'); do \
			echo "$$f in $$pkg"; \
			go test -run '^$$' -fuzz "^$$f\$$" -fuzztime $(FUZZTIME) $$pkg; \
		done; \
	done
.PHONY: fuzz

vuln: ## known vulnerabilities in what gofwd uses; asks a database on the Internet
	$(govulncheck) ./...
.PHONY: vuln

# Results, and what the README shows of them. An ordinary user is as good as
# root; see bench/doc.go for the peers that it measures beside gofwd.
bench: ## gofwd beside its peers, everything: takes an hour
	go run ./bench -out dist/bench
.PHONY: bench

bench-quick: ## a first impression, in under two minutes
	go run ./bench -quick
.PHONY: bench-quick

bench-readme: ## everything, with every peer, into bench/results and the README
	go run ./bench -all -out auto -readme README.md
.PHONY: bench-readme
