//! The relay: two sockets joined, each direction copied by a thread of its own.
//!
//! End of input is passed on as an end (a write shutdown, or with a key a frame that says so),
//! anything else as an abort of both sockets, so that a cut stream is not taken for a whole one.
//! That holds for a program that is killed, too: until both directions have ended well, a close of a
//! joined socket sends RST.

use std::collections::HashMap;
use std::fmt;
use std::io::{self, Read};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use crate::journal::Journal;
use crate::os::limits::{Slot, Slots, affordable_pipes};
use crate::os::net;
#[cfg(target_os = "linux")]
use crate::os::splice::{Pipe, refused};
use crate::stop::{Phase, Stop};
use crate::wire::conn::{Conn, Reader, Writer};

/// A direction begins with the first buffer: most connections never fill it, and to touch memory for
/// the first time costs more than to copy it. One that fills it gets the second. One that fills half
/// of that carries bulk: if the kernel cannot move it, it gets the third.
///
/// With a key a direction has two of them. Sealed bulk costs 1.25 CPU-s/GB if the last has 64 KiB,
/// 1.03 with 256 and 0.87 with 448, both programs together, and a pair that is bulk one way stays
/// below 1 MiB.
const BUFFERS: [usize; 3] = [6 * 1024, 64 * 1024, 448 * 1024];

/// The place of the last one.
const BULK: usize = BUFFERS.len() - 1;

/// How many directions of a server's or a client's visitors may have the second buffer, and the third.
/// Others stay with what they have: anyone can make a thousand downloads and stop reading, and what is
/// in their buffers stays there for as long as they like. With a key, all of these hold 9 MiB.
const ROOMY: [usize; BULK] = [16, 8];

/// A direction that pauses for longer gives back all but the first.
const BULK_PAUSE: Duration = Duration::from_secs(1);

/// Pairs are looked at this often, so that a reset is passed on within a second or so, and `linger`
/// is held to two.
pub const SWEEP: Duration = Duration::from_millis(500);

/// What a direction that has failed has written before gets this long to leave, before the reset.
const LAST_BYTES: Duration = Duration::from_secs(1);

/// A write that waits for its reader comes back this often at the least, to tell what has left. A
/// thousand stopped readers then wake a thread a hundred times a second.
const LONGEST_WRITE: Duration = Duration::from_secs(10);

/// And at the most this often.
const SHORTEST_WRITE: Duration = Duration::from_millis(100);

/// The server closes a tunnel within a round trip of the client's last byte, if its visitor takes
/// what is left at once. One that takes longer is not worth a thread.
const CLOSING: Duration = Duration::from_secs(1);

/// The pairs that are joined now.
pub struct Pairs {
    state: Mutex<PairsState>,
    changed: Condvar,
    #[cfg_attr(not(target_os = "linux"), expect(dead_code))]
    pipes: Arc<Slots>,
    /// Who may have the second buffer, and the third.
    roomy: [Arc<Slots>; BULK],
    stop: Arc<Stop>,
    journal: Arc<Journal>,
}

struct PairsState {
    joined: HashMap<u64, Weak<Pair>>,
    /// How many were joined in all.
    next_key: u64,
    /// Bytes up and down of those that are joined no more.
    moved: [u64; 2],
    /// How many more may be joined before long.
    expected: usize,
}

impl Pairs {
    /// None yet.
    pub fn new(stop: Arc<Stop>, journal: Arc<Journal>) -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::new(PairsState {
                joined: HashMap::new(),
                next_key: 0,
                moved: [0; 2],
                expected: 0,
            }),
            changed: Condvar::new(),
            pipes: Slots::new(affordable_pipes()),
            roomy: ROOMY.map(Slots::new),
            stop,
            journal,
        })
    }

    /// Joins two connections that [reset on close](net::reset_on_close): the one on the visitor's side,
    /// and the one on the service's side. Returns the direction up, from the visitor, and the direction
    /// down, each to be copied on a thread of its own. One that is dropped instead aborts both.
    pub fn join(
        self: &Arc<Self>,
        mut visitor: Visitor,
        visitor_end: End,
        service_end: End,
        linger: Duration,
    ) -> (Direction, Direction) {
        let (visitor_side, from_visitor, to_visitor) = visitor_end.split();
        let (service_side, from_service, to_service) = service_end.split();
        let write_limit = (linger / 8).clamp(SHORTEST_WRITE, LONGEST_WRITE);
        for side in [&visitor_side, &service_side] {
            if side.peer.is_program() {
                continue;
            }
            net::limit_write(&side.socket, write_limit);
        }
        let mut state = self.state.lock();
        let key = state.next_key;
        state.next_key += 1;
        let pair = Arc::new(Pair {
            visitor_side,
            service_side,
            linger,
            write_limit,
            started: Instant::now(),
            passing_on: AtomicBool::new(false),
            progress: Mutex::new(Progress {
                slot: visitor.slot.take(),
                ..Progress::default()
            }),
            visitor,
            joined: Joined {
                key,
                moved: Default::default(),
                pairs: self.clone(),
            },
        });
        state.joined.insert(key, Arc::downgrade(&pair));
        drop(state);
        if self.stop.reached(Phase::Done) {
            pair.abort(Aborted::CutOff);
        }
        let direction = |way, reader, writer| Direction {
            pair: pair.clone(),
            way,
            reader,
            writer,
            outcome: Some(Err(Failure::reading(Aborted::NoThread))),
            room: None,
        };
        (
            direction(Way::Up, from_visitor, to_service),
            direction(Way::Down, from_service, to_visitor),
        )
    }

    /// Lets [`wait`](Self::wait) wait for a pair that is not joined yet, as long as the answer lives.
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
            if done || self.stop.is_over() {
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
        for pair in self.all() {
            pair.check();
        }
    }

    /// How many pairs are joined now and how many were in all, and the bytes that they have moved up
    /// and down.
    pub fn totals(&self) -> (usize, u64, [u64; 2]) {
        let state = self.state.lock();
        let (now, in_all, mut moved) = (state.joined.len(), state.next_key, state.moved);
        let pairs = state.all();
        drop(state);
        for pair in &pairs {
            add(&mut moved, pair.joined.moved());
        }
        (now, in_all, moved)
    }

    fn all(&self) -> Vec<Arc<Pair>> {
        self.state.lock().all()
    }
}

impl PairsState {
    /// Not to be dropped under the lock: the last one to hold a pair takes it.
    fn all(&self) -> Vec<Arc<Pair>> {
        self.joined.values().filter_map(Weak::upgrade).collect()
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
    slot: Option<Slot>,
}

impl Visitor {
    /// A visitor from `address`, which the client of an original server is not told. `slot` is its
    /// place on the server, given back when the pair has ended.
    pub fn new(address: Option<SocketAddr>, slot: Option<Slot>) -> Self {
        Self { address, slot }
    }
}

impl Visitor {
    /// Where the visitor comes from, if that is known.
    pub fn address(&self) -> Option<SocketAddr> {
        self.address
    }
}

impl fmt::Display for Visitor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.address {
            Some(address) => write!(f, "visitor {address}"),
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

/// One of the two connections of a pair.
pub struct End {
    /// Who is at its other end.
    pub peer: Peer,
    /// The connection.
    pub conn: Conn,
}

impl End {
    /// What both directions need, and what each of them has for itself.
    fn split(self) -> (Side, Reader, Writer) {
        let Self { peer, conn } = self;
        let side = Side {
            peer,
            is_sealed: conn.reader.is_sealed(),
            socket: conn.socket().clone(),
        };
        (side, conn.reader, conn.writer)
    }
}

/// A direction of a pair. However it goes away, the pair is told that it has ended, so that the
/// other direction does not wait for this one for ever.
pub struct Direction {
    way: Way,
    reader: Reader,
    writer: Writer,
    /// None once the pair has been told.
    outcome: Option<Result<(), Failure>>,
    /// For its second buffer, or its third.
    room: Option<Slot>,
    /// Behind the sockets: they are closed before the pair is forgotten.
    pair: Arc<Pair>,
}

#[derive(Clone, Copy)]
enum Way {
    /// From the visitor to the local service.
    Up,
    /// From the local service to the visitor.
    Down,
}

/// Why a direction has not ended well.
struct Failure {
    why: Aborted,
    /// The side that it wrote to failed.
    writing: bool,
}

impl Failure {
    fn reading(why: Aborted) -> Self {
        let writing = false;
        Self { why, writing }
    }

    fn writing(why: Aborted) -> Self {
        let writing = true;
        Self { why, writing }
    }
}

/// A connection to the other program that carries nothing any more. Who waits for that one to close
/// it first is spared the minute for which the kernel keeps the port of the side that was first
/// (`TIME_WAIT`).
pub struct Closing {
    socket: Arc<TcpStream>,
    _slot: Option<Slot>,
}

impl Closing {
    /// Waits until the other program has closed it, but not for long.
    pub fn wait(self) {
        if self.socket.set_read_timeout(Some(CLOSING)).is_ok() {
            let _ = (&*self.socket).read(&mut [0]);
        }
    }
}

impl Direction {
    /// Copies until the direction ends. Who is the client may [wait](Closing::wait) for the end of
    /// the tunnel then, if there is one to wait for.
    pub fn copy(mut self) -> Option<Closing> {
        self.outcome = Some(Err(Failure::reading(Aborted::Panicked)));
        #[cfg(test)]
        tests::panic_on_purpose(&self.pair.visitor);
        let outcome = self.carry();
        if let Err(failure) = &outcome
            && failure.writing
            && self.pair.is_last(&failure.why)
        {
            self.discard();
        }
        self.outcome = None;
        self.pair.ended(self.way, outcome)
    }

    fn carry(&mut self) -> Result<(), Failure> {
        let pair = self.pair.clone();
        let (from, to) = pair.sides(self.way);
        let reading = |error| Failure::reading(from.reading_failed(error));
        let writing = |error| Failure::writing(to.writing_failed(error));
        let moved = &pair.joined.moved[self.way as usize];
        // No memory for a buffer before there is something to put into it: a silent connection
        // costs the stacks of its threads and no more.
        self.reader.wait().map_err(reading)?;
        let (mut level, mut spliced_not) = (0, false);
        loop {
            let (size, before) = (BUFFERS[level], level);
            match self.reader.read_batch(self.writer.batch(size)) {
                Ok(0) => break,
                Ok(count) => {
                    pair.write_to(to, || self.writer.write_batch(count, moved))
                        .map_err(writing)?;
                    let enough = if level == 0 { size } else { size / 2 };
                    if count >= enough && level < BULK {
                        level = self.grow(level, &mut spliced_not)?;
                    }
                }
                Err(error) if level > 0 && net::paused(&error) => (level, spliced_not) = (0, false),
                Err(error) => return Err(reading(error)),
            }
            if level == 0 {
                self.room = None;
            }
            if (before == 0) != (level == 0) {
                let pause = (level > 0).then_some(BULK_PAUSE);
                net::limit_pause(self.reader.socket(), pause).map_err(reading)?;
            }
        }
        // The end frame may have to wait for room like any byte, and so must not be written
        // under the lock; before it is written, the pair is not half-closed.
        pair.check_end(self.way).map_err(Failure::reading)?;
        pair.write_to(to, || self.writer.write_end())
            .map_err(writing)?;
        if pair.half_close(self.way) {
            self.writer.shutdown().map_err(writing)?;
        }
        Ok(())
    }

    /// Finds the next buffer for a direction that has filled this one, if there is room, or has its
    /// bulk spliced: the next one is then the first. To splice is tried once until it pauses.
    fn grow(&mut self, level: usize, spliced_not: &mut bool) -> Result<usize, Failure> {
        let take = |pair: &Pair| pair.joined.pairs.roomy[level].try_take();
        let mut room = None;
        if level + 1 < BULK {
            room = take(&self.pair);
        }
        if room.is_none() && !std::mem::replace(spliced_not, true) && self.splice()? {
            *spliced_not = false;
            return Ok(0);
        }
        if level + 1 == BULK {
            room = take(&self.pair);
        }
        Ok(match room {
            None => level,
            room => {
                self.room = room;
                level + 1
            }
        })
    }

    /// Lets the kernel move bulk, if both sides are plain, until it is bulk no more. Whatever ends
    /// that, the end of input included, is left for copying to find again. False if the kernel
    /// moves nothing here.
    ///
    /// Bulk costs both programs together 0.4 CPU-s/GB so, instead of 0.9.
    #[cfg(target_os = "linux")]
    fn splice(&mut self) -> Result<bool, Failure> {
        let Some((input, output)) = self.reader.plain().zip(self.writer.plain()) else {
            return Ok(false);
        };
        let pipes = &self.pair.joined.pairs.pipes;
        let Some(mut pipe) = pipes.try_take().and_then(Pipe::open) else {
            return Ok(false);
        };
        self.writer.release();
        self.room = None;
        let (from, to) = self.pair.sides(self.way);
        let moved = &self.pair.joined.moved[self.way as usize];
        loop {
            let count = match pipe.fill(&input) {
                Ok(count) => count,
                Err(error) if net::paused(&error) => 0,
                Err(error) if refused(&error) => {
                    // And always will be.
                    pipes.close();
                    return Ok(false);
                }
                Err(error) => {
                    return Err(Failure::reading(from.reading_failed(error)));
                }
            };
            while !pipe.is_empty() {
                match self.pair.write_to(to, || pipe.drain(&*output)) {
                    Ok(drained) => _ = moved.fetch_add(drained as u64, Ordering::Relaxed),
                    // No room yet.
                    Err(error) if net::paused(&error) => {}
                    Err(error) => {
                        return Err(Failure::writing(to.writing_failed(error)));
                    }
                }
            }
            if count < BUFFERS[0] {
                return Ok(true);
            }
        }
    }

    #[cfg(not(target_os = "linux"))]
    fn splice(&mut self) -> Result<bool, Failure> {
        Ok(false)
    }

    /// Throws away what still comes, until the far side ends or the [sweep](Pairs::sweep) ends the
    /// pair: a far side that is reset at once may lose what the other direction, which has ended, has
    /// sent it last.
    fn discard(&mut self) {
        while let Ok(1..) = self.reader.read_batch(self.writer.batch(BUFFERS[0])) {}
    }
}

impl Drop for Direction {
    /// It had no thread, or its thread has panicked.
    fn drop(&mut self) {
        if let Some(outcome) = self.outcome.take() {
            self.pair.ended(self.way, outcome);
        }
    }
}

/// Two joined sockets, closed when the last thread lets go of them.
struct Pair {
    visitor_side: Side,
    service_side: Side,
    linger: Duration,
    /// How old the newest count of what was written may be.
    write_limit: Duration,
    started: Instant,
    /// A direction writes to the other program just now.
    passing_on: AtomicBool,
    progress: Mutex<Progress>,
    /// Behind the sockets: its slot is free, and the pair forgotten, when they are closed.
    visitor: Visitor,
    joined: Joined,
}

/// A pair's place among all that are joined.
struct Joined {
    key: u64,
    /// Bytes up and down.
    moved: [AtomicU64; 2],
    pairs: Arc<Pairs>,
}

#[derive(Default)]
struct Progress {
    half_closed: Option<HalfClosed>,
    /// What went wrong first. The pair is about to be aborted.
    failed: Option<Aborted>,
    /// The last look at the pair has found that it is.
    doomed: bool,
    /// How many directions have ended, well or not.
    ended: u32,
    /// Why the pair was aborted.
    aborted: Option<Aborted>,
    slot: Option<Slot>,
}

/// One direction has ended well, and its end was passed on; the other one is the last.
struct HalfClosed {
    way: Way,
    /// How many bytes the last one had moved when it was last looked at, and since when.
    moved: u64,
    since: Instant,
}

impl Pair {
    /// Where a direction comes from, and where it goes to.
    fn sides(&self, way: Way) -> (&Side, &Side) {
        match way {
            Way::Up => (&self.visitor_side, &self.service_side),
            Way::Down => (&self.service_side, &self.visitor_side),
        }
    }

    /// Writes to this side. How long that takes is nothing to go by if it is the other program: that
    /// may have much to hand on to a slow reader before it takes more, and looks after that reader.
    fn write_to<T>(&self, to: &Side, write: impl FnOnce() -> T) -> T {
        if !to.peer.is_program() {
            return write();
        }
        self.passing_on.store(true, Ordering::Relaxed);
        let result = write();
        self.passing_on.store(false, Ordering::Relaxed);
        result
    }

    /// Is this end of input one? The kernel reports a reset once. If the other direction, writing to
    /// the same socket, was told, then this one has read an end that is none.
    fn check_end(&self, way: Way) -> Result<(), Aborted> {
        let (from, _) = self.sides(way);
        let progress = self.progress.lock();
        if let Some(why) = progress.aborted.as_ref().or(progress.failed.as_ref()) {
            return Err(why.clone());
        }
        match progress.half_closed.is_none() && from.was_reset() {
            true => Err(Aborted::Reset(from.peer)),
            false => Ok(()),
        }
    }

    /// Notes that a direction has ended well. True if the far side is to be told now: after the
    /// direction that ends last, both sockets are closed, which says the same and wakes nobody.
    fn half_close(&self, way: Way) -> bool {
        let mut progress = self.progress.lock();
        let first = progress.half_closed.is_none() && progress.failed.is_none();
        if first {
            progress.half_closed = Some(HalfClosed {
                way,
                moved: 0,
                since: Instant::now(),
            });
        }
        first
    }

    /// Is the pair still worth waiting for? A thread that waits for room on one side does not notice
    /// that the other was reset, and one that has finished notices nothing.
    fn check(&self) {
        let mut progress = self.progress.lock();
        if let Some(why) = self.why_doomed(&progress) {
            // Not at first sight: a direction may still have something to hand on.
            if std::mem::replace(&mut progress.doomed, true) {
                drop(progress);
                self.abort(why);
            }
            return;
        }
        let Some(half_closed) = &mut progress.half_closed else {
            return;
        };
        let moved = self.joined.moved().iter().sum();
        if half_closed.moved != moved || self.passing_on.load(Ordering::Relaxed) {
            half_closed.moved = moved;
            half_closed.since = Instant::now();
        }
        if half_closed.since.elapsed() >= self.linger + self.write_limit.min(SWEEP) {
            let (finished, _) = self.sides(half_closed.way);
            let why = Aborted::StoodStill(self.linger, finished.peer);
            drop(progress);
            self.abort(why);
        }
    }

    fn why_doomed(&self, progress: &Progress) -> Option<Aborted> {
        if progress.failed.is_some() {
            return progress.failed.clone();
        }
        let sides = match &progress.half_closed {
            // The last direction notices what becomes of the other side.
            Some(half_closed) => [self.sides(half_closed.way).0; 2],
            None => [&self.visitor_side, &self.service_side],
        };
        let reset = sides.into_iter().find(|side| side.was_reset());
        reset.map(|side| Aborted::Reset(side.peer))
    }

    /// Notes what a direction has failed of. True if the other one has ended already.
    fn is_last(&self, why: &Aborted) -> bool {
        let mut progress = self.progress.lock();
        progress.failed.get_or_insert_with(|| why.clone());
        progress.ended > 0
    }

    /// Takes note of the end of a direction, and aborts the pair if one of them has failed. Whom a
    /// direction cannot write to may have sent something before, such as a refusal of what is being
    /// uploaded: the other direction hands that on, and aborts the pair when it has.
    fn ended(&self, way: Way, outcome: Result<(), Failure>) -> Option<Closing> {
        let (from, to) = self.sides(way);
        let mut progress = self.progress.lock();
        let writing = outcome.as_ref().is_err_and(|failure| failure.writing);
        if let Err(failure) = outcome {
            progress.failed.get_or_insert(failure.why);
        }
        let leave_it = writing && progress.ended == 0;
        if let Some(why) = progress.failed.clone().filter(|_| !leave_it) {
            drop(progress);
            net::wait_until_sent(if writing { &from.socket } else { &to.socket }, LAST_BYTES);
            self.abort(why);
            progress = self.progress.lock();
        }
        progress.ended += 1;
        if progress.ended < 2 {
            return None;
        }
        self.report(progress.aborted.as_ref());
        if progress.aborted.is_some() {
            return None;
        }
        net::reset_on_close(&self.visitor_side.socket, false);
        net::reset_on_close(&self.service_side.socket, false);
        // Without a key, its end has been read already.
        self.visitor_side.is_sealed.then(|| Closing {
            socket: self.visitor_side.socket.clone(),
            _slot: progress.slot.take(),
        })
    }

    /// Aborts both sockets; both directions end at once.
    fn abort(&self, why: Aborted) {
        let mut progress = self.progress.lock();
        if progress.aborted.is_none() && progress.ended < 2 {
            progress.aborted = Some(why.clone());
            progress.failed.get_or_insert(why);
            net::abort(&self.visitor_side.socket);
            net::abort(&self.service_side.socket);
        }
    }

    fn report(&self, aborted: Option<&Aborted>) {
        let (moved, time) = (self.joined.moved(), self.started.elapsed());
        let journal = &self.joined.pairs.journal;
        journal.visitor_left(&self.visitor, moved, time, aborted);
    }
}

/// What a pair keeps of an [`End`].
struct Side {
    peer: Peer,
    is_sealed: bool,
    socket: Arc<TcpStream>,
}

impl Side {
    /// A connection that was reset has no peer any more. One whose peer has finished still has it,
    /// as long as this side has not.
    fn was_reset(&self) -> bool {
        self.socket.peer_addr().is_err()
    }

    fn reading_failed(&self, error: io::Error) -> Aborted {
        match error.kind() {
            io::ErrorKind::ConnectionReset => Aborted::Reset(self.peer),
            _ => Aborted::Reading(self.peer, Arc::new(error)),
        }
    }

    fn writing_failed(&self, error: io::Error) -> Aborted {
        match error.kind() {
            io::ErrorKind::ConnectionReset => Aborted::Reset(self.peer),
            _ => Aborted::Writing(self.peer, Arc::new(error)),
        }
    }
}

fn add(sum: &mut [u64; 2], more: [u64; 2]) {
    sum[0] += more[0];
    sum[1] += more[1];
}

impl Joined {
    fn moved(&self) -> [u64; 2] {
        self.moved.each_ref().map(|it| it.load(Ordering::Relaxed))
    }
}

impl Drop for Joined {
    fn drop(&mut self) {
        let mut state = self.pairs.state.lock();
        state.joined.remove(&self.key);
        add(&mut state.moved, self.moved());
        drop(state);
        self.pairs.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::door::openings::Openings;
    use crate::journal;
    use crate::key::Key;
    use crate::os::workers::Workers;
    use crate::wire::secure::Purpose;
    use std::io::{Read, Write};
    use std::net::TcpListener;
    use std::thread;

    fn new_pairs() -> Arc<Pairs> {
        Pairs::new(Stop::new(), Arc::new(Journal::new(1, false)))
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
            near.respond(&Purpose::Control(&keys), None, &Openings::new(), || ())
                .ok()
                .unwrap();
            assert!(client.join().unwrap());
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
            let [from, to] = ends.map(|(peer, conn)| End { peer, conn });
            let visitor = Visitor::new(None, None);
            let (up, down) = new_pairs().join(visitor, from, to, Duration::from_secs(600));
            let down = thread::spawn(move || down.copy());
            up.copy();
            let error = client.read(&mut [0]).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::ConnectionReset, "{sealed}");
            down.join().unwrap();
        }
    }

    /// Comes from a port that no visitor ever has.
    const DOOMED: &str = "192.0.2.1:0";

    pub fn panic_on_purpose(visitor: &Visitor) {
        assert_ne!(visitor.address, DOOMED.parse().ok(), "on purpose");
    }

    /// A pair at work: the visitor's end, and the local service's.
    fn at_work(pairs: &Arc<Pairs>, workers: &Workers, from: &str) -> [TcpStream; 2] {
        let ([visitor, near], [service, far]) = (connected(), connected());
        let ends = [(Peer::Visitor, near), (Peer::LocalService, far)];
        let [near, far] = ends.map(|(peer, socket)| {
            net::reset_on_close(&socket, true);
            let conn = Conn::new(Arc::new(socket));
            End { peer, conn }
        });
        let from = Visitor::new(from.parse().ok(), None);
        let (up, down) = pairs.join(from, near, far, Duration::from_secs(600));
        workers.start("up", move || drop(up.copy())).unwrap();
        workers.start("down", move || drop(down.copy())).unwrap();
        [visitor, service]
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
        assert_eq!(pairs.totals(), (0, 3, [10, 0]));
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
