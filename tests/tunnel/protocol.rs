//! The protocol's exact bytes, spoken by hand with either program.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::thread;
use std::time::{Duration, Instant};

use crate::support::peer::{HandMadeServer, LINE, Peer};
use crate::support::{
    DEADLINE, Protection, Record, RunningClient, RunningServer, Service, closed_port,
    plain_and_sealed, server_options, with,
};

plain_and_sealed! {
    the_visitors_first_bytes_may_stand_behind_the_line_however_it_is_cut,
    a_line_of_single_bytes_is_understood,
    a_client_keeps_its_pool_full_and_dials_one_more_on_new,
    a_refused_local_service_aborts_the_tunnel_and_the_next_is_dialled,
    bad_lines_end_the_link_with_either_side,
    the_server_grants_at_most_sixty_four_idle_tunnels,
    a_dead_idle_tunnel_is_passed_over_and_superfluous_ones_are_closed,
    a_control_link_that_starts_with_anything_but_hello_is_closed,
    a_stopping_server_says_bye,
    a_stopping_client_says_bye,
    a_stopping_client_serves_the_visitor_that_it_was_just_given,
    a_server_that_says_bye_may_have_given_a_visitor_before,
    visitors_beyond_max_conns_wait_their_turn,
}

fn the_visitors_first_bytes_may_stand_behind_the_line_however_it_is_cut(protection: Protection) {
    let (service, records) = Service::recording();
    let server = HandMadeServer::start(protection, service.addr, 1);
    let line = b"new visitor=192.0.2.1:50000\n";
    let first = b"GET /first\nnew visitor=192.0.2.2:2\n\0\xff";
    let bytes = [&line[..], first].concat();
    for cut in 0.. {
        let mut tunnel = server.tunnel();
        let wire = tunnel.wire(&bytes);
        if cut > wire.len() {
            break;
        }
        tunnel.socket.write_all(&wire[..cut]).unwrap();
        if cut > 0 && cut < wire.len() {
            // The pause makes two reads of the two pieces.
            thread::sleep(Duration::from_millis(3));
        }
        tunnel.socket.write_all(&wire[cut..]).unwrap();
        tunnel.end();
        let record = records.recv_timeout(DEADLINE).unwrap();
        assert_eq!(record, Record::whole(first), "cut at {cut}");
    }
}

fn a_line_of_single_bytes_is_understood(protection: Protection) {
    let (service, records) = Service::recording();
    let server = HandMadeServer::start(protection, service.addr, 1);
    let mut tunnel = server.tunnel();
    let mut wire = tunnel.frame(LINE, b"some=thing\n");
    wire.extend(tunnel.wire("new later=1 visitor=[2001:db8::1]:9\nabc"));
    for byte in wire {
        tunnel.socket.write_all(&[byte]).unwrap();
        thread::sleep(Duration::from_millis(1));
    }
    tunnel.end();
    assert_eq!(
        records.recv_timeout(DEADLINE).unwrap(),
        Record::whole(b"abc")
    );
}

fn a_client_keeps_its_pool_full_and_dials_one_more_on_new(protection: Protection) {
    let (service, records) = Service::recording();
    let mut server = HandMadeServer::start(protection, service.addr, 2);
    let (mut one, _two) = (server.tunnel(), server.tunnel());
    server.control.write("new\nwhat=ever\nnew\n");
    let _beyond = (server.tunnel(), server.tunnel());
    // Four tunnels are idle, two more than the pool: the client dials none for one that is taken.
    one.write("new visitor=192.0.2.1:1\nx");
    one.end();
    assert_eq!(records.recv_timeout(DEADLINE).unwrap(), Record::whole(b"x"));
    server.tunnels.set_nonblocking(true).unwrap();
    thread::sleep(Duration::from_millis(300));
    assert!(server.tunnels.accept().is_err(), "one tunnel too many");
}

fn a_refused_local_service_aborts_the_tunnel_and_the_next_is_dialled(protection: Protection) {
    let refusing = closed_port();
    let server = HandMadeServer::start(protection, refusing.addr, 1);
    for _ in 0..10 {
        let mut tunnel = server.tunnel();
        tunnel.write("new visitor=192.0.2.1:1\n");
        tunnel.assert_aborted(Duration::from_secs(4));
    }
}

fn bad_lines_end_the_link_with_either_side(protection: Protection) {
    let long = "x".repeat(256);
    for bad in ["\0\n", "h\u{e9}\n", &long, "hello proto=x\n"] {
        let (service, _records) = Service::recording();
        let mut server = HandMadeServer::start(protection, service.addr, 0);
        server.control.write(bad);
        server.control.read_until_closed();

        let server = RunningServer::start(server_options(protection));
        let mut client = Peer::dial_control(&server);
        client.say_hello(0);
        client.write(bad);
        client.read_until_closed();
        let mut next = Peer::dial_control(&server);
        assert_eq!(next.say_hello(0).len(), 32, "the place is free again");
    }
}

fn the_server_grants_at_most_sixty_four_idle_tunnels(protection: Protection) {
    let server = RunningServer::start(server_options(protection));
    let mut client = Peer::dial_control(&server);
    client.write("hello colour=blue proto=2 pool=1000\n");
    let line = client.line();
    assert!(
        line.starts_with("hello proto=2 pool=64 linger=600000 session="),
        "{line}"
    );
    // The rest tells where the server's ports are, and where it sees the client.
    let [public, tunnel] = [server.public, server.tunnel].map(|address| address.port());
    let client = client.socket.local_addr().unwrap();
    let rest = format!(" tunnel={tunnel} public={public} client={client}\n");
    assert!(line.ends_with(&rest), "{line}");
}

fn a_dead_idle_tunnel_is_passed_over_and_superfluous_ones_are_closed(protection: Protection) {
    let server = RunningServer::start(server_options(protection));
    let mut client = Peer::dial_control(&server);
    let session = client.say_hello(2);
    let tunnel = |client: &Peer| {
        let mut tunnel = Peer::dial_tunnel(&server, client);
        tunnel.write(format!("tunnel session={session}\n"));
        tunnel
    };
    // The server grants two idle tunnels. Of three that nobody needs, one is closed after 10 s.
    let start = Instant::now();
    let mut three = [tunnel(&client), tunnel(&client), tunnel(&client)];
    let closed = thread::scope(|scope| {
        let waiting = scope.spawn(|| wait_for_a_closed_one(&mut three));
        while !waiting.is_finished() {
            client.write("hi\n");
            thread::sleep(Duration::from_millis(500));
        }
        waiting.join().unwrap()
    });
    let bounds = Duration::from_millis(9500)..Duration::from_secs(15);
    assert!(bounds.contains(&start.elapsed()), "{:?}", start.elapsed());
    let [mut lives, dead]: [Peer; 2] = three
        .into_iter()
        .enumerate()
        .filter(|(number, _)| *number != closed)
        .map(|(_, tunnel)| tunnel)
        .collect::<Vec<_>>()
        .try_into()
        .unwrap_or_else(|_| panic!("two are left"));
    // To drop it might close nothing yet: a program that another test starts has all sockets of this
    // process for a moment.
    dead.socket.shutdown(Shutdown::Both).unwrap();
    let visitor = server.visit();
    lives.assert_given(&visitor, "");
    // No tunnel is left now: the server asks for one for the next visitor.
    let _next = server.visit();
    assert_eq!(client.line_after_hi(), "new\n");
}

fn wait_for_a_closed_one(tunnels: &mut [Peer]) -> usize {
    for tunnel in tunnels.iter() {
        tunnel.socket.set_nonblocking(true).unwrap();
    }
    let mut closed = None;
    crate::support::eventually("a superfluous tunnel is closed", || {
        closed = tunnels
            .iter_mut()
            .position(|tunnel| matches!(tunnel.socket.peek(&mut [0]), Ok(0)));
        closed.is_some()
    });
    for tunnel in tunnels.iter() {
        tunnel.socket.set_nonblocking(false).unwrap();
    }
    closed.unwrap()
}

fn a_control_link_that_starts_with_anything_but_hello_is_closed(protection: Protection) {
    let server = RunningServer::start(server_options(protection));
    for first in [
        "GET / HTTP/1.0\r\n\r\n",
        "hi\n",
        "tunnel session=1\n",
        "hello\n",
    ] {
        let mut stranger = Peer::dial_control(&server);
        stranger.write(first);
        assert_eq!(stranger.read_until_closed(), b"", "{first:?}");
    }
    // A hello that is not whole at the deadline is none.
    let start = Instant::now();
    let mut slow = Peer::dial_control(&server);
    let hello = slow.wire("hello proto=2 pool=0\n");
    slow.socket.write_all(&hello[..hello.len() / 2]).unwrap();
    assert_eq!(slow.line(), "");
    let deadline = Duration::from_secs(5);
    let bounds = deadline * 9 / 10..deadline + Duration::from_millis(3000);
    assert!(bounds.contains(&start.elapsed()), "{:?}", start.elapsed());
}

fn a_stopping_server_says_bye(protection: Protection) {
    let server = RunningServer::start(server_options(protection));
    let mut client = Peer::dial_control(&server);
    client.say_hello(0);
    server.handle().stop(Duration::ZERO);
    assert_eq!(client.line_after_hi(), "bye reason=draining\n");
    assert_eq!(client.line(), "");
}

fn a_stopping_client_says_bye(protection: Protection) {
    let (service, _records) = Service::recording();
    let mut server = HandMadeServer::start(protection, service.addr, 1);
    let _tunnel = server.tunnel();
    server.client.handle().stop(Duration::ZERO);
    assert_eq!(server.control.line_after_hi(), "bye reason=draining\n");
    assert_eq!(server.control.line(), "");
}

/// The client's bye and the server's visitor cross on the way.
fn a_stopping_client_serves_the_visitor_that_it_was_just_given(protection: Protection) {
    let (service, records) = Service::recording();
    let mut server = HandMadeServer::start(protection, service.addr, 1);
    let mut tunnel = server.tunnel();
    server.client.handle().stop(DEADLINE);
    tunnel.write("new visitor=192.0.2.1:50000\nfirst");
    tunnel.end();
    let record = records.recv_timeout(DEADLINE).unwrap();
    assert_eq!(record, Record::whole(b"first"));
    tunnel.assert_ended();
    server.client.wait_for_end();
}

/// What the server said to the tunnel comes later than the bye that it said on the control link
/// after that, as when a packet was lost; and the client has found the next server by then.
fn a_server_that_says_bye_may_have_given_a_visitor_before(protection: Protection) {
    let (service, records) = Service::recording();
    let mut server = HandMadeServer::start(protection, service.addr, 1);
    let mut tunnel = server.tunnel();
    server.control.write("bye reason=draining\n");
    server.control.end();
    let _next = Peer::accept_control(&server.controls, protection);
    thread::sleep(Duration::from_secs(1));
    tunnel.write("new visitor=192.0.2.1:50000\nfirst");
    tunnel.end();
    let record = records.recv_timeout(DEADLINE).unwrap();
    assert_eq!(record, Record::whole(b"first"));
    tunnel.assert_ended();
}

fn visitors_beyond_max_conns_wait_their_turn(protection: Protection) {
    let service = Service::echo();
    let server = RunningServer::start(with!(server_options(protection);
            max_conns: 2,
    ));
    let options = crate::support::client_options(&server, service.addr);
    let _client = RunningClient::start(options);
    let (one, two) = (server.visit(), server.visit());
    crate::support::assert_echo(&one, "one");
    crate::support::assert_echo(&two, "two");
    let three = server.visit();
    (&three).write_all(b"three").unwrap();
    three
        .set_read_timeout(Some(Duration::from_millis(500)))
        .unwrap();
    assert!(
        (&three).read(&mut [0; 5]).is_err(),
        "served beyond the limit"
    );
    drop(one);
    three.set_read_timeout(Some(DEADLINE)).unwrap();
    let mut answer = [0; 5];
    (&three).read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"three");
}
