//! Visits whose every byte is marked: both ends know what is due, and say what became of it.

use std::collections::HashSet;
use std::fmt::Debug;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::str::FromStr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::random::{Random, fresh_seed};
use super::{Protection, eventually, pattern, reset_on_close};

/// The most bytes of one direction.
const MOST: usize = 300_000;

/// Whoever waits for longer has been forgotten: no fault lasts that long, and few follow one
/// another without a gap.
const FORGOTTEN: Duration = Duration::from_secs(40);

/// When all faults are gone, so many visits in a row must go well within this time. A client that has
/// lost its server often waits for up to 4 s.
const FRESH: usize = 20;
const RECOVERY: Duration = Duration::from_secs(60);

/// How long a soak takes where nobody says so: what is worth it each time.
const SHORT: u64 = 8;

/// How many more visits a visitor has at the same time now and then.
pub const COMPANIONS: usize = 2;

/// How many seconds a soak takes, and the seed of its draws.
pub fn seconds_and_seed() -> (u64, u64) {
    let seconds = from_environment("TP_SOAK_SECS").unwrap_or(SHORT);
    let seed = from_environment("TP_SOAK_SEED").unwrap_or_else(fresh_seed);
    eprintln!("soak: {seconds} s, seed {seed}");
    (seconds, seed)
}

fn from_environment<T: FromStr<Err: Debug>>(name: &str) -> Option<T> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().expect(name))
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
pub struct Visit {
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
pub const MAGIC: &[u8; 4] = b"soak";
const HEADER: usize = 26;

impl Visit {
    pub fn draw(random: &mut Random) -> Self {
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

    /// One that is whole if nothing goes wrong.
    pub fn whole(random: &mut Random) -> Self {
        Self {
            kind: Kind::VisitorFirst,
            slow: [false; 2],
            ..Self::draw(random)
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
pub struct Counter(AtomicUsize);

impl Counter {
    fn add(&self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }

    pub fn get(&self) -> usize {
        self.0.load(Ordering::SeqCst)
    }
}

/// What visitors, service and chaos of one tunnel share.
pub struct Soak {
    pub seed: u64,
    pub protection: Protection,
    /// Visits that have set out for the service.
    due: Mutex<HashSet<u64>>,
    /// Visits that have reached the service.
    begun: Mutex<HashSet<u64>>,
    wrong: Mutex<Vec<String>>,
    pub whole: Counter,
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
    pub fn new(seed: u64, protection: Protection) -> Self {
        Self {
            seed,
            protection,
            due: Mutex::default(),
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

    pub fn wrong(&self, who: &str, what: impl Debug, why: &str) {
        let (seed, protection) = (self.seed, self.protection);
        let text = format!("seed {seed}, {protection:?}: {who}: {why}: {what:?}");
        self.wrong.lock().push(text);
    }

    pub fn assert_nothing_wrong(&self) {
        let wrong = self.wrong.lock();
        assert!(wrong.is_empty(), "{wrong:#?}");
    }

    /// Asserts what can be said only when all visits have ended.
    pub fn assert_all_ended(&self) {
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
        if empty > silent {
            self.wrong(
                "service",
                empty,
                &format!("more empty visits than {silent}"),
            );
        }
        self.assert_nothing_wrong();
    }

    /// Asserts that visits are whole again, now that nothing goes wrong any more.
    pub fn assert_recovered(&self, public: SocketAddr, random: &mut Random) {
        let (start, mut in_a_row) = (Instant::now(), 0);
        while in_a_row < FRESH {
            in_a_row = match self.visit(public, &Visit::whole(random)) {
                true => in_a_row + 1,
                false => 0,
            };
            self.assert_nothing_wrong();
            let late = start.elapsed() > RECOVERY;
            assert!(!late, "{in_a_row} whole, seed {}", self.seed);
        }
    }

    /// Whether to go on until then.
    pub fn lasts(&self, end: Instant) -> bool {
        Instant::now() < end && self.wrong.lock().is_empty()
    }

    pub fn keep_visiting(&self, public: SocketAddr, number: u64, end: Instant) {
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
    pub fn visit(&self, public: SocketAddr, visit: &Visit) -> bool {
        let Ok(socket) = TcpStream::connect(public) else {
            self.refused.add();
            // The next server is on its way. Trying without a pause would take its processor time.
            thread::sleep(Duration::from_millis(10));
            return false;
        };
        self.visit_on(&socket, visit)
    }

    pub fn visit_on(&self, socket: &TcpStream, visit: &Visit) -> bool {
        prepare(socket);
        self.due.lock().insert(visit.id);
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
    pub fn serve(&self, socket: &TcpStream) {
        self.serving.fetch_add(1, Ordering::SeqCst);
        self.serve_counted(socket);
        self.serving.fetch_sub(1, Ordering::SeqCst);
    }

    fn serve_counted(&self, socket: &TcpStream) {
        prepare(socket);
        let Some(visit) = self.read_header(socket) else {
            return;
        };
        if !self.due.lock().contains(&visit.id) {
            return self.wrong("service", visit, "a visitor of another service");
        }
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

    pub fn summary(&self) -> String {
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
