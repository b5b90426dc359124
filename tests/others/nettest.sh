# Needs: go /usr/share/gocode/src/golang.org/x/net/nettest

# The case listens as the local service, and visits itself.
conn() {
    export GO111MODULE=off GOPATH=/usr/share/gocode GOCACHE=$CACHE/go CGO_ENABLED=0 GOTELEMETRY=off
    go test -v -count="$(size 1 10)" "$SCRIPTS/nettest_test.go"
}
