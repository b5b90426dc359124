//! Which visitor gets which tunnel. Pure data: no sockets, no clock, no lock.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// A visitor, and the tunnel that it got.
#[derive(Debug, PartialEq, Eq)]
pub struct ConnMatch<A, T> {
    /// The visitor's connection.
    pub accept: A,
    /// When the visitor came.
    pub accept_add_time: Instant,
    /// None as long as the visitor waits.
    pub tunnel: Option<T>,
}

/// The visitors that are not joined yet, ordered by arrival, and the tunnels that no visitor needs
/// yet.
///
/// Two facts follow from serving the first come first: matches that are complete stand before all
/// that wait, and there are idle tunnels only while nobody waits.
#[derive(Debug)]
pub struct ConnList<A, T> {
    matches: VecDeque<ConnMatch<A, T>>,
    /// The newest last: it is the least likely to have died.
    idle: VecDeque<T>,
}

/// What became of a new tunnel.
#[derive(Debug, PartialEq, Eq)]
pub enum Placed<T> {
    /// The oldest waiting visitor got it: a match is complete.
    Matched,
    /// Nobody waits: it is idle.
    Idle,
    /// Nobody waits and the pool is full: this tunnel, the oldest, is to be closed.
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

    /// Adds a visitor, with the newest idle tunnel that is `healthy`; unhealthy ones are dropped.
    /// True if that made a match complete; otherwise the visitor waits for a tunnel. One whose
    /// tunnel proved dead is added again with its old time, and keeps its turn.
    pub fn add_accept(
        &mut self,
        accept: A,
        accept_add_time: Instant,
        mut healthy: impl FnMut(&T) -> bool,
    ) -> bool {
        let tunnel = std::iter::from_fn(|| self.idle.pop_back()).find(|idle| healthy(idle));
        let complete = tunnel.is_some();
        let place = self
            .matches
            .partition_point(|it| it.tunnel.is_some() || it.accept_add_time <= accept_add_time);
        let conn_match = ConnMatch {
            accept,
            accept_add_time,
            tunnel,
        };
        self.matches.insert(place, conn_match);
        complete
    }

    /// Gives a tunnel to the visitor that has waited longest, or to the pool of at most `pool`.
    pub fn add_tunnel(&mut self, tunnel: T, pool: usize) -> Placed<T> {
        let oldest = self.complete();
        if let Some(waiting) = self.matches.get_mut(oldest) {
            waiting.tunnel = Some(tunnel);
            return Placed::Matched;
        }
        self.idle.push_back(tunnel);
        if self.idle.len() <= pool {
            return Placed::Idle;
        }
        match self.idle.pop_front() {
            Some(oldest) => Placed::Superfluous(oldest),
            None => Placed::Idle,
        }
    }

    /// Takes the oldest complete match out.
    pub fn take_match(&mut self) -> Option<(A, Instant, T)> {
        let tunnel = self.matches.front_mut()?.tunnel.take()?;
        let matched = self.matches.pop_front()?;
        Some((matched.accept, matched.accept_add_time, tunnel))
    }

    /// Takes out the visitors that have waited for `timeout` or longer.
    pub fn take_expired(&mut self, now: Instant, timeout: Duration) -> Vec<A> {
        let from = self.complete();
        let count = self
            .matches
            .range(from..)
            .take_while(|waiting| now.saturating_duration_since(waiting.accept_add_time) >= timeout)
            .count();
        self.matches
            .drain(from..from + count)
            .map(|expired| expired.accept)
            .collect()
    }

    /// When the visitor that has waited longest came.
    pub fn oldest_waiting(&self) -> Option<Instant> {
        let oldest = self.matches.get(self.complete())?;
        Some(oldest.accept_add_time)
    }

    /// How many visitors wait for a tunnel.
    pub fn waiting(&self) -> usize {
        self.matches.len() - self.complete()
    }

    /// Takes out every idle tunnel: their session has ended.
    pub fn take_idle(&mut self) -> VecDeque<T> {
        std::mem::take(&mut self.idle)
    }

    /// Takes out everything: the server stops.
    pub fn clear(&mut self) -> (VecDeque<ConnMatch<A, T>>, VecDeque<T>) {
        (std::mem::take(&mut self.matches), self.take_idle())
    }

    /// How many matches at the front are complete; few, as the matcher takes them at once.
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
        std::iter::from_fn(|| list.take_match())
            .map(|(accept, _, tunnel)| (accept, tunnel))
            .collect()
    }

    #[test]
    fn first_come_first_served() {
        let (mut list, now) = (list(), Instant::now());
        for visitor in ["a", "b", "c"] {
            assert!(!list.add_accept(visitor, now, |_| true));
        }
        assert_eq!(list.waiting(), 3);
        assert_eq!(list.add_tunnel(1, 0), Placed::Matched);
        assert_eq!(list.add_tunnel(2, 0), Placed::Matched);
        assert_eq!(list.waiting(), 1);
        assert_eq!(served(&mut list), [("a", 1), ("b", 2)]);
        assert_eq!(list.add_tunnel(3, 0), Placed::Matched);
        assert_eq!(served(&mut list), [("c", 3)]);
        assert_eq!(served(&mut list), []);
    }

    #[test]
    fn the_newest_healthy_idle_tunnel_is_taken() {
        let (mut list, now) = (list(), Instant::now());
        for tunnel in 1..=4 {
            assert_eq!(list.add_tunnel(tunnel, 8), Placed::Idle);
        }
        assert!(list.add_accept("a", now, |tunnel| *tunnel < 3));
        assert_eq!(served(&mut list), [("a", 2)]);
        assert!(list.add_accept("b", now, |_| true));
        assert!(!list.add_accept("c", now, |_| true));
        assert_eq!(served(&mut list), [("b", 1)]);
        assert_eq!(list.waiting(), 1);
    }

    #[test]
    fn superfluous_tunnels_push_the_oldest_out() {
        let mut list = list();
        assert_eq!(list.add_tunnel(1, 0), Placed::Superfluous(1));
        assert_eq!(list.add_tunnel(1, 2), Placed::Idle);
        assert_eq!(list.add_tunnel(2, 2), Placed::Idle);
        assert_eq!(list.add_tunnel(3, 2), Placed::Superfluous(1));
        assert_eq!(list.take_idle(), [2, 3]);
        assert_eq!(list.take_idle(), []);
    }

    #[test]
    fn visitors_expire_at_the_exact_instant() {
        let (mut list, now) = (list(), Instant::now());
        let nanosecond = Duration::from_nanos(1);
        assert_eq!(list.oldest_waiting(), None);
        list.add_accept("a", now, |_| true);
        list.add_accept("b", now + nanosecond, |_| true);
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
        list.add_accept("a", now, |_| true);
        list.add_accept("b", now, |_| true);
        list.add_tunnel(1, 0);
        assert_eq!(list.take_expired(now + 2 * TIMEOUT, TIMEOUT), ["b"]);
        assert_eq!(served(&mut list), [("a", 1)]);
    }

    #[test]
    fn a_visitor_that_is_added_again_keeps_its_turn_and_its_time() {
        let (mut list, now) = (list(), Instant::now());
        let later = now + Duration::from_secs(1);
        list.add_accept("a", now, |_| true);
        list.add_accept("b", later, |_| true);
        list.add_accept("c", later, |_| true);
        list.add_tunnel(1, 0);
        let (accept, since, _) = list.take_match().unwrap();
        list.add_tunnel(2, 0);
        assert!(!list.add_accept(accept, since, |_| true));
        list.add_tunnel(3, 0);
        assert_eq!(served(&mut list), [("b", 2), ("a", 3)]);
        assert_eq!(list.oldest_waiting(), Some(later));
    }

    #[test]
    fn a_visitor_that_is_added_again_takes_an_idle_tunnel() {
        let (mut list, now) = (list(), Instant::now());
        list.add_tunnel(1, 8);
        list.add_tunnel(2, 8);
        list.add_tunnel(3, 8);
        assert!(list.add_accept("a", now, |_| true));
        let (accept, since, _) = list.take_match().unwrap();
        assert!(list.add_accept("b", now + TIMEOUT, |_| true));
        assert!(list.add_accept(accept, since, |_| true));
        assert_eq!(served(&mut list), [("b", 2), ("a", 1)]);
        assert!(list.take_expired(now + 3 * TIMEOUT, TIMEOUT).is_empty());
    }
}
