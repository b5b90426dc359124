//! How far a running server or client has come in its life.

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
    /// No visitor comes any more, but for those in the kernel's backlog. Those that wait for a tunnel
    /// still get one.
    Draining,
    /// Nobody waits any more, and the session ends. Visitors that are joined finish.
    Leaving,
    /// Visitors that are still joined are cut off.
    Done,
}

/// The phase of a server or a client, which its threads look at and wait for.
pub struct Stop {
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    phase: Phase,
    /// When visitors that are still there are cut off, once there was a call to stop.
    end_by: Option<Instant>,
    /// How often something else than the phase has changed.
    notified: u64,
}

impl Stop {
    /// Of a server or a client that serves.
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

    /// How far it has come.
    pub fn phase(&self) -> Phase {
        self.state.lock().phase
    }

    /// True once it has come as far as this.
    pub fn reached(&self, phase: Phase) -> bool {
        self.phase() >= phase
    }

    /// When visitors that are still there are cut off, once there was a call to stop.
    pub fn end_by(&self) -> Option<Instant> {
        self.state.lock().end_by
    }

    /// True once visitors that are still there are to be cut off.
    pub fn time_is_up(&self) -> bool {
        self.end_by().is_some_and(|end_by| end_by <= Instant::now())
    }

    /// Visitors that are there have this long from now on. A second call can only shorten the time.
    pub fn end_after(&self, drain: Duration) {
        let end_by = Instant::now().checked_add(drain);
        let mut state = self.state.lock();
        state.end_by = [state.end_by, end_by].into_iter().flatten().min();
        self.changed.notify_all();
    }

    /// Goes on to this phase; false if it was reached before.
    pub fn advance(&self, phase: Phase) -> bool {
        let mut state = self.state.lock();
        let advances = state.phase < phase;
        if advances {
            state.phase = phase;
            self.changed.notify_all();
        }
        advances
    }

    /// Sleeps for this time, or until this phase is reached: then returns false.
    pub fn sleep(&self, time: Duration, until: Phase) -> bool {
        let mut state = self.state.lock();
        let early = |state: &mut State| state.phase < until;
        let slept = self.changed.wait_while_for(&mut state, early, time);
        slept.timed_out()
    }

    /// Wakes those who [wait](Self::wait_for) for something else than a phase.
    pub fn notify(&self) {
        self.state.lock().notified += 1;
        self.changed.notify_all();
    }

    /// Waits until this is true, and returns whether it has become so in time and before the end.
    pub fn wait_for(&self, time: Duration, is_true: impl Fn() -> bool) -> bool {
        let deadline = Instant::now().checked_add(time);
        loop {
            // The look takes a lock under which others ask for the phase, and so must not be taken
            // under this one. No change between the look and the wait is missed: it is counted.
            let notified = self.state.lock().notified;
            if is_true() {
                return true;
            }
            let mut state = self.state.lock();
            let same =
                |state: &mut State| state.notified == notified && state.phase < Phase::Leaving;
            let late = match deadline {
                Some(at) => self
                    .changed
                    .wait_while_until(&mut state, same, at)
                    .timed_out(),
                None => {
                    self.changed.wait_while(&mut state, same);
                    false
                }
            };
            if late || state.phase >= Phase::Leaving {
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
