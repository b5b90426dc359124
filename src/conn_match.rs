//! The list that decides which visitor gets which tunnel. It knows no socket, clock or lock.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// A visitor, and the tunnel for it.
#[derive(Debug, PartialEq, Eq)]
pub struct ConnMatch<A, T, C> {
    /// The visitor's connection.
    pub accept: A,
    /// Since when the visitor counts as waiting: its arrival, plus the time that it spent waiting for a
    /// client's answer.
    pub accept_add_time: Instant,
    /// The tunnel.
    pub tunnel: T,
    /// The client that has dialled the tunnel.
    pub client: C,
}

/// A client that dials tunnels, as the list sees it.
pub trait Client<A>: Clone + PartialEq {
    /// Returns how this client stands among those that could serve a visitor, which the lowest does:
    /// whether it has just failed, and how many visitors it has. None if it cannot serve this one.
    fn rank(&self, accept: &A) -> Option<(bool, usize)>;

    /// Returns how many idle tunnels it keeps.
    fn pool(&self) -> usize;
}

/// The visitors who are not joined yet, ordered by arrival, and the clients with their idle tunnels.
///
/// As those who came first are served first, a client has idle tunnels only while nobody waits whom it
/// could serve, or all who wait were left to others, as it had just failed when they came.
#[derive(Debug)]
pub struct ConnList<A, T, C> {
    matches: VecDeque<ConnMatch<A, T, C>>,
    /// Each with the time when it came.
    waiting: VecDeque<(A, Instant)>,
    clients: Vec<Live<T, C>>,
}

/// A client in the list.
#[derive(Debug)]
struct Live<T, C> {
    client: C,
    /// Each with the time since when. The newest stands last and is taken first: it is the least likely
    /// to have died, and those that nobody needs stay unused.
    idle: VecDeque<(T, Instant)>,
    /// How many tunnels it was asked for that have not come yet, and may never come.
    asked: usize,
}

/// What became of a visitor.
#[derive(Debug, PartialEq, Eq)]
pub enum Added<C> {
    /// It got an idle tunnel: a match is complete.
    Matched,
    /// It waits, and this client is to dial a tunnel for it. None if no client serves it.
    Waits(Option<C>),
}

/// What became of a tunnel.
#[derive(Debug, PartialEq, Eq)]
pub enum Placed<T> {
    /// The visitor who has waited longest got it: a match is complete.
    Matched,
    /// Nobody waits: the tunnel is idle.
    Idle,
    /// Nobody waits, and there are more idle tunnels than visitors could ever take: this one, the oldest,
    /// is to be closed.
    Superfluous(T),
    /// Its client is not in the list any more.
    Homeless(T),
}

impl<A, T, C: Client<A>> ConnList<A, T, C> {
    /// An empty list.
    pub fn new() -> Self {
        Self {
            matches: VecDeque::new(),
            waiting: VecDeque::new(),
            clients: Vec::new(),
        }
    }

    /// Adds a client. Returns how many visitors wait whom it could serve: as many tunnels are to be
    /// dialled.
    pub fn add_client(&mut self, client: C) -> usize {
        let served = |(accept, _): &&(A, Instant)| client.rank(accept).is_some();
        let asked = self.waiting.iter().filter(served).count();
        self.clients.push(Live {
            client,
            idle: VecDeque::new(),
            asked,
        });
        asked
    }

    /// Takes out a client, as its session has ended, and returns its idle tunnels. None if it was not
    /// in the list any more.
    pub fn take_client(&mut self, client: &C) -> Option<Vec<T>> {
        let place = self.clients.iter().position(|it| it.client == *client)?;
        Some(self.clients.remove(place).into_idle())
    }

    /// Returns the clients, in the order in which they came.
    pub fn clients(&self) -> impl Iterator<Item = &C> {
        self.clients.iter().map(|it| &it.client)
    }

    /// Adds a visitor. Among the clients that serve it, one that has not just failed comes first, then one
    /// with an idle tunnel, then the one with the fewest visitors. The visitor gets that client's newest
    /// idle tunnel, or waits.
    pub fn add_accept(&mut self, accept: A, accept_add_time: Instant) -> Added<C> {
        let end = self.waiting.len();
        self.insert(end, accept, accept_add_time)
    }

    /// Puts back a visitor whose tunnel was of no use, before all who came later.
    pub fn put_back(&mut self, accept: A, accept_add_time: Instant) -> Added<C> {
        let before = |(_, came): &(A, Instant)| *came < accept_add_time;
        let place = self.waiting.partition_point(before);
        self.insert(place, accept, accept_add_time)
    }

    fn insert(&mut self, place: usize, accept: A, accept_add_time: Instant) -> Added<C> {
        if let Some(live) = self.first_in_rank(&accept)
            && let Some((tunnel, _)) = live.idle.pop_back()
        {
            let client = live.client.clone();
            self.complete(accept, accept_add_time, tunnel, client);
            return Added::Matched;
        }
        let asked = self.ask_for(&accept);
        self.waiting.insert(place, (accept, accept_add_time));
        Added::Waits(asked)
    }

    fn complete(&mut self, accept: A, accept_add_time: Instant, tunnel: T, client: C) {
        self.matches.push_back(ConnMatch {
            accept,
            accept_add_time,
            tunnel,
            client,
        });
    }

    /// Finds the client that is to serve a visitor: rather one with an idle tunnel than one that has to
    /// dial. Visitors who are about to be joined count as if they were.
    fn first_in_rank(&mut self, accept: &A) -> Option<&mut Live<T, C>> {
        let matches = &self.matches;
        let rank = |it: &Live<T, C>| {
            let (failed, visitors) = it.client.rank(accept)?;
            let of_it = matches.iter().filter(|other| other.client == it.client);
            let visitors = visitors + it.asked + of_it.count();
            Some((failed, it.idle.is_empty(), visitors))
        };
        let ranked = self.clients.iter_mut();
        let ranked = ranked.filter_map(|it| Some((rank(it)?, it)));
        Some(ranked.min_by_key(|(rank, _)| *rank)?.1)
    }

    /// Returns the client that is to dial a tunnel for this visitor.
    fn ask_for(&mut self, accept: &A) -> Option<C> {
        let live = self.first_in_rank(accept)?;
        live.asked += 1;
        Some(live.client.clone())
    }

    /// Returns the clients that are to dial tunnels for those who have waited for `time` or longer, but
    /// for `most` of them at the most: what they were promised before is lost.
    pub fn ask_again(&mut self, now: Instant, time: Duration, most: usize) -> Vec<C> {
        for live in &mut self.clients {
            live.asked = 0;
        }
        let count = self.waiting_since(now, time).min(most);
        // Out of the list for a moment: a client is chosen by looking at all of the list.
        let waiting = std::mem::take(&mut self.waiting);
        let late = waiting.range(..count);
        let asked = late.filter_map(|(accept, _)| self.ask_for(accept));
        let asked = asked.collect();
        self.waiting = waiting;
        asked
    }

    /// Gives a client's tunnel to the visitor who has waited longest among those whom it is to serve,
    /// or else keeps the tunnel idle from `now` on, as one of at most `most`.
    pub fn add_tunnel(&mut self, client: &C, tunnel: T, now: Instant, most: usize) -> Placed<T> {
        let Some(place) = self.clients.iter().position(|it| it.client == *client) else {
            return Placed::Homeless(tunnel);
        };
        let oldest = self
            .waiting
            .iter()
            .position(|(it, _)| self.is_for(it, client));
        let live = &mut self.clients[place];
        live.asked = live.asked.saturating_sub(1);
        if let Some((accept, came)) = oldest.and_then(|place| self.waiting.remove(place)) {
            let client = live.client.clone();
            self.complete(accept, came, tunnel, client);
            return Placed::Matched;
        }
        live.idle.push_back((tunnel, now));
        if live.idle.len() <= most {
            return Placed::Idle;
        }
        match live.idle.pop_front() {
            Some((oldest, _)) => Placed::Superfluous(oldest),
            None => Placed::Idle,
        }
    }

    /// True if a client could serve a visitor, and has not failed just now where others have not.
    fn is_for(&self, accept: &A, client: &C) -> bool {
        let failed = |client: &C| Some(client.rank(accept)?.0);
        let others_failed = || !self.clients().any(|it| failed(it) == Some(false));
        failed(client).is_some_and(|failed| !failed || others_failed())
    }

    /// Takes out the oldest complete match.
    pub fn take_match(&mut self) -> Option<ConnMatch<A, T, C>> {
        self.matches.pop_front()
    }

    /// Returns the clients that could serve a visitor.
    pub fn who_serves(&self, accept: &A) -> impl Iterator<Item = &C> {
        self.clients()
            .filter(|client| client.rank(accept).is_some())
    }

    /// Takes out the visitors who have waited for `timeout` or longer.
    pub fn take_expired(&mut self, now: Instant, timeout: Duration) -> Vec<A> {
        let count = self.waiting_since(now, timeout);
        self.waiting
            .drain(..count)
            .map(|(accept, _)| accept)
            .collect()
    }

    fn waiting_since(&self, now: Instant, time: Duration) -> usize {
        let late = |(_, came): &&(A, Instant)| now.saturating_duration_since(*came) >= time;
        self.waiting.iter().take_while(late).count()
    }

    /// Returns when the visitor came who has waited longest.
    pub fn oldest_waiting(&self) -> Option<Instant> {
        Some(self.waiting.front()?.1)
    }

    /// Returns the visitors who wait for a tunnel.
    pub fn waiting(&self) -> impl ExactSizeIterator<Item = &A> {
        self.waiting.iter().map(|(accept, _)| accept)
    }

    /// Returns the clients, each with how many idle tunnels it has.
    pub fn clients_and_idle(&self) -> impl Iterator<Item = (&C, usize)> {
        self.clients.iter().map(|it| (&it.client, it.idle.len()))
    }

    /// Returns how many idle tunnels there are.
    pub fn idle(&self) -> usize {
        self.clients.iter().map(|it| it.idle.len()).sum()
    }

    /// Takes out those idle tunnels beyond each client's pool that nobody has needed for `time` or
    /// longer.
    pub fn take_unused(&mut self, now: Instant, time: Duration) -> Vec<T> {
        let unused = |(_, since): &&(T, Instant)| now.saturating_duration_since(*since) >= time;
        let mut taken = Vec::new();
        for live in &mut self.clients {
            let beyond = live.idle.len().saturating_sub(live.client.pool());
            let count = live.idle.iter().take(beyond).take_while(unused).count();
            taken.extend(live.idle.drain(..count).map(|(tunnel, _)| tunnel));
        }
        taken
    }

    /// Empties the list as the server stops: removes all clients, and returns the visitors who wait and the
    /// idle tunnels.
    pub fn clear(&mut self) -> (VecDeque<(A, Instant)>, Vec<T>) {
        let idle = self.clients.drain(..).flat_map(Live::into_idle);
        (std::mem::take(&mut self.waiting), idle.collect())
    }
}

impl<T, C> Live<T, C> {
    fn into_idle(self) -> Vec<T> {
        self.idle.into_iter().map(|(tunnel, _)| tunnel).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIMEOUT: Duration = Duration::from_secs(5);

    /// A client that keeps two tunnels, and serves visitors whose names begin with one of these letters.
    #[derive(Clone, Copy, Debug, PartialEq)]
    struct Dials {
        from: char,
        to: char,
        failed: bool,
        visitors: usize,
    }

    const ANY: Dials = Dials {
        from: 'a',
        to: 'z',
        failed: false,
        visitors: 0,
    };

    impl Client<&'static str> for Dials {
        fn rank(&self, accept: &&'static str) -> Option<(bool, usize)> {
            let serves = (self.from..=self.to).contains(&accept.chars().next()?);
            serves.then_some((self.failed, self.visitors))
        }

        fn pool(&self) -> usize {
            2
        }
    }

    type List = ConnList<&'static str, u32, Dials>;

    const NOW: fn() -> Instant = Instant::now;

    /// A list with these clients.
    fn list(clients: &[Dials]) -> List {
        let mut list = ConnList::new();
        for client in clients {
            assert_eq!(list.add_client(*client), 0);
        }
        list
    }

    fn served(list: &mut List) -> Vec<(&'static str, u32)> {
        let taken = std::iter::from_fn(|| list.take_match());
        taken.map(|it| (it.accept, it.tunnel)).collect()
    }

    fn idle(list: &mut List, client: Dials, tunnels: &[u32]) {
        for tunnel in tunnels {
            let placed = list.add_tunnel(&client, *tunnel, NOW(), 9);
            assert_eq!(placed, Placed::Idle);
        }
    }

    #[test]
    fn first_come_first_served() {
        let (mut list, now) = (list(&[ANY]), NOW());
        for visitor in ["a", "b", "c"] {
            assert_eq!(list.add_accept(visitor, now), Added::Waits(Some(ANY)));
        }
        assert_eq!(list.waiting().collect::<Vec<_>>(), [&"a", &"b", &"c"]);
        assert_eq!(list.add_tunnel(&ANY, 1, now, 0), Placed::Matched);
        assert_eq!(list.add_tunnel(&ANY, 2, now, 0), Placed::Matched);
        assert_eq!(list.waiting().len(), 1);
        assert_eq!(served(&mut list), [("a", 1), ("b", 2)]);
        assert_eq!(list.add_tunnel(&ANY, 3, now, 0), Placed::Matched);
        assert_eq!(served(&mut list), [("c", 3)]);
        assert_eq!(served(&mut list), []);
    }

    #[test]
    fn without_a_client_nobody_is_asked_for_a_tunnel() {
        let (mut list, now) = (list(&[]), NOW());
        assert_eq!(list.add_accept("a", now), Added::Waits(None));
        assert_eq!(list.add_tunnel(&ANY, 1, now, 9), Placed::Homeless(1));
        // As soon as one comes, it is.
        assert_eq!(list.add_client(ANY), 1);
        assert_eq!(list.add_tunnel(&ANY, 1, now, 9), Placed::Matched);
    }

    #[test]
    fn the_newest_idle_tunnel_is_taken() {
        let (mut list, now) = (list(&[ANY]), NOW());
        idle(&mut list, ANY, &[1, 2]);
        assert_eq!(list.add_accept("a", now), Added::Matched);
        assert_eq!(list.add_accept("b", now), Added::Matched);
        assert_eq!(list.add_accept("c", now), Added::Waits(Some(ANY)));
        assert_eq!(served(&mut list), [("a", 2), ("b", 1)]);
    }

    #[test]
    fn superfluous_tunnels_push_the_oldest_out() {
        let (mut list, now) = (list(&[ANY]), NOW());
        assert_eq!(list.add_tunnel(&ANY, 1, now, 0), Placed::Superfluous(1));
        assert_eq!(list.add_tunnel(&ANY, 1, now, 2), Placed::Idle);
        assert_eq!(list.add_tunnel(&ANY, 2, now, 2), Placed::Idle);
        assert_eq!(list.add_tunnel(&ANY, 3, now, 2), Placed::Superfluous(1));
        assert_eq!(list.idle(), 2);
        assert_eq!(list.take_client(&ANY), Some(vec![2, 3]));
        assert_eq!(list.take_client(&ANY), None);
        assert_eq!(list.idle(), 0);
    }

    #[test]
    fn what_was_unused_for_longest_goes_first_and_never_the_pool() {
        let (mut list, now) = (list(&[ANY]), NOW());
        let second = Duration::from_secs(1);
        for tunnel in 1..=4 {
            list.add_tunnel(&ANY, tunnel, now + tunnel * second, 9);
        }
        assert_eq!(list.take_unused(now + TIMEOUT, TIMEOUT), []);
        assert_eq!(list.take_unused(now + TIMEOUT + second, TIMEOUT), [1]);
        for visitor in ["a", "b"] {
            assert_eq!(list.add_accept(visitor, now), Added::Matched);
        }
        assert_eq!(served(&mut list), [("a", 4), ("b", 3)]);
        for tunnel in [3, 4] {
            list.add_tunnel(&ANY, tunnel, now + 2 * TIMEOUT, 9);
        }
        assert_eq!(list.take_unused(now + 3 * TIMEOUT, TIMEOUT), [2]);
        assert_eq!(list.take_unused(now + 9 * TIMEOUT, TIMEOUT), []);
    }

    #[test]
    fn visitors_expire_at_the_exact_instant() {
        let (mut list, now) = (list(&[ANY]), NOW());
        let nanosecond = Duration::from_nanos(1);
        assert_eq!(list.oldest_waiting(), None);
        list.add_accept("a", now);
        list.add_accept("b", now + nanosecond);
        assert_eq!(list.oldest_waiting(), Some(now));
        let before = now + TIMEOUT - nanosecond;
        assert!(list.take_expired(before, TIMEOUT).is_empty());
        assert_eq!(list.take_expired(now + TIMEOUT, TIMEOUT), ["a"]);
        assert_eq!(list.oldest_waiting(), Some(now + nanosecond));
        let after = now + TIMEOUT + nanosecond;
        assert_eq!(list.take_expired(after, TIMEOUT), ["b"]);
        assert_eq!(list.waiting().len(), 0);
    }

    #[test]
    fn a_complete_match_does_not_expire() {
        let (mut list, now) = (list(&[ANY]), NOW());
        list.add_accept("a", now);
        list.add_accept("b", now);
        list.add_tunnel(&ANY, 1, now, 0);
        assert_eq!(list.take_expired(now + 2 * TIMEOUT, TIMEOUT), ["b"]);
        assert_eq!(served(&mut list), [("a", 1)]);
    }

    #[test]
    fn a_dead_tunnel_costs_a_visitor_neither_its_turn_nor_its_time() {
        let (mut list, now) = (list(&[ANY]), NOW());
        let later = now + Duration::from_secs(1);
        list.add_accept("a", now);
        list.add_accept("b", later);
        list.add_tunnel(&ANY, 1, now, 8);
        let dead = list.take_match().unwrap();
        let added = list.put_back(dead.accept, dead.accept_add_time);
        assert_eq!(added, Added::Waits(Some(ANY)));
        assert_eq!(list.oldest_waiting(), Some(now));
        list.add_tunnel(&ANY, 2, now, 8);
        assert_eq!(served(&mut list), [("a", 2)]);
        assert_eq!(list.oldest_waiting(), Some(later));
    }

    #[test]
    fn after_a_dead_tunnel_the_next_idle_one_is_taken() {
        let (mut list, now) = (list(&[ANY]), NOW());
        idle(&mut list, ANY, &[1, 2]);
        list.add_accept("a", now);
        let dead = list.take_match().unwrap();
        assert_eq!(dead.tunnel, 2);
        let added = list.put_back(dead.accept, dead.accept_add_time);
        assert_eq!(added, Added::Matched);
        assert_eq!(served(&mut list), [("a", 1)]);
    }

    #[test]
    fn who_came_first_is_served_first_also_when_put_back() {
        let (mut list, now) = (list(&[ANY]), NOW());
        for visitor in ["a", "b", "c"] {
            list.add_accept(visitor, now);
        }
        list.add_tunnel(&ANY, 1, now, 8);
        list.add_tunnel(&ANY, 2, now, 8);
        let dead = list.take_match().unwrap();
        list.put_back(dead.accept, dead.accept_add_time);
        assert_eq!(served(&mut list), [("b", 2)]);
        list.add_tunnel(&ANY, 3, now, 8);
        list.add_tunnel(&ANY, 4, now, 8);
        assert_eq!(served(&mut list), [("a", 3), ("c", 4)]);
    }

    #[test]
    fn who_is_put_back_keeps_nobody_waiting_who_came_before() {
        let (mut list, now) = (list(&[Dials { from: 'm', ..ANY }]), NOW());
        let later = now + Duration::from_secs(1);
        list.add_accept("a", now);
        list.add_accept("m", later);
        list.add_tunnel(&Dials { from: 'm', ..ANY }, 1, later, 8);
        let dead = list.take_match().unwrap();
        list.put_back(dead.accept, dead.accept_add_time);
        assert_eq!(list.take_expired(now + TIMEOUT, TIMEOUT), ["a"]);
        assert_eq!(list.oldest_waiting(), Some(later));
    }

    #[test]
    fn a_tunnel_goes_to_the_oldest_visitor_whom_its_client_serves() {
        let early = Dials { to: 'm', ..ANY };
        let late = Dials { from: 'n', ..ANY };
        let (mut list, now) = (list(&[early, late]), NOW());
        assert_eq!(list.add_accept("a", now), Added::Waits(Some(early)));
        assert_eq!(list.add_accept("x", now), Added::Waits(Some(late)));
        assert_eq!(list.add_accept("y", now), Added::Waits(Some(late)));
        assert_eq!(list.add_accept("1", now), Added::Waits(None));
        assert_eq!(list.add_tunnel(&late, 1, now, 0), Placed::Matched);
        assert_eq!(served(&mut list), [("x", 1)]);
        // While others wait, an idle tunnel of a client that cannot serve them stays idle.
        list.add_tunnel(&early, 2, now, 9);
        idle(&mut list, early, &[3]);
        assert_eq!(list.add_accept("z", now), Added::Waits(Some(late)));
        assert_eq!(list.add_accept("b", now), Added::Matched);
        assert_eq!(served(&mut list), [("a", 2), ("b", 3)]);
    }

    #[test]
    fn the_client_with_the_fewest_visitors_gets_the_next() {
        let (one, two) = (Dials { visitors: 1, ..ANY }, Dials { visitors: 2, ..ANY });
        let (mut list, now) = (list(&[two, one]), NOW());
        // Those who are about to be joined, and tunnels that were asked for, count.
        let asked = ["a", "b", "c", "d"].map(|it| list.add_accept(it, now));
        let expected = [one, two, one, two].map(|it| Added::Waits(Some(it)));
        assert_eq!(asked, expected);
        for tunnel in 1..=4 {
            list.add_tunnel(&one, tunnel, now, 9);
        }
        served(&mut list);
        idle(&mut list, one, &[11, 12]);
        idle(&mut list, two, &[21, 22]);
        for visitor in ["a", "b", "c"] {
            assert_eq!(list.add_accept(visitor, now), Added::Matched);
        }
        assert_eq!(served(&mut list), [("a", 12), ("b", 22), ("c", 11)]);
        // Rather an idle tunnel than one that is to be dialled.
        assert_eq!(list.add_accept("d", now), Added::Matched);
        assert_eq!(served(&mut list), [("d", 21)]);
    }

    #[test]
    fn a_client_that_has_failed_is_the_last_choice() {
        let failed = Dials {
            failed: true,
            ..ANY
        };
        let busy = Dials { visitors: 9, ..ANY };
        let (mut list, now) = (list(&[failed, busy]), NOW());
        // Not even with a tunnel at hand.
        idle(&mut list, failed, &[1]);
        assert_eq!(list.add_accept("a", now), Added::Waits(Some(busy)));
        idle(&mut list, failed, &[2]);
        list.take_client(&busy);
        assert_eq!(list.add_tunnel(&failed, 3, now, 9), Placed::Matched);
        assert_eq!(list.add_accept("b", now), Added::Matched);
        assert_eq!(served(&mut list), [("a", 3), ("b", 2)]);
        assert_eq!(list.add_accept("c", now), Added::Matched);
        assert_eq!(list.add_accept("d", now), Added::Waits(Some(failed)));
    }

    #[test]
    fn others_are_asked_when_a_client_has_gone_or_is_late() {
        let (one, two) = (ANY, Dials { visitors: 1, ..ANY });
        let (mut list, now) = (list(&[one, two]), NOW());
        assert_eq!(list.add_accept("a", now), Added::Waits(Some(one)));
        assert_eq!(list.add_accept("1", now), Added::Waits(None));
        list.take_client(&one);
        assert_eq!(list.ask_again(now, Duration::ZERO, 9), [two]);
        assert_eq!(list.ask_again(now, TIMEOUT, 9), []);
        let later = now + TIMEOUT;
        list.add_accept("b", now);
        assert_eq!(list.ask_again(later, TIMEOUT, 9), [two, two]);
        assert_eq!(list.ask_again(later, TIMEOUT, 1), [two]);
        assert_eq!(list.waiting().len(), 3);
    }
}
