//! What is sealed: the wire itself, and what somebody without the key can do to it.

use std::net::TcpListener;
use std::thread;

use crate::peer::{CONTROL, Peer};
use crate::support::{Protection, connect};

/// Two peers made by hand, the one that dialled first, and a tunnel of theirs.
#[test]
fn peers_made_by_hand_understand_each_other() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let key = Protection::Sealed.key().unwrap();
    let dialling = thread::spawn(move || {
        let mut control = Peer::sealed(connect(address), &key, true, CONTROL).unwrap();
        let mut tunnel = control.dial_tunnel_to(address);
        control.write("hello\n");
        assert_eq!(control.line(), "hi\n");
        tunnel.write([b'x'; 100_000]);
        tunnel.end();
        assert_eq!(tunnel.read(4), b"back");
        tunnel.assert_ended();
    });
    let mut control = Peer::accept_control(&listener, Protection::Sealed);
    let mut tunnel = Peer::accept_tunnel(&listener, &control);
    assert_eq!(control.line(), "hello\n");
    control.write("hi\n");
    assert_eq!(tunnel.read(100_000), [b'x'; 100_000]);
    tunnel.assert_ended();
    tunnel.write("back");
    tunnel.end();
    dialling.join().unwrap();
    assert_eq!(control.line(), "");
}
