//! The soak: whether descriptors, threads or memory grow while visitors come and go for long.

use std::thread;
use std::time::Duration;

use crate::load::{Tally, median};
use crate::rows::VISITS;
use crate::stop::rest;
use crate::systems::{Fallible, Programs, System};
use crate::tunnel::Tunnel;

/// Both at the same time, as this takes long.
pub const SYSTEMS: [System; 2] = [System::Plain, System::Key];

/// What is counted; processes together.
pub const WHAT: [&str; 3] = ["descriptors", "threads", "memory, KiB"];

/// By then most of the threads and buffers are there that this load ever needs at a time: seen over
/// three minutes, memory rises for half a minute, and by a tenth afterwards.
const WARM_UP: Duration = Duration::from_secs(30);

/// A count is the median of some: it depends on how many visits are under way just then.
const LOOKS: usize = 5;
const LOOK_PAUSE: Duration = Duration::from_millis(200);

/// What is no growth: a tenth, and as much as one crowd more or less makes.
const SLACK_FACTOR: f64 = 1.1;
const SLACK: [f64; 3] = [16.0, 16.0, 512.0];

pub struct Soak {
    pub system: System,
    pub tally: Tally,
    /// As in [`WHAT`].
    pub start: [f64; 3],
    pub end: [f64; 3],
}

impl Soak {
    pub fn is_flat(&self, what: usize) -> bool {
        self.end[what] <= self.start[what] * SLACK_FACTOR + SLACK[what]
    }
}

/// How long a soak takes in all.
pub fn duration(span: Duration) -> Duration {
    WARM_UP + span + 3 * LOOKS as u32 * LOOK_PAUSE
}

pub fn soak(programs: &Programs, span: Duration) -> Fallible<Vec<Soak>> {
    let tunnels: Result<Vec<_>, _> = SYSTEMS.map(|it| programs.start(it)).into_iter().collect();
    let tunnels = &tunnels?;
    thread::scope(|threads| {
        let load = |tunnel: &Tunnel| VISITS.run(tunnel.public, duration(span));
        let start = |tunnel| threads.spawn(move || load(tunnel));
        let loads: Vec<_> = tunnels.iter().map(start).collect();
        rest(WARM_UP)?;
        let starts = look(tunnels)?;
        rest(span)?;
        let ends = look(tunnels)?;
        let mut soaks = Vec::new();
        for (number, load) in loads.into_iter().enumerate() {
            let tally = load.join().map_err(|_| "a load's thread panicked")??;
            soaks.push(Soak {
                system: SYSTEMS[number],
                tally,
                start: starts[number],
                end: ends[number],
            });
        }
        Ok(soaks)
    })
}

/// What each tunnel has.
fn look(tunnels: &[Tunnel]) -> Fallible<Vec<[f64; 3]>> {
    let mut counts = vec![[const { Vec::new() }; 3]; tunnels.len()];
    for _ in 0..LOOKS {
        for (tunnel, counts) in tunnels.iter().zip(&mut counts) {
            for (count, seen) in counts.iter_mut().zip(tunnel.usage()?) {
                count.push(seen);
            }
        }
        rest(LOOK_PAUSE)?;
    }
    let medians = |counts: [Vec<f64>; 3]| counts.map(|mut count| median(&mut count));
    Ok(counts.into_iter().map(medians).collect())
}
