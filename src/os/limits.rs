//! How many visitors there are at a time, and how many the process has descriptors for.

use std::sync::Arc;

use parking_lot::{Condvar, Mutex};

use crate::wire::line::MAX_POOL;

/// Connections of one port that have not proved themselves yet.
pub const MAX_UNPROVED: usize = 64;

/// Threads of such connections, with those that were sent away and whose threads have not noticed
/// yet: a flood must not wait for each of them in turn.
pub const MAX_THREADS: usize = MAX_UNPROVED + MAX_UNPROVED / 8;

/// Visitors whose proxy has not said yet where they come from, or half of all visitors if that is less:
/// more than a proxy takes in before it says something to each.
pub const MAX_HEADERLESS: usize = 1024;

/// What a program needs besides its visitors, ports and peers: strangers at two ports, a status page
/// with 8 connections, each of which looks at `/proc`, and a few for the system.
const OTHER_DESCRIPTORS: usize = 2 * MAX_THREADS + 40;

/// Directions of a server's or a client's visitors that may move their bulk through a pipe at a
/// time, two descriptors each. With 1 MiB a pipe, an ordinary user gets as many
/// (`fs.pipe-user-pages-soft`).
const MAX_PIPES: usize = 64;

/// How many visitors the process has descriptors for, two each, besides these ports, and a control link
/// and a full pool with each of these peers; half of all are for visitors and their pipes in any case.
/// More must not be accepted: they would leave none for the tunnels that they wait for.
pub fn affordable_visitors(ports: usize, peers: usize) -> usize {
    let descriptors = descriptors();
    let pools = (1 + MAX_POOL).saturating_mul(peers);
    let others = pools.saturating_add(OTHER_DESCRIPTORS + 2 * ports);
    (descriptors - others.min(descriptors / 2)) / 2 - affordable_pipes()
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

    /// Returns how many places are free.
    pub fn free(&self) -> usize {
        self.state.lock().free
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    #[test]
    fn ports_and_peers_leave_fewer_descriptors_for_visitors() {
        let alone = affordable_visitors(3, 1);
        assert!(affordable_visitors(66, 1) < alone);
        assert!(affordable_visitors(3, 2) < alone);
        assert!(affordable_visitors(66, 64) > 0);
    }

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
}
