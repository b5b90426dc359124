//! A relay that spoils what passes through it, as bad networks do, and as a test says while it runs.
//! It knows bytes and the ends of connections, and nothing of messages. And what the programs make
//! of such a network.
#![cfg(target_os = "linux")]

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock, Weak, mpsc};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::Signal;

use crate::programs::{Launch, Program};
use crate::stop::under_load;
use crate::support::{
    DEADLINE, Pattern, Protection, Record, Service, assert_echo, assert_ended, assert_reset,
    connect, eventually, expect_pattern, plain_and_sealed, reset_on_close, send_pattern,
};

plain_and_sealed! {
    a_bad_network [
        a_slow_path_loses_nothing,
        a_short_silence_loses_nothing,
        a_long_silence_is_noticed_and_survived,
        a_reset_of_all_connections_is_passed_on_and_survived,
        a_far_client_is_replaced_without_losing_a_visitor,
    ],
}

/// What the relay does to connections, those of now and new ones. Bytes are counted in each
/// direction of each connection, from when the fault was set.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Fault {
    /// None: bytes, ends and resets pass.
    Pass,
    /// All passes, each chunk so much later.
    Delay(Duration),
    /// All passes, in slices of one byte up to so many, written one by one.
    Slices(usize),
    /// Nothing passes, and nobody is told. All of it does when the hole has gone, as it would be
    /// sent again on a network.
    BlackHole,
    /// After so many bytes both sides are reset.
    Reset(u64),
    /// After so many bytes both sides see a proper end, and what they still send is lost.
    Truncate(u64),
    /// A bit of the byte that comes after so many is another one.
    Flip(u64),
}

/// Stands before a server, and ends with all its connections when dropped.
pub struct FaultyRelay {
    pub addr: SocketAddr,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    to: SocketAddr,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    fault: Fault,
    /// How often one was set.
    turn: u64,
    stopped: bool,
    relayed: Vec<Weak<Relayed>>,
}

/// Two connections that are one for those at their ends.
struct Relayed {
    client: TcpStream,
    server: OnceLock<TcpStream>,
    /// Both sides were told that it has ended.
    truncated: AtomicBool,
    /// How many directions have ended well.
    ended: AtomicUsize,
}

/// What one direction has carried since a fault was set.
struct Count {
    turn: u64,
    bytes: u64,
}

impl FaultyRelay {
    /// On any port, to this server.
    pub fn start(to: SocketAddr) -> Self {
        Self::start_on(([127, 0, 0, 1], 0).into(), to)
    }

    /// On this port.
    pub fn start_on(addr: SocketAddr, to: SocketAddr) -> Self {
        let listener = TcpListener::bind(addr).unwrap();
        let addr = listener.local_addr().unwrap();
        let shared = Arc::new(Shared {
            to,
            state: Mutex::new(State {
                fault: Fault::Pass,
                turn: 0,
                stopped: false,
                relayed: Vec::new(),
            }),
            changed: Condvar::new(),
        });
        let accepting = shared.clone();
        Self {
            addr,
            shared,
            thread: Some(thread::spawn(move || accepting.accept(&listener))),
        }
    }

    /// From now on.
    pub fn set(&self, fault: Fault) {
        let mut state = self.shared.state.lock();
        state.fault = fault;
        state.turn += 1;
        self.shared.changed.notify_all();
    }

    /// Resets both sides of every connection, even in a black hole.
    pub fn reset_all(&self) {
        self.shared.all().iter().for_each(|it| it.abort());
    }

    /// Shows both sides of every connection a proper end, even in a black hole.
    pub fn end_all(&self) {
        self.shared.all().iter().for_each(|it| it.truncate());
    }
}

impl Drop for FaultyRelay {
    fn drop(&mut self) {
        self.shared.state.lock().stopped = true;
        self.shared.changed.notify_all();
        self.reset_all();
        // Wakes the thread that accepts.
        let _ = TcpStream::connect(self.addr);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn all(&self) -> Vec<Arc<Relayed>> {
        let state = self.state.lock();
        state.relayed.iter().filter_map(Weak::upgrade).collect()
    }

    /// Ends when all that was accepted has ended.
    fn accept(&self, listener: &TcpListener) {
        thread::scope(|scope| {
            while let Ok((client, _)) = listener.accept() {
                let relayed = Arc::new(Relayed {
                    client,
                    server: OnceLock::new(),
                    truncated: AtomicBool::new(false),
                    ended: AtomicUsize::new(0),
                });
                let mut state = self.state.lock();
                if state.stopped {
                    return relayed.abort();
                }
                state.relayed.retain(|it| it.strong_count() > 0);
                state.relayed.push(Arc::downgrade(&relayed));
                drop(state);
                scope.spawn(move || self.relay(&relayed));
            }
        });
    }

    fn relay(&self, relayed: &Relayed) {
        self.hold();
        let Ok(server) = TcpStream::connect_timeout(&self.to, DEADLINE) else {
            return relayed.abort();
        };
        let (client, server) = (&relayed.client, relayed.server.get_or_init(|| server));
        for socket in [client, server] {
            // Else the slices would be put together again.
            let _ = socket.set_nodelay(true);
        }
        if relayed.truncated.load(Ordering::SeqCst) {
            // Before this side was there.
            relayed.truncate();
        }
        thread::scope(|scope| {
            scope.spawn(|| self.carry(relayed, client, server));
            self.carry(relayed, server, client);
        });
    }

    /// Waits until something may pass, and says what is to become of it.
    fn hold(&self) -> (Fault, u64) {
        let mut delayed = false;
        loop {
            let mut state = self.state.lock();
            let held = |state: &mut State| state.fault == Fault::BlackHole && !state.stopped;
            self.changed.wait_while(&mut state, held);
            match state.fault {
                Fault::Delay(delay) if !delayed && !state.stopped => {
                    drop(state);
                    thread::sleep(delay);
                    // A hole may have come meanwhile.
                    delayed = true;
                }
                fault => return (fault, state.turn),
            }
        }
    }

    /// Carries one direction until it ends.
    fn carry(&self, relayed: &Relayed, mut from: &TcpStream, to: &TcpStream) {
        let mut buffer = vec![0; 64 * 1024];
        let mut count = Count { turn: 0, bytes: 0 };
        loop {
            let got = from.read(&mut buffer);
            let (fault, turn) = self.hold();
            if turn != count.turn {
                count = Count { turn, bytes: 0 };
            }
            let lost = relayed.truncated.load(Ordering::SeqCst);
            let passed = match got {
                Ok(0) if lost || relayed.is_end(from) => break,
                Ok(1..) if lost => true,
                Ok(size @ 1..) => relayed.pass(fault, &mut count, &mut buffer[..size], to),
                _ => false,
            };
            if !passed && !relayed.truncated.load(Ordering::SeqCst) {
                return relayed.abort();
            }
            if got.is_err() {
                return;
            }
        }
        relayed.end(from, to);
    }
}

impl Relayed {
    /// Passes a chunk on as the fault wants it. False if that is not possible.
    fn pass(&self, fault: Fault, count: &mut Count, mut chunk: &mut [u8], to: &TcpStream) -> bool {
        let before = count.bytes;
        count.bytes += chunk.len() as u64;
        let is_in = |at: u64| (before..count.bytes).contains(&at);
        match fault {
            Fault::Slices(most) => return write_sliced(chunk, most, before, to).is_ok(),
            Fault::Flip(at) if is_in(at) => chunk[(at - before) as usize] ^= 1 << (at % 8),
            Fault::Reset(at) | Fault::Truncate(at) if at <= count.bytes => {
                chunk = &mut chunk[..at.saturating_sub(before) as usize];
            }
            _ => {}
        }
        let written = { to }.write_all(chunk).is_ok();
        match fault {
            Fault::Reset(at) if at <= count.bytes => self.abort(),
            Fault::Truncate(at) if at <= count.bytes => self.truncate(),
            _ => {}
        }
        written
    }

    /// Is an end of input one? The kernel reports a reset once, and the other direction may have been
    /// told. A connection that has ended both ways looks like one that was reset.
    fn is_end(&self, from: &TcpStream) -> bool {
        self.ended.load(Ordering::SeqCst) > 0 || from.peer_addr().is_ok()
    }

    /// Passes an end on, and looks out for a reset: the other direction need not meet it.
    fn end(&self, from: &TcpStream, to: &TcpStream) {
        self.ended.fetch_add(1, Ordering::SeqCst);
        let _ = to.shutdown(Shutdown::Write);
        // What is reported in any case: a reset, or that the other direction has ended, too.
        let mut hung_up = [PollFd::new(from, PollFlags::empty())];
        let _ = poll(&mut hung_up, None);
        if self.ended.load(Ordering::SeqCst) < 2 && !self.truncated.load(Ordering::SeqCst) {
            self.abort();
        }
    }

    fn sockets(&self) -> impl Iterator<Item = &TcpStream> {
        [&self.client].into_iter().chain(self.server.get())
    }

    fn abort(&self) {
        for socket in self.sockets() {
            reset_on_close(socket);
            // Sends RST right away, whoever is at work on the socket.
            let _ = rustix::net::connect_unspec(socket);
        }
    }

    fn truncate(&self) {
        self.truncated.store(true, Ordering::SeqCst);
        for socket in self.sockets() {
            let _ = socket.shutdown(Shutdown::Write);
        }
    }
}

/// `seed` makes the sizes.
fn write_sliced(
    mut chunk: &[u8],
    most: usize,
    seed: u64,
    mut to: &TcpStream,
) -> std::io::Result<()> {
    let mut random = Random::new(seed);
    while !chunk.is_empty() {
        let size = 1 + random.below(most.min(chunk.len()));
        to.write_all(&chunk[..size])?;
        chunk = &chunk[size..];
    }
    Ok(())
}

/// Numbers that look random, the same ones for the same seed.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        // Zero would stay zero, and small seeds would begin alike.
        Self((seed ^ 0x5851_f42d_4c95_7f2d).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub fn below(&mut self, limit: usize) -> usize {
        // The lowest bits are the least random ones.
        ((self.next() >> 11) % limit as u64) as usize
    }

    /// A time between these.
    pub fn time(&mut self, least: u64, most: u64) -> Duration {
        Duration::from_millis(least + self.below((most - least + 1) as usize) as u64)
    }
}

/// A connection through a relay: its end here, and the one at a service.
struct Through {
    relay: FaultyRelay,
    near: TcpStream,
    far: TcpStream,
    _service: (Service, mpsc::Receiver<TcpStream>),
}

impl Through {
    fn start() -> Self {
        let (service, sockets) = handing_out();
        let relay = FaultyRelay::start(service.addr);
        let near = connect(relay.addr);
        let far = sockets.recv_timeout(DEADLINE).unwrap();
        Self {
            relay,
            near,
            far,
            _service: (service, sockets),
        }
    }
}

/// A service that hands its connections out.
fn handing_out() -> (Service, mpsc::Receiver<TcpStream>) {
    let (sender, sockets) = mpsc::channel();
    let service = Service::start(move |socket| {
        let _ = sender.send(socket);
    });
    (service, sockets)
}

/// Sends this many bytes both ways at once, and expects them.
fn exchange(near: &TcpStream, far: &TcpStream, size: usize) {
    thread::scope(|scope| {
        scope.spawn(|| send_pattern(near, 1, size));
        scope.spawn(|| send_pattern(far, 2, size));
        scope.spawn(|| expect_pattern(far, 1, size));
        expect_pattern(near, 2, size);
    });
}

#[test]
fn the_relay_passes_bytes_ends_and_resets() {
    let Through {
        relay,
        near,
        far,
        _service,
    } = Through::start();
    exchange(&near, &far, 1_000_000);
    near.shutdown(Shutdown::Write).unwrap();
    assert_ended(&far);
    send_pattern(&far, 3, 1000);
    expect_pattern(&near, 3, 1000);
    reset_on_close(&near);
    drop(near);
    // Nothing is on its way here that could meet the reset.
    eventually("the reset has passed", || far.peer_addr().is_err());

    let near = connect(relay.addr);
    assert_silent(&near);
    drop(relay);
    assert_reset(&near, DEADLINE);
}

fn assert_silent(near: &TcpStream) {
    near.set_read_timeout(Some(Duration::from_millis(100)))
        .unwrap();
    let error = { near }.read(&mut [0]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::WouldBlock);
    near.set_read_timeout(Some(DEADLINE)).unwrap();
}

#[test]
fn the_relay_delays_and_slices() {
    const DELAY: Duration = Duration::from_millis(200);
    let Through {
        relay, near, far, ..
    } = &Through::start();
    relay.set(Fault::Delay(DELAY));
    let start = Instant::now();
    exchange(near, far, 1000);
    assert!(start.elapsed() >= DELAY);
    relay.set(Fault::Slices(3));
    exchange(near, far, 10_000);
    // Slices that nobody has read yet are put together again, on a busy machine all of them.
    eventually("slices come one by one", || {
        send_pattern(near, 1, 10_000);
        count_reads(far, 10_000) > 10
    });
}

/// How many reads it takes to get so many bytes.
fn count_reads(mut from: &TcpStream, size: usize) -> usize {
    let mut buffer = vec![0; size];
    let (mut filled, mut reads) = (0, 0);
    while filled < size {
        let count = from.read(&mut buffer[filled..]).unwrap();
        assert!(count > 0, "an end after {filled} bytes");
        filled += count;
        reads += 1;
    }
    reads
}

fn expect_rest(mut from: &TcpStream, wanted: &[u8]) {
    let mut rest = vec![0; wanted.len()];
    from.read_exact(&mut rest).unwrap();
    assert_eq!(rest, wanted);
}

#[test]
fn the_relays_black_hole_holds_all_back() {
    let Through {
        relay, near, far, ..
    } = &Through::start();
    relay.set(Fault::BlackHole);
    let during = connect(relay.addr);
    send_pattern(&during, 1, 1000);
    send_pattern(near, 1, 1000);
    near.shutdown(Shutdown::Write).unwrap();
    assert_silent(far);
    assert_silent(&during);
    relay.set(Fault::Pass);
    expect_pattern(far, 1, 1000);
    assert_ended(far);
    relay.set(Fault::BlackHole);
    relay.reset_all();
    assert_reset(near, DEADLINE);
    assert_reset(&during, DEADLINE);
    // This one has had its end already.
    eventually("the other side is reset", || far.peer_addr().is_err());
}

#[test]
fn the_relay_cuts_and_changes_where_it_is_told() {
    const AT: u64 = 1234;
    for fault in [Fault::Reset(AT), Fault::Truncate(AT), Fault::Flip(AT)] {
        let Through {
            relay, near, far, ..
        } = &Through::start();
        exchange(near, far, 100);
        relay.set(fault);
        send_pattern(near, 1, 5000);
        // Unless it has been reset already.
        let _ = near.shutdown(Shutdown::Write);
        let Record { mut bytes, error } = Record::of(far);
        let (whole, cut) = (5000, AT as usize);
        let wanted = match fault {
            Fault::Reset(_) => (cut, Some(ErrorKind::ConnectionReset)),
            Fault::Truncate(_) => (cut, None),
            _ => {
                bytes[cut] ^= 1 << (AT % 8);
                (whole, None)
            }
        };
        assert_eq!((bytes.len(), error), wanted, "{fault:?}");
        assert_eq!(bytes, pattern(1, 5000)[..bytes.len()], "{fault:?}");
        match fault {
            Fault::Reset(_) => assert_reset(near, DEADLINE),
            Fault::Truncate(_) => assert_ended(near),
            _ => {}
        }
    }
}

#[test]
fn the_relay_ends_all_connections_properly() {
    let Through {
        relay, near, far, ..
    } = &Through::start();
    relay.end_all();
    assert_ended(near);
    assert_ended(far);
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

/// For longer than a session lives that hears nothing.
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
    const SILENCE: Duration = Duration::from_secs(3);
    let service = exchanging::<SIZE>();
    let apart = Apart::start(protection, service.addr);
    let visitor = apart.visit();
    { &visitor }.write_all(&[1]).unwrap();
    let start = Instant::now();
    thread::scope(|scope| {
        // Under way already, and about to begin.
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
    // Who was there is served on.
    expect_rest(&before, b"during");
    apart.client.wait_for_lines("connected to", 2);
    assert_echo(&apart.visit(), "after");
    let back = start.elapsed();
    assert!(back < BACK, "back after {back:?}");
}

/// A visitor that comes while the client drops the session may be given a tunnel of that one, and
/// is reset. One that comes again is served.
fn a_reset_of_all_connections_is_passed_on_and_survived(protection: Protection) {
    const AT_ONCE: Duration = Duration::from_secs(1);
    const BACK: Duration = Duration::from_secs(3);
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

/// Sends this and reads what comes, at the same time. No error only if both went well.
fn both_ways(socket: &TcpStream, sent: &[u8]) -> Record {
    thread::scope(|scope| {
        let sending = scope.spawn(|| {
            { socket }.write_all(sent)?;
            socket.shutdown(Shutdown::Write)
        });
        let mut record = Record::of(socket);
        // The kernel reports a reset once, to either.
        let failed = sending.join().unwrap().err().map(|error| error.kind());
        record.error = record.error.or(failed);
        record
    })
}

/// With a key. Without one nothing could tell.
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
        // Else the end of this connection could be taken for one that was meant.
        reset_on_close(&socket);
        let record = both_ways(&socket, &sent);
        keep_on_close(&socket, &record);
        let _ = sender.send(record);
    });
    let apart = Apart::start(Protection::Sealed, service.addr);
    let mut cut = 0;
    for visit in 0..VISITS {
        // Half of them among handshakes and first frames.
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

/// The first bytes of a pattern.
pub fn pattern(seed: u64, size: usize) -> Vec<u8> {
    let mut bytes = vec![0; size];
    Pattern::new(seed).fill(&mut bytes);
    bytes
}

/// Another one each time.
pub fn fresh_seed() -> u64 {
    getrandom::u64().unwrap()
}

/// With a key: what comes is no line that the other side has written, or there is no end in it.
#[test]
fn a_spoilt_control_link_is_given_up_and_comes_back() {
    let service = Service::echo();
    // Places in a heartbeat, the last one in the length of the next: what is longer than any line is
    // not waited for, however long heartbeats come.
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
