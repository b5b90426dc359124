//! The port of a status page, from the option to the end of the server or client.

use std::io::ErrorKind::AddrInUse;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::http::{self, LIMIT};
use super::route;
use super::snapshot::Snapshot;
use crate::address::Address;
use crate::error::Error;
use crate::handle::Half;
use crate::journal::Journal;
use crate::os::listener::Listener;
use crate::os::workers::Workers;
use crate::stop::{Phase, Stop};

const OPTION: &str = "--status";

/// A port in use is tried again this often.
const AGAIN: Duration = Duration::from_secs(1);

/// What a status page shows, and what it is served with.
pub trait Shows: Half + 'static {
    /// Returns what there is now.
    fn snapshot(&self) -> Snapshot;

    /// Returns whose threads answer.
    fn workers(&self) -> &Workers;

    /// Returns what is told of the page itself.
    fn journal(&self) -> &Journal;
}

/// The port of a status page, if one was asked for. A port in use keeps nobody from the visitors: most
/// likely a program has it whose place this one takes, and which serves its last visitors.
pub struct StatusPort {
    address: Option<Address>,
    anywhere: bool,
    stop: Arc<Stop>,
    state: Mutex<State>,
}

enum State {
    /// Not yet open.
    Waiting,
    Open(Arc<Listener>),
    /// Nobody is to come any more.
    Closed,
}

impl StatusPort {
    /// A port at this address. It must be a loopback one, unless `anywhere`.
    pub fn new(address: Option<&Address>, anywhere: bool, stop: &Arc<Stop>) -> Self {
        Self {
            address: address.cloned(),
            anywhere,
            stop: stop.clone(),
            state: Mutex::new(State::Waiting),
        }
    }

    /// Opens the port, unless it is in use.
    ///
    /// # Errors
    /// The host has no address, or one that is not this host's, or that other hosts could reach.
    pub fn open(&self) -> Result<(), Error> {
        let Some(address) = &self.address else {
            return Ok(());
        };
        let now = Instant::now();
        match Listener::find(OPTION, address, self.anywhere, now, &mut |_| None, &|_| ()) {
            Ok(socket) => {
                let listener = Listener::new(OPTION, socket, self.stop.clone(), Phase::Done)?;
                let mut state = self.state.lock();
                if matches!(*state, State::Waiting) {
                    *state = State::Open(Arc::new(listener));
                }
                Ok(())
            }
            Err(Error::Listen(_, _, error)) if error.kind() == AddrInUse => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Returns where the page is, if it is.
    pub fn addr(&self) -> Option<SocketAddr> {
        Some(self.listener()?.addr)
    }

    fn listener(&self) -> Option<Arc<Listener>> {
        match &*self.state.lock() {
            State::Open(listener) => Some(listener.clone()),
            State::Waiting | State::Closed => None,
        }
    }

    /// Closes the port, now or as soon as it would open.
    pub fn close(&self) {
        let state = std::mem::replace(&mut *self.state.lock(), State::Closed);
        if let State::Open(listener) = state {
            listener.take();
        }
    }

    /// Waits until the port is open. None once it never will be.
    fn wait(&self, journal: &Journal) -> Option<Arc<Listener>> {
        let mut said = false;
        loop {
            match &*self.state.lock() {
                State::Waiting => {}
                State::Open(listener) => return Some(listener.clone()),
                State::Closed => return None,
            }
            if !std::mem::replace(&mut said, true) {
                journal.status_port_in_use(self.address.as_ref()?);
            }
            if !self.stop.sleep(AGAIN, Phase::Done) {
                return None;
            }
            // It is tried again, whatever the reason.
            let _ = self.open();
        }
    }
}

/// An error if a page could not be at this address, whoever has the port now.
pub fn check(address: Option<&Address>, anywhere: bool) -> Result<(), Error> {
    StatusPort::new(address, anywhere, &Stop::new()).open()
}

/// A page that is served until this is dropped.
pub struct Shown<T: Shows>(Arc<T>);

impl<T: Shows> Drop for Shown<T> {
    fn drop(&mut self) {
        self.0.status_port().close();
    }
}

/// Serves the page that was asked for, if one was, on a thread of its own.
///
/// # Errors
/// The system refused that thread.
pub fn show<T: Shows>(half: &Arc<T>) -> Result<Option<Shown<T>>, Error> {
    if half.status_port().address.is_none() {
        return Ok(None);
    }
    let owned = half.clone();
    let answer = move || {
        let (workers, journal) = (owned.workers(), owned.journal());
        let Some(listener) = owned.status_port().wait(journal) else {
            return;
        };
        journal.status_page(listener.addr);
        let shown = owned.clone();
        let route = move |path: &str| route(path, || shown.snapshot());
        http::serve(&listener, workers, journal, LIMIT, route);
    };
    let started = half.workers().start("status", answer);
    started.map_err(Error::Thread)?;
    Ok(Some(Shown(half.clone())))
}
