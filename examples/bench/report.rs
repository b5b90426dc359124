//! What a run has found, as a table and as a picture.

use std::collections::BTreeMap;

use crate::rows::{CPU, FAR_VISITORS, Figure, ROWS, Row, Sample, middle};
use crate::run::Fallible;
use crate::systems::System;

/// The systems that are compared, one of them for processor time alone.
const RATIOS: [(System, System); 4] = [
    (System::Plain, System::Rathole),
    (System::Key, System::RatholeNoise),
    (System::Plain, System::Haproxy),
    (System::Key, System::Rathole),
];

#[derive(Default)]
pub struct Results {
    /// What became of each row for each system, in all rounds.
    cells: BTreeMap<(&'static str, System), Vec<Fallible<Sample>>>,
}

impl Results {
    pub fn add(&mut self, row: &'static str, system: System, sample: Fallible<Sample>) {
        self.cells.entry((row, system)).or_default().push(sample);
    }

    /// True if our own programs failed in all rounds of a row.
    pub fn own_failed(&self) -> bool {
        let mut cells = self.cells.iter();
        cells.any(|((_, it), cell)| System::OWN.contains(it) && cell.iter().all(Result::is_err))
    }

    fn median(&self, row: &Row, figure: usize, system: System) -> Option<f64> {
        let samples = self.cells.get(&(row.name, system))?.iter().flatten();
        let values = samples.filter_map(|sample| sample[figure]);
        middle(&mut values.collect::<Vec<_>>())
    }

    fn ratio(&self, row: &Row, figure: usize, of: (System, System)) -> Option<f64> {
        Some(self.median(row, figure, of.0)? / self.median(row, figure, of.1)?)
    }

    /// Each figure of each row that was measured, and its number in the row.
    fn figures(&self) -> Vec<(&'static Row, usize, Figure)> {
        let measured = |row: &&Row| self.cells.keys().any(|(name, _)| *name == row.name);
        let mut figures = Vec::new();
        for row in ROWS.iter().filter(measured) {
            for (number, figure) in row.figures.iter().enumerate() {
                figures.push((row, number, *figure));
            }
        }
        figures
    }

    /// The table, and what to know about it.
    pub fn to_markdown(&self, rounds: u32, secs: f64, notes: &[String]) -> String {
        let mut head = vec![String::new()];
        head.extend(System::ALL.iter().map(|system| system.name().to_owned()));
        head.extend(RATIOS.map(|(one, other)| format!("{} / {}", one.name(), other.name())));
        let mut rule = vec!["--".to_owned()];
        rule.resize(head.len(), "--:".to_owned());
        let mut lines = vec![head, rule];
        for (row, number, figure) in self.figures() {
            lines.push(self.line(row, number, figure));
        }
        let mut text = table(&lines);
        text += &format!(
            "\n↑ more is better, ↓ less is better. Medians over rounds: {rounds}, {secs} s of \
             load each; a ratio is one of medians. Memory and processor time are those of both \
             processes together; memory is PSS, without what the kernel keeps for a process. `wan` \
             is one round of {FAR_VISITORS} visitors, and delays bytes between the two programs, \
             nothing else: TCP's own handshakes take no longer, and no packet is lost.\n\n"
        );
        for note in notes {
            text += &format!("- {note}\n");
        }
        for ((row, system), cell) in &self.cells {
            for why in cell.iter().filter_map(|sample| sample.as_ref().err()) {
                text += &format!("- `{row}`, {}: {why}.\n", system.name());
            }
        }
        text
    }

    fn line(&self, row: &Row, number: usize, (what, unit): Figure) -> Vec<String> {
        let mut line = vec![format!("`{}` {what}, {unit}", row.name)];
        for system in System::ALL {
            let cell = self.cells.get(&(row.name, *system));
            line.push(match (cell, self.median(row, number, *system)) {
                (_, Some(median)) => digits(median),
                (Some(cell), None) if cell.iter().all(Result::is_err) => "failed".to_owned(),
                (None, None) if row.systems().contains(system) => "–".to_owned(),
                _ => String::new(),
            });
        }
        for (at, of) in RATIOS.into_iter().enumerate() {
            let wanted = at + 1 < RATIOS.len() || what == CPU;
            let ratio = self.ratio(row, number, of).filter(|_| wanted);
            line.push(ratio.map_or_else(String::new, |ratio| format!("{ratio:.2}")));
        }
        line
    }

    /// The ratios to rathole as bars: how many times as good we are, whichever way is better.
    pub fn to_svg(&self) -> String {
        let mut groups = Vec::new();
        for (row, number, (what, unit)) in self.figures() {
            let power = if unit.ends_with('↑') { 1 } else { -1 };
            let times = DRAWN.map(|(of, ..)| Some(self.ratio(row, number, of)?.powi(power)));
            if times.iter().any(Option::is_some) {
                groups.push((format!("{}: {what}", row.name), times));
            }
        }
        draw(&groups)
    }
}

/// Three significant digits, or all before the point.
fn digits(value: f64) -> String {
    let places = match value.abs() {
        0.0..10.0 => 2,
        10.0..100.0 => 1,
        _ => 0,
    };
    format!("{value:.places$}")
}

/// A table in Markdown, columns as wide as they must be.
fn table(lines: &[Vec<String>]) -> String {
    let mut widths = vec![0; lines[0].len()];
    for line in lines {
        for (width, cell) in widths.iter_mut().zip(line) {
            *width = cell.chars().count().max(*width);
        }
    }
    let mut text = String::new();
    for line in lines {
        for (at, (cell, width)) in line.iter().zip(&widths).enumerate() {
            text += &match at {
                0 => format!("| {cell:width$} |"),
                _ => format!(" {cell:>width$} |"),
            };
        }
        text += "\n";
    }
    text
}

/// All sizes are pixels. The picture is as wide as a README is shown.
const WIDTH: i32 = 900;
const HEAD: i32 = 100;
const GROUP: i32 = 46;
const BAR: i32 = 16;

/// Where bars begin, behind their labels, and where the longest ends, with room for its figure.
const LEFT: i32 = 380;
const RIGHT: i32 = 830;

/// A ratio that is drawn: its colour, its legend, and where that begins.
type Drawn = ((System, System), &'static str, &'static str, i32);
const DRAWN: [Drawn; 2] = [
    (RATIOS[0], "#2E6FB2", "plain against rathole", 16),
    (RATIOS[1], "#DE7D2C", "key against rathole with Noise", 236),
];

fn draw(groups: &[(String, [Option<f64>; DRAWN.len()])]) -> String {
    let all = groups.iter().flat_map(|(_, times)| times).flatten();
    let longest = all.copied().fold(1.0, f64::max);
    let length = |times: f64| (times / longest * f64::from(RIGHT - LEFT)) as i32;
    let (height, one) = (HEAD + GROUP * groups.len() as i32 + BAR, LEFT + length(1.0));
    let mut svg = format!(
        "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {height}' width='{WIDTH}' \
         height='{height}' font-family='sans-serif' fill='#282828'>\n\
         <rect width='{WIDTH}' height='{height}' fill='#FFFFFF'/>\n"
    );
    let title = "Times as good as rathole; longer is better";
    svg += &text(16, 20, 16, "start", title);
    for (_, colour, legend, x) in DRAWN {
        svg += &bar(x, 48, BAR, colour);
        svg += &text(x + BAR + 6, 48, 14, "start", legend);
    }
    for ((label, times), at) in groups.iter().zip(0..) {
        let top = HEAD + GROUP * at;
        svg += &text(LEFT - 10, top + BAR / 2, 14, "end", label);
        for ((times, (_, colour, ..)), y) in times.iter().zip(DRAWN).zip([top, top + BAR]) {
            let Some(times) = *times else { continue };
            svg += &bar(LEFT, y, length(times), colour);
            // Behind the line at 1, even if the bar does not reach it.
            let behind = LEFT + length(times.max(1.0)) + 6;
            svg += &text(behind, y, 12, "start", &format!("{times:.2}"));
        }
    }
    let (top, bottom) = (HEAD - 6, height - BAR / 2);
    svg += &text(one, top - BAR, 12, "middle", "1");
    svg + &format!("<path d='M{one} {top}V{bottom}' stroke='#282828'/>\n</svg>\n")
}

fn bar(x: i32, y: i32, width: i32, colour: &str) -> String {
    format!("<rect x='{x}' y='{y}' width='{width}' height='{BAR}' fill='{colour}'/>\n")
}

/// A line of text beside a bar whose top is at `y`.
fn text(x: i32, y: i32, size: i32, anchor: &str, text: &str) -> String {
    let y = y + BAR - 3;
    format!("<text x='{x}' y='{y}' font-size='{size}' text-anchor='{anchor}'>{text}</text>\n")
}
