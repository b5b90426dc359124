//! What a run has found: the table.

use std::fmt::Write as _;

use crate::load::percentile;
use crate::options::Options;
use crate::rows::{Better, Figure, ROWS, Row, Sample};
use crate::systems::{Programs, System};

/// All values of a row for a system.
#[derive(Default)]
pub struct Cell {
    pub samples: Vec<Sample>,
    /// Why the other rounds failed.
    pub failures: Vec<String>,
}

impl Cell {
    pub fn median(&self, figure: usize) -> Option<f64> {
        let values = self
            .samples
            .iter()
            .filter_map(|sample| sample.values[figure]);
        let mut values: Vec<_> = values.collect();
        (!values.is_empty()).then(|| percentile(&mut values, 50.0))
    }
}

pub struct Results {
    cells: Vec<(&'static str, System, Cell)>,
    pub notes: Vec<String>,
    pub versions: Vec<String>,
    systems: Vec<System>,
    rounds: u32,
    secs: f64,
}

/// A comparison of two systems; the last one for processor time alone.
const RATIOS: [(System, System); 3] = [
    (System::Plain, System::Rathole),
    (System::Key, System::RatholeNoise),
    (System::Key, System::Rathole),
];

impl Results {
    pub fn new(options: &Options, programs: &Programs) -> Self {
        let mut results = Self {
            cells: Vec::new(),
            notes: Vec::new(),
            versions: vec![programs.version.clone()],
            systems: System::ALL.to_vec(),
            rounds: options.rounds,
            secs: options.span.as_secs_f64(),
        };
        for system in System::ALL {
            match programs.peer(system) {
                None => {}
                Some(Ok(version)) => {
                    results
                        .versions
                        .push(format!("{} {version}", system.name()));
                }
                Some(Err(why)) => results.notes.push(format!("No {}: {why}.", system.name())),
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

    fn find(&self, row: &str, system: System) -> Option<&Cell> {
        self.position(row, system).map(|at| &self.cells[at].2)
    }

    fn median(&self, row: &Row, figure: usize, system: System) -> Option<f64> {
        self.find(row.name, system)?.median(figure)
    }

    /// The quotient of two systems' medians.
    pub fn ratio(&self, row: &Row, figure: usize, of: (System, System)) -> Option<f64> {
        Some(self.median(row, figure, of.0)? / self.median(row, figure, of.1)?)
    }

    fn measured(&self, row: &Row) -> bool {
        self.cells.iter().any(|cell| cell.0 == row.name)
    }
}

pub fn print(results: &Results) {
    let mut lines = vec![head(results)];
    for row in ROWS.iter().filter(|row| results.measured(row)) {
        for (number, figure) in row.figures.iter().enumerate() {
            lines.push(line(results, row, number, figure));
        }
    }
    println!("{}", aligned(&lines));
    println!("{}", foot(results));
}

fn head(results: &Results) -> Vec<String> {
    let mut cells = vec![String::new()];
    cells.extend(
        results
            .systems
            .iter()
            .map(|system| system.name().to_owned()),
    );
    cells.extend(RATIOS.map(|(one, other)| format!("{} / {}", one.name(), other.name())));
    cells
}

fn line(results: &Results, row: &Row, number: usize, figure: &Figure) -> Vec<String> {
    let arrow = match figure.better {
        Better::Higher => '↑',
        Better::Lower => '↓',
    };
    let mut cells = vec![format!(
        "`{}` {}, {} {arrow}",
        row.name, figure.what, figure.unit
    )];
    for system in &results.systems {
        cells.push(match results.find(row.name, *system) {
            None if row.systems.contains(system) => "–".to_owned(),
            None => String::new(),
            Some(cell) => match (cell.median(number), cell.failures.first()) {
                (Some(median), _) => digits(median),
                (None, Some(why)) => format!("failed: {why}"),
                (None, None) => String::new(),
            },
        });
    }
    for (at, of) in RATIOS.into_iter().enumerate() {
        let ratio = results.ratio(row, number, of);
        let ratio = ratio.filter(|_| at < 2 || figure.what == crate::rows::COST.what);
        cells.push(ratio.map_or_else(String::new, |ratio| format!("{ratio:.2}")));
    }
    cells
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

/// A table in Markdown, its columns as wide as they must be.
fn aligned(lines: &[Vec<String>]) -> String {
    let width = |column: usize| lines.iter().map(|line| line[column].chars().count()).max();
    let widths: Vec<_> = (0..lines[0].len())
        .map(|at| width(at).unwrap_or(0))
        .collect();
    let mut text = String::new();
    for (number, line) in lines.iter().enumerate() {
        for (at, (cell, width)) in line.iter().zip(&widths).enumerate() {
            let cell = if at == 0 {
                format!("{cell:width$}")
            } else {
                format!("{cell:>width$}")
            };
            let _ = write!(text, "| {cell} ");
        }
        text += "|\n";
        if number == 0 {
            for (at, width) in widths.iter().enumerate() {
                let _ = write!(
                    text,
                    "|{}{}",
                    "-".repeat(width + 1),
                    if at == 0 { "-" } else { ":" }
                );
            }
            text += "|\n";
        }
    }
    text
}

fn foot(results: &Results) -> String {
    let mut text = format!(
        "↑ more is better, ↓ less is better. Medians of {} rounds of {} s; a ratio is one of medians. \
         Memory is PSS; it and processor time are of both processes together. {}.\n",
        results.rounds,
        results.secs,
        results.versions.join(", "),
    );
    for note in &results.notes {
        let _ = writeln!(text, "{note}");
    }
    for (row, system, cell) in &results.cells {
        let name = format!("`{row}`, {}", system.name());
        let (failed, all) = (
            cell.failures.len(),
            cell.failures.len() + cell.samples.len(),
        );
        if let Some(why) = cell.failures.first() {
            let _ = writeln!(text, "{name}: failed in {failed} of {all} rounds: {why}.");
        }
        let lost: u64 = cell.samples.iter().map(|sample| sample.lost).sum();
        if lost > 0 {
            let _ = writeln!(text, "{name}: {lost} exchanges lost.");
        }
        let no_port: u64 = cell.samples.iter().map(|sample| sample.no_port).sum();
        if no_port > 0 {
            let _ = writeln!(
                text,
                "{name}: paused {no_port} times for want of a free port."
            );
        }
    }
    text
}
