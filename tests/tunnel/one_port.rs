//! One port for control links and tunnels: `--tunnel` is the same as `--control`.
#![cfg(target_os = "linux")]

use std::io::{Read, Write};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use crate::support::peer::{CONTROL, Peer};
use crate::support::programs::{Launch, Program, ports_of};
use crate::support::{
    DEADLINE, Protection, Service, assert_echo, connect, connect_from, open_from, plain_and_sealed,
};

plain_and_sealed! {
    one_port_takes_links_and_tunnels,
    visitors_may_come_to_the_same_port_of_another_address,
    strangers_at_the_one_port_keep_no_client_out,
    a_client_with_another_protection_is_told_so,
    a_tunnel_that_is_refused_is_called_one,
    a_server_with_one_port_hands_it_over,
}

/// A server with one port for its clients, and where visitors and clients come to.
fn server(protection: Protection, host: &str) -> (Launch<'static>, Program, [SocketAddr; 3]) {
    let [public, both, _] = ports_of(host);
    let launch = Launch::new(protection).on([public, both, both]);
    let server = launch.server(&[]);
    assert_eq!(server.addresses(), [public, both, both]);
    (launch, server, [public, both, both])
}

/// An address for each protection, as both tests may run at a time.
fn host(protection: Protection, number: usize) -> String {
    let low = 2 * number + usize::from(protection == Protection::Sealed);
    format!("127.0.83.{}", low + 1)
}

/// A client that is told the one port, and learns from the server that tunnels go there, too.
fn client(protection: Protection, control: SocketAddr, service: &Service) -> Program {
    let (control, local) = (control.to_string(), service.addr.to_string());
    Launch::new(protection).bare_client(&["-s", &control, "-l", &local])
}

fn one_port_takes_links_and_tunnels(protection: Protection) {
    let (_, server, [public, control, _]) = server(protection, &host(protection, 0));
    let service = Service::echo();
    let client = client(protection, control, &service);
    let visitors: Vec<_> = (0..30).map(|_| connect(public)).collect();
    for (number, visitor) in visitors.iter().enumerate() {
        assert_echo(visitor, &format!("visitor {number}"));
    }
    drop(client);
    server.wait_for_line(" left: ");
    assert_eq!(server.lines_with("refused"), [""; 0]);
}

fn visitors_may_come_to_the_same_port_of_another_address(protection: Protection) {
    let [public, ..] = ports_of(&host(protection, 5));
    let clients = SocketAddr::new(host(protection, 6).parse().unwrap(), public.port());
    let launch = Launch::new(protection).on([public, clients, clients]);
    let _server = launch.server(&[]);
    let service = Service::echo();
    let client = client(protection, clients, &service);
    client.wait_for_line("connected to");
    assert_echo(&connect(public), "hello");
}

/// More strangers than the lobby has places, silent or with the first bytes of either kind.
fn strangers_at_the_one_port_keep_no_client_out(protection: Protection) {
    let (_, _server, [public, control, _]) = server(protection, &host(protection, 1));
    let service = Service::echo();
    let first: [&[u8]; 4] = [b"", b"hello", &[0], &[0, 48]];
    let strangers: Vec<_> = (0..400)
        .map(|number| {
            let source = [127, 0, 84, 1 + (number % 50) as u8];
            let mut stranger = open_from(source, control);
            let _ = stranger.write_all(first[number % 4]);
            stranger
        })
        .collect();
    let start = Instant::now();
    let _client = client(protection, control, &service);
    assert_echo(&connect(public), "through the crowd");
    // A stranger that is waited for has 5 s.
    assert!(start.elapsed() < Duration::from_millis(4500));
    drop(strangers);
}

fn a_client_with_another_protection_is_told_so(protection: Protection) {
    let (_, server, [_, control, _]) = server(protection, &host(protection, 2));
    let service = Service::echo();
    let (other, told, refused) = match protection {
        Protection::Plain => (Protection::Sealed, "it has no key", "it has a key"),
        Protection::Sealed => (Protection::Plain, "it wants a key", "without a key"),
    };
    let client = client(other, control, &service);
    client.wait_for_line(told);
    server.wait_for_line(refused);
    // What is no client at all is told nothing.
    let mut stranger = open_from([127, 0, 85, 1], control);
    stranger.set_nonblocking(false).unwrap();
    stranger.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    let mut answer = Vec::new();
    let _ = stranger.read_to_end(&mut answer);
    assert_eq!(answer, b"");
    server.wait_for_line("it speaks HTTP");
}

/// One whose first line is none, and one whose session is not live or that has no key.
fn a_tunnel_that_is_refused_is_called_one(protection: Protection) {
    let (_, server, [_, control, _]) = server(protection, &host(protection, 4));
    let mut link = match protection.key() {
        Some(key) => Peer::sealed(connect(control), &key, true, CONTROL).unwrap(),
        None => Peer::plain(connect(control)),
    };
    let session = link.say_hello(1);
    let mut tunnel = link.dial_tunnel_to(control);
    tunnel.write("nonsense\n");
    server.wait_for_line("refused tunnel from 127.0.0.1:");
    let mut plain = Peer::plain(connect_from("127.0.85.2", control));
    plain.is_tunnel();
    plain.write(format!("tunnel session={}\n", "0".repeat(session.len())));
    let line = server.wait_for_line("refused tunnel from 127.0.85.2:");
    let why = match protection {
        Protection::Plain => "its session is not live",
        Protection::Sealed => "it came without a key (--key-file)",
    };
    assert!(line.contains(why), "{line}");
    assert_eq!(server.lines_with("refused control link"), [""; 0]);
}

fn a_server_with_one_port_hands_it_over(protection: Protection) {
    let (launch, mut old, [public, control, _]) = server(protection, &host(protection, 3));
    let service = Service::echo();
    let client = client(protection, control, &service);
    assert_echo(&connect(public), "the old one");
    let patient = connect(public);
    assert_echo(&patient, "on the old one");
    let new = launch.server(&[]);
    new.wait_for_line("in use");
    old.signal(rustix::process::Signal::TERM);
    new.wait_for_line("is handed over");
    assert_echo(&connect(public), "the new one");
    assert_echo(&patient, "still on the old one");
    drop(patient);
    assert!(old.wait_for_end().success());
    client.wait_for_lines("connected to", 2);
    let start = Instant::now();
    assert_echo(&connect(public), "at once");
    assert!(start.elapsed() < DEADLINE / 4);
}
