//! The client, in the original's functions: the control link, and a tunnel for each visitor.

use std::collections::HashSet;
use std::fmt;
use std::io;
use std::net::{IpAddr, Shutdown, SocketAddr, TcpStream};
use std::sync::{Arc, Once};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, unbounded};
use log::{Level, info, log, warn};
use parking_lot::{Condvar, Mutex};

use crate::conn::{Conn, Reader, Writer};
use crate::control::{Lines, send, why_ended, write_lines};
use crate::door::{Answered, NoSession, no_server, open_link, seal_tunnel};
use crate::error::Error;
use crate::limits::{Slot, Slots, affordable_visitors};
use crate::log_limit::LogLimit;
use crate::net::{self, timed_out};
use crate::options::{ClientOptions, TUNNEL_PORT};
use crate::protocol::{Failure, HEARTBEAT, Line, Reason, SILENCE, SessionId, Welcome};
use crate::relay::{Closing, End, Expected, Pairs, SWEEP, Visitor};
use crate::secure::Bond;
use crate::status::{Counts, Status, count};
use crate::stop::{Handle, Running, Stop};
use crate::workers::{Workers, set_name};

/// Between two dials of the control port, at first.
const FIRST_PAUSE: Duration = Duration::from_millis(200);

/// And after many failures: whatever has ended them, the client is back 10 s later.
const LONGEST_PAUSE: Duration = Duration::from_secs(9);

/// Tunnels that wait for a visitor or are being dialled. A server never has more visitors waiting
/// than it serves at a time, 4096 by default.
const MAX_SPARE: usize = 8192;

/// Between the dials of a tunnel that failed. The first one at once: a server that is flooded may
/// have pushed it out.
const REDIALS: [Duration; 3] = [
    Duration::ZERO,
    Duration::from_millis(100),
    Duration::from_millis(300),
];

/// What a stopping client gives its threads for their last words, and a server that has ended the
/// session to close its idle tunnels, which is under way by then.
const LAST_WORDS: Duration = Duration::from_millis(250);

/// The last line of a client that stops.
const STOPPING: Line = Line::Bye {
    reason: Reason::Draining,
};

/// The half of the tunnel that runs in the LAN.
///
/// ```no_run
/// use tunnel_proxy::{Address, Client, ClientOptions};
///
/// let client = Client::new(ClientOptions {
///     server: Address::new("tunnel.example.org", 8009),
///     ..ClientOptions::default()
/// });
/// client.run()?;
/// # Ok::<(), tunnel_proxy::Error>(())
/// ```
pub struct Client {
    shared: Arc<Shared>,
}

struct Shared {
    options: ClientOptions,
    workers: Workers,
    pairs: Arc<Pairs>,
    /// Two descriptors each: a tunnel is of no use if none is left for its local service.
    slots: Arc<Slots>,
    /// The session with the server, while there is one.
    session: Mutex<Option<Arc<Session>>>,
    /// Where this client's own connections to the local service come from: a visitor from there
    /// would come again and again.
    own_dials: Mutex<HashSet<SocketAddr>>,
    stop: Stop,
    logs: Logs,
    counts: Counts,
}

/// What visitors, or the server, can cause to be logged without end.
struct Logs {
    local_failed: LogLimit,
    tunnel_failed: LogLimit,
    no_thread: LogLimit,
    /// Said once.
    no_key: Once,
}

struct Session {
    control: Arc<TcpStream>,
    /// On the host that the control link leads to, whatever the server's name says by now.
    tunnel_addr: SocketAddr,
    proto: Proto,
    /// Where the server sees this client's connections come from.
    seen_as: Option<IpAddr>,
    /// What its tunnels are tied to. None without a key.
    bond: Option<Bond>,
    tunnels: Mutex<Tunnels>,
    /// No tunnel is spare any more.
    none_spare: Condvar,
}

#[derive(Clone, Copy)]
enum Proto {
    /// The server is an original one: tunnels are raw, and dialled on demand.
    Original,
    /// `tp/1`, with this many idle tunnels granted.
    Tp1 { id: SessionId, pool: usize },
}

struct Tunnels {
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

impl Client {
    /// A client that does nothing before [`run`](Client::run). Options that lead nowhere show in
    /// the log then, as they may lead somewhere later.
    pub fn new(options: ClientOptions) -> Self {
        let once_a_second = || LogLimit::new(1);
        Self {
            shared: Arc::new(Shared {
                options,
                workers: Workers::new(),
                pairs: Pairs::new(),
                slots: Slots::new(affordable_visitors()),
                session: Mutex::new(None),
                own_dials: Mutex::new(HashSet::new()),
                stop: Stop::new(),
                logs: Logs {
                    local_failed: once_a_second(),
                    tunnel_failed: once_a_second(),
                    no_thread: once_a_second(),
                    no_key: Once::new(),
                },
                counts: Counts::new(affordable_visitors()),
            }),
        }
    }

    /// What stops this client.
    pub fn handle(&self) -> Handle {
        Handle::new(&self.shared)
    }

    /// Serves until it is stopped through its [`handle`](Client::handle). A server that is away
    /// is dialled again for ever. A dial under way when the client stops ends by itself, within
    /// 5 s for each address of the server's name.
    ///
    /// # Errors
    /// The system refuses the first thread.
    pub fn run(self) -> Result<(), Error> {
        let shared = self.shared.clone();
        self.shared
            .workers
            .start("control", move || shared.keep_connected())
            .map_err(Error::Thread)?;
        while self.shared.stop.sleep(SWEEP) {
            self.shared.pairs.sweep();
        }
        self.shared.pairs.wait();
        self.shared.workers.wait(LAST_WORDS);
        Ok(())
    }
}

impl Shared {
    /// One session after another, for ever.
    fn keep_connected(self: &Arc<Self>) {
        let mut backoff = Backoff::new(Instant::now());
        // Once: later dials follow a line that says when they will be.
        info!("connecting to {}", self.options.server);
        loop {
            let (level, why) = match self.connect_control(&mut backoff) {
                Ok(ended) => ended,
                Err(why) => (Level::Warn, why),
            };
            if self.stop.stopped() {
                return;
            }
            let pause = backoff.next(Instant::now(), random_fraction());
            log!(level, "{why}; trying again in {:.1} s", pause.as_secs_f64());
            if !self.stop.sleep(pause) {
                return;
            }
        }
    }

    /// Dials the control port, and reads lines until the link ends. Both results are a reason: why
    /// the session was lost, with the level to log it at, or why there was none.
    fn connect_control(self: &Arc<Self>, backoff: &mut Backoff) -> Result<(Level, String), String> {
        let ClientOptions {
            server: address,
            tunnel_port,
            local,
            key,
            pool,
            original,
            ..
        } = &self.options;
        let unreachable = |error| format!("could not reach the server: {error}");
        let control = Arc::new(net::dial(address).map_err(unreachable)?);
        let mut tunnel_addr = control.peer_addr().map_err(unreachable)?;
        if key.is_none() && !tunnel_addr.ip().to_canonical().is_loopback() {
            self.logs.no_key.call_once(|| {
                warn!("no --key-file: whoever is between here and {address} can read along, or be the server");
            });
        }

        let no_session = |why: NoSession| format!("no session with the server at {address}: {why}");
        let conn = Conn::new(control.clone());
        let answered = open_link(conn, key.as_ref(), *pool, *original).map_err(no_session)?;
        let Answered {
            mut lines,
            writer,
            first,
            welcome,
            bond,
        } = answered;
        let proto = Proto::agreed(welcome.as_ref());
        let welcome = welcome.map(|(_, welcome)| welcome);
        let told = welcome.as_ref().and_then(|welcome| welcome.tunnel);
        tunnel_addr.set_port(tunnel_port.or(told).unwrap_or(TUNNEL_PORT));
        if let Some(public) = welcome.as_ref().and_then(|welcome| welcome.public)
            && public == tunnel_addr.port()
        {
            return Err(no_session(NoSession::TunnelPortIsPublic(public)));
        }
        let sealed = if bond.is_some() { ", sealed" } else { "" };
        info!("connected to {address}: {proto}{sealed}; visitors go to {local}");

        let (to_server, to_write) = unbounded();
        let session = Arc::new(Session {
            control: control.clone(),
            tunnel_addr,
            proto,
            seen_as: welcome.and_then(|welcome| Some(welcome.client?.ip())),
            bond,
            tunnels: Mutex::new(Tunnels {
                spare: 0,
                idle: Vec::new(),
                served: false,
                cut: false,
                to_server: Some(to_server),
            }),
            none_spare: Condvar::new(),
        });
        *self.session.lock() = Some(session.clone());
        if self.stop.stopped() {
            // The stop may have come too early to find this session.
            session.end(Some(STOPPING));
        }
        let start = Instant::now();
        let (level, why) = self.serve(&session, writer, to_write, first, &mut lines);
        if start.elapsed() >= HEARTBEAT || session.tunnels.lock().served {
            *backoff = Backoff::new(Instant::now());
        }
        session.end(None);
        // The server, if it is there, closes them when it has read or said bye. One that it gave a
        // visitor before is still served, however far away the server is.
        session.wait_for_spare(match self.stop.stopped() {
            true => SILENCE,
            false => LAST_WORDS,
        });
        session.cut_idle();
        Ok((level, format!("lost the server at {address}: {why}")))
    }

    /// Does what the server says, until it says no more; returns why, and the level to log it at.
    fn serve(
        self: &Arc<Self>,
        session: &Arc<Session>,
        writer: Writer,
        to_write: Receiver<Line>,
        first: Line,
        lines: &mut Lines<Reader>,
    ) -> (Level, String) {
        let (client, owned) = (self.clone(), session.clone());
        let write = move || client.control_writer(&owned, writer, &to_write);
        if let Err(error) = self.workers.start("control_writer", write) {
            let why = format!("there is no thread to write to it: {error}");
            return (Level::Warn, why);
        }
        self.refill(session);
        let mut line = first;
        loop {
            match line {
                Line::New { .. } => self.one_more(session),
                Line::Bye { reason } => {
                    let planned = reason == Reason::Draining;
                    let level = if planned { Level::Info } else { Level::Warn };
                    let why = format!("it said bye, {}", reason.to_string().escape_debug());
                    return (level, why);
                }
                _ => {}
            }
            line = match lines.next_line_alive() {
                Ok(line) => line,
                Err(error) => return (Level::Warn, why_ended(&error)),
            };
        }
    }

    /// Lets the server know that this client lives, until the session ends. An original server is
    /// told nothing: it never reads, and would end up with a full buffer.
    fn control_writer(
        self: &Arc<Self>,
        session: &Arc<Session>,
        writer: Writer,
        to_write: &Receiver<Line>,
    ) {
        match session.proto {
            // Tunnels that could not be dialled, or that the server closed, are tried again at
            // this pace. If writing fails, the reader will report it.
            Proto::Tp1 { .. } => {
                let _ = write_lines(writer, to_write, || self.refill(session));
            }
            Proto::Original => while to_write.recv().is_ok() {},
        }
        // Wakes the thread that reads.
        let _ = session.control.shutdown(Shutdown::Both);
    }

    /// Dials tunnels until the pool is full.
    fn refill(self: &Arc<Self>, session: &Arc<Session>) {
        let pool = session.proto.pool();
        // Not for ever: dials that fail at once make room as fast as this adds to them.
        for _ in 0..pool {
            let Some(slot) = self.one_spare(session, pool) else {
                return;
            };
            if !self.start_combine(session, slot) {
                return;
            }
        }
    }

    /// Dials a tunnel for a visitor that waits.
    fn one_more(self: &Arc<Self>, session: &Arc<Session>) {
        if let Some(slot) = self.one_spare(session, MAX_SPARE) {
            self.start_combine(session, slot);
        } else {
            let log = &self.logs.tunnel_failed;
            log.say(|more| {
                warn!(
                    "no tunnel for one more visitor: there are as many as ulimit -n allows{more}"
                );
            });
        }
    }

    /// Counts one more spare tunnel, if there are fewer than `most`, and descriptors for its visitor.
    fn one_spare(&self, session: &Session, most: usize) -> Option<Slot> {
        let slot = self.slots.try_take()?;
        session.count_spare(most).then_some(slot)
    }

    fn start_combine(self: &Arc<Self>, session: &Arc<Session>, slot: Slot) -> bool {
        let (client, owned) = (self.clone(), session.clone());
        let work = move || {
            let mut next = Some(slot);
            while let Some(slot) = next {
                // A thread whose visitor has gone dials the next tunnel: another one need not be
                // woken.
                let served = client.combine(&owned, slot);
                let pool = owned.proto.pool();
                next = served.then(|| client.one_spare(&owned, pool)).flatten();
            }
        };
        let started = self.workers.start("tunnel", work);
        if let Err(error) = &started {
            session.tunnels.lock().spare -= 1;
            self.no_thread(error);
        }
        started.is_ok()
    }

    /// One tunnel: dialled, idle until its visitor comes, then joined with the local service until
    /// that visitor has gone. False if none came.
    fn combine(self: &Arc<Self>, session: &Arc<Session>, slot: Slot) -> bool {
        let Some((visitor, remote, expected)) = self.next_visitor(session, slot) else {
            return false;
        };
        match self.connect_local(session, &visitor) {
            Ok((local, own_dial)) => {
                let closing = self.join_conn(session, local, own_dial, remote, visitor);
                // A stop need not wait for the rest.
                drop(expected);
                if let Some(closing) = closing {
                    closing.wait();
                }
            }
            Err((reason, why)) => {
                net::abort(remote.socket());
                count(match reason {
                    Failure::TimedOut => &self.counts.timed_out,
                    _ => &self.counts.refused,
                });
                session.tell_failed(&visitor, reason);
                let log = &self.logs.local_failed;
                log.say(|more| warn!("{visitor}: cannot reach the local service: {why}{more}"));
            }
        }
        true
    }

    /// Dials a tunnel, and waits until the server gives it a visitor.
    fn next_visitor(&self, session: &Session, slot: Slot) -> Option<(Visitor, Conn, Expected)> {
        let to = session.tunnel_addr;
        let waited = match self.connect_remote(session) {
            Ok((remote, expected)) => match session.wait_for_visitor(remote, slot) {
                Ok((visitor, remote)) => Ok((visitor, remote, expected)),
                // Most likely it was superfluous.
                Err(error) => {
                    let level = match error.kind() {
                        io::ErrorKind::Other => Level::Warn,
                        _ => Level::Info,
                    };
                    let why = why_ended(&error);
                    Err((level, format!("idle tunnel to {to} ended: {why}")))
                }
            },
            Err(error) => Err((Level::Warn, format!("could not dial a tunnel: {error}"))),
        };
        let live = session.count_used();
        match waited {
            Ok(given) => Some(given),
            Err((level, why)) => {
                // All of them end with their session.
                if live {
                    let log = &self.logs.tunnel_failed;
                    log.say(|more| log!(level, "{why}{more}"));
                }
                None
            }
        }
    }

    /// Dials the local service, unless that leads back to the server.
    fn connect_local(
        self: &Arc<Self>,
        session: &Session,
        visitor: &Visitor,
    ) -> Result<(TcpStream, OwnDial), (Failure, String)> {
        let failed = |error: io::Error| (failure(&error), error.to_string());
        if self.is_own_dial(session, visitor) {
            let why = format!(
                "this visitor is this client's own connection to {}: --local leads back to the \
                 server's port for visitors",
                self.options.local
            );
            return Err((Failure::Loop, why));
        }
        let local = net::dial(&self.options.local).map_err(failed)?;
        let from = local.local_addr().map_err(failed)?;
        self.own_dials.lock().insert(from);
        // Until it is joined and has ended well, an end would be taken for a complete visit.
        net::reset_on_close(&local, true);
        Ok((local, OwnDial(self.clone(), from)))
    }

    /// True if a visitor is one of this client's connections to the local service. Behind a NAT the
    /// server sees another address, but most often the same port.
    fn is_own_dial(&self, session: &Session, visitor: &Visitor) -> bool {
        let Some(from) = visitor.address() else {
            return false;
        };
        let own_dials = self.own_dials.lock();
        own_dials.contains(&from)
            || (session.seen_as == Some(from.ip())
                && own_dials.iter().any(|own| own.port() == from.port()))
    }

    /// Dials the tunnel port, and names the session, after the handshake if there is a key.
    fn connect_remote(&self, session: &Session) -> io::Result<(Conn, Expected)> {
        let mut remote = match &session.bond {
            None => self.dial_again(session, || dial_tunnel(session))?,
            Some(bond) => self.dial_again(session, || {
                let mut remote = dial_tunnel(session)?;
                let sealed = seal_tunnel(&mut remote, bond);
                sealed
                    .map(|()| remote)
                    .map_err(|why| io::Error::other(why.to_string()))
            })?,
        };
        let expected = session.expect_visitor(&self.pairs)?;
        if let Proto::Tp1 { id, .. } = session.proto {
            send(&mut remote.writer, &Line::Tunnel { session: id })?;
        }
        Ok((remote, expected))
    }

    /// Dials until it works, as long as the session lives, but only so often: a visitor may wait for
    /// this tunnel.
    fn dial_again(
        &self,
        session: &Session,
        dial: impl Fn() -> io::Result<Conn>,
    ) -> io::Result<Conn> {
        let mut dialled = dial();
        for pause in REDIALS {
            let live = session.tunnels.lock().check_live().is_ok();
            if dialled.is_ok() || !live || !self.stop.sleep(pause) {
                break;
            }
            dialled = dial();
        }
        dialled
    }

    /// Joins a tunnel with the local service. One direction stays on this thread.
    fn join_conn(
        self: &Arc<Self>,
        session: &Arc<Session>,
        local: TcpStream,
        own_dial: OwnDial,
        remote: Conn,
        visitor: Visitor,
    ) -> Option<Closing> {
        let (up, down) = self.pairs.join(
            visitor,
            End {
                name: "server",
                is_program: true,
                conn: remote,
            },
            End {
                name: "local service",
                is_program: false,
                conn: Conn::new(Arc::new(local)),
            },
            self.options.linger,
        );
        let (client, session) = (self.clone(), session.clone());
        let work = move || {
            // Behind the visitor's first bytes, and only if those that leave leave too little.
            if session.is_low() {
                client.refill(&session);
            }
            if let Some(closing) = down.copy() {
                closing.wait();
            }
        };
        if let Err(error) = self.workers.start("down", work) {
            self.no_thread(&error);
        }
        set_name("up");
        let closing = up.copy();
        drop(own_dial);
        closing
    }

    fn no_thread(&self, error: &io::Error) {
        let log = &self.logs.no_thread;
        log.say(|more| warn!("closed a connection, no thread for it: {error}{more}"));
    }

    fn end_session(&self) {
        if let Some(session) = self.session.lock().take() {
            session.end(Some(STOPPING));
        }
    }
}

impl Running for Shared {
    fn stop(self: Arc<Self>, drain: Duration) {
        self.pairs.end_after(drain);
        // No visitor is expected any more when `run` looks; and again for a session that begins in
        // this moment.
        self.end_session();
        self.stop.stop();
        self.end_session();
    }

    fn status(&self) -> Status {
        let session = self.session.lock().clone();
        let session = session.filter(|it| it.tunnels.lock().to_server.is_some());
        let (waiting, idle) = session.as_ref().map_or((0, 0), |session| {
            let tunnels = session.tunnels.lock();
            let idle = tunnels.idle.len();
            (tunnels.spare.saturating_sub(idle), idle)
        });
        let id = session.map(|session| match session.proto {
            Proto::Original => "original".to_owned(),
            Proto::Tp1 { id, .. } => id.short(),
        });
        self.counts.status(id, &self.pairs, waiting, idle)
    }
}

impl Session {
    /// Counts one more spare tunnel, if there are fewer than `most`.
    fn count_spare(&self, most: usize) -> bool {
        let mut tunnels = self.tunnels.lock();
        let more = tunnels.spare < most && tunnels.to_server.is_some();
        tunnels.spare += usize::from(more);
        more
    }

    /// True if half of the pool is gone.
    fn is_low(&self) -> bool {
        self.tunnels.lock().spare <= self.proto.pool() / 2
    }

    /// Counts one spare tunnel less; false if the session has ended.
    fn count_used(&self) -> bool {
        let mut tunnels = self.tunnels.lock();
        tunnels.spare -= 1;
        if tunnels.spare == 0 {
            self.none_spare.notify_all();
        }
        tunnels.to_server.is_some()
    }

    /// Waits until no tunnel is spare, but not longer than that.
    fn wait_for_spare(&self, limit: Duration) {
        let mut tunnels = self.tunnels.lock();
        let some = |tunnels: &mut Tunnels| tunnels.spare > 0;
        self.none_spare.wait_while_for(&mut tunnels, some, limit);
    }

    /// To be called before a tunnel says which session it belongs to: the server may then give it a
    /// visitor, whom a client that stops must not forget. An error once the session has ended.
    fn expect_visitor(&self, pairs: &Arc<Pairs>) -> io::Result<Expected> {
        let tunnels = self.tunnels.lock();
        tunnels.check_live()?;
        Ok(pairs.expect())
    }

    /// Waits until the server gives the tunnel a visitor.
    fn wait_for_visitor(&self, remote: Conn, slot: Slot) -> io::Result<(Visitor, Conn)> {
        if let Proto::Original = self.proto {
            self.tunnels.lock().served = true;
            return Ok((Visitor::new(None, Some(slot)), remote));
        }
        let (socket, writer) = (remote.socket().clone(), remote.writer);
        {
            let mut tunnels = self.tunnels.lock();
            if tunnels.cut {
                return Err(ended());
            }
            tunnels.idle.push(socket.clone());
        }
        let mut lines = Lines::new(remote.reader);
        let address = loop {
            match lines.next_line() {
                Ok(Line::New { visitor }) => break Ok(visitor),
                line @ Ok(Line::Bye { .. }) => {
                    break Err(io::Error::other(no_server(line, &lines).to_string()));
                }
                line @ Ok(_) if lines.foreign().is_some() => {
                    break Err(io::Error::other(no_server(line, &lines).to_string()));
                }
                Ok(_) => {}
                Err(error) => break Err(error),
            }
        };
        let mut tunnels = self.tunnels.lock();
        let place = tunnels.idle.iter().position(|it| Arc::ptr_eq(it, &socket));
        // Not among them any more: the session's end has aborted it.
        tunnels.idle.swap_remove(place.ok_or_else(ended)?);
        tunnels.served |= address.is_ok();
        drop(tunnels);
        // What came behind the line is the visitor's.
        let reader = lines.into_reader();
        Ok((Visitor::new(address?, Some(slot)), Conn { reader, writer }))
    }

    /// Ends the control link, with these last words. No tunnel is dialled any more; visitors that
    /// are joined go on.
    fn end(&self, last_words: Option<Line>) {
        let to_server = self.tunnels.lock().to_server.take();
        if let (Some(to_server), Some(line)) = (to_server, last_words) {
            let _ = to_server.send(line);
        }
    }

    /// Tells a server that understands it why a visitor's tunnel was aborted.
    fn tell_failed(&self, visitor: &Visitor, reason: Failure) {
        if let (Some(visitor), Some(to_server)) =
            (visitor.address(), &self.tunnels.lock().to_server)
        {
            let _ = to_server.send(Line::Failed { visitor, reason });
        }
    }

    /// Ends every idle tunnel.
    fn cut_idle(&self) {
        let mut tunnels = self.tunnels.lock();
        tunnels.cut = true;
        for idle in tunnels.idle.drain(..) {
            // Not a shutdown: if the server hands it to a visitor in this very moment, the visitor
            // must not take that for an empty answer.
            net::abort(&idle);
        }
    }
}

impl Proto {
    /// How many tunnels are kept ready.
    fn pool(self) -> usize {
        match self {
            Proto::Original => 0,
            Proto::Tp1 { pool, .. } => pool,
        }
    }

    fn agreed(welcome: Option<&(usize, Welcome)>) -> Self {
        match welcome {
            None => Proto::Original,
            Some((pool, welcome)) => Proto::Tp1 {
                id: welcome.session,
                pool: *pool,
            },
        }
    }
}

impl fmt::Display for Proto {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Proto::Original => write!(f, "it does not speak tp/1, one dial a visitor"),
            Proto::Tp1 { id, pool } => write!(f, "session {}, pool {pool}", id.short()),
        }
    }
}

fn dial_tunnel(session: &Session) -> io::Result<Conn> {
    session.tunnels.lock().check_live()?;
    let remote = net::dial_one(session.tunnel_addr)?;
    // Once the server has given it a visitor, an end is a complete and empty answer.
    net::reset_on_close(&remote, true);
    Ok(Conn::new(Arc::new(remote)))
}

/// Why a dial of the local service failed, for the server.
fn failure(error: &io::Error) -> Failure {
    use io::ErrorKind::{
        AddrNotAvailable, ConnectionRefused, HostUnreachable, NetworkUnreachable, NotFound,
    };
    match error.kind() {
        ConnectionRefused => Failure::Refused,
        NotFound => Failure::UnknownHost,
        HostUnreachable | NetworkUnreachable => Failure::Unreachable,
        AddrNotAvailable => Failure::Exhausted,
        _ if timed_out(error) => Failure::TimedOut,
        _ => Failure::Error,
    }
}

/// Where a connection to the local service comes from, known as long as this lives.
struct OwnDial(Arc<Shared>, SocketAddr);

impl Drop for OwnDial {
    fn drop(&mut self) {
        self.0.own_dials.lock().remove(&self.1);
    }
}

impl Tunnels {
    /// An error once the session has ended.
    fn check_live(&self) -> io::Result<()> {
        match self.to_server {
            Some(_) => Ok(()),
            None => Err(ended()),
        }
    }
}

/// What ends a tunnel that comes too late.
fn ended() -> io::Error {
    io::ErrorKind::ConnectionAborted.into()
}

/// When the control port is dialled again: the first time soon, later less and less often, until there
/// was a session that was of use.
struct Backoff {
    longest: Duration,
    /// When the last dial began, or the last session ended.
    since: Instant,
}

impl Backoff {
    fn new(now: Instant) -> Self {
        Self {
            longest: FIRST_PAUSE,
            since: now,
        }
    }

    /// The pause from now on, with a random fraction from 0 to 1: clients that lost their server in
    /// the same moment must not come back in the same. Dials begin in a steady rhythm, however long
    /// they take to fail.
    fn next(&mut self, now: Instant, fraction: f64) -> Duration {
        let pause = self.longest.mul_f64(0.5 + 0.5 * fraction);
        self.longest = (self.longest * 2).min(LONGEST_PAUSE);
        let left = (self.since + pause).saturating_duration_since(now);
        let left = left.max(FIRST_PAUSE / 2);
        self.since = now + left;
        left
    }
}

/// From 0 to 1.
fn random_fraction() -> f64 {
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
                assert!(apart <= Duration::from_secs(10), "{apart:?}");
                now += apart;
            }
            assert!((5..=20).contains(&dials), "{dials} dials");
        }
        let now = Instant::now();
        let [early, late] = [0.1, 0.9].map(|fraction| Backoff::new(now).next(now, fraction));
        assert!(early < late, "no jitter");
    }
}
