//! When the control port is dialled again.

use std::time::{Duration, Instant};

/// Between two dials of the control port, at first.
const FIRST_PAUSE: Duration = Duration::from_millis(200);

/// And after many failures. A visitor of a server that has come back waits 5 s for a tunnel: the client is
/// back before that.
const LONGEST_PAUSE: Duration = Duration::from_secs(4);

/// When the control port is dialled again: the first time soon, later less and less often, until there
/// was a session that was of use.
pub struct Backoff {
    longest: Duration,
    /// When the last dial began, or the last session ended.
    since: Instant,
}

impl Backoff {
    /// From now on, the first pause is the shortest again.
    pub fn new(now: Instant) -> Self {
        Self {
            longest: FIRST_PAUSE,
            since: now,
        }
    }

    /// The pause from now on, with a random fraction from 0 to 1: clients that lost their server in
    /// the same moment must not come back in the same. Dials begin in a steady rhythm, however long
    /// they take to fail.
    pub fn next(&mut self, now: Instant, fraction: f64) -> Duration {
        let pause = self.longest.mul_f64(0.5 + 0.5 * fraction);
        self.longest = (self.longest * 2).min(LONGEST_PAUSE);
        let left = (self.since + pause).saturating_duration_since(now);
        let left = left.max(FIRST_PAUSE / 2);
        self.since = now + left;
        left
    }
}

/// From 0 to 1.
pub fn random_fraction() -> f64 {
    getrandom::u32().map_or(0.5, |number| f64::from(number) / f64::from(u32::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sixty seconds without a server, in no time.
    #[test]
    fn a_server_that_is_away_is_dialled_with_restraint() {
        for (took, fraction) in [(0, 0.0), (0, 0.5), (0, 1.0), (5, 0.0), (5, 1.0)] {
            let took = Duration::from_secs(took);
            let start = Instant::now();
            let (mut backoff, mut now, mut dials) = (Backoff::new(start), start, 0);
            while now < start + Duration::from_secs(60) {
                dials += 1;
                let apart = took + backoff.next(now + took, fraction);
                let at_most = took.max(LONGEST_PAUSE) + FIRST_PAUSE;
                assert!(apart <= at_most, "{apart:?}");
                now += apart;
            }
            assert!((10..=40).contains(&dials), "{dials} dials");
        }
        let now = Instant::now();
        let [early, late] = [0.1, 0.9].map(|fraction| Backoff::new(now).next(now, fraction));
        assert!(early < late, "no jitter");
    }
}
