//! The phases in the life of a server or a client, and how its threads wait for them.

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

/// How far a server or a client has come in its life. Phases only ever follow one another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// Visitors are taken.
    Serving,
    /// A server was told to stop. It takes visitors until another server has had a moment to take
    /// over its ports.
    HandingOver,
    /// No visitor comes any more, but for those in the kernel's backlog. Visitors who wait for a
    /// tunnel still get one. A client says bye.
    Draining,
    /// Nobody waits any more, and the session ends. Visitors who are joined finish.
    Leaving,
    /// Visitors who are still joined are cut off.
    Done,
}

/// The phase of a server or a client, which its threads look at and wait for.
pub struct Stop {
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    phase: Phase,
    /// When the visitors who are left are cut off. None before the call to stop, and if they may stay for
    /// ever.
    end_by: Option<Instant>,
    /// The number of calls of [`Stop::notify`].
    notified: u64,
}

impl Stop {
    /// The beginning of a server's or client's life.
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::new(State {
                phase: Phase::Serving,
                end_by: None,
                notified: 0,
            }),
            changed: Condvar::new(),
        })
    }

    /// Returns the phase of now.
    pub fn phase(&self) -> Phase {
        self.state.lock().phase
    }

    /// Returns true from this phase on.
    pub fn reached(&self, phase: Phase) -> bool {
        self.phase() >= phase
    }

    /// Returns when the visitors who are left are cut off, or None if they are not.
    pub fn end_by(&self) -> Option<Instant> {
        self.state.lock().end_by
    }

    /// Returns true once the visitors who are left are to be cut off.
    pub fn time_is_up(&self) -> bool {
        self.end_by().is_some_and(|end_by| end_by <= Instant::now())
    }

    /// Gives the visitors who are there this long from now on. A second call can only shorten the
    /// time.
    pub fn end_after(&self, drain: Duration) {
        let end_by = Instant::now().checked_add(drain);
        let mut state = self.state.lock();
        state.end_by = [state.end_by, end_by].into_iter().flatten().min();
        self.changed.notify_all();
    }

    /// Goes on to this phase. Returns false if it was reached before.
    pub fn advance(&self, phase: Phase) -> bool {
        let mut state = self.state.lock();
        let advances = state.phase < phase;
        if advances {
            state.phase = phase;
            self.changed.notify_all();
        }
        advances
    }

    /// Sleeps for this time, or until this phase, and returns false if it was reached.
    pub fn sleep(&self, time: Duration, until: Phase) -> bool {
        let mut state = self.state.lock();
        let early = |state: &mut State| state.phase < until;
        let slept = self.changed.wait_while_for(&mut state, early, time);
        slept.timed_out()
    }

    /// Has those who [wait](Self::wait_for) look again.
    pub fn notify(&self) {
        self.state.lock().notified += 1;
        self.changed.notify_all();
    }

    /// Waits until `is_true`. Returns false if it was not within this time, or not before
    /// [`Phase::Leaving`].
    pub fn wait_for(&self, time: Duration, is_true: impl Fn() -> bool) -> bool {
        let start = Instant::now();
        loop {
            // `is_true` takes a lock under which other threads ask for the phase: calling it under
            // this lock could make both wait for ever. The count shows a change that comes between.
            let notified = self.state.lock().notified;
            if is_true() {
                return true;
            }
            let mut state = self.state.lock();
            let same =
                |state: &mut State| state.notified == notified && state.phase < Phase::Leaving;
            let left = time.saturating_sub(start.elapsed());
            let waited = self.changed.wait_while_for(&mut state, same, left);
            if waited.timed_out() || state.phase >= Phase::Leaving {
                return false;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crossbeam_channel::bounded;
    use std::thread;

    const DEADLINE: Duration = Duration::from_secs(10);

    /// A server asks for the phase under the same lock under which somebody who waits for a session
    /// looks for one.
    #[test]
    fn the_phase_can_be_asked_for_while_somebody_looks() {
        let (stop, found) = (Stop::new(), Mutex::new(false));
        let ((looks, looking), (tell, told)) = (bounded(1), bounded(1));
        thread::scope(|scope| {
            let mut under_lock = found.lock();
            let waiting = scope.spawn(|| {
                stop.wait_for(DEADLINE, || {
                    let _ = looks.try_send(());
                    *found.lock()
                })
            });
            looking.recv_timeout(DEADLINE).unwrap();
            scope.spawn(|| tell.send(stop.reached(Phase::Leaving)));
            let reached = told.recv_timeout(DEADLINE);
            *under_lock = true;
            drop(under_lock);
            stop.notify();
            assert!(waiting.join().unwrap());
            assert_eq!(reached, Ok(false), "both wait for each other");
        });
    }

    #[test]
    fn who_waits_is_told_of_a_change_and_of_the_end() {
        let (stop, found) = (Stop::new(), Mutex::new(false));
        assert!(!stop.wait_for(Duration::ZERO, || *found.lock()));
        thread::scope(|scope| {
            let waiting = scope.spawn(|| stop.wait_for(Duration::MAX, || *found.lock()));
            *found.lock() = true;
            stop.notify();
            assert!(waiting.join().unwrap());
            let waiting = scope.spawn(|| stop.wait_for(Duration::MAX, || false));
            stop.advance(Phase::Leaving);
            assert!(!waiting.join().unwrap());
        });
    }
}
