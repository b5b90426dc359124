//! What the programs make of a bad network: one that is slow, falls silent, resets, cuts or changes.
#![cfg(target_os = "linux")]

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::atomic::Ordering;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::support::faulty_relay::{Fault, FaultyRelay};
use crate::support::load::under_load;
use crate::support::programs::{Launch, Program};
use crate::support::random::{Random, fresh_seed};
use crate::support::{
    DEADLINE, Protection, Record, Service, assert_echo, assert_ended, assert_reset, connect,
    eventually, expect_pattern, pattern, plain_and_sealed, reset_on_close, send_pattern,
};

plain_and_sealed! {
    a_slow_path_loses_nothing,
    a_short_silence_loses_nothing,
    a_long_silence_is_noticed_and_survived,
    a_reset_of_all_connections_is_passed_on_and_survived,
    a_far_client_is_replaced_without_losing_a_visitor,
}

fn expect_rest(mut from: &TcpStream, wanted: &[u8]) {
    let mut rest = vec![0; wanted.len()];
    from.read_exact(&mut rest).unwrap();
    assert_eq!(rest, wanted);
}

/// Both programs, with a relay on the way to either port of the server.
struct Apart {
    server: Program,
    client: Program,
    public: SocketAddr,
    control: FaultyRelay,
    tunnel: FaultyRelay,
}

impl Apart {
    fn start(protection: Protection, local: SocketAddr) -> Self {
        let server = Launch::new(protection).server(&[]);
        let [public, tunnel, control] = server.addresses();
        let [tunnel, control] = [tunnel, control].map(FaultyRelay::start);
        let ways = [public, tunnel.addr, control.addr];
        let client = Launch::new(protection).client(ways, local, &[]);
        client.wait_for_line("connected to");
        Self {
            server,
            client,
            public,
            control,
            tunnel,
        }
    }

    fn set(&self, fault: Fault) {
        self.control.set(fault);
        self.tunnel.set(fault);
    }

    fn visit(&self) -> TcpStream {
        connect(self.public)
    }

    /// The client has had one session, and has it still.
    fn assert_one_session(&self) {
        assert_eq!(self.client.lines_with("lost the server"), [""; 0]);
        assert_eq!(self.server.lines_with(" left: "), [""; 0]);
    }
}

/// A service that is sent a seed and `SIZE` bytes made from it, and sends as many others at the same
/// time; then a word, if it got the right ones and their end.
fn exchanging<const SIZE: usize>() -> Service {
    Service::start(|socket| {
        let mut seed = [0];
        if { &socket }.read_exact(&mut seed).is_err() {
            return;
        }
        thread::scope(|scope| {
            scope.spawn(|| send_pattern(&socket, !u64::from(seed[0]), SIZE));
            expect_pattern(&socket, seed[0].into(), SIZE);
            assert_ended(&socket);
        });
        { &socket }.write_all(b"whole").unwrap();
    })
}

/// A visit of such a service that must go well.
fn exchange_with<const SIZE: usize>(visitor: &TcpStream, seed: u8) {
    { visitor }.write_all(&[seed]).unwrap();
    thread::scope(|scope| {
        scope.spawn(|| {
            send_pattern(visitor, seed.into(), SIZE);
            visitor.shutdown(Shutdown::Write).unwrap();
        });
        expect_pattern(visitor, !u64::from(seed), SIZE);
    });
    expect_rest(visitor, b"whole");
    assert_ended(visitor);
}

/// The path is slow for longer than a session lives that hears nothing.
fn a_slow_path_loses_nothing(protection: Protection) {
    const SIZE: usize = 20_000;
    let service = exchanging::<SIZE>();
    let server = Launch::new(protection).server(&[]);
    let [public, tunnel, control] = server.addresses();
    let slicing = [tunnel, control].map(FaultyRelay::start);
    slicing.iter().for_each(|it| it.set(Fault::Slices(7)));
    let delaying = [&slicing[0], &slicing[1]].map(|it| FaultyRelay::start(it.addr));
    let delay = Fault::Delay(Duration::from_millis(100));
    delaying.iter().for_each(|it| it.set(delay));
    let ways = [public, delaying[0].addr, delaying[1].addr];
    let client = Launch::new(protection).client(ways, service.addr, &[]);
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(8) {
        thread::scope(|scope| {
            for seed in 0..4 {
                scope.spawn(move || exchange_with::<SIZE>(&connect(public), seed));
            }
        });
    }
    assert_eq!(client.lines_with("lost the server"), [""; 0]);
    assert_eq!(client.lines_with("connected to").len(), 1);
}

fn a_short_silence_loses_nothing(protection: Protection) {
    const SIZE: usize = 4_000_000;
    const SILENCE: Duration = Duration::from_secs(2);
    let service = exchanging::<SIZE>();
    let apart = Apart::start(protection, service.addr);
    let visitor = apart.visit();
    { &visitor }.write_all(&[1]).unwrap();
    let start = Instant::now();
    thread::scope(|scope| {
        // The silence comes when one transfer is under way already, and before another one begins.
        expect_pattern(&visitor, !1, SIZE);
        apart.set(Fault::BlackHole);
        scope.spawn(|| {
            send_pattern(&visitor, 1, SIZE);
            visitor.shutdown(Shutdown::Write).unwrap();
            expect_rest(&visitor, b"whole");
            assert_ended(&visitor);
        });
        scope.spawn(|| {
            exchange_with::<SIZE>(&apart.visit(), 2);
            assert!(start.elapsed() >= SILENCE, "nothing was held back");
        });
        thread::sleep(SILENCE);
        apart.set(Fault::Pass);
    });
    apart.assert_one_session();
}

fn a_long_silence_is_noticed_and_survived(protection: Protection) {
    const NOTICED: Duration = Duration::from_secs(8);
    const BACK: Duration = Duration::from_secs(12);
    let service = Service::echo();
    let apart = Apart::start(protection, service.addr);
    let before = apart.visit();
    assert_echo(&before, "before");
    apart.set(Fault::BlackHole);
    let start = Instant::now();
    apart.client.wait_for_line("lost the server");
    apart.server.wait_for_line(" left: ");
    let noticed = start.elapsed();
    assert!(noticed < NOTICED, "noticed after {noticed:?}");
    { &before }.write_all(b"during").unwrap();
    apart.set(Fault::Pass);
    let start = Instant::now();
    // A visitor from before the silence is served on.
    expect_rest(&before, b"during");
    apart.client.wait_for_lines("connected to", 2);
    assert_echo(&apart.visit(), "after");
    let back = start.elapsed();
    assert!(back < BACK, "back after {back:?}");
}

/// A visitor that comes while the client drops the session may be given a tunnel of that one, and
/// is reset. One that comes again is served.
fn a_reset_of_all_connections_is_passed_on_and_survived(protection: Protection) {
    // Whoever waits for a link to be silent for too long is back after 6 s.
    const AT_ONCE: Duration = Duration::from_secs(4);
    const BACK: Duration = Duration::from_secs(5);
    let (sender, sockets) = mpsc::channel();
    let service = Service::start(move |mut socket| {
        if socket.read_exact(&mut [0]).is_ok() && socket.write_all(b"!").is_ok() {
            let _ = sender.send(socket);
        }
    });
    let apart = Apart::start(protection, service.addr);
    let pairs: Vec<_> = (0..8)
        .map(|_| {
            let visitor = apart.visit();
            assert_echo(&visitor, "!");
            (visitor, sockets.recv_timeout(DEADLINE).unwrap())
        })
        .collect();
    let start = Instant::now();
    apart.tunnel.reset_all();
    apart.control.reset_all();
    for (visitor, served) in &pairs {
        assert_reset(visitor, AT_ONCE);
        assert_reset(served, AT_ONCE);
    }
    eventually("a new visitor is served", || is_served(apart.public));
    let back = start.elapsed();
    let logs = [&apart.server, &apart.client].map(|program| program.lines_with(""));
    assert!(back < BACK, "served after {back:?}: {logs:#?}");
}

fn a_far_client_is_replaced_without_losing_a_visitor(protection: Protection) {
    let service = Service::echo();
    let apart = Apart::start(protection, service.addr);
    apart.set(Fault::Delay(Duration::from_millis(350)));
    let ways = [apart.public, apart.tunnel.addr, apart.control.addr];
    let mut clients = Vec::new();
    let [whole, refused] = under_load(apart.public, 0, |whole| {
        for _ in 0..4 {
            let so_far = whole.load(Ordering::SeqCst);
            eventually("visits", || whole.load(Ordering::SeqCst) >= so_far + 8);
            clients.last().unwrap_or(&apart.client).signal(Signal::TERM);
            clients.push(Program::client(protection, ways, service.addr, &[]));
        }
    });
    assert_eq!(refused, 0, "beside {whole}");
}

/// Whether a visitor that sends a byte gets one. If not, it must be reset.
fn is_served(public: SocketAddr) -> bool {
    let visit = || {
        let mut visitor = TcpStream::connect(public)?;
        visitor.set_read_timeout(Some(DEADLINE))?;
        visitor.write_all(b"!")?;
        visitor.read_exact(&mut [0])
    };
    match visit() {
        Ok(()) => true,
        Err(error) => {
            let kinds = [ErrorKind::ConnectionReset, ErrorKind::BrokenPipe];
            assert!(kinds.contains(&error.kind()), "{error}");
            false
        }
    }
}

/// Sends this and reads what comes, at the same time. The record has no error only if both went
/// well.
fn both_ways(socket: &TcpStream, sent: &[u8]) -> Record {
    thread::scope(|scope| {
        let sending = scope.spawn(|| {
            { socket }.write_all(sent)?;
            socket.shutdown(Shutdown::Write)
        });
        let mut record = Record::of(socket);
        // The kernel reports a reset once: to the sender or to the receiver.
        let failed = sending.join().unwrap().err().map(|error| error.kind());
        record.error = record.error.or(failed);
        record
    })
}

/// Only a key tells a changed stream from a whole one: there is no such test without a key.
#[test]
fn no_spoilt_stream_is_taken_for_a_whole_one() {
    const VISITS: usize = 100;
    const SIZE: usize = 200_000;
    let seed = fresh_seed();
    eprintln!("seed {seed}");
    let mut random = Random::new(seed);
    let [up, down] = [1, 2].map(|seed| pattern(seed, SIZE));
    let (sender, records) = mpsc::channel();
    let sent = down.clone();
    let service = Service::start(move |socket| {
        // A connection that is dropped in the middle must not look like one that has ended well.
        reset_on_close(&socket);
        let record = both_ways(&socket, &sent);
        keep_on_close(&socket, &record);
        let _ = sender.send(record);
    });
    let apart = Apart::start(Protection::Sealed, service.addr);
    let mut cut = 0;
    for visit in 0..VISITS {
        // Half of the faults are among handshakes and first frames.
        let at = random.below([2 * SIZE, 300][visit % 2]) as u64;
        let fault = [Fault::Flip(at), Fault::Truncate(at)][random.below(2)];
        apart.tunnel.set(fault);
        if let Ok(visitor) = TcpStream::connect(apart.public) {
            reset_on_close(&visitor);
            // A length that was changed lets its reader wait, maybe for ever.
            let patience = Some(Duration::from_secs(1));
            visitor.set_read_timeout(patience).unwrap();
            let record = both_ways(&visitor, &up);
            keep_on_close(&visitor, &record);
            cut += usize::from(record.error.is_some());
            assert_whole_or_cut(&record, &down, fault);
        }
        for record in records.try_iter() {
            assert_whole_or_cut(&record, &up, fault);
        }
    }
    assert!((VISITS / 4..VISITS).contains(&cut), "{cut} were cut");
    apart.tunnel.set(Fault::Pass);
    // Idle tunnels may be spoilt still.
    apart.tunnel.reset_all();
    apart.control.reset_all();
    apart.client.wait_for_lines("connected to", 2);
    assert_eq!(both_ways(&apart.visit(), &up), Record::whole(&down));
    drop((apart, service));
    for record in records.iter() {
        assert_whole_or_cut(&record, &up, Fault::Pass);
    }
}

/// A connection that has ended well may be closed like one.
fn keep_on_close(socket: &TcpStream, record: &Record) {
    if record.error.is_none() {
        socket2::SockRef::from(socket).set_linger(None).unwrap();
    }
}

fn assert_whole_or_cut(record: &Record, wanted: &[u8], fault: Fault) {
    let Record { bytes, error } = record;
    assert!(wanted.starts_with(bytes), "changed bytes, {fault:?}");
    let (size, whole) = (bytes.len(), wanted.len());
    assert!(
        error.is_some() || size == whole,
        "{size} of {whole} bytes and an end, {fault:?}"
    );
}

/// The links have a key: what comes is no line that the other side has written, or there is no end
/// in it.
#[test]
fn a_spoilt_control_link_is_given_up_and_comes_back() {
    let service = Service::echo();
    // The bits are in a heartbeat, the last one in the length of the next heartbeat. Nobody waits
    // for a frame that is longer than any line, even if heartbeats go on.
    let flips = [2, 21, 22].map(Fault::Flip);
    thread::scope(|scope| {
        for fault in flips.into_iter().chain([Fault::Truncate(1)]) {
            let local = service.addr;
            scope.spawn(move || {
                let apart = Apart::start(Protection::Sealed, local);
                apart.control.set(fault);
                apart.client.wait_for_line("lost the server");
                apart.control.set(Fault::Pass);
                apart.client.wait_for_lines("connected to", 2);
                assert_echo(&apart.visit(), "back");
            });
        }
    });
}
