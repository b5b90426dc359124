//! What the two programs agree on when they connect, and how long that holds.

use std::fmt;
use std::io;
use std::io::ErrorKind::{InvalidData, UnexpectedEof};
use std::time::Duration;

use crossbeam_channel::Sender;

use crate::os::net::timed_out;
use crate::wire::line::{Line, Reason, SILENCE, SessionId};

pub mod of_client;
pub mod of_server;

/// So many lines may wait to be written to the other side. One that reads more slowly than visitors fail or
/// finish is not told of all of them.
const MOST_LINES: usize = 4096;

/// Hands a line that may be left out to the thread that writes, if the session has not ended. False if the
/// line is left out.
fn tell(to_write: Option<&Sender<Line>>, line: Line) -> bool {
    to_write.is_some_and(|it| it.len() < MOST_LINES && it.send(line).is_ok())
}

/// What the two sides of a session speak.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Proto {
    /// The other side is one of the original program, which never says hello. Its tunnels are raw
    /// bytes from the first one, and are dialled on demand.
    Original,
    /// `tp/2`.
    Tp2 {
        /// What tunnels name to show which session they belong to.
        id: SessionId,
        /// How many idle tunnels are kept ready.
        pool: usize,
        /// How long the other side lets a visit stand still once one end has finished. None if it does
        /// not tell.
        linger: Option<Duration>,
    },
}

impl Proto {
    /// How many idle tunnels are kept ready.
    pub fn pool(self) -> usize {
        match self {
            Self::Original => 0,
            Self::Tp2 { pool, .. } => pool,
        }
    }

    /// How long the other side lets a visit stand still once one end has finished. None if it does not
    /// tell.
    pub fn their_linger(self) -> Option<Duration> {
        match self {
            Self::Original => None,
            Self::Tp2 { linger, .. } => linger,
        }
    }

    /// What a tunnel of this session names; an original one names nothing.
    pub fn id(self) -> Option<SessionId> {
        match self {
            Self::Original => None,
            Self::Tp2 { id, .. } => Some(id),
        }
    }

    /// What both logs call the session: enough of its id to tell it from others.
    pub fn name(self) -> String {
        match self {
            Self::Original => "original".to_owned(),
            Self::Tp2 { id, .. } => id.short(),
        }
    }
}

impl fmt::Display for Proto {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Original => f.write_str("it does not speak tp/2, one dial a visitor"),
            Self::Tp2 { id, pool, .. } => write!(f, "session {}, pool {pool}", id.short()),
        }
    }
}

/// Why a session ended.
#[derive(Debug)]
pub enum Ended {
    /// The other side said so.
    Bye(Reason),
    /// A client that had been taken for an original one said hello after all.
    LateHello,
    /// The other side closed the connection.
    Closed,
    /// The next client came, and found that this one had closed its connection.
    HungUp,
    /// Nothing was heard from the other side for too long.
    Silent,
    /// The other side said what nobody says.
    BadLine(String),
    /// Nothing could be written to the other side.
    Writing(io::Error),
    /// There was no thread to write to it.
    NoThread(io::Error),
    /// The connection failed.
    Io(io::Error),
}

/// A failed read of a control link.
impl From<io::Error> for Ended {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            UnexpectedEof => Self::Closed,
            InvalidData => Self::BadLine(error.to_string()),
            _ if timed_out(&error) => Self::Silent,
            _ => Self::Io(error),
        }
    }
}

/// Behind "client … left: " or "lost the server at …: ".
impl fmt::Display for Ended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bye(reason) => write!(f, "it said bye, {}", reason.to_string().escape_debug()),
            Self::LateHello => f.write_str("its hello came late: it is no original one"),
            Self::Closed => f.write_str("it closed the connection"),
            Self::HungUp => f.write_str("it hung up"),
            Self::Silent => write!(f, "it was silent for {} s", SILENCE.as_secs()),
            Self::BadLine(what) => write!(f, "it sent {what}"),
            Self::Writing(error) => write!(f, "writing to it: {error}"),
            Self::NoThread(error) => write!(f, "there is no thread to write to it: {error}"),
            Self::Io(error) => error.fmt(f),
        }
    }
}
