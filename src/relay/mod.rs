//! The relay: two sockets joined, each direction copied by a thread of its own.
//!
//! End of input is passed on as an end (a write shutdown, or with a key a frame that says so),
//! anything else as an abort of both sockets, so that a cut stream is not taken for a whole one.
//! That holds for a program that is killed, too: until both directions have ended well, a close of a
//! joined socket sends RST, unless its stream comes in frames, which tell an end from a cut.

mod direction;
mod pair;
mod rates;

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use crate::journal::ServiceStatus;
use crate::os::crowd::Counted;
use crate::os::limits::{Slot, Slots, affordable_pipes};
use crate::os::net;
use crate::service::Service;
use crate::status::snapshot::{self, JoinTimes};
use crate::stop::{Phase, Stop};
use crate::wire::conn::{Conn, Reader, Writer};
use crate::wire::proxy_header::Addresses;
use direction::BULK;
pub use direction::Direction;
use direction::Ending;
pub use pair::{Elsewhere, Linger};
use pair::{Failure, Joined, Pair, Progress, Side, Way, loaded};
use rates::Rates;

/// How many directions of a server's or a client's visitors may have the second buffer, and the third.
/// Others stay with what they have: anyone can make a thousand downloads and stop reading, and what is
/// in their buffers stays there for as long as they like. With a key, all of these hold 9 MiB.
const ROOMY: [usize; BULK] = [16, 8];

/// Pairs are looked at this often, so that a reset is passed on within a second or so.
pub const SWEEP: Duration = Duration::from_millis(500);

/// A write that waits for its reader comes back this often at the least, to tell what has left. A
/// thousand stopped readers then wake a thread a hundred times a second.
const LONGEST_WRITE: Duration = Duration::from_secs(10);

/// And at the most this often.
const SHORTEST_WRITE: Duration = Duration::from_millis(100);

/// What a pair has done when it ends.
pub struct Visit<'a> {
    /// Bytes up and down.
    pub moved: [u64; 2],
    /// How long it was joined.
    pub time: Duration,
    /// None if it ended well.
    pub aborted: Option<&'a Aborted>,
}

/// Who is told of a pair that has ended.
type Told = dyn Fn(&Visitor, Visit) + Send + Sync;

/// The pairs that are joined now.
pub struct Pairs {
    state: Mutex<PairsState>,
    changed: Condvar,
    #[cfg_attr(
        not(target_os = "linux"),
        expect(dead_code, reason = "pipes are for splice, which only Linux has")
    )]
    pipes: Arc<Slots>,
    /// Who may have the second buffer, and the third.
    roomy: [Arc<Slots>; BULK],
    /// None if nobody asked for a status page.
    rates: Option<Mutex<Rates>>,
    stop: Arc<Stop>,
    told: Box<Told>,
}

struct PairsState {
    joined: HashMap<u64, Listed>,
    /// How many were joined in all.
    next_key: u64,
    /// Of each service: how many were joined in all, and the bytes up and down of those that are joined
    /// no more.
    totals: BTreeMap<Service, (u64, [u64; 2])>,
    join_times: JoinTimes,
    /// How many more may be joined before long.
    expected: usize,
}

/// A pair that is joined, and what it counts: the bytes stay in the totals while the last one who holds
/// the pair lets go of it.
struct Listed {
    pair: Weak<Pair>,
    visit: Option<u64>,
    service: Service,
    moved: Arc<[AtomicU64; 2]>,
}

impl Pairs {
    /// None yet. `told` is told of each pair that has ended. If a status page is to show the pairs, it is
    /// known how fast they are (`keeps_rates`).
    pub fn new(
        stop: Arc<Stop>,
        keeps_rates: bool,
        told: impl Fn(&Visitor, Visit) + Send + Sync + 'static,
    ) -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::new(PairsState {
                joined: HashMap::new(),
                next_key: 0,
                totals: BTreeMap::new(),
                join_times: JoinTimes::default(),
                expected: 0,
            }),
            changed: Condvar::new(),
            pipes: Slots::new(affordable_pipes()),
            roomy: ROOMY.map(Slots::new),
            rates: keeps_rates.then(Mutex::default),
            stop,
            told: Box::new(told),
        })
    }

    /// Joins two connections, which [reset on close](net::reset_on_close) where no frames tell their end:
    /// the one on the visitor's side, and the one on the service's side. Returns the direction up, from
    /// the visitor, and the direction down, each to be copied on a thread of its own. One that is dropped
    /// instead aborts both. The visitor `came` some time ago.
    pub fn join(
        self: &Arc<Self>,
        visitor: Visitor,
        came: Instant,
        visitor_end: End,
        service_end: End,
        linger: Linger,
    ) -> (Direction, Direction) {
        let (visitor_side, from_visitor, to_visitor) = visitor_end.split();
        let (service_side, from_service, to_service) = service_end.split();
        let write_limit = (linger.limit / 8).clamp(SHORTEST_WRITE, LONGEST_WRITE);
        for side in [&visitor_side, &service_side] {
            if side.peer.is_program() {
                continue;
            }
            net::limit_write(&side.socket, write_limit);
        }
        // Each direction begins with a read.
        let waits_for_program =
            [&visitor_side, &service_side].map(|from| AtomicBool::new(from.peer.is_program()));
        let (service, moved) = (visitor.service.clone(), Arc::default());
        let mut state = self.state.lock();
        let key = state.next_key;
        state.next_key += 1;
        let pair = Arc::new(Pair {
            visitor_side,
            service_side,
            linger,
            write_limit,
            started: Instant::now(),
            waits_for_program,
            progress: Mutex::new(Progress::default()),
            visitor,
            joined: Joined {
                key,
                service: service.clone(),
                moved: Arc::clone(&moved),
                pairs: self.clone(),
            },
        });
        state.total_of(&service).0 += 1;
        let listed = Listed {
            pair: Arc::downgrade(&pair),
            visit: pair.visitor.visit,
            service,
            moved,
        };
        state.joined.insert(key, listed);
        let waited = pair.started.saturating_duration_since(came);
        state.join_times.add(waited);
        drop(state);
        if self.stop.reached(Phase::Done) {
            pair.abort(Aborted::CutOff);
        }
        let direction = |way, reader, writer| Direction {
            reader,
            writer,
            room: None,
            ending: Ending {
                pair: pair.clone(),
                way,
                outcome: Some(Err(Failure::reading(Aborted::NoThread))),
            },
        };
        (
            direction(Way::Up, from_visitor, to_service),
            direction(Way::Down, from_service, to_visitor),
        )
    }

    /// Lets [`wait`](Self::wait) wait for a pair that is not joined yet, as long as what it returns lives.
    pub fn expect(self: &Arc<Self>) -> Expected {
        self.state.lock().expected += 1;
        Expected(self.clone())
    }

    /// Lets [`wait`](Self::wait) look at once: there is less time than before.
    pub fn look(&self) {
        let _state = self.state.lock();
        self.changed.notify_all();
    }

    /// Waits until no pair is joined or expected any more, or their time is over, and cuts off what is
    /// left. None can be joined then.
    pub fn wait(&self) {
        let mut sweep = Instant::now() + SWEEP;
        loop {
            let now = Instant::now();
            if sweep <= now {
                self.sweep();
                sweep = now + SWEEP;
            }
            let mut state = self.state.lock();
            let done = state.joined.is_empty() && state.expected == 0;
            if done || self.stop.time_is_up() {
                self.stop.advance(Phase::Done);
                break;
            }
            let next = self.stop.end_by().map_or(sweep, |end_by| end_by.min(sweep));
            self.changed.wait_until(&mut state, next);
        }
        for pair in self.all() {
            pair.abort(Aborted::CutOff);
        }
    }

    /// Aborts half-closed pairs that stand still or that nobody waits for any more. To be called
    /// every [`SWEEP`].
    pub fn sweep(&self) {
        let pairs = self.all();
        for pair in &pairs {
            pair.check();
        }
        if let Some(rates) = &self.rates {
            let moved = pairs.iter().map(|it| (it.joined.key, it.joined.moved()));
            rates.lock().sample(Instant::now(), moved);
        }
    }

    /// The other program of a session says that one end of this visit has finished, and whether something
    /// has moved there lately.
    pub fn finished_elsewhere(&self, session: &dyn Elsewhere, visit: u64, moved: bool) {
        let state = self.state.lock();
        let listed = state.joined.values();
        // A client may have visits with the same number from several servers.
        let listed = listed.filter(|it| it.visit == Some(visit));
        let pairs: Vec<_> = listed.filter_map(|it| it.pair.upgrade()).collect();
        drop(state);
        for pair in pairs {
            pair.finished_elsewhere(session, moved);
        }
    }

    /// Returns the visitors of now, in any order.
    pub fn visitors(&self) -> Vec<snapshot::Visitor> {
        let (pairs, now) = (self.all(), Instant::now());
        let rates = self.rates.as_ref().map(Mutex::lock);
        let visitors = pairs.iter().map(|pair| {
            let Joined { key, service, .. } = &pair.joined;
            let moved = pair.joined.moved();
            let rates = rates.as_ref();
            let rate = rates.map(|rates| rates.rate(now, *key, pair.started, moved));
            snapshot::Visitor {
                address: pair.visitor.address.map(|it| it.to_string()),
                service: service.name(),
                age: now.saturating_duration_since(pair.started),
                moved,
                rate: rate.unwrap_or_default(),
            }
        });
        visitors.collect()
    }

    /// Returns how long all visitors took to be joined.
    pub fn join_times(&self) -> JoinTimes {
        self.state.lock().join_times.clone()
    }

    /// What the pairs of each service do now and have done.
    pub fn totals(&self) -> BTreeMap<Service, ServiceStatus> {
        let state = self.state.lock();
        let totals = state
            .totals
            .iter()
            .map(|(service, (joined_total, [up, down]))| {
                let status = ServiceStatus {
                    joined_total: *joined_total,
                    bytes_up: *up,
                    bytes_down: *down,
                    ..ServiceStatus::default()
                };
                (service.clone(), status)
            });
        let mut totals: BTreeMap<_, _> = totals.collect();
        for listed in state.joined.values() {
            let status = totals.entry(listed.service.clone()).or_default();
            let [up, down] = loaded(&listed.moved);
            status.joined += 1;
            status.bytes_up += up;
            status.bytes_down += down;
        }
        totals
    }

    fn all(&self) -> Vec<Arc<Pair>> {
        self.state.lock().all()
    }
}

impl PairsState {
    fn total_of(&mut self, service: &Service) -> &mut (u64, [u64; 2]) {
        self.totals.entry(service.clone()).or_default()
    }

    /// Not to be dropped under the lock: the last one to hold a pair takes it.
    fn all(&self) -> Vec<Arc<Pair>> {
        let pairs = self.joined.values();
        pairs.filter_map(|it| it.pair.upgrade()).collect()
    }
}

/// A pair that may be joined before long.
pub struct Expected(Arc<Pairs>);

impl Drop for Expected {
    fn drop(&mut self) {
        self.0.state.lock().expected -= 1;
        self.0.changed.notify_all();
    }
}

/// Who is served by a pair.
pub struct Visitor {
    address: Option<SocketAddr>,
    /// What both programs call this visit, if they can speak of it.
    visit: Option<u64>,
    to: Option<SocketAddr>,
    service: Service,
    _slots: [Option<Slot>; 2],
    _counted: Option<Counted>,
}

impl Visitor {
    /// A visitor of a service from `address`, which the client of an original server is not told.
    pub fn new(address: Option<SocketAddr>, service: Service) -> Self {
        Self {
            address,
            visit: None,
            to: None,
            service,
            _slots: [None, None],
            _counted: None,
        }
    }

    /// The same visitor with its places on the server, among all, those of its client, and those of its
    /// source. They are given back when the pair has ended.
    pub fn in_places(self, slots: [Option<Slot>; 2], counted: Option<Counted>) -> Self {
        Self {
            _slots: slots,
            _counted: counted,
            ..self
        }
    }

    /// The same visitor, if it is known to have come to this public address.
    pub fn that_came_to(self, to: Option<SocketAddr>) -> Self {
        Self { to, ..self }
    }

    /// The same visitor, in the visit that both programs call by this number.
    pub fn in_visit(self, visit: Option<u64>) -> Self {
        Self { visit, ..self }
    }

    /// What the visitor comes for.
    pub fn service(&self) -> &Service {
        &self.service
    }

    /// Where the visitor comes from, if that is known.
    pub fn address(&self) -> Option<SocketAddr> {
        self.address
    }

    /// Both ends of the visitor's connection, if they are known.
    pub fn addresses(&self) -> Option<Addresses> {
        Some(Addresses {
            source: self.address?,
            destination: self.to?,
        })
    }
}

impl fmt::Display for Visitor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.address {
            Some(address) => write!(f, "visitor {address}{}", self.service.of()),
            None => write!(f, "a visitor"),
        }
    }
}

/// Who is at the other end of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peer {
    /// On the server.
    Visitor,
    /// On the server, by a tunnel.
    Client,
    /// On the client, by a tunnel.
    Server,
    /// On the client.
    LocalService,
}

impl Peer {
    /// True for the other program, which looks after its own end of what it carries.
    fn is_program(self) -> bool {
        matches!(self, Self::Client | Self::Server)
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Visitor => "visitor",
            Self::Client => "client",
            Self::Server => "server",
            Self::LocalService => "local service",
        })
    }
}

/// Why a pair was aborted.
#[derive(Clone, Debug)]
pub enum Aborted {
    /// A direction had no thread.
    NoThread,
    /// The thread of a direction panicked, which is a fault in this program.
    Panicked,
    /// This side reset its connection.
    Reset(Peer),
    /// Nothing could be read from this side.
    Reading(Peer, Arc<io::Error>),
    /// Nothing could be written to this side.
    Writing(Peer, Arc<io::Error>),
    /// No byte moved for so long after this side had finished.
    StoodStill(Duration, Peer),
    /// The program stopped.
    CutOff,
}

/// Behind "aborted: ".
impl fmt::Display for Aborted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoThread => f.write_str("there was no thread for it"),
            Self::Panicked => f.write_str("its thread panicked"),
            Self::Reset(peer) => write!(f, "reset by the {peer}"),
            Self::Reading(peer, error) => write!(f, "reading from the {peer}: {error}"),
            Self::Writing(peer, error) => write!(f, "writing to the {peer}: {error}"),
            Self::StoodStill(linger, peer) => {
                write!(f, "no byte in {linger:?} after the {peer} had finished")
            }
            Self::CutOff => f.write_str("cut off by the stop"),
        }
    }
}

/// One of the two connections of a pair, and who is at its other end.
pub struct End(pub Peer, pub Conn);

impl End {
    /// What both directions need, and what each of them has for itself.
    fn split(self) -> (Side, Reader, Writer) {
        let Self(peer, conn) = self;
        let side = Side {
            peer,
            socket: conn.socket().clone(),
        };
        (side, conn.reader, conn.writer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::door::openings::Openings;
    use crate::journal::{self, Journal};
    use crate::key::Key;
    use crate::os::workers::Workers;
    use crate::wire::handshake::Purpose;
    use std::io::{Read, Write};
    use std::net::TcpListener;
    use std::net::TcpStream;
    use std::thread;

    const LINGER: Linger = Linger {
        limit: Duration::from_secs(600),
        shared_with: None,
    };

    fn new_pairs() -> Arc<Pairs> {
        let journal = Journal::new(1, false, false);
        Pairs::new(Stop::new(), false, move |visitor, visit| {
            journal.visitor_left(visitor, &visit);
        })
    }

    /// A connection's two ends.
    fn connected() -> [TcpStream; 2] {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let far = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        far.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        [far, listener.accept().unwrap().0]
    }

    /// The far end of a tunnel as bytes, and the near one, sealed or not.
    fn tunnel(sealed: bool) -> (TcpStream, Conn) {
        let [far, near] = connected();
        let mut near = Conn::new(Arc::new(near));
        if sealed {
            let (key, far) = (Key::generate().unwrap(), far.try_clone().unwrap());
            let keys = [key.clone()];
            let client = thread::spawn(move || {
                let mut far = Conn::new(Arc::new(far));
                far.initiate(&Purpose::Control(&[key])).is_ok()
            });
            near.respond(&[(Purpose::Control(&keys), &Openings::new())], &[], || ())
                .ok()
                .unwrap();
            assert!(client.join().unwrap());
            near.reader.begin_stream();
        }
        (far, near)
    }

    /// A reset that the kernel has told to another thread reads like an end, and is none.
    #[test]
    fn a_reset_that_somebody_else_was_told_is_passed_on() {
        for sealed in [false, true] {
            let [visitor, near] = connected();
            let (mut client, tunnel) = tunnel(sealed);
            net::reset_on_close(&visitor, true);
            drop(visitor);
            while near.take_error().unwrap().is_none() {
                thread::sleep(Duration::from_millis(1));
            }
            assert_eq!((&near).read(&mut [0]).unwrap(), 0);

            let conn = Conn::new(Arc::new(near));
            let ends = [(Peer::Visitor, conn), (Peer::Client, tunnel)];
            let [from, to] = ends.map(|(peer, conn)| End(peer, conn));
            let visitor = Visitor::new(None, Service::default());
            let (up, down) = new_pairs().join(visitor, Instant::now(), from, to, LINGER);
            let down = thread::spawn(move || down.copy());
            up.copy();
            let error = client.read(&mut [0]).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::ConnectionReset, "{sealed}");
            down.join().unwrap();
        }
    }

    #[test]
    fn a_visitor_without_a_thread_is_aborted_and_counted() {
        let journal = Arc::new(Journal::new(1, false, false));
        let pairs = Pairs::new(Stop::new(), false, journal.tells_of_visits());
        let ([mut visitor, _service], directions) = joined(&pairs, None);
        drop(directions);
        let error = visitor.read(&mut [0]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
        assert_eq!(journal.status(Vec::new(), &pairs).refused, 1);
    }

    /// Comes from a port that no visitor ever has.
    const DOOMED: &str = "192.0.2.1:0";

    pub fn panic_on_purpose(visitor: &Visitor) {
        assert_ne!(visitor.address, DOOMED.parse().ok(), "on purpose");
    }

    /// A pair: the visitor's end and the local service's, and its two directions.
    fn joined(
        pairs: &Arc<Pairs>,
        from: Option<SocketAddr>,
    ) -> ([TcpStream; 2], (Direction, Direction)) {
        let ([visitor, near], [service, far]) = (connected(), connected());
        let ends = [(Peer::Visitor, near), (Peer::LocalService, far)];
        let [near, far] = ends.map(|(peer, socket)| {
            net::reset_on_close(&socket, true);
            End(peer, Conn::new(Arc::new(socket)))
        });
        let from = Visitor::new(from, Service::default());
        let directions = pairs.join(from, Instant::now(), near, far, LINGER);
        ([visitor, service], directions)
    }

    /// A pair at work: the visitor's end, and the local service's.
    fn at_work(pairs: &Arc<Pairs>, workers: &Workers, from: &str) -> [TcpStream; 2] {
        let (ends, (up, down)) = joined(pairs, from.parse().ok());
        workers.start("up", move || drop(up.copy())).unwrap();
        workers.start("down", move || drop(down.copy())).unwrap();
        ends
    }

    /// A direction that finds no room for a second buffer is spliced from the first one on.
    #[cfg(target_os = "linux")]
    #[test]
    fn a_silent_direction_keeps_no_pipe() {
        let (pairs, workers) = (new_pairs(), Workers::new(journal::panicked));
        let pipes = pairs.pipes.free();
        let deadline = Instant::now() + Duration::from_secs(10);
        let _taken: Vec<_> = std::iter::from_fn(|| pairs.roomy[0].try_take()).collect();
        let [mut visitor, mut service] = at_work(&pairs, &workers, "192.0.2.1:1");
        // The direction takes a pipe when it has filled its buffer, and keeps it for a second of silence.
        while pairs.pipes.free() == pipes {
            visitor.write_all(&[1; 6 * 1024]).unwrap();
            service.read_exact(&mut [0; 6 * 1024]).unwrap();
            assert!(Instant::now() < deadline);
        }
        while pairs.pipes.free() < pipes {
            thread::sleep(Duration::from_millis(1));
            assert!(Instant::now() < deadline);
        }
        visitor.write_all(b"again").unwrap();
        service.read_exact(&mut [0; 5]).unwrap();
    }

    #[test]
    fn a_panic_aborts_its_pair_and_no_other() {
        let log = journal::tests::record();
        let (pairs, workers) = (new_pairs(), Workers::new(journal::panicked));
        let before = at_work(&pairs, &workers, "192.0.2.1:1");
        let doomed = at_work(&pairs, &workers, DOOMED);
        let after = at_work(&pairs, &workers, "192.0.2.1:2");
        for mut end in &doomed {
            let error = end.read(&mut [0]).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
        }
        for [mut visitor, mut service] in [&before, &after].map(|ends| ends.each_ref()) {
            visitor.write_all(b"hello").unwrap();
            service.read_exact(&mut [0; 5]).unwrap();
        }
        drop((before, after));
        workers.wait(Duration::from_secs(10));
        let totals = &pairs.totals()[&Service::default()];
        let ServiceStatus {
            joined,
            joined_total,
            bytes_up,
            bytes_down,
            ..
        } = totals;
        assert_eq!((*joined, *joined_total), (0, 3));
        assert_eq!((*bytes_up, *bytes_down), (10, 0));
        let lines = log.lock();
        let said = |text: &str| lines.iter().any(|line| line.contains(text));
        assert!(
            said("the up thread panicked; its sockets are closed"),
            "{lines:#?}"
        );
        assert!(
            said(&format!("visitor {DOOMED}: 0 bytes up, 0 bytes down")),
            "{lines:#?}"
        );
    }
}
