//! The protocol's exact bytes, spoken by hand with either program.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use crate::support::{
    DEADLINE, Peer, RunningClient, RunningServer, Service, accept, assert_ended, assert_reset,
    closed_port, connect, server_options,
};
use tunnel_proxy::ServerOptions;

const SESSION: &str = "00112233445566778899aabbccddeeff";

/// A server made by hand, with a client that has said hello to it.
struct HandMadeServer {
    tunnels: TcpListener,
    control: Peer,
    client: RunningClient,
}

impl HandMadeServer {
    fn start(local: std::net::SocketAddr, pool: usize) -> Self {
        let controls = TcpListener::bind("127.0.0.1:0").unwrap();
        let tunnels = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = RunningClient::of(&controls, &tunnels, local, pool);
        let mut control = Peer::new(accept(&controls));
        assert_eq!(control.line(), format!("hello proto=1 pool={pool}\n"));
        control.write(&format!("hello proto=1 session={SESSION} pool={pool}\n"));
        Self {
            tunnels,
            control,
            client,
        }
    }

    /// The next tunnel, after its first line.
    fn tunnel(&self) -> TcpStream {
        let mut tunnel = accept(&self.tunnels);
        let line = format!("tunnel session={SESSION}\n");
        let mut got = vec![0; line.len()];
        tunnel.read_exact(&mut got).unwrap();
        assert_eq!(got, line.as_bytes());
        tunnel
    }
}

/// A service that hands out everything that a connection brought, once it has ended.
fn recording() -> (Service, mpsc::Receiver<Vec<u8>>) {
    let (sender, records) = mpsc::channel();
    let service = Service::start(move |mut socket| {
        let mut record = Vec::new();
        socket.read_to_end(&mut record).unwrap();
        let _ = sender.send(record);
    });
    (service, records)
}

#[test]
fn the_visitors_first_bytes_may_stand_behind_the_line_however_it_is_cut() {
    let (service, records) = recording();
    let server = HandMadeServer::start(service.addr, 1);
    let line = b"new visitor=192.0.2.1:50000\n";
    let first = b"GET /first\nnew visitor=192.0.2.2:2\n\0\xff";
    let bytes = [&line[..], first].concat();
    for cut in 0..=bytes.len() {
        let mut tunnel = server.tunnel();
        tunnel.write_all(&bytes[..cut]).unwrap();
        if cut > 0 && cut < bytes.len() {
            // So that the two pieces are two reads.
            thread::sleep(Duration::from_millis(3));
        }
        tunnel.write_all(&bytes[cut..]).unwrap();
        tunnel.shutdown(Shutdown::Write).unwrap();
        let record = records.recv_timeout(DEADLINE).unwrap();
        assert_eq!(record, first, "cut at {cut}");
    }
}

#[test]
fn a_line_of_single_bytes_is_understood() {
    let (service, records) = recording();
    let server = HandMadeServer::start(service.addr, 1);
    let mut tunnel = server.tunnel();
    for byte in b"some=thing\nnew later=1 visitor=[2001:db8::1]:9\nabc" {
        tunnel.write_all(&[*byte]).unwrap();
        thread::sleep(Duration::from_millis(1));
    }
    tunnel.shutdown(Shutdown::Write).unwrap();
    assert_eq!(records.recv_timeout(DEADLINE).unwrap(), b"abc");
}

#[test]
fn a_client_keeps_its_pool_full_and_dials_one_more_on_new() {
    let (service, records) = recording();
    let server = HandMadeServer::start(service.addr, 2);
    let (mut one, _two) = (server.tunnel(), server.tunnel());
    server.control.write("new\nwhat=ever\nnew\n");
    let _beyond = (server.tunnel(), server.tunnel());
    // Four are spare, two more than the pool: those that are taken are not replaced.
    one.write_all(b"new visitor=192.0.2.1:1\nx").unwrap();
    one.shutdown(Shutdown::Write).unwrap();
    assert_eq!(records.recv_timeout(DEADLINE).unwrap(), b"x");
    server.tunnels.set_nonblocking(true).unwrap();
    thread::sleep(Duration::from_millis(300));
    assert!(server.tunnels.accept().is_err(), "one tunnel too many");
}

#[test]
fn a_refused_local_service_aborts_the_tunnel_and_the_next_is_dialled() {
    let refusing = closed_port();
    let server = HandMadeServer::start(refusing.addr, 1);
    for _ in 0..10 {
        let mut tunnel = server.tunnel();
        let start = Instant::now();
        tunnel.write_all(b"new visitor=192.0.2.1:1\n").unwrap();
        assert_reset(&tunnel, Duration::from_secs(1));
        assert!(start.elapsed() < Duration::from_secs(1));
    }
}

#[test]
fn bad_lines_end_the_link_with_either_side() {
    let long = "x".repeat(256);
    for bad in ["\0\n", "h\u{e9}\n", &long, "hello proto=x\n"] {
        let (service, _records) = recording();
        let mut server = HandMadeServer::start(service.addr, 0);
        server.control.write(bad);
        // What the client wrote last may have met a closed socket.
        let mut rest = String::new();
        let _ = server.control.socket.read_to_string(&mut rest);

        let server = RunningServer::start(server_options());
        let mut client = Peer::new(connect(server.control));
        client.say_hello(0);
        client.write(bad);
        let _ = client.socket.read_to_string(&mut rest);
        let mut next = Peer::new(connect(server.control));
        assert_eq!(next.say_hello(0).len(), 32, "the place is free again");
    }
}

#[test]
fn the_server_grants_at_most_sixty_four_idle_tunnels() {
    let server = RunningServer::start(server_options());
    let mut client = Peer::new(connect(server.control));
    client.write("hello colour=blue proto=1 pool=1000\n");
    let line = client.line();
    assert!(line.starts_with("hello proto=1 session="), "{line}");
    assert!(line.ends_with(" pool=64\n"), "{line}");
}

#[test]
fn a_dead_idle_tunnel_is_passed_over_and_superfluous_ones_are_closed() {
    let server = RunningServer::start(server_options());
    let mut client = Peer::new(connect(server.control));
    let session = client.say_hello(2);
    let tunnel = || {
        let tunnel = Peer::new(connect(server.tunnel));
        tunnel.write(&format!("tunnel session={session}\n"));
        tunnel
    };
    // The server grants two: of three, one is closed.
    let mut three = [tunnel(), tunnel(), tunnel()];
    let closed = wait_for_a_closed_one(&mut three);
    let [mut lives, dead]: [Peer; 2] = three
        .into_iter()
        .enumerate()
        .filter(|(number, _)| *number != closed)
        .map(|(_, tunnel)| tunnel)
        .collect::<Vec<_>>()
        .try_into()
        .unwrap_or_else(|_| panic!("two are left"));
    drop(dead);
    let visitor = server.visit();
    let from = visitor.local_addr().unwrap();
    assert_eq!(lives.line(), format!("new visitor={from}\n"));
    // Now there is none left: the next visitor has to be asked for.
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

#[test]
fn a_control_link_that_starts_with_anything_but_hello_is_closed() {
    let server = RunningServer::start(server_options());
    for first in [
        "GET / HTTP/1.0\r\n\r\n",
        "hi\n",
        "tunnel session=1\n",
        "hello\n",
    ] {
        let stranger = Peer::new(connect(server.control));
        stranger.write(first);
        let mut got = String::new();
        let _ = (&stranger.socket).read_to_string(&mut got);
        assert_eq!(got, "", "{first:?}");
    }
    // A hello that drips in too slowly is none.
    let start = Instant::now();
    let slow = Peer::new(connect(server.control));
    slow.write("hello proto=1");
    assert_ended(&slow.socket);
    let bounds = Duration::from_millis(900)..Duration::from_millis(2500);
    assert!(bounds.contains(&start.elapsed()), "{:?}", start.elapsed());
}

#[test]
fn a_stopping_server_says_bye() {
    let server = RunningServer::start(server_options());
    let mut client = Peer::new(connect(server.control));
    client.say_hello(0);
    server.handle().stop(Duration::ZERO);
    assert_eq!(client.line_after_hi(), "bye reason=draining\n");
    assert_eq!(client.line(), "");
}

#[test]
fn a_stopping_client_says_bye() {
    let (service, _records) = recording();
    let mut server = HandMadeServer::start(service.addr, 1);
    let _tunnel = server.tunnel();
    server.client.handle().stop(Duration::ZERO);
    assert_eq!(server.control.line_after_hi(), "bye reason=draining\n");
    assert_eq!(server.control.line(), "");
}

#[test]
fn visitors_beyond_max_conns_wait_their_turn() {
    let service = Service::echo();
    let server = RunningServer::start(ServerOptions {
        max_conns: 2,
        ..server_options()
    });
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
