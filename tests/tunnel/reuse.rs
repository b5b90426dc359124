//! One visitor after another in one tunnel.

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::sync::mpsc;
use std::time::Duration;

use crate::support::peer::{HandMadeServer, Peer};
use crate::support::{
    DEADLINE, Protection, Record, RunningServer, Service, Tunnel, assert_echo, assert_ended,
    plain_and_sealed, server_options,
};

plain_and_sealed! {
    one_tunnel_serves_one_visitor_after_another,
    a_tunnel_is_given_away_when_its_client_is_idle,
    a_client_is_idle_when_all_has_been_passed_on,
    a_visitor_after_one_whom_the_service_has_left_is_served,
}

/// Both ends of a tunnel that is used again are the same all the time, whoever ends first.
fn one_tunnel_serves_one_visitor_after_another(protection: Protection) {
    const VISITORS: usize = 20;
    let server = RunningServer::start(server_options(protection));
    let mut client = Peer::dial_control(&server);
    let session = client.say_hello(1);
    let mut tunnel = Peer::dial_tunnel(&server, &client);
    tunnel.write(format!("tunnel session={session}\n"));
    for number in 0..VISITORS {
        let mut visitor = server.visit();
        tunnel.assert_given(&visitor, "");
        let (up, down) = (format!("up {number}"), format!("down {number}"));
        visitor.write_all(up.as_bytes()).unwrap();
        tunnel.write_data(&down);
        let visitor_first = number % 2 == 0;
        if visitor_first {
            visitor.shutdown(Shutdown::Write).unwrap();
        } else {
            tunnel.end();
        }
        assert_eq!(tunnel.read(up.len()), up.as_bytes());
        let mut got = vec![0; down.len()];
        visitor.read_exact(&mut got).unwrap();
        assert_eq!(got, down.as_bytes());
        if visitor_first {
            tunnel.assert_ended();
            tunnel.end();
            assert_ended(&visitor);
        } else {
            assert_ended(&visitor);
            visitor.shutdown(Shutdown::Write).unwrap();
            tunnel.assert_ended();
        }
        tunnel.write("idle\n");
    }
}

/// Both streams have ended, and the client may still have something of the visitor.
fn a_tunnel_is_given_away_when_its_client_is_idle(protection: Protection) {
    let server = RunningServer::start(server_options(protection));
    let mut client = Peer::dial_control(&server);
    let session = client.say_hello(0);
    let first = server.visit();
    assert_eq!(client.line_after_hi(), "new\n");
    let mut tunnel = Peer::dial_tunnel(&server, &client);
    tunnel.write(format!("tunnel session={session}\n"));
    tunnel.assert_given(&first, "");
    tunnel.end();
    assert_ended(&first);
    first.shutdown(Shutdown::Write).unwrap();
    tunnel.assert_ended();
    // Nobody can have the tunnel yet: the server asks for another one.
    let next = server.visit();
    assert_eq!(client.line_after_hi(), "new\n");
    let moment = Some(Duration::from_millis(300));
    tunnel.socket.set_read_timeout(moment).unwrap();
    let error = tunnel.socket.peek(&mut [0]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::WouldBlock);
    tunnel.socket.set_read_timeout(Some(DEADLINE)).unwrap();
    tunnel.write("idle\n");
    tunnel.assert_given(&next, "");
}

/// The service ends first, and takes what the visitor still sends.
fn a_client_is_idle_when_all_has_been_passed_on(protection: Protection) {
    let (sender, records) = mpsc::channel();
    let service = Service::start(move |socket| {
        socket.shutdown(Shutdown::Write).unwrap();
        sender.send(Record::of(&socket)).unwrap();
    });
    let server = HandMadeServer::start(protection, service.addr, 1);
    let mut tunnel = server.tunnel();
    for number in 0..10 {
        tunnel.write(format!("new visitor=192.0.2.1:{number}\n"));
        tunnel.assert_ended();
        let moment = Some(Duration::from_millis(50));
        tunnel.socket.set_read_timeout(moment).unwrap();
        let error = tunnel.socket.peek(&mut [0]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::WouldBlock, "visitor {number}");
        tunnel.socket.set_read_timeout(Some(DEADLINE)).unwrap();
        tunnel.write_data("late");
        tunnel.end();
        assert_eq!(tunnel.line(), "idle\n");
        assert_eq!(
            records.recv_timeout(DEADLINE).unwrap(),
            Record::whole(b"late")
        );
    }
}

/// The service answers the first of two visitors and leaves, and that one sends on. The tunnel is free
/// only when the client has got rid of what came.
fn a_visitor_after_one_whom_the_service_has_left_is_served(protection: Protection) {
    const ROUNDS: usize = 50;
    let service = Service::start(|mut socket| {
        let mut first = [0];
        while socket.read(&mut first).is_ok_and(|count| count > 0) && first != *b"!" {
            socket.write_all(&first).unwrap();
        }
        if first == *b"!" {
            socket.write_all(b"enough").unwrap();
        }
    });
    let tunnel = Tunnel::start(protection, service.addr, 1);
    for round in 0..ROUNDS {
        let mut left = tunnel.visit();
        left.write_all(b"!").unwrap();
        let mut answer = [0; 6];
        left.read_exact(&mut answer).unwrap();
        assert_ended(&left);
        // Nobody takes these: the service's kernel answers them with a reset.
        for _ in 0..4 {
            let _ = left.write_all(&[7; 32 * 1024]);
        }
        let _ = left.shutdown(Shutdown::Write);
        assert_echo(&tunnel.visit(), &format!("in round {round}"));
    }
}
