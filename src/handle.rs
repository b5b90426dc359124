//! What a program that embeds a server or a client holds in its hands.

use std::fmt;
use std::io;
use std::sync::{Arc, Weak};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crate::error::Error;
use crate::journal::Status;

/// What a [`Handle`] holds on to: a server or a client.
pub trait Half: Send + Sync {
    /// See [`Handle::stop`].
    fn stop(self: Arc<Self>, drain: Duration);

    /// See [`Handle::status`].
    fn status(&self) -> Status;

    /// See [`Handle::wait_for_session`].
    fn wait_for_session(&self, limit: Duration) -> bool;
}

/// Stops the [`Server`](crate::Server) or [`Client`](crate::Client) that it came from, and tells how
/// it does. Clones belong to the same one.
#[derive(Clone)]
pub struct Handle(Weak<dyn Half>);

impl Handle {
    /// A handle does not keep alive what it stops, nor its ports.
    pub(crate) fn new<T: Half + 'static>(half: &Arc<T>) -> Self {
        // With its type written out: only a pointer to a known type can become one to a trait object.
        let half: Weak<T> = Arc::downgrade(half);
        Self(half)
    }

    /// Takes no more visitors, tells the other side, gives the visitors that are there up to `drain`
    /// to finish, and aborts those that have not. `run` then returns; this call does not wait for
    /// it. A second call can only shorten the time.
    pub fn stop(&self, drain: Duration) {
        if let Some(half) = self.0.upgrade() {
            half.stop(drain);
        }
    }

    /// What it does now, and has done; None once all of it has ended.
    pub fn status(&self) -> Option<Status> {
        Some(self.0.upgrade()?.status())
    }

    /// Waits until the client is connected to the server, and returns whether it is within this time.
    /// False at once if it stops. Why it is not yet, a client tells in
    /// [`Status::last_error`](crate::Status::last_error).
    pub fn wait_for_session(&self, limit: Duration) -> bool {
        self.0
            .upgrade()
            .is_some_and(|half| half.wait_for_session(limit))
    }
}

impl fmt::Debug for Handle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Handle")
    }
}

/// A server or a client at work on a thread of its own.
#[derive(Debug)]
pub struct Running {
    handle: Handle,
    thread: JoinHandle<Result<(), Error>>,
}

impl Running {
    pub(crate) fn spawn(
        name: &str,
        handle: Handle,
        run: impl FnOnce() -> Result<(), Error> + Send + 'static,
    ) -> Result<Self, Error> {
        let thread = thread::Builder::new().name(name.to_owned());
        let thread = thread.spawn(run).map_err(Error::Thread)?;
        Ok(Self { handle, thread })
    }

    /// What stops it, and tells how it does.
    pub fn handle(&self) -> &Handle {
        &self.handle
    }

    /// Waits until it has ended.
    ///
    /// # Errors
    /// The system refused one of its threads.
    pub fn join(self) -> Result<(), Error> {
        let panicked = |_| Error::Thread(io::Error::other("it panicked"));
        self.thread.join().map_err(panicked)?
    }
}
