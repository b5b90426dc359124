//! The server, in the original's functions and in their order: the control link, the visitors, the
//! tunnels, and the matcher that joins them.

use std::fmt;
use std::io;
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded, unbounded};
use log::{debug, info, warn};
use parking_lot::Mutex;

use crate::conn::{Conn, Reader, Writer};
use crate::conn_match::{ConnList, Placed};
use crate::control::{Lines, send, why_ended, write_lines};
use crate::door::{Door, Link, Refusal, is_client};
use crate::error::Error;
use crate::hand_over::{Inherited, Successor};
use crate::limits::{Slot, Slots, affordable_visitors};
use crate::listener::Listener;
use crate::lobby::{Lobby, Place};
use crate::log_limit::{LogLimit, SourceLogLimit};
use crate::net;
use crate::openings::Openings;
use crate::options::ServerOptions;
use crate::protocol::{Failure, Line, MAX_POOL, NEW, PROTO, Reason, SessionId, Welcome};
use crate::relay::{End, Pairs, SWEEP, Visitor};
use crate::secure::Bond;
use crate::status::{Counts, Status, count};
use crate::stop::{Handle, Running, Stop};
use crate::workers::Workers;

/// After a failed accept: short for a visitor, long for a processor.
const ACCEPT_PAUSE: Duration = Duration::from_millis(75);

/// What the release thread can sleep: never nothing, and within what an `Instant` can hold.
const PAIR_TIMEOUTS: (Duration, Duration) = (
    Duration::from_millis(10),
    Duration::from_secs(366 * 24 * 60 * 60),
);

/// A server that was told to stop keeps the client's ports for as long as visitors wait for a tunnel.
/// The next one waits as long for them, but not for ever, and some.
const MAX_PATIENCE: Duration = Duration::from_secs(60);
const PATIENCE: Duration = Duration::from_secs(1);

/// How long a server that was told to stop serves on, for the next one to take over its ports: many
/// looks of one that waits for them, on a busy host.
const SUCCESSION: Duration = Duration::from_millis(300);

/// Lines a second that strangers can cause with `-v`, and clients that have a key.
const DETAIL_LINES: u32 = 100;

/// A server that is full says so this often: it may be full for hours.
const FULL_LINES: Duration = Duration::from_secs(60);

/// A visitor that has waited for a second, many round trips, has lost its tunnel on the way. At most
/// so many are asked for again at a time: if all are lost, more would not help.
const ASK_AGAIN: (Duration, usize) = (Duration::from_secs(1), MAX_POOL);

/// What a stopping server gives its threads for their last words. They need microseconds, if
/// nothing is wrong.
const LAST_WORDS: Duration = Duration::from_millis(250);

/// The half of the tunnel that runs on the host with the public address.
///
/// ```
/// use tunnel_proxy::{Address, Server, ServerOptions};
///
/// let any = Address::new("127.0.0.1", 0);
/// let server = Server::bind(ServerOptions {
///     public: any.clone(),
///     tunnel: any.clone(),
///     control: any,
///     ..ServerOptions::default()
/// })?;
/// println!("visitors come to {}", server.public_addr());
/// let handle = server.handle();
/// let running = std::thread::spawn(move || server.run());
/// handle.stop(std::time::Duration::ZERO);
/// running.join().unwrap()?;
/// # Ok::<(), tunnel_proxy::Error>(())
/// ```
pub struct Server {
    shared: Arc<Shared>,
    conn_list_map_update: Receiver<()>,
}

struct Shared {
    options: ServerOptions,
    public: Listener,
    tunnel: Listener,
    control: Listener,
    state: Mutex<State>,
    /// "Look again": the list is the truth, so signals may merge, and a sender never waits.
    conn_list_map_update: Sender<()>,
    workers: Workers,
    slots: Arc<Slots>,
    /// Separate for the two ports: a flood of one is no trouble to the other.
    unproved_links: Arc<Lobby>,
    unproved_tunnels: Arc<Lobby>,
    /// Of both ports: what was recorded at one of them means nothing at the other.
    openings: Openings,
    pairs: Arc<Pairs>,
    /// All visitors have come that ever will.
    all_came: Stop,
    /// Nobody waits any more, and nobody may.
    stop: Stop,
    /// Who has taken over the ports.
    successor: Mutex<Option<Successor>>,
    logs: Logs,
    counts: Counts,
}

/// What strangers can cause to be logged, each kind with a limit of its own, and if its line names
/// an address, each source with one.
struct Logs {
    accept_failed: LogLimit,
    full: LogLimit,
    no_thread: LogLimit,
    link_refused: SourceLogLimit,
    tunnel_refused: SourceLogLimit,
    client_came: SourceLogLimit,
    client_left: SourceLogLimit,
    timed_out: SourceLogLimit,
    local_failed: LogLimit,
    /// All lines of level debug.
    detail: LogLimit,
}

struct State {
    /// The client that is live.
    cache: Option<Session>,
    conn_list_map: ConnList<Accept, Tunnel>,
}

struct Session {
    id: SessionId,
    client: SocketAddr,
    socket: Arc<TcpStream>,
    proto: Proto,
    /// What the tunnels of this session are tied to. None without a key.
    bond: Option<Bond>,
    /// What is to be written to the client. Unbounded, so that a send never waits: each visitor
    /// adds a line at the most, and a writer that is stuck ends after 6 s. Dropped, it ends the
    /// writer, and with it the link.
    to_client: Sender<Line>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Proto {
    /// Never said hello; its tunnels are raw bytes from the first one.
    Original,
    /// `tp/1`, with this many idle tunnels granted.
    Tp1 { pool: usize },
}

/// A visitor's connection.
struct Accept {
    socket: TcpStream,
    visitor: SocketAddr,
    slot: Slot,
}

/// A tunnel of the live session.
struct Tunnel {
    conn: Conn,
    proto: Proto,
}

impl Server {
    /// Opens all three listeners. Nothing is accepted before [`run`](Server::run), but visitors
    /// and clients can connect from now on: the kernel keeps them until then. A port in use may be
    /// that of a server that is about to end, and is waited for: for the pair timeout and a second,
    /// 61 s at the most. On Linux a server of the same user that is stopped in this time, with some
    /// time to drain, hands its listeners over.
    ///
    /// # Errors
    /// A host without an address, an address that cannot be listened on or that two ports share, or
    /// a tunnel or control port that other hosts could reach without `insecure`.
    pub fn bind(mut options: ServerOptions) -> Result<Self, Error> {
        let (shortest, longest) = PAIR_TIMEOUTS;
        options.pair_timeout = options.pair_timeout.clamp(shortest, longest);
        let affordable = affordable_visitors();
        if affordable < options.max_conns {
            let wanted = options.max_conns;
            warn!("--max-conns {wanted}: descriptors suffice for {affordable}; raise ulimit -n");
            options.max_conns = affordable;
        }
        let sealed = !options.keys.is_empty();
        let anywhere = options.insecure || sealed;
        let patience = Instant::now() + options.pair_timeout.min(MAX_PATIENCE) + PATIENCE;
        check_apart(&options)?;
        // This one first: visitors can come while the others are waited for.
        let mut inherited = Inherited::default();
        let mut open = |option, address, anywhere| {
            Listener::open(option, address, anywhere, patience, &mut inherited)
        };
        let public = open("--public", &options.public, true)?;
        let control = open("--control", &options.control, anywhere)?;
        let tunnel = open("--tunnel", &options.tunnel, anywhere)?;
        if !inherited.wait(patience) {
            let error = io::ErrorKind::AddrInUse.into();
            return Err(Error::Listen(control.option, control.addr, error));
        }
        let (sender, receiver) = bounded(1);
        let counts = Counts::new(options.max_conns);
        let shared = Shared {
            slots: Slots::new(options.max_conns),
            options,
            public,
            tunnel,
            control,
            state: Mutex::new(State {
                cache: None,
                conn_list_map: ConnList::new(),
            }),
            conn_list_map_update: sender,
            workers: Workers::new(),
            unproved_links: Lobby::new(),
            unproved_tunnels: Lobby::new(),
            openings: Openings::new(),
            pairs: Pairs::new(),
            all_came: Stop::new(),
            stop: Stop::new(),
            successor: Mutex::new(None),
            logs: Logs::new(sealed),
            counts,
        };
        Ok(Self {
            shared: Arc::new(shared),
            conn_list_map_update: receiver,
        })
    }

    /// Where visitors come to.
    pub fn public_addr(&self) -> SocketAddr {
        self.shared.public.addr
    }

    /// Where tunnels come to.
    pub fn tunnel_addr(&self) -> SocketAddr {
        self.shared.tunnel.addr
    }

    /// Where the control link comes to.
    pub fn control_addr(&self) -> SocketAddr {
        self.shared.control.addr
    }

    /// What stops this server.
    pub fn handle(&self) -> Handle {
        Handle::new(&self.shared)
    }

    /// Serves until it is stopped through its [`handle`](Server::handle).
    ///
    /// # Errors
    /// The system refuses one of the first four threads.
    pub fn run(self) -> Result<(), Error> {
        let shared = &self.shared;
        for (listener, whom) in [
            (&shared.public, "visitors"),
            (&shared.tunnel, "tunnels"),
            (&shared.control, "the control link"),
        ] {
            info!("listening on {} for {whom}", listener.addr);
        }
        match (shared.options.insecure, shared.options.keys.is_empty()) {
            (true, true) => warn!(
                "--insecure: whoever reaches {} or {} can become the client or read along",
                shared.tunnel.addr, shared.control.addr
            ),
            (true, false) => warn!("--insecure changes nothing: a client needs the key"),
            (false, _) => {}
        }
        if shared.options.original && !shared.options.keys.is_empty() {
            warn!("--original changes nothing: a client needs the key");
        }
        thread::scope(|scope| {
            let start = |name: &str, work: fn(&Arc<Shared>)| {
                let thread = thread::Builder::new().name(name.to_owned());
                let work = move || {
                    let _all = AllOrNone(shared);
                    work(shared);
                };
                match thread.spawn_scoped(scope, work) {
                    Ok(_) => Ok(()),
                    Err(error) => {
                        shared.finish();
                        Err(Error::Thread(error))
                    }
                }
            };
            start("make_control", Shared::make_control)?;
            start("make_accept", Shared::make_accept)?;
            start("make_forward", Shared::make_forward)?;
            start("release", Shared::release_conn_match)?;
            let _all = AllOrNone(shared);
            shared.tcp_forward(&self.conn_list_map_update);
            Ok(())
        })?;
        shared.pairs.wait();
        shared.workers.wait(LAST_WORDS);
        Ok(())
    }
}

impl Shared {
    /// Listens for control links. Whether one becomes the client is decided on its own thread.
    fn make_control(self: &Arc<Self>) {
        while let Some((socket, from)) = self.accept(&self.control) {
            let socket = Arc::new(socket);
            let place = self.unproved_links.enter(&socket, from);
            self.start("control", move |server| {
                server.control(&socket, from, place)
            });
        }
    }

    /// One control link, from hello to bye. This thread reads, another one writes.
    fn control(self: &Arc<Self>, socket: &Arc<TcpStream>, from: SocketAddr, place: Place) {
        let admitted = self.door(&place).admit_link(Conn::new(socket.clone()));
        if !place.leave() {
            return self.refuse_link(from, &Refusal::CrowdedOut);
        }
        let Link {
            mut lines,
            mut writer,
            pool,
            bond,
        } = match admitted {
            Ok(link) => link,
            Err(refusal) => return self.refuse_link(from, &refusal),
        };
        let proto = pool.map_or(Proto::Original, |pool| Proto::Tp1 { pool });
        let (id, to_write) = match self.register(from, socket, proto, bond) {
            Ok(registered) => registered,
            Err(refusal) => return self.refuse_link(from, &refusal.tell(&mut writer)),
        };
        let (server, owned) = (self.clone(), socket.clone());
        let write = move || server.control_writer(&owned, writer, id, &to_write);
        let why = match self.workers.start("control_writer", write) {
            Ok(()) => self.read_until_end(&mut lines, proto, id),
            Err(error) => format!("there is no thread to write to it: {error}"),
        };
        self.client_left(id, &why);
    }

    /// What is asked of a connection that has this place.
    fn door<'a>(&'a self, place: &'a Place) -> Door<'a> {
        Door {
            keys: &self.options.keys,
            original: self.options.original && self.options.keys.is_empty(),
            bond: self
                .state
                .lock()
                .cache
                .as_ref()
                .and_then(|live| live.bond.clone()),
            openings: &self.openings,
            place,
        }
    }

    /// Reads a client's lines until there are no more, and returns why.
    fn read_until_end(&self, lines: &mut Lines<Reader>, proto: Proto, id: SessionId) -> String {
        loop {
            match lines.next_line_alive() {
                Ok(Line::Bye { reason }) => {
                    return format!("it said bye, {}", reason.to_string().escape_debug());
                }
                Ok(Line::Hello { .. }) if proto == Proto::Original => {
                    // It never was an original one. It comes back, and is asked again.
                    self.say_bye(id, Reason::Late);
                    return "its hello came late: it is no original one".to_owned();
                }
                Ok(Line::Failed { visitor, reason }) => self.local_failed(visitor, &reason),
                Ok(_) => {}
                Err(error) => return why_ended(&error),
            }
        }
    }

    /// A visitor's tunnel was aborted, as the client could not reach the local service.
    fn local_failed(&self, visitor: SocketAddr, reason: &Failure) {
        count(&self.counts.refused);
        let reason = reason.to_string();
        let (log, reason) = (&self.logs.local_failed, reason.escape_debug());
        log.say(|more| {
            warn!(
                "visitor {visitor}: the client could not reach the local service: {reason}{more}"
            );
        });
    }

    /// Writes what [`send_message`](Self::send_message) hands over, and heartbeats, until the
    /// session is not the live one any more.
    fn control_writer(
        &self,
        socket: &TcpStream,
        writer: Writer,
        id: SessionId,
        to_write: &Receiver<Line>,
    ) {
        if let Err(error) = write_lines(writer, to_write, || ()) {
            self.client_left(id, &format!("writing to it: {error}"));
        }
        // Wakes the thread that reads.
        let _ = socket.shutdown(Shutdown::Both);
    }

    fn refuse_link(&self, from: SocketAddr, refusal: &Refusal) {
        count(&self.counts.refused);
        let log = &self.logs.link_refused;
        log.say(from, |more| {
            warn!("refused control link from {from}: {refusal}{more}")
        });
    }

    /// Makes a client the one that is live, if none is. One that said hello takes the place of
    /// one that did not.
    fn register(
        &self,
        client: SocketAddr,
        socket: &Arc<TcpStream>,
        proto: Proto,
        bond: Option<Bond>,
    ) -> Result<(SessionId, Receiver<Line>), Refusal> {
        let id = SessionId::random().map_err(io::Error::other)?;
        let (to_client, to_write) = unbounded();
        self.forget_hung_up();
        let mut state = self.state.lock();
        if self.stop.stopped() {
            return Err(Refusal::Stopping);
        }
        if let Some(live) = &state.cache
            && (live.proto != Proto::Original || proto == Proto::Original)
        {
            return Err(Refusal::Busy(live.client));
        }
        let waiting = std::iter::repeat_n(NEW, state.conn_list_map.waiting());
        for line in std::iter::once(self.first_line(proto, id, client)).chain(waiting) {
            let _ = to_client.send(line);
        }
        let mut remarks = self.key_remark(bond.as_ref());
        let replaced = state.cache.replace(Session {
            id,
            client,
            socket: socket.clone(),
            proto,
            bond,
            to_client,
        });
        drop(state);
        if let Some(before) = replaced {
            remarks += &format!(", and takes the place of {}", before.client);
        }
        self.logs.client_came.say(client, |more| match proto {
            Proto::Tp1 { pool } => {
                let id = id.short();
                info!("client {client} came: session {id}, pool {pool}{remarks}{more}");
            }
            Proto::Original => info!("client {client} came, does not speak tp/1{more}"),
        });
        Ok((id, to_write))
    }

    /// Ends a session whose client has gone, if its own thread has not noticed yet: the next client
    /// may be quicker, above all when this program slept and finds all at once what came meanwhile.
    fn forget_hung_up(&self) {
        let state = self.state.lock();
        let live = state.cache.as_ref();
        let gone = live.filter(|live| net::has_hung_up(&live.socket));
        let gone = gone.map(|live| live.id);
        drop(state);
        if let Some(id) = gone {
            self.client_left(id, "it hung up");
        }
    }

    /// The server's first line to such a client.
    fn first_line(&self, proto: Proto, session: SessionId, client: SocketAddr) -> Line {
        match proto {
            Proto::Original => Line::Hi,
            Proto::Tp1 { pool } => Line::Hello {
                proto: PROTO,
                pool,
                welcome: Some(Welcome {
                    session,
                    tunnel: Some(self.tunnel.addr.port()),
                    public: Some(self.public.addr.port()),
                    client: Some(client),
                }),
            },
        }
    }

    /// For the log: which key a client has. Who changes keys sees when the old one can go.
    fn key_remark(&self, bond: Option<&Bond>) -> String {
        let keys = &self.options.keys;
        let place = bond.and_then(|bond| keys.iter().position(|key| bond.key_is(key)));
        match place {
            None => String::new(),
            Some(_) if keys.len() == 1 => ", sealed".to_owned(),
            Some(place) => format!(", sealed with key {} of {}", place + 1, keys.len()),
        }
    }

    /// Ends a session, if it is still the live one, and closes its idle tunnels.
    fn client_left(&self, id: SessionId, why: &str) {
        let mut state = self.state.lock();
        let Some(session) = state.cache.take_if(|live| live.id == id) else {
            return;
        };
        let idle = state.conn_list_map.take_idle();
        drop(state);
        drop(idle);
        let (log, client) = (&self.logs.client_left, session.client);
        log.say(client, |more| info!("client {client} left: {why}{more}"));
    }

    /// Listens for visitors. When all places are taken, further ones wait in the kernel's backlog.
    fn make_accept(self: &Arc<Self>) {
        while let Some(slot) = self.slots.take(|| self.full()) {
            let Some((socket, visitor)) = self.accept(&self.public) else {
                break;
            };
            self.detail(format_args!("visitor {visitor} came"));
            let accept = Accept {
                socket,
                visitor,
                slot,
            };
            self.add_conn_match_accept(accept);
        }
        self.public.take();
        self.all_came.stop();
        self.update();
    }

    fn full(&self) {
        let most = self.options.max_conns;
        self.logs.full.say(|more| {
            warn!(
                "all {most} places for visitors are taken (--max-conns, ulimit -n): who comes now \
                 waits until others leave{more}"
            );
        });
    }

    /// Puts a visitor into the list, and asks for a tunnel if no idle one is there.
    fn add_conn_match_accept(&self, accept: Accept) {
        let mut state = self.state.lock();
        if self.stop.stopped() {
            // Nobody would join it, and nobody release it.
            return;
        }
        let complete = state
            .conn_list_map
            .add_accept(accept, Instant::now(), greet);
        drop(state);
        if complete {
            self.update();
        } else {
            self.send_message(NEW);
        }
    }

    /// Hands a line to the control link, or says that no client is there.
    fn send_message(&self, message: Line) {
        match &self.state.lock().cache {
            // If the writer has just ended, the session is about to.
            Some(session) => drop(session.to_client.send(message)),
            None => self.detail(format_args!("no client is there to ask for a tunnel")),
        }
    }

    /// Hands a client its last line.
    fn say_bye(&self, id: SessionId, reason: Reason) {
        if let Some(session) = self
            .state
            .lock()
            .cache
            .as_ref()
            .filter(|live| live.id == id)
        {
            let _ = session.to_client.send(Line::Bye { reason });
        }
    }

    /// Listens for tunnels. Each proves on its own thread which session it belongs to; those of an
    /// original client cannot, and go straight to a visitor.
    fn make_forward(self: &Arc<Self>) {
        while let Some((socket, from)) = self.accept(&self.tunnel) {
            let socket = Arc::new(socket);
            let conn = Conn::new(socket.clone());
            let original = |live: &&Session| live.proto == Proto::Original;
            let live = self
                .state
                .lock()
                .cache
                .as_ref()
                .filter(original)
                .map(|live| live.id);
            if let Some(id) = live {
                self.config_conn_list_tunnel(conn, from, id);
                continue;
            }
            let place = self.unproved_tunnels.enter(&socket, from);
            self.start("tunnel", move |server| server.tunnel(conn, from, place));
        }
    }

    /// Waits until a tunnel has shown which session it belongs to.
    fn tunnel(&self, conn: Conn, from: SocketAddr, place: Place) {
        let admitted = self.door(&place).admit_tunnel(conn);
        if !place.leave() {
            return self.refuse_tunnel(from, &Refusal::CrowdedOut);
        }
        match admitted {
            Ok((conn, session)) => self.config_conn_list_tunnel(conn, from, session),
            Err(refusal) => self.refuse_tunnel(from, &refusal),
        }
    }

    fn refuse_tunnel(&self, from: SocketAddr, refusal: &Refusal) {
        count(&self.counts.refused);
        let log = &self.logs.tunnel_refused;
        log.say(from, |more| {
            warn!("refused tunnel from {from}: {refusal}{more}")
        });
    }

    /// Gives a tunnel of the live session to the visitor that has waited longest.
    fn config_conn_list_tunnel(&self, conn: Conn, from: SocketAddr, id: SessionId) {
        // An idle tunnel is peeked at, which must not wait.
        if let Err(error) = conn.socket().set_nonblocking(true) {
            return self.refuse_tunnel(from, &error.into());
        }
        let mut state = self.state.lock();
        let live = state.cache.as_ref().filter(|live| live.id == id);
        let Some(proto) = live.map(|live| live.proto) else {
            drop(state);
            return self.refuse_tunnel(from, &Refusal::OldSession);
        };
        let tunnel = Tunnel { conn, proto };
        let placed = state.conn_list_map.add_tunnel(tunnel, proto.pool(), greet);
        drop(state);
        match placed {
            Placed::Matched => self.update(),
            Placed::Dead => {
                self.refuse_tunnel(from, &Refusal::Dead);
                self.send_message(NEW);
            }
            Placed::Idle => self.detail(format_args!("tunnel from {from} is idle")),
            Placed::Superfluous(_) => self.detail(format_args!("closed a superfluous tunnel")),
        }
    }

    /// Tells the matcher that a match has become complete.
    fn update(&self) {
        // Full: it has not looked since the last signal, so it will see this match too.
        let _ = self.conn_list_map_update.try_send(());
    }

    /// The matcher: on each signal takes every complete match out of the list and joins it. Ends when
    /// visitors are no longer taken and nobody waits, or may wait, any more.
    fn tcp_forward(self: &Arc<Self>, conn_list_map_update: &Receiver<()>) {
        loop {
            let all_came = self.all_came.stopped();
            let mut state = self.state.lock();
            if let Some((accept, tunnel)) = state.conn_list_map.take_match() {
                drop(state);
                self.join_conn2(accept, tunnel);
                continue;
            }
            let nobody_waits = state.conn_list_map.waiting() == 0;
            drop(state);
            let end_by = self.pairs.end_by();
            let over = end_by.is_some_and(|end_by| end_by <= Instant::now());
            if over || (all_came && nobody_waits) || self.stop.stopped() {
                return self.finish();
            }
            let _ = match end_by {
                Some(end_by) => conn_list_map_update.recv_deadline(end_by).is_ok(),
                None => conn_list_map_update.recv().is_ok(),
            };
        }
    }

    /// Joins a visitor with its tunnel. The client has been told, and works while the two copy
    /// threads start.
    fn join_conn2(self: &Arc<Self>, accept: Accept, tunnel: Tunnel) {
        if let Err(error) = tunnel.conn.socket().set_nonblocking(false) {
            return self.detail(format_args!("visitor {}: {error}", accept.visitor));
        }
        let Accept {
            socket,
            visitor,
            slot,
        } = accept;
        let (up, down) = self.pairs.join(
            Visitor::new(Some(visitor), Some(slot)),
            End {
                name: "visitor",
                is_program: false,
                conn: Conn::new(Arc::new(socket)),
            },
            End {
                name: "client",
                is_program: true,
                conn: tunnel.conn,
            },
            self.options.linger,
        );
        self.start("up", move |_| drop(up.copy()));
        self.start("down", move |_| drop(down.copy()));
    }

    /// Closes the visitors that waited longer than the pair timeout; and looks after half-closed
    /// pairs meanwhile.
    fn release_conn_match(self: &Arc<Self>) {
        let timeout = self.options.pair_timeout;
        let mut pause = timeout;
        while self.stop.sleep(pause.min(SWEEP)) {
            self.pairs.sweep();
            let now = Instant::now();
            let mut state = self.state.lock();
            let expired = state.conn_list_map.take_expired(now, timeout);
            let (since, most) = ASK_AGAIN;
            let late = state.conn_list_map.waiting_since(now, since).min(most);
            let oldest = state.conn_list_map.oldest_waiting();
            let client = state.cache.as_ref().map(|live| live.client);
            drop(state);
            (0..late).for_each(|_| self.send_message(NEW));
            let why = match client {
                Some(client) => format!("client {client} dialled no tunnel for it"),
                None => "no client is connected".to_owned(),
            };
            if !expired.is_empty() {
                // A stop waits for those that wait.
                self.update();
            }
            for Accept {
                visitor, socket, ..
            } in &expired
            {
                count(&self.counts.timed_out);
                let log = &self.logs.timed_out;
                if is_client(socket) {
                    let reason = Reason::PublicPort;
                    let _ = socket.set_nonblocking(true);
                    let _ = send(socket, &Line::Bye { reason });
                    log.say(*visitor, |more| {
                        warn!(
                            "closed {visitor}: it is a tpclient, and this is the port for visitors \
                             (--control-port, --tunnel-port of tpclient){more}"
                        );
                    });
                    continue;
                }
                log.say(*visitor, |more| {
                    warn!("closed visitor {visitor} after {timeout:?}: {why}{more}")
                });
            }
            // Who comes from now on does not expire before a whole timeout has passed.
            pause = oldest.map_or(timeout, |oldest| {
                (oldest + timeout).saturating_duration_since(now)
            });
        }
    }

    /// The next connection of a listener; None once the server stops.
    fn accept(&self, listener: &Listener) -> Option<(TcpStream, SocketAddr)> {
        loop {
            match listener.accept()? {
                Ok(accepted) => return Some(accepted),
                // Out of descriptors or memory, or the connection was reset in the backlog. All
                // pass; to end, or to try again at once, would make them worse.
                Err(error) => {
                    if !listener.pause(ACCEPT_PAUSE) {
                        return None;
                    }
                    let (log, option) = (&self.logs.accept_failed, listener.option);
                    log.say(|more| warn!("{option}: failed accept, trying again: {error}{more}"));
                }
            }
        }
    }

    /// Runs a job on a worker. If there is no thread for it, its sockets are closed.
    fn start(self: &Arc<Self>, name: &'static str, work: impl FnOnce(&Arc<Self>) + Send + 'static) {
        let server = self.clone();
        if let Err(error) = self.workers.start(name, move || work(&server)) {
            let log = &self.logs.no_thread;
            log.say(|more| warn!("closed a connection, no thread for {name}: {error}{more}"));
        }
    }

    fn detail(&self, what: fmt::Arguments) {
        self.logs.detail.say(|more| debug!("{what}{more}"));
    }

    /// Leaves the visitors to the server that takes this one's place, if it asks for them in time.
    fn hand_over(&self, time: Duration) {
        let listeners = [&self.public, &self.control, &self.tunnel].map(Listener::socket);
        let listeners: Vec<_> = listeners.iter().flatten().map(|it| &**it).collect();
        match Successor::find(self.public.addr, &listeners, time) {
            Ok(Some(successor)) => {
                info!("the next server takes over");
                *self.successor.lock() = Some(successor);
                self.public.take();
            }
            Ok(None) => {}
            Err(error) => self.detail(format_args!("could not hand over: {error}")),
        }
        self.public.close();
        self.slots.close();
    }

    /// The end of a stop: nobody waits any more, and those that are joined need no client.
    fn finish(self: &Arc<Self>) {
        self.stop.stop();
        for listener in [&self.public, &self.tunnel, &self.control] {
            listener.take();
        }
        // It may accept from all of them now.
        *self.successor.lock() = None;
        self.slots.close();
        self.unproved_links.clear();
        self.unproved_tunnels.clear();
        let mut state = self.state.lock();
        let session = state.cache.take();
        let promised = std::iter::from_fn(|| state.conn_list_map.take_match());
        let promised: Vec<_> = promised.collect();
        let unjoined = state.conn_list_map.clear();
        drop(state);
        drop(unjoined);
        for (accept, tunnel) in promised {
            self.join_conn2(accept, tunnel);
        }
        if let Some(session) = session {
            let reason = Reason::Draining;
            let _ = session.to_client.send(Line::Bye { reason });
        }
    }
}

/// An error if two of the three ports would be the same one: the second would be waited for in vain.
fn check_apart(options: &ServerOptions) -> Result<(), Error> {
    let (public, control, tunnel) = (&options.public, &options.control, &options.tunnel);
    for (option, address, other, taken) in [
        ("--control", control, "--public", public),
        ("--tunnel", tunnel, "--public", public),
        ("--tunnel", tunnel, "--control", control),
    ] {
        if address.overlaps(taken) {
            return Err(Error::SameAddress(option, other, taken.clone()));
        }
    }
    Ok(())
}

/// Ends the server when one of the threads that it consists of panics: without one of them it would
/// only look alive. What ended is started anew by whoever looks after it.
struct AllOrNone<'a>(&'a Arc<Shared>);

impl Drop for AllOrNone<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.finish();
            self.0.update();
        }
    }
}

impl Running for Shared {
    /// Takes no more visitors, once the next server has had a moment to take them. Those that wait
    /// still get their tunnels, from a client that knows nothing yet; then the matcher
    /// [finishes](Shared::finish).
    fn stop(self: Arc<Self>, drain: Duration) {
        self.pairs.end_after(drain);
        self.update();
        let server = self.clone();
        let hand_over = move || server.hand_over(drain.min(SUCCESSION));
        if self.workers.start("hand_over", hand_over).is_err() {
            self.hand_over(Duration::ZERO);
        }
    }

    fn status(&self) -> Status {
        let state = self.state.lock();
        let session = state.cache.as_ref().map(|live| match live.proto {
            Proto::Original => "original".to_owned(),
            Proto::Tp1 { .. } => live.id.short(),
        });
        let (waiting, idle) = (state.conn_list_map.waiting(), state.conn_list_map.idle());
        drop(state);
        self.counts.status(session, &self.pairs, waiting, idle)
    }
}

impl Logs {
    fn new(sealed: bool) -> Self {
        let once_a_second = || LogLimit::new(1);
        let of_each_source = || SourceLogLimit::new(1);
        // Who has a key is no stranger.
        let client_lines = if sealed { DETAIL_LINES } else { 1 };
        Self {
            accept_failed: once_a_second(),
            full: LogLimit::within(FULL_LINES, 1),
            no_thread: once_a_second(),
            link_refused: of_each_source(),
            tunnel_refused: of_each_source(),
            client_came: SourceLogLimit::new(client_lines),
            client_left: SourceLogLimit::new(client_lines),
            timed_out: of_each_source(),
            local_failed: once_a_second(),
            detail: LogLimit::new(DETAIL_LINES),
        }
    }
}

impl Proto {
    /// How many idle tunnels are kept.
    fn pool(self) -> usize {
        match self {
            Proto::Original => 0,
            Proto::Tp1 { pool } => pool,
        }
    }
}

/// Tells the client, if it understands that, whose bytes follow; false if the tunnel is dead. It
/// never waits: a tunnel that nobody has yet does not block. The client works while the matcher
/// wakes, and a short visit costs 5 % less processor time than if the matcher told it.
fn greet(accept: &Accept, tunnel: &mut Tunnel) -> bool {
    let (socket, visitor) = (tunnel.conn.socket(), Some(accept.visitor));
    // From here on an end would be taken for a complete and empty answer.
    net::reset_on_close(socket, true);
    net::reset_on_close(&accept.socket, true);
    let greeted = match tunnel.proto {
        Proto::Original => true,
        Proto::Tp1 { .. } => {
            net::is_quiet(socket) && send(&mut tunnel.conn.writer, &Line::New { visitor }).is_ok()
        }
    };
    if !greeted {
        // It waits on, and may be closed without a word.
        net::reset_on_close(&accept.socket, false);
    }
    greeted
}
