//! A session with a client, on the server.

use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, unbounded};
use parking_lot::Mutex;

use crate::door::Link;
use crate::os::limits::{Slot, Slots};
use crate::os::net;
use crate::relay::{Elsewhere, Linger};
use crate::session::{Ended, Proto, tell};
use crate::wire::conn::{Reader, Writer};
use crate::wire::control::{Lines, write_lines};
use crate::wire::handshake::Bond;
use crate::wire::line::{Failure, Line, Reason};

/// How long others come first after a client's first failure.
const FIRST_PAUSE: Duration = Duration::from_secs(1);

/// The longest pause is 64 s.
const MOST_DOUBLINGS: u32 = 6;

/// A client that could not reach a local service: others come first until some time.
#[derive(Default)]
struct Failing {
    until: Option<Instant>,
    /// How often in a row.
    times: u32,
}

impl Failing {
    fn is_paused(&self) -> bool {
        self.until.is_some_and(|until| until > Instant::now())
    }

    /// Begins the next pause. What fails during one was tried before it, and is no further time.
    fn pause(&mut self) {
        if !self.is_paused() {
            let pause = FIRST_PAUSE * 2_u32.pow(self.times.min(MOST_DOUBLINGS));
            self.until = Some(Instant::now() + pause);
            self.times += 1;
        }
    }
}

/// A session, from the registration of a client's control link to its end.
pub struct Session {
    /// Where the client's control link comes from.
    pub client: SocketAddr,
    /// What was agreed.
    pub proto: Proto,
    /// When it began.
    pub began: Instant,
    /// The tunnels that the client has dialled.
    pub dialled: AtomicU64,
    /// What the tunnels of this session are tied to. None without a key.
    pub bond: Option<Bond>,
    /// The client wants to know which address each visitor came to.
    pub wants_to: bool,
    /// Of each of the server's services, how the client serves it. None if it does not.
    serves: Vec<Option<Mutex<Failing>>>,
    /// As many as it may have visitors at a time.
    places: Arc<Slots>,
    max_conns: usize,
    socket: Arc<TcpStream>,
    /// What is to be written to the client. Unbounded, so that a send never waits: each visitor
    /// adds a few lines at the most, beside those that may be left out, and a writer that is stuck ends
    /// with its link. None once the session has ended: that ends the writer, and with it the link.
    to_client: Mutex<Option<Sender<Line>>>,
}

impl Session {
    /// The session that a control link is to begin; and what is to be written to its client. `serves`
    /// says of each of the server's services whether the client offers it, and `max_conns` is how many
    /// visitors there are at a time.
    pub fn new(
        link: &Link,
        client: SocketAddr,
        serves: impl Iterator<Item = bool>,
        max_conns: usize,
    ) -> (Arc<Self>, Receiver<Line>) {
        let (to_client, to_write) = unbounded();
        let session = Self {
            client,
            proto: link.proto,
            began: Instant::now(),
            dialled: AtomicU64::new(0),
            bond: link.bond.clone(),
            wants_to: link.wants_to,
            serves: serves.map(|it| it.then(Mutex::default)).collect(),
            places: Slots::new(max_conns),
            max_conns,
            socket: link.socket.clone(),
            to_client: Mutex::new(Some(to_client)),
        };
        (Arc::new(session), to_write)
    }

    /// True if the client offers this one of the server's services.
    pub fn serves(&self, service: usize) -> bool {
        self.serves[service].is_some()
    }

    /// True if the client could not reach this one of its local services lately: others come first.
    pub fn is_failing(&self, service: usize) -> bool {
        let failing = self.serves[service].as_ref();
        failing.is_some_and(|failing| failing.lock().is_paused())
    }

    /// Takes note that this one of its local services is tried for a visitor. Once a pause is over, one
    /// visitor tries for all: others come first until the service is reached.
    pub fn tries(&self, service: usize) {
        if let Some(failing) = &self.serves[service] {
            let mut failing = failing.lock();
            if failing.times > 0 {
                failing.pause();
            }
        }
    }

    /// Takes note of whether the client has reached this one of its local services. If not, other
    /// clients come first for a second, and for twice as long each further time.
    pub fn has_reached(&self, service: usize, reached: bool) {
        if let Some(failing) = &self.serves[service] {
            match reached {
                true => *failing.lock() = Failing::default(),
                false => failing.lock().pause(),
            }
        }
    }

    /// A place among this client's visitors.
    pub fn place(&self) -> Option<Slot> {
        self.places.try_take()
    }

    /// How many visitors the client has.
    pub fn visitors(&self) -> usize {
        self.max_conns - self.places.free()
    }

    /// How many tunnels of the client's may be idle: each visitor may leave one behind. The tunnels of
    /// an original client come on demand.
    pub fn most_idle(&self) -> usize {
        match self.proto {
            Proto::Original => 0,
            Proto::Tp2 { pool, .. } => pool + self.max_conns,
        }
    }

    /// Hands a line to the thread that writes to the client. If that has just ended, the session is
    /// about to, and the line is lost.
    pub fn send(&self, line: Line) {
        if let Some(to_client) = &*self.to_client.lock() {
            let _ = to_client.send(line);
        }
    }

    /// How long its visits may stand still once one end has finished, if this server lets them for `own`.
    pub fn linger(self: &Arc<Self>, own: Duration) -> Linger {
        let session = Arc::downgrade(self);
        Linger::new(own, self.proto.their_linger(), session)
    }

    /// Ends the control link, once all lines are written that were handed over before.
    pub fn end(&self) {
        self.to_client.lock().take();
    }

    /// True if the client has closed its control link, whether or not a thread has noticed.
    pub fn has_hung_up(&self) -> bool {
        net::has_hung_up(&self.socket)
    }

    /// Writes what the client is [sent](Self::send), and heartbeats, until the session has ended or
    /// nothing can be written any more: then calls `failed`.
    pub fn write_lines(
        &self,
        writer: Writer,
        to_write: &Receiver<Line>,
        failed: impl FnOnce(&Ended),
    ) {
        if let Err(error) = write_lines(writer, to_write, || ()) {
            // Before the thread that reads is woken: all that it finds is a closed connection.
            failed(&Ended::Writing(error));
        }
        let _ = self.socket.shutdown(Shutdown::Both);
    }

    /// Reads the client's lines until there are no more, and returns why. Calls `failed` for each visitor
    /// that the client could not serve, and `finished` with the number of each visit of which one end has
    /// finished there, and whether something has moved.
    pub fn read_lines(
        &self,
        lines: &mut Lines<Reader>,
        failed: impl Fn(SocketAddr, &Failure),
        finished: impl Fn(u64, bool),
    ) -> Ended {
        loop {
            match lines.next_line_alive() {
                Ok(Line::Bye { reason }) => return Ended::Bye(reason),
                Ok(Line::Hello { .. }) if self.proto == Proto::Original => {
                    // The client never was an original one. It comes back, and is asked again.
                    let reason = Reason::Late;
                    self.send(Line::Bye { reason });
                    return Ended::LateHello;
                }
                Ok(Line::Failed { visitor, reason }) => failed(visitor, &reason),
                Ok(Line::Finished { visit, moved }) => finished(visit, moved),
                Ok(_) => {}
                Err(error) => return error.into(),
            }
        }
    }
}

/// Two sessions are the same only if they are one.
impl PartialEq for Session {
    fn eq(&self, other: &Self) -> bool {
        std::ptr::eq(self, other)
    }
}

impl Elsewhere for Session {
    fn tell(&self, line: Line) -> bool {
        tell(self.to_client.lock().as_ref(), line)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::conn::Conn;
    use std::collections::BTreeMap;
    use std::net::TcpListener;

    /// The session of a link, with one service; what is to be written to its client; and the client.
    fn session() -> (Arc<Session>, Receiver<Line>, Link, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (socket, from) = listener.accept().unwrap();
        let socket = Arc::new(socket);
        let Conn { reader, writer } = Conn::new(socket.clone());
        let link = Link {
            socket,
            lines: Lines::new(reader),
            writer,
            proto: Proto::Original,
            offers: BTreeMap::new(),
            wants_to: false,
            bond: None,
        };
        let (session, to_write) = Session::new(&link, from, std::iter::once(true), 1);
        (session, to_write, link, client)
    }

    #[test]
    fn visitors_who_fail_at_once_are_one_failure() {
        let (session, ..) = session();
        let pause = || {
            let until = session.serves[0].as_ref().unwrap().lock().until;
            until.map(|until| until.saturating_duration_since(Instant::now()))
        };
        for _ in 0..16 {
            session.has_reached(0, false);
        }
        assert!(session.is_failing(0));
        assert!(pause() <= Some(FIRST_PAUSE));
        session.has_reached(0, true);
        assert!(!session.is_failing(0));
    }

    #[test]
    fn after_a_pause_one_visitor_tries_for_all() {
        let (session, ..) = session();
        session.tries(0);
        assert!(!session.is_failing(0), "it has not failed");
        session.has_reached(0, false);
        // As if the pause were over.
        session.serves[0].as_ref().unwrap().lock().until = Some(Instant::now());
        assert!(!session.is_failing(0), "somebody is to try it");
        session.tries(0);
        assert!(session.is_failing(0), "one is enough");
        session.has_reached(0, true);
        assert!(!session.is_failing(0));
    }

    #[test]
    fn why_nothing_can_be_written_is_told_before_the_link_is_closed() {
        let (session, to_write, link, _client) = session();
        let Link { socket, writer, .. } = link;
        session.send(Line::Hi);
        socket.shutdown(Shutdown::Write).unwrap();
        let patience = Duration::from_millis(10);
        socket.set_read_timeout(Some(patience)).unwrap();
        let mut told = None;
        session.write_lines(writer, &to_write, |ended| {
            let closed = socket.peek(&mut [0]).is_ok();
            told = Some((matches!(ended, Ended::Writing(_)), closed));
        });
        assert_eq!(told, Some((true, false)));
        assert_eq!(socket.peek(&mut [0]).unwrap(), 0);
    }
}
