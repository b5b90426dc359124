//! Signals: the first one to end stops a program gently, a second one at once. HUP has a program with a
//! file of options read that again.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

#[cfg(unix)]
use log::warn;
use log::{error, info};
use parking_lot::{Condvar, Mutex};

use crate::cli::error::Error;
#[cfg(unix)]
use crate::cli::{chain, logger};
use crate::handle::{Handle, Running};

/// Starts what takes the place of this server or client, with the options that there are now. If they
/// make no sense, an error says why, and nothing has changed; but with [`Error::NothingRuns`], nothing
/// takes visitors any more.
pub type Reload = dyn Fn(&Handle) -> Result<Running, Error> + Send + Sync;

/// The signals that a program takes, and what it runs.
#[derive(Clone)]
pub struct Signals {
    state: Arc<Mutex<State>>,
    changed: Arc<Condvar>,
    drain: Duration,
    /// HUP has the program read a file of options again.
    reloads: bool,
}

#[derive(Default)]
struct State {
    /// The server or client that takes visitors, and those before it, which serve their last ones.
    halves: Vec<Handle>,
    /// How many were ever started, and how many of them have not ended.
    started: usize,
    running: usize,
    /// Why the first one failed that did.
    failed: Option<Error>,
    reload: Option<Arc<Reload>>,
    reloading: bool,
    /// HUP came when the options could not be read again yet.
    again: bool,
    stopping: bool,
}

impl Signals {
    /// Takes TERM, INT, HUP and USR1 from now on. HUP stays ignored if it was before, as under
    /// `nohup`; if the program `reloads`, it has the options read again.
    #[cfg(unix)]
    pub fn take(drain: Duration, reloads: bool) -> Result<Self, Error> {
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
            reloads,
        };
        let obeyed = signals.clone();
        let obey = move || {
            for signal in taken.forever() {
                match signal {
                    SIGUSR1 => obeyed.log_status(),
                    SIGHUP if obeyed.reloads => obeyed.reload(),
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
    pub fn take(drain: Duration, reloads: bool) -> Result<Self, Error> {
        Ok(Self {
            state: Arc::default(),
            changed: Arc::default(),
            drain,
            reloads,
        })
    }

    /// From now on the signals stop this server or client, USR1 logs its status, and HUP calls `reload`.
    /// Before, a signal to end just ends the program.
    pub fn obey_for(&self, running: &Running, reload: Arc<Reload>) {
        let mut state = self.state.lock();
        state.begin(running);
        state.reload = Some(reload);
        #[cfg(unix)]
        if std::mem::take(&mut state.again) {
            drop(state);
            self.reload();
        }
    }

    /// Waits until this one has ended, which is the first, and all that have taken its place.
    pub fn wait(&self, first: Running) -> Result<(), Error> {
        self.join(first, 1);
        let mut state = self.state.lock();
        let goes_on = |state: &mut State| state.reloading || state.running > 0;
        self.changed.wait_while(&mut state, goes_on);
        state.failed.take().map_or(Ok(()), Err)
    }

    /// Waits until the server or client of this number has ended. If it was to be the last to do so, then
    /// nothing takes visitors any more: those before it let theirs finish, and the program ends.
    fn join(&self, running: Running, number: usize) {
        let ended = running.join();
        let mut state = self.state.lock();
        state.running -= 1;
        if let Err(error) = ended {
            state.failed.get_or_insert(error.into());
        }
        let is_newest = number == state.started && !state.reloading;
        if is_newest && state.running > 0 && !state.stopping {
            error!("what the options started last has ended: nothing takes visitors any more");
            self.stop(&mut state);
        }
        self.changed.notify_all();
    }

    /// Stops everything, each half on a thread of its own, so that a signal is obeyed even if the stop
    /// hangs.
    fn stop(&self, state: &mut State) {
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

impl State {
    /// Counts a server or client that runs now. Returns its number, from 1 on.
    fn begin(&mut self, running: &Running) -> usize {
        self.halves.push(running.handle().clone());
        self.running += 1;
        self.started += 1;
        self.started
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

    /// Starts what takes over with the options of now, on a thread of its own, so that a signal to stop
    /// is obeyed meanwhile. That thread then waits for its end.
    fn reload(&self) {
        let mut state = self.state.lock();
        if state.stopping {
            return;
        }
        let (Some(reload), Some(newest), false) = (
            state.reload.clone(),
            state.halves.last().cloned(),
            state.reloading,
        ) else {
            info!("reading the options again when those that were read last are in force");
            state.again = true;
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
        let mut newest = None;
        match started {
            Ok(running) => {
                info!("taken over from the options before; visitors who were here go on");
                state.halves.retain(|half| half.status().is_some());
                let number = state.begin(&running);
                if state.stopping {
                    running.handle().stop(self.drain);
                }
                newest = Some((running, number));
            }
            Err(error @ Error::NothingRuns(_)) => {
                error!("{}", chain(&error));
                state.failed.get_or_insert(error);
                if !state.stopping {
                    self.stop(&mut state);
                }
            }
            Err(error) => warn!("nothing has changed: {}", chain(&error)),
        }
        let again = std::mem::take(&mut state.again);
        drop(state);
        self.changed.notify_all();
        if again {
            self.reload();
        }
        if let Some((running, number)) = newest {
            self.join(running, number);
        }
    }

    /// The first signal stops everything. The second one ends the program as it does one that does not
    /// handle it.
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
        self.stop(&mut state);
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

#[cfg(all(test, unix))]
mod tests {
    use super::*;
    use crate::handle::Half;
    use crate::journal::Status;
    use crossbeam_channel::{Sender, bounded};
    use std::io;
    use std::net::SocketAddr;

    /// A server that ends when it is told to stop.
    struct Fake(Sender<()>);

    impl Half for Fake {
        fn stop(self: Arc<Self>, _: Duration) {
            let _ = self.0.try_send(());
        }

        fn make_way(self: Arc<Self>) {}

        fn status(&self) -> Status {
            Status::default()
        }

        fn status_addr(&self) -> Option<SocketAddr> {
            None
        }

        fn wait_for_session(&self, _: Duration) -> bool {
            true
        }
    }

    fn runs_until_stopped() -> Running {
        let (stop, stopped) = bounded(1);
        let fake = Arc::new(Fake(stop));
        let run = {
            let fake = fake.clone();
            move || {
                let _ = stopped.recv();
                drop(fake);
                Ok(())
            }
        };
        Running::spawn("fake", Handle::new(&fake), run).unwrap()
    }

    fn fails() -> Running {
        let handle = Handle::new(&Arc::new(Fake(bounded(1).0)));
        let run = || Err(crate::Error::Thread(io::Error::other("none left")));
        Running::spawn("fake", handle, run).unwrap()
    }

    /// Returns what the program ends with if this is what a reload comes to.
    fn after_reload(started: fn() -> Result<Running, Error>) -> Result<(), Error> {
        let signals = Signals {
            state: Arc::default(),
            changed: Arc::default(),
            drain: Duration::from_secs(30),
            reloads: true,
        };
        let first = runs_until_stopped();
        signals.obey_for(&first, Arc::new(move |_: &Handle| started()));
        signals.reload();
        signals.wait(first)
    }

    #[test]
    fn what_was_started_last_takes_the_others_with_it() {
        let ended = after_reload(|| Ok(fails()));
        assert!(matches!(ended, Err(Error::Tunnel(crate::Error::Thread(_)))));
    }

    #[test]
    fn a_program_without_a_successor_ends() {
        let ended = after_reload(|| {
            let error = crate::Error::Thread(io::Error::other("none left"));
            Err(Error::NothingRuns(error))
        });
        assert!(matches!(ended, Err(Error::NothingRuns(_))));
    }
}
