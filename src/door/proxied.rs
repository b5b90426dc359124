//! What a visitor says first who comes through a proxy: the proxy's header, on the server.

use std::fmt;
use std::io::{self, ErrorKind, Read};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use crate::door::lobby::Lost;
use crate::os::net::timed_out;
use crate::wire::proxy_header::{Addresses, BadHeader, MAX_V2, Parsed, parse};

/// A proxy says its header as soon as it is connected. This is time for a few lost segments.
const HEADER_TIMEOUT: Duration = Duration::from_secs(5);

/// A proxy that speaks for itself most often looks whether the server is well, and leaves at once. One
/// that has not said or done anything after this long is a visitor, and may wait for a service that speaks
/// first.
const CHECK_TIMEOUT: Duration = Duration::from_millis(250);

/// Why a visitor's connection came to nothing before its addresses were known.
#[derive(Debug)]
pub enum NoHeader {
    /// It has ended without a word for the service, as a balancer's look at a server's health does.
    Left,
    /// Others came before its header did.
    CrowdedOut,
    /// The server stops before its header has come.
    Stopping,
    /// It took too long.
    TooLate,
    /// It ended within its header.
    Cut,
    /// It is malformed.
    Bad(BadHeader),
    /// The connection failed, or the system refused something.
    Io(io::Error),
}

impl NoHeader {
    /// Every [word](NoHeader::word) that is counted: who has left is not.
    pub const WORDS: [&str; 6] = [
        "crowded-out",
        "stopping",
        "too-late",
        "cut",
        "bad-header",
        "error",
    ];

    /// Returns the word under which it is counted.
    pub fn word(&self) -> &'static str {
        match self {
            Self::Left => "left",
            Self::CrowdedOut => "crowded-out",
            Self::Stopping => "stopping",
            Self::TooLate => "too-late",
            Self::Cut => "cut",
            Self::Bad(_) => "bad-header",
            Self::Io(_) => "error",
        }
    }
}

/// Reads the header of the proxy at `from`, and not a byte of the visitor's stream behind it. None: the
/// connection's own addresses are the right ones.
pub fn hear_addresses(socket: &TcpStream, from: SocketAddr) -> Result<Option<Addresses>, NoHeader> {
    let deadline = Instant::now() + HEADER_TIMEOUT;
    let (mut bytes, mut filled) = ([0; MAX_V2], 0);
    let addresses = loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let count = match peek_within(socket, &mut bytes[filled..], left)? {
            Some(0) if filled == 0 => return Err(NoHeader::Left),
            Some(0) => return Err(NoHeader::Cut),
            Some(count) => count,
            None => return Err(NoHeader::TooLate),
        };
        let parsed = parse(&bytes[..filled + count]).map_err(NoHeader::Bad)?;
        let end = match parsed {
            Parsed::Incomplete => filled + count,
            Parsed::Header { length, .. } => length,
        };
        // They have come already.
        { socket }.read_exact(&mut bytes[filled..end])?;
        filled = end;
        if let Parsed::Header { addresses, .. } = parsed {
            break addresses;
        }
    };
    // Version 1 of HAProxy's health check names the check's own address.
    let is_proxy = addresses.is_none_or(|it| it.source == from);
    if is_proxy && peek_within(socket, &mut [0], CHECK_TIMEOUT)? == Some(0) {
        return Err(NoHeader::Left);
    }
    socket.set_read_timeout(None)?;
    Ok(addresses)
}

/// Copies what has come and nobody has read yet, and waits for it if need be. Returns how many bytes that
/// is, 0 at the end, or None if nothing came in time. A reset is an end: nobody is cut off by it here.
fn peek_within(
    socket: &TcpStream,
    buffer: &mut [u8],
    time: Duration,
) -> Result<Option<usize>, NoHeader> {
    let deadline = Instant::now() + time;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(None);
        }
        socket.set_read_timeout(Some(left))?;
        match socket.peek(buffer) {
            Ok(count) => return Ok(Some(count)),
            Err(error) if error.kind() == ErrorKind::ConnectionReset => return Ok(Some(0)),
            Err(error) if timed_out(&error) || error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error.into()),
        }
    }
}

impl From<Lost> for NoHeader {
    fn from(lost: Lost) -> Self {
        match lost {
            Lost::CrowdedOut => Self::CrowdedOut,
            Lost::Stopping => Self::Stopping,
        }
    }
}

impl From<io::Error> for NoHeader {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

/// Behind "refused visitor through …: ".
impl fmt::Display for NoHeader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Left => f.write_str("it left"),
            Self::CrowdedOut => f.write_str("others came before its PROXY protocol header did"),
            Self::Stopping => f.write_str("the server stops"),
            Self::TooLate => write!(
                f,
                "no PROXY protocol header in {HEADER_TIMEOUT:?}: tell the proxy to send one"
            ),
            Self::Cut => f.write_str("it ended within its PROXY protocol header"),
            Self::Bad(why) => why.fmt(f),
            Self::Io(error) => error.fmt(f),
        }
    }
}
