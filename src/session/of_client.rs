//! The session with the server, on the client, and the tunnels that wait for a visitor in it.

use std::io;
use std::net::{IpAddr, Shutdown, SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, unbounded};
use parking_lot::{Condvar, Mutex};

use crate::door::{Answered, NoSession, Offers, no_server};
use crate::os::limits::Slot;
use crate::relay::{Elsewhere, Expected, Linger, Pairs, Visitor};
use crate::service::Service;
use crate::session::{Ended, Proto, tell};
use crate::wire::conn::{Conn, Reader, Writer};
use crate::wire::control::{Lines, send, write_lines};
use crate::wire::handshake::Bond;
use crate::wire::line::{Arrival, Failure, Line, Reason, SILENCE};

/// The last line of a client that stops.
const STOPPING: Line = Line::Bye {
    reason: Reason::Draining,
};

/// So many lines that say nothing of a visitor may come through an idle tunnel, one behind the other.
const MOST_IGNORED: usize = 64;

/// A session, from the server's answer to the end of the control link.
pub struct Session {
    /// Where tunnels are dialled: on the host that the control link leads to, whatever the server's
    /// name says by now.
    pub tunnel_addr: SocketAddr,
    /// What was agreed.
    pub proto: Proto,
    /// What its tunnels are tied to. None without a key.
    pub bond: Option<Bond>,
    /// The services that the server has visitors for, with its port as far as the server told it.
    pub public: Offers,
    /// Where the server sees this client's connections come from.
    pub seen_as: Option<IpAddr>,
    /// When it began.
    pub began: Instant,
    /// The tunnels that this client has dialled.
    pub dialled: AtomicU64,
    /// The last tunnel that it dialled led nowhere.
    tunnel_failed: AtomicBool,
    control: Arc<TcpStream>,
    state: Mutex<State>,
    /// No tunnel is spare any more.
    none_spare: Condvar,
}

struct State {
    /// Tunnels that have a [`Held`]: from naming their session to their end, idle or in use. A tunnel that
    /// is being dialled is in `spare` only, and an idle one in both.
    held: usize,
    /// Tunnels that are idle or being dialled, one thread each.
    spare: usize,
    /// Those that are idle, to be ended with their session.
    idle: Vec<Arc<TcpStream>>,
    /// A visitor has come through one of them.
    served: bool,
    /// The idle ones have been cut, and others must not become idle.
    cut: bool,
    /// What is to be written to the server. None once the session has ended; that ends the writer,
    /// and with it the link.
    to_server: Option<Sender<Line>>,
}

impl Session {
    /// The session that a server's answer begins; and what is to be written to the server.
    ///
    /// # Errors
    /// The [tunnel port](Answered::tunnel_port) is the server's port for visitors.
    pub fn new(
        answered: &Answered,
        control: Arc<TcpStream>,
        tunnel_port: Option<u16>,
    ) -> Result<(Arc<Self>, Receiver<Line>), NoSession> {
        let mut tunnel_addr = control.peer_addr().map_err(NoSession::Unreachable)?;
        tunnel_addr.set_port(answered.tunnel_port(tunnel_port)?);
        let welcome = answered.welcome.as_ref();
        let (to_server, to_write) = unbounded();
        let session = Self {
            tunnel_addr,
            proto: answered.proto,
            bond: answered.bond.clone(),
            public: answered.offers.clone(),
            seen_as: welcome.and_then(|welcome| Some(welcome.client?.ip())),
            began: Instant::now(),
            dialled: AtomicU64::new(0),
            tunnel_failed: AtomicBool::new(false),
            control,
            state: Mutex::new(State {
                held: 0,
                spare: 0,
                idle: Vec::new(),
                served: false,
                cut: false,
                to_server: Some(to_server),
            }),
            none_spare: Condvar::new(),
        };
        Ok((Arc::new(session), to_write))
    }

    /// Lets the server know that this client lives, and writes what it is to be told, until the
    /// session ends; `at_heartbeat` is called every 2 s. An original server is told nothing: it never
    /// reads, and would end up with a full buffer.
    pub fn write_lines(&self, writer: Writer, to_write: &Receiver<Line>, at_heartbeat: impl Fn()) {
        match self.proto {
            // If writing fails, the thread that reads finds out why.
            Proto::Tp2 { .. } => _ = write_lines(writer, to_write, at_heartbeat),
            Proto::Original => while to_write.recv().is_ok() {},
        }
        // Wakes the thread that reads.
        let _ = self.control.shutdown(Shutdown::Both);
    }

    /// True if a dial of this port may lead back to the server. A dial of another port does not, and its
    /// address says nothing: the system lets a visitor and this client dial two ports from one address.
    pub fn may_loop(&self, local: u16) -> bool {
        self.public.values().any(|public| *public == Some(local))
    }

    /// True until the session has ended.
    pub fn is_live(&self) -> bool {
        self.state.lock().to_server.is_some()
    }

    /// True if a visitor has come through one of its tunnels.
    pub fn has_served(&self) -> bool {
        self.state.lock().served
    }

    /// Tunnels that are being dialled, and tunnels that are idle.
    pub fn tunnels(&self) -> (usize, usize) {
        let state = self.state.lock();
        let idle = state.idle.len();
        (state.spare.saturating_sub(idle), idle)
    }

    /// Takes note of whether the last tunnel that was dialled has led to the server.
    pub fn note_dial(&self, reached: bool) {
        self.tunnel_failed.store(!reached, Ordering::Relaxed);
    }

    /// True if a visitor who comes now would get no tunnel: none is idle, and none can be dialled.
    pub fn is_barred(&self) -> bool {
        self.tunnel_failed.load(Ordering::Relaxed) && self.state.lock().idle.is_empty()
    }

    /// True if half of the pool is in use, or a tunnel of it is lost. One that is in use comes back: a
    /// steady load has all the tunnels that it needs, and dials none.
    pub fn is_low(&self) -> bool {
        let (state, pool) = (self.state.lock(), self.proto.pool());
        let in_all = (state.held + state.spare).saturating_sub(state.idle.len());
        state.spare <= pool / 2 || in_all < pool
    }

    /// A tunnel is idle again.
    pub fn spare_again(self: &Arc<Self>) -> Spare {
        self.state.lock().spare += 1;
        Spare {
            session: self.clone(),
            slot: None,
        }
    }

    /// One more spare tunnel, if there are fewer than `most`, with the descriptors for its visitor.
    pub fn one_spare(self: &Arc<Self>, most: usize, slot: Slot) -> Option<Spare> {
        let mut state = self.state.lock();
        if state.spare >= most || state.to_server.is_none() {
            return None;
        }
        state.spare += 1;
        Some(Spare {
            session: self.clone(),
            slot: Some(slot),
        })
    }

    /// Tells a server that understands it why a visitor's tunnel was aborted.
    pub fn tell_failed(&self, visitor: &Visitor, reason: Failure) {
        if let Some(visitor) = visitor.address() {
            self.tell(Line::Failed { visitor, reason });
        }
    }

    /// How long its visits may stand still once one end has finished, if this client lets them for `own`.
    pub fn linger(self: &Arc<Self>, own: Duration) -> Linger {
        let session = Arc::downgrade(self);
        Linger::new(own, self.proto.their_linger(), session)
    }

    /// Ends the control link. No tunnel is dialled any more; visitors that are joined go on.
    pub fn end(&self) {
        self.state.lock().to_server.take();
    }

    /// The same, after the server was told that this client stops.
    pub fn say_bye_and_end(&self) {
        if let Some(to_server) = self.state.lock().to_server.take() {
            let _ = to_server.send(STOPPING);
        }
    }

    /// Waits until no tunnel is spare, but not longer than that; then ends those that are idle.
    pub fn cut_idle_after(&self, limit: Duration) {
        let mut state = self.state.lock();
        let some = |state: &mut State| state.spare > 0;
        self.none_spare.wait_while_for(&mut state, some, limit);
        state.cut = true;
        for idle in state.idle.drain(..) {
            // Not an abort: the last bytes of a visitor may still be on their way to the server. Whom the
            // server hands it to in this very moment does not take that for an empty answer, as the
            // frame of an end is missing.
            let _ = idle.shutdown(Shutdown::Both);
        }
    }

    /// An idle tunnel is closed when the session ends, unless it is [taken](Self::take_idle) before.
    /// False if the session has ended and its idle tunnels are cut already.
    fn add_idle(&self, socket: &Arc<TcpStream>) -> bool {
        let mut state = self.state.lock();
        if !state.cut {
            state.idle.push(socket.clone());
        }
        !state.cut
    }

    /// An error if the session's end has closed it.
    fn take_idle(&self, socket: &Arc<TcpStream>) -> Result<(), NoVisitor> {
        let mut state = self.state.lock();
        let place = state.idle.iter().position(|it| Arc::ptr_eq(it, socket));
        let place = place.ok_or(NoVisitor::SessionEnded)?;
        state.idle.swap_remove(place);
        Ok(())
    }
}

impl Elsewhere for Session {
    fn tell(&self, line: Line) -> bool {
        tell(self.state.lock().to_server.as_ref(), line)
    }
}

/// A tunnel that is being dialled or idle, counted among the spare ones of its session as long as this
/// lives.
pub struct Spare {
    /// The session that it belongs to.
    pub session: Arc<Session>,
    slot: Option<Slot>,
}

impl Spare {
    /// To be called before a tunnel says which session it belongs to: the server may then give it a
    /// visitor, whom a client that stops must not forget. An error once the session has ended.
    pub fn hold(&mut self, pairs: &Arc<Pairs>) -> Result<Arc<Held>, NoVisitor> {
        let mut state = self.session.state.lock();
        if state.to_server.is_none() {
            return Err(NoVisitor::SessionEnded);
        }
        state.held += 1;
        Ok(Arc::new(Held {
            session: self.session.clone(),
            _slot: self.slot.take(),
            _expected: pairs.expect(),
        }))
    }

    /// Waits until the server gives this tunnel a visitor, and returns whether the server wants an
    /// [answer](Tunnel::answer) before the visitor's bytes. A tunnel that is idle again after the end of
    /// the session waits, too, but not for long: the server may have given it a visitor just before, and
    /// closes it otherwise.
    pub fn wait_for_visitor(self, tunnel: &mut Tunnel) -> Result<(Visitor, bool), NoVisitor> {
        let (session, conn) = (&self.session, &mut tunnel.conn);
        if session.proto == Proto::Original {
            session.state.lock().served = true;
            return Ok((Visitor::new(None, Service::default()), false));
        }
        let socket = conn.socket().clone();
        conn.writer.write_idle().map_err(ended)?;
        let is_idle = session.add_idle(&socket);
        if !is_idle {
            let deadline = Some(Instant::now() + SILENCE);
            conn.reader.set_deadline(deadline).map_err(ended)?;
        }
        let visitor = read_visitor(&mut Lines::new(&mut conn.reader));
        match is_idle {
            true => session.take_idle(&socket)?,
            false => conn.reader.set_deadline(None).map_err(ended)?,
        }
        let Arrival {
            visitor,
            visit,
            to,
            service,
            answer,
        } = visitor?;
        session.state.lock().served = true;
        if !answer {
            conn.reader.begin_stream();
        }
        let visitor = Visitor::new(Some(visitor), service).in_visit(visit);
        Ok((visitor.that_came_to(to), answer))
    }
}

impl Drop for Spare {
    fn drop(&mut self) {
        let mut state = self.session.state.lock();
        state.spare -= 1;
        if state.spare == 0 {
            self.session.none_spare.notify_all();
        }
    }
}

fn ended(error: io::Error) -> NoVisitor {
    NoVisitor::Ended(error.into())
}

/// A tunnel that has named its session.
pub struct Tunnel {
    pub conn: Conn,
    pub held: Arc<Held>,
}

impl Tunnel {
    /// Tells a server that has asked for it whether the local service is reached. The visitor's bytes
    /// follow if it is, and otherwise the tunnel is idle again.
    pub fn answer(&mut self, visitor: &Visitor, reached: Result<(), Failure>) -> io::Result<()> {
        let line = match (reached, visitor.address()) {
            (Err(reason), Some(visitor)) => Line::Failed { visitor, reason },
            _ => {
                self.conn.reader.begin_stream();
                Line::Ready
            }
        };
        send(&mut self.conn.writer, &line)
    }
}

/// What a tunnel has from its first line to its end: its place among those of the session, descriptors
/// for itself and the local service, and that a client that stops waits for it.
pub struct Held {
    session: Arc<Session>,
    _slot: Option<Slot>,
    _expected: Expected,
}

impl Drop for Held {
    fn drop(&mut self) {
        self.session.state.lock().held -= 1;
    }
}

fn read_visitor(lines: &mut Lines<&mut Reader>) -> Result<Arrival, NoVisitor> {
    for _ in 0..MOST_IGNORED {
        match lines.next_line() {
            Ok(Line::New(Some(arrival))) if lines.in_frames() => return Ok(arrival),
            line @ Ok(Line::Bye { .. }) => {
                return Err(NoVisitor::NotServer(no_server(line, lines)));
            }
            line @ Ok(_) if lines.foreign().is_some() => {
                return Err(NoVisitor::NotServer(no_server(line, lines)));
            }
            Ok(_) => {}
            Err(error) => return Err(ended(error)),
        }
    }
    let what = format!("{MOST_IGNORED} lines without a visitor");
    Err(NoVisitor::Ended(Ended::BadLine(what)))
}

/// Why a tunnel got no visitor.
#[derive(Debug)]
pub enum NoVisitor {
    /// Its session ended.
    SessionEnded,
    /// It could not be dialled.
    Dial(NoSession),
    /// What listens on the tunnel port is something else than that.
    NotServer(NoSession),
    /// It ended while it was idle.
    Ended(Ended),
}

/// Why a visitor did not get to the local service.
#[derive(Debug)]
pub struct LocalError {
    /// What the server is told.
    pub reason: Failure,
    /// What this client logs.
    pub why: String,
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::net::TcpListener;

    /// The client has nothing left to do with the visitor, and the system has the visitor's last bytes.
    #[test]
    fn what_an_idle_tunnel_has_still_to_send_outlives_the_session() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let [control, tunnel] = [(); 2].map(|()| {
            let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            (Arc::new(near), listener.accept().unwrap().0)
        });
        let Conn { reader, writer } = Conn::new(control.0.clone());
        let answered = Answered {
            lines: Lines::new(reader),
            writer,
            first: Line::Hi,
            proto: Proto::Original,
            welcome: None,
            offers: Offers::new(),
            bond: None,
        };
        let (session, _to_write) = Session::new(&answered, control.0, None).ok().unwrap();
        let (near, mut far) = tunnel;
        near.set_nonblocking(true).unwrap();
        far.set_read_timeout(Some(SILENCE)).unwrap();
        let mut written = 0;
        while let Ok(count) = (&*near).write(&[7; 1 << 16]) {
            written += count;
        }
        assert!(session.add_idle(&near));
        session.cut_idle_after(Duration::ZERO);
        let mut read = Vec::new();
        far.read_to_end(&mut read).unwrap();
        assert_eq!(read.len(), written);
    }
}
