//! What a server or a client tells: log lines and their limits, counts, status. Each event has a
//! method, and nothing is logged elsewhere but in `cli`.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Once};
use std::time::{Duration, Instant};

use log::Level::{self, Debug, Info, Warn};
use log::{error, info, warn};
use parking_lot::Mutex;

use crate::address::Address;
use crate::door::{NoHeader, NoSession, Refusal, Rule, Unwelcome};
use crate::options::ServerOptions;
use crate::os::listener::Opening;
use crate::relay::{Aborted, Pairs, Visit, Visitor};
use crate::service::{MAX_SERVICES, Service};
use crate::session::of_client::{LocalError, NoVisitor, Session};
use crate::session::{Ended, Proto};
use crate::status::snapshot::Snapshot;
use crate::wire::line::{Failure, Reason};

mod limit;
mod lines;
mod status;

pub use status::{ServiceStatus, Status};

use limit::{LogLimit, SourceLogLimit};
use lines::Lines;

/// The lines a second for details (`-v`), for clients that have a key, and for visitors who were
/// served. So the log of a busy hour stays readable, and a flood of visitors is no flood of lines.
const MANY_LINES: u32 = 100;

/// The time between two lines that say that a server is full, as it may be for hours.
const FULL_LINES: Duration = Duration::from_secs(60);

/// The word for visitors for whom the system had no thread.
const NO_THREAD: &str = "no-thread";

/// What a server or a client tells and counts. Each kind of line that strangers can cause has a limit,
/// and one for each source if the line names an address: nobody can fill the disk or hide others.
pub struct Journal {
    since: Instant,
    max: usize,
    refused: Mutex<Refused>,
    timed_out: AtomicU64,
    dialled: AtomicU64,
    /// Of each server that the client has no session with, the one that was lost last at the end.
    last_errors: Mutex<Vec<(Address, String)>>,
    lines: Arc<Lines>,
    limits: Limits,
    no_key: Once,
}

/// What was refused, by where it failed and why: a link or tunnel at the server's door, or a visitor there
/// or at the local service. All words are this program's own.
type Refused = BTreeMap<(Place, &'static str), u64>;

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Place {
    Door,
    Visitor,
    Local,
}

struct Limits {
    accept_failed: LogLimit,
    full: LogLimit,
    no_thread: LogLimit,
    link_refused: SourceLogLimit,
    tunnel_refused: SourceLogLimit,
    client_came: SourceLogLimit,
    client_left: SourceLogLimit,
    unserved: SourceLogLimit,
    visitor_came: LogLimit,
    visitor_refused: SourceLogLimit,
    header_refused: SourceLogLimit,
    timed_out: SourceLogLimit,
    local_failed: LogLimit,
    tunnel_failed: LogLimit,
    visitor_left: LogLimit,
    detail: LogLimit,
}

impl Journal {
    /// The journal of a server or a client for at most `max` visitors at a time. With a key
    /// (`sealed`), a client is no stranger, and may cause more lines. The last lines are kept if a
    /// status page is to show them.
    pub fn new(max: usize, sealed: bool, keeps_lines: bool) -> Self {
        let lines = &Lines::new(keeps_lines);
        let once_a_second = || LogLimit::new(lines, 1);
        let of_each_source = || SourceLogLimit::new(lines, 1);
        let client_lines = if sealed { MANY_LINES } else { 1 };
        Self {
            since: Instant::now(),
            max,
            refused: Mutex::new(BTreeMap::new()),
            timed_out: AtomicU64::new(0),
            dialled: AtomicU64::new(0),
            lines: lines.clone(),
            last_errors: Mutex::new(Vec::new()),
            limits: Limits {
                accept_failed: once_a_second(),
                full: LogLimit::within(lines, FULL_LINES, 1),
                no_thread: once_a_second(),
                link_refused: of_each_source(),
                tunnel_refused: of_each_source(),
                client_came: SourceLogLimit::new(lines, client_lines),
                client_left: SourceLogLimit::new(lines, client_lines),
                unserved: SourceLogLimit::new(lines, MAX_SERVICES as u32),
                visitor_came: LogLimit::new(lines, MANY_LINES),
                visitor_refused: of_each_source(),
                header_refused: of_each_source(),
                timed_out: of_each_source(),
                local_failed: once_a_second(),
                tunnel_failed: once_a_second(),
                visitor_left: LogLimit::new(lines, MANY_LINES),
                detail: LogLimit::new(lines, MANY_LINES),
            },
            no_key: Once::new(),
        }
    }

    /// The journal of a server. What it may refuse is counted from 0: who looks at the counts only now and
    /// then, as Prometheus does, would take the first ones for counts from before.
    pub fn of_server(self) -> Self {
        self.count_from_0(Place::Door, &Refusal::WORDS);
        self.count_from_0(Place::Visitor, &Rule::WORDS);
        self.count_from_0(Place::Visitor, &NoHeader::WORDS);
        self.of_client()
    }

    /// The same for a client.
    pub fn of_client(self) -> Self {
        self.count_from_0(Place::Visitor, &[NO_THREAD]);
        self.count_from_0(Place::Local, &Failure::WORDS);
        self
    }

    fn count_from_0(&self, place: Place, words: &[&'static str]) {
        let mut refused = self.refused.lock();
        for word in words {
            refused.entry((place, *word)).or_default();
        }
    }

    /// Returns what a server or a client does now and has done, but for what waits and is idle.
    pub fn status(&self, sessions: Vec<String>, pairs: &Pairs) -> Status {
        let services = pairs.totals();
        Status {
            uptime: self.since.elapsed(),
            sessions,
            joined: services.values().map(|it| it.joined).sum(),
            max: self.max,
            joined_total: services.values().map(|it| it.joined_total).sum(),
            waiting: 0,
            idle: 0,
            bytes_up: services.values().map(|it| it.bytes_up).sum(),
            bytes_down: services.values().map(|it| it.bytes_down).sum(),
            services,
            refused: self.refused.lock().values().sum(),
            timed_out: self.timed_out.load(Ordering::Relaxed),
            last_error: self.last_errors.lock().last().map(|(_, why)| why.clone()),
        }
    }
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// What the status page shows.
impl Journal {
    /// The status page is there.
    pub fn status_page(&self, addr: SocketAddr) {
        self.say(Info, format_args!("status at http://{addr}/"));
        if !addr.ip().is_loopback() {
            let what = "--insecure-status: whoever reaches it sees who comes, and the log";
            self.say(Warn, format_args!("{what}"));
        }
    }

    /// Another program has the port of the status page, such as one that ends.
    pub fn status_port_in_use(&self, address: &Address) {
        let what = format_args!("--status: {address} is in use, trying again until it is free");
        self.say(Warn, what);
    }

    /// Fills in what the journal knows of a snapshot.
    pub fn fill(&self, snapshot: &mut Snapshot) {
        let refused = self.refused.lock();
        let refused = refused.iter().map(|((place, word), count)| match place {
            Place::Door => ((*word).to_owned(), *count),
            Place::Visitor => (format!("visitor-{word}"), *count),
            Place::Local => (format!("local-{word}"), *count),
        });
        snapshot.refused = refused.collect();
        snapshot.dialled = self.dialled.load(Ordering::Relaxed);
        snapshot.log = self.lines.last();
        snapshot.log_left_out = self.lines.left_out();
    }

    fn count_refused(&self, place: Place, word: &'static str) {
        *self.refused.lock().entry((place, word)).or_default() += 1;
    }

    /// A tunnel was dialled, and has named its session, of which this is the count.
    pub fn tunnel_dialled(&self, of_session: &AtomicU64) {
        count(&self.dialled);
        count(of_session);
    }
}

/// The threads and connections of both programs.
impl Journal {
    /// A connection was closed, as there was no thread for this.
    pub fn no_thread(&self, job: &str, error: &io::Error) {
        let what = format_args!(
            "closed a connection, no thread for {job} (raise TasksMax or ulimit -u): {error}"
        );
        self.limits.no_thread.say(Warn, what);
    }

    /// Returns what the [pairs](Pairs::new) call when one of them has ended.
    pub fn tells_of_visits(self: &Arc<Self>) -> impl Fn(&Visitor, Visit) + Send + Sync + 'static {
        let journal = self.clone();
        move |visitor, visit| journal.visitor_left(visitor, &visit)
    }

    /// A pair has ended.
    pub fn visitor_left(&self, visitor: &Visitor, visit: &Visit) {
        if let Some(Aborted::NoThread) = visit.aborted {
            self.count_refused(Place::Visitor, NO_THREAD);
        }
        let ([up, down], seconds) = (visit.moved, visit.time.as_secs_f64());
        let why = visit.aborted;
        let why = why.map_or(String::new(), |why| format!(", aborted: {why}"));
        let what =
            format_args!("{visitor}: {up} bytes up, {down} bytes down in {seconds:.3} s{why}");
        self.limits.visitor_left.say(Info, what);
    }

    fn say(&self, level: Level, what: fmt::Arguments) {
        self.lines.say(level, what);
    }

    /// Something that is logged with `-v` only.
    fn detail(&self, what: fmt::Arguments) {
        self.limits.detail.say(Debug, what);
    }
}

/// What a client lacks that does not offer this service.
fn local_option(service: &Service) -> String {
    format!("(--local {}HOST:PORT of tpclient)", service.option())
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

    /// A port is in use, or is taken over, while it is opened.
    pub fn opening(option: &str, opening: &Opening) {
        match opening {
            Opening::InUse(address, left) => {
                let left = left.as_secs_f64();
                warn!("{option}: {address} is in use, waiting for it for up to {left:.0} s");
            }
            Opening::HandedOver(address) => {
                info!("{option}: {address} is handed over by the server that ends");
            }
            Opening::Shared(address) => warn!(
                "{option}: the server that has handed over {address} still has visitors who wait; \
                 going on beside it"
            ),
        }
    }

    /// The server listens.
    pub fn listening<'a>(
        &self,
        options: &ServerOptions,
        public: impl Iterator<Item = (&'a Service, SocketAddr)>,
        tunnel: SocketAddr,
        control: SocketAddr,
    ) {
        for (service, public) in public {
            let of = service.of();
            self.say(Info, format_args!("listening on {public} for visitors{of}"));
        }
        self.say(Info, format_args!("listening on {tunnel} for tunnels"));
        self.say(
            Info,
            format_args!("listening on {control} for the control link"),
        );
        let sealed = !options.keys.is_empty();
        if options.insecure && sealed {
            self.say(
                Warn,
                format_args!("--insecure changes nothing: a client needs the key"),
            );
        } else if options.insecure {
            let what = format_args!(
                "--insecure: whoever reaches {tunnel} or {control} can become the client or read \
                 along"
            );
            self.say(Warn, what);
        }
        if options.original && sealed {
            self.say(
                Warn,
                format_args!("--original changes nothing: a client needs the key"),
            );
        }
    }

    /// An accept failed, and is tried again.
    pub fn accept_failed(&self, option: &str, error: &io::Error) {
        let what = format_args!("{option}: failed accept, trying again: {error}");
        self.limits.accept_failed.say(Warn, what);
    }

    /// Another server has taken over the ports.
    pub fn handed_over(&self) {
        self.say(Info, format_args!("the next server takes over"));
    }

    /// The ports could not be offered to another server.
    pub fn hand_over_failed(&self, error: &io::Error) {
        let hint = match error.kind() {
            io::ErrorKind::AddrInUse => "another program has the name of the local socket for that",
            _ => "a sandbox must allow AF_UNIX",
        };
        let what = format_args!(
            "could not offer the ports to a next server, so visitors are refused until one listens; \
             {hint}: {error}"
        );
        self.say(Warn, what);
    }
}

/// The server's clients and their tunnels.
impl Journal {
    /// A control link was refused, or a tunnel at its port.
    pub fn refused_link(&self, from: SocketAddr, refusal: &Refusal) {
        if let Refusal::Tunnel(why) = refusal {
            return self.refused_tunnel(from, why);
        }
        self.count_refused(Place::Door, refusal.word());
        let what = format_args!("refused control link from {from}: {refusal}");
        self.limits.link_refused.say(from, Warn, what);
    }

    /// A tunnel was refused.
    pub fn refused_tunnel(&self, from: SocketAddr, refusal: &Refusal) {
        self.count_refused(Place::Door, refusal.word());
        let what = format_args!("refused tunnel from {from}: {refusal}");
        self.limits.tunnel_refused.say(from, Warn, what);
    }

    /// A session began. `key` is the client's, counted from 1, and the number of the server's keys;
    /// `replaced` is the client whose place it takes.
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
            Proto::Original => "does not speak tp/2".to_owned(),
            Proto::Tp2 { .. } => format!("{proto}{sealed}{replaced}"),
        };
        let what = format_args!("client {client} came: {what}");
        self.limits.client_came.say(client, Info, what);
    }

    /// With this client, there is no one yet that offers the service.
    pub fn unserved(&self, client: SocketAddr, service: &Service) {
        let (of, option) = (service.of(), local_option(service));
        let what = format_args!("no client serves visitors{of} {option}");
        self.limits.unserved.say(client, Warn, what);
    }

    /// A session ended.
    pub fn client_left(&self, client: SocketAddr, ended: &Ended) {
        let what = format_args!("client {client} left: {ended}");
        self.limits.client_left.say(client, Info, what);
    }

    /// A tunnel is idle.
    pub fn tunnel_idle(&self, from: SocketAddr) {
        self.detail(format_args!("tunnel from {from} is idle"));
    }

    /// The oldest idle tunnel was closed, as there were more than visitors could ever take.
    pub fn tunnel_superfluous(&self) {
        self.detail(format_args!("closed a superfluous tunnel"));
    }
}

/// The server's visitors.
impl Journal {
    /// A visitor came.
    pub fn visitor_came(&self, visitor: SocketAddr, service: &Service, is_news: bool) {
        let of = service.of();
        let what = format_args!("visitor {visitor}{of} came");
        match is_news {
            true => self.limits.visitor_came.say(Info, what),
            false => self.detail(what),
        }
    }

    /// A visitor may not come in. Programs that ban addresses read this line.
    pub fn refused_visitor(&self, unwelcome: &Unwelcome) {
        self.count_refused(Place::Visitor, unwelcome.rule.word());
        let what = format_args!("refused visitor from {unwelcome}");
        let from = SocketAddr::new(unwelcome.address, 0);
        self.limits.visitor_refused.say(from, Warn, what);
    }

    /// A proxy has not said where a visitor comes from.
    pub fn refused_through(&self, proxy: SocketAddr, why: &NoHeader) {
        self.count_refused(Place::Visitor, why.word());
        let what = format_args!("refused visitor through {proxy}: {why}");
        self.limits.header_refused.say(proxy, Warn, what);
    }

    /// There is no place for a further visitor.
    pub fn full(&self) {
        let max = self.max;
        let what = format_args!(
            "all {max} places for visitors are taken (--max-conns, ulimit -n): who comes now waits \
             until others leave"
        );
        self.limits.full.say(Warn, what);
    }

    /// A visitor waits, and no client is there to dial a tunnel.
    pub fn no_client(&self) {
        self.detail(format_args!("no client is there to ask for a tunnel"));
    }

    /// A visitor's tunnel was dead; the visitor waits for another.
    pub fn dead_tunnel(&self, visitor: SocketAddr) {
        self.detail(format_args!(
            "visitor {visitor}: its tunnel was closed before it came"
        ));
    }

    /// A visitor waited for too long. `connected` is how many clients there are, and `serve` are those
    /// that offer the service.
    pub fn timed_out(
        &self,
        visitor: SocketAddr,
        service: &Service,
        time: Duration,
        connected: usize,
        serve: &[SocketAddr],
    ) {
        count(&self.timed_out);
        let why = match (connected, serve) {
            (0, _) => "no client is connected".to_owned(),
            (_, []) => format!("no client offers it {}", local_option(service)),
            (_, [client]) => format!("client {client} dialled no tunnel for it"),
            (_, clients) => format!("{} clients dialled no tunnel for it", clients.len()),
        };
        let of = service.of();
        let what = format_args!("closed visitor {visitor}{of} after {time:?}: {why}");
        self.limits.timed_out.say(visitor, Warn, what);
    }

    /// A client came to the port for visitors, and waited for too long.
    pub fn client_at_public_port(&self, client: SocketAddr) {
        count(&self.timed_out);
        let what = format_args!(
            "closed {client}: it is a tpclient, and this is the port for visitors \
             (--control-port, --tunnel-port of tpclient)"
        );
        self.limits.timed_out.say(client, Warn, what);
    }

    /// A client could not bring a visitor to the local service, who comes to nothing by that.
    pub fn client_failed(&self, visitor: SocketAddr, reason: &Failure) {
        self.count_refused(Place::Local, reason.word());
        self.local_unreached(visitor, reason, "");
    }

    /// A client could not bring a visitor to the local service, who is given to another one.
    pub fn given_to_another(&self, visitor: SocketAddr, reason: &Failure) {
        self.local_unreached(visitor, reason, "; another client gets the visitor");
    }

    fn local_unreached(&self, visitor: SocketAddr, reason: &Failure, then: &str) {
        let reason = reason.to_string();
        let reason = reason.escape_debug();
        let what = format_args!(
            "visitor {visitor}: the client could not reach the local service: {reason}{then}"
        );
        self.limits.local_failed.say(Warn, what);
    }
}

/// The client's session.
impl Journal {
    /// The first dial of a server begins. Each later one is announced by the line before it.
    pub fn connecting(&self, server: &Address) {
        self.say(Info, format_args!("connecting to {server}"));
    }

    /// The server is on another host, and there is no key. This is said once.
    pub fn no_key(&self, server: &Address) {
        self.no_key.call_once(|| {
            let what = format_args!(
                "no --key-file: whoever is between here and {server} can read along, or be the server"
            );
            self.say(Warn, what);
        });
    }

    /// A session began. Says where visitors come to and where they go to, and what one side offers and
    /// the other does not.
    pub fn connected(
        &self,
        server: &Address,
        session: &Session,
        local: &BTreeMap<Service, Address>,
    ) {
        self.last_errors.lock().retain(|(lost, _)| lost != server);
        let (proto, sealed) = (session.proto, session.bond.is_some());
        let sealed = if sealed { ", sealed" } else { "" };
        self.say(Info, format_args!("connected to {server}: {proto}{sealed}"));
        let host = &server.host;
        for (service, local) in local {
            let name = match service.has_name() {
                true => format!(" ({service})"),
                false => String::new(),
            };
            match session.public.get(service) {
                Some(Some(port)) => {
                    let public = Address::new(host, *port);
                    self.say(Info, format_args!("{public} → {local}{name}"));
                }
                Some(None) => self.say(Info, format_args!("visitors go to {local}{name}")),
                None => {
                    let (of, option) = (service.of(), service.option());
                    let what = format_args!(
                        "the server has no port for visitors{of} (--public {option}PORT of tpserver)"
                    );
                    self.say(Warn, what);
                }
            }
        }
        let missing = session
            .public
            .iter()
            .filter(|(service, _)| !local.contains_key(service));
        for (service, _) in missing.filter(|(_, port)| port.is_some()) {
            let (of, option) = (service.of(), service.option());
            let what = format_args!(
                "the server has visitors{of}, which this client does not serve (--local {option}HOST:PORT)"
            );
            self.say(Info, what);
        }
    }

    /// There is no session, and the server is dialled again after a pause.
    pub fn no_session(&self, server: &Address, why: &NoSession, pause: Duration) {
        let what = match why {
            NoSession::Unreachable(error) => format!("could not reach the server: {error}"),
            why => format!("no session with the server at {server}: {why}"),
        };
        self.again(server, Warn, what, pause);
    }

    /// A session ended, and the server is dialled again after a pause.
    pub fn lost(&self, server: &Address, ended: &Ended, pause: Duration) {
        let planned = matches!(ended, Ended::Bye(Reason::Draining));
        let level = if planned { Info } else { Warn };
        let what = format!("lost the server at {server}: {ended}");
        self.again(server, level, what, pause);
    }

    fn again(&self, server: &Address, level: Level, what: String, pause: Duration) {
        let seconds = pause.as_secs_f64();
        self.say(
            level,
            format_args!("{what}; trying again in {seconds:.1} s"),
        );
        let mut last = self.last_errors.lock();
        last.retain(|(lost, _)| lost != server);
        last.push((server.clone(), what));
    }

    /// A tunnel got no visitor. The end of its session is no news: all of its tunnels end with it.
    pub fn no_visitor(&self, tunnel_addr: SocketAddr, why: &NoVisitor) {
        let (level, what) = match why {
            NoVisitor::SessionEnded => return,
            NoVisitor::Dial(error) => (Warn, format!("could not dial a tunnel: {error}")),
            NoVisitor::NotServer(why) => {
                (Warn, format!("idle tunnel to {tunnel_addr} ended: {why}"))
            }
            NoVisitor::Ended(Ended::Closed) => {
                return self.detail(format_args!("the server closed an idle tunnel"));
            }
            NoVisitor::Ended(ended) => {
                (Info, format!("idle tunnel to {tunnel_addr} ended: {ended}"))
            }
        };
        self.limits.tunnel_failed.say(level, format_args!("{what}"));
    }

    /// A visitor waits for a tunnel, and there are no descriptors for one, or too many wait already.
    pub fn no_descriptors(&self) {
        let what = format_args!(
            "no tunnel for one more visitor: there are as many as this client or its ulimit -n allows"
        );
        self.limits.tunnel_failed.say(Warn, what);
    }

    /// The client aborted a visitor's tunnel, as it could not reach the local service.
    pub fn local_failed(&self, visitor: &Visitor, error: &LocalError) {
        match &error.reason {
            Failure::TimedOut => count(&self.timed_out),
            reason => self.count_refused(Place::Local, reason.word()),
        }
        let what = format_args!("{visitor}: cannot reach the local service: {}", error.why);
        self.limits.local_failed.say(Warn, what);
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

    /// Returns what all tests of this process log from now on.
    pub fn record() -> &'static Mutex<Vec<String>> {
        if log::set_logger(&Recorder).is_ok() {
            log::set_max_level(LevelFilter::Info);
        }
        &RECORDED
    }
}
