//! The relay: two sockets joined, each direction copied by a thread of its own.
//!
//! End of input is passed on as an end (a write shutdown, or with a key a frame that says so),
//! anything else as an abort of both sockets, so that a cut stream is not taken for a whole one.
//! That holds for a program that is killed, too: until both directions have ended well, a close of a
//! joined socket sends RST.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use log::info;
use parking_lot::{Condvar, Mutex};

use crate::conn::{Conn, Reader, Writer};
use crate::limits::{Slot, Slots, affordable_pipes};
use crate::log_limit::LogLimit;
use crate::net;
#[cfg(target_os = "linux")]
use crate::splice::{Pipe, refused};

/// A direction begins with the first buffer: most connections never fill it, and to touch memory for
/// the first time costs more than to copy it. One that fills it gets the second. One that fills half
/// of that carries bulk: if the kernel cannot move it, it gets the third.
///
/// With a key a direction has two of them. Sealed bulk costs 1.25 CPU-s/GB if the last has 64 KiB,
/// 1.03 with 256 and 0.87 with 448, both programs together, and a pair that is bulk one way stays
/// below 1 MiB.
const BUFFERS: [usize; 3] = [8 * 1024, 64 * 1024, 448 * 1024];

/// The place of the last one.
const BULK: usize = BUFFERS.len() - 1;

/// A direction that pauses for longer gives back all but the first.
const BULK_PAUSE: Duration = Duration::from_secs(1);

/// Why a stop ends what is still joined.
const CUT_OFF: &str = "cut off by the stop";

/// Half-closed pairs are looked at this often, so that a reset is passed on within a second or so,
/// and `linger` is held to two.
pub const SWEEP: Duration = Duration::from_secs(1);

/// Visitors' lines in a log, at most that many a second: the log of a busy hour stays readable,
/// and a flood of visitors does not become a flood of lines.
const VISITOR_LINES: u32 = 100;

/// The pairs that are joined now.
pub struct Pairs {
    state: Mutex<PairsState>,
    changed: Condvar,
    #[cfg_attr(not(target_os = "linux"), expect(dead_code))]
    pipes: Arc<Slots>,
    log: LogLimit,
}

struct PairsState {
    joined: HashMap<u64, Weak<Pair>>,
    /// How many were joined in all.
    next_key: u64,
    /// Bytes up and down of those that are joined no more.
    moved: [u64; 2],
    /// How many more may be joined before long.
    expected: usize,
    end_by: Option<Instant>,
    /// What is joined from now on is cut at once.
    closed: bool,
}

impl Pairs {
    /// None yet.
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::new(PairsState {
                joined: HashMap::new(),
                next_key: 0,
                moved: [0; 2],
                expected: 0,
                end_by: None,
                closed: false,
            }),
            changed: Condvar::new(),
            pipes: Slots::new(affordable_pipes()),
            log: LogLimit::new(VISITOR_LINES),
        })
    }

    /// Joins two connections that [reset on close](net::reset_on_close): `left` is the one nearer to
    /// the visitor. The answer is the direction up, from left to right, and the direction down, each
    /// to be copied on a thread of its own. One that is dropped instead aborts both.
    pub fn join(
        self: &Arc<Self>,
        visitor: Visitor,
        left: End,
        right: End,
        linger: Duration,
    ) -> (Direction, Direction) {
        let ((left, from_left, to_left), (right, from_right, to_right)) =
            (left.split(), right.split());
        let mut state = self.state.lock();
        let key = state.next_key;
        state.next_key += 1;
        let pair = Arc::new(Pair {
            left,
            right,
            linger,
            started: Instant::now(),
            progress: Mutex::new(Progress::default()),
            visitor,
            joined: Joined {
                key,
                moved: Default::default(),
                pairs: self.clone(),
            },
        });
        state.joined.insert(key, Arc::downgrade(&pair));
        let closed = state.closed;
        drop(state);
        if closed {
            pair.abort(CUT_OFF.to_owned());
        }
        let direction = |way, reader, writer| Direction {
            pair: pair.clone(),
            way,
            reader,
            writer,
            outcome: Err("there was no thread for it".to_owned()),
        };
        (
            direction(Way::Up, from_left, to_right),
            direction(Way::Down, from_right, to_left),
        )
    }

    /// Lets [`wait`](Self::wait) wait for a pair that is not joined yet, as long as the answer lives.
    pub fn expect(self: &Arc<Self>) -> Expected {
        self.state.lock().expected += 1;
        Expected(self.clone())
    }

    /// Pairs that are still joined after this time are to be aborted then. A later instant than
    /// the one already set changes nothing.
    pub fn end_after(&self, time: Duration) {
        let mut state = self.state.lock();
        let instant = Instant::now().checked_add(time);
        state.end_by = [state.end_by, instant].into_iter().flatten().min();
        self.changed.notify_all();
    }

    /// When pairs are to be aborted, if that was said.
    pub fn end_by(&self) -> Option<Instant> {
        self.state.lock().end_by
    }

    /// Waits until no pair is joined or expected any more, see [`Pairs::end_after`]. None can be
    /// joined then.
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
            if done || state.end_by.is_some_and(|end_by| end_by <= now) {
                state.closed = true;
                break;
            }
            let next = state.end_by.map_or(sweep, |end_by| end_by.min(sweep));
            self.changed.wait_until(&mut state, next);
        }
        for pair in self.all() {
            pair.abort(CUT_OFF.to_owned());
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
    _slot: Option<Slot>,
}

impl Visitor {
    /// A visitor from `address`, which the client of an original server is not told. `slot` is its
    /// place on the server, given back when the pair has ended.
    pub fn new(address: Option<SocketAddr>, slot: Option<Slot>) -> Self {
        Self {
            address,
            _slot: slot,
        }
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

/// One of the two connections of a pair.
pub struct End {
    /// Who is at the other end, for the log.
    pub name: &'static str,
    /// The connection.
    pub conn: Conn,
}

impl End {
    /// What both directions need, and what each of them has for itself.
    fn split(self) -> (Side, Reader, Writer) {
        let Self { name, conn } = self;
        let socket = conn.socket().clone();
        (Side { name, socket }, conn.reader, conn.writer)
    }
}

/// What a pair keeps of an [`End`].
struct Side {
    name: &'static str,
    socket: Arc<TcpStream>,
}

/// A direction of a pair. However it goes away, the pair is told that it has ended, so that the
/// other direction does not wait for this one for ever.
pub struct Direction {
    way: Way,
    reader: Reader,
    writer: Writer,
    outcome: Result<(), String>,
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

impl Direction {
    /// Copies until the direction ends.
    pub fn copy(mut self) {
        self.outcome = Err("its thread panicked".to_owned());
        #[cfg(test)]
        tests::panic_on_purpose(&self.pair.visitor);
        self.outcome = self.carry();
    }

    fn carry(&mut self) -> Result<(), String> {
        let (from, to) = self.pair.sides(self.way);
        let reading = |error| from.went_wrong("reading from", &error);
        let writing = |error| to.went_wrong("writing to", &error);
        let moved = &self.pair.joined.moved[self.way as usize];
        // No memory for a buffer before there is something to put into it: a silent connection
        // costs the stacks of its threads and no more.
        self.reader.wait().map_err(reading)?;
        let mut level = 0;
        loop {
            let (size, before) = (BUFFERS[level], level);
            match self.reader.read_batch(self.writer.batch(size)) {
                Ok(0) => break,
                Ok(count) => {
                    self.writer.write_batch(count).map_err(writing)?;
                    moved.fetch_add(count as u64, Ordering::Relaxed);
                    let enough = if level == 0 { size } else { size / 2 };
                    if count >= enough && level < BULK {
                        level += 1;
                    }
                }
                Err(error) if level > 0 && net::paused(&error) => level = 0,
                Err(error) => return Err(reading(error)),
            }
            let bulk = level == BULK && before < BULK;
            if bulk && self.pair.splice(self.way, &self.reader, &mut self.writer)? {
                level = 0;
            }
            if (before == 0) != (level == 0) {
                let pause = (level > 0).then_some(BULK_PAUSE);
                net::limit_pause(self.reader.socket(), pause).map_err(reading)?;
            }
        }
        // The end frame may have to wait for room like any byte, and so must not be written
        // under the lock; before it is written, the pair is not half-closed.
        self.pair.check_end(self.way)?;
        self.writer.write_end().map_err(writing)?;
        if self.pair.half_close(self.way) {
            self.writer.shutdown().map_err(writing)?;
        }
        Ok(())
    }
}

impl Drop for Direction {
    fn drop(&mut self) {
        let outcome = std::mem::replace(&mut self.outcome, Ok(()));
        self.pair.ended(outcome);
    }
}

/// Two joined sockets, closed when the last thread lets go of them.
struct Pair {
    left: Side,
    right: Side,
    linger: Duration,
    started: Instant,
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
    /// How many directions have ended, well or not.
    ended: u32,
    /// What went wrong first.
    aborted: Option<String>,
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
            Way::Up => (&self.left, &self.right),
            Way::Down => (&self.right, &self.left),
        }
    }

    /// Lets the kernel move bulk, if both sides are plain, until it is bulk no more. Whatever ends
    /// that, the end of input included, is left for copying to find again. False if the kernel
    /// moves nothing here.
    ///
    /// Bulk costs both programs together 0.4 CPU-s/GB so, instead of 0.9.
    #[cfg(target_os = "linux")]
    fn splice(&self, way: Way, reader: &Reader, writer: &mut Writer) -> Result<bool, String> {
        let Some((input, output)) = reader.plain().zip(writer.plain()) else {
            return Ok(false);
        };
        let pipes = &self.joined.pairs.pipes;
        let Some(mut pipe) = pipes.try_take().and_then(Pipe::open) else {
            return Ok(false);
        };
        writer.release();
        let (from, to) = self.sides(way);
        loop {
            let count = match pipe.fill(&input) {
                Ok(count) => count,
                Err(error) if net::paused(&error) => 0,
                Err(error) if refused(&error) => {
                    // And always will be.
                    pipes.close();
                    return Ok(false);
                }
                Err(error) => return Err(from.went_wrong("reading from", &error)),
            };
            while !pipe.is_empty() {
                let drained = pipe.drain(&*output);
                let drained = drained.map_err(|error| to.went_wrong("writing to", &error))?;
                self.joined.moved[way as usize].fetch_add(drained as u64, Ordering::Relaxed);
            }
            if count < BUFFERS[0] {
                return Ok(true);
            }
        }
    }

    #[cfg(not(target_os = "linux"))]
    fn splice(&self, _: Way, _: &Reader, _: &mut Writer) -> Result<bool, String> {
        Ok(false)
    }

    /// Is this end of input one? The kernel reports a reset once. If the other direction, writing to
    /// the same socket, was told, then this one has read an end that is none.
    fn check_end(&self, way: Way) -> Result<(), String> {
        let (from, _) = self.sides(way);
        let progress = self.progress.lock();
        if let Some(why) = &progress.aborted {
            return Err(why.clone());
        }
        match progress.half_closed.is_none() && from.was_reset() {
            true => Err(from.reset()),
            false => Ok(()),
        }
    }

    /// Notes that a direction has ended well. True if the far side is to be told now: after the
    /// direction that ends last, both sockets are closed, which says the same and wakes nobody.
    fn half_close(&self, way: Way) -> bool {
        let mut progress = self.progress.lock();
        let first = progress.half_closed.is_none() && progress.aborted.is_none();
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
        let Some(half_closed) = &mut progress.half_closed else {
            drop(progress);
            let reset = [&self.left, &self.right]
                .into_iter()
                .find(|it| it.was_reset());
            return reset.map_or((), |side| self.abort(side.reset()));
        };
        let moved = self.joined.moved().iter().sum();
        if half_closed.moved != moved {
            half_closed.moved = moved;
            half_closed.since = Instant::now();
        }
        // Nobody reads there any more, so nobody else would notice.
        let (finished, _) = self.sides(half_closed.way);
        let why = if finished.was_reset() {
            finished.reset()
        } else if half_closed.since.elapsed() >= self.linger {
            let (name, linger) = (finished.name, self.linger);
            format!("no byte in {linger:?} after the {name} had finished")
        } else {
            return;
        };
        drop(progress);
        self.abort(why);
    }

    fn ended(&self, outcome: Result<(), String>) {
        if let Err(why) = outcome {
            self.abort(why);
        }
        let mut progress = self.progress.lock();
        progress.ended += 1;
        if progress.ended < 2 {
            return;
        }
        if progress.aborted.is_none() {
            net::reset_on_close(&self.left.socket, false);
            net::reset_on_close(&self.right.socket, false);
        }
        self.report(progress.aborted.as_deref());
    }

    /// Aborts both sockets; both directions end at once.
    fn abort(&self, why: String) {
        let mut progress = self.progress.lock();
        if progress.aborted.is_none() && progress.ended < 2 {
            progress.aborted = Some(why);
            net::abort(&self.left.socket);
            net::abort(&self.right.socket);
        }
    }

    fn report(&self, aborted: Option<&str>) {
        self.joined.pairs.log.say(|left_out| {
            let [up, down] = self.joined.moved();
            let (visitor, seconds) = (&self.visitor, self.started.elapsed().as_secs_f64());
            let (comma, why) = aborted.map_or(("", ""), |why| (", aborted: ", why));
            info!(
                "{visitor}: {up} bytes up, {down} bytes down in {seconds:.3} s{comma}{why}{left_out}"
            );
        });
    }
}

impl Side {
    /// A connection that was reset has no peer any more. One whose peer has finished still has it,
    /// as long as this side has not.
    fn was_reset(&self) -> bool {
        self.socket.peer_addr().is_err()
    }

    fn went_wrong(&self, what: &str, error: &io::Error) -> String {
        match error.kind() {
            io::ErrorKind::ConnectionReset => self.reset(),
            _ => format!("{what} the {}: {error}", self.name),
        }
    }

    fn reset(&self) -> String {
        format!("reset by the {}", self.name)
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
    use crate::key::Key;
    use crate::logger;
    use crate::openings::Openings;
    use crate::secure::Purpose;
    use crate::workers::Workers;
    use std::io::{Read, Write};
    use std::net::TcpListener;
    use std::thread;

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

            let ends = [("visitor", Conn::new(Arc::new(near))), ("client", tunnel)];
            let [left, right] = ends.map(|(name, conn)| End { name, conn });
            let visitor = Visitor::new(None, None);
            let (up, down) = Pairs::new().join(visitor, left, right, Duration::from_secs(600));
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
        let ([visitor, left], [service, right]) = (connected(), connected());
        let [left, right] = [("visitor", left), ("local service", right)].map(|(name, socket)| {
            net::reset_on_close(&socket, true);
            let conn = Conn::new(Arc::new(socket));
            End { name, conn }
        });
        let from = Visitor::new(from.parse().ok(), None);
        let (up, down) = pairs.join(from, left, right, Duration::from_secs(600));
        workers.start("up", move || up.copy()).unwrap();
        workers.start("down", move || down.copy()).unwrap();
        [visitor, service]
    }

    #[test]
    fn a_panic_aborts_its_pair_and_no_other() {
        let log = logger::tests::record();
        let (pairs, workers) = (Pairs::new(), Workers::new());
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
