//! Every reason for which a connection between the two programs comes to nothing.

use std::fmt;
use std::io;
use std::io::ErrorKind::{ConnectionReset, InvalidData, UnexpectedEof};
use std::net::SocketAddr;

use crate::door::lobby::Lost;
use crate::os::net::timed_out;
use crate::wire::conn::Writer;
use crate::wire::control::send;
use crate::wire::line::{Line, PROTO, Reason};

/// Why a server refuses a control link or a tunnel.
#[derive(Debug)]
pub enum Refusal {
    /// Others came before it had proved itself.
    CrowdedOut,
    /// It took too long for this step.
    TooLate(Step),
    /// It has none of the server's keys.
    WrongKey,
    /// It has none of the server's keys, or is a tunnel of a session that has ended.
    WrongKeyOrTunnel,
    /// It has another key than the live sessions, or belongs to an earlier session.
    WrongKeyOrSession,
    /// Its handshake is one that has been here before.
    Recorded,
    /// The server has a key, and it came without one.
    NoKey,
    /// It has a key, and the server has none.
    HasKey,
    /// What belongs to the server's other port came to this one.
    OtherPort(Port),
    /// It does not begin as a client does, but as this other protocol, if that is known.
    NotClient(Option<&'static str>),
    /// It speaks this version of the protocol.
    Version(u32),
    /// It said what no client says.
    BadLine(String),
    /// It closed the connection.
    Closed,
    /// These clients are live, and there is no room for another one.
    Busy(Vec<SocketAddr>),
    /// The server is about to stop.
    Stopping,
    /// No client is connected that a tunnel could belong to.
    NoSession,
    /// The tunnel belongs to a session that is not live.
    OldSession,
    /// The connection failed, or the system refused something.
    Io(io::Error),
    /// It has shown itself to be a tunnel, at the one port for links and tunnels.
    Tunnel(Box<Refusal>),
}

/// What a connection has to do in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    Handshake,
    Hello,
    Session,
}

/// The server's two ports for its client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Port {
    Control,
    Tunnel,
}

impl Refusal {
    /// Every [word](Refusal::word).
    pub const WORDS: [&str; 16] = [
        "crowded-out",
        "too-late",
        "wrong-key",
        "recorded",
        "no-key",
        "has-key",
        "other-port",
        "not-client",
        "version",
        "bad-line",
        "closed",
        "busy",
        "stopping",
        "no-session",
        "old-session",
        "error",
    ];

    /// The same refusal of a tunnel at the one port for links and tunnels.
    pub fn of_tunnel(self) -> Self {
        Self::Tunnel(Box::new(self))
    }

    /// What a failed read means at this step.
    pub fn of(error: io::Error, step: Step) -> Self {
        match error.kind() {
            UnexpectedEof | ConnectionReset => Self::Closed,
            InvalidData => Self::BadLine(error.to_string()),
            _ if timed_out(&error) => Self::TooLate(step),
            _ => Self::Io(error),
        }
    }

    /// Returns the word under which it is counted.
    pub fn word(&self) -> &'static str {
        match self {
            Self::CrowdedOut => "crowded-out",
            Self::TooLate(_) => "too-late",
            Self::WrongKey | Self::WrongKeyOrTunnel | Self::WrongKeyOrSession => "wrong-key",
            Self::Recorded => "recorded",
            Self::NoKey => "no-key",
            Self::HasKey => "has-key",
            Self::OtherPort(_) => "other-port",
            Self::NotClient(_) => "not-client",
            Self::Version(_) => "version",
            Self::BadLine(_) => "bad-line",
            Self::Closed => "closed",
            Self::Busy(_) => "busy",
            Self::Stopping => "stopping",
            Self::NoSession => "no-session",
            Self::OldSession => "old-session",
            Self::Io(_) => "error",
            Self::Tunnel(why) => why.word(),
        }
    }

    /// What the client is told in the place of a session, where it helps a person at the other end.
    pub fn reason(&self) -> Option<Reason> {
        Some(match self {
            Self::WrongKey | Self::WrongKeyOrTunnel => Reason::WrongKey,
            Self::NoKey => Reason::WantsKey,
            Self::HasKey => Reason::NoKey,
            Self::OtherPort(Port::Control) => Reason::ControlPort,
            Self::OtherPort(Port::Tunnel) => Reason::TunnelPort,
            Self::Version(_) => Reason::Version,
            Self::Busy(_) => Reason::Busy,
            Self::Stopping => Reason::Draining,
            Self::Io(_) => Reason::Error,
            Self::Tunnel(why) => return why.reason(),
            _ => return None,
        })
    }

    /// The same refusal, after the client was told.
    pub fn tell(self, writer: &mut Writer) -> Self {
        if let Some(reason) = self.reason() {
            // A client that never said hello does not know the line, and ignores it.
            let _ = send(writer, &Line::Bye { reason });
        }
        self
    }
}

impl From<Lost> for Refusal {
    fn from(lost: Lost) -> Self {
        match lost {
            Lost::CrowdedOut => Self::CrowdedOut,
            Lost::Stopping => Self::Stopping,
        }
    }
}

impl From<io::Error> for Refusal {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

/// Behind "refused … from …: ".
impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::CrowdedOut => f.write_str("others came before it had proved itself"),
            Self::TooLate(Step::Handshake) => {
                f.write_str("its handshake took too long: it may have no key")
            }
            Self::TooLate(Step::Hello) => f.write_str("its hello took too long"),
            Self::TooLate(Step::Session) => f.write_str("it did not name its session in time"),
            Self::WrongKey => f.write_str("wrong key"),
            Self::WrongKeyOrTunnel => f.write_str("wrong key, or a tunnel of an earlier session"),
            Self::WrongKeyOrSession => f.write_str("wrong key, or its session is not live"),
            Self::Recorded => f.write_str("its handshake was recorded: it has been here before"),
            Self::NoKey => f.write_str("it came without a key (--key-file)"),
            Self::HasKey => f.write_str("it has a key, and this server has none (--key-file)"),
            Self::OtherPort(Port::Control) => f.write_str(
                "it is a client's tunnel, and this is the control port (--tunnel-port of tpclient)",
            ),
            Self::OtherPort(Port::Tunnel) => f.write_str(
                "it is a client's control link, and this is the tunnel port (--control-port of \
                 tpclient)",
            ),
            Self::NotClient(Some(protocol)) => write!(f, "it speaks {protocol}: no tpclient"),
            Self::NotClient(None) => f.write_str("it does not begin as tpclient does"),
            Self::Version(version) => write!(
                f,
                "it speaks tp/{version}, and this server tp/{PROTO}: let both programs be of one \
                 version"
            ),
            Self::BadLine(what) => write!(f, "it sent {what}"),
            Self::Closed => f.write_str("it closed the connection"),
            Self::Busy(clients) => match &clients[..] {
                [client] => write!(f, "client {client} is connected (--clients)"),
                clients => write!(f, "{} clients are connected (--clients)", clients.len()),
            },
            Self::Stopping => f.write_str("the server stops"),
            Self::NoSession => f.write_str("no client is connected"),
            Self::OldSession => f.write_str("its session is not live"),
            Self::Io(error) => error.fmt(f),
            Self::Tunnel(why) => why.fmt(f),
        }
    }
}

/// Why a client has no session with a server, or no tunnel to it.
#[derive(Debug)]
pub enum NoSession {
    /// The server's control port could not be dialled.
    Unreachable(io::Error),
    /// The server said so.
    Bye(Reason),
    /// The server closed the connection without a word.
    Closed,
    /// The server speaks the original's protocol, and that was not asked for.
    Original,
    /// The server speaks another version of the protocol.
    Version(u32),
    /// What is there does not begin as a server does, but as this other protocol, if that is known.
    NotServer(Option<&'static str>),
    /// It said what no server says.
    BadLine(String),
    /// It said nothing in time.
    TooLate,
    /// Its half of the handshake does not fit.
    BadHandshake,
    /// The tunnel port that was asked for is the server's port for visitors.
    TunnelPortIsPublic(u16),
    /// The connection failed, or the system refused something.
    Io(io::Error),
}

impl From<io::Error> for NoSession {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            UnexpectedEof | ConnectionReset => Self::Closed,
            InvalidData => Self::BadLine(error.to_string()),
            _ if timed_out(&error) => Self::TooLate,
            _ => Self::Io(error),
        }
    }
}

/// Behind "no session with the server at …: ".
impl fmt::Display for NoSession {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const CHECK: &str = "is this tpserver's control port (--control-port)?";
        match self {
            Self::Bye(reason) => f.write_str(match reason {
                Reason::Busy => {
                    "it has as many clients as it takes (--clients of tpserver); all before that is right"
                }
                Reason::Draining => "it is about to stop",
                Reason::NoKey => "it has no key, and this client has one (--key-file of tpserver)",
                Reason::WantsKey => "it wants a key (--key-file)",
                Reason::WrongKey => "wrong key (--key-file): the server has another one",
                Reason::ControlPort => {
                    "this is its control port, not its tunnel port \
                                        (--tunnel-port)"
                }
                Reason::TunnelPort => {
                    "this is its tunnel port, not its control port \
                                       (--control-port)"
                }
                Reason::PublicPort => {
                    "this is its port for visitors (--control-port, \
                                       --tunnel-port)"
                }
                Reason::Late => {
                    "it had taken this client for an original one, as its hello came \
                                 late"
                }
                Reason::Version => {
                    "it speaks another version of the protocol: let both programs be of one version"
                }
                Reason::Error => "it could not begin a session: see its log",
                Reason::Other(word) => {
                    return write!(f, "it said bye, {}", word.escape_debug());
                }
            }),
            Self::Closed => write!(f, "it closed the connection without a word: {CHECK}"),
            Self::Original => f.write_str(
                "it is a server of the original program, which is spoken to with --original only, \
                 and without a key",
            ),
            Self::Version(version) => write!(
                f,
                "it speaks tp/{version}, and this client tp/{PROTO}: let both programs be of one \
                 version"
            ),
            Self::NotServer(Some(protocol)) => write!(f, "it speaks {protocol}: {CHECK}"),
            Self::NotServer(None) => write!(f, "its first line is not a server's hello: {CHECK}"),
            Self::BadLine(what) => write!(f, "it sent {what}: {CHECK}"),
            Self::TooLate => write!(
                f,
                "it said nothing in time, as a port for visitors does: {CHECK}"
            ),
            Self::BadHandshake => write!(f, "its half of the handshake is not valid: {CHECK}"),
            Self::TunnelPortIsPublic(port) => write!(
                f,
                "--tunnel-port {port} is its port for visitors: leave the option out, or take the \
                 port of tpserver's --tunnel"
            ),
            Self::Unreachable(error) | Self::Io(error) => error.fmt(f),
        }
    }
}
