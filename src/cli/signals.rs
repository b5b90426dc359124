//! The signals that a program obeys.

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

/// The signals that the program obeys.
pub struct Signals(Arc<OnceLock<Handle>>);

impl Signals {
    /// From now on TERM, INT and HUP end the program, and a second one as if nobody obeyed it. HUP
    /// stays without effect where it was so before, such as under `nohup`.
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

    /// Other systems have no such signals: there a process just ends.
    #[cfg(not(unix))]
    pub(super) fn take(_: Duration) -> Result<Self, Error> {
        Ok(Self(Arc::default()))
    }

    /// From now on TERM, INT and HUP stop what the handle belongs to, and give its visitors time; USR1
    /// logs its status.
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

/// Stops it on a thread of its own, so that a second signal is obeyed whatever becomes of the first.
#[cfg(unix)]
fn stop(handle: &Handle, drain: Duration) {
    info!("stopping: no more visitors, {drain:?} for those that are there; again to end now");
    let (started, owned) = (
        thread::Builder::new().name("stop".to_owned()),
        handle.clone(),
    );
    if started.spawn(move || owned.stop(drain)).is_err() {
        handle.stop(drain);
    }
}

/// Ends the program as the signal would if nobody obeyed it.
#[cfg(unix)]
fn end_now(signal: i32) {
    info!("stopping now");
    logger::end(None);
    let _ = signal_hook::low_level::emulate_default_handler(signal);
}

/// True if whoever started this program wants it to outlive its terminal. False where that cannot be
/// seen.
#[cfg(unix)]
fn hangup_is_ignored() -> bool {
    // HUP is signal 1, and the lowest bit of the mask.
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    mask.is_some_and(|mask| mask & 1 == 1)
}
