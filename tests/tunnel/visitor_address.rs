//! Where a visitor comes from, by headers of the PROXY protocol: before a local service
//! (`--proxy-protocol`) and behind a proxy (`--accept-proxy`).
#![cfg(target_os = "linux")]

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc::Receiver;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::support::peer::{Peer, session_in};
use crate::support::programs::{Both, Launch, Program};
use crate::support::proxies::Proxy;
use crate::support::{
    DEADLINE, Pattern, Protection, Record, RunningClient, RunningServer, Service, accept, any,
    assert_echo, assert_refused, assert_reset, client_options, connect, connect_from, eventually,
    expect_pattern, plain_and_sealed, raise_descriptors, reset_on_close, send_pattern,
    server_options, take_turn, unnamed, with,
};
use tunnel_proxy::{Address, ClientOptions, ProxyVersion};

plain_and_sealed! {
    the_header_comes_first_on_every_connection,
    a_service_that_speaks_first_waits_for_the_header,
    each_service_has_a_header_of_its_own,
    two_clients_that_answer_say_the_header_too,
    a_client_asks_for_the_address_only_if_it_needs_it,
    a_proxy_says_whose_the_connection_is,
    a_header_may_come_in_any_two_parts,
    a_long_header_may_come_byte_by_byte,
    bytes_behind_the_header_are_the_visitors,
    a_proxy_that_knows_no_address_is_the_visitor,
    a_service_that_speaks_first_speaks_through_a_proxy,
    a_header_that_is_late_is_refused,
    what_is_no_header_is_refused,
    thousands_of_malformed_headers_leave_nothing,
    who_is_no_proxy_is_refused,
    a_balancers_look_costs_no_tunnel_and_no_line,
    silent_proxies_hold_nobody_up,
    a_stop_waits_for_a_header_under_way,
    #[ignore = "needs haproxy"]
    haproxy_says_who_comes,
    #[ignore = "needs nginx and its stream module"]
    nginx_stream_says_who_comes,
    #[ignore = "needs haproxy"]
    haproxy_is_told_who_comes,
    #[ignore = "needs nginx"]
    nginx_is_told_who_comes,
    #[ignore = "needs haproxy and nginx"]
    a_visitors_address_passes_through_haproxy_and_nginx,
    #[ignore = "needs haproxy"]
    the_health_check_of_haproxy_costs_no_tunnel_and_no_line,
}

const V1: ProxyVersion = ProxyVersion::V1;
const V2: ProxyVersion = ProxyVersion::V2;

/// What version 2 begins with.
const SIGNATURE: &[u8] = b"\r\n\r\n\0\r\nQUIT\n";

/// A header, written apart from the code that is tested. Both ends are of one family.
fn header(version: ProxyVersion, from: SocketAddr, to: SocketAddr) -> Vec<u8> {
    let (hosts, ports) = ([from.ip(), to.ip()], [from.port(), to.port()]);
    if version == V1 {
        let family = if from.is_ipv4() { 4 } else { 6 };
        let ([from, to], [from_port, to_port]) = (hosts, ports);
        return format!("PROXY TCP{family} {from} {to} {from_port} {to_port}\r\n").into_bytes();
    }
    let mut bytes = SIGNATURE.to_vec();
    match from.is_ipv4() {
        true => bytes.extend([0x21, 0x11, 0, 12]),
        false => bytes.extend([0x21, 0x21, 0, 36]),
    }
    for host in hosts {
        match host {
            IpAddr::V4(host) => bytes.extend(host.octets()),
            IpAddr::V6(host) => bytes.extend(host.octets()),
        }
    }
    bytes.extend(ports.iter().flat_map(|port| port.to_be_bytes()));
    bytes
}

/// The header of a visitor whose connection this is.
fn header_of(version: ProxyVersion, visitor: &TcpStream) -> Vec<u8> {
    let (from, to) = (visitor.local_addr().unwrap(), visitor.peer_addr().unwrap());
    header(version, from, to)
}

/// The header of a visitor of whom nothing is known.
fn unknown(version: ProxyVersion) -> Vec<u8> {
    match version {
        ProxyVersion::V1 => b"PROXY UNKNOWN\r\n".to_vec(),
        _ => [SIGNATURE, &[0x20, 0, 0, 0]].concat(),
    }
}

/// A server whose visitors come to this host, and a client whose service gets this header.
fn tunnel(
    protection: Protection,
    host: &str,
    version: ProxyVersion,
    local: SocketAddr,
) -> (RunningServer, RunningClient) {
    let server = RunningServer::start(with!(server_options(protection);
            public: unnamed(Address::new(host, 0)),
    ));
    let client = RunningClient::start(with!(client_options(&server, local);
            proxy_protocol: [(tunnel_proxy::Service::default(), version)].into(),
    ));
    (server, client)
}

/// Sends this much and an end, and asserts that the service has got the header before.
fn assert_header(visitor: &TcpStream, records: &Receiver<Record>, header: &[u8], text: &[u8]) {
    { visitor }.write_all(text).unwrap();
    visitor.shutdown(Shutdown::Write).unwrap();
    let record = records.recv_timeout(DEADLINE).unwrap();
    assert_eq!(record, Record::whole(&[header, text].concat()));
}

fn the_header_comes_first_on_every_connection(protection: Protection) {
    let (service, records) = Service::recording();
    let ipv6 = Ipv6Addr::LOCALHOST.to_string();
    // An IPv4 visitor of a port that takes both is one of IPv4.
    for (host, visited) in [
        ("127.0.0.1", "127.0.0.1"),
        (&ipv6, &ipv6),
        ("::", "127.0.0.1"),
    ] {
        for version in [V1, V2] {
            let (server, _client) = tunnel(protection, host, version, service.addr);
            let to = SocketAddr::new(visited.parse().unwrap(), server.public.port());
            // More than the pool has, through tunnels that have served and new ones.
            for number in 0..12 {
                let visitor = connect(to);
                let text = vec![b'x'; number * 1000];
                assert_header(&visitor, &records, &header_of(version, &visitor), &text);
            }
        }
    }
}

fn a_service_that_speaks_first_waits_for_the_header(protection: Protection) {
    for version in [V1, V2] {
        let service = Service::start(move |mut socket| {
            let mut header = Vec::new();
            let is_whole = |header: &[u8]| match version {
                ProxyVersion::V1 => header.ends_with(b"\r\n"),
                _ => header.len() == SIGNATURE.len() + 16,
            };
            while !is_whole(&header) {
                let mut byte = [0];
                socket.read_exact(&mut byte).unwrap();
                header.extend(byte);
            }
            socket.write_all(b"220 ready\r\n").unwrap();
            let _ = socket.read(&mut [0]);
        });
        let (server, _client) = tunnel(protection, "127.0.0.1", version, service.addr);
        let mut said = [0; 11];
        server.visit().read_exact(&mut said).unwrap();
        assert_eq!(&said, b"220 ready\r\n");
    }
}

fn each_service_has_a_header_of_its_own(protection: Protection) {
    let names = ["web", "ssh", "db"].map(|name| name.parse::<tunnel_proxy::Service>().unwrap());
    let services = [(); 3].map(|()| Service::recording());
    let server = RunningServer::start(with!(server_options(protection);
            public: names.iter().map(|name| (name.clone(), any())).collect(),
    ));
    let local = names.iter().zip(&services);
    let local = local.map(|(name, (service, _))| (name.clone(), service.addr.into()));
    let [web, ssh, db] = &names;
    let _client = RunningClient::start(with!(client_options(&server, server.public);
            local: local.collect(),
            proxy_protocol: [(web.clone(), V1), (db.clone(), V2)].into(),
    ));
    let versions = [(web, Some(V1)), (ssh, None), (db, Some(V2))];
    for ((name, version), (_, records)) in versions.into_iter().zip(&services) {
        let visitor = connect(server.public_addrs[name]);
        let header = version.map(|version| header_of(version, &visitor));
        assert_header(&visitor, records, &header.unwrap_or_default(), b"hello");
    }
}

fn two_clients_that_answer_say_the_header_too(protection: Protection) {
    let (service, records) = Service::recording();
    let server = RunningServer::start(with!(server_options(protection);
            clients: 2,
    ));
    let _clients = [(); 2].map(|()| {
        let client = RunningClient::start(with!(client_options(&server, service.addr);
                proxy_protocol: [(tunnel_proxy::Service::default(), V2)].into(),
        ));
        assert!(client.handle().wait_for_session(DEADLINE));
        client
    });
    for _ in 0..6 {
        let visitor = server.visit();
        assert_header(&visitor, &records, &header_of(V2, &visitor), b"hello");
    }
}

fn a_client_asks_for_the_address_only_if_it_needs_it(protection: Protection) {
    let server = RunningServer::start(server_options(protection));
    for (asks, to) in [("", false), (" to=1", true), (" to=0", false)] {
        let mut client = Peer::dial_control(&server);
        client.write(format!("hello proto=2 pool=1{asks}\n"));
        let session = session_in(&client.line());
        let mut tunnel = Peer::dial_tunnel(&server, &client);
        tunnel.write(format!("tunnel session={session}\n"));
        let visitor = server.visit();
        let to = if to {
            format!(" to={}", server.public)
        } else {
            String::new()
        };
        tunnel.assert_given(&visitor, &to);
        client.end();
        client.read_until_closed();
    }
}

/// A server by hand, and a client that asks it for the address that visitors came to.
fn asked(
    protection: Protection,
    local: SocketAddr,
    version: ProxyVersion,
) -> ([Peer; 2], RunningClient) {
    let [controls, tunnels] = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
    let client = RunningClient::start(with!(ClientOptions::default();
            servers: vec![controls.local_addr().unwrap().into()],
            tunnel_port: Some(tunnels.local_addr().unwrap().port()),
            local: unnamed(local),
            pool: 1,
            key: protection.key(),
            proxy_protocol: [(tunnel_proxy::Service::default(), version)].into(),
    ));
    let mut control = Peer::accept_control(&controls, protection);
    assert_eq!(control.line(), "hello proto=2 pool=1 linger=600000 to=1\n");
    control.write("hello proto=2 pool=1 session=00112233445566778899aabbccddeeff\n");
    let mut tunnel = Peer::accept_tunnel(&tunnels, &control);
    tunnel.line();
    ([control, tunnel], client)
}

/// What a server tells, and what the service gets. A server that does not know the question tells nothing.
#[test]
fn the_header_says_what_the_server_has_told() {
    let known = ("192.0.2.1:5", "203.0.113.9:443");
    let mapped = ("[2001:db8::1]:5", "192.0.2.9:443");
    for version in [V1, V2] {
        for (told, addresses) in [
            ("visitor=192.0.2.1:5", None),
            ("visitor=192.0.2.1:5 to=203.0.113.9:443", Some(known)),
            (
                "visitor=[2001:db8::1]:5 to=192.0.2.9:443",
                Some((mapped.0, "[::ffff:192.0.2.9]:443")),
            ),
        ] {
            let (service, records) = Service::recording();
            let ([_control, mut tunnel], _client) =
                asked(Protection::Sealed, service.addr, version);
            tunnel.write(format!("new {told}\nhello"));
            tunnel.end();
            let header = addresses.map_or(unknown(version), |(from, to)| {
                header(version, from.parse().unwrap(), to.parse().unwrap())
            });
            let record = records.recv_timeout(DEADLINE).unwrap();
            assert_eq!(record, Record::whole(&[&header[..], b"hello"].concat()));
        }
    }
}

/// The original's server tells nothing of its visitors.
#[test]
fn a_visitor_of_an_original_server_is_unknown() {
    for version in [V1, V2] {
        let (service, records) = Service::recording();
        let [controls, tunnels] = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
        let _client = RunningClient::start(with!(ClientOptions::default();
                servers: vec![controls.local_addr().unwrap().into()],
                tunnel_port: Some(tunnels.local_addr().unwrap().port()),
                local: unnamed(service.addr),
                proxy_protocol: [(tunnel_proxy::Service::default(), version)].into(),
                original: true,
        ));
        let mut control = accept(&controls);
        control.write_all(b"hi\nnew\n").unwrap();
        let mut tunnel = accept(&tunnels);
        tunnel.write_all(b"hello").unwrap();
        tunnel.shutdown(Shutdown::Write).unwrap();
        let record = records.recv_timeout(DEADLINE).unwrap();
        assert_eq!(
            record,
            Record::whole(&[&unknown(version)[..], b"hello"].concat())
        );
    }
}

/// A server that believes proxies at these addresses, and a client whose service gets headers.
fn behind(
    protection: Protection,
    proxies: &[&str],
    local: SocketAddr,
) -> (RunningServer, RunningClient) {
    let server = RunningServer::start(with!(server_options(protection);
            accept_proxy: proxies.iter().map(|it| it.parse().unwrap()).collect(),
            public: unnamed(Address::new("::", 0)),
    ));
    let client = RunningClient::start(with!(client_options(&server, local);
            proxy_protocol: [(tunnel_proxy::Service::default(), V2)].into(),
    ));
    assert!(client.handle().wait_for_session(DEADLINE));
    (server, client)
}

/// The port for visitors on this loopback host.
fn at(host: &str, server: &RunningServer) -> SocketAddr {
    SocketAddr::new(host.parse().unwrap(), server.public.port())
}

const FROM: &str = "192.0.2.1:51034";
const TO: &str = "203.0.113.9:443";

/// A header of the visitor that these tests are about.
fn good(version: ProxyVersion) -> Vec<u8> {
    header(version, FROM.parse().unwrap(), TO.parse().unwrap())
}

fn a_proxy_says_whose_the_connection_is(protection: Protection) {
    let (service, records) = Service::recording();
    let (server, _client) = behind(protection, &["127.0.89.0/24", "::1"], service.addr);
    let (v4, v6) = ((FROM, TO), ("[2001:db8::1]:5", "[2001:db8::2]:443"));
    for (from, to) in [v4, v6] {
        let [from, to] = [from, to].map(|it| it.parse().unwrap());
        for version in [V1, V2] {
            for proxy in ["127.0.89.10", "::1"] {
                let host = if proxy == "::1" { "::1" } else { "127.0.0.1" };
                let mut visitor = connect_from(proxy, at(host, &server));
                visitor.write_all(&header(version, from, to)).unwrap();
                assert_header(&visitor, &records, &header(V2, from, to), b"hello");
            }
        }
    }
}

/// Asserts that a service gets these bytes behind the visitor's header, however they come.
fn assert_pieces(
    server: &RunningServer,
    records: &Receiver<Record>,
    pieces: &[&[&[u8]]],
    pause: Duration,
    expected: &[u8],
) {
    let all: Vec<_> = pieces
        .iter()
        .map(|_| connect(at("127.0.0.1", server)))
        .collect();
    for number in 0..pieces.iter().map(|it| it.len()).max().unwrap() {
        for (mut visitor, pieces) in all.iter().zip(pieces) {
            if let Some(piece) = pieces.get(number) {
                visitor.write_all(piece).unwrap();
            }
        }
        thread::sleep(pause);
    }
    for visitor in all {
        visitor.shutdown(Shutdown::Write).unwrap();
        let record = records.recv_timeout(DEADLINE).unwrap();
        assert_eq!(record, Record::whole(expected));
    }
}

fn a_header_may_come_in_any_two_parts(protection: Protection) {
    let (service, records) = Service::recording();
    let (server, _client) = behind(protection, &["127.0.0.1"], service.addr);
    let expected = [&good(V2)[..], b"hello"].concat();
    for version in [V1, V2] {
        let all = [&good(version)[..], b"hello"].concat();
        let parts: Vec<_> = (1..all.len()).map(|at| [&all[..at], &all[at..]]).collect();
        let parts: Vec<_> = parts.iter().map(|it| &it[..]).collect();
        assert_pieces(
            &server,
            &records,
            &parts,
            Duration::from_millis(50),
            &expected,
        );
    }
}

fn a_long_header_may_come_byte_by_byte(protection: Protection) {
    let (service, records) = Service::recording();
    let (server, _client) = behind(protection, &["127.0.0.1"], service.addr);
    // The longest that is read: all but the addresses is TLVs.
    let mut long = good(V2);
    long[14..16].copy_from_slice(&520_u16.to_be_bytes());
    long.extend([0xe0, 0x01, 0xf9]);
    long.resize(536, 7);
    for header in [good(V1), good(V2), long] {
        let all = [&header[..], b"hello"].concat();
        // All of it must come within the time for a header.
        let bytes: Vec<_> = all.chunks(all.len().div_ceil(64)).collect();
        let expected = [&good(V2)[..], b"hello"].concat();
        assert_pieces(
            &server,
            &records,
            &[&bytes],
            Duration::from_millis(1),
            &expected,
        );
    }
}

fn bytes_behind_the_header_are_the_visitors(protection: Protection) {
    const SIZE: usize = 1_000_000;
    let service = Service::start(|mut socket| {
        let mut header = good(V2);
        socket.read_exact(&mut header).unwrap();
        assert_eq!(header, good(V2));
        expect_pattern(&socket, 1, SIZE);
        send_pattern(&socket, 2, SIZE);
    });
    let (server, _client) = behind(protection, &["127.0.0.1"], service.addr);
    for version in [V1, V2] {
        let mut visitor = connect(at("127.0.0.1", &server));
        let mut bytes = good(version);
        let start = bytes.len();
        bytes.resize(start + SIZE, 0);
        Pattern::new(1).fill(&mut bytes[start..]);
        thread::scope(|scope| {
            scope.spawn(|| expect_pattern(&visitor, 2, SIZE));
            { &visitor }.write_all(&bytes).unwrap();
        });
        visitor.shutdown(Shutdown::Write).unwrap();
        assert_eq!(visitor.read(&mut [0]).unwrap(), 0);
    }
}

fn a_proxy_that_knows_no_address_is_the_visitor(protection: Protection) {
    let (service, records) = Service::recording();
    let (server, _client) = behind(protection, &["127.0.0.1"], service.addr);
    let unix = [SIGNATURE, &[0x21, 0x31, 0, 216], &[b'/'; 216]].concat();
    for header in [
        unknown(V1),
        unknown(V2),
        b"PROXY UNKNOWN ff:: ff:: 65535 65535\r\n".to_vec(),
        unix,
    ] {
        let mut visitor = connect(at("127.0.0.1", &server));
        let expected = header_of(V2, &visitor);
        visitor.write_all(&header).unwrap();
        assert_header(&visitor, &records, &expected, b"hello");
    }
}

fn a_service_that_speaks_first_speaks_through_a_proxy(protection: Protection) {
    let service = Service::start(|mut socket| {
        socket.write_all(b"220 ready\r\n").unwrap();
        let _ = socket.read_to_end(&mut Vec::new());
    });
    let (server, _client) = behind(protection, &["127.0.0.1"], service.addr);
    for header in [good(V1), good(V2), unknown(V1), unknown(V2)] {
        let mut visitor = connect(at("127.0.0.1", &server));
        visitor.write_all(&header).unwrap();
        let mut said = [0; 11];
        visitor.read_exact(&mut said).unwrap();
        assert_eq!(&said, b"220 ready\r\n");
    }
}

/// Both programs, of which the server believes proxies at 127.0.0.1, or also at others.
fn both(protection: Protection, local: SocketAddr, options: &[&str]) -> Both {
    let proxies = ["--accept-proxy", "127.0.0.1"];
    Both::start(protection, local, [&[&proxies[..], options].concat(), &[]])
}

fn a_header_that_is_late_is_refused(protection: Protection) {
    let service = Service::echo();
    let both = both(protection, service.addr, &[]);
    let start = Instant::now();
    let silent = both.visit();
    let [started, dripping] = [(); 2].map(|()| both.visit());
    { &started }.write_all(&good(V1)[..20]).unwrap();
    thread::scope(|scope| {
        scope.spawn(|| {
            // A reset is told once: here, to who writes.
            let taken = good(V1).into_iter().position(|byte| {
                thread::sleep(Duration::from_millis(500));
                { &dripping }.write_all(&[byte]).is_err()
            });
            assert!((4..40).contains(&taken.unwrap()), "{taken:?} bytes");
        });
        for visitor in [&silent, &started] {
            assert_reset(visitor, DEADLINE);
            assert!(start.elapsed() > Duration::from_millis(4900));
        }
    });
    both.server
        .wait_for_line(": no PROXY protocol header in 5s: tell the proxy to send one");
    both.assert_recovered(|mut visitor| {
        visitor.write_all(&good(V1)).unwrap();
        assert_echo(visitor, "hello");
    });
}

fn what_is_no_header_is_refused(protection: Protection) {
    let service = Service::echo();
    let proxies = ["--accept-proxy", "127.0.89.0/24"];
    let both = both(protection, service.addr, &proxies);
    let v2 = |rest: &[u8]| [SIGNATURE, rest].concat();
    let bad = [
        (b"GET / HTTP/1.1\r\n\r\n".to_vec(), "is missing"),
        (b"\r\n\r\n\0\r\nQUIX".to_vec(), "is missing"),
        (b"PROXY UDP4 ".to_vec(), "(v1) has another protocol"),
        (b"PROXY TCP4 192.0.2.1 1 2\r\n".to_vec(), "(v1) has not two"),
        (
            b"PROXY TCP4 ::1 ::1 1 2\r\n".to_vec(),
            "(v1) has an address that",
        ),
        (
            b"PROXY TCP4 192.0.2.1 192.0.2.2 1 65536\r\n".to_vec(),
            "(v1) has a port",
        ),
        (
            [b"PROXY UNKNOWN ", &[b'x'; 93][..]].concat(),
            "(v1) has no CR LF",
        ),
        (v2(&[0x31]), "has version 3"),
        (v2(&[0x22]), "(v2) has command 2"),
        (v2(&[0x21, 0x51, 0, 0]), "(v2) has family 0x51"),
        (v2(&[0x21, 0x11, 0, 11]), "(v2) has only 11 bytes"),
        (v2(&[0x21, 0x11, 2, 9]), "(v2) has 537 bytes"),
        (v2(&[0x20, 0, 255, 255]), "(v2) has 65551 bytes"),
    ];
    for (number, (bytes, why)) in bad.iter().enumerate() {
        // Each source has a line a second.
        let source = format!("127.0.89.{}", 100 + number);
        let mut visitor = connect_from(&source, both.addresses[0]);
        visitor.write_all(bytes).unwrap();
        assert_reset(&visitor, DEADLINE);
        let line = format!("refused visitor through {source}:");
        let line = both.server.wait_for_line(&line);
        assert!(line.contains(why), "{line}");
    }
    let mut cut = both.visit();
    cut.write_all(b"PROXY TCP4 ").unwrap();
    cut.shutdown(Shutdown::Write).unwrap();
    assert_reset(&cut, DEADLINE);
    both.server
        .wait_for_line("it ended within its PROXY protocol header");
    both.server.signal(Signal::USR1);
    let status = both.server.wait_for_line("uptime=");
    let refused = format!(" refused={} ", bad.len() + 1);
    assert!(status.contains(&refused), "{status}");
    assert!(status.contains(" joined_total=0 "), "{status}");
}

/// Bytes that nobody can take for a header: one of the first ones is another, or all are random.
fn malformed(random: &mut Pattern) -> Vec<u8> {
    let mut bytes = [0; 8];
    random.fill(&mut bytes);
    let [kind, place, change, length, ..] = bytes;
    let mut header = match kind % 3 {
        0 => good(V1),
        1 => good(V2),
        _ => {
            let mut noise = vec![0; 1 + usize::from(length)];
            random.fill(&mut noise);
            // No header begins so.
            noise[0] |= 0x80;
            return noise;
        }
    };
    let place = usize::from(place) % if kind % 3 == 0 { 6 } else { SIGNATURE.len() };
    header[place] ^= change.max(1);
    header
}

fn thousands_of_malformed_headers_leave_nothing(protection: Protection) {
    const THREADS: usize = 4;
    const EACH: usize = 500;
    let (service, records) = Service::recording();
    let (server, _client) = behind(protection, &["127.0.0.1"], service.addr);
    thread::scope(|scope| {
        for number in 0..THREADS {
            let address = at("127.0.0.1", &server);
            scope.spawn(move || {
                let mut random = Pattern::new(number as u64 + 1);
                for _ in 0..EACH {
                    let mut visitor = connect(address);
                    // It may be refused by the first bytes already.
                    let _ = visitor.write_all(&malformed(&mut random));
                    assert_reset(&visitor, DEADLINE);
                }
            });
        }
    });
    let status = server.handle().status().unwrap();
    assert_eq!(status.refused, (THREADS * EACH) as u64);
    assert_eq!(status.joined_total, 0);
    let mut visitor = connect(at("127.0.0.1", &server));
    visitor.write_all(&good(V1)).unwrap();
    assert_header(&visitor, &records, &good(V2), b"hello");
}

fn who_is_no_proxy_is_refused(protection: Protection) {
    let service = Service::echo();
    let both = both(
        protection,
        service.addr,
        &["--accept-proxy", "127.0.89.32/30"],
    );
    for stranger in ["127.0.89.31", "127.0.89.36"] {
        assert_refused(stranger, both.addresses[0]);
        let line = format!("refused visitor from {stranger}: none of the proxies (--accept-proxy)");
        both.server.wait_for_line(&line);
    }
    for proxy in ["127.0.89.32", "127.0.89.35"] {
        let mut visitor = connect_from(proxy, both.addresses[0]);
        visitor.write_all(&good(V1)).unwrap();
        assert_echo(&visitor, "hello");
    }
    both.server
        .wait_for_lines(&format!("visitor {FROM}: 5 bytes up"), 2);
    both.client
        .wait_for_lines(&format!("visitor {FROM}: 5 bytes up"), 2);
    both.server.signal(Signal::USR1);
    both.server.wait_for_line(" refused=2 ");
}

/// What the log of a server says of visitors.
fn lines_of_visitors(server: &Program) -> Vec<String> {
    let mut lines = server.lines_with("visitor");
    lines.retain(|line| !line.contains("listening on"));
    lines
}

fn a_balancers_look_costs_no_tunnel_and_no_line(protection: Protection) {
    let service = Service::echo();
    let both = both(protection, service.addr, &["-v"]);
    for kind in 0..5 {
        for resets in [false, true] {
            for _ in 0..10 {
                let mut look = both.visit();
                let own = [V1, V2].map(|version| header_of(version, &look));
                let header = [vec![], unknown(V1), unknown(V2)]
                    .into_iter()
                    .chain(own)
                    .nth(kind)
                    .unwrap();
                look.write_all(&header).unwrap();
                if resets {
                    reset_on_close(&look);
                }
            }
        }
    }
    both.assert_recovered(|mut visitor| {
        visitor.write_all(&good(V1)).unwrap();
        assert_echo(visitor, "hello");
    });
    // One whose end comes late, as on a busy host, is taken for a visitor: a line when it comes, and one
    // when it has left.
    let lines = lines_of_visitors(&both.server);
    let others = lines.iter().filter(|line| !line.contains(FROM));
    assert!(others.count() <= 2 * 5, "{lines:#?}");
    both.server.signal(Signal::USR1);
    let status = both.server.wait_for_line("uptime=");
    let joined = (1..=6).any(|it| status.contains(&format!(" joined_total={it} ")));
    assert!(joined, "{status}");
    assert!(status.contains(" refused=0 timed_out=0"), "{status}");
}

fn silent_proxies_hold_nobody_up(protection: Protection) {
    raise_descriptors();
    let _turn = take_turn();
    let service = Service::echo();
    for (most, silent) in [("4096", 2500), ("8", 60)] {
        let both = both(
            protection,
            service.addr,
            &["-m", most, "--accept-proxy", "127.0.89.0/24"],
        );
        let silent: Vec<_> = (0..silent)
            .map(|_| connect_from("127.0.89.40", both.addresses[0]))
            .collect();
        for _ in 0..4 {
            let start = Instant::now();
            let mut visitor = both.visit();
            visitor.write_all(&good(V1)).unwrap();
            assert_echo(&visitor, "hello");
            // Less than a header may take.
            let served = start.elapsed();
            assert!(served < Duration::from_secs(4), "{served:?}");
        }
        both.server
            .wait_for_line("others came before its PROXY protocol header did");
        drop(silent);
    }
}

fn a_stop_waits_for_a_header_under_way(protection: Protection) {
    let service = Service::start(|mut socket| {
        let mut header = good(V2);
        socket.read_exact(&mut header).unwrap();
        socket.write_all(b"hello").unwrap();
    });
    let (mut server, _client) = behind(protection, &["127.0.0.1"], service.addr);
    let mut visitor = connect(at("127.0.0.1", &server));
    visitor.write_all(&good(V1)[..10]).unwrap();
    thread::sleep(Duration::from_millis(100));
    server.handle().stop(DEADLINE);
    // Longer than the server waits for the next one, and for connections that are under way.
    thread::sleep(Duration::from_secs(1));
    visitor.write_all(&good(V1)[10..]).unwrap();
    let mut said = Vec::new();
    visitor.read_to_end(&mut said).unwrap();
    assert_eq!(said, b"hello");
    drop(visitor);
    server.wait_for_end();
}

/// What is answered to a request by HTTP.
fn get(visitor: &TcpStream) -> String {
    { visitor }.write_all(b"GET / HTTP/1.0\r\n\r\n").unwrap();
    let mut answer = String::new();
    { visitor }.read_to_string(&mut answer).unwrap();
    let body = answer.split("\r\n\r\n").nth(1);
    body.unwrap_or_else(|| panic!("{answer:?}")).to_owned()
}

/// HAProxy in front of a server, which it says this to.
fn haproxy_in_front(host: &str, server: SocketAddr, says: &str) -> Proxy {
    Proxy::haproxy(host, |address| {
        format!("listen visitors\n mode tcp\n bind {address}\n server one {server} {says}\n")
    })
}

/// `a b` for a visitor and what it came to.
fn ends_of(visitor: &TcpStream) -> String {
    let (from, to) = (visitor.local_addr().unwrap(), visitor.peer_addr().unwrap());
    let ends = [from, to].map(|it| format!("{} {}", it.ip(), it.port()));
    ends.join(" ")
}

/// A visitor of IPv4 and one of IPv6, through what is put in front of the server.
fn assert_says_who_comes(protection: Protection, in_front: impl Fn(&str, SocketAddr) -> Proxy) {
    let (service, records) = Service::recording();
    let (server, _client) = behind(protection, &["127.0.0.1", "::1"], service.addr);
    for (host, near, source) in [
        ("127.0.89.50", "127.0.0.1", "127.0.89.51"),
        ("::1", "::1", "::1"),
    ] {
        let proxy = in_front(host, at(near, &server));
        let visitor = connect_from(source, proxy.address);
        // A connection that has ended on both sides has no far address any more.
        let wanted = Record::whole(&[&header_of(V2, &visitor)[..], b"hello"].concat());
        { &visitor }.write_all(b"hello").unwrap();
        visitor.shutdown(Shutdown::Write).unwrap();
        // Those before are of the ones that looked whether it listens.
        while records.recv_timeout(DEADLINE).unwrap() != wanted {}
    }
}

fn haproxy_says_who_comes(protection: Protection) {
    for says in ["send-proxy", "send-proxy-v2"] {
        assert_says_who_comes(protection, |host, server| {
            haproxy_in_front(host, server, says)
        });
    }
}

fn nginx_stream_says_who_comes(protection: Protection) {
    assert_says_who_comes(protection, |host, server| {
        Proxy::nginx_for_tcp(host, |address| {
            format!("server {{ listen {address}; proxy_pass {server}; proxy_protocol on; }}")
        })
    });
}

/// A server at this host, and a client that tells this service.
fn told(
    protection: Protection,
    host: &str,
    version: ProxyVersion,
    local: SocketAddr,
) -> (RunningServer, RunningClient) {
    let (server, client) = tunnel(protection, host, version, local);
    assert!(client.handle().wait_for_session(DEADLINE));
    (server, client)
}

fn haproxy_is_told_who_comes(protection: Protection) {
    let service = Proxy::haproxy("127.0.89.60", |address| {
        format!(
            "frontend service\n mode http\n bind {address} accept-proxy\n http-request return \
             status 200 content-type text/plain lf-string \"%[src] %[src_port] %[dst] %[dst_port]\"\n"
        )
    });
    assert_is_told(protection, &service);
}

fn nginx_is_told_who_comes(protection: Protection) {
    let service = Proxy::nginx("127.0.89.61", |address| {
        format!(
            "server {{ listen {address} proxy_protocol; access_log off; return 200 \
             \"$proxy_protocol_addr $proxy_protocol_port $proxy_protocol_server_addr \
             $proxy_protocol_server_port\"; }}"
        )
    });
    assert_is_told(protection, &service);
}

fn assert_is_told(protection: Protection, service: &Proxy) {
    for version in [V1, V2] {
        for (host, source) in [("127.0.0.1", "127.0.89.62"), ("::1", "::1")] {
            let (server, _client) = told(protection, host, version, service.address);
            let visitor = connect_from(source, server.public);
            let ends = ends_of(&visitor);
            assert_eq!(get(&visitor), ends);
        }
    }
}

/// HAProxy, tpserver, tpclient, nginx.
fn a_visitors_address_passes_through_haproxy_and_nginx(protection: Protection) {
    let nginx = Proxy::nginx("127.0.89.70", |address| {
        format!(
            "log_format real '$proxy_protocol_addr $request'; access_log access.log real; \
             server {{ listen {address} proxy_protocol; return 200 hello; }}"
        )
    });
    let launch = Launch::new(protection);
    let server = launch.server(&["--accept-proxy", "127.0.0.1"]);
    let addresses = server.addresses();
    let client = launch.client(addresses, nginx.address, &["--proxy-protocol", "v2"]);
    client.wait_for_line("connected to");
    let haproxy = haproxy_in_front("127.0.89.71", addresses[0], "send-proxy-v2");
    let visitor = connect_from("127.0.89.72", haproxy.address);
    assert_eq!(get(&visitor), "hello");
    let from = visitor.local_addr().unwrap();
    drop(visitor);
    for program in [&server, &client] {
        program.wait_for_line(&format!("visitor {from}: "));
    }
    let log = || std::fs::read_to_string(nginx.file("access.log")).unwrap_or_default();
    eventually("nginx logs the visitor", || {
        log().contains("127.0.89.72 GET / HTTP/1.0")
    });
}

fn the_health_check_of_haproxy_costs_no_tunnel_and_no_line(protection: Protection) {
    let service = Service::echo();
    let both = both(protection, service.addr, &["-v"]);
    let checks = [
        "send-proxy-v2 check inter 50ms",
        "send-proxy check inter 50ms",
        "check inter 50ms",
        "check check-send-proxy inter 50ms",
    ];
    for says in checks {
        let _proxy = haproxy_in_front("127.0.89.80", both.addresses[0], says);
        thread::sleep(Duration::from_millis(700));
    }
    // Of each, one visitor has looked whether it listens.
    let came = both.server.lines_with(" came").len();
    assert!(came <= checks.len() + 1, "{came} came");
    let refused = both.server.lines_with("refused");
    assert!(refused.is_empty(), "{refused:#?}");
    both.server.signal(Signal::USR1);
    let status = both.server.wait_for_line("uptime=");
    assert!(status.contains(" refused=0 timed_out=0"), "{status}");
}
