//! What both programs do around the library: log, print, and end with an exit code.

use std::error::Error as _;
use std::io::{self, Write};
use std::process::ExitCode;

use log::LevelFilter;

use crate::error::Error;
use crate::limits::raise_descriptors;

/// Starts the logger on stderr, where `RUST_LOG` rules if it is set, and takes as many descriptors
/// as the user may have.
pub fn prepare(level: LevelFilter) {
    raise_descriptors();
    let default = env_logger::Env::default().default_filter_or(level.as_str());
    env_logger::Builder::from_env(default)
        .format_timestamp_millis()
        .format_target(false)
        .init();
}

/// Prints a text on stdout. That nobody reads it is no error: it may be piped into `head`.
pub fn print(text: &str) {
    let _ = io::stdout().write_all(text.as_bytes());
}

/// The exit code of a program, after its error and what caused it, on one line of stderr.
pub fn exit(program: &str, result: Result<(), Error>) -> ExitCode {
    let Err(error) = result else {
        return ExitCode::SUCCESS;
    };
    let mut line = format!("{program}: {error}");
    let mut cause = error.source();
    while let Some(error) = cause {
        line += &format!(": {error}");
        cause = error.source();
    }
    let _ = writeln!(io::stderr(), "{line}");
    ExitCode::from(error.exit_code())
}
