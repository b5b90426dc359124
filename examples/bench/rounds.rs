//! A run: what is there, the rounds, and how far they are.

use std::env;
use std::io::{self, IsTerminal};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::options::Options;
use crate::report::{self, Results};
use crate::rows::{DESCRIPTORS, ROWS, Row};
use crate::stop;
use crate::systems::{Fallible, Programs, System};

pub fn bench(options: &Options) -> Fallible<()> {
    if cfg!(debug_assertions) {
        return Err("a load without optimisation measures itself: run it with --release".into());
    }
    stop::notice_signals()?;
    let descriptors = raise_descriptors()?;
    let bins = match &options.bins {
        Some(bins) => bins.clone(),
        None => build()?,
    };
    let programs = Programs::find(&bins, &options.rathole, &options.bore)?;
    let mut results = Results::new(options, &programs);
    if descriptors < DESCRIPTORS {
        results.notes.push(format!(
            "`growth` needs {DESCRIPTORS} descriptors, and `ulimit -Hn` is {descriptors}: it may fail."
        ));
    }
    for note in &results.notes {
        eprintln!("bench: {note}");
    }
    measure(options, &programs, &mut results)?;
    report::print(&results);
    Ok(())
}

/// Builds our programs, and tells the folder that they are in.
fn build() -> Fallible<PathBuf> {
    let cargo = env::var_os("CARGO").unwrap_or("cargo".into());
    // target/release/examples/bench
    let own = env::current_exe()?;
    let target = own
        .ancestors()
        .nth(3)
        .ok_or("no target folder above this program")?;
    let status = Command::new(&cargo)
        .args(["build", "--quiet", "--release", "--bins", "--manifest-path"])
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.toml"))
        .arg("--target-dir")
        .arg(target)
        .status()
        .map_err(|error| format!("{}: {error}", cargo.display()))?;
    if !status.success() {
        return Err(format!("{} build: {status}", cargo.display()).into());
    }
    Ok(target.join("release"))
}

/// Lets this process have as many descriptors as its user may, and tells how many those are.
fn raise_descriptors() -> io::Result<u64> {
    let maximum = getrlimit(Resource::Nofile).maximum;
    let current = maximum;
    setrlimit(Resource::Nofile, Rlimit { current, maximum })?;
    Ok(maximum.unwrap_or(u64::MAX))
}

/// Row by row and system by system in each round, so that whatever drifts hits all alike.
fn measure(options: &Options, programs: &Programs, results: &mut Results) -> Fallible<()> {
    let steps = plan(options, programs);
    let weight = |row: &Row| row.nominal.0 + row.nominal.1 * options.span.as_secs_f64();
    let mut progress = Progress::new(steps.iter().map(|(_, row, _)| weight(row)).sum());
    for (round, row, system) in steps {
        progress.show(&format!(
            "round {round} of {}, {}, {}",
            options.rounds,
            row.name,
            system.name()
        ));
        let sample = (row.measure)(programs, system, options.span);
        stop::check()?;
        let cell = results.cell(row.name, system);
        match sample {
            Ok(sample) => cell.samples.push(sample),
            Err(error) => cell.failures.push(error.to_string()),
        }
        progress.done += weight(row);
    }
    progress.clear();
    Ok(())
}

fn plan(options: &Options, programs: &Programs) -> Vec<(u32, &'static Row, System)> {
    let mut steps = Vec::new();
    for round in 1..=options.rounds {
        for row in ROWS.iter().filter(|row| options.has_row(row.name)) {
            if row.once && round > 1 {
                continue;
            }
            let systems = row.systems.iter().filter(|system| programs.has(**system));
            steps.extend(systems.map(|system| (round, row, *system)));
        }
    }
    steps
}

/// What is being done, and how long all will take: one line that changes on a terminal, else a line
/// for each step.
struct Progress {
    start: Instant,
    terminal: bool,
    /// In seconds that steps take nominally.
    done: f64,
    all: f64,
}

impl Progress {
    fn new(all: f64) -> Self {
        Self {
            start: Instant::now(),
            terminal: io::stderr().is_terminal(),
            done: 0.0,
            all,
        }
    }

    fn show(&self, what: &str) {
        // Before anything is done, the nominal time is as good a guess as any.
        let pace = match self.done {
            0.0 => 1.0,
            done => self.start.elapsed().as_secs_f64() / done,
        };
        let left = Duration::from_secs_f64((self.all - self.done).max(0.0) * pace).as_secs();
        let line = format!("{what}, {}:{:02} left", left / 60, left % 60);
        if self.terminal {
            eprint!("\r\x1b[K{line}");
        } else {
            eprintln!("{line}");
        }
    }

    fn clear(&self) {
        if self.terminal {
            eprint!("\r\x1b[K");
        }
    }
}
