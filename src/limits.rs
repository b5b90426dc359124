//! What bounds a stranger: how many visitors there are, how many connections have yet to prove
//! that they are a client, and how many log lines they cause.

use std::fmt;
use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use crate::net;
use crate::protocol::MAX_POOL;

/// Connections of one port that have not proved themselves yet: each has a thread.
pub const MAX_UNPROVED: usize = 64;

/// When there are too many, the oldest goes, but not before it has had this long: a client needs
/// microseconds for what it says first, and a burst of its tunnels must not push its own out.
const UNPROVED_GRACE: Duration = Duration::from_millis(50);

/// One that began like somebody who has the key has this long: what it says next takes a round
/// trip, and nobody must be able to push a far client out.
const KNOWN_GRACE: Duration = Duration::from_secs(1);

/// What a server needs besides its visitors, or half of what it has if that is less: three ports,
/// strangers at two of them, a full pool, and a few for the system.
const OTHER_DESCRIPTORS: usize = 2 * MAX_UNPROVED + MAX_POOL + 16;

/// Directions of a server's or a client's visitors that may move their bulk through a pipe at a
/// time, two descriptors each. With 1 MiB a pipe, an ordinary user gets as many
/// (`fs.pipe-user-pages-soft`).
const MAX_PIPES: usize = 64;

/// How many visitors the process has descriptors for, two each. More must not be accepted: they
/// would leave none for the tunnels that they wait for.
pub fn affordable_visitors() -> usize {
    let descriptors = descriptors();
    (descriptors - OTHER_DESCRIPTORS.min(descriptors / 2)) / 2 - affordable_pipes()
}

/// How many pipes the process has descriptors for: an eighth of all, or what is enough.
pub fn affordable_pipes() -> usize {
    MAX_PIPES.min(descriptors() / 16)
}

#[cfg(target_os = "linux")]
fn descriptors() -> usize {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    let most = |current| usize::try_from(current).unwrap_or(usize::MAX);
    limit.current.map_or(usize::MAX, most)
}

#[cfg(not(target_os = "linux"))]
fn descriptors() -> usize {
    usize::MAX
}

/// Raises the process's limit of descriptors as far as its user may. The usual 1024 are for
/// programs that use `select`.
pub fn raise_descriptors() {
    #[cfg(target_os = "linux")]
    {
        use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
        let maximum = getrlimit(Resource::Nofile).maximum;
        let current = maximum;
        // Without it the program serves fewer visitors at a time, and says so.
        let _ = setrlimit(Resource::Nofile, Rlimit { current, maximum });
    }
}

/// A fixed number of places for visitors; who finds none waits.
pub struct Slots {
    state: Mutex<SlotState>,
    changed: Condvar,
}

struct SlotState {
    free: usize,
    open: bool,
}

impl Slots {
    /// As many places as that, all free.
    pub fn new(count: usize) -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::new(SlotState {
                free: count,
                open: true,
            }),
            changed: Condvar::new(),
        })
    }

    /// Takes a place, and waits for one if need be, after it has called `full`. None once closed, if
    /// no place is free.
    pub fn take(self: &Arc<Self>, full: impl FnOnce()) -> Option<Slot> {
        let mut state = self.state.lock();
        if state.free == 0 && state.open {
            full();
        }
        self.changed
            .wait_while(&mut state, |state| state.free == 0 && state.open);
        state.free = state.free.checked_sub(1)?;
        Some(Slot(self.clone()))
    }

    /// Takes a place, if there is a free one. None once closed.
    pub fn try_take(self: &Arc<Self>) -> Option<Slot> {
        let mut state = self.state.lock();
        if !state.open {
            return None;
        }
        state.free = state.free.checked_sub(1)?;
        Some(Slot(self.clone()))
    }

    /// Ends every wait for a place.
    pub fn close(&self) {
        self.state.lock().open = false;
        self.changed.notify_all();
    }
}

/// A place; free again when dropped.
pub struct Slot(Arc<Slots>);

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.state.lock().free += 1;
        self.0.changed.notify_one();
    }
}

/// The connections of a port that have not proved themselves yet.
pub struct Lobby {
    unproved: Mutex<Vec<Unproved>>,
    left: Condvar,
}

struct Unproved {
    socket: Arc<TcpStream>,
    /// Until then it stays, however full it gets.
    stays: Instant,
    /// Shut down; its thread is about to notice, and counts until it has.
    sent_away: bool,
}

impl Unproved {
    fn may_go(&self) -> bool {
        self.stays <= Instant::now()
    }
}

impl Lobby {
    /// An empty lobby.
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            unproved: Mutex::new(Vec::new()),
            left: Condvar::new(),
        })
    }

    /// Lets a connection in. In a full lobby that waits until the oldest one has had its time, shuts
    /// it down, and waits until its thread has noticed: so there are never more threads than
    /// places.
    pub fn enter(self: &Arc<Self>, socket: &Arc<TcpStream>) -> Place {
        let mut unproved = self.unproved.lock();
        while unproved.len() >= MAX_UNPROVED {
            let leaves = unproved.iter().any(|it| it.sent_away);
            let oldest = unproved.iter_mut().min_by_key(|it| it.stays);
            match oldest.filter(|_| !leaves) {
                // Not the far side is late but the thread here: the host is busy.
                Some(oldest) if oldest.may_go() && net::has_unread(&oldest.socket) => {
                    oldest.stays = Instant::now() + UNPROVED_GRACE;
                }
                Some(oldest) if oldest.may_go() => {
                    oldest.sent_away = true;
                    let _ = oldest.socket.shutdown(Shutdown::Both);
                }
                Some(oldest) => {
                    let stays = oldest.stays;
                    self.left.wait_until(&mut unproved, stays);
                }
                None => self.left.wait(&mut unproved),
            }
        }
        unproved.push(Unproved {
            socket: socket.clone(),
            stays: Instant::now() + UNPROVED_GRACE,
            sent_away: false,
        });
        Place {
            lobby: self.clone(),
            socket: socket.clone(),
        }
    }

    /// Shuts down every connection in the lobby.
    pub fn clear(&self) {
        for unproved in self.unproved.lock().drain(..) {
            let _ = unproved.socket.shutdown(Shutdown::Both);
        }
        self.left.notify_all();
    }
}

/// A connection's place in the lobby, left when dropped.
pub struct Place {
    lobby: Arc<Lobby>,
    socket: Arc<TcpStream>,
}

impl Place {
    /// Leaves the lobby; false if the connection was sent away before, and is of no use.
    pub fn leave(self) -> bool {
        self.remove()
    }

    /// Lets the connection stay longer than others: it began like one that has the key. That may
    /// have been recorded, so it proves nothing yet.
    pub fn extend(&self) {
        let mut unproved = self.lobby.unproved.lock();
        if let Some(own) = self.find(&unproved) {
            unproved[own].stays += KNOWN_GRACE;
        }
    }

    fn find(&self, unproved: &[Unproved]) -> Option<usize> {
        let is_own = |it: &Unproved| Arc::ptr_eq(&it.socket, &self.socket);
        unproved.iter().position(is_own)
    }

    fn remove(&self) -> bool {
        let mut unproved = self.lobby.unproved.lock();
        let own = self.find(&unproved).map(|own| unproved.swap_remove(own));
        self.lobby.left.notify_one();
        own.is_some_and(|own| !own.sent_away)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.remove();
    }
}

/// At most so many log lines of one kind a second, or in another period; those beyond are counted.
pub struct LogLimit {
    most: u32,
    period: Duration,
    state: Mutex<LogState>,
}

struct LogState {
    since: Instant,
    said: u32,
    left_out: u64,
}

impl LogLimit {
    /// At most this many lines a second.
    pub fn new(a_second: u32) -> Self {
        Self::within(Duration::from_secs(1), a_second)
    }

    /// At most this many lines in each such period.
    pub fn within(period: Duration, most: u32) -> Self {
        Self {
            most,
            period,
            state: Mutex::new(LogState {
                since: Instant::now(),
                said: 0,
                left_out: 0,
            }),
        }
    }

    /// Calls `say` if this period has a line left. What it is given prints as nothing, or as the
    /// number of lines that were left out before this one: put it at the end of the line.
    pub fn say(&self, say: impl FnOnce(LeftOut)) {
        if let Some(left_out) = self.take(Instant::now()) {
            say(left_out);
        }
    }

    fn take(&self, now: Instant) -> Option<LeftOut> {
        let mut state = self.state.lock();
        // A period begins with its first line, so that two of them are never next to each other.
        let over = now.saturating_duration_since(state.since) >= self.period;
        if over || state.said == 0 {
            state.since = now;
            state.said = 0;
        }
        if state.said == self.most {
            state.left_out += 1;
            return None;
        }
        state.said += 1;
        Some(LeftOut(std::mem::take(&mut state.left_out)))
    }
}

/// How many lines were left out before this one.
#[derive(Debug, PartialEq, Eq)]
pub struct LeftOut(u64);

impl fmt::Display for LeftOut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            0 => Ok(()),
            count => write!(f, " (and {count} more like this before, not logged)"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::net::TcpListener;
    use std::thread;

    const DEADLINE: Duration = Duration::from_secs(10);

    #[test]
    fn who_does_not_wait_gets_a_free_place_or_none() {
        let slots = Slots::new(1);
        let slot = slots.try_take();
        assert!(slot.is_some() && slots.try_take().is_none());
        drop(slot);
        assert!(slots.try_take().is_some());
        slots.close();
        assert!(slots.try_take().is_none());
    }

    #[test]
    fn a_slot_is_waited_for_and_comes_back() {
        let slots = Slots::new(1);
        let slot = slots.take(|| ()).unwrap();
        let waiting = thread::spawn({
            let slots = slots.clone();
            move || slots.take(|| ()).is_some()
        });
        drop(slot);
        assert!(waiting.join().unwrap());
        let _slot = slots.take(|| ()).unwrap();
        let waiting = thread::spawn({
            let slots = slots.clone();
            move || slots.take(|| ()).is_some()
        });
        slots.close();
        assert!(!waiting.join().unwrap());
    }

    /// A connection to this listener, and its other end.
    fn connect(listener: &TcpListener) -> (TcpStream, Arc<TcpStream>) {
        let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        near.set_read_timeout(Some(DEADLINE)).unwrap();
        (near, Arc::new(listener.accept().unwrap().0))
    }

    #[test]
    fn a_full_lobby_sends_the_oldest_away_and_waits_for_it() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let lobby = Lobby::new();
        let start = Instant::now();
        let mut inside: Vec<_> = (0..MAX_UNPROVED)
            .map(|_| {
                let (near, socket) = connect(&listener);
                (near, lobby.enter(&socket))
            })
            .collect();
        // The oldest began as if it had the key: the second one goes in its place.
        inside[0].1.extend();
        let (mut oldest, oldest_place) = inside.remove(1);
        let (_near, newcomer) = connect(&listener);
        let entering = thread::spawn({
            let lobby = lobby.clone();
            move || lobby.enter(&newcomer)
        });
        assert_eq!(oldest.read(&mut [0]).unwrap(), 0);
        assert!(start.elapsed() >= UNPROVED_GRACE);
        assert!(!entering.is_finished(), "in before the other is out");
        assert!(!oldest_place.leave());
        let place = entering.join().unwrap();
        assert_eq!(lobby.unproved.lock().len(), MAX_UNPROVED);
        drop(inside);
        assert_eq!(lobby.unproved.lock().len(), 1);
        assert!(place.leave());
        assert_eq!(lobby.unproved.lock().len(), 0);
    }

    #[test]
    fn log_lines_are_limited_and_counted() {
        let limit = LogLimit::new(2);
        let start = Instant::now();
        assert_eq!(limit.take(start), Some(LeftOut(0)));
        assert_eq!(limit.take(start), Some(LeftOut(0)));
        assert_eq!(limit.take(start), None);
        assert_eq!(limit.take(start), None);
        let later = start + Duration::from_secs(2);
        assert_eq!(limit.take(later), Some(LeftOut(2)));
        assert_eq!(limit.take(later), Some(LeftOut(0)));
        assert_eq!(LeftOut(0).to_string(), "");
        assert!(LeftOut(2).to_string().contains("2 more"));
    }
}
