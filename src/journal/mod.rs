//! What is told: log lines and their limits, counts, status. One method an event; nothing is logged
//! elsewhere.

use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Once};
use std::time::{Duration, Instant};

use log::{Level, debug, error, info, log, warn};
use parking_lot::Mutex;

use crate::address::Address;
use crate::door::{NoSession, Refusal};
use crate::options::ServerOptions;
use crate::os::listener::Opening;
use crate::relay::{Pairs, Visit, Visitor};
use crate::session::of_client::{LocalError, NoVisitor};
use crate::session::{Ended, Proto};
use crate::wire::line::{Failure, Reason};

mod limit;
mod status;

pub use status::Status;

use limit::{LogLimit, SourceLogLimit};

/// Lines a second for what is told with `-v`, for clients that have a key, and for visitors that were
/// served: the log of a busy hour stays readable, and a flood of visitors does not become one of
/// lines.
const MANY_LINES: u32 = 100;

/// A server that is full says so this often: it may be full for hours.
const FULL_LINES: Duration = Duration::from_secs(60);

/// What a server or a client tells, and counts. Whatever strangers can cause has a limit for each kind
/// of line, and if the line names an address, for each source.
pub struct Journal {
    since: Instant,
    max: usize,
    refused: AtomicU64,
    timed_out: AtomicU64,
    last_error: Mutex<Option<String>>,
    limits: Limits,
    no_key: Once,
}

struct Limits {
    accept_failed: LogLimit,
    full: LogLimit,
    no_thread: LogLimit,
    link_refused: SourceLogLimit,
    tunnel_refused: SourceLogLimit,
    client_came: SourceLogLimit,
    client_left: SourceLogLimit,
    timed_out: SourceLogLimit,
    local_failed: LogLimit,
    tunnel_failed: LogLimit,
    visitor_left: LogLimit,
    detail: LogLimit,
}

impl Journal {
    /// Of a server or a client for so many visitors at a time. A client that has a key is no
    /// stranger.
    pub fn new(max: usize, sealed: bool) -> Self {
        let once_a_second = || LogLimit::new(1);
        let of_each_source = || SourceLogLimit::new(1);
        let client_lines = if sealed { MANY_LINES } else { 1 };
        Self {
            since: Instant::now(),
            max,
            refused: AtomicU64::new(0),
            timed_out: AtomicU64::new(0),
            last_error: Mutex::new(None),
            limits: Limits {
                accept_failed: once_a_second(),
                full: LogLimit::within(FULL_LINES, 1),
                no_thread: once_a_second(),
                link_refused: of_each_source(),
                tunnel_refused: of_each_source(),
                client_came: SourceLogLimit::new(client_lines),
                client_left: SourceLogLimit::new(client_lines),
                timed_out: of_each_source(),
                local_failed: once_a_second(),
                tunnel_failed: once_a_second(),
                visitor_left: LogLimit::new(MANY_LINES),
                detail: LogLimit::new(MANY_LINES),
            },
            no_key: Once::new(),
        }
    }

    /// What a server or a client does now, and has done.
    pub fn status(
        &self,
        session: Option<String>,
        pairs: &Pairs,
        waiting: usize,
        idle: usize,
    ) -> Status {
        let (joined, joined_total, [bytes_up, bytes_down]) = pairs.totals();
        Status {
            uptime: self.since.elapsed(),
            session,
            joined,
            max: self.max,
            joined_total,
            waiting,
            idle,
            bytes_up,
            bytes_down,
            refused: self.refused.load(Ordering::Relaxed),
            timed_out: self.timed_out.load(Ordering::Relaxed),
            last_error: self.last_error.lock().clone(),
        }
    }
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// The threads and connections of both programs.
impl Journal {
    /// A connection was closed, as there was no thread for this.
    pub fn no_thread(&self, job: &str, error: &io::Error) {
        let limit = &self.limits.no_thread;
        limit.say(|more| warn!("closed a connection, no thread for {job}: {error}{more}"));
    }

    /// What the [pairs](Pairs::new) call.
    pub fn tells_of_visits(self: &Arc<Self>) -> impl Fn(&Visitor, Visit) + Send + Sync + 'static {
        let journal = self.clone();
        move |visitor, visit| journal.visitor_left(visitor, &visit)
    }

    /// A pair has ended.
    pub fn visitor_left(&self, visitor: &Visitor, visit: &Visit) {
        let ([up, down], seconds) = (visit.moved, visit.time.as_secs_f64());
        self.limits.visitor_left.say(|more| {
            let why = visit.aborted;
            let why = why.map_or(String::new(), |why| format!(", aborted: {why}"));
            info!("{visitor}: {up} bytes up, {down} bytes down in {seconds:.3} s{why}{more}");
        });
    }
}

/// A thread panicked, which is a fault in this program.
pub fn panicked(job: &str) {
    error!("the {job} thread panicked; its sockets are closed, all else goes on");
}

/// The server's ports.
impl Journal {
    /// The process has descriptors for fewer visitors than it may take.
    pub fn few_descriptors(wanted: usize, affordable: usize) {
        warn!("--max-conns {wanted}: descriptors suffice for {affordable}; raise ulimit -n");
    }

    /// Something is to be known while a port is opened.
    pub fn opening(option: &str, opening: &Opening) {
        match opening {
            Opening::InUse(address, left) => {
                let left = left.as_secs_f64();
                warn!("{option}: {address} is in use, waiting for it for up to {left:.0} s");
            }
            Opening::HandedOver(address) => {
                info!("{option}: {address} is handed over by the server that ends");
            }
        }
    }

    /// The server listens.
    pub fn listening(
        options: &ServerOptions,
        public: SocketAddr,
        tunnel: SocketAddr,
        control: SocketAddr,
    ) {
        info!("listening on {public} for visitors");
        info!("listening on {tunnel} for tunnels");
        info!("listening on {control} for the control link");
        let sealed = !options.keys.is_empty();
        if options.insecure && sealed {
            warn!("--insecure changes nothing: a client needs the key");
        } else if options.insecure {
            warn!(
                "--insecure: whoever reaches {tunnel} or {control} can become the client or read \
                 along"
            );
        }
        if options.original && sealed {
            warn!("--original changes nothing: a client needs the key");
        }
    }

    /// An accept failed, and is tried again.
    pub fn accept_failed(&self, option: &str, error: &io::Error) {
        let limit = &self.limits.accept_failed;
        limit.say(|more| warn!("{option}: failed accept, trying again: {error}{more}"));
    }

    /// Another server has taken over the ports.
    pub fn handed_over() {
        info!("the next server takes over");
    }

    /// The ports could not be offered to another server.
    pub fn hand_over_failed(&self, error: &io::Error) {
        let limit = &self.limits.detail;
        limit.say(|more| debug!("could not hand over: {error}{more}"));
    }
}

/// The server's client and its tunnels.
impl Journal {
    /// A control link was refused.
    pub fn refused_link(&self, from: SocketAddr, refusal: &Refusal) {
        count(&self.refused);
        let limit = &self.limits.link_refused;
        limit.say(from, |more| {
            warn!("refused control link from {from}: {refusal}{more}");
        });
    }

    /// A tunnel was refused.
    pub fn refused_tunnel(&self, from: SocketAddr, refusal: &Refusal) {
        count(&self.refused);
        let limit = &self.limits.tunnel_refused;
        limit.say(from, |more| {
            warn!("refused tunnel from {from}: {refusal}{more}");
        });
    }

    /// A session began: with this key, counted from 1, of so many, and in the place of another client.
    pub fn client_came(
        &self,
        client: SocketAddr,
        proto: Proto,
        key: Option<(usize, usize)>,
        replaced: Option<SocketAddr>,
    ) {
        let sealed = match key {
            None => String::new(),
            Some((_, 1)) => ", sealed".to_owned(),
            Some((place, count)) => format!(", sealed with key {place} of {count}"),
        };
        let replaced = replaced.map_or(String::new(), |before| {
            format!(", and takes the place of {before}")
        });
        let what = match proto {
            Proto::Original => "does not speak tp/1".to_owned(),
            Proto::Tp1 { .. } => format!("{proto}{sealed}{replaced}"),
        };
        let limit = &self.limits.client_came;
        limit.say(client, |more| info!("client {client} came: {what}{more}"));
    }

    /// A session ended.
    pub fn client_left(&self, client: SocketAddr, ended: &Ended) {
        let limit = &self.limits.client_left;
        limit.say(client, |more| info!("client {client} left: {ended}{more}"));
    }

    /// A tunnel is idle.
    pub fn tunnel_idle(&self, from: SocketAddr) {
        let limit = &self.limits.detail;
        limit.say(|more| debug!("tunnel from {from} is idle{more}"));
    }

    /// One idle tunnel more than the client was granted was closed.
    pub fn tunnel_superfluous(&self) {
        let limit = &self.limits.detail;
        limit.say(|more| debug!("closed a superfluous tunnel{more}"));
    }
}

/// The server's visitors.
impl Journal {
    /// A visitor came.
    pub fn visitor_came(&self, visitor: SocketAddr) {
        let limit = &self.limits.detail;
        limit.say(|more| debug!("visitor {visitor} came{more}"));
    }

    /// There is no place for a further visitor.
    pub fn full(&self) {
        let max = self.max;
        self.limits.full.say(|more| {
            warn!(
                "all {max} places for visitors are taken (--max-conns, ulimit -n): who comes now \
                 waits until others leave{more}"
            );
        });
    }

    /// A visitor waits, and nobody is there who could dial a tunnel.
    pub fn no_client(&self) {
        let limit = &self.limits.detail;
        limit.say(|more| debug!("no client is there to ask for a tunnel{more}"));
    }

    /// A visitor's tunnel was dead; the visitor waits for another.
    pub fn dead_tunnel(&self, visitor: SocketAddr) {
        let limit = &self.limits.detail;
        limit.say(|more| debug!("visitor {visitor}: its tunnel was closed before it came{more}"));
    }

    /// A visitor waited for too long. There was this client, or none.
    pub fn timed_out(&self, visitor: SocketAddr, time: Duration, client: Option<SocketAddr>) {
        count(&self.timed_out);
        let why = match client {
            Some(client) => format!("client {client} dialled no tunnel for it"),
            None => "no client is connected".to_owned(),
        };
        let limit = &self.limits.timed_out;
        limit.say(visitor, |more| {
            warn!("closed visitor {visitor} after {time:?}: {why}{more}");
        });
    }

    /// A client came to the port for visitors, and waited for too long.
    pub fn client_at_public_port(&self, client: SocketAddr) {
        count(&self.timed_out);
        let limit = &self.limits.timed_out;
        limit.say(client, |more| {
            warn!(
                "closed {client}: it is a tpclient, and this is the port for visitors \
                 (--control-port, --tunnel-port of tpclient){more}"
            );
        });
    }

    /// The client aborted a visitor's tunnel.
    pub fn client_failed(&self, visitor: SocketAddr, reason: &Failure) {
        count(&self.refused);
        let reason = reason.to_string();
        let (limit, reason) = (&self.limits.local_failed, reason.escape_debug());
        limit.say(|more| {
            warn!(
                "visitor {visitor}: the client could not reach the local service: {reason}{more}"
            );
        });
    }
}

/// The client's session.
impl Journal {
    /// The first dial of the server begins. Later ones follow a line that says when they will.
    pub fn connecting(server: &Address) {
        info!("connecting to {server}");
    }

    /// The server is on another host, and there is no key. Said once.
    pub fn no_key(&self, server: &Address) {
        self.no_key.call_once(|| {
            warn!(
                "no --key-file: whoever is between here and {server} can read along, or be the server"
            );
        });
    }

    /// A session began.
    pub fn connected(&self, server: &Address, proto: Proto, sealed: bool, local: &Address) {
        *self.last_error.lock() = None;
        let sealed = if sealed { ", sealed" } else { "" };
        info!("connected to {server}: {proto}{sealed}; visitors go to {local}");
    }

    /// There is no session, and the server is dialled again after a pause.
    pub fn no_session(&self, server: &Address, why: &NoSession, pause: Duration) {
        let what = match why {
            NoSession::Unreachable(error) => format!("could not reach the server: {error}"),
            why => format!("no session with the server at {server}: {why}"),
        };
        self.again(Level::Warn, what, pause);
    }

    /// A session ended, and the server is dialled again after a pause.
    pub fn lost(&self, server: &Address, ended: &Ended, pause: Duration) {
        let planned = matches!(ended, Ended::Bye(Reason::Draining));
        let level = if planned { Level::Info } else { Level::Warn };
        self.again(
            level,
            format!("lost the server at {server}: {ended}"),
            pause,
        );
    }

    fn again(&self, level: Level, what: String, pause: Duration) {
        log!(
            level,
            "{what}; trying again in {:.1} s",
            pause.as_secs_f64()
        );
        *self.last_error.lock() = Some(what);
    }

    /// A tunnel got no visitor. All of them end with their session, which is no news.
    pub fn no_visitor(&self, tunnel_addr: SocketAddr, why: &NoVisitor) {
        let limit = &self.limits.tunnel_failed;
        match why {
            NoVisitor::SessionEnded => {}
            NoVisitor::Dial(error) => {
                limit.say(|more| warn!("could not dial a tunnel: {error}{more}"));
            }
            NoVisitor::NotServer(why) => {
                limit.say(|more| warn!("idle tunnel to {tunnel_addr} ended: {why}{more}"));
            }
            // Most likely it was superfluous.
            NoVisitor::Ended(ended) => {
                limit.say(|more| info!("idle tunnel to {tunnel_addr} ended: {ended}{more}"));
            }
        }
    }

    /// A visitor waits for a tunnel, and there are no descriptors for one.
    pub fn no_descriptors(&self) {
        self.limits.tunnel_failed.say(|more| {
            warn!("no tunnel for one more visitor: there are as many as ulimit -n allows{more}");
        });
    }

    /// A visitor's tunnel was aborted.
    pub fn local_failed(&self, visitor: &Visitor, error: &LocalError) {
        count(match error.reason {
            Failure::TimedOut => &self.timed_out,
            _ => &self.refused,
        });
        let (limit, why) = (&self.limits.local_failed, &error.why);
        limit.say(|more| warn!("{visitor}: cannot reach the local service: {why}{more}"));
    }
}

#[cfg(test)]
pub mod tests {
    use log::{LevelFilter, Log, Metadata, Record};
    use parking_lot::Mutex;

    static RECORDED: Mutex<Vec<String>> = Mutex::new(Vec::new());

    struct Recorder;

    impl Log for Recorder {
        fn enabled(&self, _: &Metadata) -> bool {
            true
        }

        fn log(&self, record: &Record) {
            RECORDED.lock().push(record.args().to_string());
        }

        fn flush(&self) {}
    }

    /// What is logged from now on, by all tests of this process.
    pub fn record() -> &'static Mutex<Vec<String>> {
        if log::set_logger(&Recorder).is_ok() {
            log::set_max_level(LevelFilter::Info);
        }
        &RECORDED
    }
}
