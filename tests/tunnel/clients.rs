//! Several clients of one server (`--clients`): they share the visitors, and one that goes, dies or
//! cannot reach its local service leaves them to the others.
#![cfg(target_os = "linux")]

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::support::load::{assert_whole, assert_whole_after, sixteen_at_a_time};
use crate::support::peer::Peer;
use crate::support::programs::Program;
use crate::support::{
    DEADLINE, Protection, RunningClient, RunningServer, Service, assert_echo, assert_was_reset,
    client_options, closed_port, connect, eventually, plain_and_sealed, server_options, share_turn,
    try_connect, try_get,
};

plain_and_sealed! {
    visitors_go_to_the_client_that_has_the_fewest,
    one_client_more_than_there_may_be_is_told_so,
    a_client_is_replaced_under_load_without_losing_a_visit,
    a_client_that_is_killed_takes_only_its_own_visits,
    a_visitor_that_waits_for_a_dead_client_is_given_to_another_at_once,
    a_client_without_its_local_service_leaves_visitors_to_the_other,
    without_a_local_service_anywhere_visitors_are_reset,
    a_service_that_speaks_first_speaks_through_two_clients,
    a_client_that_does_not_answer_keeps_one_visitor_waiting_and_no_other,
    a_client_that_has_failed_is_tried_by_one_visitor_after_its_pause,
    a_server_that_stops_waits_for_an_answer,
    a_visitor_who_is_given_again_begins_another_visit,
}

/// A service that says this name to each visitor who has said something.
fn named(name: &'static str) -> Service {
    Service::start(move |mut socket| {
        let mut buffer = [0; 64];
        while let Ok(1..) = socket.read(&mut buffer) {
            let _ = socket.write_all(name.as_bytes());
        }
    })
}

/// Which of the services, whose names have one letter, a visitor has come to.
fn who(mut visitor: &TcpStream) -> char {
    let mut name = [0];
    visitor.write_all(b"?").unwrap();
    visitor.read_exact(&mut name).unwrap();
    name[0].into()
}

fn client(
    protection: Protection,
    server: [SocketAddr; 3],
    local: SocketAddr,
    options: &[&str],
) -> Program {
    let client = Program::client(protection, server, local, options);
    client.wait_for_line("connected to");
    client
}

fn visitors_go_to_the_client_that_has_the_fewest(protection: Protection) {
    let (server, addresses) = Program::server(protection, &["-n", "2", "-v"]);
    let services = ["a", "b"].map(named);
    let _clients = services
        .each_ref()
        .map(|it| client(protection, addresses, it.addr, &[]));
    let visit = |count| -> Vec<_> { (0..count).map(|_| connect(addresses[0])).collect() };
    let count = |visitors: &[TcpStream], name| {
        let names = visitors.iter().map(who);
        names.filter(|it| *it == name).count()
    };
    // A crowd that comes at once, first as many as both pools have, and then beyond them. One who is
    // about to be joined may not be counted for a moment.
    server.wait_for_lines(" is idle", 16);
    let mut visitors = visit(16);
    let of_a = count(&visitors, 'a');
    assert!((6..=10).contains(&of_a), "{of_a} of 16 went to one client");
    // A tunnel of the quicker one may serve a visitor for whom the other was asked.
    visitors.extend(visit(24));
    let of_a = count(&visitors, 'a');
    assert!((10..=30).contains(&of_a), "{of_a} of 40 went to one client");
    visitors.retain(|visitor| who(visitor) == 'b');
    let before = visitors.len();
    eventually("the others have left", || {
        server.signal(Signal::USR1);
        let left = format!(" joined={before} ");
        !server.lines_with(&left).is_empty()
    });
    visitors.extend(visit(before - 2));
    let of_b = count(&visitors[before..], 'b');
    assert!(
        of_b <= before / 3,
        "{of_b} of {} went to the busy client",
        before - 2
    );
}

fn one_client_more_than_there_may_be_is_told_so(protection: Protection) {
    let (server, addresses) = Program::server(protection, &["-n", "2"]);
    let service = Service::echo();
    let mut clients = [(); 2].map(|()| client(protection, addresses, service.addr, &[]));
    let third = Program::client(protection, addresses, service.addr, &[]);
    third.wait_for_line("it has as many clients as it takes (--clients of tpserver)");
    server.wait_for_line("2 clients are connected");
    // It comes again and again, and one day there is room.
    clients[0].kill();
    third.wait_for_line("connected to");
    assert_echo(&connect(addresses[0]), "hello");
}

fn a_client_is_replaced_under_load_without_losing_a_visit(protection: Protection) {
    let _turn = share_turn();
    let (_server, addresses) = Program::server(protection, &["-n", "2"]);
    let service = Service::echo();
    let mut old = client(protection, addresses, service.addr, &[]);
    let made = sixteen_at_a_time(addresses[0], Duration::from_secs(8), || {
        for _ in 0..4 {
            thread::sleep(Duration::from_millis(700));
            let new = client(protection, addresses, service.addr, &[]);
            thread::sleep(Duration::from_millis(300));
            old.signal(Signal::TERM);
            assert!(old.wait_for_end().success());
            old = new;
        }
    });
    assert_whole(&made);
}

fn a_client_that_is_killed_takes_only_its_own_visits(protection: Protection) {
    let _turn = share_turn();
    let (_server, addresses) = Program::server(protection, &["-n", "2"]);
    let service = Service::echo();
    let _stays = client(protection, addresses, service.addr, &[]);
    let mut killed = client(protection, addresses, service.addr, &[]);
    let mut at = None;
    let made = sixteen_at_a_time(addresses[0], Duration::from_secs(6), || {
        thread::sleep(Duration::from_secs(2));
        killed.kill();
        at = Some(Instant::now());
    });
    assert_whole_after(&made, at.unwrap());
}

fn a_visitor_that_waits_for_a_dead_client_is_given_to_another_at_once(protection: Protection) {
    let options = ["-n", "2", "-v", "--status", "127.0.0.1:0"];
    let (server, addresses) = Program::server(protection, &options);
    let page = server.wait_for_line("status at http://");
    let (_, page) = page.trim_end_matches('/').rsplit_once('/').unwrap();
    let service = Service::echo();
    let mut dead = client(protection, addresses, service.addr, &["-p", "0"]);
    let _other = client(protection, addresses, service.addr, &["-p", "0"]);
    dead.signal(Signal::STOP);
    // Of two that have no visitor, the one that came first is asked.
    let visitor = connect(addresses[0]);
    server.wait_for_line(&format!("visitor {} came", visitor.local_addr().unwrap()));
    thread::sleep(Duration::from_millis(50));
    dead.kill();
    assert_echo(&visitor, "served by the other");
    // A tunnel that is only late is asked for again when its visitor has waited for a second, or later. By
    // the server's own clock, as a crowded machine may let all others be late.
    let (_, metrics) = try_get(page.parse().unwrap(), "/metrics").unwrap();
    let at_once = "tunnel_proxy_join_seconds_bucket{le=\"0.5\"} 1\n";
    assert!(metrics.contains(at_once), "{metrics}");
}

fn a_client_without_its_local_service_leaves_visitors_to_the_other(protection: Protection) {
    let (server, addresses) = Program::server(protection, &["-n", "2"]);
    let (nowhere, service) = (closed_port(), Service::echo());
    let lame = client(protection, addresses, nowhere.addr, &[]);
    let _other = client(protection, addresses, service.addr, &[]);
    let start = Instant::now();
    let mut visits = 0;
    while start.elapsed() < Duration::from_secs(4) {
        // Those that speak first, and those that wait, find nothing amiss.
        let visitor = connect(addresses[0]);
        assert_echo(&visitor, &format!("visit {visits}"));
        visits += 1;
        thread::sleep(Duration::from_millis(20));
    }
    // After a second, and then after two.
    let failed = lame.lines_with("cannot reach the local service").len();
    assert!((1..=4).contains(&failed), "{failed} of {visits}");
    let told = server.lines_with("the client could not reach the local service: refused");
    assert!(!told.is_empty() && told.len() <= failed);
    // None of them was refused.
    server.signal(Signal::USR1);
    let status = server.wait_for_line("uptime=");
    assert!(status.contains(" refused=0 timed_out=0"), "{status}");
    // Its tunnels are not lost with the visitors.
    assert_eq!(lame.lines_with("idle tunnel"), [""; 0]);
}

fn without_a_local_service_anywhere_visitors_are_reset(protection: Protection) {
    let (server, addresses) = Program::server(protection, &["-n", "2"]);
    let nowhere = closed_port();
    let clients = [(); 2].map(|()| client(protection, addresses, nowhere.addr, &[]));
    for _ in 0..5 {
        assert_was_reset(try_connect(addresses[0]));
    }
    for client in &clients {
        client.wait_for_line("cannot reach the local service");
    }
    // Each of them once.
    eventually("all are counted", || {
        server.signal(Signal::USR1);
        thread::sleep(Duration::from_millis(50));
        !server.lines_with(" refused=5 ").is_empty()
    });
    assert_eq!(server.lines_with(" refused=6 "), [""; 0]);
}

fn a_service_that_speaks_first_speaks_through_two_clients(protection: Protection) {
    let (_server, addresses) = Program::server(protection, &["-n", "2"]);
    let service = Service::start(|mut socket| {
        let _ = socket.write_all(b"220 hello\r\n");
        let _ = socket.read(&mut [0]);
    });
    let _clients = [(); 2].map(|()| client(protection, addresses, service.addr, &[]));
    for _ in 0..30 {
        let mut hello = [0; 11];
        let mut visitor = connect(addresses[0]);
        visitor.read_exact(&mut hello).unwrap();
        assert_eq!(&hello, b"220 hello\r\n");
    }
}

/// A server with two clients: one that is made by hand, with so many tunnels, and one that serves. The
/// first visitor goes to the one that came first, through its last tunnel.
fn with_a_client_by_hand<const TUNNELS: usize>(
    protection: Protection,
) -> (
    RunningServer,
    Peer,
    [Peer; TUNNELS],
    (RunningClient, Service),
) {
    let mut options = server_options(protection);
    options.clients = 2;
    let server = RunningServer::start(options);
    let mut control = Peer::dial_control(&server);
    let session = control.say_hello(1);
    let tunnels = std::array::from_fn(|number| {
        let mut tunnel = Peer::dial_tunnel(&server, &control);
        tunnel.write(format!("tunnel session={session}\n"));
        eventually("an idle tunnel", || {
            server.handle().status().unwrap().idle == number + 1
        });
        tunnel
    });
    let service = Service::echo();
    let client = RunningClient::start(client_options(&server, service.addr));
    eventually("the tunnels of both", || {
        server.handle().status().unwrap().idle == TUNNELS + 8
    });
    (server, control, tunnels, (client, service))
}

fn a_client_that_does_not_answer_keeps_one_visitor_waiting_and_no_other(protection: Protection) {
    let (server, control, [mut tunnel], _other) = with_a_client_by_hand(protection);
    let waits = server.visit();
    assert!(tunnel.line().ends_with(" answer=1\n"));
    for visit in 0..5 {
        assert_echo(&server.visit(), &format!("visit {visit}"));
    }
    assert_eq!(server.handle().status().unwrap().waiting, 1);
    // The tunnel stays open. An answer would be waited for for 12 s.
    let start = Instant::now();
    drop(control);
    assert_echo(&waits, "given to the other");
    assert!(start.elapsed() < Duration::from_secs(6));
}

fn a_client_that_has_failed_is_tried_by_one_visitor_after_its_pause(protection: Protection) {
    let (server, _control, [_first, mut tunnel], _other) = with_a_client_by_hand(protection);
    let refused = server.visit();
    assert!(tunnel.line().ends_with(" answer=1\n"));
    tunnel.fail(refused.local_addr().unwrap());
    assert_echo(&refused, "given to the other");
    // The pause of a second.
    thread::sleep(Duration::from_millis(1200));
    let _tries = server.visit();
    assert!(tunnel.line().ends_with(" answer=1\n"));
    eventually("the server waits for the answer", || {
        server.handle().status().unwrap().waiting == 1
    });
    // Who went there would wait until the first client is silent for too long.
    let start = Instant::now();
    let others = [(); 5].map(|()| server.visit());
    others
        .iter()
        .for_each(|other| assert_echo(other, "straight to the other"));
    assert!(start.elapsed() < Duration::from_secs(3));
}

fn a_server_that_stops_waits_for_an_answer(protection: Protection) {
    let (mut server, _control, [mut tunnel], _other) = with_a_client_by_hand(protection);
    let waits = server.visit();
    assert!(tunnel.line().ends_with(" answer=1\n"));
    server.handle().stop(DEADLINE);
    eventually("no more visitors", || try_connect(server.public).is_err());
    thread::sleep(Duration::from_millis(100));
    tunnel.fail(waits.local_addr().unwrap());
    assert_echo(&waits, "given to the other");
    drop(waits);
    server.wait_for_end();
}

/// The first tunnel dies before its client has answered. That client may take its end of it for a visit that
/// goes on, and speak of it.
fn a_visitor_who_is_given_again_begins_another_visit(protection: Protection) {
    let (server, _control, [mut first, mut last], _other) = with_a_client_by_hand(protection);
    let visitor = server.visit();
    let number = last.assert_given(&visitor, " answer=1");
    eventually("the server waits for the answer", || {
        server.handle().status().unwrap().waiting == 1
    });
    // Then the other client has no fewer visitors.
    let beside = server.visit();
    assert_echo(&beside, "given to the other");
    drop(last);
    assert_ne!(first.assert_given(&visitor, " answer=1"), number);
}

/// With the original's one client, nobody is asked: the client learns nothing but the visitor.
#[test]
fn one_client_is_never_asked() {
    let server = RunningServer::start(server_options(Protection::Plain));
    let mut control = Peer::dial_control(&server);
    let session = control.say_hello(1);
    let mut tunnel = Peer::dial_tunnel(&server, &control);
    tunnel.write(format!("tunnel session={session}\n"));
    let visitor = server.visit();
    tunnel.assert_given(&visitor, "");
}
