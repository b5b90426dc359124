//! Signals: the first one to end stops a program gently, a second one at once.

use std::sync::{Arc, OnceLock};
#[cfg(unix)]
use std::thread;
use std::time::Duration;

#[cfg(unix)]
use log::info;

use crate::cli::error::Error;
#[cfg(unix)]
use crate::cli::logger;
use crate::handle::Handle;

/// The signals that a program takes, and what it runs once that is known.
pub struct Signals(Arc<OnceLock<Handle>>);

impl Signals {
    /// Takes TERM, INT, HUP and USR1 from now on. HUP stays ignored if it was before, as under
    /// `nohup`.
    #[cfg(unix)]
    pub(super) fn take(drain: Duration) -> Result<Self, Error> {
        use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR1};

        let mut all = vec![SIGTERM, SIGINT, SIGUSR1];
        if !hangup_is_ignored() {
            all.push(SIGHUP);
        }
        let mut signals = signal_hook::iterator::Signals::new(all).map_err(Error::Signals)?;
        let running = Arc::new(OnceLock::new());
        let obeyed = Self(running.clone());
        let obey = move || {
            let mut stopping = false;
            for signal in signals.forever() {
                match running.get() {
                    Some(handle) if signal == SIGUSR1 => log_status(handle),
                    None if signal == SIGUSR1 => info!("status: starting"),
                    Some(handle) if !stopping => {
                        stopping = true;
                        stop(handle, drain);
                    }
                    Some(_) => end_now(signal),
                    None => std::process::exit(0),
                }
            }
        };
        let thread = thread::Builder::new().name("signals".to_owned());
        thread.spawn(obey).map_err(Error::Thread)?;
        Ok(obeyed)
    }

    /// Takes nothing: other systems than Unix have no such signals, and a process there just ends.
    #[cfg(not(unix))]
    pub(super) fn take(_: Duration) -> Result<Self, Error> {
        Ok(Self(Arc::default()))
    }

    /// From now on the signals stop the handle's server or client, and USR1 logs its status. Before,
    /// a signal to end just ends the program.
    pub fn obey_for(&self, handle: Handle) {
        let _ = self.0.set(handle);
    }
}

#[cfg(unix)]
fn log_status(handle: &Handle) {
    if let Some(status) = handle.status() {
        info!("status: {status}");
    }
}

/// Stops a server or client on a thread of its own, so that a second signal is obeyed even if the
/// stop hangs.
#[cfg(unix)]
fn stop(handle: &Handle, drain: Duration) {
    info!("stopping: no more visitors, {drain:?} for those that are there; again to end now");
    let (thread, owned) = (thread::Builder::new(), handle.clone());
    let thread = thread.name("stop".to_owned());
    if thread.spawn(move || owned.stop(drain)).is_err() {
        handle.stop(drain);
    }
}

/// Ends the program as the signal does in a program that does not handle it.
#[cfg(unix)]
fn end_now(signal: i32) {
    info!("stopping now");
    logger::end(None);
    let _ = signal_hook::low_level::emulate_default_handler(signal);
}

/// Returns true if HUP is ignored, as whoever started this program wants it to outlive its terminal.
/// Where there is no `/proc`, this returns false.
#[cfg(unix)]
fn hangup_is_ignored() -> bool {
    // HUP is signal 1, and so the lowest bit of the mask.
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    mask.is_some_and(|mask| mask & 1 == 1)
}
