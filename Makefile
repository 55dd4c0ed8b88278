build:
	CGO_ENABLED=0 go build -trimpath -o gofwd ./cmd/gofwd
.PHONY: build
