//! Where a visitor comes from, by headers of the PROXY protocol: before a local service
//! (`--proxy-protocol`) and behind a proxy (`--accept-proxy`).
#![cfg(target_os = "linux")]

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc::Receiver;

use crate::support::peer::{Peer, session_in};
use crate::support::{
    DEADLINE, Protection, Record, RunningClient, RunningServer, Service, accept, any,
    client_options, connect, plain_and_sealed, server_options, unnamed, with,
};
use tunnel_proxy::{Address, ClientOptions, ProxyVersion};

plain_and_sealed! {
    the_header_comes_first_on_every_connection,
    a_service_that_speaks_first_waits_for_the_header,
    each_service_has_a_header_of_its_own,
    two_clients_that_answer_say_the_header_too,
    a_client_asks_for_the_address_only_if_it_needs_it,
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
        let from = visitor.local_addr().unwrap();
        let to = if to {
            format!(" to={}", server.public)
        } else {
            String::new()
        };
        assert_eq!(tunnel.line(), format!("new visitor={from}{to}\n"));
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
    assert_eq!(control.line(), "hello proto=2 pool=1 to=1\n");
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
