//! How a server or a client is told to stop.

use std::convert::Infallible;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};
use parking_lot::Mutex;

/// Stops the [`Server`](crate::Server) or [`Client`](crate::Client) that it came from. Clones stop
/// the same one.
#[derive(Clone)]
pub struct Handle(Arc<dyn Fn(Duration) + Send + Sync>);

impl Handle {
    /// A handle does not keep alive what it stops, nor its ports.
    pub(crate) fn new<T: Send + Sync + 'static>(shared: &Arc<T>, stop: fn(&T, Duration)) -> Self {
        let shared = Arc::downgrade(shared);
        Self(Arc::new(move |drain| {
            if let Some(shared) = shared.upgrade() {
                stop(&shared, drain);
            }
        }))
    }

    /// Takes no more visitors, tells the other side, gives the visitors that are joined up to
    /// `drain` to finish, and aborts those that have not. `run` then returns; this call does not
    /// wait for it. A second call can only shorten the time.
    pub fn stop(&self, drain: Duration) {
        (self.0)(drain);
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

    /// Gives the signal.
    pub fn stop(&self) {
        self.sender.lock().take();
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
