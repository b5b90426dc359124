//! The server, in the original's functions and in their order: the control link, the visitors, the
//! tunnels, and the matcher that joins them. What they need lives in the other modules; how the server
//! begins and ends, in `run`.

mod ends;
mod entry;
mod run;
mod sessions;
mod shown;
mod waiting;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Instant;

use crossbeam_channel::{Receiver, Sender};
use parking_lot::Mutex;

use crate::conn_match::{Added, ConnList, Placed};
use crate::door::{Admitted, Door, Link, Refusal};
use crate::error::Error;
use crate::handle::{Handle, Running};
use crate::journal::Journal;
use crate::options::ServerOptions;
use crate::os::hand_over::Successor;
use crate::os::limits::{Slot, Slots};
use crate::os::listener::Listener;
use crate::os::workers::Workers;
use crate::relay::{Direction, End, Pairs, Peer, SWEEP, Visitor};
use crate::service::Service;
use crate::session::Ended;
use crate::session::of_server::Session;
use crate::status::port::StatusPort;
use crate::stop::{Phase, Stop};
use crate::wire::conn::Conn;
use crate::wire::line::{Line, NEW};
use ends::{Accept, Asked, Public, Tunnel};
use entry::Entry;

/// The half of the tunnel that runs on the host with the public address.
pub struct Server {
    shared: Arc<Shared>,
    conn_list_map_update: Receiver<()>,
}

struct Shared {
    options: ServerOptions,
    /// One for each service.
    public: Vec<Public>,
    entry: Entry,
    /// None if tunnels come to the control port.
    tunnel: Option<Listener>,
    control: Listener,
    state: Mutex<State>,
    /// "Look again": the list is the truth, so signals may merge, and a sender never waits.
    conn_list_map_update: Sender<()>,
    workers: Workers,
    /// As many as there may be visitors at a time.
    slots: Arc<Slots>,
    /// The number of the visit that comes next.
    next_visit: AtomicU64,
    door: Door,
    pairs: Arc<Pairs>,
    stop: Arc<Stop>,
    status: StatusPort,
    /// Who has taken over the ports.
    successor: Mutex<Option<Successor>>,
    journal: Arc<Journal>,
}

struct State {
    /// Visitors, tunnels, and the sessions with the clients that are live. The original has one client,
    /// and keeps its connection apart as `cache`.
    conn_list_map: ConnList<Accept, Tunnel, Arc<Session>>,
    /// How many of the ports for visitors still take some. Once none does, every visitor that will ever
    /// come to this server is in the list, or was.
    public_open: usize,
    /// Who waits for a client's [answer](Shared::join_when_ready).
    asked: Vec<Asked>,
    /// Of each service, how many visitors have come and are not in the list yet, as their proxy has
    /// still to say where they come from.
    coming: Vec<usize>,
}

impl Server {
    /// Opens all listeners. Nothing is accepted before [`run`](Server::run), but visitors
    /// and clients can connect from now on: the kernel keeps them until then.
    ///
    /// # Errors
    /// A host without an address, an address that cannot be listened on or that two ports share, a
    /// tunnel or control port that other hosts could reach without `insecure`, no service, or no place
    /// for visitors or clients.
    pub fn bind(options: ServerOptions) -> Result<Self, Error> {
        let (shared, conn_list_map_update) = Shared::bind(options)?;
        Ok(Self {
            shared: Arc::new(shared),
            conn_list_map_update,
        })
    }

    /// Looks whether a server with these options could take the place of one that runs with those
    /// `before`, once that one [makes way](Handle::make_way): it gets the ports that both have.
    ///
    /// # Errors
    /// Those of [`bind`](Server::bind).
    pub fn can_follow(options: &ServerOptions, before: &ServerOptions) -> Result<(), Error> {
        run::can_follow(options, before)
    }

    /// Where the visitors of the first service come to, which is the one without a name if there is one.
    pub fn public_addr(&self) -> SocketAddr {
        self.shared.public[0].listener.addr
    }

    /// Where the visitors of each service come to.
    pub fn public_addrs(&self) -> BTreeMap<Service, SocketAddr> {
        let public = self.shared.public.iter();
        public
            .map(|public| (public.service.clone(), public.listener.addr))
            .collect()
    }

    /// Where tunnels come to.
    pub fn tunnel_addr(&self) -> SocketAddr {
        self.shared.tunnel_addr()
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
    /// The system refuses one of the first threads: three, and one for each service.
    pub fn run(self) -> Result<(), Error> {
        self.shared.run(&self.conn_list_map_update)
    }

    /// [Runs](Server::run) on a thread of its own.
    ///
    /// # Errors
    /// The system refuses that thread.
    pub fn spawn(self) -> Result<Running, Error> {
        Running::spawn("server", self.handle(), move || self.run())
    }
}

impl Shared {
    /// Listens for control links, and for tunnels if there is one port for both. What a connection is, it
    /// shows on a thread of its own.
    fn make_control(self: &Arc<Self>) {
        while let Some((socket, from, ())) = self.accept(&self.control, || Some(())) {
            let place = self.door.links.enter(socket.into(), from);
            self.start("control", move |server| {
                match server.door.admit_link(place, &server.live()) {
                    Ok(Admitted::Link(link)) => server.control(*link, from),
                    Ok(Admitted::Tunnel(conn, id)) => {
                        server.config_conn_list_tunnel(Tunnel::new(*conn, from, Some(id)));
                    }
                    Err(refusal) => server.journal.refused_link(from, &refusal),
                }
            });
        }
    }

    /// One control link, from its registration to bye. This thread reads; another one writes, a `hi`
    /// every 2 s among the rest.
    fn control(self: &Arc<Self>, mut link: Link, from: SocketAddr) {
        let (session, to_write) = match self.begin_session(&link, from) {
            Ok(begun) => begun,
            Err(refusal) => {
                let refusal = refusal.tell(&mut link.writer);
                return self.journal.refused_link(from, &refusal);
            }
        };
        let Link {
            writer, mut lines, ..
        } = link;
        let (server, owned) = (self.clone(), session.clone());
        let write = move || {
            let failed = |ended: &_| server.end_session(&owned, ended);
            owned.write_lines(writer, &to_write, failed);
        };
        let failed = |visitor, reason: &_| self.journal.client_failed(visitor, reason);
        let finished = |visit, moved| self.pairs.finished_elsewhere(&*session, visit, moved);
        let ended = match self.workers.start("control_writer", write) {
            Ok(()) => session.read_lines(&mut lines, failed, finished),
            Err(error) => Ended::NoThread(error),
        };
        self.end_session(&session, &ended);
    }

    /// Listens for the visitors of a service. When all places are taken, further ones wait in the
    /// kernel's backlog: a place comes first, as a visitor that was accepted without one would be in
    /// nobody's hands.
    fn make_accept(self: &Arc<Self>, service: usize) {
        let listener = &self.public[service].listener;
        let place = || self.slots.take(|| self.journal.full());
        while let Some((socket, visitor, slot)) = self.accept(listener, place) {
            let accept = Accept::new(socket, visitor, service, slot);
            if let Some(accept) = self.admit(accept) {
                self.add_conn_match_accept(accept);
            }
        }
        self.take_no_more(listener);
    }

    /// Puts a visitor into the list, and asks for a tunnel if no idle one is there.
    fn add_conn_match_accept(&self, accept: Accept) {
        let mut state = self.state.lock();
        if self.stop.reached(Phase::Leaving) {
            // Nobody would join it, and nobody release it.
            return;
        }
        let added = state.conn_list_map.add_accept(accept, Instant::now());
        drop(state);
        match added {
            Added::Matched => self.update(),
            Added::Waits(client) => self.send_message(NEW, client.as_ref()),
        }
    }

    /// Hands a line to a client's control link, or says that no client is there.
    fn send_message(&self, message: Line, client: Option<&Arc<Session>>) {
        match client {
            Some(session) => session.send(message),
            None => self.journal.no_client(),
        }
    }

    /// Listens for tunnels. Each proves on its own thread which session it belongs to; those of an
    /// original client cannot, and go straight to a visitor.
    fn make_forward(self: &Arc<Self>) {
        let Some(tunnel) = &self.tunnel else {
            return;
        };
        while let Some((socket, from, ())) = self.accept(tunnel, || Some(())) {
            if self.has_original_client() {
                let conn = Conn::new(Arc::new(socket));
                self.config_conn_list_tunnel(Tunnel::new(conn, from, None));
                continue;
            }
            let place = self.door.tunnels.enter(socket.into(), from);
            self.start("tunnel", move |server| {
                match server.door.admit_tunnel(place, &server.live()) {
                    Ok((conn, id)) => {
                        server.config_conn_list_tunnel(Tunnel::new(conn, from, Some(id)));
                    }
                    Err(refusal) => server.journal.refused_tunnel(from, &refusal),
                }
            });
        }
    }

    /// Gives a tunnel of a live session to the visitor that has waited longest, and signals the matcher.
    /// Without such a visitor the tunnel is idle; if there are too many, the oldest one is closed.
    fn config_conn_list_tunnel(&self, tunnel: Tunnel) {
        let (id, from, has_served) = (tunnel.session, tunnel.from, tunnel.has_served);
        let mut state = self.state.lock();
        let list = &mut state.conn_list_map;
        let live = list.clients().find(|live| live.proto.id() == id).cloned();
        let placed = match live {
            Some(session) => {
                if !has_served {
                    self.journal.tunnel_dialled(&session.dialled);
                }
                let most = session.most_idle();
                list.add_tunnel(&session, tunnel, Instant::now(), most)
            }
            None => Placed::Homeless(tunnel),
        };
        drop(state);
        match placed {
            Placed::Matched => self.update(),
            Placed::Idle => self.journal.tunnel_idle(from),
            Placed::Superfluous(_) => self.journal.tunnel_superfluous(),
            Placed::Homeless(_) if has_served => {}
            Placed::Homeless(_) => self.journal.refused_tunnel(from, &Refusal::OldSession),
        }
    }

    /// The matcher: on each signal takes every complete match out of the list and joins it. Ends when
    /// visitors are no longer taken and nobody waits, or may wait, any more.
    fn tcp_forward(self: &Arc<Self>, conn_list_map_update: &Receiver<()>) {
        loop {
            let complete = self.state.lock().conn_list_map.take_match();
            if let Some(complete) = complete {
                let (accept, added) = (complete.accept, complete.accept_add_time);
                let (tunnel, client) = (complete.tunnel, complete.client);
                let arrival = self.arrival(&accept, &client);
                let asks = arrival.answer;
                match tunnel.greet(&accept, arrival) {
                    Some(tunnel) if asks => self.join_when_ready(accept, added, tunnel, client),
                    Some(tunnel) => self.join_conn2(accept, tunnel, &client, client.place()),
                    None => self.put_back(accept, added),
                }
                continue;
            }
            if self.is_finished() {
                return self.finish();
            }
            // Whatever wakes the matcher, it looks again.
            let _ = match self.stop.end_by() {
                Some(end_by) => conn_list_map_update.recv_deadline(end_by).is_ok(),
                None => conn_list_map_update.recv().is_ok(),
            };
        }
    }

    /// Joins a visitor with a tunnel whose client knows the visitor already, and starts the two copy
    /// threads. `place` counts the visitor among those of the client. The thread that ends last offers the
    /// tunnel to the next visitor, if it can be used again.
    fn join_conn2(
        self: &Arc<Self>,
        accept: Accept,
        tunnel: Tunnel,
        client: &Arc<Session>,
        place: Option<Slot>,
    ) {
        let service = self.service_of(&accept).clone();
        let visitor = Visitor::new(Some(accept.visitor), service).in_visit(tunnel.visit);
        let (up, down) = self.pairs.join(
            visitor.in_places([Some(accept.slot), place], accept.counted),
            accept.came,
            End(Peer::Visitor, Conn::new(accept.socket)),
            End(Peer::Client, tunnel.conn),
            client.linger(self.options.linger),
        );
        let (from, session) = (tunnel.from, tunnel.session);
        let copy = move |server: &Arc<Self>, direction: Direction| {
            let again = direction.copy().map(|conn| Tunnel {
                has_served: true,
                ..Tunnel::new(conn, from, session)
            });
            if let Some(tunnel) = again.and_then(Tunnel::wait_until_idle) {
                server.config_conn_list_tunnel(tunnel);
            }
        };
        self.start("up", move |server| copy(server, up));
        self.start("down", move |server| copy(server, down));
    }

    /// Closes the visitors that waited longer than the pair timeout; meanwhile looks after what else
    /// needs a look now and then.
    fn release_conn_match(self: &Arc<Self>) {
        let timeout = self.options.pair_timeout;
        let mut pause = timeout;
        while self.stop.sleep(pause.min(SWEEP), Phase::Leaving) {
            self.look_after_pairs_and_tunnels();
            let now = Instant::now();
            let mut state = self.state.lock();
            let expired = state.conn_list_map.take_expired(now, timeout);
            let oldest = state.conn_list_map.oldest_waiting();
            drop(state);
            for accept in &expired {
                self.say_expired(accept);
            }
            if !expired.is_empty() {
                // A stop waits for those that wait.
                self.update();
            }
            // Who comes from now on does not expire before a whole timeout has passed.
            pause = oldest.map_or(timeout, |oldest| {
                (oldest + timeout).saturating_duration_since(now)
            });
        }
    }
}
