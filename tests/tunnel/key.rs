//! What a key protects from: somebody between the two programs, and strangers at the ports.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use tunnel_proxy::Key;

use crate::support::between::{Between, Place, Port, Verdict, Way};
use crate::support::*;

/// A server that takes clients with these keys.
fn server_with(keys: &[&Key]) -> RunningServer {
    RunningServer::start(with!(server_options(Protection::Plain);
            keys: keys.iter().copied().cloned().collect(),
    ))
}

/// A server and its client, with somebody between them; and the connections of the local service.
struct Watched {
    _client: RunningClient,
    _between: Between,
    server: RunningServer,
    service: mpsc::Receiver<TcpStream>,
    _service: Service,
}

impl Watched {
    fn start(pool: usize, judge: impl FnMut(Place, Vec<u8>) -> Verdict + Send + 'static) -> Self {
        let key = Key::generate().unwrap();
        let (sender, service) = mpsc::channel();
        let _service = Service::start(move |socket| drop(sender.send(socket)));
        let server = server_with(&[&key]);
        let _between = Between::start(&server, judge);
        let mut options = _between.options(_service.addr, Some(&key));
        options.pool = pool;
        Self {
            _client: RunningClient::start(options),
            _between,
            server,
            service,
            _service,
        }
    }

    /// A visitor, and what the local service sees of it.
    fn visit(&self) -> [TcpStream; 2] {
        let visitor = self.server.visit();
        [visitor, self.service.recv_timeout(DEADLINE).unwrap()]
    }

    /// The same two: the one whose bytes go this way through the tunnel, and the one that gets them.
    fn visit_towards(&self, way: Way) -> [TcpStream; 2] {
        let [visitor, service] = self.visit();
        match way {
            Way::ToClient => [visitor, service],
            Way::ToServer => [service, visitor],
        }
    }
}

/// Asserts that a stream ends with a reset, after nothing but the beginning of what was sent.
fn assert_cut(mut socket: &TcpStream, sent: &[u8], what: &str) {
    let (mut got, mut buffer) = (Vec::new(), [0; 1024]);
    let end = loop {
        match socket.read(&mut buffer) {
            Ok(0) => panic!("{what}: a proper end"),
            Ok(count) => got.extend_from_slice(&buffer[..count]),
            Err(error) => break error,
        }
    };
    assert_eq!(end.kind(), std::io::ErrorKind::ConnectionReset, "{what}");
    assert!(sent.starts_with(&got), "{what}: {got:?} came");
}

/// Three pieces, one frame each, sent either way through a tunnel; and then the end.
const PIECES: [&[u8]; 3] = [b"one", b"two two", b"three three three"];

/// The frames of a tunnel before those of its visitor: the handshake, and a line.
const HEAD: usize = 2;

/// Sends the pieces through tunnels, one in each direction, whose frames the judge sees counted from
/// 0, the end's frame among them. Asserts that what comes out is cut.
fn attack(what: &str, judge: impl FnMut(usize, Vec<u8>) -> Verdict + Clone + Send + 'static) {
    for way in [Way::ToServer, Way::ToClient] {
        let (seen, frames) = mpsc::channel();
        let mut judge = judge.clone();
        let watched = Watched::start(1, move |place, message| {
            let index = place.index.checked_sub(HEAD);
            match index.filter(|_| (place.port, place.way) == (Port::Tunnel, way)) {
                Some(index) => {
                    let _ = seen.send(());
                    judge(index, message)
                }
                None => Verdict::Pass(message),
            }
        });
        let [from, to] = &watched.visit_towards(way);
        let mut from = from;
        for piece in PIECES {
            // The pieces go one at a time, until the attack has been noticed.
            if from.write_all(piece).is_err() || !passed(&frames, from) {
                break;
            }
        }
        let _ = from.shutdown(Shutdown::Write);
        assert_cut(to, &PIECES.concat(), &format!("{what} {way:?}"));
    }
}

/// Waits for a frame; false if the connection was reset instead.
fn passed(frames: &mpsc::Receiver<()>, from: &TcpStream) -> bool {
    let (mut seen, mut reset) = (false, false);
    from.set_nonblocking(true).unwrap();
    eventually("a frame, or a reset", || {
        seen = frames.try_recv().is_ok();
        let peeked = from.peek(&mut [0]);
        reset = peeked.is_err_and(|error| error.kind() == std::io::ErrorKind::ConnectionReset);
        seen || reset
    });
    from.set_nonblocking(false).unwrap();
    seen
}

#[test]
fn no_bit_of_a_frame_can_be_changed() {
    // A frame of 64 bytes on the wire: length, type, tag, and these bytes.
    let text = [b'x'; 64 - 2 - 1 - 16];
    let mut bit = 0;
    let watched = Watched::start(8, move |place, mut message| {
        if (place.port, place.way) != (Port::Tunnel, Way::ToClient) || place.index != HEAD {
            return Verdict::Pass(message);
        }
        assert_eq!(message.len(), 64);
        message[bit / 8] ^= 1 << (bit % 8);
        bit += 1;
        // The program would wait for the rest of a longer frame.
        Verdict::Cut(message)
    });
    for bit in 0..8 * 64 {
        let mut visitor = watched.server.visit();
        visitor.write_all(&text).unwrap();
        let service = watched.service.recv_timeout(DEADLINE).unwrap();
        assert_cut(&service, b"", &format!("bit {bit}"));
        assert_cut(&visitor, b"", &format!("bit {bit}"));
    }
}

#[test]
fn a_stream_cannot_be_cut_unnoticed() {
    let frame = |piece: &[u8]| 2 + 1 + 16 + piece.len();
    let [one, two, three] = PIECES.map(frame);
    let last = [two, three, frame(b"")];
    for offset in 0..last.iter().sum() {
        attack(&format!("cut at {offset}"), move |index, message| {
            // The last three frames are two pieces and the end.
            let starts = [0, 0, two, two + three];
            let start = starts[index];
            if index == 0 {
                assert_eq!(message.len(), one);
                Verdict::Pass(message)
            } else if offset < start + message.len() {
                Verdict::Cut(message[..offset - start].to_vec())
            } else {
                Verdict::Pass(message)
            }
        });
    }
}

#[test]
fn frames_cannot_be_dropped_repeated_moved_or_made_up() {
    attack("drop", |index, message| {
        Verdict::Pass(if index == 1 { Vec::new() } else { message })
    });
    attack("drop the end", |index, message| {
        if index < PIECES.len() {
            Verdict::Pass(message)
        } else {
            Verdict::Cut(Vec::new())
        }
    });
    attack("repeat", |index, message| {
        Verdict::Pass(if index == 1 {
            message.repeat(2)
        } else {
            message
        })
    });
    for size in [0_u16, 1, 15, 16, 17, 65_535] {
        attack(
            &format!("a made-up frame of {size}"),
            move |index, message| {
                let mut all = message;
                if index == 1 {
                    all.extend(size.to_be_bytes());
                    all.extend(vec![0x5a; size.into()]);
                }
                Verdict::Pass(all)
            },
        );
    }
}

#[test]
fn frames_cannot_be_swapped() {
    let mut held = Vec::new();
    attack("swap", move |index, message| match index {
        0 => Verdict::Pass(message),
        1 => {
            held = message;
            Verdict::Pass(Vec::new())
        }
        _ => Verdict::Pass([message, std::mem::take(&mut held)].concat()),
    });
}

#[test]
fn frames_cannot_be_reflected() {
    for way in [Way::ToServer, Way::ToClient] {
        let watched = Watched::start(1, move |place, message| {
            let visitors = place.port == Port::Tunnel && place.index >= HEAD;
            if visitors && place.way == way {
                Verdict::Reflect(Vec::new(), message)
            } else {
                Verdict::Pass(message)
            }
        });
        let [from, to] = &watched.visit_towards(way);
        let mut from = from;
        from.write_all(b"back to you").unwrap();
        assert_cut(from, b"", "the sender");
        assert_cut(to, b"", "the receiver");
    }
}

/// What the client said first at a port: its half of the handshake, of 50 bytes, and a line.
fn recorded(between: &Between, port: Port) -> Vec<u8> {
    let mut recorded = Vec::new();
    eventually("a record", || {
        recorded = between.seen(port)[0][Way::ToServer as usize].clone();
        recorded.len() > 50
    });
    recorded
}

/// Says what was recorded, and asserts that only the answer to a handshake comes, and then the end.
fn assert_replay_fails(port: SocketAddr, recorded: &[u8]) {
    let mut socket = connect(port);
    let _ = socket.write_all(recorded);
    let mut answer = Vec::new();
    // A reset is as good: the port was closed with something unread.
    let _ = socket.read_to_end(&mut answer);
    assert!(answer.len() <= 50, "{} bytes", answer.len());
}

#[test]
fn a_recorded_handshake_is_of_no_use() {
    let key = Key::generate().unwrap();
    let echo = Service::echo();
    let server = server_with(&[&key]);
    // New tunnels do not come through any more once this has been sent.
    let (close, closed) = mpsc::channel::<()>();
    let mut shut = false;
    let between = Between::start(&server, move |place, message| {
        shut |= closed.try_recv().is_ok();
        if shut && place.port == Port::Tunnel && place.index == 0 {
            return Verdict::Cut(Vec::new());
        }
        Verdict::Pass(message)
    });
    // There is no pool, so that a visitor waits if no tunnel comes through.
    let mut client = RunningClient::start(with!(between.options(echo.addr, Some(&key));
            pool: 0,
    ));
    assert_echo(&server.visit(), "served");
    let [control, tunnel] = [Port::Control, Port::Tunnel].map(|port| recorded(&between, port));

    // In the same session: the client is undisturbed, and a visitor that waits is not handed out.
    for _ in 0..3 {
        assert_replay_fails(server.control, &control);
        assert_replay_fails(server.tunnel, &tunnel);
        assert_echo(&server.visit(), "undisturbed");
    }
    close.send(()).unwrap();
    // Tunnels that have served are idle now: each gets a visitor who stays.
    let mut stay = Vec::new();
    eventually("no tunnel is idle", || {
        let status = server.handle().status().unwrap();
        if status.joined == stay.len() && status.idle > 0 {
            stay.push(server.visit());
            assert_echo(&stay[stay.len() - 1], "stays");
        }
        status.joined == stay.len() && status.idle == 0 && !stay.is_empty()
    });
    let waiting = server.visit();
    for _ in 0..3 {
        assert_replay_fails(server.tunnel, &tunnel);
    }
    waiting.set_nonblocking(true).unwrap();
    let error = waiting.peek(&mut [0]).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock, "still waits");
    drop(waiting);
    client.handle().stop(Duration::ZERO);
    client.wait_for_end();

    // With no client there, nothing that was recorded becomes one; the real one does.
    assert_replay_fails(server.control, &control);
    let waiting = server.visit();
    assert_replay_fails(server.tunnel, &tunnel);
    let _client = RunningClient::start(client_options(&server, echo.addr));
    assert_echo(&waiting, "served late");
    assert_replay_fails(server.tunnel, &tunnel);
    assert_echo(&server.visit(), "in the later session");
}

#[test]
fn a_changed_control_link_ends_and_is_dialled_again() {
    for way in [Way::ToServer, Way::ToClient] {
        let echo = Service::echo();
        let key = Key::generate().unwrap();
        let server = server_with(&[&key]);
        let between = Between::start(&server, move |place, mut message| {
            // A heartbeat of the first session.
            if (place.port, place.way, place.conn, place.index) == (Port::Control, way, 0, HEAD) {
                message[10] ^= 1;
            }
            Verdict::Pass(message)
        });
        let _client = RunningClient::start(between.options(echo.addr, Some(&key)));
        assert_echo(&server.visit(), "the first session");
        eventually("a second session", || between.seen(Port::Control).len() > 1);
        assert_echo(&server.visit(), "the second session");
    }
}

#[test]
fn a_capture_shows_neither_bytes_nor_addresses() {
    let marker = "a marker that nobody else would send";
    for key in [None, Some(Key::generate().unwrap())] {
        let echo = Service::echo();
        let server = server_with(key.as_ref().as_slice());
        let between = Between::start(&server, Between::listen);
        let _client = RunningClient::start(between.options(echo.addr, key.as_ref()));
        let visitor = server.visit();
        assert_echo(&visitor, marker);
        let address = visitor.local_addr().unwrap().to_string();
        let ports = [Port::Control, Port::Tunnel].map(|port| between.seen(port));
        let capture = ports.concat().concat().concat();
        for word in [marker, &address, "hello", "tunnel session=", "new visitor="] {
            let windows = &mut capture.windows(word.len());
            let shown = windows.any(|window| window == word.as_bytes());
            assert_eq!(shown, key.is_none(), "{word}");
        }
    }
}

/// Asserts that a connection that goes on like this is closed at the deadline of 5 s.
fn assert_closed_at_deadline(port: SocketAddr, bytes: &[u8], drip: Option<Duration>) {
    let mut socket = connect(port);
    let start = Instant::now();
    if let Some(pause) = drip {
        for byte in bytes {
            if socket.write_all(&[*byte]).is_err() {
                break;
            }
            thread::sleep(pause);
        }
    } else {
        socket.write_all(bytes).unwrap();
    }
    let _ = socket.read_to_end(&mut Vec::new());
    let waited = start.elapsed();
    let bounds = Duration::from_millis(4_500)..Duration::from_millis(7_500);
    assert!(bounds.contains(&waited), "closed after {waited:?}");
}

#[test]
fn a_handshake_has_five_seconds_in_all() {
    let key = Key::generate().unwrap();
    let echo = Service::echo();
    let server = server_with(&[&key]);
    // The server has not heard the first two openings at either port: they are not taken for recorded
    // ones.
    let between = Between::start(&server, |place, message| {
        match (place.way, place.conn, place.index) {
            (Way::ToServer, 0 | 1, 0) => Verdict::Cut(Vec::new()),
            _ => Verdict::Pass(message),
        }
    });
    let client = RunningClient::start(between.options(echo.addr, Some(&key)));
    eventually("the client is there", || {
        client.handle().status().unwrap().sessions.len() == 1
    });
    assert_echo(&server.visit(), "served");
    let opening = [0, 48];
    let slow = Some(Duration::from_millis(100));
    thread::scope(|scope| {
        for port in [Port::Control, Port::Tunnel] {
            // A whole first message is answered, and then the first line is due.
            let openings = between.seen(port);
            let [first, slow_first] =
                [0, 1].map(|conn: usize| openings[conn][Way::ToServer as usize].clone());
            let port = match port {
                Port::Control => server.control,
                Port::Tunnel => server.tunnel,
            };
            scope.spawn(move || assert_closed_at_deadline(port, b"", None));
            scope.spawn(move || assert_closed_at_deadline(port, &opening, None));
            scope.spawn(move || {
                let dripping = [&opening[..], &[0x5a; 47]].concat();
                assert_closed_at_deadline(port, &dripping, slow);
            });
            scope.spawn(move || assert_closed_at_deadline(port, &first, None));
            scope.spawn(move || {
                assert_closed_at_deadline(port, &slow_first, Some(Duration::from_millis(60)));
            });
        }
    });
    assert_echo(&server.visit(), "undisturbed");
}

#[test]
fn a_handshake_may_come_byte_by_byte() {
    let key = Key::generate().unwrap();
    let echo = Service::echo();
    // The visitor waits for two handshakes.
    let server = RunningServer::start(with!(server_options(Protection::Plain);
            keys: vec![key.clone()],
            pair_timeout: DEADLINE,
    ));
    let between = Between::start(&server, |_, message| {
        Verdict::Drip(message, Duration::from_millis(3))
    });
    let _client = RunningClient::start(between.options(echo.addr, Some(&key)));
    assert_echo(&server.visit(), "slowly");
}

/// The answer to a handshake comes a round trip later.
fn from_afar(place: Place, message: Vec<u8>) -> Verdict {
    match (place.way, place.index) {
        (Way::ToClient, 0) => Verdict::Late(message, Duration::from_millis(150)),
        _ => Verdict::Pass(message),
    }
}

/// More tunnels at once than a server has places for those that have not proved themselves, and a
/// proof takes a round trip.
#[cfg(target_os = "linux")]
#[test]
fn a_far_client_serves_a_burst() {
    raise_descriptors();
    for pool in [0, 8] {
        let key = Key::generate().unwrap();
        let echo = Service::echo();
        let server = server_with(&[&key]);
        let between = Between::start(&server, from_afar);
        let _client = RunningClient::start(with!(between.options(echo.addr, Some(&key));
                    pool,
        ));
        assert_echo(&server.visit(), "the client is there");
        let visitors: Vec<_> = (0..300).map(|_| server.visit()).collect();
        for (number, visitor) in visitors.iter().enumerate() {
            assert_echo(visitor, &format!("visitor {number}"));
        }
    }
}

/// Strangers fill the places of both ports again and again: whoever began like a client stays.
#[cfg(target_os = "linux")]
#[test]
fn a_far_client_is_not_pushed_out() {
    raise_descriptors();
    let key = Key::generate().unwrap();
    let echo = Service::echo();
    let server = server_with(&[&key]);
    let between = Between::start(&server, from_afar);
    let stopped = AtomicBool::new(false);
    thread::scope(|scope| {
        for port in [server.control, server.tunnel] {
            let stopped = &stopped;
            scope.spawn(move || {
                let mut strangers = VecDeque::new();
                while !stopped.load(Ordering::SeqCst) {
                    strangers.push_back(connect(port));
                    if strangers.len() > 200 {
                        strangers.pop_front();
                    }
                    // A thousand strangers a second come to each port, and take all its places
                    // every 64 ms.
                    thread::sleep(Duration::from_millis(1));
                }
            });
        }
        let _client = RunningClient::start(with!(between.options(echo.addr, Some(&key));
                    pool: 0,
        ));
        let served = scope.spawn(|| {
            for _ in 0..5 {
                assert_echo(&server.visit(), "served nevertheless");
            }
        });
        let served = served.join();
        stopped.store(true, Ordering::SeqCst);
        served.unwrap();
    });
}

#[test]
fn a_mebibyte_of_noise_disturbs_nobody() {
    let key = Key::generate().unwrap();
    let echo = Service::echo();
    let server = server_with(&[&key]);
    let _client = RunningClient::start(client_options(&server, echo.addr));
    let visitor = server.visit();
    assert_echo(&visitor, "before");
    for (seed, port) in [server.control, server.tunnel].into_iter().enumerate() {
        for opening in [&b""[..], &[0, 48]] {
            let mut noise = vec![0; 1024 * 1024];
            Pattern::new(seed as u64).fill(&mut noise);
            noise[..opening.len()].copy_from_slice(opening);
            let mut socket = connect(port);
            // The port closes the connection before all of it has been taken.
            let _ = socket.write_all(&noise);
            let _ = socket.shutdown(Shutdown::Write);
            let mut answer = Vec::new();
            let _ = socket.read_to_end(&mut answer);
            // Noise that begins like a handshake is told that its key is wrong, unless it is reset
            // before.
            let told = port == server.control && !opening.is_empty();
            let wrong = &b"bye reason=wrong-key\n"[..];
            assert!(answer == b"" || (told && answer == wrong), "{answer:?}");
        }
    }
    assert_echo(&visitor, "after");
    assert_echo(&server.visit(), "a new one");
}

#[test]
fn a_key_is_changed_without_a_lost_visitor() {
    let [old, new] = [(); 2].map(|()| Key::generate().unwrap());
    let echo = Service::echo();
    let server = server_with(&[&old, &new]);
    let start = |key: &Key| {
        RunningClient::start(with!(client_options(&server, echo.addr);
                    key: Some(key.clone()),
        ))
    };
    let mut client = start(&old);
    assert_echo(&server.visit(), "with the old key");
    thread::scope(|scope| {
        // The visits go on for longer than the change takes.
        let visits = scope.spawn(|| {
            for _ in 0..300 {
                assert_echo(&server.visit(), "meanwhile");
                thread::sleep(Duration::from_millis(5));
            }
        });
        // The old client lets its visitors finish, and others wait for the new one.
        client.handle().stop(DEADLINE);
        client.wait_for_end();
        client = start(&new);
        assert_echo(&server.visit(), "with the new key");
        assert!(!visits.is_finished(), "the change took too long");
    });
    // A client with a third key gets no visitor.
    drop(client);
    let _stranger = start(&Key::generate().unwrap());
    let waiting = server.visit();
    let _client = start(&new);
    assert_echo(&waiting, "with the new key again");
}
