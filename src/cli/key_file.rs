//! The keys that a program is given, in files or in the environment.

use std::env;
use std::fs::{File, Metadata};
use std::io::Read;
use std::path::{self, Path, PathBuf};

use zeroize::Zeroizing;

use crate::cli::error::Error;
use crate::key::Key;

/// The variable that holds the key itself, where a file does not suit.
const KEY_VARIABLE: &str = "TP_KEY";

/// The variable that names the folder where systemd puts a service's credentials. Nobody but the
/// service can read them, even if their modes look as if the group could.
const CREDENTIALS_VARIABLE: &str = "CREDENTIALS_DIRECTORY";

/// The most bytes that are read of a key file: a key has 44, and `/dev/zero` has no end.
const KEY_FILE_SIZE: u64 = 1024;

/// Returns the keys in the files, or else the one in `TP_KEY`, and what is to be warned about.
pub fn read_all(files: &[PathBuf]) -> Result<(Vec<Key>, Vec<String>), Error> {
    let in_environment = env::var_os(KEY_VARIABLE);
    if in_environment.is_some() || !files.is_empty() {
        hide_memory();
    }
    let mut remarks = Vec::new();
    let in_environment = in_environment.map(|text| Key::read(text.as_encoded_bytes()));
    let mut keys = Vec::new();
    for file in files {
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

/// Returns the key in a file, and adds to the remarks what is to be warned about.
fn read_key(path: &Path, remarks: &mut Vec<String>) -> Result<Key, Error> {
    let option = format!("--key-file {}", path.display());
    // A message shows the absolute path, as its reader may not know the current folder.
    let absolute = path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let unreadable = |error| Error::KeyFile(absolute.clone(), error);
    let file = File::open(path).map_err(unreadable)?;
    let (metadata, mut start) = (file.metadata(), file.take(KEY_FILE_SIZE));
    // A buffer that grows would leave a copy of its first bytes behind.
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

/// Returns true if the file's group or everyone can read it.
#[cfg(unix)]
fn others_can_read(metadata: &Metadata) -> bool {
    use std::os::unix::fs::MetadataExt;
    metadata.mode() & 0o044 != 0
}

#[cfg(not(unix))]
fn others_can_read(_metadata: &Metadata) -> bool {
    false
}

/// Lets nobody but root look into this process, and no core of it be written, as both would show the
/// key.
fn hide_memory() {
    #[cfg(target_os = "linux")]
    {
        use rustix::process::{DumpableBehavior, set_dumpable_behavior};
        // Linux refuses this to nobody.
        let _ = set_dumpable_behavior(DumpableBehavior::NotDumpable);
    }
}
