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
    /// It could not be greeted; whoever waits goes on waiting.
    Dead,
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

    /// Adds a visitor, with the newest idle tunnel that takes it: `greet` tells a tunnel whose it is
    /// now, and is false for one that is dead, which is dropped. True if that made a match complete;
    /// otherwise the visitor waits for a tunnel.
    pub fn add_accept(
        &mut self,
        accept: A,
        accept_add_time: Instant,
        mut greet: impl FnMut(&A, &mut T) -> bool,
    ) -> bool {
        let idle = std::iter::from_fn(|| self.idle.pop_back());
        let mut idle = idle.filter_map(|mut idle| greet(&accept, &mut idle).then_some(idle));
        let tunnel = idle.next();
        let complete = tunnel.is_some();
        self.matches.push_back(ConnMatch {
            accept,
            accept_add_time,
            tunnel,
        });
        complete
    }

    /// Gives a tunnel to the visitor that has waited longest, or to the pool of at most `pool`;
    /// `greet` as above.
    pub fn add_tunnel(
        &mut self,
        mut tunnel: T,
        pool: usize,
        greet: impl FnOnce(&A, &mut T) -> bool,
    ) -> Placed<T> {
        let oldest = self.complete();
        if let Some(waiting) = self.matches.get_mut(oldest) {
            if !greet(&waiting.accept, &mut tunnel) {
                return Placed::Dead;
            }
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
    pub fn take_match(&mut self) -> Option<(A, T)> {
        let tunnel = self.matches.front_mut()?.tunnel.take()?;
        let matched = self.matches.pop_front()?;
        Some((matched.accept, tunnel))
    }

    /// Takes out the visitors that have waited for `timeout` or longer.
    pub fn take_expired(&mut self, now: Instant, timeout: Duration) -> Vec<A> {
        let from = self.complete();
        let count = self.waiting_since(now, timeout);
        self.matches
            .drain(from..from + count)
            .map(|expired| expired.accept)
            .collect()
    }

    /// How many visitors have waited for `time` or longer.
    pub fn waiting_since(&self, now: Instant, time: Duration) -> usize {
        self.matches
            .range(self.complete()..)
            .take_while(|waiting| now.saturating_duration_since(waiting.accept_add_time) >= time)
            .count()
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

    /// How many idle tunnels there are.
    pub fn idle(&self) -> usize {
        self.idle.len()
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

    fn alive(_: &&'static str, _: &mut u32) -> bool {
        true
    }

    fn served(list: &mut ConnList<&'static str, u32>) -> Vec<(&'static str, u32)> {
        std::iter::from_fn(|| list.take_match()).collect()
    }

    #[test]
    fn first_come_first_served() {
        let (mut list, now) = (list(), Instant::now());
        for visitor in ["a", "b", "c"] {
            assert!(!list.add_accept(visitor, now, alive));
        }
        assert_eq!(list.waiting(), 3);
        assert_eq!(list.add_tunnel(1, 0, alive), Placed::Matched);
        assert_eq!(list.add_tunnel(2, 0, alive), Placed::Matched);
        assert_eq!(list.waiting(), 1);
        assert_eq!(served(&mut list), [("a", 1), ("b", 2)]);
        assert_eq!(list.add_tunnel(3, 0, alive), Placed::Matched);
        assert_eq!(served(&mut list), [("c", 3)]);
        assert_eq!(served(&mut list), []);
    }

    #[test]
    fn the_newest_healthy_idle_tunnel_is_taken() {
        let (mut list, now) = (list(), Instant::now());
        for tunnel in 1..=4 {
            assert_eq!(list.add_tunnel(tunnel, 8, alive), Placed::Idle);
        }
        assert!(list.add_accept("a", now, |_, tunnel| *tunnel < 3));
        assert_eq!(served(&mut list), [("a", 2)]);
        assert!(list.add_accept("b", now, alive));
        assert!(!list.add_accept("c", now, alive));
        assert_eq!(served(&mut list), [("b", 1)]);
        assert_eq!(list.waiting(), 1);
    }

    #[test]
    fn superfluous_tunnels_push_the_oldest_out() {
        let mut list = list();
        assert_eq!(list.add_tunnel(1, 0, alive), Placed::Superfluous(1));
        assert_eq!(list.add_tunnel(1, 2, alive), Placed::Idle);
        assert_eq!(list.add_tunnel(2, 2, alive), Placed::Idle);
        assert_eq!(list.add_tunnel(3, 2, alive), Placed::Superfluous(1));
        assert_eq!(list.take_idle(), [2, 3]);
        assert_eq!(list.take_idle(), []);
    }

    #[test]
    fn visitors_expire_at_the_exact_instant() {
        let (mut list, now) = (list(), Instant::now());
        let nanosecond = Duration::from_nanos(1);
        assert_eq!(list.oldest_waiting(), None);
        list.add_accept("a", now, alive);
        list.add_accept("b", now + nanosecond, alive);
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
        list.add_accept("a", now, alive);
        list.add_accept("b", now, alive);
        list.add_tunnel(1, 0, alive);
        assert_eq!(list.take_expired(now + 2 * TIMEOUT, TIMEOUT), ["b"]);
        assert_eq!(served(&mut list), [("a", 1)]);
    }

    #[test]
    fn a_dead_tunnel_costs_a_visitor_neither_its_turn_nor_its_time() {
        let (mut list, now) = (list(), Instant::now());
        let later = now + Duration::from_secs(1);
        list.add_accept("a", now, alive);
        list.add_accept("b", later, alive);
        assert_eq!(list.add_tunnel(1, 8, |_, _| false), Placed::Dead);
        assert_eq!(list.oldest_waiting(), Some(now));
        assert_eq!(list.add_tunnel(2, 8, alive), Placed::Matched);
        assert_eq!(served(&mut list), [("a", 2)]);
        assert_eq!(list.oldest_waiting(), Some(later));
    }

    #[test]
    fn each_tunnel_is_told_its_visitor() {
        let (mut list, now) = (list(), Instant::now());
        let mut greeted = Vec::new();
        let mut greet = |visitor: &&'static str, tunnel: &mut u32| {
            greeted.push((*visitor, *tunnel));
            *tunnel != 2
        };
        list.add_accept("a", now, &mut greet);
        list.add_tunnel(1, 8, &mut greet);
        list.add_tunnel(3, 8, &mut greet);
        list.add_tunnel(2, 8, &mut greet);
        list.add_accept("b", now, &mut greet);
        assert_eq!(greeted, [("a", 1), ("b", 2), ("b", 3)]);
        assert_eq!(served(&mut list), [("a", 1), ("b", 3)]);
    }
}
