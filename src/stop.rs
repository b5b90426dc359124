//! How a running server or client is asked to stop, and how it does.

use std::convert::Infallible;
use std::fmt;
use std::sync::{Arc, Weak};
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};
use parking_lot::Mutex;

use crate::status::Status;

/// What a [`Handle`] holds on to.
pub trait Running: Send + Sync {
    /// See [`Handle::stop`].
    fn stop(self: Arc<Self>, drain: Duration);

    /// See [`Handle::status`].
    fn status(&self) -> Status;
}

/// Stops the [`Server`](crate::Server) or [`Client`](crate::Client) that it came from, and tells how
/// it does. Clones belong to the same one.
#[derive(Clone)]
pub struct Handle(Weak<dyn Running>);

impl Handle {
    /// A handle does not keep alive what it stops, nor its ports.
    pub(crate) fn new<T: Running + 'static>(shared: &Arc<T>) -> Self {
        // Written out: what is downgraded must have its own type still.
        let shared: Weak<T> = Arc::downgrade(shared);
        Self(shared)
    }

    /// Takes no more visitors, tells the other side, gives the visitors that are there up to `drain`
    /// to finish, and aborts those that have not. `run` then returns; this call does not wait for
    /// it. A second call can only shorten the time.
    pub fn stop(&self, drain: Duration) {
        if let Some(running) = self.0.upgrade() {
            running.stop(drain);
        }
    }

    /// What it does now, and has done; None once all of it has ended.
    pub fn status(&self) -> Option<Status> {
        Some(self.0.upgrade()?.status())
    }
}

impl fmt::Debug for Handle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Handle")
    }
}

/// A signal that is given once and ends every wait for it: a channel that never carries anything,
/// and whose only sender is dropped.
pub struct Stop {
    sender: Mutex<Option<Sender<Infallible>>>,
    receiver: Receiver<Infallible>,
}

impl Stop {
    /// A signal not yet given.
    pub fn new() -> Self {
        let (sender, receiver) = bounded(0);
        Self {
            sender: Mutex::new(Some(sender)),
            receiver,
        }
    }

    /// Gives the signal; false if it was given before.
    pub fn stop(&self) -> bool {
        self.sender.lock().take().is_some()
    }

    /// True once the signal is given.
    pub fn stopped(&self) -> bool {
        self.sender.lock().is_none()
    }

    /// Sleeps for `time`, or until the signal is given: then the answer is false.
    pub fn sleep(&self, time: Duration) -> bool {
        matches!(
            self.receiver.recv_timeout(time),
            Err(RecvTimeoutError::Timeout)
        )
    }
}
