//! How a server begins, and how it ends.

use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, bounded};
use parking_lot::Mutex;

use crate::conn_match::ConnList;
use crate::door::{Door, Link, Refusal};
use crate::error::Error;
use crate::handle::Half;
use crate::journal::{self, Journal, Status};
use crate::options::ServerOptions;
use crate::os::hand_over::{Inherited, Successor};
use crate::os::limits::{Slots, affordable_visitors};
use crate::os::listener::Listener;
use crate::os::workers::Workers;
use crate::relay::Pairs;
use crate::server::ends::Accept;
use crate::server::{Shared, State};
use crate::session::of_server::Session;
use crate::session::{Ended, Proto};
use crate::stop::{Phase, Stop};
use crate::wire::handshake::Bond;
use crate::wire::line::{Line, MAX_POOL, NEW, PROTO, Reason, Welcome};

/// After a failed accept: short for a visitor, long for a processor.
const ACCEPT_PAUSE: Duration = Duration::from_millis(75);

/// What the release thread can sleep: never nothing, and within what an `Instant` can hold.
const PAIR_TIMEOUTS: (Duration, Duration) = (
    Duration::from_millis(10),
    Duration::from_secs(366 * 24 * 60 * 60),
);

/// How long a server that was told to stop serves on, for the next one to take over its ports: many
/// looks of one that waits for them, on a busy host.
const SUCCESSION: Duration = Duration::from_millis(300);

/// What a stopping server gives its threads for their last words. They need microseconds, if
/// nothing is wrong.
const LAST_WORDS: Duration = Duration::from_millis(250);

/// A visitor that has waited this long, many round trips, has lost its tunnel on the way.
const LOST_AFTER: Duration = Duration::from_secs(1);

/// An idle tunnel beyond the pool that no visitor has needed for this long is closed.
const UNUSED: Duration = Duration::from_secs(10);

/// So many lost tunnels are asked for again at a time: if all are lost, more would not help.
const MOST_ASKED_AGAIN: usize = MAX_POOL;

/// The beginning.
impl Shared {
    /// Opens the three ports; also returns what wakes the matcher.
    pub(super) fn bind(mut options: ServerOptions) -> Result<(Self, Receiver<()>), Error> {
        let (shortest, longest) = PAIR_TIMEOUTS;
        options.pair_timeout = options.pair_timeout.clamp(shortest, longest);
        if options.max_conns == 0 {
            return Err(Error::NoVisitors);
        }
        let affordable = affordable_visitors();
        if affordable < options.max_conns {
            Journal::few_descriptors(options.max_conns, affordable);
            options.max_conns = affordable;
        }
        check_apart(&options)?;
        let sealed = !options.keys.is_empty();
        let stop = Stop::new();
        let [public, control, tunnel] = open_ports(&options, &stop, longest)?;
        let journal = Arc::new(Journal::new(options.max_conns, sealed));
        let (conn_list_map_update, updates) = bounded(1);
        let shared = Self {
            slots: Slots::new(options.max_conns),
            door: Door::new(options.keys.clone(), options.original),
            pairs: Pairs::new(stop.clone(), journal.tells_of_visits()),
            options,
            public,
            tunnel,
            control,
            state: Mutex::new(State {
                cache: None,
                conn_list_map: ConnList::new(),
                all_came: false,
            }),
            conn_list_map_update,
            workers: Workers::new(journal::panicked),
            stop,
            successor: Mutex::new(None),
            journal,
        };
        Ok((shared, updates))
    }

    /// Runs the threads that the server consists of, until it has ended.
    pub(super) fn run(self: &Arc<Self>, updates: &Receiver<()>) -> Result<(), Error> {
        let (public, tunnel, control) = (self.public.addr, self.tunnel.addr, self.control.addr);
        Journal::listening(&self.options, public, tunnel, control);
        thread::scope(|scope| {
            let start = |name: &str, work: fn(&Arc<Self>)| {
                let thread = thread::Builder::new().name(name.to_owned());
                let work = move || {
                    let _all = AllOrNone(self);
                    work(self);
                };
                match thread.spawn_scoped(scope, work) {
                    Ok(_) => Ok(()),
                    Err(error) => {
                        self.finish();
                        Err(Error::Thread(error))
                    }
                }
            };
            start("make_control", Self::make_control)?;
            start("make_accept", Self::make_accept)?;
            start("make_forward", Self::make_forward)?;
            start("release", Self::release_conn_match)?;
            let _all = AllOrNone(self);
            self.tcp_forward(updates);
            Ok(())
        })?;
        self.pairs.wait();
        self.workers.wait(LAST_WORDS);
        Ok(())
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

/// The public, the control, and the tunnel port. The public one comes first: visitors can come while
/// the others are waited for.
fn open_ports(
    options: &ServerOptions,
    stop: &Arc<Stop>,
    longest: Duration,
) -> Result<[Listener; 3], Error> {
    let anywhere = options.insecure || !options.keys.is_empty();
    let patience = Instant::now() + options.port_patience.min(longest);
    let mut inherited = Inherited::default();
    type Take = fn(&mut Inherited, SocketAddr) -> Option<TcpListener>;
    let mut open = |option, address, anywhere, closes_at, take: Take| {
        let told = |opening| Journal::opening(option, &opening);
        let taken = |address| take(&mut inherited, address);
        let socket = Listener::find(option, address, anywhere, patience, taken, told)?;
        Listener::new(option, socket, stop.clone(), closes_at)
    };
    let (public, control, tunnel) = (&options.public, &options.control, &options.tunnel);
    let (draining, leaving) = (Phase::Draining, Phase::Leaving);
    let public = open("--public", public, true, draining, Inherited::take_public)?;
    let control = open("--control", control, anywhere, leaving, Inherited::take)?;
    let tunnel = open("--tunnel", tunnel, anywhere, leaving, Inherited::take)?;
    // Nobody else takes visitors now: the old server gets the whole time for those that wait there.
    if !inherited.wait(Instant::now() + options.port_patience.min(longest)) {
        let error = io::ErrorKind::AddrInUse.into();
        return Err(Error::Listen(control.option, control.addr, error));
    }
    Ok([public, control, tunnel])
}

/// Ends the server when one of the threads that it consists of panics: without one of them it would
/// only look alive. The program then ends, and a service manager starts it again.
struct AllOrNone<'a>(&'a Arc<Shared>);

impl Drop for AllOrNone<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.finish();
            self.0.update();
        }
    }
}

/// What the ten functions need besides one another.
impl Shared {
    /// The next connection of a listener; None once the server accepts no more from it.
    pub(super) fn accept(&self, listener: &Listener) -> Option<(TcpStream, SocketAddr)> {
        loop {
            match listener.accept()? {
                Ok(accepted) => return Some(accepted),
                // Out of descriptors or memory, or the connection was reset in the backlog. All
                // pass; to end, or to try again at once, would make them worse.
                Err(error) => {
                    if !listener.pause(ACCEPT_PAUSE) {
                        return None;
                    }
                    self.journal.accept_failed(listener.option, &error);
                }
            }
        }
    }

    /// Runs a job on a worker. If there is no thread for it, its sockets are closed.
    pub(super) fn start(
        self: &Arc<Self>,
        name: &'static str,
        work: impl FnOnce(&Arc<Self>) + Send + 'static,
    ) {
        let server = self.clone();
        if let Err(error) = self.workers.start(name, move || work(&server)) {
            self.journal.no_thread(name, &error);
        }
    }

    /// What the live session's tunnels are tied to, if there is a session with a key.
    pub(super) fn live_bond(&self) -> Option<Bond> {
        self.state.lock().cache.as_ref()?.bond.clone()
    }

    /// Makes a link's client the one that is live, if none is. One that said hello takes the place of
    /// one that did not. Also returns what is to be written to it.
    pub(super) fn begin_session(
        &self,
        link: &Link,
        client: SocketAddr,
    ) -> Result<(Arc<Session>, Receiver<Line>), Refusal> {
        let (session, to_write) = Session::new(link, client);
        session.send(self.first_line(link.proto, client));
        self.forget_hung_up();
        let mut state = self.state.lock();
        if self.stop.reached(Phase::Leaving) {
            return Err(Refusal::Stopping);
        }
        if let Some(live) = &state.cache
            && (live.proto != Proto::Original || link.proto == Proto::Original)
        {
            return Err(Refusal::Busy(live.client));
        }
        for _ in 0..state.conn_list_map.waiting() {
            session.send(NEW);
        }
        let replaced = state.cache.replace(session.clone());
        drop(state);
        if let Some(before) = &replaced {
            before.end();
        }
        let key = link.bond.as_ref().and_then(|bond| self.door.key_of(bond));
        let replaced = replaced.map(|before| before.client);
        self.journal.client_came(client, link.proto, key, replaced);
        self.stop.notify();
        Ok((session, to_write))
    }

    /// The server's first line to a client.
    fn first_line(&self, proto: Proto, client: SocketAddr) -> Line {
        match proto {
            Proto::Original => Line::Hi,
            Proto::Tp2 { id, pool } => Line::Hello {
                proto: PROTO,
                pool,
                welcome: Some(Welcome {
                    session: id,
                    tunnel: Some(self.tunnel.addr.port()),
                    public: Some(self.public.addr.port()),
                    client: Some(client),
                }),
            },
        }
    }

    /// Ends the live session if its client has gone and its own thread has not noticed yet: the next
    /// client may be quicker, above all when this program slept and finds all at once what came
    /// meanwhile.
    fn forget_hung_up(&self) {
        let live = self.state.lock().cache.clone();
        if let Some(live) = live.filter(|live| live.has_hung_up()) {
            self.end_session(&live, &Ended::HungUp);
        }
    }

    /// Ends a session, if it is still the live one, and closes its idle tunnels.
    pub(super) fn end_session(&self, session: &Arc<Session>, ended: &Ended) {
        session.end();
        let mut state = self.state.lock();
        let is_it = |live: &mut Arc<Session>| Arc::ptr_eq(live, session);
        if state.cache.take_if(is_it).is_none() {
            return;
        }
        let idle = state.conn_list_map.take_idle();
        drop(state);
        drop(idle);
        self.journal.client_left(session.client, ended);
    }

    /// Lets a visitor whose tunnel was dead wait for another one, in its turn.
    pub(super) fn put_back(&self, accept: Accept, accept_add_time: Instant) {
        self.journal.dead_tunnel(accept.visitor);
        let mut state = self.state.lock();
        let complete = state.conn_list_map.put_back(accept, accept_add_time);
        drop(state);
        if !complete {
            self.send_message(NEW);
        }
    }

    /// Ends pairs that nobody waits for any more, asks again for tunnels that were lost, and closes those
    /// that nobody needs.
    pub(super) fn look_after_pairs_and_tunnels(&self) {
        self.pairs.sweep();
        let now = Instant::now();
        let mut state = self.state.lock();
        let lost = state.conn_list_map.waiting_since(now, LOST_AFTER);
        let pool = state.cache.as_ref().map_or(0, |live| live.proto.pool());
        let unused = state.conn_list_map.take_unused(now, pool, UNUSED);
        drop(state);
        drop(unused);
        for _ in 0..lost.min(MOST_ASKED_AGAIN) {
            self.send_message(NEW);
        }
    }

    /// Tells the matcher to look at the list again.
    pub(super) fn update(&self) {
        // Full: it has not looked since the last signal, so it will see this change too.
        let _ = self.conn_list_map_update.try_send(());
    }

    /// The visitor that was put into the list last is the last one.
    pub(super) fn take_no_more(&self) {
        self.public.take();
        self.state.lock().all_came = true;
        self.update();
    }

    /// True once nobody waits for a tunnel any more, or may wait, in a server that was told to stop.
    /// A public port that is closed already, or handed over, does not say so: the last visitor may
    /// have been accepted, and not be in the list yet.
    pub(super) fn is_finished(&self) -> bool {
        let state = self.state.lock();
        let all_served = state.all_came && state.conn_list_map.waiting() == 0;
        drop(state);
        all_served || self.stop.reached(Phase::Leaving) || self.stop.time_is_up()
    }
}

/// The end.
impl Half for Shared {
    /// Takes no more visitors, once the next server has had a moment to take them. Those that wait
    /// still get their tunnels, from a client that knows nothing yet; then the matcher
    /// [finishes](Shared::finish).
    fn stop(self: Arc<Self>, drain: Duration) {
        self.stop.end_after(drain);
        self.pairs.look();
        self.update();
        if !self.stop.advance(Phase::HandingOver) {
            return;
        }
        let server = self.clone();
        let hand_over = move || server.hand_over(drain.min(SUCCESSION));
        if self.workers.start("hand_over", hand_over).is_err() {
            self.hand_over(Duration::ZERO);
        }
    }

    fn status(&self) -> Status {
        let state = self.state.lock();
        let session = state.cache.as_ref().map(|live| live.proto.name());
        let (waiting, idle) = (state.conn_list_map.waiting(), state.conn_list_map.idle());
        drop(state);
        self.journal.status(session, &self.pairs, waiting, idle)
    }

    fn wait_for_session(&self, limit: Duration) -> bool {
        self.stop
            .wait_for(limit, || self.state.lock().cache.is_some())
    }
}

impl Shared {
    /// Leaves the visitors to the server that takes this one's place, if it asks for them in time.
    fn hand_over(&self, time: Duration) {
        let listeners = [&self.public, &self.control, &self.tunnel].map(Listener::socket);
        let listeners: Vec<_> = listeners.iter().flatten().map(|it| &**it).collect();
        let ended = || self.stop.reached(Phase::Leaving);
        match Successor::find(self.public.addr, &listeners, time, ended) {
            Ok(Some(successor)) => {
                Journal::handed_over();
                let mut place = self.successor.lock();
                // A server that has finished does not look there again.
                if !ended() {
                    *place = Some(successor);
                }
                drop(place);
                self.public.take();
            }
            Ok(None) => {}
            Err(error) => self.journal.hand_over_failed(&error),
        }
        self.stop.advance(Phase::Draining);
        self.public.wake();
        self.slots.close();
    }

    /// Nobody waits any more, and those that are joined need no client: the ports are closed, matches
    /// that were complete before are joined, and the session ends.
    pub(super) fn finish(self: &Arc<Self>) {
        self.stop.advance(Phase::Leaving);
        for listener in [&self.public, &self.tunnel, &self.control] {
            listener.take();
        }
        // It may accept from all of them now.
        *self.successor.lock() = None;
        self.slots.close();
        self.door.close();
        let mut state = self.state.lock();
        let session = state.cache.take();
        let promised = std::iter::from_fn(|| state.conn_list_map.take_match());
        let promised: Vec<_> = promised.collect();
        let unjoined = state.conn_list_map.clear();
        drop(state);
        drop(unjoined);
        for (accept, _, tunnel) in promised {
            if let Some(tunnel) = tunnel.greet(&accept) {
                self.join_conn2(accept, tunnel);
            }
        }
        if let Some(session) = session {
            let reason = Reason::Draining;
            session.send(Line::Bye { reason });
            session.end();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::address::Address;

    fn server() -> (Arc<Shared>, Receiver<()>) {
        let any = Address::new("127.0.0.1", 0);
        let mut options = ServerOptions::new();
        (options.public, options.tunnel, options.control) = (any.clone(), any.clone(), any);
        let (server, updates) = Shared::bind(options).unwrap();
        (Arc::new(server), updates)
    }

    /// The second call finds the server waiting for a successor.
    #[test]
    fn a_server_that_is_stopped_twice_waits_for_no_successor() {
        let (server, updates) = server();
        server.clone().stop(SUCCESSION);
        server.clone().stop(Duration::ZERO);
        server.run(&updates).unwrap();
        assert_eq!(Arc::strong_count(&server), 1, "a thread has the server");
    }

    #[test]
    fn a_visitor_that_is_accepted_and_not_in_the_list_yet_is_waited_for() {
        let (server, _updates) = server();
        // As when another server takes over.
        server.public.take();
        assert!(!server.is_finished());
        server.take_no_more();
        assert!(server.is_finished());
    }
}
