//! A run: its options, what it needs, the rounds, and how far they are.

use std::env;
use std::error::Error;
use std::fs::File;
use std::io::{self, IsTerminal, Write as _};
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Resource, getrlimit, setrlimit};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use crate::report::Results;
use crate::rows::{ROWS, Row};
use crate::systems::{Programs, System};

pub type Fallible<T> = Result<T, Box<dyn Error + Send + Sync>>;

/// Five rounds give a median that one disturbed round does not move.
const USAGE: &str = "\
Usage: cargo run --release --example bench -- [OPTION]...
    --rounds N            rounds to take medians of, 1 or more (5)
    --secs S              seconds of each load, 0.1 to 3600 (0.8)
    --only ROW[,ROW]...   only these rows of: bulk-down, bulk-up, bulk-8, ping-1, ping-32,
                          close-1, close-16, held, growth, wan
    --svg FILE            draw the ratios to rathole into this file
    --bins DIR            use tpserver and tpclient from here, build nothing
    --rathole PATH        use this program, not the one on the PATH
    --bore PATH           use this program, not the one on the PATH
    --help                print this and exit
";

/// Less is lost in the clock ticks that processor time is counted in; more is a typing error.
const SECS_RANGE: std::ops::RangeInclusive<f64> = 0.1..=3600.0;

pub fn bench() -> Fallible<()> {
    let mut grammar = getopts::Options::new();
    for name in ["rounds", "secs", "only", "svg", "bins", "rathole", "bore"] {
        grammar.optopt("", name, "", "");
    }
    grammar.optflag("h", "help", "");
    let given = grammar.parse(env::args().skip(1))?;
    let rounds = given.opt_get_default("rounds", 5)?;
    let secs = given.opt_get_default("secs", 0.8)?;
    let only = given.opt_str("only");
    let only: Vec<_> = only.iter().flat_map(|names| names.split(',')).collect();
    let is_wanted = |row: &&Row| only.is_empty() || only.contains(&row.name);
    let rows: Vec<_> = ROWS.iter().filter(is_wanted).collect();
    if given.opt_present("help") {
        print!("{USAGE}");
        return Ok(());
    }
    let counts_match = only.is_empty() || only.len() == rows.len();
    if rounds == 0 || !SECS_RANGE.contains(&secs) || !counts_match || !given.free.is_empty() {
        return Err("a value out of range, an unknown row or a stray word: see --help".into());
    }
    if cfg!(debug_assertions) {
        return Err("a load without optimisation measures itself: run it with --release".into());
    }
    prepare()?;
    // Opened before all the measuring, so that a wrong path fails at once.
    let svg = given.opt_str("svg").map(|path| {
        let file = File::options().create(true).append(true).open(&path);
        file.map_err(|error| format!("--svg {path}: {error}"))
    });
    let svg = svg.transpose()?;
    let bins = given.opt_get("bins")?.map_or_else(build, Ok)?;
    let rathole = given.opt_get_default("rathole", "rathole".to_owned())?;
    let bore = given.opt_get_default("bore", "bore".to_owned())?;
    let programs = Programs::find(&bins, &rathole, &bore)?;
    eprintln!("bench: {}", programs.notes.join("; "));
    if svg.is_some() && !programs.has(System::Rathole) {
        return Err("--svg draws ratios to rathole, which is not here".into());
    }
    let results = measure(&rows, rounds, secs, &programs)?;
    print!("{}", results.to_markdown(rounds, secs, &programs.notes));
    if let Some(mut file) = svg {
        file.set_len(0)?;
        file.write_all(results.to_svg().as_bytes())?;
    }
    match results.own_failed() {
        true => Err("our own programs failed, see the table".into()),
        false => Ok(()),
    }
}

/// Has signals noticed, and takes as many descriptors as the user may have: `growth` needs thousands.
fn prepare() -> Fallible<()> {
    for signal in [SIGHUP, SIGINT, SIGTERM] {
        signal_hook::flag::register(signal, STOPPED.clone())?;
    }
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    Ok(setrlimit(Resource::Nofile, limit)?)
}

/// Builds our programs, and returns the folder that they are in.
fn build() -> Fallible<PathBuf> {
    // This program is target/release/examples/bench.
    let own = env::current_exe()?;
    let target = own.ancestors().nth(3).ok_or("no target folder")?;
    let manifest = concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml");
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or("cargo".into()));
    cargo.args(["build", "--quiet", "--release", "--bins"]);
    cargo.args(["--manifest-path", manifest, "--target-dir"]);
    match cargo.arg(target).status()?.success() {
        true => Ok(target.join("release")),
        false => Err("cargo build failed".into()),
    }
}

/// Each round measures every row, and each row every system: a drift of the machine hits all alike.
fn measure(rows: &[&Row], rounds: u32, secs: f64, programs: &Programs) -> Fallible<Results> {
    let mut steps = Vec::new();
    for round in 1..=rounds {
        for row in rows.iter().filter(|row| round == 1 || !row.is_once()) {
            let systems = row.systems().iter().filter(|system| programs.has(**system));
            steps.extend(systems.map(|system| (round, row, *system)));
        }
    }
    let (start, mut results) = (Instant::now(), Results::default());
    for (done, (round, row, system)) in steps.iter().enumerate() {
        // As if one more were done, so that there is a guess before the first.
        let past = start.elapsed().as_secs_f64() + secs + 0.7;
        let pace = past / (done + 1) as f64;
        let left = ((steps.len() - done) as f64 * pace) as u64;
        let step = format!("round {round} of {rounds}, {}, {}", row.name, system.name());
        show(&format!("{step}, {}:{:02} left", left / 60, left % 60));
        let sample = row.measure(programs, *system, Duration::from_secs_f64(secs));
        show("");
        check()?;
        results.add(row.name, *system, sample);
    }
    Ok(results)
}

/// Shows how far the run is: in one line that changes on a terminal, else in a line for each step.
fn show(line: &str) {
    if io::stderr().is_terminal() {
        eprint!("\r\x1b[K{line}");
    } else if !line.is_empty() {
        eprintln!("{line}");
    }
}

/// True after Ctrl-C. The run then fails instead of dying, so that it ends the processes that it
/// started.
static STOPPED: LazyLock<Arc<AtomicBool>> = LazyLock::new(Arc::default);

/// How long a signal may go unnoticed.
const SLICE: Duration = Duration::from_millis(50);

/// Fails once a signal has come.
pub fn check() -> Fallible<()> {
    match STOPPED.load(Ordering::Relaxed) {
        true => Err("stopped by a signal".into()),
        false => Ok(()),
    }
}

/// Sleeps; fails as soon as a signal has come.
pub fn rest(time: Duration) -> Fallible<()> {
    let end = Instant::now() + time;
    while let left = end.saturating_duration_since(Instant::now())
        && !left.is_zero()
    {
        check()?;
        thread::sleep(left.min(SLICE));
    }
    check()
}
