//! Limits for the log lines that strangers can cause.

use std::collections::HashMap;
use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use log::Level;
use parking_lot::Mutex;

use super::lines::Lines;
use crate::os::source::Source;

/// The sources that have a limit of their own for each kind of line. A program that bans addresses
/// sees so many new ones a second, and a flood from everywhere still leaves a readable log.
const MAX_SOURCES: usize = 64;

const SECOND: Duration = Duration::from_secs(1);

/// Lets at most so many log lines of one kind through in a period, and counts the others.
pub struct LogLimit {
    lines: Arc<Lines>,
    most: u32,
    period: Duration,
    state: Mutex<LogState>,
}

impl LogLimit {
    /// Lets this many lines through in a second.
    pub fn new(lines: &Arc<Lines>, a_second: u32) -> Self {
        Self::within(lines, SECOND, a_second)
    }

    /// Lets this many lines through in each such period.
    pub fn within(lines: &Arc<Lines>, period: Duration, most: u32) -> Self {
        Self {
            lines: lines.clone(),
            most,
            period,
            state: Mutex::new(LogState::new(Instant::now())),
        }
    }

    /// Logs a line if this period has one left, and tells behind it how many were left out before.
    pub fn say(&self, level: Level, what: fmt::Arguments) {
        let (mut state, now) = (self.state.lock(), Instant::now());
        let left_out = state.take(now, self.period, self.most);
        drop(state);
        say(&self.lines, level, what, left_out);
    }
}

/// Lets at most so many log lines of one kind a second through for each source, so that nobody can
/// hide others.
pub struct SourceLogLimit {
    lines: Arc<Lines>,
    a_second: u32,
    table: Mutex<Table>,
}

struct Table {
    sources: HashMap<Source, LogState>,
    /// The state that all sources without a place share.
    others: LogState,
}

impl SourceLogLimit {
    /// Lets this many lines a second through for each source.
    pub fn new(lines: &Arc<Lines>, a_second: u32) -> Self {
        Self {
            lines: lines.clone(),
            a_second,
            table: Mutex::new(Table {
                sources: HashMap::new(),
                others: LogState::new(Instant::now()),
            }),
        }
    }

    /// Logs a line that this address has caused, as [`LogLimit::say`] does.
    pub fn say(&self, from: SocketAddr, level: Level, what: fmt::Arguments) {
        let left_out = self.take(from.into(), Instant::now());
        say(&self.lines, level, what, left_out);
    }

    fn take(&self, source: Source, now: Instant) -> Option<LeftOut> {
        let mut table = self.table.lock();
        table.state(source, now).take(now, SECOND, self.a_second)
    }
}

/// Logs a line with the number of those that were left out before, or leaves it out itself.
fn say(lines: &Lines, level: Level, what: fmt::Arguments, left_out: Option<LeftOut>) {
    match left_out {
        Some(left_out) => lines.say(level, format_args!("{what}{left_out}")),
        None => lines.leave_out(level),
    }
}

impl Table {
    /// Returns a source's own state, or the one that the others share if the table is full of sources
    /// that had a line in this second.
    fn state(&mut self, source: Source, now: Instant) -> &mut LogState {
        let mut fresh = LogState::new(now);
        if self.sources.len() >= MAX_SOURCES && !self.sources.contains_key(&source) {
            let states = self.sources.iter();
            let over = states.filter(|(_, state)| state.is_over(now, SECOND));
            let longest_ago = over.min_by_key(|(_, state)| state.since);
            let Some(leaves) = longest_ago.map(|(leaves, _)| *leaves) else {
                return &mut self.others;
            };
            // The new source's first line tells what was left out of the old one's.
            if let Some(state) = self.sources.remove(&leaves) {
                fresh.left_out = state.left_out;
            }
        }
        self.sources.entry(source).or_insert(fresh)
    }
}

struct LogState {
    since: Instant,
    said: u32,
    left_out: u64,
}

impl LogState {
    fn new(now: Instant) -> Self {
        Self {
            since: now,
            said: 0,
            left_out: 0,
        }
    }

    fn is_over(&self, now: Instant, period: Duration) -> bool {
        now.saturating_duration_since(self.since) >= period
    }

    fn take(&mut self, now: Instant, period: Duration, most: u32) -> Option<LeftOut> {
        // A period begins with its first line: with fixed periods, the lines of two could come at once.
        if self.is_over(now, period) || self.said == 0 {
            self.since = now;
            self.said = 0;
        }
        if self.said == most {
            self.left_out += 1;
            return None;
        }
        self.said += 1;
        Some(LeftOut(std::mem::take(&mut self.left_out)))
    }
}

/// The number of lines that were left out before this one. 0 prints as nothing.
#[derive(Debug, PartialEq, Eq)]
struct LeftOut(u64);

impl fmt::Display for LeftOut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            0 => Ok(()),
            count => write!(f, " (and {count} more like this before, not logged)"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv4Addr;

    #[test]
    fn log_lines_are_limited_and_counted() {
        let start = Instant::now();
        let mut state = LogState::new(start);
        assert_eq!(state.take(start, SECOND, 2), Some(LeftOut(0)));
        assert_eq!(state.take(start, SECOND, 2), Some(LeftOut(0)));
        assert_eq!(state.take(start, SECOND, 2), None);
        assert_eq!(state.take(start, SECOND, 2), None);
        let later = start + Duration::from_secs(2);
        assert_eq!(state.take(later, SECOND, 2), Some(LeftOut(2)));
        assert_eq!(state.take(later, SECOND, 2), Some(LeftOut(0)));
        assert_eq!(LeftOut(0).to_string(), "");
        assert!(LeftOut(2).to_string().contains("2 more"));
    }

    #[test]
    fn each_source_has_its_own_limit_as_long_as_there_is_room() {
        let limit = SourceLogLimit::new(&Lines::new(false), 1);
        let source = |number: usize| Source::V4(Ipv4Addr::from_bits(number as u32));
        let start = Instant::now();
        for number in 0..MAX_SOURCES {
            assert_eq!(limit.take(source(number), start), Some(LeftOut(0)));
            assert_eq!(limit.take(source(number), start), None);
        }
        // All others share one.
        assert_eq!(limit.take(source(100), start), Some(LeftOut(0)));
        assert_eq!(limit.take(source(101), start), None);
        let later = start + Duration::from_secs(2);
        assert_eq!(limit.take(source(102), later), Some(LeftOut(1)));
        let table = limit.table.lock();
        assert_eq!(table.sources.len(), MAX_SOURCES);
        assert_eq!(table.others.left_out, 1);
    }
}
