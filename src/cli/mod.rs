//! What the two programs do around the library: they read the command line and the keys, log, obey
//! signals, and end with an exit code. The feature `cli` brings this module.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use log::{info, warn};
use parking_lot::Mutex;
use zeroize::Zeroizing;

use crate::client::Client;
use crate::handle::{Handle, Running};
use crate::key::Key;
use crate::options::{ClientOptions, ServerOptions};
use crate::server::Server;

mod check;
pub(crate) mod command_line;
mod error;
mod given;
mod key_file;
mod logger;
mod ready;
mod signals;

pub use error::Error;
pub use ready::NotReady;

use command_line::{Command, Common, ReadFile};
use signals::{Ended, Signals};

/// A server that was told to stop keeps its ports as long as visitors wait for a tunnel, up to
/// `--pair-timeout`. The next server waits for them a second longer, but not much longer than a
/// minute.
const MAX_PATIENCE: Duration = Duration::from_secs(60);
const PATIENCE: Duration = Duration::from_secs(1);

/// More bytes than the options of a program ever need, a list of 100,000 networks among them.
const CONFIG_SIZE: u64 = 16 * 1024 * 1024;

/// Does what the words behind `tpserver` ask for: most often runs a server until a signal ends it.
///
/// # Errors
/// The words make no sense, a key is missing or malformed, a port cannot be had, or stdout or a thread.
pub fn run_server(words: Vec<OsString>) -> Result<(), Error> {
    let with_keys = |mut options: ServerOptions, keys| {
        options.port_patience = options.pair_timeout.min(MAX_PATIENCE) + PATIENCE;
        options.keys = keys;
        options
    };
    let can_follow = |options: &_, before: &_| Server::can_follow(options, before);
    let start = |options, ended| {
        let server = Server::bind(options)?;
        Running::spawn("server", server.handle(), move || {
            let _until_it_ends: Ended = ended;
            server.run()
        })
    };
    // No option of a server's asks for that.
    let check = |_: &_| Ok(());
    let read = command_line::server;
    run(words, read, with_keys, check, can_follow, start)
}

/// Does what the words behind `tpclient` ask for, as [`run_server`] does.
///
/// # Errors
/// Those of [`run_server`], but for ports.
pub fn run_client(words: Vec<OsString>) -> Result<(), Error> {
    let with_keys = |mut options: ClientOptions, mut keys: Vec<_>| {
        options.key = keys.pop();
        options
    };
    let can_follow = |options: &_, _: &_| Client::check(options);
    let start = |options, ended| {
        let client = Client::new(options);
        Running::spawn("client", client.handle(), move || {
            let _until_it_ends: Ended = ended;
            client.run()
        })
    };
    let read = command_line::client;
    run(words, read, with_keys, check, can_follow, start)
}

fn check(options: &ClientOptions) -> Result<(), Error> {
    Client::check(options)?;
    let mut printed = Ok(());
    let tell = |step: &check::Step| {
        let line = print(&format!("{step}\n"));
        printed = std::mem::replace(&mut printed, Ok(())).and(line);
    };
    let all_well = check::check(options, tell);
    printed?;
    match all_well {
        true => Ok(()),
        false => Err(Error::CheckFailed),
    }
}

fn run<O: Clone + Send + 'static>(
    words: Vec<OsString>,
    read: fn(Vec<OsString>, ReadFile) -> Result<Command<O>, Error>,
    with_keys: fn(O, Vec<Key>) -> O,
    check: fn(&O) -> Result<(), Error>,
    can_follow: fn(&O, &O) -> Result<(), crate::Error>,
    start: fn(O, Ended) -> Result<Running, crate::Error>,
) -> Result<(), Error> {
    let (options, common) = match read(words.clone(), read_config)? {
        Command::Print(text) => return print(&text),
        Command::GenerateKey => {
            print(&Zeroizing::new(Key::generate()?.to_base64()))?;
            return print("\n");
        }
        Command::AskReady(address) => {
            ready::ask_ready(&address)?;
            return print("ready\n");
        }
        Command::Run(options, common) if common.only_check => {
            logger::start(common.program, common.level)?;
            return check(&with_keys(options, read_keys(&common)?));
        }
        Command::Run(options, common) => (options, common),
    };
    let keys = prepare(&common)?;
    let signals = Signals::take(common.drain, common.has_file)?;
    let options = with_keys(options, keys);
    let first = signals.start(start, options.clone())?;
    let in_force = Mutex::new(options);
    let again = signals.clone();
    let reload = move |before: &Handle| {
        let Command::Run(options, common) = read(words.clone(), read_config)? else {
            return Err(Error::Usage(
                "the options ask for something else".to_owned(),
            ));
        };
        let options = with_keys(options, read_keys(&common)?);
        let mut in_force = in_force.lock();
        can_follow(&options, &in_force)?;
        before.make_way();
        again
            .start(start, options.clone())
            .inspect(|_| *in_force = options)
            .or_else(|error| {
                if again.is_stopping() {
                    return Err(error.into());
                }
                warn!("going on with the options from before: {}", chain(&error));
                let as_before = again.start(start, in_force.clone());
                as_before.map_err(Error::NothingRuns)
            })
    };
    signals.obey_for(first, Arc::new(reload));
    signals.wait()
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
    let keys = read_keys(common)?;
    let version = env!("CARGO_PKG_VERSION");
    let needs = match keys.is_empty() {
        _ if common.program != command_line::SERVER.name => "",
        true => ", a client needs no key",
        false => ", a client needs the key",
    };
    info!("version {version}{needs}");
    Ok(keys)
}

fn read_keys(common: &Common) -> Result<Vec<Key>, Error> {
    let (keys, remarks) = key_file::read_all(&common.key_files)?;
    for remark in remarks.iter().chain(&common.remark) {
        warn!("{remark}");
    }
    Ok(keys)
}

/// An error and its causes, on one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut line = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        line += &format!(": {error}");
        cause = error.source();
    }
    line
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
    logger::end(Some(format!("{program}: {}", chain(&error))));
    ExitCode::from(error.exit_code())
}
