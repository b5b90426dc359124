//! Signals: the first one to end stops a program gently, a second one at once. HUP has a program with a
//! file of options read that again.

use std::sync::Arc;
#[cfg(unix)]
use std::thread;
use std::time::Duration;

#[cfg(unix)]
use log::{info, warn};
use parking_lot::{Condvar, Mutex};

use crate::cli::error::Error;
#[cfg(unix)]
use crate::cli::{chain, logger};
use crate::handle::{Handle, Running};

/// Starts what takes the place of this server or client, with the options that there are now. If they
/// make no sense, an error says why, and nothing has changed.
pub type Reload = dyn Fn(&Handle) -> Result<Running, Error> + Send + Sync;

/// The signals that a program takes, and what it runs.
#[derive(Clone)]
pub struct Signals {
    state: Arc<Mutex<State>>,
    changed: Arc<Condvar>,
    drain: Duration,
}

#[derive(Default)]
struct State {
    /// The server or client that takes visitors, and those before it, which serve their last ones.
    halves: Vec<Handle>,
    /// The threads of all of them.
    running: Vec<Running>,
    reload: Option<Arc<Reload>>,
    reloading: bool,
    stopping: bool,
}

impl Signals {
    /// Takes TERM, INT, HUP and USR1 from now on. HUP stays ignored if it was before, as under
    /// `nohup`.
    #[cfg(unix)]
    pub fn take(drain: Duration) -> Result<Self, Error> {
        use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR1};

        let mut all = vec![SIGTERM, SIGINT, SIGUSR1];
        if !hangup_is_ignored() {
            all.push(SIGHUP);
        }
        let mut taken = signal_hook::iterator::Signals::new(all).map_err(Error::Signals)?;
        let signals = Self {
            state: Arc::default(),
            changed: Arc::default(),
            drain,
        };
        let obeyed = signals.clone();
        let obey = move || {
            for signal in taken.forever() {
                match signal {
                    SIGUSR1 => obeyed.log_status(),
                    SIGHUP if obeyed.can_reload() => obeyed.reload(),
                    _ => obeyed.stop_or_end(signal),
                }
            }
        };
        let thread = thread::Builder::new().name("signals".to_owned());
        thread.spawn(obey).map_err(Error::Thread)?;
        Ok(signals)
    }

    /// Takes nothing: other systems than Unix have no such signals, and a process there just ends.
    #[cfg(not(unix))]
    pub fn take(drain: Duration) -> Result<Self, Error> {
        Ok(Self {
            state: Arc::default(),
            changed: Arc::default(),
            drain,
        })
    }

    /// From now on the signals stop this server or client, USR1 logs its status, and HUP calls `reload`
    /// if there is one. Before, a signal to end just ends the program.
    pub fn obey_for(&self, running: Running, reload: Option<Arc<Reload>>) {
        let mut state = self.state.lock();
        state.halves.push(running.handle().clone());
        state.running.push(running);
        state.reload = reload;
    }

    /// Waits until it has ended, and all that have taken its place.
    pub fn wait(&self) -> Result<(), Error> {
        loop {
            let mut state = self.state.lock();
            self.changed.wait_while(&mut state, |state| state.reloading);
            let Some(running) = state.running.pop() else {
                return Ok(());
            };
            drop(state);
            running.join()?;
        }
    }
}

/// What the thread does that waits for signals.
#[cfg(unix)]
impl Signals {
    fn log_status(&self) {
        let newest = self.state.lock().halves.last().cloned();
        match newest.map(|handle| handle.status()) {
            None => info!("status: starting"),
            Some(Some(status)) => info!("status: {status}"),
            Some(None) => {}
        }
    }

    fn can_reload(&self) -> bool {
        let state = self.state.lock();
        state.reload.is_some() && !state.stopping
    }

    /// Starts what takes over with the options of now, on a thread of its own, so that a signal to stop
    /// is obeyed meanwhile.
    fn reload(&self) {
        let mut state = self.state.lock();
        let (Some(reload), Some(newest), false) = (
            state.reload.clone(),
            state.halves.last().cloned(),
            state.reloading,
        ) else {
            return;
        };
        state.reloading = true;
        drop(state);
        info!("reading the options again");
        let signals = self.clone();
        let work = move || {
            let started = reload(&newest);
            signals.reloaded(started);
        };
        let thread = thread::Builder::new().name("reload".to_owned());
        if let Err(error) = thread.spawn(work) {
            self.reloaded(Err(Error::Thread(error)));
        }
    }

    fn reloaded(&self, started: Result<Running, Error>) {
        let mut state = self.state.lock();
        state.reloading = false;
        match started {
            Ok(running) => {
                info!("taken over from the options before; visitors who were here go on");
                let handle = running.handle().clone();
                state.halves.retain(|half| half.status().is_some());
                if state.stopping {
                    handle.stop(self.drain);
                }
                state.halves.push(handle);
                state.running.push(running);
            }
            Err(error) => warn!("nothing has changed: {}", chain(&error)),
        }
        self.changed.notify_all();
    }

    /// Stops everything, each half on a thread of its own, so that a second signal is obeyed even if the
    /// stop hangs. The second signal ends the program as it does one that does not handle it.
    fn stop_or_end(&self, signal: i32) {
        let mut state = self.state.lock();
        if state.halves.is_empty() {
            std::process::exit(0);
        }
        if state.stopping {
            info!("stopping now");
            logger::end(None);
            let _ = signal_hook::low_level::emulate_default_handler(signal);
            return;
        }
        state.stopping = true;
        let drain = self.drain;
        info!("stopping: no more visitors, {drain:?} for those that are there; again to end now");
        for handle in state.halves.clone() {
            let (thread, owned) = (thread::Builder::new(), handle.clone());
            let thread = thread.name("stop".to_owned());
            if thread.spawn(move || owned.stop(drain)).is_err() {
                handle.stop(drain);
            }
        }
    }
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
