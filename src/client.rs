//! The client, in the original's functions: the control link, and a tunnel for each visitor.

use std::fmt;
use std::io::{self, Read};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, unbounded};
use log::{Level, info, log, warn};
use parking_lot::Mutex;

use crate::address::Address;
use crate::control::{Lines, send, why_ended, write_lines};
use crate::error::Error;
use crate::limits::LogLimit;
use crate::net;
use crate::options::ClientOptions;
use crate::protocol::{BUSY, DRAINING, Line, PROTO, SILENCE, SessionId};
use crate::relay::{End, Pairs, SWEEP, Visitor};
use crate::stop::{Handle, Stop};
use crate::workers::{Workers, set_name};

/// Between two dials of the control port: at first, and after many failures.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(10));

/// Tunnels that wait for a visitor or are being dialled. A server never has more visitors waiting
/// than it serves at a time, 4096 by default.
const MAX_SPARE: usize = 8192;

/// What a stopping client gives its threads for their last words. They need microseconds, unless a
/// dial is under way.
const LAST_WORDS: Duration = Duration::from_millis(250);

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
        Handle::new(&self.shared, Shared::stop)
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
        let (shortest, longest) = BACKOFF;
        let mut backoff = shortest;
        loop {
            let why = match self.connect_control() {
                Ok(lost) => {
                    backoff = shortest;
                    lost
                }
                Err(failed) => failed,
            };
            if self.stop.stopped() {
                return;
            }
            // Clients that lost their server in the same moment must not come back in the same.
            let pause = backoff.mul_f64(0.5 + 0.5 * random_fraction());
            warn!("{why}; trying again in {:.1} s", pause.as_secs_f64());
            if !self.stop.sleep(pause) {
                return;
            }
            backoff = (backoff * 2).min(longest);
        }
    }

    /// Dials the control port, and reads lines until the link ends. Both answers are a reason: why
    /// the session was lost, or why there was none.
    fn connect_control(self: &Arc<Self>) -> Result<String, String> {
        let ClientOptions {
            server,
            control_port,
            tunnel_port,
            local,
            pool,
            ..
        } = &self.options;
        let address = Address::new(server, *control_port);
        let unreachable = |error| format!("could not reach the server: {error}");
        let control = Arc::new(net::dial(&address).map_err(unreachable)?);
        let mut tunnel_addr = control.peer_addr().map_err(unreachable)?;
        tunnel_addr.set_port(*tunnel_port);

        let mut lines = Lines::new(&*control);
        let first = say_hello(&control, &mut lines, *pool).map_err(|error| why_ended(&error));
        let agreed = first.and_then(|first| Ok((Proto::agreed(&first, *pool)?, first)));
        let (proto, first) =
            agreed.map_err(|why| format!("no session with the server at {address}: {why}"))?;
        info!("connected to {address}: {proto}; visitors go to {local}");

        let (to_server, to_write) = unbounded();
        let session = Arc::new(Session {
            control: control.clone(),
            tunnel_addr,
            proto,
            tunnels: Mutex::new(Tunnels {
                spare: 0,
                idle: Vec::new(),
                to_server: Some(to_server),
            }),
        });
        *self.session.lock() = Some(session.clone());
        if self.stop.stopped() {
            // The stop may have come too early to find this session.
            session.end(Some(Line::bye(DRAINING)));
        }
        let why = self.serve(&session, to_write, first, &mut lines);
        session.end(None);
        Ok(format!("lost the server at {address}: {why}"))
    }

    /// Does what the server says, until it says no more; the answer is why.
    fn serve(
        self: &Arc<Self>,
        session: &Arc<Session>,
        to_write: Receiver<Line>,
        first: Line,
        lines: &mut Lines<impl Read>,
    ) -> String {
        let (client, owned) = (self.clone(), session.clone());
        let writer = move || client.control_writer(&owned, &to_write);
        if let Err(error) = self.workers.start("control_writer", writer) {
            return format!("there is no thread to write to it: {error}");
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

    /// Lets the server know that this client lives, until the session ends. An original server is
    /// told nothing: it never reads, and would end up with a full buffer.
    fn control_writer(self: &Arc<Self>, session: &Arc<Session>, to_write: &Receiver<Line>) {
        match session.proto {
            // Tunnels that could not be dialled, or that the server closed, are tried again at
            // this pace. If writing fails, the reader will report it.
            Proto::Tp1 { .. } => {
                let _ = write_lines(&*session.control, to_write, || self.refill(session));
            }
            Proto::Original => while to_write.recv().is_ok() {},
        }
        // Wakes the thread that reads.
        let _ = session.control.shutdown(Shutdown::Both);
    }

    /// Dials tunnels until the pool is full.
    fn refill(self: &Arc<Self>, session: &Arc<Session>) {
        let Proto::Tp1 { pool, .. } = session.proto else {
            return;
        };
        // Not for ever: dials that fail at once make room as fast as this adds to them.
        for _ in 0..pool {
            if !session.count_spare(pool) || !self.start_combine(session) {
                return;
            }
        }
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
        let to = session.tunnel_addr;
        let waited = match self.connect_remote(session) {
            Ok(remote) => match session.wait_for_visitor(&remote) {
                Ok((visitor, first)) => Ok((visitor, first, remote)),
                // Most likely it was superfluous.
                Err(error) => {
                    let why = why_ended(&error);
                    Err((Level::Info, format!("idle tunnel to {to} ended: {why}")))
                }
            },
            Err(error) => Err((Level::Warn, format!("could not dial a tunnel: {error}"))),
        };
        let live = session.count_used();
        let (visitor, first, remote) = match waited {
            Ok(ready) => ready,
            Err((level, why)) if live => {
                let limit = &self.logs.tunnel_failed;
                return limit.say(|more| log!(level, "{why}{more}"));
            }
            // All of them end with their session.
            Err(_) => return,
        };
        match self.connect_local() {
            Ok(local) => self.join_conn(session, local, remote, visitor, &first),
            Err(error) => {
                net::abort(&remote);
                let log = &self.logs.local_failed;
                log.say(|more| warn!("{visitor}: no local service: {error}{more}"));
                self.refill(session);
            }
        }
    }

    /// Dials the local service.
    fn connect_local(&self) -> io::Result<TcpStream> {
        net::dial(&self.options.local)
    }

    /// Dials the tunnel port, and names the session.
    fn connect_remote(&self, session: &Session) -> io::Result<Arc<TcpStream>> {
        let remote = net::dial_one(session.tunnel_addr)?;
        // Once the server has given it a visitor, an end is a complete and empty answer.
        net::reset_on_close(&remote, true);
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
                name: "server",
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
        if let Some(session) = self.session.lock().take() {
            session.end(Some(Line::bye(DRAINING)));
        }
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

    /// Counts one spare tunnel less; false if the session has ended.
    fn count_used(&self) -> bool {
        let mut tunnels = self.tunnels.lock();
        tunnels.spare -= 1;
        tunnels.to_server.is_some()
    }

    /// Waits until the server gives the tunnel a visitor; with it comes what was read of the
    /// visitor's own bytes.
    fn wait_for_visitor(&self, remote: &Arc<TcpStream>) -> io::Result<(Visitor, Vec<u8>)> {
        if let Proto::Original = self.proto {
            return Ok((Visitor::new(None, None), Vec::new()));
        }
        let ended = || io::Error::from(io::ErrorKind::ConnectionAborted);
        {
            let mut tunnels = self.tunnels.lock();
            tunnels.to_server.as_ref().ok_or_else(ended)?;
            tunnels.idle.push(remote.clone());
        }
        let mut lines = Lines::new(&**remote);
        let address = loop {
            match lines.next_line() {
                Ok(Line::New { visitor }) => break Ok(visitor),
                Ok(_) => {}
                Err(error) => break Err(error),
            }
        };
        let idle = &mut self.tunnels.lock().idle;
        let place = idle.iter().position(|it| Arc::ptr_eq(it, remote));
        // Not among them any more: the session's end has aborted it.
        idle.swap_remove(place.ok_or_else(ended)?);
        Ok((Visitor::new(address?, None), lines.rest().to_vec()))
    }

    /// Ends the control link, with these last words, and every idle tunnel. Visitors that are
    /// joined go on.
    fn end(&self, last_words: Option<Line>) {
        let mut tunnels = self.tunnels.lock();
        if let (Some(to_server), Some(line)) = (tunnels.to_server.take(), last_words) {
            let _ = to_server.send(line);
        }
        for idle in tunnels.idle.drain(..) {
            // Not a shutdown: if the server hands it to a visitor in this very moment, the visitor
            // must not take that for an empty answer.
            net::abort(&idle);
        }
    }
}

impl Proto {
    /// What the server's first line leads to, or why to nothing.
    fn agreed(first: &Line, asked: usize) -> Result<Self, String> {
        match first {
            Line::Hello {
                proto: PROTO,
                pool,
                session: Some(id),
            } => {
                let (id, pool) = (*id, asked.min(*pool));
                Ok(Proto::Tp1 { id, pool })
            }
            Line::Hello { .. } => Err("it speaks another version of the protocol".to_owned()),
            Line::Bye { reason } if reason == BUSY => {
                Err("it has another client, and takes one only".to_owned())
            }
            Line::Bye { reason } => Err(format!("it said bye, {}", reason.escape_debug())),
            _ => Ok(Proto::Original),
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

/// Says hello, and reads the server's first line.
fn say_hello(control: &TcpStream, lines: &mut Lines<impl Read>, pool: usize) -> io::Result<Line> {
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
