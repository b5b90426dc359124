//! The list that decides which visitor gets which tunnel. It knows no socket, clock or lock.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// A visitor, and the tunnel for it.
#[derive(Debug, PartialEq, Eq)]
pub struct ConnMatch<A, T> {
    /// The visitor's connection.
    pub accept: A,
    /// When the visitor came.
    pub accept_add_time: Instant,
    /// None as long as the visitor waits.
    pub tunnel: Option<T>,
}

/// The visitors who are not joined yet, ordered by arrival, and the idle tunnels.
///
/// As those who came first are served first, complete matches stand before all that wait, and there
/// are idle tunnels only while nobody waits.
#[derive(Debug)]
pub struct ConnList<A, T> {
    matches: VecDeque<ConnMatch<A, T>>,
    /// Each with the time since when. The newest stands last and is taken first: it is the least likely
    /// to have died, and those that nobody needs stay unused.
    idle: VecDeque<(T, Instant)>,
}

/// What became of a new tunnel.
#[derive(Debug, PartialEq, Eq)]
pub enum Placed<T> {
    /// The oldest waiting visitor got it: a match is complete.
    Matched,
    /// Nobody waits: the tunnel is idle.
    Idle,
    /// Nobody waits and the pool is full: this tunnel, the oldest idle one, is to be closed.
    Superfluous(T),
}

impl<A, T> ConnList<A, T> {
    /// An empty list.
    pub fn new() -> Self {
        Self {
            matches: VecDeque::new(),
            idle: VecDeque::new(),
        }
    }

    /// Adds a visitor, with the newest idle tunnel if there is one. Returns true if the match is
    /// complete, and false if the visitor waits for a tunnel.
    pub fn add_accept(&mut self, accept: A, accept_add_time: Instant) -> bool {
        let end = self.matches.len();
        self.insert(end, accept, accept_add_time)
    }

    /// Puts back a visitor whose tunnel was dead, before all that wait, as this visitor has waited
    /// longest. Returns the same as [`add_accept`](Self::add_accept).
    pub fn put_back(&mut self, accept: A, accept_add_time: Instant) -> bool {
        let turn = self.complete();
        self.insert(turn, accept, accept_add_time)
    }

    fn insert(&mut self, place: usize, accept: A, accept_add_time: Instant) -> bool {
        let tunnel = self.idle.pop_back().map(|(tunnel, _)| tunnel);
        let complete = tunnel.is_some();
        let conn_match = ConnMatch {
            accept,
            accept_add_time,
            tunnel,
        };
        self.matches.insert(place, conn_match);
        complete
    }

    /// Gives a tunnel to the visitor who has waited longest, or else keeps it idle from `now` on, as
    /// one of at most `most`.
    pub fn add_tunnel(&mut self, tunnel: T, now: Instant, most: usize) -> Placed<T> {
        let oldest = self.complete();
        if let Some(waiting) = self.matches.get_mut(oldest) {
            waiting.tunnel = Some(tunnel);
            return Placed::Matched;
        }
        self.idle.push_back((tunnel, now));
        if self.idle.len() <= most {
            return Placed::Idle;
        }
        match self.idle.pop_front() {
            Some((oldest, _)) => Placed::Superfluous(oldest),
            None => Placed::Idle,
        }
    }

    /// Takes out the oldest complete match: the visitor, when it came, and its tunnel.
    pub fn take_match(&mut self) -> Option<(A, Instant, T)> {
        let tunnel = self.matches.front_mut()?.tunnel.take()?;
        let matched = self.matches.pop_front()?;
        Some((matched.accept, matched.accept_add_time, tunnel))
    }

    /// Takes out the visitors who have waited for `timeout` or longer.
    pub fn take_expired(&mut self, now: Instant, timeout: Duration) -> Vec<A> {
        let from = self.complete();
        let count = self.waiting_since(now, timeout);
        self.matches
            .drain(from..from + count)
            .map(|expired| expired.accept)
            .collect()
    }

    /// Returns how many visitors have waited for `time` or longer.
    pub fn waiting_since(&self, now: Instant, time: Duration) -> usize {
        self.matches
            .range(self.complete()..)
            .take_while(|waiting| now.saturating_duration_since(waiting.accept_add_time) >= time)
            .count()
    }

    /// Returns when the visitor came who has waited longest.
    pub fn oldest_waiting(&self) -> Option<Instant> {
        let oldest = self.matches.get(self.complete())?;
        Some(oldest.accept_add_time)
    }

    /// Returns how many visitors wait for a tunnel.
    pub fn waiting(&self) -> usize {
        self.matches.len() - self.complete()
    }

    /// Returns how many idle tunnels there are.
    pub fn idle(&self) -> usize {
        self.idle.len()
    }

    /// Takes out those idle tunnels beyond `pool` that nobody has needed for `time` or longer.
    pub fn take_unused(&mut self, now: Instant, pool: usize, time: Duration) -> Vec<T> {
        let beyond = self.idle.len().saturating_sub(pool);
        let unused = |(_, since): &&(T, Instant)| now.saturating_duration_since(*since) >= time;
        let count = self.idle.iter().take(beyond).take_while(unused).count();
        self.idle.drain(..count).map(|(tunnel, _)| tunnel).collect()
    }

    /// Takes out every idle tunnel, as their session has ended.
    pub fn take_idle(&mut self) -> Vec<T> {
        self.idle.drain(..).map(|(tunnel, _)| tunnel).collect()
    }

    /// Takes out everything, as the server stops.
    pub fn clear(&mut self) -> (VecDeque<ConnMatch<A, T>>, Vec<T>) {
        (std::mem::take(&mut self.matches), self.take_idle())
    }

    /// Counts the complete matches, which stand first. They are few, as the matcher takes them at
    /// once.
    fn complete(&self) -> usize {
        self.matches
            .iter()
            .take_while(|conn_match| conn_match.tunnel.is_some())
            .count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIMEOUT: Duration = Duration::from_secs(5);

    fn list() -> ConnList<&'static str, u32> {
        ConnList::new()
    }

    fn served(list: &mut ConnList<&'static str, u32>) -> Vec<(&'static str, u32)> {
        let taken = std::iter::from_fn(|| list.take_match());
        taken
            .map(|(visitor, _, tunnel)| (visitor, tunnel))
            .collect()
    }

    #[test]
    fn first_come_first_served() {
        let (mut list, now) = (list(), Instant::now());
        for visitor in ["a", "b", "c"] {
            assert!(!list.add_accept(visitor, now));
        }
        assert_eq!(list.waiting(), 3);
        assert_eq!(list.add_tunnel(1, now, 0), Placed::Matched);
        assert_eq!(list.add_tunnel(2, now, 0), Placed::Matched);
        assert_eq!(list.waiting(), 1);
        assert_eq!(served(&mut list), [("a", 1), ("b", 2)]);
        assert_eq!(list.add_tunnel(3, now, 0), Placed::Matched);
        assert_eq!(served(&mut list), [("c", 3)]);
        assert_eq!(served(&mut list), []);
    }

    #[test]
    fn the_newest_idle_tunnel_is_taken() {
        let (mut list, now) = (list(), Instant::now());
        for tunnel in 1..=2 {
            assert_eq!(list.add_tunnel(tunnel, now, 8), Placed::Idle);
        }
        assert!(list.add_accept("a", now));
        assert!(list.add_accept("b", now));
        assert!(!list.add_accept("c", now));
        assert_eq!(served(&mut list), [("a", 2), ("b", 1)]);
        assert_eq!(list.waiting(), 1);
    }

    #[test]
    fn superfluous_tunnels_push_the_oldest_out() {
        let (mut list, now) = (list(), Instant::now());
        assert_eq!(list.add_tunnel(1, now, 0), Placed::Superfluous(1));
        assert_eq!(list.add_tunnel(1, now, 2), Placed::Idle);
        assert_eq!(list.add_tunnel(2, now, 2), Placed::Idle);
        assert_eq!(list.add_tunnel(3, now, 2), Placed::Superfluous(1));
        assert_eq!(list.take_idle(), [2, 3]);
        assert!(list.take_idle().is_empty());
    }

    #[test]
    fn what_was_unused_for_longest_goes_first_and_never_the_pool() {
        let (mut list, now) = (list(), Instant::now());
        let second = Duration::from_secs(1);
        for tunnel in 1..=4 {
            list.add_tunnel(tunnel, now + tunnel * second, 9);
        }
        assert_eq!(list.take_unused(now + TIMEOUT, 2, TIMEOUT), []);
        assert_eq!(list.take_unused(now + TIMEOUT + second, 2, TIMEOUT), [1]);
        for visitor in ["a", "b"] {
            assert!(list.add_accept(visitor, now));
        }
        assert_eq!(served(&mut list), [("a", 4), ("b", 3)]);
        for tunnel in [3, 4] {
            list.add_tunnel(tunnel, now + 2 * TIMEOUT, 9);
        }
        assert_eq!(list.take_unused(now + 3 * TIMEOUT, 2, TIMEOUT), [2]);
        assert_eq!(list.take_unused(now + 9 * TIMEOUT, 2, TIMEOUT), []);
        assert_eq!(list.take_unused(now + 9 * TIMEOUT, 0, TIMEOUT), [3, 4]);
    }

    #[test]
    fn visitors_expire_at_the_exact_instant() {
        let (mut list, now) = (list(), Instant::now());
        let nanosecond = Duration::from_nanos(1);
        assert_eq!(list.oldest_waiting(), None);
        list.add_accept("a", now);
        list.add_accept("b", now + nanosecond);
        assert_eq!(list.oldest_waiting(), Some(now));
        assert!(
            list.take_expired(now + TIMEOUT - nanosecond, TIMEOUT)
                .is_empty()
        );
        assert_eq!(list.take_expired(now + TIMEOUT, TIMEOUT), ["a"]);
        assert_eq!(list.oldest_waiting(), Some(now + nanosecond));
        assert_eq!(
            list.take_expired(now + TIMEOUT + nanosecond, TIMEOUT),
            ["b"]
        );
        assert_eq!(list.waiting(), 0);
    }

    #[test]
    fn a_complete_match_does_not_expire() {
        let (mut list, now) = (list(), Instant::now());
        list.add_accept("a", now);
        list.add_accept("b", now);
        list.add_tunnel(1, now, 0);
        assert_eq!(list.take_expired(now + 2 * TIMEOUT, TIMEOUT), ["b"]);
        assert_eq!(served(&mut list), [("a", 1)]);
    }

    #[test]
    fn a_dead_tunnel_costs_a_visitor_neither_its_turn_nor_its_time() {
        let (mut list, now) = (list(), Instant::now());
        let later = now + Duration::from_secs(1);
        list.add_accept("a", now);
        list.add_accept("b", later);
        list.add_tunnel(1, now, 8);
        let (visitor, came, _dead) = list.take_match().unwrap();
        assert!(!list.put_back(visitor, came));
        assert_eq!(list.oldest_waiting(), Some(now));
        list.add_tunnel(2, now, 8);
        assert_eq!(served(&mut list), [("a", 2)]);
        assert_eq!(list.oldest_waiting(), Some(later));
    }

    #[test]
    fn after_a_dead_tunnel_the_next_idle_one_is_taken() {
        let (mut list, now) = (list(), Instant::now());
        list.add_tunnel(1, now, 8);
        list.add_tunnel(2, now, 8);
        list.add_accept("a", now);
        let (visitor, came, dead) = list.take_match().unwrap();
        assert_eq!(dead, 2);
        assert!(list.put_back(visitor, came));
        assert_eq!(served(&mut list), [("a", 1)]);
    }

    /// A visitor whose tunnel has come stands before all that wait, also before one put back.
    #[test]
    fn complete_matches_stand_first() {
        let (mut list, now) = (list(), Instant::now());
        for visitor in ["a", "b", "c"] {
            list.add_accept(visitor, now);
        }
        list.add_tunnel(1, now, 8);
        list.add_tunnel(2, now, 8);
        let (visitor, came, _dead) = list.take_match().unwrap();
        assert!(!list.put_back(visitor, came));
        assert_eq!(served(&mut list), [("b", 2)]);
        list.add_tunnel(3, now, 8);
        list.add_tunnel(4, now, 8);
        assert_eq!(served(&mut list), [("a", 3), ("c", 4)]);
    }
}
