# make demo      see it work, without root
# make test      all tests, as root or not
# make install   to PREFIX, with man page and completions

PREFIX ?= /usr/local
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null)

# For another machine: gofwd-GOARCH.
goarch := $(shell go env GOARCH)
binary := gofwd$(if $(filter-out $(shell go env GOHOSTARCH),$(goarch)),-$(goarch))

build: ## the static binary ./gofwd, or ./gofwd-GOARCH for another architecture
	CGO_ENABLED=0 go build -trimpath -ldflags '-s -w -X main.version=$(VERSION)' -o $(binary) ./cmd/gofwd
.PHONY: build

demo: build ## three hosts as namespaces: what the container sees of its clients
	./gofwd demo
.PHONY: demo

# For this machine, whichever GOARCH is.
gofwd-here := env -u GOARCH CGO_ENABLED=0 go run -trimpath ./cmd/gofwd

man: ## dist/gofwd.1
	mkdir -p dist
	$(gofwd-here) man > dist/gofwd.1
.PHONY: man

completion: ## dist/gofwd.bash, dist/_gofwd, dist/gofwd.fish
	mkdir -p dist
	$(gofwd-here) completion bash > dist/gofwd.bash
	$(gofwd-here) completion zsh > dist/_gofwd
	$(gofwd-here) completion fish > dist/gofwd.fish
.PHONY: completion

install: build man completion ## gofwd, its man page, completions, systemd units and OCI hook, under PREFIX
	install -Dm755 $(binary) $(DESTDIR)$(PREFIX)/bin/gofwd
	install -Dm644 dist/gofwd.1 $(DESTDIR)$(PREFIX)/share/man/man1/gofwd.1
	install -Dm644 dist/gofwd.bash $(DESTDIR)$(PREFIX)/share/bash-completion/completions/gofwd
	install -Dm644 dist/_gofwd $(DESTDIR)$(PREFIX)/share/zsh/site-functions/_gofwd
	install -Dm644 dist/gofwd.fish $(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d/gofwd.fish
	install -d $(addprefix $(DESTDIR)$(PREFIX)/,lib/systemd/user lib/systemd/system share/gofwd/hooks.d)
	$(at-prefix) contrib/systemd/gofwd@.service > $(DESTDIR)$(PREFIX)/lib/systemd/user/gofwd@.service
	$(at-prefix) contrib/systemd/gofwd@.socket > $(DESTDIR)$(PREFIX)/lib/systemd/user/gofwd@.socket
	$(at-prefix) contrib/systemd/system/gofwd@.service > $(DESTDIR)$(PREFIX)/lib/systemd/system/gofwd@.service
	$(at-prefix) contrib/systemd/gofwd@.socket > $(DESTDIR)$(PREFIX)/lib/systemd/system/gofwd@.socket
	$(at-prefix) contrib/hooks.d/gofwd.json > $(DESTDIR)$(PREFIX)/share/gofwd/hooks.d/gofwd.json
.PHONY: install

# The files of contrib/ name gofwd by where it may be.
at-prefix = sed -E 's,/usr(/local)?/bin/gofwd,$(PREFIX)/bin/gofwd,'

deb: ## dist/gofwd_VERSION_ARCH.deb, for GOARCH
	contrib/debian/build
.PHONY: deb

uninstall: ## what make install has put there
	rm -f $(DESTDIR)$(PREFIX)/bin/gofwd $(DESTDIR)$(PREFIX)/share/man/man1/gofwd.1 \
		$(DESTDIR)$(PREFIX)/share/bash-completion/completions/gofwd \
		$(DESTDIR)$(PREFIX)/share/zsh/site-functions/_gofwd \
		$(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d/gofwd.fish \
		$(addprefix $(DESTDIR)$(PREFIX)/lib/systemd/,user/gofwd@.service user/gofwd@.socket system/gofwd@.service system/gofwd@.socket) \
		$(DESTDIR)$(PREFIX)/share/gofwd/hooks.d/gofwd.json
.PHONY: uninstall

# Podman looks for its helpers in the directories that the file lists, in their
# order. Where Podman's own are differs between distributions; it has to list both.
PODMAN_HELPERS = $(PREFIX)/libexec/gofwd
PODMAN_CONF    = $(DESTDIR)/etc/containers/containers.conf.d/gofwd.conf

install-podman: ## make gofwd the helper of Podman, on top of make install
	install -d $(DESTDIR)$(PODMAN_HELPERS) $(dir $(PODMAN_CONF))
	for name in pasta pesto rootlessport; do ln -sfn $(PREFIX)/bin/gofwd $(DESTDIR)$(PODMAN_HELPERS)/$$name; done
	sed 's|/usr/libexec/gofwd|$(PODMAN_HELPERS)|' contrib/containers/gofwd.conf > $(PODMAN_CONF)
.PHONY: install-podman

uninstall-podman: ## leave Podman its own helpers again
	rm -f $(PODMAN_CONF) $(addprefix $(DESTDIR)$(PODMAN_HELPERS)/,pasta pesto rootlessport)
	-rmdir $(DESTDIR)$(PODMAN_HELPERS)
.PHONY: uninstall-podman

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

test-pasta: ## our pasta beside pasta itself, of PASTA, or the newest that Debian has
	[ -n "$(PASTA)" ] || bench/pasta.sh bin/pasta
	PASTA="$(or $(PASTA),$(CURDIR)/bin/pasta/bin/pasta)" go test -count=1 -run TestPasta ./integration
.PHONY: test-pasta

# Of the version whose packages gofwd is built with.
runsc: ## gVisor's runsc into bin/, where the tests that need it look: over a minute the first time
	GOBIN="$(CURDIR)/bin" CGO_ENABLED=0 go install gvisor.dev/gvisor/runsc@$$(go list -m -f '{{.Version}}' gvisor.dev/gvisor)
.PHONY: runsc

test-podman: ## under real rootless Podman 5.4, as root; see integration/podman/doc.go
	go test -tags podman -count=1 -v -short ./integration/podman
.PHONY: test-podman

test-podman-all: ## under Podman 5.4, 5.8 and 6.1, and all of it with Podman's own helpers too
	PODMAN_SUITES="trixie sid experimental" go test -tags podman -count=1 -v -timeout 30m ./integration/podman $(PODMAN_FLAGS)
.PHONY: test-podman-all

test-podman-readme: PODMAN_FLAGS = -readme
test-podman-readme: test-podman-all ## the same, with the tables of README.md
.PHONY: test-podman-readme

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
# root. Peers that are missing are left out, except by bench-readme.
bench-run = PATH="$(CURDIR)/bin/pasta/bin:$(CURDIR)/bin:$$PATH" go run ./bench

bench: ## gofwd beside its peers, everything: takes an hour
	$(bench-run) -out dist/bench
.PHONY: bench

bench-quick: ## a first impression, in under two minutes
	$(bench-run) -quick
.PHONY: bench-quick

bench-readme: ## everything, with every peer, into bench/results and the README
	$(bench-run) -all -out auto -readme README.md
.PHONY: bench-readme

bench-peers: ## the peers that Debian does not have, or not the newest of, into bin/
	bench/pasta.sh bin/pasta
	GOBIN=$(CURDIR)/bin go install github.com/rootless-containers/rootlesskit/v3/cmd/rootlesskit@v3.3.0
	GOBIN=$(CURDIR)/bin go install github.com/rootless-containers/rootlesskit/v3/cmd/rootlessctl@v3.3.0
.PHONY: bench-peers

help: ## this list
	@sed -n 's/^\([a-z-]*\):[^#]*## /  \1\t/p' $(MAKEFILE_LIST) | expand -t 18
.PHONY: help
