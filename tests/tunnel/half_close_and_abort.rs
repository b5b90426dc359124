//! How connections end: a proper end passes through as one, and nothing else does.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use tunnel_proxy::Cidr;

use crate::support::peer::{Peer, session_in};
use crate::support::programs::Program;
use crate::support::{
    DEADLINE, Pattern, Protection, Record, RunningClient, RunningServer, Service, Tunnel, Turn,
    assert_echo, assert_ended, assert_reset, client_options, closed_port, eventually,
    expect_pattern, once_settled, plain_and_sealed, reset_on_close, send_pattern, server_options,
    share_turn, try_connect, with,
};

plain_and_sealed! {
    the_visitor_ends_first_and_still_gets_its_reply,
    the_service_ends_first_and_still_gets_its_reply,
    an_abort_by_the_visitor_reaches_the_service,
    an_abort_by_the_service_reaches_the_visitor,
    an_abort_after_a_half_close_is_still_an_abort,
    an_abort_in_the_middle_of_a_stream_is_never_an_end,
    an_abort_while_both_directions_wait_is_never_an_end,
    an_early_answer_reaches_a_visitor_that_still_sends,
    a_local_service_that_refuses_closes_the_visitor,
    a_stop_drains_first_and_cuts_what_is_left,
    a_client_that_stops_drains_as_well,
    a_killed_server_makes_no_visit_look_empty,
    an_abort_by_the_end_that_half_closed_ends_the_pair,
    an_abort_is_passed_on_to_an_end_that_does_not_read,
    a_half_closed_pair_that_stands_still_is_aborted_at_linger,
    the_clients_linger_holds_as_well,
    linger_holds_while_a_stop_drains,
    a_half_closed_stream_that_crawls_lives_on,
    what_crawls_behind_the_services_end_lives_on,
    what_crawls_behind_the_visitors_end_lives_on,
    what_crawls_to_a_visitor_beside_a_silent_service_lives_on,
    what_crawls_to_a_service_beside_a_silent_visitor_lives_on,
    an_end_behind_what_nobody_takes_is_no_excuse,
    an_end_after_that_of_the_session_is_no_excuse,
    a_visit_that_is_open_lives_on_whatever_the_client_says,
    the_end_of_a_visit_is_none_of_another_from_the_same_address,
    a_client_is_relied_on_if_it_shares_the_linger,
    a_half_closed_stream_that_nobody_reads_is_aborted_at_linger,
    #[cfg(unix)]
    a_killed_program_looks_like_an_abort_to_both_ends,
}

const REPLY: usize = 8 * 1024 * 1024;
/// Without a reset at once, one comes after 5 s or never.
const AT_ONCE: Duration = Duration::from_secs(4);

fn the_visitor_ends_first_and_still_gets_its_reply(protection: Protection) {
    let service = Service::start(|socket| {
        expect_pattern(&socket, 1, 1000);
        assert_ended(&socket);
        send_pattern(&socket, 2, REPLY);
    });
    let tunnel = Tunnel::start(protection, service.addr, 8);
    let visitor = tunnel.visit();
    send_pattern(&visitor, 1, 1000);
    visitor.shutdown(Shutdown::Write).unwrap();
    expect_pattern(&visitor, 2, REPLY);
    assert_ended(&visitor);
}

fn the_service_ends_first_and_still_gets_its_reply(protection: Protection) {
    let (done, result) = mpsc::channel();
    let service = Service::start(move |socket| {
        send_pattern(&socket, 1, 1000);
        socket.shutdown(Shutdown::Write).unwrap();
        expect_pattern(&socket, 2, REPLY);
        assert_ended(&socket);
        done.send(()).unwrap();
    });
    let tunnel = Tunnel::start(protection, service.addr, 8);
    let visitor = tunnel.visit();
    expect_pattern(&visitor, 1, 1000);
    assert_ended(&visitor);
    send_pattern(&visitor, 2, REPLY);
    drop(visitor);
    result.recv_timeout(DEADLINE).unwrap();
}

/// A service that hands its connections out, having said hello on each.
fn handing_out() -> (Service, mpsc::Receiver<TcpStream>) {
    let (sender, sockets) = mpsc::channel();
    let service = Service::start(move |mut socket| {
        socket.write_all(b"hello").unwrap();
        sender.send(socket).unwrap();
    });
    (service, sockets)
}

fn read_hello(mut visitor: &TcpStream) {
    let mut hello = [0; 5];
    std::io::Read::read_exact(&mut visitor, &mut hello).unwrap();
    assert_eq!(&hello, b"hello");
}

/// A visitor and the service's end of its connection, and what joins them.
fn joined(protection: Protection) -> (TcpStream, TcpStream, (Tunnel, Service)) {
    let (service, sockets) = handing_out();
    let tunnel = Tunnel::start(protection, service.addr, 8);
    let visitor = tunnel.visit();
    read_hello(&visitor);
    let served = sockets.recv_timeout(DEADLINE).unwrap();
    (visitor, served, (tunnel, service))
}

fn an_abort_by_the_visitor_reaches_the_service(protection: Protection) {
    let (visitor, served, _tunnel) = joined(protection);
    reset_on_close(&visitor);
    drop(visitor);
    assert_reset(&served, AT_ONCE);
}

fn an_abort_by_the_service_reaches_the_visitor(protection: Protection) {
    let (visitor, served, _tunnel) = joined(protection);
    reset_on_close(&served);
    drop(served);
    assert_reset(&visitor, AT_ONCE);
}

fn an_abort_after_a_half_close_is_still_an_abort(protection: Protection) {
    let (visitor, served, _tunnel) = joined(protection);
    visitor.shutdown(Shutdown::Write).unwrap();
    assert_ended(&served);
    reset_on_close(&served);
    drop(served);
    assert_reset(&visitor, AT_ONCE);
}

/// Nobody reads from an end that has finished: the reset is found all the same, and passed on to
/// a service that only learns of it when it writes.
fn an_abort_by_the_end_that_half_closed_ends_the_pair(protection: Protection) {
    let (service, sockets) = handing_out();
    let (server, addresses) = Program::server(protection, &[]);
    let client = Program::client(protection, addresses, service.addr, &[]);
    let visitor = crate::support::connect(addresses[0]);
    read_hello(&visitor);
    let served = sockets.recv_timeout(DEADLINE).unwrap();
    visitor.shutdown(Shutdown::Write).unwrap();
    assert_ended(&served);
    reset_on_close(&visitor);
    drop(visitor);
    server.wait_for_line("aborted: reset by the visitor");
    client.wait_for_line("aborted: reset by the server");
    eventually("the service cannot write", || {
        (&served).write_all(b"x").is_err()
    });
}

fn an_abort_in_the_middle_of_a_stream_is_never_an_end(protection: Protection) {
    let (service, sockets) = handing_out();
    let tunnel = Tunnel::start(protection, service.addr, 8);
    for _ in 0..20 {
        let visitor = tunnel.visit();
        read_hello(&visitor);
        let served = sockets.recv_timeout(DEADLINE).unwrap();
        let sending = thread::spawn(move || {
            reset_on_close(&served);
            send_pattern(&served, 1, 1_000_000);
        });
        assert_reset(&visitor, DEADLINE);
        sending.join().unwrap();
    }
}

/// Both directions wait for the visitor when it resets, one to write and one to read. Only one of
/// them is told by its kernel.
fn an_abort_while_both_directions_wait_is_never_an_end(protection: Protection) {
    let (sender, stuck) = mpsc::channel();
    let service = Service::start(move |mut socket| {
        socket.set_nonblocking(true).unwrap();
        let (piece, mut moved) = ([7; 64 * 1024], Instant::now());
        while moved.elapsed() < Duration::from_millis(200) {
            match socket.write(&piece) {
                Ok(1..) => moved = Instant::now(),
                _ => thread::sleep(Duration::from_millis(5)),
            }
        }
        socket.set_nonblocking(false).unwrap();
        sender.send(socket).unwrap();
    });
    let tunnel = Tunnel::start(protection, service.addr, 8);
    let visitors: Vec<_> = (0..20).map(|_| tunnel.visit()).collect();
    let served: Vec<_> = visitors
        .iter()
        .map(|_| stuck.recv_timeout(DEADLINE).unwrap())
        .collect();
    visitors.iter().for_each(reset_on_close);
    drop(visitors);
    for socket in &served {
        assert_reset(socket, AT_ONCE);
    }
}

fn a_local_service_that_refuses_closes_the_visitor(protection: Protection) {
    let refusing = closed_port();
    let (_server, addresses) = Program::server(protection, &[]);
    let client = Program::client(protection, addresses, refusing.addr, &[]);
    client.wait_for_line("pool 8");
    let from = match try_connect(addresses[0]) {
        Ok(visitor) => {
            assert_reset(&visitor, AT_ONCE);
            visitor.local_addr().unwrap().to_string()
        }
        // The reset was quicker than this thread.
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::ConnectionReset);
            "visitor 127.0.0.1:".to_owned()
        }
    };
    let line = client.wait_for_line("cannot reach the local service");
    for part in [&from, &refusing.addr.to_string(), "refused"] {
        assert!(line.contains(part), "{line}");
    }
}

fn a_half_closed_pair_that_stands_still_is_aborted_at_linger(protection: Protection) {
    const LINGER: Duration = Duration::from_secs(2);
    let (service, sockets) = handing_out();
    let server = RunningServer::start(with!(server_options(protection);
            linger: LINGER,
    ));
    let _client = RunningClient::start(client_options(&server, service.addr));
    let visitor = server.visit();
    read_hello(&visitor);
    let mut served = sockets.recv_timeout(DEADLINE).unwrap();
    // A pair whose directions are both open may be silent for longer.
    thread::sleep(2 * LINGER);
    visitor.shutdown(Shutdown::Write).unwrap();
    assert_ended(&served);
    // A half-closed pair that moves a byte now and then lives on.
    let mut still = Instant::now();
    for _ in 0..10 {
        thread::sleep(LINGER / 5);
        still = Instant::now();
        served.write_all(b"hello").unwrap();
        read_hello(&visitor);
    }
    assert_reset(&visitor, DEADLINE);
    let (least, most) = (LINGER * 9 / 10, LINGER + Duration::from_secs(3));
    assert!(
        (least..most).contains(&still.elapsed()),
        "{:?}",
        still.elapsed()
    );
    // The service has had its end already, and learns the rest when it writes.
    eventually("the service cannot write", || {
        served.write_all(b"hello").is_err()
    });
}

fn the_clients_linger_holds_as_well(protection: Protection) {
    const LINGER: Duration = Duration::from_millis(500);
    let (service, sockets) = handing_out();
    let server = RunningServer::start(server_options(protection));
    let _client = RunningClient::start(with!(client_options(&server, service.addr);
            linger: LINGER,
    ));
    let visitor = server.visit();
    read_hello(&visitor);
    let served = sockets.recv_timeout(DEADLINE).unwrap();
    served.shutdown(Shutdown::Write).unwrap();
    assert_ended(&visitor);
    assert_reset(&served, LINGER + Duration::from_secs(3));
}

/// A service that sends this much when its visitor has finished.
fn sending_once_asked(size: usize) -> Service {
    Service::start(move |socket| {
        assert_ended(&socket);
        send_pattern(&socket, 1, size);
    })
}

/// The visitor reads so slowly that a kernel's buffer has room again only after several times
/// `--linger`.
fn a_half_closed_stream_that_crawls_lives_on(protection: Protection) {
    const SIZE: usize = 12 * 1024 * 1024;
    let service = sending_once_asked(SIZE);
    let (server, _client, _turn) = with_linger(protection, service.addr);
    let visitor = connect_with_little_room(server.public);
    visitor.shutdown(Shutdown::Write).unwrap();
    crawl(&visitor, SIZE);
    assert_ended(&visitor);
}

/// What kernels take at once, however slowly it is read.
const TAKEN_AT_ONCE: usize = 2 * 1024 * 1024;

/// The programs have nothing left to do, the visitor leaves its half open, and reads what its server's
/// kernel still has.
fn what_crawls_behind_the_services_end_lives_on(protection: Protection) {
    let service = Service::start(|socket| {
        send_pattern(&socket, 1, TAKEN_AT_ONCE);
        socket.shutdown(Shutdown::Write).unwrap();
        assert_ended(&socket);
    });
    let (server, _client, _turn) = with_linger(protection, service.addr);
    let visitor = connect_with_little_room(server.public);
    crawl(&visitor, TAKEN_AT_ONCE);
    assert_ended(&visitor);
}

/// The same with an upload: the server sees neither end move.
fn what_crawls_behind_the_visitors_end_lives_on(protection: Protection) {
    let service = Service::start(|mut socket| {
        leave_little_room(&socket);
        crawl(&socket, TAKEN_AT_ONCE);
        assert_ended(&socket);
        socket.write_all(b"hello").unwrap();
    });
    let (server, _client, _turn) = with_linger(protection, service.addr);
    let visitor = server.visit();
    send_pattern(&visitor, 1, TAKEN_AT_ONCE);
    visitor.shutdown(Shutdown::Write).unwrap();
    read_hello(&visitor);
    assert_ended(&visitor);
}

/// More than the far program takes while its own end takes nothing, so that it does not come to the end
/// behind that.
const TAKEN_IN_PART: usize = 6 * 1024 * 1024;

fn an_end_behind_what_nobody_takes_is_no_excuse(protection: Protection) {
    nobody_takes(protection, |_, _| ());
}

/// Neither program can tell the other one that an end has finished.
fn an_end_after_that_of_the_session_is_no_excuse(protection: Protection) {
    nobody_takes(protection, |server, client| {
        server.handle().stop(Duration::from_secs(3600));
        let is_over = || !client.handle().wait_for_session(Duration::ZERO);
        eventually("the session ends", is_over);
    });
}

/// A visitor who sends and finishes, and one whose service does. Nobody reads, after this has happened to
/// the two programs.
fn nobody_takes(protection: Protection, happens: impl Fn(&RunningServer, &RunningClient)) {
    let (sender, served) = mpsc::channel();
    let service = Service::start(move |socket| {
        let mut way = [0];
        (&socket).write_all(b"hello").unwrap();
        (&socket).read_exact(&mut way).unwrap();
        if &way == b"d" {
            send_pattern(&socket, 1, TAKEN_IN_PART);
            socket.shutdown(Shutdown::Write).unwrap();
        }
        leave_little_room(&socket);
        sender.send(socket).unwrap();
    });
    let (server, client, _turn) = with_linger(protection, service.addr);
    let mut visitors = [server.visit(), connect_with_little_room(server.public)];
    visitors.iter().for_each(read_hello);
    happens(&server, &client);
    visitors[0].write_all(b"u").unwrap();
    send_pattern(&visitors[0], 1, TAKEN_IN_PART);
    visitors[0].shutdown(Shutdown::Write).unwrap();
    visitors[1].write_all(b"d").unwrap();
    let served = [0; 2].map(|_| served.recv_timeout(DEADLINE).unwrap());
    let (finished, ends) = (Instant::now(), visitors.iter().chain(&served));
    for end in ends {
        eventually("both ends are reset", || end.peer_addr().is_err());
    }
    let within = CRAWLS_PAST * 2 + Duration::from_secs(5);
    assert!(finished.elapsed() < within, "{:?}", finished.elapsed());
}

/// The client has long passed on all.
fn what_crawls_to_a_visitor_beside_a_silent_service_lives_on(protection: Protection) {
    let (done, is_done) = mpsc::channel();
    let is_done = Mutex::new(is_done);
    let service = Service::start(move |socket| {
        assert_ended(&socket);
        send_pattern(&socket, 1, TAKEN_IN_PART);
        is_done.lock().unwrap().recv_timeout(DEADLINE).unwrap();
    });
    let (server, _client, _turn) = with_linger(protection, service.addr);
    let visitor = connect_with_little_room(server.public);
    visitor.shutdown(Shutdown::Write).unwrap();
    crawl(&visitor, TAKEN_IN_PART);
    done.send(()).unwrap();
    assert_ended(&visitor);
}

/// The server has long passed on all.
fn what_crawls_to_a_service_beside_a_silent_visitor_lives_on(protection: Protection) {
    let (done, is_done) = mpsc::channel();
    let service = Service::start(move |socket| {
        socket.shutdown(Shutdown::Write).unwrap();
        leave_little_room(&socket);
        crawl(&socket, TAKEN_IN_PART);
        done.send(()).unwrap();
        assert_ended(&socket);
    });
    let (server, _client, _turn) = with_linger(protection, service.addr);
    let visitor = server.visit();
    send_pattern(&visitor, 1, TAKEN_IN_PART);
    is_done.recv_timeout(DEADLINE).unwrap();
    assert_ended(&visitor);
}

/// The `--linger` that a stream which crawls outlives.
const CRAWLS_PAST: Duration = Duration::from_secs(2);

/// A server and a client, each with a `--linger` below what it takes to crawl.
fn with_linger(protection: Protection, local: SocketAddr) -> (RunningServer, RunningClient, Turn) {
    let turn = share_turn();
    let server = RunningServer::start(with!(server_options(protection);
            linger: CRAWLS_PAST,
    ));
    let client = RunningClient::start(with!(client_options(&server, local);
            linger: CRAWLS_PAST,
    ));
    (server, client, turn)
}

/// Reads a stream, slowly for more than twice `--linger`.
fn crawl(mut reader: &TcpStream, size: usize) {
    const STEP: usize = 8 * 1024;
    let (start, mut crawled) = (Instant::now(), vec![0; size]);
    let (slowly, rest) = crawled.split_at_mut(100 * STEP);
    for (step, piece) in (1..).zip(slowly.chunks_mut(STEP)) {
        reader.read_exact(piece).unwrap();
        // What a busy machine holds up is made up for.
        let due = start + step * Duration::from_millis(50);
        thread::sleep(due.saturating_duration_since(Instant::now()));
    }
    reader.read_exact(rest).unwrap();
    let mut sent = vec![0; size];
    Pattern::new(1).fill(&mut sent);
    assert!(crawled == sent, "changed bytes");
}

/// The visitor has finished. A client that is silent then may have much to hand on to the local service,
/// and looks after that itself, if it has told how long that may stand still.
fn a_client_is_relied_on_if_it_shares_the_linger(protection: Protection) {
    for tells in ["", " linger=600000"] {
        let mut peer = HandMadeClient::start(protection, tells, &[]);
        let (mut tunnel, visitor, _) = peer.visit(None);
        visitor.shutdown(Shutdown::Write).unwrap();
        tunnel.assert_ended();
        if tells.is_empty() {
            assert_reset(&visitor, PEERS_LINGER + Duration::from_secs(3));
            continue;
        }
        thread::sleep(3 * PEERS_LINGER);
        tunnel.write_data("hello");
        read_hello(&visitor);
    }
}

fn a_visit_that_is_open_lives_on_whatever_the_client_says(protection: Protection) {
    let mut peer = HandMadeClient::start(protection, " linger=600000", &[]);
    let (mut tunnel, visitor, number) = peer.visit(None);
    peer.control.write(format!("finished visit={number}\n"));
    thread::sleep(3 * PEERS_LINGER);
    tunnel.write_data("hello");
    read_hello(&visitor);
}

/// A proxy may open several connections for one visitor.
fn the_end_of_a_visit_is_none_of_another_from_the_same_address(protection: Protection) {
    let proxies = ["127.0.0.1".parse().unwrap()];
    let mut peer = HandMadeClient::start(protection, " linger=600000", &proxies);
    let from = Some("192.0.2.1:5".parse().unwrap());
    let (_finished, _visitor, number) = peer.visit(from);
    let (mut open, visitor, _) = peer.visit(from);
    let (written, size) = (AtomicUsize::new(0), 16 * 1024 * 1024);
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut bytes = vec![0; size];
            Pattern::new(1).fill(&mut bytes);
            for piece in bytes.chunks(32 * 1024) {
                open.write_data(piece);
                written.fetch_add(1, Ordering::Relaxed);
            }
        });
        let moment = Duration::from_millis(500);
        let full = || written.load(Ordering::Relaxed);
        once_settled("a visitor who reads nothing has full buffers", moment, full);
        peer.control.write(format!("finished visit={number}\n"));
        thread::sleep(3 * PEERS_LINGER);
        expect_pattern(&visitor, 1, size);
    });
}

const PEERS_LINGER: Duration = Duration::from_secs(1);

/// A server with this `--linger`, and the control link of a client made by hand.
struct HandMadeClient {
    server: RunningServer,
    control: Peer,
    session: String,
}

impl HandMadeClient {
    /// The client's hello `tells` something besides. Visitors come through these proxies, if there are any.
    fn start(protection: Protection, tells: &str, proxies: &[Cidr]) -> Self {
        let server = RunningServer::start(with!(server_options(protection);
                linger: PEERS_LINGER,
                accept_proxy: proxies.to_vec(),
        ));
        let mut control = Peer::dial_control(&server);
        control.write(format!("hello proto=2 pool=1{tells}\n"));
        let hello = control.line();
        assert!(hello.contains(" linger=1000 "), "{hello}");
        Self {
            server,
            control,
            session: session_in(&hello),
        }
    }

    /// Returns a tunnel, its visitor, and the number of the visit. A proxy says that the visitor comes from
    /// elsewhere.
    fn visit(&mut self, from: Option<SocketAddr>) -> (Peer, TcpStream, u64) {
        let mut tunnel = Peer::dial_tunnel(&self.server, &self.control);
        tunnel.write(format!("tunnel session={}\n", self.session));
        let mut visitor = self.server.visit();
        if let Some(from) = from {
            let header = format!("PROXY TCP4 {} 192.0.2.2 {} 80\r\n", from.ip(), from.port());
            visitor.write_all(header.as_bytes()).unwrap();
        }
        let from = from.unwrap_or_else(|| visitor.local_addr().unwrap());
        let number = tunnel.assert_given_from(from, "");
        (tunnel, visitor, number)
    }
}

fn leave_little_room(socket: &TcpStream) {
    let room = socket2::SockRef::from(socket).set_recv_buffer_size(64 * 1024);
    room.unwrap();
}

/// A system with a large buffer says that there is room only once a sixteenth of it is free.
fn connect_with_little_room(address: SocketAddr) -> TcpStream {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    socket.set_recv_buffer_size(64 * 1024).unwrap();
    socket.set_read_timeout(Some(DEADLINE)).unwrap();
    socket.connect(&address.into()).unwrap();
    socket.into()
}

/// Beside a crowd the kernel makes room in the visitor's buffer for one more piece now and then, and a
/// stream that moves lives on.
fn a_half_closed_stream_that_nobody_reads_is_aborted_at_linger(protection: Protection) {
    const LINGER: Duration = Duration::from_secs(1);
    let _turn = share_turn();
    let (service, sockets) = handing_out();
    let server = RunningServer::start(with!(server_options(protection);
            linger: LINGER,
    ));
    let _client = RunningClient::start(with!(client_options(&server, service.addr);
            linger: LINGER,
    ));
    let visitor = server.visit();
    visitor.shutdown(Shutdown::Write).unwrap();
    let served = sockets.recv_timeout(DEADLINE).unwrap();
    assert_ended(&served);
    let mut moved = Instant::now();
    while (&served).write(&[7; 64 * 1024]).is_ok() {
        moved = Instant::now();
    }
    let still = moved.elapsed();
    assert!(still < LINGER + Duration::from_secs(3), "{still:?}");
    eventually("the visitor is reset", || visitor.peer_addr().is_err());
}

/// The service answers and closes while most of what the visitor sends is unread: its kernel resets
/// the connection behind the answer.
fn an_early_answer_reaches_a_visitor_that_still_sends(protection: Protection) {
    const VISITORS: usize = 60;
    const AT_A_TIME: usize = 6;
    const ANSWER: &[u8] = b"HTTP/1.1 413 Content Too Large\r\nConnection: close\r\n\r\ntoo large";
    let service = Service::start(|mut socket| {
        socket.read_exact(&mut [0; 1000]).unwrap();
        socket.write_all(ANSWER).unwrap();
        // This byte and what follows are unread when the service closes.
        socket.peek(&mut [0]).unwrap();
    });
    let tunnel = Tunnel::start(protection, service.addr, 8);
    let answered = AtomicUsize::new(0);
    thread::scope(|scope| {
        for _ in 0..AT_A_TIME {
            scope.spawn(|| {
                for _ in 0..VISITORS / AT_A_TIME {
                    let mut visitor = tunnel.visit();
                    // The reset may come before all is written.
                    let _ = visitor.write_all(&vec![7; 2 * 1024 * 1024]);
                    let record = Record::of(&visitor);
                    answered.fetch_add(usize::from(record.bytes == ANSWER), Ordering::SeqCst);
                }
            });
        }
    });
    assert_eq!(answered.into_inner(), VISITORS);
}

/// Other visitors end all the time meanwhile, which must not begin the wait anew.
fn linger_holds_while_a_stop_drains(protection: Protection) {
    const LINGER: Duration = Duration::from_secs(1);
    let service = Service::echo_or_silent();
    let server = RunningServer::start(with!(server_options(protection);
            linger: LINGER,
    ));
    let _client = RunningClient::start(client_options(&server, service.addr));
    let [mut silent, others] = [1, 50].map(|count| {
        let visitors = (0..count).map(|_| server.visit()).collect::<Vec<_>>();
        visitors.iter().for_each(crate::support::echo);
        visitors
    });
    let silent = silent.remove(0);
    (&silent).write_all(b"?").unwrap();
    silent.shutdown(Shutdown::Write).unwrap();
    server.handle().stop(Duration::from_secs(3600));
    let start = Instant::now();
    thread::scope(|scope| {
        scope.spawn(|| {
            for other in others {
                thread::sleep(Duration::from_millis(100));
                drop(other);
            }
        });
        assert_reset(&silent, DEADLINE);
        assert!(start.elapsed() < LINGER + Duration::from_secs(3));
    });
}

fn a_stop_drains_first_and_cuts_what_is_left(protection: Protection) {
    let service = Service::echo();
    let mut tunnel = Tunnel::start(protection, service.addr, 8);
    let (ends, stays) = (tunnel.visit(), tunnel.visit());
    assert_echo(&ends, "one");
    assert_echo(&stays, "other");
    tunnel.server.handle().stop(Duration::from_secs(3600));
    // New visitors are refused, while those that are there go on.
    let refused = || TcpStream::connect(tunnel.server.public).is_err();
    eventually("the public port is closed", refused);
    assert_echo(&ends, "still one");
    ends.shutdown(Shutdown::Write).unwrap();
    assert_ended(&ends);
    assert_echo(&stays, "still the other");
    tunnel.server.handle().stop(Duration::ZERO);
    assert_reset(&stays, AT_ONCE);
    tunnel.server.wait_for_end();
}

fn a_client_that_stops_drains_as_well(protection: Protection) {
    let service = Service::echo();
    let mut tunnel = Tunnel::start(protection, service.addr, 8);
    let visitor = tunnel.visit();
    assert_echo(&visitor, "before");
    tunnel.client.handle().stop(Duration::from_secs(3600));
    assert_echo(&visitor, "while");
    drop(visitor);
    tunnel.client.wait_for_end();
}

/// The kernel of a killed process closes what it held.
#[cfg(unix)]
fn a_killed_program_looks_like_an_abort_to_both_ends(protection: Protection) {
    for killed in ["tpserver", "tpclient"] {
        let (service, sockets) = handing_out();
        let (server, addresses) = Program::server(protection, &[]);
        let client = Program::client(protection, addresses, service.addr, &[]);
        let visitor = crate::support::connect(addresses[0]);
        read_hello(&visitor);
        let served = sockets.recv_timeout(DEADLINE).unwrap();
        match killed {
            "tpserver" => drop(server),
            _ => drop(client),
        }
        assert_reset(&visitor, AT_ONCE);
        assert_reset(&served, AT_ONCE);
    }
}

fn an_abort_is_passed_on_to_an_end_that_does_not_read(protection: Protection) {
    let (service, connections) = handing_out();
    let tunnel = Tunnel::start(protection, service.addr, 8);
    let mut visitor = tunnel.visit();
    let silent = connections.recv_timeout(DEADLINE).unwrap();
    let piece = vec![7; 64 * 1024];
    visitor.set_write_timeout(Some(AT_ONCE / 4)).unwrap();
    while visitor.write_all(&piece).is_ok() {}
    reset_on_close(&visitor);
    drop(visitor);
    let start = Instant::now();
    eventually("the service is told", || silent.peer_addr().is_err());
    assert!(start.elapsed() < Duration::from_secs(5));
}

/// Each visit sends a byte, and however far it has come when the server is killed, the service may
/// not take it for one that sent none.
fn a_killed_server_makes_no_visit_look_empty(protection: Protection) {
    const KILLS: usize = 6;
    const VISITORS: usize = 8;
    let (service, records) = Service::recording();
    for _ in 0..KILLS {
        let (server, addresses) = Program::server(protection, &[]);
        let _client = Program::client(protection, addresses, service.addr, &[]);
        let killed = AtomicBool::new(false);
        let mut seen = 0;
        thread::scope(|scope| {
            for _ in 0..VISITORS {
                scope.spawn(|| {
                    while !killed.load(Ordering::SeqCst) {
                        let _ = TcpStream::connect(addresses[0]).and_then(|mut visitor| {
                            visitor.set_read_timeout(Some(DEADLINE))?;
                            visitor.write_all(b"!")?;
                            visitor.shutdown(Shutdown::Write)?;
                            visitor.read(&mut [0])
                        });
                    }
                });
            }
            while seen < 200 {
                let record = records.recv_timeout(DEADLINE).unwrap();
                assert_ne!(record, Record::whole(b""));
                seen += 1;
            }
            drop(server);
            killed.store(true, Ordering::SeqCst);
        });
        while let Ok(record) = records.recv_timeout(Duration::from_millis(200)) {
            assert_ne!(record, Record::whole(b""));
        }
    }
}
