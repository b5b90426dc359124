// Go's own test of what a net.Conn must do, with pipes through a tunnel.
package others

import (
	"net"
	"os"
	"sync"
	"testing"

	"golang.org/x/net/nettest"
)

func TestConn(t *testing.T) {
	service, err := net.Listen("tcp", os.Getenv("LOCAL"))
	if err != nil {
		t.Fatal(err)
	}
	defer service.Close()
	var one sync.Mutex
	nettest.TestConn(t, func() (visitor, local net.Conn, stop func(), err error) {
		// Two at a time could get each other's other end.
		one.Lock()
		defer one.Unlock()
		if visitor, err = net.Dial("tcp", os.Getenv("AT")); err != nil {
			return
		}
		if local, err = service.Accept(); err != nil {
			return
		}
		stop = func() {
			visitor.Close()
			local.Close()
		}
		return
	})
}
