//! What a program that embeds a server or a client controls it with.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Weak};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crate::error::Error;
use crate::journal::Status;
use crate::status::port::StatusPort;

/// A server or a client, as a [`Handle`] sees it.
pub trait Half: Send + Sync {
    /// See [`Handle::stop`].
    fn stop(self: Arc<Self>, drain: Duration);

    /// See [`Handle::status`].
    fn status(&self) -> Status;

    /// Returns the port of the status page.
    fn status_port(&self) -> &StatusPort;

    /// See [`Handle::wait_for_session`].
    fn wait_for_session(&self, limit: Duration) -> bool;
}

/// Stops the [`Server`](crate::Server) or [`Client`](crate::Client) that it came from, and tells its
/// status. Clones belong to the same server or client.
#[derive(Clone)]
pub struct Handle(Weak<dyn Half>);

impl Handle {
    /// Makes a handle, which keeps neither the server or client nor its ports alive.
    pub(crate) fn new<T: Half + 'static>(half: &Arc<T>) -> Self {
        // The type is written out, as only a pointer to a known type becomes one to a trait object.
        let half: Weak<T> = Arc::downgrade(half);
        Self(half)
    }

    /// Takes no more visitors (a server still takes those of the next 0.4 s at most), tells the other side, gives
    /// the visitors who are there up to `drain` to finish, and aborts those who have not. `run` then
    /// returns, but this call does not wait for that. A second call can only shorten the time.
    pub fn stop(&self, drain: Duration) {
        if let Some(half) = self.0.upgrade() {
            half.stop(drain);
        }
    }

    /// Leaves new visitors, the ports and the status page to another server or client, which takes this
    /// one's place. The visitors who are there have as long as they like.
    pub fn make_way(&self) {
        if let Some(half) = self.0.upgrade() {
            half.status_port().close();
            half.stop(Duration::MAX);
        }
    }

    /// Returns what the server or client does now and has done, or None once it has ended.
    pub fn status(&self) -> Option<Status> {
        Some(self.0.upgrade()?.status())
    }

    /// Returns where the status page is. None if there is none, while another program has its port, on
    /// a client before it runs, and in the end.
    pub fn status_addr(&self) -> Option<SocketAddr> {
        self.0.upgrade()?.status_port().addr()
    }

    /// Waits until a client and a server are connected. Returns false after this time, or once the server
    /// or client no longer takes visitors, as it was stopped. A client tells in
    /// [`Status::last_error`](crate::Status::last_error) why it is not connected yet.
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

    /// Returns the handle that stops it and tells its status.
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
