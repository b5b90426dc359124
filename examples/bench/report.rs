//! What a run has found, as a table and as JSON.

use std::env;
use std::fmt::Write as _;
use std::fs;
use std::thread;

use serde_json::{Map, Value, json};

use crate::load::median;
use crate::options::{Options, SOAK};
use crate::rows::{Better, COST, FAR_VISITORS, Figure, ROWS, Row, Sample};
use crate::soak::{Soak, WHAT};
use crate::systems::{Programs, System};

/// What is compared; the last one for processor time alone.
pub const RATIOS: [(System, System); 3] = [
    (System::Plain, System::Rathole),
    (System::Key, System::RatholeNoise),
    (System::Key, System::Rathole),
];

/// All values of a row for a system.
#[derive(Default)]
pub struct Cell {
    pub samples: Vec<Sample>,
    /// Why the other rounds failed.
    pub failures: Vec<String>,
}

impl Cell {
    fn values(&self, figure: usize) -> Vec<f64> {
        let values = self.samples.iter().map(|sample| sample.values[figure]);
        values.flatten().collect()
    }

    fn median(&self, figure: usize) -> Option<f64> {
        let mut values = self.values(figure);
        (!values.is_empty()).then(|| median(&mut values))
    }
}

pub struct Results {
    cells: Vec<(&'static str, System, Cell)>,
    pub soaks: Vec<Soak>,
    /// What is missing, and other things to know.
    pub notes: Vec<String>,
    versions: Vec<String>,
    rounds: u32,
    secs: f64,
}

impl Results {
    pub fn new(options: &Options, programs: &Programs) -> Self {
        let mut results = Self {
            cells: Vec::new(),
            soaks: Vec::new(),
            notes: Vec::new(),
            versions: vec![programs.version.clone()],
            rounds: options.rounds,
            secs: options.span.as_secs_f64(),
        };
        for (name, version) in programs.peers() {
            match version {
                Ok(version) => results.versions.push(format!("{name} {version}")),
                Err(why) => results.notes.push(format!("Without {name}: {why}.")),
            }
        }
        results
    }

    pub fn cell(&mut self, row: &'static str, system: System) -> &mut Cell {
        let known = self.position(row, system);
        let at = known.unwrap_or_else(|| {
            self.cells.push((row, system, Cell::default()));
            self.cells.len() - 1
        });
        &mut self.cells[at].2
    }

    fn position(&self, row: &str, system: System) -> Option<usize> {
        let mut cells = self.cells.iter();
        cells.position(|cell| (cell.0, cell.1) == (row, system))
    }

    fn find(&self, row: &Row, system: System) -> Option<&Cell> {
        self.position(row.name, system).map(|at| &self.cells[at].2)
    }

    /// The quotient of two systems' medians.
    pub fn ratio(&self, row: &Row, figure: usize, of: (System, System)) -> Option<f64> {
        let median = |system| self.find(row, system)?.median(figure);
        Some(median(of.0)? / median(of.1)?)
    }

    /// Each figure of each row that was measured, and its number in the row.
    pub fn figures(&self) -> impl Iterator<Item = (&'static Row, usize, &'static Figure)> {
        let measured = |row: &&Row| self.cells.iter().any(|cell| cell.0 == row.name);
        ROWS.iter().filter(measured).flat_map(|row| {
            let figures = row.figures.iter().enumerate();
            figures.map(move |(number, figure)| (row, number, figure))
        })
    }

    /// Tables in Markdown, and what to know about them.
    pub fn to_markdown(&self) -> String {
        let mut lines = vec![head()];
        lines.extend(
            self.figures()
                .map(|(row, at, figure)| self.line(row, at, figure)),
        );
        let mut text = String::new();
        if lines.len() > 1 {
            text = table(&lines) + "\n" + &self.foot() + "\n";
        }
        if !self.soaks.is_empty() {
            text += &(soak_table(&self.soaks) + "\n");
        }
        for note in self.notes.iter().chain(&self.troubles()) {
            let _ = writeln!(text, "- {note}");
        }
        text
    }

    fn line(&self, row: &Row, number: usize, figure: &Figure) -> Vec<String> {
        let arrow = match figure.better {
            Better::Higher => '↑',
            Better::Lower => '↓',
        };
        let what = format!("`{}` {}, {} {arrow}", row.name, figure.what, figure.unit);
        let cell = |system| match self.find(row, system) {
            None if row.systems.contains(&system) => "–".to_owned(),
            None => String::new(),
            Some(cell) => match (cell.median(number), cell.failures.first()) {
                (Some(median), _) => digits(median),
                (None, Some(why)) => format!("failed: {why}"),
                (None, None) => String::new(),
            },
        };
        let ratio = |(at, of)| {
            let wanted = at < 2 || figure.what == COST.what;
            let ratio = self.ratio(row, number, of).filter(|_| wanted);
            ratio.map_or_else(String::new, |ratio| format!("{ratio:.2}"))
        };
        let ratios = RATIOS.into_iter().enumerate().map(ratio);
        let cells = System::ALL.into_iter().map(cell).chain(ratios);
        [what].into_iter().chain(cells).collect()
    }

    fn foot(&self) -> String {
        let rounds = match self.rounds {
            1 => "One round".to_owned(),
            rounds => format!("Medians of {rounds} rounds"),
        };
        let mut text = format!(
            "↑ more is better, ↓ less is better. {rounds}, {} s of load each, between {}. A ratio \
             is one of medians. Memory and processor time are those of both processes together. \
             Memory is PSS, so without what the kernel keeps for a process: sockets, pipes, and \
             16 KiB for each thread, of which `plain` and `key` have four a connection.\n",
            self.secs,
            self.versions.join(", "),
        );
        if self.figures().any(|(row, ..)| row.name == "wan") {
            let _ = writeln!(
                text,
                "`wan` is one round, its values medians of {FAR_VISITORS} visitors. It delays \
                 bytes between the two programs, and nothing else: no handshake of TCP between \
                 them takes longer, no packet is lost, no bandwidth is limited, and no congestion \
                 window has to open."
            );
        }
        text
    }

    /// What went wrong without failing a whole cell, which says so itself.
    fn troubles(&self) -> Vec<String> {
        let mut troubles = Vec::new();
        let mut tell = |row: &str, system: System, what: String| {
            troubles.push(format!("`{row}`, {}: {what}.", system.name()));
        };
        for (row, system, cell) in &self.cells {
            let (failed, rounds) = (cell.failures.len(), self.rounds);
            if let (Some(why), 1..) = (cell.failures.first(), cell.samples.len()) {
                let what = format!("failed in {failed} of {rounds} rounds: {why}");
                tell(row, *system, what);
            }
            let sum = |count: fn(&Sample) -> u64| cell.samples.iter().map(count).sum();
            let lost = losses(sum(|it| it.lost), sum(|it| it.no_port));
            lost.into_iter().for_each(|what| tell(row, *system, what));
        }
        for soak in &self.soaks {
            let lost = losses(soak.tally.lost, soak.tally.no_port);
            lost.into_iter()
                .for_each(|what| tell(SOAK, soak.system, what));
        }
        troubles
    }

    /// True if our own programs failed throughout a row.
    pub fn own_failed(&self) -> bool {
        let failed = |cell: &Cell| cell.samples.is_empty() && !cell.failures.is_empty();
        let own = |system| matches!(system, System::Plain | System::Key);
        let mut cells = self.cells.iter();
        cells.any(|(_, system, cell)| own(*system) && failed(cell))
    }

    /// Everything, each value of each round.
    pub fn to_json(&self) -> Value {
        let file = |path| fs::read_to_string(path).unwrap_or_default();
        let cpu = file("/proc/cpuinfo");
        let cpu = cpu.lines().find_map(|line| line.strip_prefix("model name"));
        json!({
            "command": env::args().collect::<Vec<_>>(),
            "versions": self.versions,
            "cpu": cpu.map(|model| model.trim_start_matches(['\t', ':', ' '])),
            "cores": thread::available_parallelism().map_or(0, usize::from),
            "kernel": file("/proc/sys/kernel/osrelease").trim(),
            "rounds": self.rounds,
            "secs": self.secs,
            "rows": self.figures().map(|it| self.figure_to_json(it)).collect::<Vec<_>>(),
            "soak": self.soaks.iter().map(soak_to_json).collect::<Vec<_>>(),
            "notes": self.notes,
            "troubles": self.troubles(),
        })
    }

    fn figure_to_json(&self, (row, number, figure): (&Row, usize, &Figure)) -> Value {
        let systems = row.systems.iter().filter_map(|system| {
            let cell = self.find(row, *system)?;
            let values = json!({
                "median": cell.median(number),
                "values": cell.values(number),
                "failures": cell.failures,
            });
            Some((system.name().to_owned(), values))
        });
        json!({
            "row": row.name,
            "figure": figure.what,
            "unit": figure.unit,
            "more_is_better": figure.better == Better::Higher,
            "systems": systems.collect::<Map<_, _>>(),
        })
    }
}

/// What is said of exchanges that were lost, and of pauses for want of a port.
fn losses(lost: u64, no_port: u64) -> Vec<String> {
    let lost = (lost > 0).then(|| format!("{lost} exchanges lost"));
    let paused = format!("paused {no_port} times for want of a free port");
    let paused = (no_port > 0).then_some(paused);
    [lost, paused].into_iter().flatten().collect()
}

fn head() -> Vec<String> {
    let systems = System::ALL.map(|system| system.name().to_owned());
    let ratios = RATIOS.map(|(one, other)| format!("{} / {}", one.name(), other.name()));
    let titles = [String::new()].into_iter().chain(systems);
    titles.chain(ratios).collect()
}

fn soak_table(soaks: &[Soak]) -> String {
    let mut lines = vec![vec![format!("`{SOAK}`, start → end")]];
    lines[0].extend(soaks.iter().map(|soak| soak.system.name().to_owned()));
    for (at, what) in WHAT.into_iter().enumerate() {
        let cell = |soak: &Soak| {
            let flat = if soak.is_flat(at) {
                "flat"
            } else {
                "**not flat**"
            };
            format!("{:.0} → {:.0}, {flat}", soak.start[at], soak.end[at])
        };
        lines.push(
            [what.to_owned()]
                .into_iter()
                .chain(soaks.iter().map(cell))
                .collect(),
        );
    }
    let visits = soaks.iter().map(|soak| soak.tally.micros.len().to_string());
    lines.push(["visits".to_owned()].into_iter().chain(visits).collect());
    table(&lines)
}

fn soak_to_json(soak: &Soak) -> Value {
    json!({
        "system": soak.system.name(),
        "visits": soak.tally.micros.len(),
        "lost": soak.tally.lost,
        "what": WHAT,
        "start": soak.start,
        "end": soak.end,
    })
}

/// Three digits that count, or all before the point.
fn digits(value: f64) -> String {
    let places = match value.abs() {
        0.0..10.0 => 2,
        10.0..100.0 => 1,
        _ => 0,
    };
    format!("{value:.places$}")
}

/// A table in Markdown, the first line its head, columns as wide as they must be.
fn table(lines: &[Vec<String>]) -> String {
    let length = |line: &Vec<String>, at: usize| line[at].chars().count();
    let widest = |at| lines.iter().map(|line| length(line, at)).max();
    let widths: Vec<_> = (0..lines[0].len()).map_while(widest).collect();
    let mut text = String::new();
    for (number, line) in lines.iter().enumerate() {
        for (at, (cell, &width)) in line.iter().zip(&widths).enumerate() {
            let _ = match at {
                0 => write!(text, "| {cell:width$} "),
                _ => write!(text, "| {cell:>width$} "),
            };
        }
        text += "|\n";
        if number == 0 {
            for (at, width) in widths.iter().enumerate() {
                let dashes = "-".repeat(width + 1);
                let _ = write!(text, "|{dashes}{}", if at == 0 { '-' } else { ':' });
            }
            text += "|\n";
        }
    }
    text
}
