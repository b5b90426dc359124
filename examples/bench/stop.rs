//! Ctrl-C: noticed between and during measurements, so that what was started is ended in any case.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock};
use std::thread;
use std::time::{Duration, Instant};

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use crate::systems::Fallible;

static STOPPED: LazyLock<Arc<AtomicBool>> = LazyLock::new(Arc::default);

/// How long a signal may go unnoticed.
const SLICE: Duration = Duration::from_millis(50);

pub fn notice_signals() -> std::io::Result<()> {
    for signal in [SIGHUP, SIGINT, SIGTERM] {
        signal_hook::flag::register(signal, STOPPED.clone())?;
    }
    Ok(())
}

pub fn stopped() -> bool {
    STOPPED.load(Ordering::Relaxed)
}

/// Fails once a signal has come.
pub fn check() -> Fallible<()> {
    if stopped() {
        return Err("stopped by a signal".into());
    }
    Ok(())
}

/// Sleeps; fails as soon as a signal has come.
pub fn rest(time: Duration) -> Fallible<()> {
    let end = Instant::now() + time;
    loop {
        check()?;
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(());
        }
        thread::sleep(left.min(SLICE));
    }
}
