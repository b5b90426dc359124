//! What both programs do around the library: log, print, and end with an exit code.

use std::env;
use std::error::Error as _;
use std::ffi::OsStr;
use std::fs::{File, Metadata};
use std::io::{self, Read, Write};
use std::path::{self, Path};
use std::process::ExitCode;
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
use crate::options::{self, Command, Common};
use crate::stop::Handle;

/// The key itself, where a file does not suit.
const KEY_VARIABLE: &str = "TP_KEY";

/// Where systemd puts a service's credentials. It lets nobody but the service read them, also where
/// their modes look as if the group could.
const CREDENTIALS_VARIABLE: &str = "CREDENTIALS_DIRECTORY";

/// What is read of a key file at most, in bytes: a key has 44, and `/dev/zero` no end.
const KEY_FILE_SIZE: u64 = 1024;

/// Does what a command asks for, if it is no more than to print something; otherwise gets ready to
/// run, and returns the options, the keys, and the signals that the program takes from now on.
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

/// Starts the log, takes as many descriptors as the user may have, and reads the keys.
fn prepare(common: &Common) -> Result<Vec<Key>, Error> {
    raise_descriptors();
    logger::start(common.program, common.level)?;
    let in_environment = env::var_os(KEY_VARIABLE);
    if in_environment.is_some() || !common.key_files.is_empty() {
        hide_memory();
    }
    let (keys, remarks) = read_keys(common, in_environment.as_deref())?;
    let version = env!("CARGO_PKG_VERSION");
    match (common.program, keys.is_empty()) {
        (options::SERVER, true) => info!("version {version}, a client needs no key"),
        (options::SERVER, false) => info!("version {version}, a client needs the key"),
        _ => info!("version {version}"),
    }
    for remark in remarks {
        warn!("{remark}");
    }
    Ok(keys)
}

/// The keys in the files, or else the one in `TP_KEY`; and what is to be warned about.
fn read_keys(
    common: &Common,
    in_environment: Option<&OsStr>,
) -> Result<(Vec<Key>, Vec<String>), Error> {
    let mut remarks = Vec::new();
    let in_environment = in_environment.map(|text| Key::read(text.as_encoded_bytes()));
    let mut keys = Vec::new();
    for file in &common.key_files {
        keys.push(read_key(file, &mut remarks)?);
    }
    match in_environment {
        None => {}
        Some(key) if keys.is_empty() => {
            keys.push(key.map_err(|why| Error::Key(KEY_VARIABLE.to_owned(), why))?);
        }
        Some(Ok(key)) if keys.contains(&key) => {}
        Some(_) => remarks.push(format!(
            "{KEY_VARIABLE} is set too, and not used: --key-file comes first"
        )),
    }
    Ok((keys, remarks))
}

/// The signals that the program obeys.
pub struct Signals(Arc<OnceLock<Handle>>);

impl Signals {
    /// From now on TERM, INT and HUP end the program, and a second one as if nobody obeyed it. HUP
    /// stays without effect where it was so before, such as under `nohup`.
    #[cfg(unix)]
    fn take(drain: Duration) -> Result<Self, Error> {
        use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR1};

        let mut all = vec![SIGTERM, SIGINT, SIGUSR1];
        if !hangup_is_ignored() {
            all.push(SIGHUP);
        }
        let mut signals = signal_hook::iterator::Signals::new(all).map_err(Error::Signals)?;
        let running = Arc::new(OnceLock::new());
        let obeyed = Self(running.clone());
        let obey = move || {
            let mut stopping = false;
            for signal in signals.forever() {
                match running.get() {
                    Some(handle) if signal == SIGUSR1 => log_status(handle),
                    None if signal == SIGUSR1 => info!("status: starting"),
                    Some(handle) if !stopping => {
                        stopping = true;
                        stop(handle, drain);
                    }
                    Some(_) => end_now(signal),
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

    /// From now on TERM, INT and HUP stop what the handle belongs to, and give its visitors time; USR1
    /// logs its status.
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

/// Stops it on a thread of its own, so that a second signal is obeyed whatever becomes of the first.
#[cfg(unix)]
fn stop(handle: &Handle, drain: Duration) {
    info!("stopping: no more visitors, {drain:?} for those that are there; again to end now");
    let (started, owned) = (
        thread::Builder::new().name("stop".to_owned()),
        handle.clone(),
    );
    if started.spawn(move || owned.stop(drain)).is_err() {
        handle.stop(drain);
    }
}

/// Ends the program as the signal would if nobody obeyed it.
#[cfg(unix)]
fn end_now(signal: i32) {
    info!("stopping now");
    logger::end(None);
    let _ = signal_hook::low_level::emulate_default_handler(signal);
}

/// True if whoever started this program wants it to outlive its terminal. False where that cannot be
/// seen.
#[cfg(unix)]
fn hangup_is_ignored() -> bool {
    // HUP is signal 1, and the lowest bit of the mask.
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    mask.is_some_and(|mask| mask & 1 == 1)
}

/// The key in a file. What is to be warned about comes among the remarks.
fn read_key(path: &Path, remarks: &mut Vec<String>) -> Result<Key, Error> {
    let option = format!("--key-file {}", path.display());
    // A relative path is relative to something that whoever reads the message may not think of.
    let absolute = path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let unreadable = |error| Error::KeyFile(absolute.clone(), error);
    let file = File::open(path).map_err(unreadable)?;
    let (metadata, mut start) = (file.metadata(), file.take(KEY_FILE_SIZE));
    // Large enough at once: a buffer that grows leaves its first bytes behind.
    let mut text = Zeroizing::new(Vec::with_capacity(KEY_FILE_SIZE as usize));
    start.read_to_end(&mut text).map_err(unreadable)?;
    let key = Key::read(&text).map_err(|why| Error::Key(option.clone(), why))?;
    let credentials = env::var_os(CREDENTIALS_VARIABLE);
    let is_credential = credentials.is_some_and(|folder| absolute.starts_with(folder));
    if !is_credential && metadata.is_ok_and(|metadata| others_can_read(&metadata)) {
        remarks.push(format!(
            "{option}: other users of this host can read it (chmod go= mends that)"
        ));
    }
    Ok(key)
}

/// Its group counts as well.
#[cfg(unix)]
fn others_can_read(metadata: &Metadata) -> bool {
    use std::os::unix::fs::MetadataExt;
    metadata.mode() & 0o044 != 0
}

#[cfg(not(unix))]
fn others_can_read(_metadata: &Metadata) -> bool {
    false
}

/// Lets nobody but root look into this process, and no core of it be written: the key would be in it.
fn hide_memory() {
    #[cfg(target_os = "linux")]
    {
        use rustix::process::{DumpableBehavior, set_dumpable_behavior};
        // Everyone may do that, and Linux refuses it to nobody.
        let _ = set_dumpable_behavior(DumpableBehavior::NotDumpable);
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
