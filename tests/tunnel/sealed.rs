//! What a key changes: the wire itself, and what somebody can do who has none.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use tunnel_proxy::Key;

use crate::support::peer::{
    CONTROL, DATA, END, FIRST_FRAME, HandMadeServer, LINE, MAX_FRAME, OVERHEAD, Peer, TUNNEL,
};
use crate::support::programs::{Launch, Program};
use crate::support::{
    DEADLINE, Protection, Record, RunningClient, RunningServer, Service, accept, assert_echo,
    assert_reset, client_options, connect, server_options, with,
};

const VISITOR: &str = "new visitor=192.0.2.1:50000\n";

fn sealed_server() -> RunningServer {
    RunningServer::start(server_options(Protection::Sealed))
}

fn hand_made_server(service: &Service) -> HandMadeServer {
    HandMadeServer::start(Protection::Sealed, service.addr, 1)
}

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
        tunnel.write("tunnel\n");
        tunnel.write([b'x'; 100_000]);
        tunnel.end();
        assert_eq!(tunnel.line(), "new\n");
        assert_eq!(tunnel.read(4), b"back");
        tunnel.assert_ended();
    });
    let mut control = Peer::accept_control(&listener, Protection::Sealed);
    let mut tunnel = Peer::accept_tunnel(&listener, &control);
    assert_eq!(control.line(), "hello\n");
    control.write("hi\n");
    assert_eq!(tunnel.line(), "tunnel\n");
    assert_eq!(tunnel.read(100_000), [b'x'; 100_000]);
    tunnel.assert_ended();
    tunnel.write("new\nback");
    tunnel.end();
    dialling.join().unwrap();
    assert_eq!(control.line(), "");
}

#[test]
fn frames_may_be_cut_anywhere_on_the_wire() {
    let (service, records) = Service::recording();
    let mut server = hand_made_server(&service);
    for cut in 0.. {
        // On a busy machine all cuts take longer than a link may be silent.
        server.control.write("hi\n");
        let mut tunnel = server.tunnel();
        let mut wire = tunnel.wire(format!("{VISITOR}first"));
        wire.extend(tunnel.wire("second"));
        wire.extend(tunnel.frame(END, b""));
        if cut > wire.len() {
            break;
        }
        tunnel.socket.write_all(&wire[..cut]).unwrap();
        // The pause makes two reads of the two pieces.
        thread::sleep(Duration::from_millis(3));
        tunnel.socket.write_all(&wire[cut..]).unwrap();
        let record = records.recv_timeout(DEADLINE).unwrap();
        assert_eq!(record, Record::whole(b"firstsecond"), "cut at {cut}");
    }
}

#[test]
fn frames_of_every_size_are_understood() {
    const LARGEST: usize = MAX_FRAME - OVERHEAD;
    let (service, records) = Service::recording();
    let server = hand_made_server(&service);
    let mut tunnel = server.tunnel();
    let (mut wire, mut bytes) = (tunnel.wire(VISITOR), Vec::new());
    for (number, size) in [
        0, 1, 255, 0, 8191, 8192, 8193, LARGEST, 0, 16384, LARGEST, 5,
    ]
    .into_iter()
    .enumerate()
    {
        let payload = vec![number as u8; size];
        wire.extend(tunnel.frame(DATA, &payload));
        bytes.extend(payload);
    }
    tunnel.socket.write_all(&wire).unwrap();
    tunnel.end();
    let record = records.recv_timeout(DEADLINE).unwrap();
    assert!(record == Record::whole(&bytes), "{} bytes", bytes.len());
}

#[test]
fn the_end_of_a_stream_leaves_the_connection_open() {
    let (sender, records) = mpsc::channel();
    let service = Service::start(move |mut socket| {
        socket.write_all(b"greeting").unwrap();
        socket.shutdown(Shutdown::Write).unwrap();
        let _ = sender.send(Record::of(&socket));
    });
    let server = hand_made_server(&service);
    let mut tunnel = server.tunnel();
    tunnel.write(VISITOR);
    assert_eq!(tunnel.read(8), b"greeting");
    tunnel.assert_ended();
    let moment = Some(Duration::from_millis(200));
    tunnel.socket.set_read_timeout(moment).unwrap();
    let error = tunnel.socket.peek(&mut [0]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::WouldBlock);
    tunnel.socket.set_read_timeout(Some(DEADLINE)).unwrap();
    tunnel.write("later");
    tunnel.end();
    // The connection is there for the next visitor when both directions have ended.
    assert_eq!(tunnel.line(), "idle\n");
    let record = records.recv_timeout(DEADLINE).unwrap();
    assert_eq!(record, Record::whole(b"later"));
    tunnel.write(VISITOR);
    assert_eq!(tunnel.read(8), b"greeting");
}

#[test]
fn the_first_frame_is_at_most_a_line_and_every_frame_of_a_known_kind() {
    let server = sealed_server();
    let padded = |size| {
        let mut lines = "hello proto=2 pool=0\n".to_owned();
        lines += &"\n".repeat(size - lines.len());
        lines.into_bytes()
    };
    let longest = FIRST_FRAME - OVERHEAD;
    for (kind, payload) in [
        (LINE, padded(longest + 1)),
        (END, b"hello proto=2 pool=0\n".to_vec()),
        (END, Vec::new()),
        (DATA, b"hello proto=2 pool=0\n".to_vec()),
    ] {
        let mut stranger = Peer::dial_control(&server);
        let frame = stranger.frame(kind, &payload);
        stranger.socket.write_all(&frame).unwrap();
        assert_eq!(stranger.read_until_closed(), b"", "{kind} {payload:?}");
    }
    // These lengths are shorter than any frame.
    for length in [0, 1, 16] {
        let mut stranger = Peer::dial_control(&server);
        stranger.socket.write_all(&[0, length]).unwrap();
        assert_eq!(stranger.read_until_closed(), b"", "{length}");
    }
    let mut client = Peer::dial_control(&server);
    let frame = client.frame(LINE, &padded(longest));
    client.socket.write_all(&frame).unwrap();
    let answer = client.line();
    assert!(
        answer.starts_with("hello proto=2 pool=0 linger=600000 session="),
        "{answer}"
    );
}

#[test]
fn only_who_has_the_key_becomes_the_client() {
    let (service, other) = (Service::echo(), Key::generate().unwrap());
    let server = sealed_server();
    let wrong = Peer::sealed(connect(server.control), &other, true, CONTROL);
    assert!(wrong.is_err(), "a handshake with another key");
    let mut plain = Peer::plain(connect(server.control));
    plain.write("hello proto=2 pool=8\n");
    assert_eq!(plain.read_until_closed(), b"bye reason=wants-key\n");
    // Clients without the key go on trying, while the one that has it serves.
    let _others = [Some(other), None].map(|key| {
        let options = client_options(&server, service.addr);
        RunningClient::start(with!(options; key))
    });
    let visitor = server.visit();
    let _client = RunningClient::start(client_options(&server, service.addr));
    assert_echo(&visitor, "served");
}

#[test]
fn both_programs_say_when_only_one_of_them_has_a_key() {
    let service = Service::echo();
    let (server, addresses) = Program::server(Protection::Plain, &[]);
    let client = Program::client(Protection::Sealed, addresses, service.addr, &[]);
    server.wait_for_line("it has a key, and this server has none");
    client.wait_for_line("it has no key, and this client has one");

    let (server, addresses) = Program::server(Protection::Sealed, &[]);
    let client = Program::client(Protection::Plain, addresses, service.addr, &[]);
    server.wait_for_line("it came without a key (--key-file)");
    client.wait_for_line("it wants a key (--key-file)");
}

#[test]
fn no_log_shows_the_key() {
    let service = Service::echo();
    let launch = Launch::new(Protection::Sealed);
    let server = launch.rust_log(Some("trace")).server(&[]);
    let addresses = server.addresses();
    let client = Program::client(Protection::Sealed, addresses, service.addr, &["-v"]);
    assert_echo(&connect(addresses[0]), "served");
    for program in [&server, &client] {
        program.wait_for_line("bytes down");
        let key = Protection::Sealed.key().unwrap().to_base64();
        for start in 0..key.len() - 8 {
            assert_eq!(program.lines_with(&key[start..start + 8]), [""; 0]);
        }
    }
}

#[test]
fn both_programs_say_when_they_have_two_keys() {
    let service = Service::echo();
    let mut file = tempfile::NamedTempFile::new().unwrap();
    let other = Key::generate().unwrap().to_base64();
    writeln!(file, "{other}").unwrap();
    let (server, addresses) = Program::server(Protection::Sealed, &[]);
    let arguments = ["--key-file", file.path().to_str().unwrap()];
    let client = Program::client(Protection::Sealed, addresses, service.addr, &arguments);
    server.wait_for_line(": wrong key");
    client.wait_for_line("wrong key (--key-file): the server has another one; trying again");
    // The client goes on trying: for each wrong client, the server has a line a second at the most.
    server.wait_for_line("more like this before, not logged");
    for program in [&server, &client] {
        assert_eq!(program.lines_with(&other[..8]), [""; 0]);
    }
}

/// The client must not take the server for an original one, and send everything in the clear.
#[test]
fn a_client_with_a_key_leaves_a_server_without_one() {
    for first in ["hi\n", "hello proto=2 session=0 pool=8\n"] {
        let service = Service::echo();
        let (controls, tunnels) = (listener(), listener());
        let _client = RunningClient::of(Protection::Sealed, &controls, &tunnels, service.addr, 8);
        let mut control = Peer::plain(accept(&controls));
        control.write(format!("{first}new\nnew\n"));
        let said = control.read_until_closed();
        assert!(said.len() <= 50, "more than a handshake: {said:?}");
        tunnels.set_nonblocking(true).unwrap();
        assert!(tunnels.accept().is_err(), "a tunnel to a stranger");
    }
}

/// An original server has no key: one that says no hello behind a handshake is none.
#[test]
fn a_client_with_a_key_takes_no_server_for_the_original() {
    let service = Service::echo();
    let (controls, tunnels) = (listener(), listener());
    let _client = RunningClient::of(Protection::Sealed, &controls, &tunnels, service.addr, 8);
    let mut control = Peer::accept_control(&controls, Protection::Sealed);
    assert_eq!(control.line(), "hello proto=2 pool=8 linger=600000\n");
    control.write("hi\nnew\n");
    assert_eq!(control.read_until_closed(), b"");
    tunnels.set_nonblocking(true).unwrap();
    assert!(tunnels.accept().is_err(), "a raw tunnel");
}

fn listener() -> TcpListener {
    TcpListener::bind("127.0.0.1:0").unwrap()
}

#[test]
fn a_tunnel_belongs_to_one_session_only() {
    let server = sealed_server();
    let key = server.key.clone().unwrap();
    let mut before = Peer::dial_control(&server);
    before.say_hello(0);
    before.write("bye reason=draining\n");
    before.read_until_closed();
    let mut control = Peer::dial_control(&server);
    let session = control.say_hello(1);
    let prologues = [
        before.prologue_of_tunnels(),
        TUNNEL.to_vec(),
        CONTROL.to_vec(),
        Vec::new(),
    ];
    for prologue in prologues {
        let tunnel = Peer::sealed(connect(server.tunnel), &key, true, &prologue);
        assert!(tunnel.is_err(), "{prologue:?}");
    }
    let of_its_own = Peer::sealed(
        connect(server.tunnel),
        &Key::generate().unwrap(),
        true,
        &control.prologue_of_tunnels(),
    );
    assert!(of_its_own.is_err(), "another key than the session's");
    // The client's side of a tunnel is silent before it has a visitor.
    let mut talkative = Peer::dial_tunnel(&server, &control);
    talkative.write(format!("tunnel session={session}\nmore"));
    assert_eq!(talkative.read_until_closed(), b"");
    let mut tunnel = Peer::dial_tunnel(&server, &control);
    tunnel.write(format!("tunnel session={session}\n"));
    let visitor = server.visit();
    tunnel.assert_given(&visitor, "");
}

/// Who makes a frame longer gets no byte through; the next frame shows it.
#[test]
fn a_changed_length_is_noticed_with_the_next_bytes() {
    let server = sealed_server();
    let mut control = Peer::dial_control(&server);
    let session = control.say_hello(1);
    let mut tunnel = Peer::dial_tunnel(&server, &control);
    tunnel.write(format!("tunnel session={session}\n"));
    let mut visitor = server.visit();
    tunnel.assert_given(&visitor, "");
    let mut longer = tunnel.frame(DATA, b"changed");
    longer[1] += 1;
    tunnel.socket.write_all(&longer).unwrap();
    let wait = Some(Duration::from_millis(300));
    visitor.set_read_timeout(wait).unwrap();
    let error = visitor.read(&mut [0]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::WouldBlock);
    visitor.set_read_timeout(Some(DEADLINE)).unwrap();
    let next = tunnel.frame(DATA, b"not changed");
    tunnel.socket.write_all(&next).unwrap();
    assert_reset(&visitor, DEADLINE / 4);
}

#[test]
fn a_silent_server_is_left() {
    let service = Service::echo();
    let (controls, tunnels) = (listener(), listener());
    let _client = RunningClient::of(Protection::Sealed, &controls, &tunnels, service.addr, 8);
    let server = accept(&controls);
    let start = Instant::now();
    // The client's half of a handshake comes, and then the end.
    assert_eq!(Record::of(&server).bytes.len(), 50);
    let bounds = Duration::from_millis(4500)..Duration::from_millis(9000);
    assert!(bounds.contains(&start.elapsed()), "{:?}", start.elapsed());
}
