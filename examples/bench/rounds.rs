//! A run: what is there, the rounds, and how far they are.

use std::env;
use std::fs::{self, File};
use std::io::{self, IsTerminal};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::chart;
use crate::options::{Options, SOAK};
use crate::report::Results;
use crate::rows::{DESCRIPTORS, ROWS, Row};
use crate::soak;
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
    if options.svg.is_some() && !programs.has(System::Rathole) {
        return Err("--svg draws ratios to rathole, which is not here".into());
    }
    for file in [&options.json, &options.svg].into_iter().flatten() {
        check_writable(file)?;
    }
    if descriptors < DESCRIPTORS && options.has_row("growth") {
        results.notes.push(format!(
            "`growth` needs {DESCRIPTORS} descriptors, and `ulimit -Hn` is {descriptors}."
        ));
    }
    for note in &results.notes {
        eprintln!("bench: {note}");
    }
    measure(options, &programs, &mut results)?;
    print!("{}", results.to_markdown());
    if let Some(file) = &options.json {
        write(file, &format!("{:#}\n", results.to_json()))?;
    }
    if let Some(file) = &options.svg {
        let chart = chart::draw(&results)?;
        let chart = chart.ok_or("no chart: nothing was measured that rathole was, too")?;
        write(file, &chart)?;
    }
    match results.own_failed() {
        true => Err("our own programs failed, see the table".into()),
        false => Ok(()),
    }
}

/// Fails now rather than when all is measured. What is in the file stays until then, and what was
/// not there is not left behind.
fn check_writable(path: &Path) -> Fallible<()> {
    let new = !path.exists();
    let opened = File::options().create(true).append(true).open(path);
    opened.map_err(|error| format!("{}: {error}", path.display()))?;
    if new {
        fs::remove_file(path)?;
    }
    Ok(())
}

fn write(path: &Path, text: &str) -> Fallible<()> {
    fs::write(path, text).map_err(|error| format!("{}: {error}", path.display()).into())
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
    let weight = |row: &Row| row.nominal.0 + row.nominal.1 * options.span.as_secs_f64();
    let steps = plan(options, programs);
    let soak = options.has_row(SOAK).then(|| soak::duration(options.soak));
    let all: f64 = steps.iter().map(|(_, row, _)| weight(row)).sum();
    let mut progress = Progress::new(all + soak.unwrap_or_default().as_secs_f64());
    for (round, row, system) in steps {
        let (rounds, row_name, name) = (options.rounds, row.name, system.name());
        progress.show(&format!("round {round} of {rounds}, {row_name}, {name}"));
        let sample = (row.measure)(programs, system, options.span);
        stop::check()?;
        let cell = results.cell(row.name, system);
        match sample {
            Ok(sample) => cell.samples.push(sample),
            Err(error) => cell.failures.push(error.to_string()),
        }
        progress.done += weight(row);
    }
    if soak.is_some() {
        progress.show(SOAK);
        let soaks = soak::soak(programs, options.soak);
        stop::check()?;
        match soaks {
            Ok(soaks) => results.soaks = soaks,
            Err(error) => results.notes.push(format!("`{SOAK}` failed: {error}.")),
        }
    }
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
}

impl Drop for Progress {
    fn drop(&mut self) {
        if self.terminal {
            eprint!("\r\x1b[K");
        }
    }
}
