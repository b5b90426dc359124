//! The lines of the protocol: parse and print. Pure functions over bytes, and the limits that both
//! sides keep to.
//!
//! A line is ASCII, ends with LF, and is a word followed by `key=value` arguments, one space
//! before each. Words and keys that a side does not know are ignored, so that either side can
//! learn new ones first. CR is a byte like any other: `hi` with CRLF is an unknown word.

use std::fmt;
use std::net::SocketAddr;
use std::str::FromStr;
use std::time::Duration;

/// The version of the protocol that this crate speaks.
pub const PROTO: u32 = 1;

/// The longest line in bytes, its LF included. Every line of the protocol needs less than half.
pub const MAX_LINE: usize = 256;

/// The most idle tunnels that a server grants a client: each costs both sides a descriptor.
pub const MAX_POOL: usize = 64;

/// Both sides write `hi` this often; the original's pace.
pub const HEARTBEAT: Duration = Duration::from_secs(2);

/// A link without a line for this long is dead: three heartbeats in a row are missing.
pub const SILENCE: Duration = Duration::from_secs(6);

/// A client that has not said hello after this long is an original one, which never writes.
pub const HELLO_TIMEOUT: Duration = Duration::from_secs(1);

/// The time that a new tunnel has to name its session, and with a key the time in all for the
/// handshake and the first line behind it.
pub const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);

/// The reason of a `bye` to a client that came while another is live.
pub const BUSY: &str = "busy";

/// The reason of a `bye` from a side that is about to stop.
pub const DRAINING: &str = "draining";

/// The reason of a `bye` to a client that has a key, from a server that has none.
pub const NO_KEY: &str = "no-key";

/// Asks the client for one more tunnel.
pub const NEW: Line = Line::New { visitor: None };

/// Names the time from a control link's registration to its end: 128 random bits, 32 hex digits on
/// the wire. A tunnel that cannot name the live session is never handed a visitor.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct SessionId(u128);

impl SessionId {
    /// A fresh id from the system's random source.
    pub fn random() -> Result<Self, getrandom::Error> {
        let mut bytes = [0; 16];
        getrandom::fill(&mut bytes)?;
        Ok(Self(u128::from_be_bytes(bytes)))
    }

    /// Enough of the id to tell sessions apart in a log, and too little to open a tunnel with.
    pub fn short(&self) -> String {
        format!("{:08x}", self.0 >> 96)
    }
}

impl fmt::Display for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

/// Short, so that no log of a `Debug` output gives the session away.
impl fmt::Debug for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SessionId({}…)", self.short())
    }
}

impl FromStr for SessionId {
    type Err = LineError;

    fn from_str(text: &str) -> Result<Self, LineError> {
        // from_str_radix alone would let a sign and shorter numbers pass.
        if text.len() != 32 || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(LineError::Argument("session"));
        }
        u128::from_str_radix(text, 16)
            .map(Self)
            .map_err(|_| LineError::Argument("session"))
    }
}

/// A line that a side understands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Line {
    /// `hello proto=1 pool=8` from the client, `hello proto=1 session=… pool=8` from the server.
    Hello {
        /// The highest version of the protocol that the side speaks.
        proto: u32,
        /// The idle tunnels that the client asks for, or that the server grants.
        pool: usize,
        /// Only from the server: the id of the session that begins.
        session: Option<SessionId>,
    },
    /// `hi`: the heartbeat.
    Hi,
    /// `new` on the control link: dial one more tunnel. `new visitor=ip:port` on an idle tunnel:
    /// this visitor's bytes follow.
    New {
        /// Only on a tunnel: where the visitor comes from.
        visitor: Option<SocketAddr>,
    },
    /// `bye reason=…`: the side ends the link on purpose.
    Bye {
        /// Why, in one word.
        reason: String,
    },
    /// `tunnel session=…`: the first line of a tunnel.
    Tunnel {
        /// The session that the tunnel belongs to.
        session: SessionId,
    },
    /// A word that this version does not know, and ignores.
    Unknown,
}

impl Line {
    /// Reads one line, given without its LF.
    pub fn parse(line: &[u8]) -> Result<Self, LineError> {
        if line.len() >= MAX_LINE {
            return Err(LineError::Overlong);
        }
        if line.contains(&0) {
            return Err(LineError::Nul);
        }
        let text = str::from_utf8(line).map_err(|_| LineError::NotAscii)?;
        if !text.is_ascii() {
            return Err(LineError::NotAscii);
        }
        let (word, arguments) = text.split_once(' ').unwrap_or((text, ""));
        Ok(match word {
            "hello" => Line::Hello {
                proto: argument(arguments, "proto")?.ok_or(LineError::Argument("proto"))?,
                pool: argument(arguments, "pool")?.unwrap_or(0),
                session: argument(arguments, "session")?,
            },
            "hi" => Line::Hi,
            "new" => Line::New {
                visitor: argument(arguments, "visitor")?,
            },
            "bye" => Line::Bye {
                reason: argument(arguments, "reason")?.unwrap_or_default(),
            },
            "tunnel" => Line::Tunnel {
                session: argument(arguments, "session")?.ok_or(LineError::Argument("session"))?,
            },
            _ => Line::Unknown,
        })
    }

    /// The `bye` with this reason.
    pub fn bye(reason: &str) -> Self {
        Line::Bye {
            reason: reason.to_owned(),
        }
    }
}

/// The value of `key` among `key=value` arguments; the first one counts.
fn argument<T: FromStr>(arguments: &str, key: &'static str) -> Result<Option<T>, LineError> {
    arguments
        .split(' ')
        .filter_map(|argument| argument.split_once('='))
        .find(|(name, _)| *name == key)
        .map(|(_, value)| value.parse().map_err(|_| LineError::Argument(key)))
        .transpose()
}

/// The line as it goes onto the wire, its LF included.
impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Line::Hello {
                proto,
                pool,
                session: None,
            } => writeln!(f, "hello proto={proto} pool={pool}"),
            Line::Hello {
                proto,
                pool,
                session: Some(session),
            } => writeln!(f, "hello proto={proto} session={session} pool={pool}"),
            Line::Hi => writeln!(f, "hi"),
            Line::New { visitor: None } => writeln!(f, "new"),
            Line::New {
                visitor: Some(visitor),
            } => writeln!(f, "new visitor={visitor}"),
            Line::Bye { reason } => writeln!(f, "bye reason={reason}"),
            Line::Tunnel { session } => writeln!(f, "tunnel session={session}"),
            Line::Unknown => Ok(()),
        }
    }
}

/// What is wrong with a line; it ends the link that it came on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LineError {
    /// More than [`MAX_LINE`] bytes without an LF.
    Overlong,
    /// A NUL byte.
    Nul,
    /// A byte above 127.
    NotAscii,
    /// A known key whose value makes no sense, or a key that its word must have and has not.
    Argument(&'static str),
}

impl fmt::Display for LineError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            LineError::Overlong => write!(f, "a line of more than {MAX_LINE} bytes"),
            LineError::Nul => write!(f, "a line with a NUL byte"),
            LineError::NotAscii => write!(f, "a line that is not ASCII"),
            LineError::Argument(key) => write!(f, "a line whose {key} is missing or not valid"),
        }
    }
}

impl std::error::Error for LineError {}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "00112233445566778899aabbccddeeff";

    fn session() -> SessionId {
        ID.parse().unwrap()
    }

    #[test]
    fn every_line_has_its_exact_bytes_and_is_read_back() {
        let visitor = "[2001:db8::1]:50000".parse().unwrap();
        let lines = [
            (
                Line::Hello {
                    proto: 1,
                    pool: 8,
                    session: None,
                },
                "hello proto=1 pool=8\n".to_owned(),
            ),
            (
                Line::Hello {
                    proto: 1,
                    pool: 8,
                    session: Some(session()),
                },
                format!("hello proto=1 session={ID} pool=8\n"),
            ),
            (Line::Hi, "hi\n".to_owned()),
            (Line::New { visitor: None }, "new\n".to_owned()),
            (
                Line::New {
                    visitor: Some(visitor),
                },
                "new visitor=[2001:db8::1]:50000\n".to_owned(),
            ),
            (Line::bye(BUSY), "bye reason=busy\n".to_owned()),
            (
                Line::Tunnel { session: session() },
                format!("tunnel session={ID}\n"),
            ),
        ];
        for (line, bytes) in lines {
            assert_eq!(line.to_string(), bytes);
            assert_eq!(
                Line::parse(bytes.trim_end_matches('\n').as_bytes()),
                Ok(line)
            );
        }
    }

    #[test]
    fn unknown_words_and_keys_are_ignored() {
        for unknown in ["", " ", "hey", "HI", "hi\r", "new\r", "news", " hi"] {
            assert_eq!(
                Line::parse(unknown.as_bytes()),
                Ok(Line::Unknown),
                "{unknown:?}"
            );
        }
        assert_eq!(Line::parse(b"hi colour=blue"), Ok(Line::Hi));
        assert_eq!(
            Line::parse(b"new colour=blue =x y visitor=127.0.0.1:9 visitor=127.0.0.1:10"),
            Ok(Line::New {
                visitor: Some("127.0.0.1:9".parse().unwrap())
            })
        );
        assert_eq!(
            Line::parse(b"bye"),
            Ok(Line::Bye {
                reason: String::new()
            })
        );
    }

    #[test]
    fn bad_bytes_are_refused() {
        assert_eq!(Line::parse(b"hi\0"), Err(LineError::Nul));
        assert_eq!(Line::parse("h\u{ef}".as_bytes()), Err(LineError::NotAscii));
        assert_eq!(Line::parse(b"hi \xff"), Err(LineError::NotAscii));
        assert_eq!(Line::parse(&[b'a'; MAX_LINE]), Err(LineError::Overlong));
        assert_eq!(Line::parse(&[b'a'; MAX_LINE - 1]), Ok(Line::Unknown));
    }

    #[test]
    fn known_keys_need_valid_values() {
        for (line, key) in [
            ("hello", "proto"),
            ("hello pool=8", "proto"),
            ("hello proto=one", "proto"),
            ("hello proto=1 pool=-1", "pool"),
            ("hello proto=1 session=ab", "session"),
            ("new visitor=here", "visitor"),
            ("tunnel", "session"),
            ("tunnel session=", "session"),
            ("tunnel session=+0112233445566778899aabbccddeeff", "session"),
            (
                "tunnel session=00112233445566778899aabbccddeeff00",
                "session",
            ),
        ] {
            assert_eq!(
                Line::parse(line.as_bytes()),
                Err(LineError::Argument(key)),
                "{line}"
            );
        }
    }

    #[test]
    fn session_ids_differ_and_do_not_leak() {
        let (one, other) = (SessionId::random().unwrap(), SessionId::random().unwrap());
        assert_ne!(one, other);
        assert_eq!(one.to_string().parse(), Ok(one));
        assert!(!format!("{one:?}").contains(&one.to_string()));
    }

    /// A seeded walk over random and nearly right lines: nothing panics, and what is understood
    /// survives being printed and read again.
    #[test]
    fn random_lines_never_panic() {
        let words = b"hello hi new bye tunnel proto=1 pool=8 session= visitor= reason=x \0\xff\r";
        let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
        let mut random = move |below: usize| {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            (seed % below as u64) as usize
        };
        for _ in 0..100_000 {
            let mut line = Vec::new();
            for _ in 0..random(4) {
                let from = random(words.len());
                line.extend_from_slice(&words[from..from + random(words.len() - from)]);
                line.push(random(256) as u8);
            }
            line.retain(|byte| *byte != b'\n');
            if let Ok(parsed) = Line::parse(&line)
                && parsed != Line::Unknown
            {
                let printed = parsed.to_string();
                let line = printed.strip_suffix('\n').unwrap();
                assert_eq!(Line::parse(line.as_bytes()), Ok(parsed));
            }
        }
    }
}
