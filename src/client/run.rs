//! How a client begins, and how it ends.

use std::collections::HashSet;
use std::io;
use std::net::TcpStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::Receiver;
use parking_lot::Mutex;

use crate::address::Address;
use crate::client::Shared;
use crate::client::backoff::{Backoff, random_fraction};
use crate::client::shown::Unreached;
use crate::error::Error;
use crate::handle::Half;
use crate::journal::{self, Journal, Status};
use crate::options::{ClientOptions, check_known, check_services};
use crate::os::limits::{Slots, affordable_visitors};
use crate::os::workers::Workers;
use crate::relay::{Pairs, SWEEP};
use crate::session::Ended;
use crate::session::of_client::Session;
use crate::status::port::{self, StatusPort};
use crate::stop::{Phase, Stop};
use crate::wire::conn::Writer;
use crate::wire::line::{HEARTBEAT, Line, SILENCE};

/// A server that the client connects to.
pub struct Upstream {
    /// Its control port.
    pub address: Address,
    /// The session with it, while there is one.
    session: Mutex<Option<Arc<Session>>>,
}

impl Upstream {
    /// The session with it, if that lives.
    pub fn live(&self) -> Option<Arc<Session>> {
        let session = self.session.lock().clone();
        session.filter(|session| session.is_live())
    }

    fn say_bye(&self) {
        if let Some(session) = self.session.lock().take() {
            session.say_bye_and_end();
        }
    }
}

/// An error if the options make no sense, on whatever machine.
pub fn check_options(options: &ClientOptions) -> Result<(), Error> {
    if options.servers.is_empty() {
        return Err(Error::NoServers);
    }
    let (local, headers) = (&options.local, &options.proxy_protocol);
    check_services("--local", local)?;
    check_known("--proxy-protocol", headers.keys(), local)
}

/// A stopping client gives its threads this long to finish. After a link that broke without a bye, idle
/// tunnels are cut after this long; after a bye, after [`SILENCE`].
const LAST_WORDS: Duration = Duration::from_millis(250);

impl Shared {
    pub(super) fn new(options: ClientOptions) -> Self {
        let stop = Stop::new();
        let affordable = affordable_visitors(0, options.servers.len());
        let (sealed, is_shown) = (options.key.is_some(), options.status.is_some());
        let journal = Arc::new(Journal::new(affordable, sealed, is_shown).of_client());
        let status = StatusPort::new(options.status.as_ref(), options.insecure_status, &stop);
        let servers = options.servers.iter().map(|address| Upstream {
            address: address.clone(),
            session: Mutex::new(None),
        });
        Self {
            servers: servers.collect(),
            unreached: Unreached::new(options.local.keys()),
            options,
            workers: Workers::new(journal::panicked),
            pairs: Pairs::new(stop.clone(), is_shown, journal.tells_of_visits()),
            slots: Slots::new(affordable),
            own_dials: Mutex::new(HashSet::new()),
            status,
            stop,
            journal,
        }
    }

    /// Runs until the client has ended.
    pub(super) fn run(self: &Arc<Self>) -> Result<(), Error> {
        check_options(&self.options)?;
        self.status.open()?;
        let shown = port::show(self)?;
        for number in 0..self.servers.len() {
            let shared = self.clone();
            let keep_connected = move || shared.keep_connected(&shared.servers[number]);
            let started = self.workers.start("control", keep_connected);
            if let Err(error) = started {
                self.clone().stop(Duration::ZERO);
                return Err(Error::Thread(error));
            }
        }
        while self.stop.sleep(SWEEP, Phase::Leaving) {
            self.pairs.sweep();
        }
        self.pairs.wait();
        drop(shown);
        self.workers.wait(LAST_WORDS);
        Ok(())
    }

    /// One session with a server after another, for ever.
    fn keep_connected(self: &Arc<Self>, upstream: &Upstream) {
        let server = &upstream.address;
        let mut backoff = Backoff::new(Instant::now());
        self.journal.connecting(server);
        loop {
            let result = self.connect_control(upstream);
            if self.stop.reached(Phase::Draining) {
                return;
            }
            if let Ok((_, true)) = result {
                backoff = Backoff::new(Instant::now());
            }
            let pause = backoff.next(Instant::now(), random_fraction());
            match result {
                Ok((ended, _)) => self.journal.lost(server, &ended, pause),
                Err(why) => self.journal.no_session(server, &why, pause),
            }
            if !self.stop.sleep(pause, Phase::Draining) {
                return;
            }
        }
    }

    /// Warns if there is no key, and the server is on another host.
    pub(super) fn warn_without_key(&self, server: &Upstream, control: &TcpStream) {
        let is_near = |addr: std::net::SocketAddr| addr.ip().to_canonical().is_loopback();
        if self.options.key.is_none() && !control.peer_addr().is_ok_and(is_near) {
            self.journal.no_key(&server.address);
        }
    }

    /// From now on this is the session that a stop ends.
    pub(super) fn begin_session(&self, server: &Upstream, session: &Arc<Session>) {
        let local = &self.options.local;
        self.journal.connected(&server.address, session, local);
        *server.session.lock() = Some(session.clone());
        if self.stop.reached(Phase::Draining) {
            // The stop may have come too early to find this session.
            session.say_bye_and_end();
        }
        self.stop.notify();
    }

    /// Starts the thread that writes to the server. It also dials tunnels again that could not be
    /// dialled or that the server has closed.
    pub(super) fn start_writer(
        self: &Arc<Self>,
        session: &Arc<Session>,
        writer: Writer,
        to_write: Receiver<Line>,
    ) -> io::Result<()> {
        let (client, owned) = (self.clone(), session.clone());
        self.workers.start("control_writer", move || {
            owned.write_lines(writer, &to_write, || client.refill_if_low(&owned));
        })
    }

    /// Ends a session. Returns why, and whether it was of use.
    pub(super) fn end_session(&self, session: &Arc<Session>, ended: Ended) -> (Ended, bool) {
        let useful = session.began.elapsed() >= HEARTBEAT || session.has_served();
        session.end();
        // After a bye of either side the server closes idle tunnels. One that it gave a visitor before
        // is still served, however far away the server is; meanwhile the next session may begin.
        let limit = match ended {
            Ended::Bye(_) => SILENCE,
            _ if self.stop.reached(Phase::Draining) => SILENCE,
            _ => LAST_WORDS,
        };
        let owned = session.clone();
        let cut = move || owned.cut_idle_after(limit);
        if self.workers.start("cut_idle", cut).is_err() {
            session.cut_idle_after(LAST_WORDS);
        }
        (ended, useful)
    }

    fn say_bye(&self) {
        self.servers.iter().for_each(Upstream::say_bye);
    }
}

impl Half for Shared {
    fn stop(self: Arc<Self>, drain: Duration) {
        self.stop.end_after(drain);
        self.pairs.look();
        // A session that ends from now on was not lost, and one that begins says bye by itself.
        self.stop.advance(Phase::Draining);
        // Before `run` looks, so that no visitor is expected any more then.
        self.say_bye();
        self.stop.advance(Phase::Leaving);
    }

    fn status(&self) -> Status {
        let sessions: Vec<_> = self.servers.iter().filter_map(Upstream::live).collect();
        let names = sessions.iter().map(|session| session.proto.name());
        let mut status = self.journal.status(names.collect(), &self.pairs);
        for session in sessions {
            let (dialled, idle) = session.tunnels();
            status.waiting += dialled;
            status.idle += idle;
        }
        status
    }

    fn status_port(&self) -> &StatusPort {
        &self.status
    }

    fn wait_for_session(&self, limit: Duration) -> bool {
        let is_live = || self.servers.iter().any(|server| server.live().is_some());
        self.stop.wait_for(limit, is_live)
    }
}
