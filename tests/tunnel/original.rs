//! The other half of the original, made by hand byte for byte, with ours.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use crate::support::peer::Peer;
use crate::support::{
    Protection, RunningClient, RunningServer, Service, accept, assert_echo, assert_ended,
    closed_port, connect, eventually, expect_pattern, send_pattern, server_options, unnamed, with,
};
use tunnel_proxy::{ClientOptions, ServerOptions};

/// The original client: reads lines; on `new` dials the local service, then the tunnel port, and
/// copies raw bytes. It never writes to the control link.
fn original_client(control: SocketAddr, tunnel: SocketAddr, local: SocketAddr) -> TcpStream {
    let link = connect(control);
    let reader = BufReader::new(link.try_clone().unwrap());
    thread::spawn(move || {
        for line in reader.lines().map_while(Result::ok) {
            if line == "new" {
                let (local, remote) = (connect(local), connect(tunnel));
                copy_and_close(local.try_clone().unwrap(), remote.try_clone().unwrap());
                copy_and_close(remote, local);
            }
        }
    });
    link
}

/// A server that takes original clients, too.
fn original_server() -> RunningServer {
    RunningServer::start(original_options())
}

fn original_options() -> ServerOptions {
    with!(server_options(Protection::Plain);
            original: true,
    )
}

/// Copies as the original's io.Copy does, with its two deferred closes.
fn copy_and_close(mut from: TcpStream, mut to: TcpStream) {
    thread::spawn(move || {
        let _ = std::io::copy(&mut from, &mut to);
        let _ = (from.shutdown(Shutdown::Both), to.shutdown(Shutdown::Both));
    });
}

#[test]
fn an_original_client_is_served() {
    let service = Service::echo();
    let server = original_server();
    // This visitor waits from before the client is known to be an original one.
    let early = server.visit();
    let _link = original_client(server.control, server.tunnel, service.addr);
    assert_echo(&early, "early");
    for number in 0..10 {
        let visitor = server.visit();
        assert_echo(&visitor, &format!("visitor {number}"));
        thread::scope(|scope| {
            scope.spawn(|| send_pattern(&visitor, number, 1_000_000));
            expect_pattern(&visitor, number, 1_000_000);
        });
    }
}

#[test]
fn an_original_client_gets_the_originals_bytes() {
    let server = original_server();
    let mut client = Peer::dial_control(&server);
    let mut lines = vec![client.line(), client.line()];
    let _visitors = (server.visit(), server.visit());
    while lines.iter().filter(|line| *line == "new\n").count() < 2 {
        lines.push(client.line());
    }
    lines.retain(|line| line != "hi\n" && line != "new\n");
    assert_eq!(lines, Vec::<String>::new(), "nothing that it does not know");
    // Its tunnels are raw from the first byte on, and one without a visitor is closed.
    let tunnels = [(); 3].map(|()| connect(server.tunnel));
    for tunnel in &tunnels {
        let moment = Some(Duration::from_millis(50));
        tunnel.set_read_timeout(moment).unwrap();
    }
    eventually("one is closed", || {
        let closed = tunnels.iter().map(|it| matches!(it.peek(&mut [0]), Ok(0)));
        closed.filter(|it| *it).count() == 1
    });
}

#[test]
fn an_original_client_is_undisturbed_by_refused_ones() {
    let service = Service::echo();
    let server = original_server();
    let _link = original_client(server.control, server.tunnel, service.addr);
    let visitor = server.visit();
    assert_echo(&visitor, "before");
    let others: Vec<_> = (0..940).map(|_| connect(server.control)).collect();
    for other in others {
        // It is refused after the second that a hello may take, or sent away by the next in line.
        let mut got = String::new();
        let _ = (&other).read_to_string(&mut got);
        assert!(["", "bye reason=busy\n"].contains(&&*got), "{got:?}");
    }
    let others: Vec<_> = (0..60).map(|_| connect(server.control)).collect();
    for mut other in others {
        let mut got = String::new();
        other.read_to_string(&mut got).unwrap();
        assert_eq!(got, "bye reason=busy\n");
    }
    assert_echo(&visitor, "after");
    assert_echo(&server.visit(), "a new one");
}

#[test]
fn a_client_that_never_said_hello_gives_way_to_one_that_does() {
    let server = original_server();
    let mut original = Peer::dial_control(&server);
    assert_eq!(original.line(), "hi\n");
    let mut client = Peer::dial_control(&server);
    assert_eq!(client.say_hello(8).len(), 32);
    assert_eq!(original.line_after_hi(), "");
    // An original client does not push out one that has said hello.
    let silent = connect(server.control);
    let mut got = String::new();
    (&silent).read_to_string(&mut got).unwrap();
    assert_eq!(got, "bye reason=busy\n");
    let _visitor = server.visit();
    assert_eq!(client.line_after_hi(), "new\n");
}

#[test]
fn an_original_client_that_leaves_makes_room() {
    let server = original_server();
    let mut first = Peer::dial_control(&server);
    assert_eq!(first.line(), "hi\n");
    drop(first);
    let mut second = Peer::dial_control(&server);
    assert_eq!(second.line(), "hi\n");
}

/// The original server: writes `hi` at once and every 2 s, and `new` for a visitor.
struct OriginalServer {
    control: Peer,
    tunnels: TcpListener,
    _client: RunningClient,
}

impl OriginalServer {
    fn start(local: SocketAddr) -> Self {
        Self::beginning_with(local, "hi\n")
    }

    fn beginning_with(local: SocketAddr, first: &str) -> Self {
        let controls = TcpListener::bind("127.0.0.1:0").unwrap();
        let tunnels = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = RunningClient::start(with!(ClientOptions::default();
                    servers: vec![controls.local_addr().unwrap().into()],
                    tunnel_port: Some(tunnels.local_addr().unwrap().port()),
                    local: unnamed(local),
                    original: true,
        ));
        let mut control = Peer::accept_control(&controls, Protection::Plain);
        control.write(first);
        Self {
            control,
            tunnels,
            _client: client,
        }
    }

    fn visit(&mut self) -> TcpStream {
        self.control.write("new\n");
        accept(&self.tunnels)
    }
}

#[test]
fn an_original_server_is_served() {
    let service = Service::start(|mut socket| {
        socket.write_all(b"greeting").unwrap();
        expect_pattern(&socket, 1, 1_000_000);
        assert_ended(&socket);
        send_pattern(&socket, 2, 1_000_000);
    });
    let mut server = OriginalServer::start(service.addr);
    for _ in 0..10 {
        // The tunnel is raw from the first byte: no line of its own comes before the service's
        // greeting.
        let tunnel = server.visit();
        let mut greeting = [0; 8];
        (&tunnel).read_exact(&mut greeting).unwrap();
        assert_eq!(&greeting, b"greeting");
        send_pattern(&tunnel, 1, 1_000_000);
        tunnel.shutdown(Shutdown::Write).unwrap();
        expect_pattern(&tunnel, 2, 1_000_000);
        assert_ended(&tunnel);
    }
}

#[test]
fn an_original_server_sees_a_refused_local_service_at_once() {
    let refusing = closed_port();
    let mut server = OriginalServer::start(refusing.addr);
    let tunnel = server.visit();
    crate::support::assert_reset(&tunnel, Duration::from_secs(4));
}

#[test]
fn an_original_server_is_told_hello_and_nothing_more() {
    let service = Service::echo();
    let mut server = OriginalServer::start(service.addr);
    assert_eq!(
        server.control.line(),
        "hello proto=2 pool=8 linger=600000\n"
    );
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(3) {
        thread::sleep(Duration::from_secs(1));
        server.control.write("hi\n");
    }
    server.control.socket.set_nonblocking(true).unwrap();
    let error = server.control.socket.read(&mut [0; 64]).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock);
    // No tunnel is dialled before it is asked for.
    server.tunnels.set_nonblocking(true).unwrap();
    assert!(server.tunnels.accept().is_err());
    server.control.socket.set_nonblocking(false).unwrap();
    assert_echo(&server.visit(), "asked for");
}

#[test]
fn an_original_clients_visitors_time_out_as_they_did() {
    let server = RunningServer::start(with!(original_options();
            pair_timeout: Duration::from_millis(1500),
    ));
    // This client says nothing and dials nothing, like one whose local service refuses.
    let _client = connect(server.control);
    // One visitor that has timed out changes nothing for the next one.
    for _ in 0..2 {
        let start = Instant::now();
        assert_ended(&server.visit());
        assert!(start.elapsed() >= Duration::from_millis(1400));
    }
}

/// A hello that comes too late is no sign of an original client, and whoever is silent is none
/// unless the server was told to expect one.
#[test]
fn silence_makes_nobody_a_client_without_the_option() {
    let server = RunningServer::start(server_options(Protection::Plain));
    let mut silent = Peer::dial_control(&server);
    let start = Instant::now();
    assert_eq!(silent.line(), "");
    assert!(
        start.elapsed() >= Duration::from_secs(4),
        "{:?}",
        start.elapsed()
    );
    let mut late = Peer::dial_control(&server);
    thread::sleep(Duration::from_millis(1200));
    assert_eq!(late.say_hello(0).len(), 32);
    // Nobody is handed a visitor who cannot name the session.
    let _visitor = server.visit();
    assert_eq!(late.line_after_hi(), "new\n");
    let mut stranger = connect(server.tunnel);
    stranger.write_all(b"\n").unwrap();
    assert_ended(&stranger);
}

#[test]
fn a_hello_that_comes_late_ends_an_original_link_and_is_asked_again() {
    let server = original_server();
    let mut late = Peer::dial_control(&server);
    assert_eq!(late.line(), "hi\n", "taken for an original one");
    late.write("hello proto=2 pool=0\n");
    assert_eq!(late.line_after_hi(), "bye reason=late\n");
    assert_eq!(late.line(), "");
    let mut again = Peer::dial_control(&server);
    assert_eq!(again.say_hello(0).len(), 32);
}

#[test]
fn an_original_server_is_left_alone_without_the_option() {
    let service = Service::echo();
    let controls = TcpListener::bind("127.0.0.1:0").unwrap();
    let tunnels = TcpListener::bind("127.0.0.1:0").unwrap();
    let _client = RunningClient::of(Protection::Plain, &controls, &tunnels, service.addr, 8);
    for first in ["hi\n", "new\n"] {
        let mut control = Peer::accept_control(&controls, Protection::Plain);
        assert_eq!(control.line(), "hello proto=2 pool=8 linger=600000\n");
        control.write(first);
        assert_eq!(control.line(), "", "{first:?}");
    }
}

/// A server that says anything else first is no original one.
#[test]
fn only_hi_and_new_are_an_original_servers_first_line() {
    let service = Service::echo();
    for first in [
        "SSH-2.0-OpenSSH_9.2\r\n",
        "hey\n",
        "new visitor=192.0.2.1:1\n",
    ] {
        let mut server = OriginalServer::beginning_with(service.addr, first);
        assert_eq!(
            server.control.line(),
            "hello proto=2 pool=8 linger=600000\n"
        );
        assert_eq!(server.control.line(), "", "{first:?}");
    }
}
