//! Connections that have not proved yet that they are a client's, each with a thread that waits for
//! what it says. Their number is bounded, and no stranger may keep the client out.

use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use crate::os::limits::{MAX_THREADS, MAX_UNPROVED};
use crate::os::net;
use crate::os::source::Source;

/// A source with more places than that gives way to all others, itself included.
const MAX_OF_ONE_SOURCE: usize = MAX_UNPROVED / 4;

/// When there are too many, the oldest goes, but not before it has had this long: a client needs
/// microseconds for what it says first, and a burst of its tunnels must not push its own out.
const GRACE: Duration = Duration::from_millis(50);

/// One of a source with too many places has this long: still enough for a client that shares its
/// address with a flood, and short enough for 12,800 connections a second to come and go.
const SHORT_GRACE: Duration = Duration::from_millis(5);

/// One that began like somebody who has the key has this much longer: what it says next takes a
/// round trip, and nobody must be able to push a far client out.
const KNOWN_GRACE: Duration = Duration::from_secs(1);

/// The connections of a port that have not proved themselves yet.
pub struct Lobby {
    /// As many as there may be, in all and of one source.
    most: [usize; 2],
    /// As many threads as there may be, with those that have not noticed that they were sent away.
    threads: usize,
    unproved: Mutex<Vec<Unproved>>,
    left: Condvar,
}

struct Unproved {
    socket: Arc<TcpStream>,
    source: Source,
    /// When its grace began.
    came: Instant,
    /// It began like one that has the key.
    known: bool,
    /// Shut down; its thread is about to notice, and counts until it has.
    sent_away: bool,
}

impl Unproved {
    /// Until when it stays, however full the lobby gets.
    fn stays(&self) -> Instant {
        match self.known {
            true => self.came + GRACE + KNOWN_GRACE,
            false => self.came + GRACE,
        }
    }
}

impl Lobby {
    /// An empty lobby for clients.
    pub fn new() -> Arc<Self> {
        Self::with([MAX_UNPROVED, MAX_OF_ONE_SOURCE], MAX_THREADS)
    }

    /// An empty lobby for so many connections, all of which may come from one proxy.
    pub fn of(most: usize) -> Arc<Self> {
        Self::with([most, most], most + most.div_ceil(8))
    }

    fn with(most: [usize; 2], threads: usize) -> Arc<Self> {
        Arc::new(Self {
            most,
            threads,
            unproved: Mutex::new(Vec::new()),
            left: Condvar::new(),
        })
    }

    /// Lets a connection in. A full lobby waits until one of those inside has had its time, and shuts
    /// that one down; and it waits for their threads if too many have not noticed yet. Never for
    /// long: with 64 threads at work and a grace of milliseconds, thousands come in a second.
    pub fn enter(self: &Arc<Self>, socket: Arc<TcpStream>, from: SocketAddr) -> Place {
        let mut unproved = self.unproved.lock();
        loop {
            if unproved.len() >= self.threads {
                self.left.wait(&mut unproved);
                continue;
            }
            let Some((next, may_go)) = next_to_go(&unproved, self.most) else {
                break;
            };
            let now = Instant::now();
            if may_go > now {
                self.left.wait_until(&mut unproved, may_go);
                continue;
            }
            let next = &mut unproved[next];
            if net::has_unread(&next.socket) {
                // Not the far side is late but the thread here: the host is busy.
                next.came = now;
            } else {
                next.sent_away = true;
                let _ = next.socket.shutdown(Shutdown::Both);
            }
        }
        unproved.push(Unproved {
            socket: socket.clone(),
            source: from.into(),
            came: Instant::now(),
            known: false,
            sent_away: false,
        });
        Place {
            lobby: self.clone(),
            socket,
        }
    }

    /// Shuts down every connection in the lobby.
    pub fn clear(&self) {
        for unproved in self.unproved.lock().drain(..) {
            let _ = unproved.socket.shutdown(Shutdown::Both);
        }
        self.left.notify_all();
    }
}

/// Which connection makes room in a full lobby, and when; None if there is room.
fn next_to_go(
    unproved: &[Unproved],
    [most, of_one_source]: [usize; 2],
) -> Option<(usize, Instant)> {
    let staying = || unproved.iter().enumerate().filter(|(_, it)| !it.sent_away);
    if staying().count() < most {
        return None;
    }
    let places = |source| staying().filter(|(_, it)| it.source == source).count();
    let unknown = || staying().filter(|(_, it)| !it.known);
    let is_crowd = |it: &Unproved| of_one_source < most && places(it.source) > of_one_source;
    let crowd = unknown().find(|(_, it)| is_crowd(it));
    if let Some((_, Unproved { source, .. })) = crowd {
        let own = unknown().filter(|(_, it)| it.source == *source);
        let oldest = own.min_by_key(|(_, it)| it.came);
        return oldest.map(|(place, it)| (place, it.came + SHORT_GRACE));
    }
    let oldest = staying().min_by_key(|(_, it)| it.stays());
    oldest.map(|(place, it)| (place, it.stays()))
}

/// Why a connection has lost its place, and is of no use.
#[derive(Debug)]
pub enum Lost {
    /// Others came, and it had had its time.
    CrowdedOut,
    /// The server stops.
    Stopping,
}

/// A connection's place in the lobby, left when dropped.
pub struct Place {
    lobby: Arc<Lobby>,
    /// The connection.
    pub socket: Arc<TcpStream>,
}

impl Place {
    /// Leaves the lobby, unless the connection was sent away before.
    pub fn leave(self) -> Result<(), Lost> {
        self.remove()
    }

    /// Lets the connection stay longer than others: it began like one that has the key. That may
    /// have been recorded, so it proves nothing yet.
    pub fn extend(&self) {
        let mut unproved = self.lobby.unproved.lock();
        if let Some(own) = self.find(&unproved) {
            unproved[own].known = true;
        }
    }

    fn find(&self, unproved: &[Unproved]) -> Option<usize> {
        let is_own = |it: &Unproved| Arc::ptr_eq(&it.socket, &self.socket);
        unproved.iter().position(is_own)
    }

    fn remove(&self) -> Result<(), Lost> {
        let mut unproved = self.lobby.unproved.lock();
        let own = self.find(&unproved).map(|own| unproved.swap_remove(own));
        self.lobby.left.notify_one();
        match own {
            Some(own) if own.sent_away => Err(Lost::CrowdedOut),
            Some(_) => Ok(()),
            None => Err(Lost::Stopping),
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = self.remove();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::net::TcpListener;
    use std::thread;

    const DEADLINE: Duration = Duration::from_secs(10);

    /// A connection to this listener, and its other end.
    fn connect(listener: &TcpListener) -> (TcpStream, TcpStream) {
        let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        near.set_read_timeout(Some(DEADLINE)).unwrap();
        (near, listener.accept().unwrap().0)
    }

    fn listener() -> TcpListener {
        TcpListener::bind("127.0.0.1:0").unwrap()
    }

    /// The lobby's own connections: the far ends, and the places.
    type Inside = Vec<(TcpStream, Place)>;

    /// Fills a lobby from these hosts in turn.
    fn fill(lobby: &Arc<Lobby>, listener: &TcpListener, hosts: &[u8]) -> Inside {
        let from = hosts.iter().cycle().take(MAX_UNPROVED);
        let enter = |host: &u8| {
            let (near, socket) = connect(listener);
            (near, lobby.enter(socket.into(), from_host(*host)))
        };
        from.map(enter).collect()
    }

    fn from_host(host: u8) -> SocketAddr {
        ([192, 0, 2, host], 1).into()
    }

    #[test]
    fn a_full_lobby_sends_the_oldest_away() {
        let (listener, lobby) = (listener(), Lobby::new());
        let start = Instant::now();
        let mut inside = fill(&lobby, &listener, &[1, 2, 3, 4]);
        // The oldest began as if it had the key: the second one goes in its place.
        inside[0].1.extend();
        let (mut oldest, oldest_place) = inside.remove(1);
        let (_near, newcomer) = connect(&listener);
        let place = lobby.enter(newcomer.into(), from_host(5));
        assert_eq!(oldest.read(&mut [0]).unwrap(), 0);
        assert!(start.elapsed() >= GRACE);
        assert!(matches!(oldest_place.leave(), Err(Lost::CrowdedOut)));
        assert_eq!(lobby.unproved.lock().len(), MAX_UNPROVED);
        drop(inside);
        assert_eq!(lobby.unproved.lock().len(), 1);
        place.leave().unwrap();
        assert_eq!(lobby.unproved.lock().len(), 0);
        let (_near, last) = connect(&listener);
        let place = lobby.enter(last.into(), from_host(6));
        lobby.clear();
        assert!(matches!(place.leave(), Err(Lost::Stopping)));
    }

    #[test]
    fn threads_that_have_not_noticed_are_waited_for() {
        let (listener, lobby) = (listener(), Lobby::new());
        let inside = fill(&lobby, &listener, &[1]);
        let newcomers: Vec<_> = (MAX_UNPROVED..MAX_THREADS)
            .map(|_| {
                let (near, socket) = connect(&listener);
                (near, lobby.enter(socket.into(), from_host(1)))
            })
            .collect();
        assert_eq!(lobby.unproved.lock().len(), MAX_THREADS);
        let (_near, one_more) = connect(&listener);
        let entering = thread::spawn({
            let lobby = lobby.clone();
            move || lobby.enter(one_more.into(), from_host(2))
        });
        thread::sleep(2 * GRACE);
        assert!(!entering.is_finished(), "in before another is out");
        drop(inside);
        entering.join().unwrap().leave().unwrap();
        drop(newcomers);
    }

    #[test]
    fn who_has_too_many_places_makes_room_for_all() {
        let (listener, lobby) = (listener(), Lobby::new());
        // The oldest is another one's, and the next began as if it had the key.
        let inside = fill(&lobby, &listener, &[1, 2, 2, 2]);
        inside[1].1.extend();
        let (_near, newcomer) = connect(&listener);
        let place = lobby.enter(newcomer.into(), from_host(3));
        let stayed = inside.into_iter().map(|(_, place)| place.leave().is_ok());
        let stayed: Vec<_> = stayed.collect();
        assert_eq!(stayed.iter().filter(|it| !**it).count(), 1);
        assert!(!stayed[2], "not the oldest of those");
        place.leave().unwrap();
    }
}
