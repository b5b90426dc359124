//! A seeded mix of faults between many short transfers: whatever goes wrong, and when, nobody takes
//! a cut or changed stream for a whole one, and nothing is left of it afterwards.
//!
//! `TP_SOAK_SECS` says how long, `TP_SOAK_SEED` repeats a draw; threads and the network are as they
//! are, so that a repeated one need not end the same.
#![cfg(target_os = "linux")]

use std::collections::HashSet;
use std::fmt::Debug;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rustix::process::Signal;

use crate::support::faulty_relay::{Fault, FaultyRelay};
use crate::support::programs::{Both, Launch, Program, ports_of};
use crate::support::random::{Random, fresh_seed};
use crate::support::{
    Protection, Service, eventually, pattern, plain_and_sealed, reset_on_close, take_turn,
};

plain_and_sealed! {
    soak (sealed as root),
}

/// In seconds: what is worth it each time, and what is long enough for faults that take their time.
const SHORT: u64 = 8;
const LONG: u64 = 60;

/// Threads that visit one tunnel, and how many more visits each has at the same time now and then.
const VISITORS: u64 = 8;
const COMPANIONS: usize = 2;

/// The most bytes of one direction.
const MOST: usize = 300_000;

/// Whoever waits for longer has been forgotten: no fault lasts that long, and few follow one
/// another without a gap.
const FORGOTTEN: Duration = Duration::from_secs(40);

/// When all faults are gone, so many visits in a row must go well within this time. A client that has
/// lost its server often waits for up to 10 s.
const FRESH: usize = 20;
const RECOVERY: Duration = Duration::from_secs(15);

/// In KiB, of each program: when all is over, and while every direction of every visit carries bulk.
const MEMORY: usize = 24 * 1024;
const MOST_MEMORY: usize = VISITORS as usize * (1 + COMPANIONS) * 2 * 1024;

/// Whole visits of each tunnel, far below the seventy or more that two idle cores see to.
const LEAST_A_SECOND: usize = 3;

fn soak(protection: Protection) {
    let host = match protection {
        Protection::Plain => "127.0.78.61",
        Protection::Sealed => "127.0.78.62",
    };
    let seconds = from_environment("TP_SOAK_SECS").unwrap_or(SHORT);
    let seed = from_environment("TP_SOAK_SEED").unwrap_or_else(fresh_seed);
    eprintln!("soak: {seconds} s, seed {seed}");
    soak_tunnel(protection, host, seconds, seed);
}

fn from_environment<T: FromStr<Err: Debug>>(name: &str) -> Option<T> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().expect(name))
}

/// One tunnel, with its visitors, its service, and what goes wrong.
fn soak_tunnel(protection: Protection, host: &str, seconds: u64, seed: u64) {
    let soak = Arc::new(Soak::new(seed, protection));
    let serving = soak.clone();
    let service = Service::start(move |socket| {
        serving.serving.fetch_add(1, Ordering::SeqCst);
        serving.serve(&socket);
        serving.serving.fetch_sub(1, Ordering::SeqCst);
    });
    let turn = take_turn();
    let mut chaos = Chaos::start(&soak, host, service.addr, seconds > LONG);
    let public = chaos.both.addresses[0];
    let end = Instant::now() + Duration::from_secs(seconds);
    thread::scope(|scope| {
        for number in 1..=VISITORS {
            let soak = &soak;
            scope.spawn(move || soak.keep_visiting(public, number, end));
        }
        chaos.reign(end);
    });
    drop(turn);
    soak.assert_nothing_wrong();
    chaos.assert_recovered();
    soak.assert_all_ended(chaos.is_original());
    eprintln!("{protection:?}: {}; {}", soak.summary(), chaos.summary());
    let (whole, least) = (soak.whole.get(), LEAST_A_SECOND * seconds as usize);
    assert!(whole >= least, "no more than {whole} whole, seed {seed}");
}

/// How a visit goes if nothing goes wrong.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    /// The visitor sends and ends; then it gets the reply, and the hash of what had come.
    VisitorFirst,
    /// The service sends and ends; then the visitor sends.
    ServiceFirst,
    /// Both send at the same time.
    Both,
    /// The same, but the visitor resets in the middle.
    VisitorResets,
    /// The visitor sends, ends and resets at once, and reads no reply.
    VisitorEndsAndResets,
    /// The service resets in the middle of what it sends, or in the place of it.
    ServiceResets,
    /// The visitor comes, sends nothing, and leaves.
    Silent,
}

const KINDS: [Kind; 7] = [
    Kind::VisitorFirst,
    Kind::ServiceFirst,
    Kind::Both,
    Kind::VisitorResets,
    Kind::VisitorEndsAndResets,
    Kind::ServiceResets,
    Kind::Silent,
];

/// What visitor and service do, drawn by the visitor and told by its header.
#[derive(Clone, Copy, Debug)]
struct Visit {
    kind: Kind,
    /// Makes the bytes of both directions.
    id: u64,
    /// How many bytes the visitor sends behind the header, and the service before a hash.
    up: usize,
    down: usize,
    /// The number of bytes after which there is a reset, if there is one.
    cut: usize,
    /// Whether the visitor and the service take their time to read.
    slow: [bool; 2],
}

/// No garbage begins like this.
const MAGIC: &[u8; 4] = b"soak";
const HEADER: usize = 26;

impl Visit {
    fn draw(random: &mut Random) -> Self {
        let kind = KINDS[random.below(KINDS.len())];
        let [up, down] = [(); 2].map(|()| {
            // Small sizes are as frequent as large ones.
            let most = 1 << random.below(20);
            random.below(most).min(MOST)
        });
        Self {
            kind,
            id: random.next(),
            up,
            down,
            cut: random.below(1 + up.min(down)),
            slow: [(); 2].map(|()| random.below(8) == 0),
        }
    }

    fn header(&self) -> Vec<u8> {
        let [visitor, service] = self.slow.map(u8::from);
        let sizes = [self.up, self.down, self.cut].map(|size| (size as u32).to_le_bytes());
        let mut header = MAGIC.to_vec();
        header.extend([self.kind as u8, visitor | service << 1]);
        header.extend(self.id.to_le_bytes());
        header.extend(sizes.concat());
        header
    }

    /// Returns None if this is no header.
    fn parse(header: &[u8; HEADER]) -> Option<Self> {
        let (head, numbers) = header.split_at(6);
        let (id, sizes) = numbers.split_first_chunk()?;
        let size = |at: usize| -> Option<usize> {
            let bytes = sizes.get(4 * at..)?.first_chunk()?;
            Some(u32::from_le_bytes(*bytes) as usize)
        };
        let visit = Self {
            kind: *KINDS.get(usize::from(head[4]))?,
            id: u64::from_le_bytes(*id),
            up: size(0)?,
            down: size(1)?,
            cut: size(2)?,
            slow: [1, 2].map(|bit| head[5] & bit != 0),
        };
        (visit.header() == header).then_some(visit)
    }

    /// What the visitor sends behind the header.
    fn request(&self) -> Vec<u8> {
        pattern(self.id, self.up)
    }

    /// What the service sends, the hash of what it has read included.
    fn reply(&self, hash: u64) -> Vec<u8> {
        let mut reply = pattern(!self.id, self.down);
        reply.extend(hash.to_le_bytes());
        reply
    }
}

/// Continues a hash (FNV-1a).
fn hash_on(hash: u64, bytes: &[u8]) -> u64 {
    let add = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
    bytes.iter().fold(hash, add)
}

const NO_BYTES: u64 = 0xcbf2_9ce4_8422_2325;

/// What has come, and why no more of it, if that was no end.
struct Got {
    size: usize,
    hash: u64,
    error: Option<ErrorKind>,
}

/// Reads until the end, or what is none.
fn receive(mut from: &TcpStream, slow: bool) -> Got {
    let mut buffer = vec![0; if slow { 4 * 1024 } else { 32 * 1024 }];
    let (mut size, mut hash) = (0, NO_BYTES);
    loop {
        match from.read(&mut buffer) {
            Ok(count @ 1..) => {
                hash = hash_on(hash, &buffer[..count]);
                size += count;
            }
            end => {
                let error = end.err().map(|error| error.kind());
                return Got { size, hash, error };
            }
        }
        if slow {
            thread::sleep(Duration::from_millis(3));
        }
    }
}

/// Sends these bytes and ends.
fn send(mut to: &TcpStream, bytes: &[u8]) -> io::Result<()> {
    to.write_all(bytes)?;
    to.shutdown(Shutdown::Write)
}

/// Sends and ends while it reads, and returns what came of both.
fn exchange(socket: &TcpStream, bytes: &[u8], slow: bool) -> (io::Result<()>, Got) {
    thread::scope(|scope| {
        let sending = scope.spawn(|| send(socket, bytes));
        let got = receive(socket, slow);
        (sending.join().unwrap(), got)
    })
}

/// What became of a visit, as one of its ends sees it.
#[derive(Clone, Copy, PartialEq)]
enum Outcome {
    /// All of it, with the right hash, and a proper end.
    Whole,
    /// An error said that there is more.
    Cut,
    /// A proper end in the place of the first byte.
    Nothing,
}

/// Returns what became of a visit by what one end has seen, or what is wrong with that. `sent` is
/// how sending went: the kernel reports a reset once, to the sender or to the receiver.
fn judge(sent: io::Result<()>, got: &Got, wanted: &[u8]) -> Result<Outcome, String> {
    let &Got { size, hash, error } = got;
    let whole = wanted.len();
    let right = |wanted: &[u8]| hash == hash_on(NO_BYTES, wanted);
    if !wanted.get(..size).is_some_and(right) {
        return Err(format!("other bytes among {size} of {whole}"));
    }
    match error.or(sent.err().map(|error| error.kind())) {
        Some(ErrorKind::WouldBlock) => Err(format!("forgotten after {size} bytes of {whole}")),
        Some(_) => Ok(Outcome::Cut),
        None if size == whole => Ok(Outcome::Whole),
        None if size == 0 => Ok(Outcome::Nothing),
        None => Err(format!("a proper end after {size} bytes of {whole}")),
    }
}

#[derive(Default)]
struct Counter(AtomicUsize);

impl Counter {
    fn add(&self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }

    fn get(&self) -> usize {
        self.0.load(Ordering::SeqCst)
    }
}

/// What visitors, service and chaos of one tunnel share.
struct Soak {
    seed: u64,
    protection: Protection,
    /// Visits that have reached the service.
    begun: Mutex<HashSet<u64>>,
    wrong: Mutex<Vec<String>>,
    whole: Counter,
    cut: Counter,
    /// Visits that found nobody who listens.
    refused: Counter,
    /// Visits that ended properly before the first byte: nobody must have served them.
    unserved: Mutex<Vec<Visit>>,
    /// Resets that were meant.
    reset: Counter,
    silent: Counter,
    /// Visits that looked silent to the service.
    empty: Counter,
    /// How many visits the service has at the moment.
    serving: AtomicUsize,
}

impl Soak {
    fn new(seed: u64, protection: Protection) -> Self {
        Self {
            seed,
            protection,
            begun: Mutex::default(),
            wrong: Mutex::default(),
            whole: Counter::default(),
            cut: Counter::default(),
            refused: Counter::default(),
            unserved: Mutex::default(),
            reset: Counter::default(),
            silent: Counter::default(),
            empty: Counter::default(),
            serving: AtomicUsize::new(0),
        }
    }

    fn wrong(&self, who: &str, what: impl Debug, why: &str) {
        let (seed, protection) = (self.seed, self.protection);
        let text = format!("seed {seed}, {protection:?}: {who}: {why}: {what:?}");
        self.wrong.lock().push(text);
    }

    fn assert_nothing_wrong(&self) {
        let wrong = self.wrong.lock();
        assert!(wrong.is_empty(), "{wrong:#?}");
    }

    /// Asserts what can be said only when all visits have ended. A program that takes the other one
    /// for an original marks no beginning of a visit, so that an empty visit can come of nothing.
    fn assert_all_ended(&self, original: bool) {
        let all = || self.serving.load(Ordering::SeqCst) == 0;
        eventually("all that were served have ended", all);
        let begun = self.begun.lock();
        for visit in self.unserved.lock().iter() {
            if begun.contains(&visit.id) {
                self.wrong(
                    "visitor",
                    visit,
                    "a proper end without a byte, and was served",
                );
            }
        }
        let (empty, silent) = (self.empty.get(), self.silent.get());
        if empty > silent && !original {
            self.wrong(
                "service",
                empty,
                &format!("more empty visits than {silent}"),
            );
        }
        self.assert_nothing_wrong();
    }

    /// Whether to go on until then.
    fn lasts(&self, end: Instant) -> bool {
        Instant::now() < end && self.wrong.lock().is_empty()
    }

    fn keep_visiting(&self, public: SocketAddr, number: u64, end: Instant) {
        let mut random = Random::new(self.seed ^ (number << 32) ^ self.protection as u64);
        while self.lasts(end) {
            let companions = match random.below(8) {
                0 => COMPANIONS,
                _ => 0,
            };
            thread::scope(|scope| {
                for _ in 0..companions {
                    let visit = Visit::draw(&mut random);
                    scope.spawn(move || self.visit(public, &visit));
                }
                self.visit(public, &Visit::draw(&mut random));
            });
        }
    }

    /// One visit from its beginning to its end. True if it was whole.
    fn visit(&self, public: SocketAddr, visit: &Visit) -> bool {
        let Ok(socket) = TcpStream::connect(public) else {
            self.refused.add();
            // The next server is on its way. Trying without a pause would take its processor time.
            thread::sleep(Duration::from_millis(10));
            return false;
        };
        self.visit_on(&socket, visit)
    }

    fn visit_on(&self, socket: &TcpStream, visit: &Visit) -> bool {
        prepare(socket);
        let outcome = match visit.kind {
            Kind::Silent => {
                self.silent.add();
                end_well(socket);
                return false;
            }
            Kind::VisitorResets | Kind::VisitorEndsAndResets => {
                self.reset.add();
                let _ = send_and_reset(socket, visit);
                return false;
            }
            _ => self.transfer(socket, visit),
        };
        let whole = outcome == Ok(Outcome::Whole);
        match outcome {
            Ok(Outcome::Whole) => {
                self.whole.add();
                end_well(socket);
            }
            Ok(Outcome::Cut) if visit.kind == Kind::ServiceResets => self.reset.add(),
            Ok(Outcome::Cut) => self.cut.add(),
            Ok(Outcome::Nothing) => self.unserved.lock().push(*visit),
            Err(why) => self.wrong("visitor", visit, &why),
        }
        whole
    }

    /// What the visitor does if it does not leave before the end.
    fn transfer(&self, mut socket: &TcpStream, visit: &Visit) -> Result<Outcome, String> {
        let (header, request, slow) = (visit.header(), visit.request(), visit.slow[0]);
        let all = [&header[..], &request].concat();
        match visit.kind {
            Kind::VisitorFirst => {
                let sent = send(socket, &all);
                let hash = hash_on(NO_BYTES, &request);
                judge(sent, &receive(socket, slow), &visit.reply(hash))
            }
            Kind::Both => {
                let (sent, got) = exchange(socket, &all, slow);
                judge(sent, &got, &visit.reply(NO_BYTES))
            }
            Kind::ServiceFirst => {
                let sent = socket.write_all(&header);
                let got = receive(socket, slow);
                let sent = sent.and_then(|()| send(socket, &request));
                judge(sent, &got, &visit.reply(NO_BYTES))
            }
            _ => {
                let sent = socket.write_all(&header);
                let whole = judge(sent, &receive(socket, slow), &visit.reply(NO_BYTES));
                match whole {
                    Ok(Outcome::Whole) => Err("whole, where a reset was due".to_owned()),
                    cut => cut,
                }
            }
        }
    }

    /// The service's end of a visit.
    fn serve(&self, socket: &TcpStream) {
        prepare(socket);
        let Some(visit) = self.read_header(socket) else {
            return;
        };
        if !self.begun.lock().insert(visit.id) {
            return self.wrong("service", visit, "a header that has come before");
        }
        match self.answer(socket, &visit) {
            Ok(Outcome::Whole) => end_well(socket),
            Ok(Outcome::Nothing) if visit.up > 0 => {
                self.wrong("service", visit, "a proper end behind the header");
            }
            Ok(_) => {}
            Err(why) => self.wrong("service", visit, &why),
        }
    }

    /// Returns None if there is no more to be done.
    fn read_header(&self, mut socket: &TcpStream) -> Option<Visit> {
        let (mut header, mut filled) = ([0; HEADER], 0);
        while filled < HEADER {
            match socket.read(&mut header[filled..]) {
                Ok(0) if filled == 0 => {
                    self.empty.add();
                    return None;
                }
                Ok(0) => {
                    self.wrong("service", &header[..filled], "a proper end in a header");
                    return None;
                }
                Ok(count) => filled += count,
                Err(error) => {
                    if error.kind() == ErrorKind::WouldBlock {
                        self.wrong("service", &header[..filled], "forgotten in a header");
                    }
                    return None;
                }
            }
            if header[0] != MAGIC[0] {
                // The bytes are a stranger's.
                return None;
            }
        }
        let visit = Visit::parse(&header);
        if visit.is_none() {
            self.wrong("service", header, "a header that nobody has sent");
        }
        visit
    }

    /// What the service does once it knows the visit.
    fn answer(&self, mut socket: &TcpStream, visit: &Visit) -> Result<Outcome, String> {
        let (request, slow) = (visit.request(), visit.slow[1]);
        match visit.kind {
            Kind::ServiceResets => {
                let reply = visit.reply(NO_BYTES);
                let _ = socket.write_all(&reply[..visit.cut]);
                Ok(Outcome::Cut)
            }
            Kind::ServiceFirst => {
                let sent = send(socket, &visit.reply(NO_BYTES));
                judge(sent, &receive(socket, slow), &request)
            }
            Kind::Both | Kind::VisitorResets => {
                let (sent, got) = exchange(socket, &visit.reply(NO_BYTES), slow);
                match judge(sent, &got, &request) {
                    Ok(Outcome::Whole) if visit.kind == Kind::VisitorResets => {
                        Err("a proper end in the place of a reset".to_owned())
                    }
                    outcome => outcome,
                }
            }
            _ => {
                let got = receive(socket, slow);
                let outcome = judge(Ok(()), &got, &request)?;
                if outcome == Outcome::Whole && send(socket, &visit.reply(got.hash)).is_err() {
                    return Ok(Outcome::Cut);
                }
                Ok(outcome)
            }
        }
    }

    fn summary(&self) -> String {
        format!(
            "{} visits were served, {} whole, {} cut, {} unserved, {} refused, {} reset as meant, \
             {} silent",
            self.begun.lock().len(),
            self.whole.get(),
            self.cut.get(),
            self.unserved.lock().len(),
            self.refused.get(),
            self.reset.get(),
            self.silent.get(),
        )
    }
}

/// Sets a deadline on reads and writes, and makes a close a reset until the visit has ended well.
fn prepare(socket: &TcpStream) {
    socket.set_read_timeout(Some(FORGOTTEN)).unwrap();
    socket.set_write_timeout(Some(FORGOTTEN)).unwrap();
    let _ = socket.set_nodelay(true);
    reset_on_close(socket);
}

fn end_well(socket: &TcpStream) {
    socket2::SockRef::from(socket).set_linger(None).unwrap();
}

/// A visitor that leaves in the middle, or with its end. The reset comes with the close.
fn send_and_reset(mut socket: &TcpStream, visit: &Visit) -> io::Result<()> {
    let mut all = visit.header();
    all.extend(visit.request());
    match visit.kind {
        Kind::VisitorResets => socket.write_all(&all[..HEADER + visit.cut]),
        _ => send(socket, &all),
    }
}

/// What goes wrong. The last two only where there is a key: without one, nothing tells a stream that
/// was changed or cut between the programs from one that was not.
#[derive(Clone, Copy, Debug)]
enum Trouble {
    Delay,
    Slices,
    BlackHole,
    Reset,
    Kill,
    Freeze,
    Terminate,
    Garbage,
    LocalRefuses,
    LocalIsSilent,
    Flip,
    Truncate,
}

const TROUBLES: [Trouble; 12] = [
    Trouble::Delay,
    Trouble::Slices,
    Trouble::BlackHole,
    Trouble::Reset,
    Trouble::Kill,
    Trouble::Freeze,
    Trouble::Terminate,
    Trouble::Garbage,
    Trouble::LocalRefuses,
    Trouble::LocalIsSilent,
    Trouble::Flip,
    Trouble::Truncate,
];

#[derive(Clone, Copy, Debug)]
enum Side {
    Server,
    Client,
}

/// Both programs, and all that can be done to them.
struct Chaos<'a> {
    soak: &'a Soak,
    random: Random,
    both: Both,
    control: FaultyRelay,
    tunnel: FaultyRelay,
    /// Before the local service. None while nobody listens there.
    local: Option<FaultyRelay>,
    local_addr: SocketAddr,
    service: SocketAddr,
    /// Whether there is time for a fault that ends sessions.
    long: bool,
    /// Programs that have ended.
    past: Vec<Program>,
    /// Connections that have sent garbage and stay for a while.
    strangers: Vec<TcpStream>,
    counts: [usize; TROUBLES.len()],
    /// The most that one program had, in KiB.
    most_memory: usize,
}

impl<'a> Chaos<'a> {
    fn start(soak: &'a Soak, host: &str, service: SocketAddr, long: bool) -> Self {
        let launch = Launch::new(soak.protection);
        let [public, tunnel, control] = ports_of(host);
        let local = FaultyRelay::start_on(SocketAddr::new(public.ip(), 0), service);
        let server = launch.on([public, tunnel, control]).server(&[]);
        server.addresses();
        let [to_tunnel, to_control] = [tunnel, control].map(FaultyRelay::start);
        let ways = [public, to_tunnel.addr, to_control.addr];
        let client = launch.client(ways, local.addr, &[]);
        Self {
            soak,
            random: Random::new(soak.seed ^ soak.protection as u64),
            both: Both::at_rest(server, client, [public, tunnel, control]),
            control: to_control,
            tunnel: to_tunnel,
            local_addr: local.addr,
            local: Some(local),
            service,
            long,
            past: Vec::new(),
            strangers: Vec::new(),
            counts: [0; TROUBLES.len()],
            most_memory: 0,
        }
    }

    /// Causes one trouble after another, and none at the end.
    fn reign(&mut self, end: Instant) {
        let kinds = match self.soak.protection {
            Protection::Plain => TROUBLES.len() - 2,
            Protection::Sealed => TROUBLES.len(),
        };
        while self.soak.lasts(end) {
            self.pause(50, 500);
            let kind = self.random.below(kinds);
            self.counts[kind] += 1;
            self.cause(TROUBLES[kind]);
            for side in [Side::Server, Side::Client] {
                let program = self.program(side);
                let ended = program.ended();
                assert!(ended.is_none(), "{side:?}: {:#?}", program.lines_with(""));
                self.most_memory = program.memory("Pss_Anon").max(self.most_memory);
            }
        }
        self.strangers.clear();
    }

    fn pause(&mut self, least: u64, most: u64) {
        thread::sleep(self.random.time(least, most));
    }

    /// A while, and now and then one that no session outlives.
    fn while_silent(&mut self) -> Duration {
        match self.long && self.random.below(8) == 0 {
            true => Duration::from_secs(8),
            false => self.random.time(100, 1000),
        }
    }

    fn cause(&mut self, trouble: Trouble) {
        let bytes = self.random.below(100_000) as u64;
        let short = self.random.time(50, 500);
        match trouble {
            Trouble::Delay => {
                let delay = self.random.time(1, 200);
                self.spoil(Fault::Delay(delay), short);
            }
            Trouble::Slices => {
                let most = 1 + self.random.below(1000);
                self.spoil(Fault::Slices(most), short);
            }
            Trouble::BlackHole => {
                let time = self.while_silent();
                self.spoil(Fault::BlackHole, time);
            }
            Trouble::Reset => match bytes % 2 {
                0 => self.relays().for_each(FaultyRelay::reset_all),
                _ => self.spoil(Fault::Reset(bytes), short),
            },
            Trouble::Truncate => match bytes % 2 {
                0 => self.relays().for_each(FaultyRelay::end_all),
                _ => self.spoil(Fault::Truncate(bytes), short),
            },
            Trouble::Flip => {
                self.spoil(Fault::Flip(bytes), short);
                // If the changed byte was a length, somebody waits for what never comes.
                self.control.reset_all();
                self.tunnel.reset_all();
            }
            Trouble::Kill => {
                let side = self.side();
                self.program(side).kill();
                self.restart(side);
            }
            Trouble::Freeze => self.freeze(),
            Trouble::Terminate => self.terminate(),
            Trouble::Garbage => self.send_garbage(),
            Trouble::LocalRefuses => {
                self.local = None;
                thread::sleep(short);
                self.local = Some(FaultyRelay::start_on(self.local_addr, self.service));
            }
            Trouble::LocalIsSilent => {
                let time = self.while_silent();
                self.spoil_local(Fault::BlackHole, time);
            }
        }
    }

    /// One of the two relays between the programs, or both.
    fn relays(&mut self) -> impl Iterator<Item = &FaultyRelay> + use<'_, 'a> {
        let which = 1 + self.random.below(3);
        let both = [(1, &self.control), (2, &self.tunnel)];
        let chosen = both.into_iter().filter(move |(bit, _)| which & bit != 0);
        chosen.map(|(_, relay)| relay)
    }

    fn spoil(&mut self, fault: Fault, time: Duration) {
        self.relays().for_each(|relay| relay.set(fault));
        thread::sleep(time);
        self.control.set(Fault::Pass);
        self.tunnel.set(Fault::Pass);
    }

    fn spoil_local(&mut self, fault: Fault, time: Duration) {
        let local = self.local.as_ref().unwrap();
        local.set(fault);
        thread::sleep(time);
        local.set(Fault::Pass);
    }

    fn side(&mut self) -> Side {
        [Side::Server, Side::Client][self.random.below(2)]
    }

    fn program(&mut self, side: Side) -> &mut Program {
        match side {
            Side::Server => &mut self.both.server,
            Side::Client => &mut self.both.client,
        }
    }

    /// Starts another program in the place of one that has ended.
    fn restart(&mut self, side: Side) {
        let launch = Launch::new(self.soak.protection);
        let ports @ [public, ..] = self.both.addresses;
        let ways = [public, self.tunnel.addr, self.control.addr];
        let next = match side {
            Side::Server => launch.on(ports).server(&[]),
            Side::Client => launch.client(ways, self.local_addr, &[]),
        };
        let past = std::mem::replace(self.program(side), next);
        self.past.push(past);
    }

    fn freeze(&mut self) {
        let (side, time) = (self.side(), self.while_silent());
        self.program(side).signal(Signal::STOP);
        thread::sleep(time);
        self.program(side).signal(Signal::CONT);
    }

    fn terminate(&mut self) {
        let side = self.side();
        self.program(side).signal(Signal::TERM);
        let status = self.program(side).wait_for_end();
        assert!(status.success(), "{side:?}: {status}");
        self.restart(side);
    }

    /// Sends garbage to all three ports, from strangers of whom some stay.
    fn send_garbage(&mut self) {
        self.strangers.truncate(16);
        let [public, tunnel, control] = self.both.addresses;
        let ports = match self.is_original() {
            true => vec![public, control],
            false => vec![public, tunnel, control],
        };
        for port in ports {
            let Ok(mut stranger) = TcpStream::connect(port) else {
                continue;
            };
            let mut garbage = pattern(self.random.next(), 1 + self.random.below(500));
            if self.random.below(2) == 0 {
                // A handshake begins like this.
                garbage.splice(..0, [0, 48]);
            }
            if garbage[0] == MAGIC[0] {
                garbage[0] = 0;
            }
            let _ = stranger.write_all(&garbage);
            if self.random.below(4) == 0 {
                self.strangers.insert(0, stranger);
            }
        }
    }

    /// Asserts that all is as if nothing had happened.
    fn assert_recovered(&mut self) {
        let (soak, public, start) = (self.soak, self.both.addresses[0], Instant::now());
        let mut fresh = || Visit {
            kind: Kind::VisitorFirst,
            slow: [false; 2],
            ..Visit::draw(&mut self.random)
        };
        let mut in_a_row = 0;
        while in_a_row < FRESH {
            in_a_row = match soak.visit(public, &fresh()) {
                true => in_a_row + 1,
                false => 0,
            };
            soak.assert_nothing_wrong();
            let late = start.elapsed() > RECOVERY;
            assert!(!late, "{in_a_row} whole, seed {}", soak.seed);
        }
        let last = fresh();
        self.both
            .assert_recovered(|visitor| assert!(soak.visit_on(visitor, &last)));
        let programs = [&self.both.server, &self.both.client];
        for program in self.past.iter().chain(programs) {
            assert_eq!(program.lines_with("panicked"), [""; 0]);
        }
        for program in programs {
            let memory = program.memory("Pss_Anon");
            assert!(memory < MEMORY, "{memory} KiB at rest");
        }
        assert!(self.most_memory < MOST_MEMORY, "{} KiB", self.most_memory);
    }

    /// Whether a session ever fell back to the original's ways, as one without a key does if hello
    /// is late. Any tunnel is good then, a stranger's, too.
    fn is_original(&self) -> bool {
        let programs = [&self.both.server, &self.both.client];
        let mut all = self.past.iter().chain(programs);
        all.any(|it| !it.lines_with("does not speak tp/1").is_empty())
    }

    fn summary(&self) -> String {
        let counts: Vec<_> = TROUBLES
            .iter()
            .zip(self.counts)
            .map(|(trouble, count)| format!("{count} {trouble:?}"))
            .collect();
        let programs = [&self.both.server, &self.both.client];
        let [server, client] = programs.map(|program| program.memory("Pss_Anon"));
        let (most, counts) = (self.most_memory, counts.join(", "));
        format!("{most} KiB at most, {server} and {client} in the end; {counts}")
    }
}
