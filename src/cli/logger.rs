//! The log of the two programs, on stderr. A thread writes the lines, so that nothing waits for
//! whoever reads them. Lines that the thread cannot get rid of are left out and counted.

use std::io::{self, Write};
use std::panic;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};
use log::{Level, LevelFilter, error};

use crate::error::Error;

/// The most lines that wait to be written: about a second of the busiest log that the limits allow.
const QUEUE: usize = 256;

/// How long an ending program waits for its last lines to be written, the error that ends it among
/// them: enough for a busy host, and not for ever if nobody reads.
const LAST_LINES: Duration = Duration::from_secs(1);

/// The pause after a write that found no room.
const WRITE_PAUSE: Duration = Duration::from_millis(100);

static LINES: OnceLock<Sender<Entry>> = OnceLock::new();

/// The lines that found the queue full, and that no line has told of yet.
static LEFT_OUT: AtomicU64 = AtomicU64::new(0);

enum Entry {
    Line(Vec<u8>),
    /// Dropped, and so told to the other end, when all that came before is written.
    Flush(#[expect(dead_code, reason = "its drop is all that is needed")] Sender<()>),
}

/// Starts the log of this program. It leaves out what is less important than `level`, unless
/// `RUST_LOG` says otherwise. A panic becomes a line of it.
///
/// # Errors
/// The system refused the thread that writes.
pub fn start(program: &'static str, level: LevelFilter) -> Result<(), Error> {
    let (sender, receiver) = bounded(QUEUE);
    let writer = thread::Builder::new().name("log".to_owned());
    let writer = writer.spawn(move || write_lines(&receiver));
    writer.map_err(Error::Thread)?;
    let to_journal = goes_to_journal();
    let queue = Queue(LINES.get_or_init(|| sender).clone());
    env_logger::Builder::new()
        // This comes first, so that a RUST_LOG for other programs leaves the level as it is.
        .filter_level(level)
        .parse_default_env()
        // The format is env_logger's, with the program in the place of the module. systemd's journal
        // has the time and the program itself, and reads the priority.
        .format(move |line, record| {
            let (level, what) = (record.level(), record.args());
            if to_journal {
                return writeln!(line, "{}{what}", priority(level));
            }
            let time = line.timestamp_millis();
            writeln!(line, "[{time} {level:<5} {program}] {what}")
        })
        .target(env_logger::Target::Pipe(Box::new(queue)))
        .init();
    panic::set_hook(Box::new(|panic| {
        error!("{}", panic.to_string().replace('\n', " "));
    }));
    Ok(())
}

/// Returns true if stderr is the connection to systemd's journal that `JOURNAL_STREAM` names.
#[cfg(target_os = "linux")]
fn goes_to_journal() -> bool {
    use std::os::fd::AsFd;
    use std::os::linux::fs::MetadataExt;
    let Some(named) = std::env::var_os("JOURNAL_STREAM") else {
        return false;
    };
    let stderr = io::stderr().as_fd().try_clone_to_owned();
    let found = stderr.and_then(|it| std::fs::File::from(it).metadata());
    found.is_ok_and(|it| named == *format!("{}:{}", it.st_dev(), it.st_ino()))
}

/// There is no journal elsewhere.
#[cfg(not(target_os = "linux"))]
fn goes_to_journal() -> bool {
    false
}

/// Returns what the journal reads a line's priority from.
fn priority(level: Level) -> &'static str {
    match level {
        Level::Error => "<3>",
        Level::Warn => "<4>",
        Level::Info => "<6>",
        Level::Debug | Level::Trace => "<7>",
    }
}

/// Writes a last line, and waits a moment until all lines are written.
pub fn end(last: Option<String>) {
    let error = if goes_to_journal() {
        priority(Level::Error)
    } else {
        ""
    };
    let last = last.map(|line| format!("{error}{line}\n").into_bytes());
    let Some(lines) = LINES.get() else {
        return last.map_or((), |line| drop(io::stderr().write_all(&line)));
    };
    let deadline = Instant::now() + LAST_LINES;
    // The queue is emptied first, so that there is room for the line about those left out.
    flush(lines, deadline);
    for line in take_left_out().into_iter().chain(last) {
        let _ = lines.send_deadline(Entry::Line(line), deadline);
    }
    flush(lines, deadline);
}

fn flush(lines: &Sender<Entry>, deadline: Instant) {
    let (sender, written) = bounded(0);
    let _ = lines.send_deadline(Entry::Flush(sender), deadline);
    let _ = written.recv_deadline(deadline);
}

fn write_lines(lines: &Receiver<Entry>) {
    for entry in lines {
        if let Entry::Line(line) = entry {
            write(&line);
        }
    }
}

/// Writes to stderr, and waits while it has no room. A closed stderr or a full disk is no reason to
/// end the program, and there is nobody to tell.
fn write(line: &[u8]) {
    let mut rest = line;
    while !rest.is_empty() {
        match io::stderr().write(rest) {
            Ok(count @ 1..) => rest = &rest[count..],
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => thread::sleep(WRITE_PAUSE),
            _ => return,
        }
    }
}

/// Returns a line about those that were left out, if there are some.
fn take_left_out() -> Option<Vec<u8>> {
    match LEFT_OUT.swap(0, Ordering::Relaxed) {
        0 => None,
        count => Some(format!("(lines left out, as nobody read them: {count})\n").into_bytes()),
    }
}

/// The queue of lines. The logger writes each line in one piece.
struct Queue(Sender<Entry>);

impl Write for Queue {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        // The count is taken only when there is room for a line that tells it.
        if self.0.is_full() {
            LEFT_OUT.fetch_add(1, Ordering::Relaxed);
            return Ok(line.len());
        }
        let mut entry = take_left_out().unwrap_or_default();
        entry.extend(line);
        let _ = self.0.try_send(Entry::Line(entry));
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_that_nobody_takes_are_left_out_and_counted() {
        let (lines, taken) = bounded(2);
        let mut queue = Queue(lines);
        for line in ["one\n", "two\n", "three\n", "four\n"] {
            queue.write_all(line.as_bytes()).unwrap();
        }
        let next = || match taken.try_recv() {
            Ok(Entry::Line(line)) => String::from_utf8(line).unwrap(),
            _ => panic!("no line"),
        };
        assert_eq!(next(), "one\n");
        queue.write_all(b"five\n").unwrap();
        queue.write_all(b"six\n").unwrap();
        assert_eq!(next(), "two\n");
        assert_eq!(next(), "(lines left out, as nobody read them: 2)\nfive\n");
        queue.write_all(b"seven\n").unwrap();
        assert_eq!(next(), "(lines left out, as nobody read them: 1)\nseven\n");
    }
}
