//! What both programs do around the library: log, print, and end with an exit code.

use std::env;
use std::error::Error as _;
use std::fs::{File, Metadata};
use std::io::{self, Read, Write};
use std::path::Path;
use std::process::ExitCode;
#[cfg(unix)]
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, OnceLock};
#[cfg(unix)]
use std::thread;
use std::time::Duration;

use log::{info, warn};
use zeroize::Zeroizing;

use crate::error::Error;
use crate::key::Key;
use crate::limits::raise_descriptors;
use crate::logger;
use crate::options::{Command, Common};
use crate::stop::Handle;

/// The key itself, where a file does not suit.
const KEY_VARIABLE: &str = "TP_KEY";

/// What is read of a key file at most, in bytes: a key has 44, and `/dev/zero` no end.
const KEY_FILE_SIZE: u64 = 1024;

/// Does what a command asks for, if it is no more than to print something; otherwise gets ready to
/// run, and answers with the options, the keys, and the signals that the program takes from now on.
///
/// # Errors
/// There is no key where one should be, or what was to be printed could not be.
pub fn start<O>(command: Command<O>) -> Result<Option<(O, Vec<Key>, Signals)>, Error> {
    match command {
        Command::Print(text) => print(&text).map(|()| None),
        Command::GenerateKey => {
            print(&Zeroizing::new(Key::generate()?.to_base64()))?;
            print("\n").map(|()| None)
        }
        Command::Run(options, common) => {
            let keys = prepare(&common)?;
            Ok(Some((options, keys, Signals::take(common.drain)?)))
        }
    }
}

/// Starts the log, takes as many descriptors as the user may have, and reads the keys: those in the
/// files, or else the one in `TP_KEY`.
fn prepare(common: &Common) -> Result<Vec<Key>, Error> {
    raise_descriptors();
    logger::start(common.level)?;
    let in_environment = env::var_os(KEY_VARIABLE);
    if in_environment.is_some() || !common.key_files.is_empty() {
        forbid_core();
    }
    if !common.key_files.is_empty() {
        return common.key_files.iter().map(|file| read_key(file)).collect();
    }
    let Some(text) = in_environment else {
        return Ok(Vec::new());
    };
    let text = text.into_string();
    let text = Zeroizing::new(text.unwrap_or_else(|odd| odd.to_string_lossy().into_owned()));
    let key = text.parse();
    let key = key.map_err(|why: &str| Error::Key(KEY_VARIABLE.to_owned(), why.to_owned()))?;
    Ok(vec![key])
}

/// The signals that the program obeys.
pub struct Signals(Arc<OnceLock<Handle>>);

impl Signals {
    /// From now on TERM and INT end the program, and a second one as if nobody obeyed it.
    #[cfg(unix)]
    fn take(drain: Duration) -> Result<Self, Error> {
        use signal_hook::consts::{SIGINT, SIGTERM, SIGUSR1};
        use signal_hook::flag;

        let all = [SIGTERM, SIGINT, SIGUSR1];
        let mut signals = signal_hook::iterator::Signals::new(all).map_err(Error::Signals)?;
        let ending = Arc::new(AtomicBool::new(false));
        for signal in [SIGTERM, SIGINT] {
            // In this order: the second one is what finds the flag set. It needs no thread, whatever
            // state they are in.
            flag::register_conditional_default(signal, ending.clone()).map_err(Error::Signals)?;
            flag::register(signal, ending.clone()).map_err(Error::Signals)?;
        }
        let running = Arc::new(OnceLock::new());
        let obeyed = Self(running.clone());
        let obey = move || {
            for signal in signals.forever() {
                match running.get() {
                    Some(handle) if signal == SIGUSR1 => log_status(handle),
                    Some(handle) => {
                        info!("stopping: no more visitors, {drain:?} for those that are there");
                        handle.stop(drain);
                    }
                    None if signal == SIGUSR1 => info!("status: starting"),
                    None => std::process::exit(0),
                }
            }
        };
        let thread = thread::Builder::new().name("signals".to_owned());
        thread.spawn(obey).map_err(Error::Thread)?;
        Ok(obeyed)
    }

    /// Other systems have no such signals: there a process just ends.
    #[cfg(not(unix))]
    fn take(_: Duration) -> Result<Self, Error> {
        Ok(Self(Arc::default()))
    }

    /// From now on TERM and INT stop what the handle belongs to, and give its visitors time; USR1 logs
    /// its status.
    pub fn obey_for(&self, handle: Handle) {
        let _ = self.0.set(handle);
    }
}

#[cfg(unix)]
fn log_status(handle: &Handle) {
    if let Some(status) = handle.status() {
        info!("status: {status}");
    }
}

fn read_key(path: &Path) -> Result<Key, Error> {
    let option = format!("--key-file {}", path.display());
    let bad = |why: String| Error::Key(option.clone(), why);
    // Large enough at once: a buffer that grows leaves its first bytes behind.
    let mut text = Zeroizing::new(Vec::with_capacity(KEY_FILE_SIZE as usize));
    let file = File::open(path).map_err(|error| bad(error.to_string()))?;
    let (metadata, mut start) = (file.metadata(), file.take(KEY_FILE_SIZE));
    start
        .read_to_end(&mut text)
        .map_err(|error| bad(error.to_string()))?;
    let key = String::from_utf8_lossy(&text).parse();
    let key = key.map_err(|why: &str| bad(why.to_owned()))?;
    if metadata.is_ok_and(|metadata| others_can_read(&metadata)) {
        warn!("{option}: other users of this host can read it (chmod o= mends that)");
    }
    Ok(key)
}

#[cfg(unix)]
fn others_can_read(metadata: &Metadata) -> bool {
    use std::os::unix::fs::MetadataExt;
    metadata.mode() & 0o004 != 0
}

#[cfg(not(unix))]
fn others_can_read(_metadata: &Metadata) -> bool {
    false
}

/// Lets no core of this process be written: the key would be in it.
fn forbid_core() {
    #[cfg(target_os = "linux")]
    {
        use rustix::process::{Resource, Rlimit, setrlimit};
        // Less than any core needs. Not 0, which Linux ignores where cores are piped into a program;
        // with 1 it writes none there either.
        let limit = Rlimit {
            current: Some(1),
            maximum: Some(1),
        };
        // To lower a limit is everyone's right. Below 1 it is low enough.
        let _ = setrlimit(Resource::Core, limit);
    }
}

/// Prints a text on stdout. That nobody reads it is no error: it may be piped into `head`. That it
/// did not get into a file is one: it may be a key.
fn print(text: &str) -> Result<(), Error> {
    match io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(Error::Print(error)),
        _ => Ok(()),
    }
}

/// The exit code of a program, after its error and what caused it, on one line of stderr.
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
