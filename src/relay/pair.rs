//! Two joined connections, and how they end: what both of their directions share.

use std::io;
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::os::net;
#[cfg(target_os = "linux")]
use crate::os::sock_diag;
use crate::relay::{Aborted, Pairs, Peer, SWEEP, Visit, Visitor};
use crate::service::Service;
use crate::wire::conn::{Conn, Reader, Writer};
use crate::wire::line::Line;

/// What a direction that has failed has written before gets this long to leave, before the reset.
const LAST_BYTES: Duration = Duration::from_secs(1);

#[derive(Clone, Copy)]
pub enum Way {
    /// From the visitor to the local service.
    Up,
    /// From the local service to the visitor.
    Down,
}

/// Why a direction has not ended well.
pub struct Failure {
    pub why: Aborted,
    /// The side that it wrote to failed.
    pub writing: bool,
}

impl Failure {
    pub fn reading(why: Aborted) -> Self {
        let writing = false;
        Self { why, writing }
    }
}

/// One direction's half of the tunnel.
pub enum TunnelHalf {
    Reader(Reader),
    Writer(Writer),
}

impl TunnelHalf {
    /// The tunnel again, if both halves still come in frames: one of them may have given them up.
    fn rejoin(self, other: TunnelHalf) -> Option<Conn> {
        match (self, other) {
            (TunnelHalf::Reader(reader), TunnelHalf::Writer(writer))
            | (TunnelHalf::Writer(writer), TunnelHalf::Reader(reader))
                if reader.has_frames() && writer.has_frames() =>
            {
                Some(Conn { reader, writer })
            }
            _ => None,
        }
    }
}

/// How long a pair may stand still once one of its ends has finished.
pub struct Linger {
    pub limit: Duration,
    /// The other program, if it keeps to the same limit. Each then looks after its own end, as it cannot
    /// see the other one: a reader there may still have megabytes to take.
    pub shared_with: Option<Weak<dyn Elsewhere>>,
}

/// A session, through which the other program is told of visits that both carry.
pub trait Elsewhere: Send + Sync {
    /// Hands a line to the thread that writes to the other program. False if the session has ended, or too
    /// many lines wait.
    fn tell(&self, line: Line) -> bool;
}

impl Linger {
    /// This program lets a visit stand still for `own`, and the other one for `theirs`, if it has told.
    pub fn new(own: Duration, theirs: Option<Duration>, session: Weak<dyn Elsewhere>) -> Self {
        Self {
            limit: theirs.map_or(own, |theirs| theirs.max(SWEEP).min(own)),
            shared_with: theirs.map(|_| session),
        }
    }
}

/// Two joined sockets, closed when the last thread lets go of them.
pub struct Pair {
    pub visitor_side: Side,
    pub service_side: Side,
    pub linger: Linger,
    /// A write that waits comes back this often at the least, to count what was written. The system is
    /// asked of the rest, and the other program told, as often.
    pub write_limit: Duration,
    pub started: Instant,
    /// Up and down: the direction reads from the other program just now, or writes to it.
    pub waits_for_program: [AtomicBool; 2],
    pub progress: Mutex<Progress>,
    /// Behind the sockets: its slot is free, and the pair forgotten, when they are closed.
    pub visitor: Visitor,
    pub joined: Joined,
}

/// A pair's place among all that are joined.
pub struct Joined {
    pub key: u64,
    pub service: Service,
    /// Bytes up and down.
    pub moved: Arc<[AtomicU64; 2]>,
    pub pairs: Arc<Pairs>,
}

#[derive(Default)]
pub struct Progress {
    /// The direction that has ended well first, its end passed on; the other one is the last.
    half_closed: Option<Way>,
    /// Set while the sweep watches whether anything moves.
    still: Option<Still>,
    /// The first failure of a direction. The abort follows once the other direction has handed on what it
    /// has.
    pub failed: Option<Aborted>,
    /// The last sweep saw a reason to abort; if the next one sees one too, it aborts.
    pub doomed: bool,
    /// The other program is being told that nothing is left of the pair.
    pub done: bool,
    /// How many directions have ended, well or not.
    pub ended: u32,
    /// Why the pair was aborted.
    pub aborted: Option<Aborted>,
    /// The tunnel's half of the direction that has ended first.
    pub half: Option<TunnelHalf>,
}

/// What the sweep remembers of a pair of which one direction has ended, here or at the other program.
struct Still {
    ended: Way,
    /// How many bytes had moved here at the last look.
    moved: u64,
    /// When something has moved last, here or at the other program, or that one has last been relied on.
    since: Instant,
    /// How many of those that were written to this program's own end had not arrived there when the system
    /// was last asked, and when that was.
    not_arrived: Option<u32>,
    asked: Instant,
    /// How often the system was asked.
    times: u32,
    /// Something has moved since the other program was told last.
    has_news: bool,
    /// Whether the other program could ever be told that one end has finished. None before the first
    /// attempt.
    told: Option<bool>,
}

impl Still {
    fn behind(ended: Way) -> Self {
        let now = Instant::now();
        Self {
            ended,
            moved: 0,
            since: now,
            not_arrived: None,
            asked: now,
            times: 0,
            has_news: false,
            told: None,
        }
    }

    /// Has this program's own end taken more since the system was last asked? It may be slow, and have been
    /// written to long ago.
    fn ask(&mut self, own_end: &Side) -> bool {
        let before = self.not_arrived;
        if before != Some(0) {
            self.not_arrived = own_end.not_arrived().or(before);
        }
        before.is_some() && before != self.not_arrived
    }
}

impl Pair {
    /// Where a direction comes from, and where it goes to.
    pub fn sides(&self, way: Way) -> (&Side, &Side) {
        match way {
            Way::Up => (&self.visitor_side, &self.service_side),
            Way::Down => (&self.service_side, &self.visitor_side),
        }
    }

    /// Does a write of this direction, and notes meanwhile whom the direction waits for.
    pub fn write<T>(&self, way: Way, write: impl FnOnce() -> T) -> T {
        let (from, to) = self.sides(way);
        let waits_for_program = &self.waits_for_program[way as usize];
        waits_for_program.store(to.peer.is_program(), Ordering::Relaxed);
        let result = write();
        waits_for_program.store(from.peer.is_program(), Ordering::Relaxed);
        result
    }

    /// Is this end of input one? The kernel reports a reset once. If the other direction, writing to
    /// the same socket, was told, then this one has read an end that is none, unless the end came in a
    /// frame.
    pub fn check_end(&self, way: Way, in_frame: bool) -> Result<(), Aborted> {
        let (from, _) = self.sides(way);
        let progress = self.progress.lock();
        if let Some(why) = progress.aborted.as_ref().or(progress.failed.as_ref()) {
            return Err(why.clone());
        }
        match !in_frame && progress.half_closed.is_none() && from.was_reset() {
            true => Err(Aborted::Reset(from.peer)),
            false => Ok(()),
        }
    }

    /// Is the end of a direction to this side the last thing of the pair? Then nothing aborts the pair
    /// any more but a failure to write that end. Only a client tells its server so: the server may have
    /// written all there is long before the client has passed it on.
    pub fn is_done(&self, to: &Side) -> bool {
        let mut progress = self.progress.lock();
        let well = progress.failed.is_none() && progress.aborted.is_none();
        progress.done = to.peer == Peer::Server && progress.ended == 1 && well;
        progress.done
    }

    /// Notes that a direction has ended well. True if the far side is to be told now: after the
    /// direction that ends last, both sockets are closed, which says the same and wakes nobody.
    pub fn half_close(&self, way: Way) -> bool {
        let mut progress = self.progress.lock();
        let first = progress.half_closed.is_none() && progress.failed.is_none();
        if first {
            progress.half_closed = Some(way);
            progress.still = Some(Still::behind(way));
        }
        first
    }

    /// Is the pair still worth waiting for? A thread that waits for room on one side does not notice
    /// that the other was reset, and one that has finished notices nothing.
    pub fn check(&self) {
        let mut progress = self.progress.lock();
        if progress.done {
            return;
        }
        if let Some(why) = self.why_doomed(&progress) {
            // Not at first sight: a direction may still have something to hand on.
            if std::mem::replace(&mut progress.doomed, true) {
                drop(progress);
                self.abort(why);
            }
            return;
        }
        let is_half_closed = progress.half_closed.is_some();
        let Some(still) = &mut progress.still else {
            return;
        };
        if self.has_moved(still, is_half_closed) {
            still.since = Instant::now();
        }
        let limit = self.linger.limit;
        // What moves is seen that much later at the worst.
        if still.since.elapsed() >= limit.saturating_add(self.write_limit) {
            let (finished, _) = self.sides(still.ended);
            let why = Aborted::StoodStill(limit, finished.peer);
            drop(progress);
            self.abort(why);
        }
    }

    /// Has a byte moved since the last look, or is it the other program that looks after that?
    fn has_moved(&self, still: &mut Still, is_half_closed: bool) -> bool {
        let (finished, other) = self.sides(still.ended);
        // The other program's end has finished.
        let far_finished = finished.peer.is_program();
        let moved = self.joined.moved().iter().sum();
        let mut has_moved = still.moved != moved;
        if has_moved {
            still.moved = moved;
            still.not_arrived = None;
        }
        // At each look in the end: the other program is told in time of what moves in time.
        let asks =
            still.asked.elapsed() >= self.write_limit || still.since.elapsed() >= self.linger.limit;
        if asks {
            still.asked = Instant::now();
            still.times = still.times.saturating_add(1);
            has_moved |= still.ask(if far_finished { other } else { finished });
        }
        still.has_news |= has_moved;
        // A program that has not joined the visitor yet forgets the line: it is repeated, ever more rarely.
        let repeats = !far_finished && still.times.is_power_of_two();
        if asks && (still.has_news || repeats) {
            self.tell(still);
        }
        let waits = |way: usize| self.waits_for_program[way].load(Ordering::Relaxed);
        let (ended, last) = (still.ended as usize, 1 - still.ended as usize);
        let is_shared = self.linger.shared_with.is_some() && still.told != Some(false);
        // A write to the other program takes as long as that one's own end does, and a read from it as long
        // as that end is silent. A direction that has ended as far as only the other program knows, and
        // still reads, is about to come to its end.
        let is_elsewhere =
            waits(last) && (far_finished || is_shared) || waits(ended) && !is_half_closed;
        has_moved || is_elsewhere
    }

    /// Tells the other program that one end has finished, and whether something has moved here lately.
    fn tell(&self, still: &mut Still) {
        let (visit, moved) = (self.visitor.visit, still.has_news);
        let session = self.linger.shared_with.as_ref().and_then(Weak::upgrade);
        let line = visit.map(|visit| Line::Finished { visit, moved });
        let is_told = session.zip(line).is_some_and(|(it, line)| it.tell(line));
        still.has_news &= !is_told;
        still.told = Some(is_told || still.told == Some(true));
    }

    /// The other program of this session says that one end of the pair has finished, and whether something
    /// has moved there lately.
    pub fn finished_elsewhere(&self, session: &dyn Elsewhere, moved: bool) {
        let own = self.linger.shared_with.as_ref();
        if own.is_some_and(|own| std::ptr::addr_eq(own.as_ptr(), session)) {
            let ended = match self.visitor_side.peer.is_program() {
                true => Way::Up,
                false => Way::Down,
            };
            let still = &mut self.progress.lock().still;
            let still = still.get_or_insert_with(|| Still::behind(ended));
            if moved {
                still.since = Instant::now();
            }
        }
    }

    pub fn why_doomed(&self, progress: &Progress) -> Option<Aborted> {
        if progress.failed.is_some() {
            return progress.failed.clone();
        }
        let sides = match &progress.half_closed {
            // The last direction notices what becomes of the other side.
            Some(ended) => [self.sides(*ended).0; 2],
            None => [&self.visitor_side, &self.service_side],
        };
        let reset = sides.into_iter().find(|side| side.was_reset());
        reset.map(|side| Aborted::Reset(side.peer))
    }

    /// Notes what a direction has failed of. True if the other one has ended already.
    pub fn is_last(&self, why: &Aborted) -> bool {
        let mut progress = self.progress.lock();
        progress.failed.get_or_insert_with(|| why.clone());
        progress.ended > 0
    }

    /// Takes note of the end of a direction, and aborts the pair if one of them has failed. Whom a
    /// direction cannot write to may have sent something before, such as a refusal of what is being
    /// uploaded: the other direction hands that on, and aborts the pair when it has.
    ///
    /// `half` is the direction's half of the tunnel. Returns the tunnel, if this was the last direction
    /// and the tunnel can serve another visitor.
    pub fn ended(
        &self,
        way: Way,
        outcome: Result<(), Failure>,
        half: Option<TunnelHalf>,
    ) -> Option<Conn> {
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
            progress.half = half;
            return None;
        }
        self.report(progress.aborted.as_ref());
        if progress.aborted.is_some() {
            return None;
        }
        let other = progress.half.take();
        drop(progress);
        let tunnel = other.zip(half).and_then(|(other, half)| half.rejoin(other));
        for side in [&self.visitor_side, &self.service_side] {
            if tunnel.is_none() || !side.peer.is_program() {
                net::reset_on_close(&side.socket, false);
            }
        }
        tunnel
    }

    /// Aborts both sockets; both directions end at once.
    pub fn abort(&self, why: Aborted) {
        let mut progress = self.progress.lock();
        if progress.aborted.is_none() && progress.ended < 2 {
            progress.aborted = Some(why.clone());
            progress.failed.get_or_insert(why);
            net::abort(&self.visitor_side.socket);
            net::abort(&self.service_side.socket);
        }
    }

    pub fn report(&self, aborted: Option<&Aborted>) {
        let visit = Visit {
            moved: self.joined.moved(),
            time: self.started.elapsed(),
            aborted,
        };
        (self.joined.pairs.told)(&self.visitor, visit);
    }
}

/// What a pair keeps of an [`End`].
pub struct Side {
    pub peer: Peer,
    pub socket: Arc<TcpStream>,
}

impl Side {
    /// A connection that was reset has no peer any more. One whose peer has finished still has it,
    /// as long as this side has not.
    pub fn was_reset(&self) -> bool {
        self.socket.peer_addr().is_err()
    }

    /// How many of the bytes that were written to this side have not arrived yet. None if the system does
    /// not tell.
    fn not_arrived(&self) -> Option<u32> {
        #[cfg(target_os = "linux")]
        return sock_diag::not_arrived(&self.socket);
        #[cfg(not(target_os = "linux"))]
        return None;
    }

    pub fn reading_failed(&self, error: io::Error) -> Failure {
        Failure::reading(self.failed(error, Aborted::Reading))
    }

    pub fn writing_failed(&self, error: io::Error) -> Failure {
        let why = self.failed(error, Aborted::Writing);
        Failure { why, writing: true }
    }

    fn failed(&self, error: io::Error, why: fn(Peer, Arc<io::Error>) -> Aborted) -> Aborted {
        match error.kind() {
            io::ErrorKind::ConnectionReset => Aborted::Reset(self.peer),
            _ => why(self.peer, Arc::new(error)),
        }
    }
}

impl Joined {
    pub fn moved(&self) -> [u64; 2] {
        loaded(&self.moved)
    }
}

pub fn loaded(moved: &[AtomicU64; 2]) -> [u64; 2] {
    moved.each_ref().map(|it| it.load(Ordering::Relaxed))
}

impl Drop for Joined {
    fn drop(&mut self) {
        let mut state = self.pairs.state.lock();
        state.joined.remove(&self.key);
        let ([up, down], (_, total)) = (self.moved(), state.total_of(&self.service));
        total[0] += up;
        total[1] += down;
        drop(state);
        self.pairs.changed.notify_all();
    }
}
