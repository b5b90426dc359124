//! Signals: the first one to end stops a program gently, a second one at once. HUP has a program with a
//! file of options read that again.

#[cfg(unix)]
use std::io;
#[cfg(unix)]
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

#[cfg(unix)]
use log::warn;
use log::{error, info};
use parking_lot::{Condvar, Mutex};

use crate::cli::chain;
use crate::cli::error::Error;
#[cfg(unix)]
use crate::cli::logger;
use crate::handle::{Handle, Running};

/// Starts what takes the place of this server or client, with the options that there are now. If they
/// make no sense, an error says why, and nothing has changed; but with [`Error::NothingRuns`], nothing
/// takes visitors any more.
pub type Reload = dyn Fn(&Handle) -> Result<Started, Error> + Send + Sync;

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
    /// The server or client that takes visitors, behind those that serve their last ones.
    halves: Vec<Started>,
    reload: Option<Arc<Reload>>,
    reloading: bool,
    /// HUP came when the options could not be read again yet.
    again: bool,
    /// What took visitors has ended, and nothing has taken its place.
    gone: bool,
    /// Why it has.
    failed: Option<Error>,
    /// Since when everything is being stopped.
    stopping: Option<Instant>,
}

/// A server or a client that a program runs.
pub struct Started {
    running: Running,
    has_ended: Arc<AtomicBool>,
}

/// Dropped when a server or client has ended, it tells so.
pub struct Ended {
    signals: Signals,
    has_ended: Arc<AtomicBool>,
}

impl Drop for Ended {
    fn drop(&mut self) {
        // Under the lock, so that nobody begins to wait for this who has looked just before.
        let _state = self.signals.state.lock();
        self.has_ended.store(true, Ordering::Relaxed);
        self.signals.changed.notify_all();
    }
}

impl State {
    fn first_ended(&self) -> Option<usize> {
        let has_ended = |half: &Started| half.has_ended.load(Ordering::Relaxed);
        self.halves.iter().position(has_ended)
    }

    /// True if some visitors are still served, and new ones never will be.
    fn is_left_alone(&self) -> bool {
        self.gone && !self.reloading && self.stopping.is_none() && !self.halves.is_empty()
    }

    fn all_have_ended(&self) -> bool {
        self.halves.is_empty() && !self.reloading
    }

    fn newest(&self) -> Option<Handle> {
        Some(self.halves.last()?.running.handle().clone())
    }
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

    /// Starts a server or client, whose thread keeps the [`Ended`] until it has ended.
    pub fn start<O>(
        &self,
        start: fn(O, Ended) -> Result<Running, crate::Error>,
        options: O,
    ) -> Result<Started, crate::Error> {
        let has_ended = Arc::<AtomicBool>::default();
        let ended = Ended {
            signals: self.clone(),
            has_ended: has_ended.clone(),
        };
        let running = start(options, ended)?;
        Ok(Started { running, has_ended })
    }

    /// From now on the signals stop this server or client, USR1 logs its status, and HUP calls `reload`.
    /// Before, a signal to end just ends the program.
    pub fn obey_for(&self, first: Started, reload: Arc<Reload>) {
        let mut state = self.state.lock();
        state.halves.push(first);
        state.reload = Some(reload);
        #[cfg(unix)]
        if std::mem::take(&mut state.again) {
            drop(state);
            self.reload();
        }
    }

    /// Waits until everything has ended. If what takes visitors ends by itself, the rest is stopped: the
    /// program would look alive, and serve nobody who comes.
    pub fn wait(&self) -> Result<(), Error> {
        let mut state = self.state.lock();
        loop {
            self.changed.wait_while(&mut state, |state| {
                state.first_ended().is_none() && !state.is_left_alone() && !state.all_have_ended()
            });
            if let Some(place) = state.first_ended() {
                let was_newest = !state.gone && place + 1 == state.halves.len();
                state.gone |= was_newest;
                // Nothing is left for its thread to do.
                match state.halves.remove(place).running.join() {
                    Err(error) if was_newest => state.failed = Some(error.into()),
                    Err(error) => error!("{}", chain(&error)),
                    Ok(()) => {}
                }
            } else if state.is_left_alone() {
                let why = state.failed.as_ref();
                let why = why.map_or(String::new(), |why| format!(": {}", chain(why)));
                error!("nothing takes visitors any more{why}");
                self.stop(&mut state);
            } else {
                return state.failed.take().map_or(Ok(()), Err);
            }
        }
    }

    /// True once a signal to end has come.
    pub fn is_stopping(&self) -> bool {
        self.state.lock().stopping.is_some()
    }

    /// Stops everything, each half on a thread of its own, so that a signal is obeyed even if the stop
    /// hangs.
    fn stop(&self, state: &mut State) {
        state.stopping = Some(Instant::now());
        let drain = self.drain;
        info!("stopping: no more visitors, {drain:?} for those that are there; again to end now");
        for half in &state.halves {
            let handle = half.running.handle().clone();
            let (thread, owned) = (thread::Builder::new(), handle.clone());
            let thread = thread.name("stop".to_owned());
            if thread.spawn(move || owned.stop(drain)).is_err() {
                handle.stop(drain);
            }
        }
    }
}

/// What the thread does that waits for signals.
#[cfg(unix)]
impl Signals {
    fn log_status(&self) {
        let newest = self.state.lock().newest();
        match newest.map(|handle| handle.status()) {
            None => info!("status: starting"),
            Some(Some(status)) => info!("status: {status}"),
            Some(None) => {}
        }
    }

    /// Starts what takes over with the options of now, on a thread of its own, so that a signal to stop
    /// is obeyed meanwhile.
    fn reload(&self) {
        let mut state = self.state.lock();
        if state.stopping.is_some() {
            return;
        }
        let (Some(reload), Some(newest), false) =
            (state.reload.clone(), state.newest(), state.reloading)
        else {
            info!("reading the options again when those that were read last are in force");
            state.again = true;
            return;
        };
        state.reloading = true;
        drop(state);
        info!("reading the options again");
        let signals = self.clone();
        let work = move || {
            let started = catch_unwind(AssertUnwindSafe(|| reload(&newest)));
            let panicked = || crate::Error::Thread(io::Error::other("it panicked"));
            signals.reloaded(started.unwrap_or_else(|_| Err(Error::NothingRuns(panicked()))));
        };
        let thread = thread::Builder::new().name("reload".to_owned());
        if let Err(error) = thread.spawn(work) {
            self.reloaded(Err(Error::Thread(error)));
        }
    }

    fn reloaded(&self, started: Result<Started, Error>) {
        let mut state = self.state.lock();
        state.reloading = false;
        match started {
            Ok(half) => {
                info!("taken over from the options before; visitors who were here go on");
                if let Some(since) = state.stopping {
                    let left = self.drain.saturating_sub(since.elapsed());
                    half.running.handle().stop(left);
                }
                state.halves.push(half);
                state.gone = false;
                if let Some(error) = state.failed.take() {
                    error!("what was there before has failed: {}", chain(&error));
                }
            }
            Err(error @ Error::NothingRuns(_)) if state.stopping.is_none() => {
                (state.gone, state.failed) = (true, Some(error));
            }
            Err(error) => warn!("nothing has changed: {}", chain(&error)),
        }
        if std::mem::take(&mut state.again) {
            drop(state);
            self.reload();
        }
        self.changed.notify_all();
    }

    /// The first signal stops everything. The second one ends the program as it does one that does not
    /// handle it.
    fn stop_or_end(&self, signal: i32) {
        let mut state = self.state.lock();
        if state.reload.is_none() {
            // Nothing has been started yet.
            std::process::exit(0);
        }
        if state.stopping.is_some() {
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
    use crate::status::port::StatusPort;
    use crate::stop::Stop;
    use crossbeam_channel::{Sender, bounded};

    const DRAIN: Duration = Duration::from_secs(30);

    /// A server that ends when it is told to stop.
    struct Fake(Sender<Duration>, StatusPort);

    impl Fake {
        fn new(told: Sender<Duration>) -> Arc<Self> {
            Arc::new(Self(told, StatusPort::new(None, false, &Stop::new())))
        }
    }

    impl Half for Fake {
        fn stop(self: Arc<Self>, drain: Duration) {
            let _ = self.0.try_send(drain);
        }

        fn status(&self) -> Status {
            Status::default()
        }

        fn status_port(&self) -> &StatusPort {
            &self.1
        }

        fn wait_for_session(&self, _: Duration) -> bool {
            true
        }
    }

    /// A server that looks, when it is stopped, at the time that its visitors get.
    fn until_stopped(signals: &Signals, look: fn(Duration)) -> Started {
        let started = signals.start(
            |look: fn(Duration), ended| {
                let (stop, stopped) = bounded(1);
                let fake = Fake::new(stop);
                let handle = Handle::new(&fake);
                Running::spawn("fake", handle, move || {
                    let _kept = (fake, ended);
                    look(stopped.recv().unwrap());
                    Ok(())
                })
            },
            look,
        );
        started.unwrap()
    }

    /// A program whose first server runs until it is stopped, and whose reload comes to this. Returns
    /// what the program ends with.
    fn after_reload(
        reload: impl Fn(&Signals) -> Result<Started, Error> + Send + Sync + 'static,
    ) -> Result<(), Error> {
        let signals = Signals {
            state: Arc::default(),
            changed: Arc::default(),
            drain: DRAIN,
            reloads: true,
        };
        let first = until_stopped(&signals, |_| ());
        let owned = signals.clone();
        signals.obey_for(first, Arc::new(move |_: &Handle| reload(&owned)));
        signals.reload();
        signals.wait()
    }

    fn no_thread() -> crate::Error {
        crate::Error::Thread(io::Error::other("none left"))
    }

    #[test]
    fn what_was_started_last_takes_the_others_with_it() {
        let ended = after_reload(|signals| {
            let second = signals.start(
                |(), ended| {
                    let handle = Handle::new(&Fake::new(bounded(1).0));
                    Running::spawn("second", handle, move || {
                        let _kept = ended;
                        Err(no_thread())
                    })
                },
                (),
            );
            Ok(second?)
        });
        assert!(
            matches!(ended, Err(Error::Tunnel(crate::Error::Thread(_)))),
            "{ended:?}"
        );
    }

    #[test]
    fn what_starts_during_a_stop_gets_what_is_left_of_the_drain() {
        let ended = after_reload(|signals| {
            signals.stop(&mut signals.state.lock());
            Ok(until_stopped(signals, |drain| assert!(drain < DRAIN)))
        });
        assert!(ended.is_ok(), "{ended:?}");
    }

    #[test]
    fn a_program_without_a_successor_ends() {
        let ended = after_reload(|_| Err(Error::NothingRuns(no_thread())));
        assert!(matches!(ended, Err(Error::NothingRuns(_))), "{ended:?}");
    }

    #[test]
    fn a_reload_that_panics_ends_the_program() {
        let ended = after_reload(|_| panic!("on purpose"));
        assert!(matches!(ended, Err(Error::NothingRuns(_))), "{ended:?}");
    }
}
