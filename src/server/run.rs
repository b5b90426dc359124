//! How a server begins, and how it ends.

use std::collections::BTreeMap;
use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, bounded};
use parking_lot::Mutex;

use crate::address::Address;
use crate::conn_match::ConnList;
use crate::door::Door;
use crate::error::Error;
use crate::handle::Half;
use crate::journal::{self, Journal, Status};
use crate::options::{ServerOptions, check_known, check_services};
use crate::os::hand_over::{Inherited, Successor};
use crate::os::limits::{Slots, affordable_visitors};
use crate::os::listener::{Listener, Opening};
use crate::os::workers::Workers;
use crate::relay::Pairs;
use crate::server::ends::{ANSWER_TIMEOUT, Public};
use crate::server::entry::Entry;
use crate::server::{Shared, State};
use crate::status::port::{self, StatusPort};
use crate::stop::{Phase, Stop};
use crate::wire::line::{Arrival, Line, Reason};

/// What the release thread can sleep: never nothing, and within what an `Instant` can hold.
const PAIR_TIMEOUTS: (Duration, Duration) = (
    Duration::from_millis(10),
    Duration::from_secs(366 * 24 * 60 * 60),
);

/// How long a server that was told to stop serves on, for the next one to take over its ports: many
/// looks of one that waits for them, on a busy host.
const SUCCESSION: Duration = Duration::from_millis(300);

/// How long a visitor's connection may be under way: from the server's answer to the visitor and back.
const ARRIVAL: Duration = Duration::from_millis(100);

/// What a stopping server gives its threads for their last words. They need microseconds, if
/// nothing is wrong.
const LAST_WORDS: Duration = Duration::from_millis(250);

/// The beginning.
impl Shared {
    /// Opens all ports; also returns what wakes the matcher.
    pub(super) fn bind(mut options: ServerOptions) -> Result<(Self, Receiver<()>), Error> {
        check_options(&options)?;
        let (shortest, longest) = PAIR_TIMEOUTS;
        options.pair_timeout = options.pair_timeout.clamp(shortest, longest);
        let affordable = affordable_visitors(2 + options.public.len(), options.clients);
        if affordable < options.max_conns {
            Journal::few_descriptors(options.max_conns, affordable);
            options.max_conns = affordable;
        }
        let sealed = !options.keys.is_empty();
        let stop = Stop::new();
        let (public, control, tunnel) = open_ports(&options, &stop, longest)?;
        let status = StatusPort::new(options.status.as_ref(), options.insecure_status, &stop);
        status.open()?;
        let is_shown = options.status.is_some();
        let journal = Journal::new(options.max_conns, sealed, is_shown);
        let journal = Arc::new(journal.of_server());
        let (conn_list_map_update, updates) = bounded(1);
        let shared = Self {
            slots: Slots::new(options.max_conns),
            next_visit: AtomicU64::new(1),
            door: Door::new(&options, tunnel.is_none()),
            entry: Entry::new(&options),
            pairs: Pairs::new(stop.clone(), is_shown, journal.tells_of_visits()),
            options,
            state: Mutex::new(State {
                conn_list_map: ConnList::new(),
                public_open: public.len(),
                asked: Vec::new(),
                coming: vec![0; public.len()],
            }),
            public,
            tunnel,
            control,
            conn_list_map_update,
            workers: Workers::new(journal::panicked),
            stop,
            status,
            successor: Mutex::new(None),
            journal,
        };
        Ok((shared, updates))
    }

    /// Runs the threads that the server consists of, until it has ended.
    pub(super) fn run(self: &Arc<Self>, updates: &Receiver<()>) -> Result<(), Error> {
        let public = self.public.iter();
        let public = public.map(|public| (&public.service, public.listener.addr));
        self.journal
            .listening(&self.options, public, self.tunnel_addr(), self.control.addr);
        let shown = port::show(self)?;
        type Work<'a> = Box<dyn FnOnce() + Send + 'a>;
        let mut threads: Vec<(String, Work)> = vec![
            ("make_control".to_owned(), Box::new(|| self.make_control())),
            ("make_forward".to_owned(), Box::new(|| self.make_forward())),
            ("release".to_owned(), Box::new(|| self.release_conn_match())),
        ];
        for (service, public) in self.public.iter().enumerate() {
            let accept = move || self.make_accept(service);
            threads.push((public.thread_name(), Box::new(accept)));
        }
        thread::scope(|scope| {
            for (name, work) in threads {
                let work = move || {
                    let _all = AllOrNone(self);
                    work();
                };
                let started = thread::Builder::new().name(name).spawn_scoped(scope, work);
                if let Err(error) = started {
                    self.finish();
                    return Err(Error::Thread(error));
                }
            }
            let _all = AllOrNone(self);
            self.tcp_forward(updates);
            Ok(())
        })?;
        self.pairs.wait();
        drop(shown);
        self.workers.wait(LAST_WORDS);
        Ok(())
    }
}

/// An error if the options make no sense, on whatever machine.
fn check_options(options: &ServerOptions) -> Result<(), Error> {
    if options.max_conns == 0 {
        return Err(Error::NoVisitors);
    }
    if options.clients == 0 {
        return Err(Error::NoClients);
    }
    check_services("--public", &options.public)?;
    for (option, rules) in [("--allow", &options.allow), ("--deny", &options.deny)] {
        let names = rules.iter().filter_map(|(name, _)| name.as_ref());
        check_known(option, names, &options.public)?;
    }
    if options.original && options.clients > 1 {
        return Err(Error::NotOriginal("--clients"));
    }
    if options.original && options.has_one_port() {
        return Err(Error::NotOriginal("--tunnel"));
    }
    check_apart(options)
}

/// See [`Server::can_follow`](crate::Server::can_follow).
pub(super) fn can_follow(options: &ServerOptions, before: &ServerOptions) -> Result<(), Error> {
    check_options(options)?;
    port::check(options.status.as_ref(), options.insecure_status)?;
    let sealed_or_open = options.insecure || !options.keys.is_empty();
    for (option, address) in addresses(options) {
        if option == "--status" {
            continue;
        }
        let anywhere = option == "--public" || sealed_or_open;
        let now = Instant::now();
        match Listener::find(option, address, anywhere, now, &mut |_| None, &|_| ()) {
            Err(Error::Listen(_, _, error))
                if error.kind() == io::ErrorKind::AddrInUse
                    && addresses(before)
                        .iter()
                        .any(|(_, taken)| address.overlaps(taken)) => {}
            opened => drop(opened?),
        }
    }
    Ok(())
}

/// Where a server with these options listens, each with its option.
fn addresses(options: &ServerOptions) -> Vec<(&'static str, &Address)> {
    let public = options.public.values().map(|address| ("--public", address));
    let mut all: Vec<_> = public.collect();
    all.push(("--control", &options.control));
    if !options.has_one_port() {
        all.push(("--tunnel", &options.tunnel));
    }
    all.extend(options.status.as_ref().map(|address| ("--status", address)));
    all
}

/// An error if two ports would be the same one: the second would be waited for in vain. Tunnels may come
/// to the very address of the control port.
fn check_apart(options: &ServerOptions) -> Result<(), Error> {
    let mut taken: Vec<(&str, &Address)> = Vec::new();
    for (option, address) in addresses(options) {
        if let Some((other, taken)) = taken.iter().find(|(_, taken)| address.overlaps(taken)) {
            return Err(Error::SameAddress(option, other, (*taken).clone()));
        }
        taken.push((option, address));
    }
    Ok(())
}

/// The ports for visitors, the control port, and the tunnel port if that is another one. The control
/// port comes first, as it is the one that two servers have in common if one takes the place of the
/// other; the old one hands over all of its ports at once.
fn open_ports(
    options: &ServerOptions,
    stop: &Arc<Stop>,
    longest: Duration,
) -> Result<(Vec<Public>, Listener, Option<Listener>), Error> {
    let anywhere = options.insecure || !options.keys.is_empty();
    let patience = options.port_patience.min(longest);
    let until = Instant::now() + patience;
    let mut inherited = Inherited::default();
    let take_control = |inherited: &mut Inherited, control: SocketAddr| {
        let listener = inherited.take_control(control)?;
        // One at 192.0.2.1:80 would be in the way of [::]:80.
        let wanted = addresses(options).into_iter();
        let wanted = wanted.filter_map(|(_, address)| address.resolve().ok());
        let wanted: Vec<_> = wanted.flatten().collect();
        inherited.keep(|address| wanted.contains(&address));
        Some(listener)
    };
    type Take<'a> = &'a dyn Fn(&mut Inherited, SocketAddr) -> Option<TcpListener>;
    let mut open = |option, address, anywhere, closes_at, take: Take| {
        let told = |opening| Journal::opening(option, &opening);
        let mut taken = |address| take(&mut inherited, address);
        let socket = Listener::find(option, address, anywhere, until, &mut taken, &told)?;
        Listener::new(option, socket, stop.clone(), closes_at)
    };
    let (draining, leaving) = (Phase::Draining, Phase::Leaving);
    let control = &options.control;
    let control = open("--control", control, anywhere, leaving, &take_control)?;
    let public = options.public.iter().map(|(service, address)| {
        Ok(Public {
            service: service.clone(),
            listener: open("--public", address, true, draining, &Inherited::take)?,
        })
    });
    let public = public.collect::<Result<_, Error>>()?;
    let tunnel = Some(&options.tunnel).filter(|_| !options.has_one_port());
    let tunnel = tunnel
        .map(|tunnel| open("--tunnel", tunnel, anywhere, leaving, &Inherited::take))
        .transpose()?;
    // Nobody else takes visitors now: the old server gets the whole time for those that wait there, be
    // it for a client's answer. To give up would leave visitors with no server at all.
    if !inherited.wait(Instant::now() + patience + ANSWER_TIMEOUT) {
        Journal::opening(control.option, &Opening::Shared(control.addr));
    }
    Ok((public, control, tunnel))
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
    /// The next connection of a listener, and the place that was taken for it; None once the server
    /// accepts no more from there.
    pub(super) fn accept<P>(
        &self,
        listener: &Listener,
        place: impl Fn() -> Option<P>,
    ) -> Option<(TcpStream, SocketAddr, P)> {
        let failed = |error: &_| self.journal.accept_failed(listener.option, error);
        listener.accept(place, failed)
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

    /// Where tunnels come to.
    pub(super) fn tunnel_addr(&self) -> SocketAddr {
        self.tunnel.as_ref().unwrap_or(&self.control).addr
    }

    /// Tells the matcher to look at the list again.
    pub(super) fn update(&self) {
        // Full: it has not looked since the last signal, so it will see this change too.
        let _ = self.conn_list_map_update.try_send(());
    }

    /// Closes a port for visitors, once its last visitor has been put into the list.
    pub(super) fn take_no_more(&self, listener: &Listener) {
        listener.take();
        self.state.lock().public_open -= 1;
        self.update();
    }

    /// True once no visitor waits and none can come any more, or the time for the drain is over, or the
    /// server is leaving. A closed port alone does not mean that none can come: its last visitor may be
    /// accepted and not yet in the list.
    pub(super) fn is_finished(&self) -> bool {
        let state = self.state.lock();
        let nobody_is_coming = state.coming.iter().all(|it| *it == 0);
        let nobody_comes = state.public_open == 0 && nobody_is_coming;
        let nobody_waits = state.conn_list_map.waiting().len() == 0 && state.asked.is_empty();
        let all_served = nobody_comes && nobody_waits;
        drop(state);
        all_served || self.stop.reached(Phase::Leaving) || self.stop.time_is_up()
    }

    /// All ports, those for visitors first.
    fn listeners(&self) -> impl Iterator<Item = &Listener> {
        let public = self.public.iter().map(|public| &public.listener);
        public.chain([&self.control]).chain(&self.tunnel)
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
        let list = &state.conn_list_map;
        let sessions = list.clients().map(|live| live.proto.name()).collect();
        let mut waiting: BTreeMap<_, _> = self.options.public.keys().map(|it| (it, 0)).collect();
        for accept in list.waiting() {
            *waiting.entry(self.service_of(accept)).or_default() += 1;
        }
        let asked = state.asked.iter().map(|it| (it.service, 1));
        let coming = state.coming.iter().copied().enumerate();
        for (service, count) in asked.chain(coming) {
            let service = &self.public[service].service;
            *waiting.entry(service).or_default() += count;
        }
        let idle = list.idle();
        drop(state);
        let mut status = self.journal.status(sessions, &self.pairs);
        status.idle = idle;
        for (service, waiting) in waiting {
            status.waiting += waiting;
            status.services.entry(service.clone()).or_default().waiting = waiting;
        }
        status
    }

    fn status_port(&self) -> &StatusPort {
        &self.status
    }

    fn wait_for_session(&self, limit: Duration) -> bool {
        let is_live = || self.state.lock().conn_list_map.clients().next().is_some();
        self.stop.wait_for(limit, is_live)
    }
}

impl Shared {
    /// Leaves the visitors to the server that takes this one's place, if it asks for them in time.
    fn hand_over(&self, time: Duration) {
        let listeners: Vec<_> = self.listeners().filter_map(Listener::socket).collect();
        let listeners: Vec<_> = listeners.iter().map(|it| &**it).collect();
        let ended = || self.stop.reached(Phase::Leaving);
        match Successor::find(self.control.addr, &listeners, time, ended) {
            Ok(Some(successor)) => {
                self.journal.handed_over();
                self.status.close();
                let mut place = self.successor.lock();
                // A server that has finished does not look there again.
                if !ended() {
                    *place = Some(successor);
                }
                drop(place);
                for public in &self.public {
                    public.listener.take();
                }
            }
            Ok(None) => self.let_last_visitors_come(time),
            Err(error) => {
                self.journal.hand_over_failed(&error);
                self.let_last_visitors_come(time);
            }
        }
        self.stop.advance(Phase::Draining);
        for public in &self.public {
            public.listener.wake();
        }
        self.slots.close();
    }

    /// Gives visitors who are on their way a moment to arrive, and lets no others set out.
    fn let_last_visitors_come(&self, time: Duration) {
        for public in &self.public {
            public.listener.let_nobody_begin();
        }
        self.stop.sleep(time.min(ARRIVAL), Phase::Draining);
    }

    /// Ends the server's part in new visits: it closes the ports, joins the matches that are complete,
    /// closes the visitors who still wait and the idle tunnels, and ends every session. Joined visitors go
    /// on.
    pub(super) fn finish(self: &Arc<Self>) {
        self.stop.advance(Phase::Leaving);
        for listener in self.listeners() {
            listener.take();
        }
        // The successor may accept from all of them now.
        *self.successor.lock() = None;
        self.slots.close();
        self.door.close();
        let mut state = self.state.lock();
        let list = &mut state.conn_list_map;
        let sessions: Vec<_> = list.clients().cloned().collect();
        let promised = std::iter::from_fn(|| list.take_match());
        let promised: Vec<_> = promised.collect();
        let unjoined = list.clear();
        drop(state);
        drop(unjoined);
        for it in promised {
            let arrival = Arrival {
                answer: false,
                ..self.arrival(&it.accept, &it.client)
            };
            if let Some(tunnel) = it.tunnel.greet(&it.accept, arrival) {
                self.join_conn2(it.accept, tunnel, &it.client, it.client.place());
            }
        }
        for session in sessions {
            let reason = Reason::Draining;
            session.send(Line::Bye { reason });
            session.end();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::service::Service;

    fn server() -> (Arc<Shared>, Receiver<()>) {
        let any = Address::new("127.0.0.1", 0);
        let mut options = ServerOptions::new();
        options.public = [(Service::default(), any.clone())].into();
        (options.tunnel, options.control) = (any.clone(), any);
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
        let public = &server.public[0].listener;
        public.take();
        assert!(!server.is_finished());
        server.take_no_more(public);
        assert!(server.is_finished());
    }
}
