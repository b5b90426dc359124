//! The client, in the original's functions: the control link, and a tunnel for each visitor.

use std::collections::HashMap;
use std::io;
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use log::{debug, info, warn};
use parking_lot::Mutex;

use crate::address::Address;
use crate::control::{Lines, send, why_ended};
use crate::error::Error;
use crate::limits::LogLimit;
use crate::net;
use crate::options::ClientOptions;
use crate::protocol::{DRAINING, HEARTBEAT, Line, PROTO, SILENCE, SessionId};
use crate::relay::{End, Pairs, Visitor};
use crate::stop::{Handle, Stop};
use crate::workers::{Workers, set_name};

/// Between two dials of the control port: at first, and after many failures.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(10));

/// Tunnels that wait for a visitor or are being dialled. A server never has more visitors waiting
/// than it serves at a time, 4096 by default.
const MAX_SPARE: usize = 8192;

/// The half of the tunnel that runs in the LAN.
///
/// ```no_run
/// use tunnel_proxy::{Client, ClientOptions};
///
/// let client = Client::new(ClientOptions {
///     server: "tunnel.example.org".to_owned(),
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
    /// The session with the server, while there is one.
    session: Mutex<Option<Arc<Session>>>,
    stop: Stop,
    logs: Logs,
}

/// What visitors, or the server, can cause to be logged without end.
struct Logs {
    local_failed: LogLimit,
    tunnel_failed: LogLimit,
    no_thread: LogLimit,
}

struct Session {
    control: Arc<TcpStream>,
    /// On the host that the control link leads to, whatever the server's name says by now.
    tunnel_addr: SocketAddr,
    proto: Proto,
    tunnels: Mutex<Tunnels>,
    ended: Stop,
}

#[derive(Clone, Copy)]
enum Proto {
    /// The server is an original one: tunnels are raw, and dialled on demand.
    Original,
    /// `tp/1`, with this many idle tunnels granted.
    Tp1 { id: SessionId, pool: usize },
}

#[derive(Default)]
struct Tunnels {
    /// Tunnels that are idle or being dialled, one thread each.
    spare: usize,
    /// Those that are idle, to be shut down with their session.
    idle: HashMap<u64, Arc<TcpStream>>,
    next_key: u64,
}

impl Client {
    /// A client that does nothing before [`run`](Client::run).
    pub fn new(options: ClientOptions) -> Self {
        let once_a_second = || LogLimit::new(1);
        Self {
            shared: Arc::new(Shared {
                options,
                workers: Workers::new(),
                pairs: Pairs::new(),
                session: Mutex::new(None),
                stop: Stop::new(),
                logs: Logs {
                    local_failed: once_a_second(),
                    tunnel_failed: once_a_second(),
                    no_thread: once_a_second(),
                },
            }),
        }
    }

    /// What stops this client.
    pub fn handle(&self) -> Handle {
        let shared = Arc::downgrade(&self.shared);
        Handle::new(move |drain| {
            if let Some(shared) = shared.upgrade() {
                shared.stop(drain);
            }
        })
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
        self.shared.stop.wait();
        self.shared.pairs.wait();
        Ok(())
    }
}

impl Shared {
    /// One session after another, for ever.
    fn keep_connected(self: &Arc<Self>) {
        let (shortest, longest) = BACKOFF;
        let mut backoff = shortest;
        loop {
            let why = match self.connect_control() {
                Ok(ended) => {
                    backoff = shortest;
                    format!("the session has ended: {ended}")
                }
                Err(failed) => failed,
            };
            // Clients that lost their server in the same moment must not come back in the same.
            let pause = backoff.mul_f64(0.5 + 0.5 * random_fraction());
            if self.stop.stopped() {
                return;
            }
            warn!("{why}; trying again in {:.1} s", pause.as_secs_f64());
            if !self.stop.sleep(pause) {
                return;
            }
            backoff = (backoff * 2).min(longest);
        }
    }

    /// Dials the control port, and reads lines until the link ends. Both answers are a reason: why
    /// the session has ended, or why there was none.
    fn connect_control(self: &Arc<Self>) -> Result<String, String> {
        let address = Address::new(&self.options.server, self.options.control_port);
        let unreachable = |error| format!("could not reach the server at {address}: {error}");
        let control = address
            .resolve()
            .and_then(|found| net::dial(&found))
            .map_err(unreachable)?;
        let mut tunnel_addr = control.peer_addr().map_err(unreachable)?;
        tunnel_addr.set_port(self.options.tunnel_port);
        let control = Arc::new(control);
        let mut lines = Lines::new(&*control);
        let no_session = |error| {
            let why = why_ended(&error);
            format!("no session with the server at {address}: {why}")
        };
        let first = say_hello(&control, &mut lines, self.options.pool).map_err(no_session)?;
        let proto = match &first {
            Line::Hello {
                proto: PROTO,
                pool,
                session: Some(id),
            } => Proto::Tp1 {
                id: *id,
                pool: (*pool).min(self.options.pool),
            },
            Line::Hello { .. } => return Err(format!("{address} speaks another tp version")),
            Line::Bye { reason } => {
                let reason = reason.escape_debug();
                return Err(format!("the server at {address} said bye, {reason}"));
            }
            _ => Proto::Original,
        };
        match proto {
            Proto::Tp1 { id, pool } => {
                info!(
                    "connected to {address}: session {}, pool {pool}",
                    id.short()
                );
            }
            Proto::Original => info!("connected to {address}, an original server"),
        }
        let session = Arc::new(Session {
            control: control.clone(),
            tunnel_addr,
            proto,
            tunnels: Mutex::new(Tunnels::default()),
            ended: Stop::new(),
        });
        if !self.begin(&session) {
            return Ok("this client stops".to_owned());
        }
        let why = self.serve(&session, first, &mut lines);
        session.end();
        Ok(why)
    }

    /// Makes a session the one that a stop ends; false if the stop came before.
    fn begin(&self, session: &Arc<Session>) -> bool {
        let mut current = self.session.lock();
        *current = (!self.stop.stopped()).then(|| session.clone());
        current.is_some()
    }

    /// Does what the server says, until it says no more; the answer is why.
    fn serve(
        self: &Arc<Self>,
        session: &Arc<Session>,
        first: Line,
        lines: &mut Lines<&TcpStream>,
    ) -> String {
        if let Proto::Tp1 { .. } = session.proto {
            let (client, session) = (self.clone(), session.clone());
            let heartbeat = move || client.heartbeat(&session);
            if let Err(error) = self.workers.start("heartbeat", heartbeat) {
                return format!("there is no thread for its heartbeat: {error}");
            }
        }
        self.refill(session);
        let mut line = first;
        loop {
            match line {
                Line::New { .. } => self.one_more(session),
                Line::Bye { reason } => return format!("it said bye, {}", reason.escape_debug()),
                _ => {}
            }
            line = match lines.next_line() {
                Ok(line) => line,
                Err(error) => return why_ended(&error),
            };
        }
    }

    /// Lets the server know that this client lives. An original server is told nothing: it never
    /// reads, and would end up with a full buffer.
    fn heartbeat(self: &Arc<Self>, session: &Arc<Session>) {
        while session.ended.sleep(HEARTBEAT) {
            if send(&*session.control, &Line::Hi).is_err() {
                // Ends the thread that reads, which reports it.
                let _ = session.control.shutdown(Shutdown::Both);
                return;
            }
            // Tunnels that could not be dialled, or that the server closed, are tried again at
            // this pace.
            self.refill(session);
        }
    }

    /// Dials tunnels until the pool is full.
    fn refill(self: &Arc<Self>, session: &Arc<Session>) {
        let Proto::Tp1 { pool, .. } = session.proto else {
            return;
        };
        while session.count_spare(pool) && self.start_combine(session) {}
    }

    /// Dials a tunnel for a visitor that waits.
    fn one_more(self: &Arc<Self>, session: &Arc<Session>) {
        if session.count_spare(MAX_SPARE) {
            self.start_combine(session);
        } else {
            let log = &self.logs.tunnel_failed;
            log.say(|more| warn!("no more than {MAX_SPARE} tunnels are dialled at once{more}"));
        }
    }

    fn start_combine(self: &Arc<Self>, session: &Arc<Session>) -> bool {
        let (client, owned) = (self.clone(), session.clone());
        let started = self.workers.start("tunnel", move || client.combine(&owned));
        if let Err(error) = &started {
            session.tunnels.lock().spare -= 1;
            self.no_thread(error);
        }
        started.is_ok()
    }

    /// One tunnel: dialled, idle until its visitor comes, then joined with the local service.
    fn combine(self: &Arc<Self>, session: &Arc<Session>) {
        let remote = match self.connect_remote(session) {
            Ok(remote) => remote,
            Err(error) => {
                session.tunnels.lock().spare -= 1;
                let log = &self.logs.tunnel_failed;
                return log.say(|more| warn!("could not dial a tunnel: {error}{more}"));
            }
        };
        let waited = session.wait_for_visitor(&remote);
        session.tunnels.lock().spare -= 1;
        let (visitor, first) = match waited {
            Ok(visitor) => visitor,
            // It was superfluous, or its session has ended.
            Err(error) => return debug!("an idle tunnel ended: {error}"),
        };
        match self.connect_local() {
            Ok(local) => self.join_conn(session, local, remote, visitor, &first),
            Err(error) => {
                net::abort(&remote);
                let log = &self.logs.local_failed;
                log.say(|more| warn!("{visitor}: no local service: {error}{more}"));
            }
        }
    }

    /// Dials the local service.
    fn connect_local(&self) -> io::Result<TcpStream> {
        let local = &self.options.local;
        let named = |error: io::Error| io::Error::new(error.kind(), format!("{local}: {error}"));
        net::dial(&local.resolve().map_err(named)?)
    }

    /// Dials the tunnel port, and names the session.
    fn connect_remote(&self, session: &Session) -> io::Result<Arc<TcpStream>> {
        let remote = net::dial(&[session.tunnel_addr])?;
        if let Proto::Tp1 { id, .. } = session.proto {
            send(&remote, &Line::Tunnel { session: id })?;
        }
        Ok(Arc::new(remote))
    }

    /// Joins a tunnel with the local service. One direction stays on this thread.
    fn join_conn(
        self: &Arc<Self>,
        session: &Arc<Session>,
        local: TcpStream,
        remote: Arc<TcpStream>,
        visitor: Visitor,
        first: &[u8],
    ) {
        let (up, down) = self.pairs.join(
            visitor,
            End {
                name: "tunnel",
                socket: remote,
            },
            End {
                name: "local service",
                socket: Arc::new(local),
            },
            self.options.linger,
        );
        let (client, session) = (self.clone(), session.clone());
        let work = move || {
            // The tunnel that this visitor took is replaced while its service works, not before
            // its first bytes are on their way.
            client.refill(&session);
            down.copy(&[]);
        };
        if let Err(error) = self.workers.start("down", work) {
            self.no_thread(&error);
        }
        set_name("up");
        up.copy(first);
    }

    fn no_thread(&self, error: &io::Error) {
        let log = &self.logs.no_thread;
        log.say(|more| warn!("closed a connection, no thread for it: {error}{more}"));
    }

    /// See [`Handle::stop`].
    fn stop(&self, drain: Duration) {
        self.pairs.end_after(drain);
        self.stop.stop();
        let Some(session) = self.session.lock().take() else {
            return;
        };
        if let Proto::Tp1 { .. } = session.proto {
            let _ = send(&*session.control, &Line::bye(DRAINING));
        }
        session.end();
    }
}

impl Session {
    /// Counts one more spare tunnel, if there are fewer than `most`.
    fn count_spare(&self, most: usize) -> bool {
        let mut tunnels = self.tunnels.lock();
        let more = tunnels.spare < most && !self.ended.stopped();
        tunnels.spare += usize::from(more);
        more
    }

    /// Waits until the server gives the tunnel a visitor; with it comes what was read of the
    /// visitor's own bytes.
    fn wait_for_visitor(&self, remote: &Arc<TcpStream>) -> io::Result<(Visitor, Vec<u8>)> {
        let visitor = |address| Visitor::new(address, None);
        if let Proto::Original = self.proto {
            return Ok((visitor(None), Vec::new()));
        }
        let key = self.add_idle(remote)?;
        let mut lines = Lines::new(&**remote);
        let address = loop {
            match lines.next_line() {
                Ok(Line::New { visitor }) => break Ok(visitor),
                Ok(_) => {}
                Err(error) => break Err(error),
            }
        };
        // Without its key the session's end has shut it down meanwhile.
        let ours = self.tunnels.lock().idle.remove(&key).is_some();
        match address {
            Ok(address) if ours => Ok((visitor(address), lines.rest().to_vec())),
            Ok(_) => Err(io::ErrorKind::ConnectionAborted.into()),
            Err(error) => Err(error),
        }
    }

    fn add_idle(&self, remote: &Arc<TcpStream>) -> io::Result<u64> {
        let mut tunnels = self.tunnels.lock();
        if self.ended.stopped() {
            return Err(io::ErrorKind::ConnectionAborted.into());
        }
        let key = tunnels.next_key;
        tunnels.next_key += 1;
        tunnels.idle.insert(key, remote.clone());
        Ok(key)
    }

    /// Ends the control link and every idle tunnel; visitors that are joined go on.
    fn end(&self) {
        let mut tunnels = self.tunnels.lock();
        self.ended.stop();
        for (_, idle) in tunnels.idle.drain() {
            let _ = idle.shutdown(Shutdown::Both);
        }
        let _ = self.control.shutdown(Shutdown::Both);
    }
}

/// Says hello, and reads the server's first line.
fn say_hello(control: &TcpStream, lines: &mut Lines<&TcpStream>, pool: usize) -> io::Result<Line> {
    control.set_write_timeout(Some(SILENCE))?;
    control.set_read_timeout(Some(SILENCE))?;
    let hello = Line::Hello {
        proto: PROTO,
        pool,
        session: None,
    };
    send(control, &hello)?;
    lines.next_line()
}

/// From 0 to 1.
fn random_fraction() -> f64 {
    getrandom::u32().map_or(0.5, |number| f64::from(number) / f64::from(u32::MAX))
}
