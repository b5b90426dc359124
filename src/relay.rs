//! The relay: two sockets joined, each direction copied by a thread of its own.
//!
//! End of input is passed on as a write shutdown, anything else as an abort of both sockets, so that
//! a cut stream is not taken for a whole one. That holds for a program that is killed, too: until
//! both directions have ended well, a close of a joined socket sends RST.

use std::collections::HashMap;
use std::fmt;
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use log::info;
use parking_lot::{Condvar, Mutex};

use crate::limits::{LogLimit, Slot};
use crate::net::{self, timed_out};

/// A direction begins with a small buffer: most connections never fill it, and to touch memory for
/// the first time costs more than to copy it.
const FIRST_BUFFER: usize = 8 * 1024;

/// A direction that fills its buffer gets one four times as large, up to this.
const LARGEST_BUFFER: usize = 256 * 1024;

/// A socket's time-out cannot be zero.
const SHORTEST_LINGER: Duration = Duration::from_millis(1);

/// Visitors' lines in a log, at most that many a second: the log of a busy hour stays readable,
/// and a flood of visitors does not become a flood of lines.
const VISITOR_LINES: u32 = 100;

/// The pairs that are joined now.
pub struct Pairs {
    state: Mutex<PairsState>,
    changed: Condvar,
    log: LogLimit,
}

struct PairsState {
    joined: HashMap<u64, Weak<Pair>>,
    next_key: u64,
    end_by: Option<Instant>,
}

impl Pairs {
    /// None yet.
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::new(PairsState {
                joined: HashMap::new(),
                next_key: 0,
                end_by: None,
            }),
            changed: Condvar::new(),
            log: LogLimit::new(VISITOR_LINES),
        })
    }

    /// Joins two sockets: `left` is the one nearer to the visitor. The answer is the direction up,
    /// from left to right, and the direction down, each to be copied on a thread of its own. One
    /// that is dropped instead aborts both.
    pub fn join(
        self: &Arc<Self>,
        visitor: Visitor,
        left: End,
        right: End,
        linger: Duration,
    ) -> (Direction, Direction) {
        let mut state = self.state.lock();
        let key = state.next_key;
        state.next_key += 1;
        let pair = Arc::new(Pair {
            left,
            right,
            linger: linger.max(SHORTEST_LINGER),
            started: Instant::now(),
            moved: Default::default(),
            progress: Mutex::new(Progress::default()),
            visitor,
            joined: Joined {
                key,
                pairs: self.clone(),
            },
        });
        state.joined.insert(key, Arc::downgrade(&pair));
        drop(state);
        net::reset_on_close(&pair.left.socket, true);
        net::reset_on_close(&pair.right.socket, true);
        let direction = |way| Direction {
            pair: pair.clone(),
            way,
            outcome: Err("there was no thread for it".to_owned()),
        };
        (direction(Way::Up), direction(Way::Down))
    }

    /// Pairs that are still joined after this time are to be aborted then. A later instant than
    /// the one already set changes nothing.
    pub fn end_after(&self, time: Duration) {
        let mut state = self.state.lock();
        let instant = Instant::now().checked_add(time);
        state.end_by = [state.end_by, instant].into_iter().flatten().min();
        self.changed.notify_all();
    }

    /// Waits until no pair is joined any more; see [`Pairs::end_after`].
    pub fn wait(&self) {
        let mut state = self.state.lock();
        while !state.joined.is_empty() {
            match state.end_by {
                Some(end_by) if end_by <= Instant::now() => {
                    let cut: Vec<_> = state.joined.drain().collect();
                    drop(state);
                    for pair in cut.iter().filter_map(|(_, pair)| pair.upgrade()) {
                        pair.abort("cut off by the stop".to_owned());
                    }
                    return;
                }
                Some(end_by) => {
                    self.changed.wait_until(&mut state, end_by);
                }
                None => self.changed.wait(&mut state),
            }
        }
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

impl fmt::Display for Visitor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.address {
            Some(address) => write!(f, "visitor {address}"),
            None => write!(f, "a visitor"),
        }
    }
}

/// One of the two sockets of a pair.
pub struct End {
    /// Who is at the other end, for the log.
    pub name: &'static str,
    /// The socket.
    pub socket: Arc<TcpStream>,
}

/// A direction of a pair. However it goes away, the pair is told that it has ended, so that the
/// other direction does not wait for this one for ever.
pub struct Direction {
    pair: Arc<Pair>,
    way: Way,
    outcome: Result<(), String>,
}

#[derive(Clone, Copy)]
enum Way {
    /// From the visitor to the local service.
    Up,
    /// From the local service to the visitor.
    Down,
}

impl Direction {
    /// Copies until the direction ends, `first` before everything else.
    pub fn copy(mut self, first: &[u8]) {
        self.outcome = Err("its thread panicked".to_owned());
        self.outcome = self.pair.carry(self.way, first);
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
    left: End,
    right: End,
    linger: Duration,
    started: Instant,
    /// Bytes up and down.
    moved: [AtomicU64; 2],
    progress: Mutex<Progress>,
    /// Behind the sockets: its slot is free, and the pair forgotten, when they are closed.
    visitor: Visitor,
    joined: Joined,
}

/// A pair's place among all that are joined.
struct Joined {
    key: u64,
    pairs: Arc<Pairs>,
}

#[derive(Default)]
struct Progress {
    /// When the end of one direction was passed on; the other one is the last.
    half_closed: Option<Instant>,
    /// How many directions have ended, well or not.
    ended: u32,
    /// What went wrong first.
    aborted: Option<String>,
}

impl Pair {
    fn carry(&self, way: Way, first: &[u8]) -> Result<(), String> {
        let (from, to) = match way {
            Way::Up => (&self.left, &self.right),
            Way::Down => (&self.right, &self.left),
        };
        let moved = &self.moved[way as usize];
        let reading = |error| from.went_wrong("reading from", &error);
        let writing = |error| to.went_wrong("writing to", &error);
        let linger = Some(self.linger);
        from.socket.set_read_timeout(linger).map_err(reading)?;
        to.socket.set_write_timeout(linger).map_err(writing)?;

        self.write(to, first, moved).map_err(writing)?;
        // No memory for a buffer before there is something to put into it: a silent connection
        // costs the stacks of its threads and no more.
        self.read(from, |socket| socket.peek(&mut [0]))
            .map_err(reading)?;
        let mut buffer = vec![0; FIRST_BUFFER];
        loop {
            let count = self
                .read(from, |mut socket| socket.read(&mut buffer))
                .map_err(reading)?;
            if count == 0 {
                return self.pass_end_on(from, to);
            }
            self.write(to, &buffer[..count], moved).map_err(writing)?;
            if count == buffer.len() && count < LARGEST_BUFFER {
                buffer = vec![0; (count * 4).min(LARGEST_BUFFER)];
            }
        }
    }

    fn pass_end_on(&self, from: &End, to: &End) -> Result<(), String> {
        let mut progress = self.progress.lock();
        // The direction that ends last has nothing to shut down: that both sockets are closed now
        // says the same, and wakes nobody.
        if progress.half_closed.is_some() || progress.aborted.is_some() {
            return Ok(());
        }
        // The kernel reports a reset once. If the other direction, writing to the same socket, was
        // told, then this one has read an end that is none; but a socket that was reset has no
        // peer any more, and one whose peer has finished still has it.
        if from.socket.peer_addr().is_err() {
            return Err(from.went_wrong("", &io::ErrorKind::ConnectionReset.into()));
        }
        progress.half_closed = Some(Instant::now());
        drop(progress);
        let writing = |error| to.went_wrong("writing to", &error);
        to.socket.shutdown(Shutdown::Write).map_err(writing)
    }

    fn read(
        &self,
        from: &End,
        mut read: impl FnMut(&TcpStream) -> io::Result<usize>,
    ) -> io::Result<usize> {
        let set_timeout = |left| from.socket.set_read_timeout(Some(left));
        self.wait(|| read(&from.socket), set_timeout)
    }

    fn write(&self, to: &End, mut bytes: &[u8], moved: &AtomicU64) -> io::Result<()> {
        let set_timeout = |left| to.socket.set_write_timeout(Some(left));
        while !bytes.is_empty() {
            let count = self.wait(|| (&*to.socket).write(bytes), set_timeout)?;
            moved.fetch_add(count as u64, Ordering::Relaxed);
            bytes = &bytes[count..];
        }
        Ok(())
    }

    /// Repeats a transfer that runs into its socket's time-out, for as long as it may stand still:
    /// for ever while both directions live, and for `linger` once the other one has ended.
    fn wait(
        &self,
        mut transfer: impl FnMut() -> io::Result<usize>,
        set_timeout: impl Fn(Duration) -> io::Result<()>,
    ) -> io::Result<usize> {
        let mut since = Instant::now();
        loop {
            match transfer() {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if timed_out(&error) => {
                    let half_closed = self.progress.lock().half_closed;
                    since = half_closed.map_or_else(Instant::now, |ended| since.max(ended));
                    let left = self.linger.saturating_sub(since.elapsed());
                    if left.is_zero() {
                        return Err(io::Error::new(
                            io::ErrorKind::TimedOut,
                            format!(
                                "no byte in {:?} after the other end had finished",
                                self.linger
                            ),
                        ));
                    }
                    set_timeout(left)?;
                }
                result => return result,
            }
        }
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
        if progress.aborted.is_none() {
            progress.aborted = Some(why);
            net::abort(&self.left.socket);
            net::abort(&self.right.socket);
        }
    }

    fn report(&self, aborted: Option<&str>) {
        self.joined.pairs.log.say(|left_out| {
            let [up, down] = self.moved.each_ref().map(|it| it.load(Ordering::Relaxed));
            let (visitor, seconds) = (&self.visitor, self.started.elapsed().as_secs_f64());
            let (comma, why) = aborted.map_or(("", ""), |why| (", aborted: ", why));
            info!(
                "{visitor}: {up} bytes up, {down} bytes down in {seconds:.3} s{comma}{why}{left_out}"
            );
        });
    }
}

impl End {
    fn went_wrong(&self, what: &str, error: &io::Error) -> String {
        let name = self.name;
        match error.kind() {
            io::ErrorKind::ConnectionReset => format!("reset by the {name}"),
            _ => format!("{what} the {name}: {error}"),
        }
    }
}

impl Drop for Joined {
    fn drop(&mut self) {
        self.pairs.state.lock().joined.remove(&self.key);
        self.pairs.changed.notify_all();
    }
}
