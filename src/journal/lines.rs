//! The lines that a server or a client logs, and the last of them, which its status page shows.

use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use log::{Level, log, log_enabled};
use parking_lot::Mutex;

use crate::status::snapshot::{LOG_LINES, LogLine};

/// The bytes of a line that are kept. No line is longer but one with many addresses in it.
const MAX_LINE: usize = 400;

/// Where all lines of a server or a client go.
pub struct Lines {
    /// The last lines, the oldest first, each with the time when it was logged. None if nobody asked
    /// for a status page.
    kept: Option<Mutex<VecDeque<(Instant, Level, String)>>>,
    left_out: AtomicU64,
}

impl Lines {
    /// No lines yet. Unless it `keeps` the last ones, all go to the log alone.
    pub fn new(keeps: bool) -> Arc<Self> {
        Arc::new(Self {
            kept: keeps.then(|| Mutex::new(VecDeque::with_capacity(LOG_LINES))),
            left_out: AtomicU64::new(0),
        })
    }

    /// Logs a line.
    pub fn say(&self, level: Level, what: fmt::Arguments) {
        log!(level, "{what}");
        let Some(kept) = self.kept.as_ref().filter(|_| counts(level)) else {
            return;
        };
        let mut text = what.to_string();
        if text.len() > MAX_LINE {
            text.truncate(text.floor_char_boundary(MAX_LINE));
            text.push('…');
        }
        let mut kept = kept.lock();
        if kept.len() == LOG_LINES {
            kept.pop_front();
        }
        kept.push_back((Instant::now(), level, text));
    }

    /// Counts a line that a limit has left out.
    pub fn leave_out(&self, level: Level) {
        if counts(level) {
            self.left_out.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Returns how many lines limits have left out.
    pub fn left_out(&self) -> u64 {
        self.left_out.load(Ordering::Relaxed)
    }

    /// Returns the last lines, the oldest first.
    pub fn last(&self) -> Vec<LogLine> {
        let kept = self.kept.iter().flat_map(|kept| kept.lock().clone());
        kept.map(|(at, level, text)| LogLine {
            age: at.elapsed(),
            level,
            text,
        })
        .collect()
    }
}

/// Details count only where they are logged. What matters is shown whatever the log leaves out.
fn counts(level: Level) -> bool {
    level <= Level::Info || log_enabled!(level)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_lines_are_kept_and_bounded() {
        let lines = Lines::new(true);
        for number in 0..LOG_LINES + 3 {
            lines.say(Level::Info, format_args!("line {number}"));
        }
        lines.say(Level::Warn, format_args!("{}", "é".repeat(MAX_LINE)));
        lines.leave_out(Level::Info);
        let last = lines.last();
        assert_eq!(last.len(), LOG_LINES);
        assert_eq!(last[0].text, "line 4");
        let long = &last[LOG_LINES - 1];
        assert_eq!(long.level, Level::Warn);
        assert_eq!(long.text, format!("{}…", "é".repeat(MAX_LINE / 2)));
        assert_eq!(lines.left_out(), 1);
    }

    #[test]
    fn nothing_is_kept_that_nobody_asks_for() {
        let lines = Lines::new(false);
        lines.say(Level::Info, format_args!("a line"));
        assert!(lines.last().is_empty());
    }
}
