//! One direction of a pair: what its copy thread does.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::os::limits::Slot;
use crate::os::net;
#[cfg(target_os = "linux")]
use crate::os::splice::{Pipe, refused};
use crate::relay::Aborted;
use crate::relay::pair::{Failure, Pair, TunnelHalf, Way};
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
pub const BULK: usize = BUFFERS.len() - 1;

/// A direction that pauses for longer gives back all but the first.
const BULK_PAUSE: Duration = Duration::from_secs(1);

/// A direction of a pair.
pub struct Direction {
    pub(super) reader: Reader,
    pub(super) writer: Writer,
    /// For its second buffer, or its third.
    pub(super) room: Option<Slot>,
    /// Behind the sockets: they are closed before the pair is forgotten.
    pub(super) ending: Ending,
}

/// However a direction goes away, the pair is told that it has ended, so that the other direction does
/// not wait for this one for ever.
pub struct Ending {
    pub(super) pair: Arc<Pair>,
    pub(super) way: Way,
    /// None once the pair has been told.
    pub(super) outcome: Option<Result<(), Failure>>,
}

impl Direction {
    /// Copies until the direction ends. Returns the tunnel, if the other direction has ended before,
    /// and both so well that the tunnel can serve another visitor.
    pub fn copy(mut self) -> Option<Conn> {
        self.ending.outcome = Some(Err(Failure::reading(Aborted::Panicked)));
        #[cfg(test)]
        crate::relay::tests::panic_on_purpose(&self.ending.pair.visitor);
        let outcome = self.carry();
        if let Err(failure) = &outcome
            && failure.writing
            && self.ending.pair.is_last(&failure.why)
        {
            self.discard();
        }
        // The other direction may take its time.
        self.reader.release();
        self.writer.release();
        self.room = None;
        self.ending.outcome = None;
        let Ending { pair, way, .. } = &self.ending;
        let (from, _) = pair.sides(*way);
        let (reader, writer) = (
            TunnelHalf::Reader(self.reader),
            TunnelHalf::Writer(self.writer),
        );
        // The other half stays open until the pair has been told.
        let (half, _other) = match from.peer.is_program() {
            true => (reader, writer),
            false => (writer, reader),
        };
        pair.ended(*way, outcome, Some(half))
    }

    fn carry(&mut self) -> Result<(), Failure> {
        let (pair, way) = (self.ending.pair.clone(), self.ending.way);
        let (from, to) = pair.sides(way);
        let reading = |error| from.reading_failed(error);
        let writing = |error| to.writing_failed(error);
        let moved = &pair.joined.moved[way as usize];
        // No memory for a buffer before there is something to put into it: a silent connection
        // costs the stacks of its threads and no more.
        self.reader.wait().map_err(reading)?;
        let (mut level, mut spliced_not) = (0, false);
        loop {
            let (size, before) = (BUFFERS[level], level);
            match self.reader.read_batch(self.writer.batch(size)) {
                Ok(0) => break,
                Ok(count) => {
                    pair.write(way, || self.writer.write_batch(count, moved))
                        .map_err(writing)?;
                    let enough = if level == 0 { size } else { size / 2 };
                    if count >= enough && (level < BULK || self.reader.plain().is_some()) {
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
                self.notice_pauses(level > 0)?;
            }
        }
        if level > 0 {
            self.notice_pauses(false)?;
        }
        // The end frame may have to wait for room like any byte, and so must not be written
        // under the lock; before it is written, the pair is not half-closed.
        pair.check_end(way, self.reader.has_frames())
            .map_err(Failure::reading)?;
        let done = pair.is_done(to);
        pair.write(way, || self.writer.write_end(done))
            .map_err(writing)?;
        if pair.half_close(way) {
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
            room = take(&self.ending.pair);
        }
        // The far side of a plain tunnel may say later that the rest comes without frames.
        if room.is_none() && self.reader.plain().is_some() && !std::mem::replace(spliced_not, true)
        {
            if level == 0 {
                self.notice_pauses(true)?;
            }
            *spliced_not = !self.splice()?;
            if level == 0 {
                self.notice_pauses(false)?;
            }
            if !*spliced_not {
                return Ok(0);
            }
        }
        if level + 1 == BULK {
            room = take(&self.ending.pair);
        }
        Ok(match room {
            None => level,
            room => {
                self.room = room;
                level + 1
            }
        })
    }

    /// From now on a read that waits for longer than a bulk's pause ends, or none does.
    fn notice_pauses(&self, notice: bool) -> Result<(), Failure> {
        let limited = net::limit_pause(self.reader.socket(), notice.then_some(BULK_PAUSE));
        let (from, _) = self.ending.pair.sides(self.ending.way);
        limited.map_err(|error| from.reading_failed(error))
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
        let (pair, way) = (self.ending.pair.clone(), self.ending.way);
        let pipes = &pair.joined.pairs.pipes;
        let Some(mut pipe) = pipes.try_take().and_then(Pipe::open) else {
            return Ok(false);
        };
        let (from, to) = pair.sides(way);
        pair.write(way, || self.writer.write_raw())
            .map_err(|error| to.writing_failed(error))?;
        self.writer.release();
        self.room = None;
        let moved = &pair.joined.moved[way as usize];
        loop {
            let count = match pipe.fill(&input) {
                Ok(count) => count,
                Err(error) if net::paused(&error) => 0,
                Err(error) if refused(&error) => {
                    // And always will be.
                    pipes.close();
                    return Ok(false);
                }
                Err(error) => return Err(from.reading_failed(error)),
            };
            while !pipe.is_empty() {
                match pair.write(way, || pipe.drain(&*output)) {
                    Ok(drained) => _ = moved.fetch_add(drained as u64, Ordering::Relaxed),
                    // No room yet.
                    Err(error) if net::paused(&error) => {}
                    Err(error) => return Err(to.writing_failed(error)),
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

    /// Throws away what still comes, until the far side ends or the [sweep](super::Pairs::sweep) ends the
    /// pair: a far side that is reset at once may lose what the other direction, which has ended, has
    /// sent it last.
    fn discard(&mut self) {
        while let Ok(1..) = self.reader.read_batch(self.writer.batch(BUFFERS[0])) {}
    }
}

impl Drop for Ending {
    /// The direction had no thread, or its thread has panicked.
    fn drop(&mut self) {
        if let Some(outcome) = self.outcome.take() {
            self.pair.ended(self.way, outcome, None);
        }
    }
}
