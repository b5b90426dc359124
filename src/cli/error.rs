//! The errors that end a program, in words that a person can act on.

use std::fmt;
use std::io;
use std::path::PathBuf;

use crate::cli::ready::NotReady;
use crate::key::KeyError;

/// Why a program ended, or did not start.
#[derive(Debug)]
#[non_exhaustive]
pub enum Error {
    /// The command line makes no sense; the text names the option.
    Usage(String),
    /// The text of a file or of `TP_KEY` is not a key. The string names the option and its file, or
    /// the variable.
    Key(String, KeyError),
    /// A key file could not be read.
    KeyFile(PathBuf, io::Error),
    /// The file that `--config` names could not be read.
    ConfigFile(PathBuf, io::Error),
    /// Some step of `--check` has failed, and said so.
    CheckFailed,
    /// A text could not be written to stdout.
    Print(io::Error),
    /// The system refused the thread that writes the log, or the one that waits for signals.
    Thread(io::Error),
    /// The system did not let the program handle signals.
    Signals(io::Error),
    /// The program that was asked does not serve visitors, or does not answer.
    NotReady(NotReady),
    /// The tunnel itself did not start.
    Tunnel(crate::Error),
    /// After a reload nothing takes visitors any more: the tunnel did not start, not even with the
    /// options from before.
    NothingRuns(crate::Error),
}

impl Error {
    /// Returns the exit code of a program that this error ends: 2 if the options are to blame, 1 if
    /// the machine is.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Usage(_) | Self::Key(..) | Self::KeyFile(..) | Self::ConfigFile(..) => 2,
            Self::Tunnel(error) if error.is_usage() => 2,
            _ => 1,
        }
    }
}

impl From<NotReady> for Error {
    fn from(why: NotReady) -> Self {
        Self::NotReady(why)
    }
}

impl From<crate::Error> for Error {
    fn from(error: crate::Error) -> Self {
        Self::Tunnel(error)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Usage(what) => write!(f, "{what}"),
            Self::Key(
                place,
                why @ (KeyError::Missing | KeyError::Malformed | KeyError::Short | KeyError::Long),
            ) => write!(
                f,
                "{place}: {why}. Make a key with: (umask 077; tpserver --generate-key > tp.key), \
                 and give it to both programs"
            ),
            // Here a key is there, with something else beside it.
            Self::Key(place, why) => write!(f, "{place}: {why}"),
            Self::KeyFile(path, _) => write!(f, "--key-file: could not read {}", path.display()),
            Self::ConfigFile(path, _) => {
                write!(f, "--config: could not read {}", path.display())
            }
            Self::CheckFailed => write!(f, "--check: a step has failed, see above"),
            Self::Print(_) => write!(f, "could not write to stdout"),
            Self::Thread(_) => write!(f, "could not start a thread"),
            Self::Signals(_) => write!(f, "could not prepare for signals"),
            Self::NotReady(why) => why.fmt(f),
            Self::Tunnel(error) => error.fmt(f),
            Self::NothingRuns(_) => write!(f, "a reload has failed"),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Usage(_) | Self::Key(..) | Self::CheckFailed | Self::NotReady(_) => None,
            Self::KeyFile(_, error)
            | Self::ConfigFile(_, error)
            | Self::Print(error)
            | Self::Thread(error)
            | Self::Signals(error) => Some(error),
            Self::Tunnel(error) => error.source(),
            Self::NothingRuns(error) => Some(error),
        }
    }
}
