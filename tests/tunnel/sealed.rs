//! What a key changes: the wire itself, and what somebody can do who has none.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tunnel_proxy::{ClientOptions, Key, ServerOptions};

use crate::peer::{
    CONTROL, DATA, END, FIRST_FRAME, HandMadeServer, MAX_FRAME, OVERHEAD, Peer, TUNNEL,
};
use crate::support::{
    DEADLINE, Program, Protection, Record, RunningClient, RunningServer, Service, accept,
    assert_echo, client_options, connect, server_options,
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

#[test]
fn frames_may_be_cut_anywhere_on_the_wire() {
    let (service, records) = Service::recording();
    let server = hand_made_server(&service);
    for cut in 0.. {
        let mut tunnel = server.tunnel();
        let mut wire = tunnel.wire(format!("{VISITOR}first"));
        wire.extend(tunnel.wire("second"));
        wire.extend(tunnel.frame(END, b""));
        if cut > wire.len() {
            break;
        }
        tunnel.socket.write_all(&wire[..cut]).unwrap();
        // So that the two pieces are two reads.
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
    let service = Service::start(|mut socket| {
        socket.write_all(b"greeting").unwrap();
        socket.shutdown(Shutdown::Write).unwrap();
        let record = Record::of(&socket);
        assert_eq!(record, Record::whole(b"later"));
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
    // Both directions have ended: now the connection does.
    assert_eq!(tunnel.read_until_closed(), b"");
}

/// What is made of a frame with an `a`, one with a `b`, and the end, and what it is called.
type Tampering = (&'static str, fn([Vec<u8>; 3]) -> Vec<u8>);

/// All of it is followed by an end of the connection.
const TAMPERINGS: [Tampering; 10] = [
    ("cut off before the end", |[a, b, _]| [a, b].concat()),
    ("cut off in a frame", |[a, b, _]| [&a[..], &b[..5]].concat()),
    ("cut off in a length", |[a, b, _]| {
        [&a[..], &b[..1]].concat()
    }),
    ("without a frame", |[a, _, end]| [a, end].concat()),
    ("twice the same", |[a, b, end]| {
        [a.clone(), a, b, end].concat()
    }),
    ("in another order", |[a, b, end]| [b, a, end].concat()),
    ("a changed text", |[a, b, end]| {
        [a, flipped(b, 2), end].concat()
    }),
    ("a changed tag", |[a, b, end]| {
        [a, flipped(b, 19), end].concat()
    }),
    ("a changed length", |[a, b, end]| {
        [a, flipped(b, 1), end].concat()
    }),
    ("bytes in between", |[a, b, end]| {
        [a, vec![0, 17, 7, 7], b, end].concat()
    }),
];

fn flipped(mut frame: Vec<u8>, at: usize) -> Vec<u8> {
    frame[at] ^= 1;
    frame
}

fn send_tampered(tunnel: &mut Peer, tamper: fn([Vec<u8>; 3]) -> Vec<u8>) {
    let frames = [(DATA, &b"a"[..]), (DATA, b"b"), (END, b"")];
    let wire = tamper(frames.map(|(kind, payload)| tunnel.frame(kind, payload)));
    tunnel.socket.write_all(&wire).unwrap();
    // The other side may have seen enough by now.
    let _ = tunnel.socket.shutdown(Shutdown::Write);
}

/// Nothing that was not sent in this place arrives, and the rest is no whole stream.
fn assert_aborted(record: &Record, how: &str) {
    assert_eq!(record.error, Some(ErrorKind::ConnectionReset), "{how}");
    assert!(b"ab".starts_with(&record.bytes), "{how}: {record:?}");
}

#[test]
fn a_client_passes_no_stream_on_that_was_tampered_with() {
    let (service, records) = Service::recording();
    let server = hand_made_server(&service);
    for (how, tamper) in TAMPERINGS {
        let mut tunnel = server.tunnel();
        tunnel.write(VISITOR);
        send_tampered(&mut tunnel, tamper);
        assert_aborted(&records.recv_timeout(DEADLINE).unwrap(), how);
        tunnel.assert_aborted(DEADLINE);
    }
}

#[test]
fn a_server_passes_no_stream_on_that_was_tampered_with() {
    let server = sealed_server();
    let mut control = Peer::dial_control(&server);
    let session = control.say_hello(1);
    for (how, tamper) in TAMPERINGS {
        let visitor = server.visit();
        let mut tunnel = Peer::dial_tunnel(&server, &control);
        tunnel.write(format!("tunnel session={session}\n"));
        assert!(tunnel.line().starts_with("new visitor="));
        send_tampered(&mut tunnel, tamper);
        assert_aborted(&Record::of(&visitor), how);
        tunnel.assert_aborted(DEADLINE);
    }
}

#[test]
fn the_first_frame_is_at_most_a_line_and_every_frame_of_a_known_kind() {
    let server = sealed_server();
    let padded = |size| {
        let mut lines = "hello proto=1 pool=0\n".to_owned();
        lines += &"\n".repeat(size - lines.len());
        lines.into_bytes()
    };
    let longest = FIRST_FRAME - OVERHEAD;
    for (kind, payload) in [
        (DATA, padded(longest + 1)),
        (END, b"hello proto=1 pool=0\n".to_vec()),
        (END, Vec::new()),
        (2, b"hello proto=1 pool=0\n".to_vec()),
    ] {
        let mut stranger = Peer::dial_control(&server);
        let frame = stranger.frame(kind, &payload);
        stranger.socket.write_all(&frame).unwrap();
        assert_eq!(stranger.read_until_closed(), b"", "{kind} {payload:?}");
    }
    // Shorter than any frame is.
    for length in [0, 1, 16] {
        let mut stranger = Peer::dial_control(&server);
        stranger.socket.write_all(&[0, length]).unwrap();
        assert_eq!(stranger.read_until_closed(), b"", "{length}");
    }
    let mut client = Peer::dial_control(&server);
    let frame = client.frame(DATA, &padded(longest));
    client.socket.write_all(&frame).unwrap();
    let answer = client.line();
    assert!(answer.starts_with("hello proto=1 session="), "{answer}");
}

#[test]
fn only_who_has_the_key_becomes_the_client() {
    let (service, other) = (Service::echo(), Key::generate().unwrap());
    let server = sealed_server();
    let wrong = Peer::sealed(connect(server.control), &other, true, CONTROL);
    assert!(wrong.is_err(), "a handshake with another key");
    let mut plain = Peer::plain(connect(server.control));
    plain.write("hello proto=1 pool=8\n");
    assert_eq!(plain.read_until_closed(), b"");
    // They go on trying, while the one who has the key serves.
    let _others = [Some(other), None].map(|key| {
        let options = client_options(&server, service.addr);
        RunningClient::start(ClientOptions { key, ..options })
    });
    let visitor = server.visit();
    let _client = RunningClient::start(client_options(&server, service.addr));
    assert_echo(&visitor, "served");
}

#[test]
fn a_server_with_two_keys_takes_a_client_with_either() {
    let service = Service::echo();
    let keys = vec![Key::generate().unwrap(), Key::generate().unwrap()];
    let server = RunningServer::start(ServerOptions {
        keys: keys.clone(),
        ..server_options(Protection::Sealed)
    });
    for key in keys {
        let _client = RunningClient::start(ClientOptions {
            key: Some(key),
            ..client_options(&server, service.addr)
        });
        assert_echo(&server.visit(), "served");
    }
}

#[test]
fn both_programs_say_when_only_one_of_them_has_a_key() {
    let service = Service::echo();
    let (server, addresses) = Program::server(Protection::Plain, &[]);
    let client = Program::client(Protection::Sealed, addresses, service.addr, &[]);
    server.wait_for_line("it has a key, and this server has none");
    client.wait_for_line("it answered without a key");

    let (server, addresses) = Program::server(Protection::Sealed, &[]);
    let _client = Program::client(Protection::Plain, addresses, service.addr, &[]);
    server.wait_for_line("it came without a key");
}

/// It must not take it for the original, and send everything in the clear.
#[test]
fn a_client_with_a_key_leaves_a_server_without_one() {
    for first in ["hi\n", "hello proto=1 session=0 pool=8\n"] {
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

/// The original has no key, so what says no hello behind a handshake is not the original.
#[test]
fn a_client_with_a_key_takes_no_server_for_the_original() {
    let service = Service::echo();
    let (controls, tunnels) = (listener(), listener());
    let _client = RunningClient::of(Protection::Sealed, &controls, &tunnels, service.addr, 8);
    let mut control = Peer::accept_control(&controls, Protection::Sealed);
    assert_eq!(control.line(), "hello proto=1 pool=8\n");
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
    let mut tunnel = Peer::dial_tunnel(&server, &control);
    tunnel.write(format!("tunnel session={session}\n"));
    let _visitor = server.visit();
    assert!(tunnel.line().starts_with("new visitor="));
}

type Notes = Arc<Mutex<Vec<u8>>>;

/// Somebody on the way, who notes the bytes of each connection.
struct Wiretap {
    port: u16,
    /// What clients sent, one entry a connection.
    up: Arc<Mutex<Vec<Notes>>>,
    /// What came back, all in one.
    down: Notes,
    _service: Service,
}

impl Wiretap {
    fn start(to: SocketAddr) -> Self {
        let (up, down) = (Arc::<Mutex<Vec<Notes>>>::default(), Notes::default());
        let (ups, all_down) = (up.clone(), down.clone());
        let service = Service::start(move |near| {
            let (far, up) = (connect(to), Notes::default());
            ups.lock().push(up.clone());
            thread::scope(|scope| {
                scope.spawn(|| copy_and_note(&near, &far, &up));
                copy_and_note(&far, &near, &all_down);
            });
        });
        Self {
            port: service.addr.port(),
            up,
            down,
            _service: service,
        }
    }

    fn up(&self) -> Vec<Vec<u8>> {
        let up = self.up.lock();
        up.iter().map(|up| up.lock().clone()).collect()
    }

    fn all(&self) -> Vec<u8> {
        [self.up().concat(), self.down.lock().clone()].concat()
    }
}

fn copy_and_note(mut from: &TcpStream, mut to: &TcpStream, notes: &Mutex<Vec<u8>>) {
    let mut buffer = [0; 4096];
    while let Ok(count @ 1..) = from.read(&mut buffer) {
        notes.lock().extend(&buffer[..count]);
        if to.write_all(&buffer[..count]).is_err() {
            break;
        }
    }
    let _ = (from.shutdown(Shutdown::Both), to.shutdown(Shutdown::Both));
}

#[test]
fn who_listens_on_the_way_learns_nothing_and_can_repeat_nothing() {
    const SECRET: &str = "what only the visitor and the service may know";
    let service = Service::echo();
    let server = sealed_server();
    let (control, tunnel) = (
        Wiretap::start(server.control),
        Wiretap::start(server.tunnel),
    );
    let client = RunningClient::start(ClientOptions {
        control_port: control.port,
        tunnel_port: tunnel.port,
        pool: 1,
        ..client_options(&server, service.addr)
    });
    let visitor = server.visit();
    assert_echo(&visitor, SECRET);
    assert_nothing_told(&control, &tunnel, SECRET);

    let told = [(server.control, control.up()), (server.tunnel, tunnel.up())];
    for (address, connections) in &told {
        connections.iter().for_each(|bytes| repeat(*address, bytes));
    }
    assert_echo(&visitor, "undisturbed");
    drop((visitor, client));
    for (address, connections) in &told {
        connections.iter().for_each(|bytes| repeat(*address, bytes));
    }
}

fn assert_nothing_told(control: &Wiretap, tunnel: &Wiretap, secret: &str) {
    let all = [control.all(), tunnel.all()].concat();
    for word in [secret, "hello", "session", "visitor", "proto", "127.0.0.1"] {
        let told = all
            .windows(word.len())
            .any(|bytes| bytes == word.as_bytes());
        assert!(!told, "{word}");
    }
    assert!(all.len() > 2 * secret.len());
}

/// Says again what somebody else has said: at most the server's half of a handshake comes back.
fn repeat(address: SocketAddr, bytes: &[u8]) {
    let socket = connect(address);
    // The server may close before it has read all of it.
    let _ = (&socket).write_all(bytes);
    let _ = socket.shutdown(Shutdown::Write);
    let answer = Record::of(&socket);
    assert!(answer.bytes.len() <= 50, "{answer:?}");
    let closed = [None, Some(ErrorKind::ConnectionReset)].contains(&answer.error);
    assert!(closed, "{answer:?}");
}

/// All at once, as each takes its seconds.
#[test]
fn a_handshake_must_be_over_in_five_seconds() {
    let server = sealed_server();
    // Without a session, tunnels are closed at once.
    let mut control = Peer::dial_control(&server);
    control.say_hello(0);
    let start = Instant::now();
    thread::scope(|scope| {
        for address in [server.control, server.tunnel] {
            scope.spawn(move || assert_closed_in_time(&connect(address), 0));
            scope.spawn(move || a_handshake_that_drips_is_not_waited_for(address));
        }
        scope.spawn(a_silent_server_is_left);
        while start.elapsed() < Duration::from_secs(7) {
            assert_eq!(control.line(), "hi\n");
            control.write("hi\n");
        }
    });
}

fn a_handshake_that_drips_is_not_waited_for(address: SocketAddr) {
    let socket = connect(address);
    thread::scope(|scope| {
        scope.spawn(|| {
            let handshake = [&[0, 48][..], &[7; 48]].concat();
            for byte in handshake {
                if (&socket).write_all(&[byte]).is_err() {
                    return;
                }
                thread::sleep(Duration::from_millis(300));
            }
        });
        assert_closed_in_time(&socket, 0);
    });
}

fn a_silent_server_is_left() {
    let service = Service::echo();
    let (controls, tunnels) = (listener(), listener());
    let _client = RunningClient::of(Protection::Sealed, &controls, &tunnels, service.addr, 8);
    assert_closed_in_time(&accept(&controls), 50);
}

/// Asserts that so many bytes come, and then an end within the time of a handshake.
fn assert_closed_in_time(socket: &TcpStream, bytes: usize) {
    let start = Instant::now();
    assert_eq!(Record::of(socket).bytes.len(), bytes);
    let bounds = Duration::from_millis(4500)..Duration::from_millis(7000);
    assert!(bounds.contains(&start.elapsed()), "{:?}", start.elapsed());
}
