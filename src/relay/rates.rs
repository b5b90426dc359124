//! How fast pairs are, by what they had moved at a few moments of the last seconds.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use crate::status::snapshot::UpDown;

/// The time that a rate is about. It is at most one [`STEP`] longer.
const WINDOW: Duration = Duration::from_secs(10);

/// The time between two looks. Those of 4,000 visitors take 1 MB.
const STEP: Duration = Duration::from_secs(2);

/// A pair that is younger has the rate of one that is this old.
const YOUNGEST: Duration = Duration::from_secs(1);

/// What pairs had moved at some moments, the oldest first.
#[derive(Default)]
pub struct Rates(VecDeque<(Instant, HashMap<u64, UpDown>)>);

impl Rates {
    /// Takes note of what each pair has moved, if it is time for that.
    pub fn sample(&mut self, now: Instant, pairs: impl Iterator<Item = (u64, UpDown)>) {
        let since = |at: Instant| now.saturating_duration_since(at);
        if self.0.back().is_some_and(|(at, _)| since(*at) < STEP) {
            return;
        }
        while self.0.get(1).is_some_and(|(at, _)| since(*at) >= WINDOW) {
            self.0.pop_front();
        }
        self.0.push_back((now, pairs.collect()));
    }

    /// Returns the bytes a second of a pair that was joined at a time and has moved so much until now.
    pub fn rate(&self, now: Instant, key: u64, joined: Instant, moved: UpDown) -> UpDown {
        // What is younger than the window has moved all in it.
        let is_young = now.saturating_duration_since(joined) < WINDOW;
        let oldest = self.0.front().filter(|_| !is_young);
        let before = oldest.and_then(|(at, all)| Some((*at, *all.get(&key)?)));
        let (since, [up, down]) = before.unwrap_or((joined, [0; 2]));
        let time = now.saturating_duration_since(since).max(YOUNGEST);
        let rate = |bytes: u64| (bytes as f64 / time.as_secs_f64()) as u64;
        [
            rate(moved[0].saturating_sub(up)),
            rate(moved[1].saturating_sub(down)),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_that_of_the_last_seconds() {
        let (mut rates, start) = (Rates::default(), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        // Before there is a sample, and for the first second.
        assert_eq!(rates.rate(at(4), 1, start, [400, 0]), [100, 0]);
        assert_eq!(rates.rate(start, 1, start, [400, 0]), [400, 0]);
        for second in 0..40 {
            let moved = if second < 20 { second * 100 } else { 2_000 };
            rates.sample(at(second), [(1, [0, moved])].into_iter());
            assert!(rates.0.len() <= 7, "{}", rates.0.len());
            if (10..20).contains(&second) {
                assert_eq!(rates.rate(at(second), 1, start, [0, moved]), [0, 100]);
            }
        }
        assert_eq!(rates.rate(at(40), 1, start, [0, 2_000]), [0, 0]);
        // One that came later, and had moved all before it was looked at.
        rates.sample(at(40), [(1, [0, 2_000]), (2, [10, 20])].into_iter());
        assert_eq!(rates.rate(at(40), 2, at(38), [10, 20]), [5, 10]);
    }
}
