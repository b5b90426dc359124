//! The memory of handshakes that began with the key. What was recorded of one begins with the key
//! for ever, and would be treated like a client again and again.

use std::collections::HashSet;

use parking_lot::Mutex;

/// At least so many openings are remembered, and at most twice as many: minutes of a busy client's
/// tunnels, in 1.2 MB at the most.
const REMEMBERED: usize = 32 * 1024;

/// The first bytes of an opening. They begin its public key, which is random: two of them are equal by
/// chance once in 10^14 times.
pub type OpeningId = [u8; 8];

/// The openings that have been here. Only those that were made with the key may be remembered, so
/// that no stranger can fill the memory with others.
pub struct Openings {
    /// A younger and an older half: once the younger one is full, the older one is forgotten.
    halves: Mutex<[HashSet<OpeningId>; 2]>,
}

impl Openings {
    /// Remembers nothing yet.
    pub fn new() -> Self {
        Self {
            halves: Mutex::default(),
        }
    }

    /// True if an opening has been here before: so a flood of them costs no cryptography.
    pub fn knows(&self, id: OpeningId) -> bool {
        let halves = self.halves.lock();
        halves.iter().any(|half| half.contains(&id))
    }

    /// Remembers an opening; false if it has been here before.
    pub fn remember(&self, id: OpeningId) -> bool {
        let [younger, older] = &mut *self.halves.lock();
        if older.contains(&id) || !younger.insert(id) {
            return false;
        }
        if younger.len() >= REMEMBERED {
            *older = std::mem::take(younger);
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_latest_openings_are_known_again() {
        let openings = Openings::new();
        let numbers = |count: usize| (0..count as u64).map(u64::to_ne_bytes);
        assert!(numbers(2 * REMEMBERED - 1).all(|it| openings.remember(it)));
        assert!(numbers(2 * REMEMBERED - 1).all(|it| !openings.remember(it)));
        // One more, and the oldest ones are forgotten.
        assert!(openings.remember(u64::MAX.to_ne_bytes()));
        assert!(openings.remember(0_u64.to_ne_bytes()));
        assert!(!openings.remember(u64::MAX.to_ne_bytes()));
        let held = openings
            .halves
            .lock()
            .iter()
            .map(HashSet::len)
            .sum::<usize>();
        assert!(held <= 2 * REMEMBERED);
    }
}
