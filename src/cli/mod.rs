//! What the two programs do around the library: they read the command line and the keys, log, obey
//! signals, and end with an exit code. The feature `cli` brings this module.

use std::error::Error as _;
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use log::{info, warn};
use zeroize::Zeroizing;

use crate::key::Key;
use crate::options::{ClientOptions, ServerOptions};

mod command_line;
mod error;
mod given;
mod key_file;
mod logger;
mod ready;
mod signals;

pub use error::Error;
pub use ready::NotReady;
pub use signals::Signals;

use command_line::{Command, Common};

/// A server that was told to stop keeps its ports as long as visitors wait for a tunnel, up to
/// `--pair-timeout`. The next server waits for them a second longer, but not much longer than a
/// minute.
const MAX_PATIENCE: Duration = Duration::from_secs(60);
const PATIENCE: Duration = Duration::from_secs(1);

/// More bytes than the options of a program ever need.
const CONFIG_SIZE: u64 = 1024 * 1024;

/// Reads the words behind `tpserver`. If they only ask for a text, this prints it and returns None.
/// Otherwise it starts the log, and returns the server's options, and the signals that the program
/// takes from now on.
///
/// # Errors
/// The words make no sense, a key is missing or malformed, or stdout or a thread could not be had.
pub fn server(
    words: impl IntoIterator<Item = OsString>,
) -> Result<Option<(ServerOptions, Signals)>, Error> {
    let Some((mut options, keys, signals)) = start(command_line::server(words, read_config)?)?
    else {
        return Ok(None);
    };
    options.port_patience = options.pair_timeout.min(MAX_PATIENCE) + PATIENCE;
    options.keys = keys;
    Ok(Some((options, signals)))
}

/// Reads the words behind `tpclient`, as [`server`] does those behind `tpserver`.
///
/// # Errors
/// Those of [`server`].
pub fn client(
    words: impl IntoIterator<Item = OsString>,
) -> Result<Option<(ClientOptions, Signals)>, Error> {
    let Some((mut options, mut keys, signals)) = start(command_line::client(words, read_config)?)?
    else {
        return Ok(None);
    };
    options.key = keys.pop();
    Ok(Some((options, signals)))
}

fn start<O>(command: Command<O>) -> Result<Option<(O, Vec<Key>, Signals)>, Error> {
    match command {
        Command::Print(text) => print(&text).map(|()| None),
        Command::GenerateKey => {
            print(&Zeroizing::new(Key::generate()?.to_base64()))?;
            print("\n").map(|()| None)
        }
        Command::AskReady(address) => {
            ready::ask_ready(&address)?;
            print("ready\n").map(|()| None)
        }
        Command::Run(options, common) => {
            let keys = prepare(&common)?;
            Ok(Some((options, keys, Signals::take(common.drain)?)))
        }
    }
}

/// Reads the file that `--config` names. It has some lines; `/dev/zero` has no end.
fn read_config(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    File::open(path)?
        .take(CONFIG_SIZE)
        .read_to_string(&mut text)?;
    match (text.len() as u64) < CONFIG_SIZE {
        true => Ok(text),
        false => Err(io::Error::other("it is too large")),
    }
}

/// Starts the log, takes as many descriptors as the user may have, and reads the keys.
fn prepare(common: &Common) -> Result<Vec<Key>, Error> {
    raise_descriptors();
    logger::start(common.program, common.level)?;
    let (keys, remarks) = key_file::read_all(&common.key_files)?;
    let version = env!("CARGO_PKG_VERSION");
    let needs = match keys.is_empty() {
        _ if common.program != command_line::SERVER.name => "",
        true => ", a client needs no key",
        false => ", a client needs the key",
    };
    info!("version {version}{needs}");
    for remark in remarks {
        warn!("{remark}");
    }
    Ok(keys)
}

/// Raises the process's limit of descriptors as far as its user may. The usual limit of 1024 is
/// there for programs that use `select`, as these do not.
fn raise_descriptors() {
    #[cfg(target_os = "linux")]
    {
        use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
        let maximum = getrlimit(Resource::Nofile).maximum;
        let current = maximum;
        // If that fails, the program serves fewer visitors at a time, and says so.
        let _ = setrlimit(Resource::Nofile, Rlimit { current, maximum });
    }
}

/// Prints a text on stdout. A reader that has gone away is no error, as the text may be piped into
/// `head`. A text that does not get into a file is one, as it may be a key.
fn print(text: &str) -> Result<(), Error> {
    match io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(Error::Print(error)),
        _ => Ok(()),
    }
}

/// Writes a program's error and its causes to stderr, on one line, and returns the exit code.
pub fn exit(program: &str, result: Result<(), Error>) -> ExitCode {
    let Err(error) = result else {
        logger::end(None);
        return ExitCode::SUCCESS;
    };
    let mut line = format!("{program}: {error}");
    let mut cause = error.source();
    while let Some(error) = cause {
        line += &format!(": {error}");
        cause = error.source();
    }
    logger::end(Some(line));
    ExitCode::from(error.exit_code())
}
