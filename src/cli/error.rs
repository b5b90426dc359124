//! Why a program ends, in words that a person can act on.

use std::fmt;
use std::io;
use std::path::PathBuf;

use crate::key::KeyError;

/// Why a program ended, or did not start.
#[derive(Debug)]
#[non_exhaustive]
pub enum Error {
    /// The command line makes no sense; the text names the option.
    Usage(String),
    /// No key is where one was to be read. The text: an option with its file, or `TP_KEY`.
    Key(String, KeyError),
    /// A key file could not be read.
    KeyFile(PathBuf, io::Error),
    /// What was asked for could not be printed.
    Print(io::Error),
    /// The system refused the thread of the log or of the signals.
    Thread(io::Error),
    /// The system lets no signal be obeyed.
    Signals(io::Error),
    /// The tunnel itself did not start.
    Tunnel(crate::Error),
}

impl Error {
    /// The exit code of a program that ends because of this: 2 where the options are to blame, 1
    /// where the machine is.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Usage(_) | Self::Key(..) | Self::KeyFile(..) => 2,
            Self::Tunnel(error) if error.is_usage() => 2,
            Self::Print(_) | Self::Thread(_) | Self::Signals(_) | Self::Tunnel(_) => 1,
        }
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
            // The key is there, and something else beside it.
            Self::Key(place, why) => write!(f, "{place}: {why}"),
            Self::KeyFile(path, _) => write!(f, "--key-file: could not read {}", path.display()),
            Self::Print(_) => write!(f, "could not write to stdout"),
            Self::Thread(_) => write!(f, "could not start a thread"),
            Self::Signals(_) => write!(f, "could not prepare for signals"),
            Self::Tunnel(error) => error.fmt(f),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Usage(_) | Self::Key(..) => None,
            Self::KeyFile(_, error)
            | Self::Print(error)
            | Self::Thread(error)
            | Self::Signals(error) => Some(error),
            Self::Tunnel(error) => error.source(),
        }
    }
}
