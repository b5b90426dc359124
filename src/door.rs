//! The door: what a connection says before it is trusted, on both sides, and every reason for which
//! it is refused.

use std::fmt;
use std::io;
use std::io::ErrorKind::{ConnectionReset, InvalidData, UnexpectedEof};
use std::net::{SocketAddr, TcpStream};
use std::slice::from_ref;
use std::time::Instant;

use crate::conn::{Conn, Reader, Writer};
use crate::control::{Lines, send};
use crate::key::Key;
use crate::lobby::Place;
use crate::net::{self, timed_out};
use crate::openings::Openings;
use crate::protocol::{
    HANDSHAKE_TIMEOUT, HELLO_TIMEOUT, Line, MAX_POOL, PROTO, Reason, SILENCE, SessionId, Welcome,
};
use crate::secure::{Bond, NoHandshake, OPENING, Purpose};

/// Why a server refuses a control link or a tunnel.
#[derive(Debug)]
pub enum Refusal {
    /// Others came before it had proved itself.
    CrowdedOut,
    /// It took too long for this step.
    TooLate(Step),
    /// It has none of the server's keys.
    WrongKey,
    /// It has another key than the live session, or belongs to an earlier session.
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
    /// It said what no client says.
    BadLine(String),
    /// It closed the connection.
    Closed,
    /// Another client is live.
    Busy(SocketAddr),
    /// The server is about to stop.
    Stopping,
    /// No client is connected that a tunnel could belong to.
    NoSession,
    /// The tunnel belongs to another session than the live one.
    OldSession,
    /// The tunnel was closed before its visitor came.
    Dead,
    /// The connection failed, or the system refused something.
    Io(io::Error),
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
    /// What a failed read means at this step.
    fn of(error: io::Error, step: Step) -> Self {
        match error.kind() {
            UnexpectedEof | ConnectionReset => Self::Closed,
            InvalidData => Self::BadLine(error.to_string()),
            _ if timed_out(&error) => Self::TooLate(step),
            _ => Self::Io(error),
        }
    }

    /// What the client is told in the place of a session, where it helps a person at the other end.
    pub fn reason(&self) -> Option<Reason> {
        Some(match self {
            Self::WrongKey => Reason::WrongKey,
            Self::NoKey => Reason::WantsKey,
            Self::HasKey => Reason::NoKey,
            Self::OtherPort(Port::Control) => Reason::ControlPort,
            Self::OtherPort(Port::Tunnel) => Reason::TunnelPort,
            Self::Busy(_) => Reason::Busy,
            Self::Stopping => Reason::Draining,
            Self::Io(_) => Reason::Error,
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
            Self::WrongKeyOrSession => f.write_str("wrong key, or its session is not the live one"),
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
            Self::BadLine(what) => write!(f, "it sent {what}"),
            Self::Closed => f.write_str("it closed the connection"),
            Self::Busy(client) => write!(f, "client {client} is connected"),
            Self::Stopping => f.write_str("the server stops"),
            Self::NoSession => f.write_str("no client is connected"),
            Self::OldSession => f.write_str("its session is not the live one"),
            Self::Dead => f.write_str("it was closed before its visitor came"),
            Self::Io(error) => error.fmt(f),
        }
    }
}

/// A control link on the server that has said what it speaks, and with a key has proved itself.
pub struct Link {
    /// What the client says.
    pub lines: Lines<Reader>,
    /// What the server says.
    pub writer: Writer,
    /// How many idle tunnels the client wants; None for an original one.
    pub pool: Option<usize>,
    /// What its tunnels will be tied to. None without a key.
    pub bond: Option<Bond>,
}

/// What a server asks of whoever comes to its control and tunnel ports.
pub struct Door<'a> {
    /// The keys that a client may have. None: nothing is sealed.
    pub keys: &'a [Key],
    /// Takes a client that says nothing for an original one.
    pub original: bool,
    /// What the tunnels of the live session are tied to, if there is one with a key.
    pub bond: Option<Bond>,
    /// The handshakes that have been here before.
    pub openings: &'a Openings,
    /// The connection's place among those that have not proved themselves.
    pub place: &'a Place,
}

impl Door<'_> {
    /// What a control link begins with: the handshake, if there is a key, and hello.
    ///
    /// # Errors
    /// The client has been told, where it helps.
    pub fn admit_link(&self, mut conn: Conn) -> Result<Link, Refusal> {
        let start = Instant::now();
        conn.socket().set_write_timeout(Some(SILENCE))?;
        let bond = match self.keys.is_empty() {
            true => None,
            false => {
                let (own, tunnel) = (
                    Purpose::Control(self.keys),
                    self.bond.as_ref().map(Purpose::Tunnel),
                );
                Some(self.handshake(&mut conn, Port::Control, &own, tunnel.as_ref(), start)?)
            }
        };
        let socket = conn.socket().clone();
        let (mut lines, mut writer) = (Lines::new(conn.reader), conn.writer);
        let patience = match self.original {
            true => HELLO_TIMEOUT,
            false => HANDSHAKE_TIMEOUT,
        };
        let pool = match lines.next_line_by(start + patience) {
            Ok(Line::Hello {
                proto: PROTO..,
                pool,
                ..
            }) => {
                // From now on its silence means something.
                lines.limit_silence();
                Some(pool.min(MAX_POOL))
            }
            Err(error) if self.original && timed_out(&error) && lines.rest().is_empty() => {
                // An original client never writes, so its silence means nothing.
                net::end_when_unacknowledged(&socket, SILENCE)?;
                None
            }
            other => return Err(stranger(other, &lines, Port::Control).tell(&mut writer)),
        };
        Ok(Link {
            lines,
            writer,
            pool,
            bond,
        })
    }

    /// What a tunnel begins with: the handshake, if there is a key, and the line that names its
    /// session. The client says no more before it is told a visitor.
    ///
    /// # Errors
    /// The client has been told, where it helps.
    pub fn admit_tunnel(&self, mut conn: Conn) -> Result<(Conn, SessionId), Refusal> {
        let start = Instant::now();
        if !self.keys.is_empty() {
            // Where no tunnel is due, the handshake only tells who has come to the wrong port.
            let own = (self.bond.as_ref()).map_or(Purpose::Control(&[]), Purpose::Tunnel);
            let link = Purpose::Control(self.keys);
            self.handshake(&mut conn, Port::Tunnel, &own, Some(&link), start)?;
        }
        let (mut lines, mut writer) = (Lines::new(conn.reader), conn.writer);
        match lines.next_line_by(start + HANDSHAKE_TIMEOUT) {
            Ok(Line::Tunnel { session }) if lines.nothing_behind() => {
                let reader = lines.into_reader();
                Ok((Conn { reader, writer }, session))
            }
            other => Err(stranger(other, &lines, Port::Tunnel).tell(&mut writer)),
        }
    }

    /// The server's half of a handshake, in time.
    fn handshake(
        &self,
        conn: &mut Conn,
        port: Port,
        own: &Purpose,
        elsewhere: Option<&Purpose>,
        start: Instant,
    ) -> Result<Bond, Refusal> {
        conn.reader.set_deadline(Some(start + HANDSHAKE_TIMEOUT))?;
        let refusal = match conn.respond(own, elsewhere, self.openings, || self.place.extend()) {
            Ok(bond) => return Ok(bond),
            Err(NoHandshake::WrongKey) => match (port, &self.bond) {
                (Port::Control, _) => Refusal::WrongKey,
                (Port::Tunnel, Some(_)) => Refusal::WrongKeyOrSession,
                (Port::Tunnel, None) => Refusal::NoSession,
            },
            Err(NoHandshake::OtherPort) => Refusal::OtherPort(port),
            Err(NoHandshake::Recorded) => Refusal::Recorded,
            Err(NoHandshake::NotNoise(_)) => {
                let mut lines = Lines::new(&mut conn.reader);
                let line = lines.next_line();
                match (port, &line) {
                    (Port::Control, Ok(Line::Hello { .. }))
                    | (Port::Tunnel, Ok(Line::Tunnel { .. })) => Refusal::NoKey,
                    _ => stranger(line, &lines, port),
                }
            }
            Err(NoHandshake::Io(error)) => Refusal::of(error, Step::Handshake),
        };
        Err(refusal.tell(&mut conn.writer))
    }
}

/// What is wrong with a connection that did not begin as it should at this port.
fn stranger<R: io::Read>(line: io::Result<Line>, lines: &Lines<R>, port: Port) -> Refusal {
    match (line, port) {
        (Ok(Line::Tunnel { .. }), Port::Control) | (Ok(Line::Hello { .. }), Port::Tunnel) => {
            Refusal::OtherPort(port)
        }
        // No line begins like that, but a handshake does.
        (Err(_), _) if lines.rest().starts_with(&OPENING) => Refusal::HasKey,
        (Err(error), _) if lines.foreign().is_none() => Refusal::of(
            error,
            match port {
                Port::Control => Step::Hello,
                Port::Tunnel => Step::Session,
            },
        ),
        _ => Refusal::NotClient(lines.foreign()),
    }
}

/// True if what waits to be read from a visitor is how a client begins, who has come to the wrong
/// port then.
pub fn is_client(visitor: &TcpStream) -> bool {
    let mut began = [0; 15];
    let count = net::peek_now(visitor, &mut began);
    let began = &began[..count];
    [&OPENING[..], b"hello proto=", b"tunnel session="]
        .iter()
        .any(|opening| began.starts_with(opening))
}

/// Why a client has no session with a server, or no tunnel to it.
#[derive(Debug)]
pub enum NoSession {
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
                Reason::Busy => "it has another client, and takes one only",
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
            Self::TooLate => write!(f, "it said nothing in time: {CHECK}"),
            Self::BadHandshake => write!(f, "its half of the handshake is not valid: {CHECK}"),
            Self::TunnelPortIsPublic(port) => write!(
                f,
                "--tunnel-port {port} is its port for visitors: leave the option out, or take the \
                 port of tpserver's --tunnel"
            ),
            Self::Io(error) => error.fmt(f),
        }
    }
}

/// A control link on the client to a server that has answered.
pub struct Answered {
    /// What the server says.
    pub lines: Lines<Reader>,
    /// What the client says.
    pub writer: Writer,
    /// The server's first line, which may be a `new` of an original one.
    pub first: Line,
    /// What the server grants: how many idle tunnels, and the rest. None from an original one.
    pub welcome: Option<(usize, Welcome)>,
    /// What its tunnels will be tied to. None without a key.
    pub bond: Option<Bond>,
}

/// What a client begins a control link with: the handshake, if there is a key, and a line each way.
/// A server that speaks as the original one is taken only if that was asked for.
pub fn open_link(
    mut conn: Conn,
    key: Option<&Key>,
    pool: usize,
    original: bool,
) -> Result<Answered, NoSession> {
    conn.socket().set_write_timeout(Some(SILENCE))?;
    let start = Instant::now();
    let (bond, deadline) = match key {
        None => (None, start + SILENCE),
        Some(key) => {
            let deadline = start + HANDSHAKE_TIMEOUT;
            let bond = initiate(&mut conn, &Purpose::Control(from_ref(key)), deadline)?;
            (Some(bond), deadline)
        }
    };
    let (mut lines, mut writer) = (Lines::new(conn.reader), conn.writer);
    let hello = Line::Hello {
        proto: PROTO,
        pool,
        welcome: None,
    };
    send(&mut writer, &hello)?;
    let first = lines.next_line_by(deadline);
    let welcome = match first.as_ref().ok() {
        Some(Line::Hello {
            proto: PROTO,
            pool: granted,
            welcome: Some(welcome),
        }) => Some((pool.min(*granted), welcome.clone())),
        // The original has no key.
        Some(Line::Hi | Line::New { visitor: None }) if bond.is_none() => match original {
            true => None,
            false => return Err(NoSession::Original),
        },
        _ => return Err(no_server(first, &lines)),
    };
    lines.limit_silence();
    Ok(Answered {
        lines,
        writer,
        first: first?,
        welcome,
        bond,
    })
}

/// The client's half of a tunnel's handshake, in time.
pub fn seal_tunnel(conn: &mut Conn, bond: &Bond) -> Result<(), NoSession> {
    let deadline = Instant::now() + HANDSHAKE_TIMEOUT;
    initiate(conn, &Purpose::Tunnel(bond), deadline).map(drop)
}

/// The client's half of a handshake, in time.
fn initiate(conn: &mut Conn, purpose: &Purpose, deadline: Instant) -> Result<Bond, NoSession> {
    conn.reader.set_deadline(Some(deadline))?;
    let bond = match conn.initiate(purpose) {
        Ok(bond) => bond,
        Err(NoHandshake::NotNoise(_)) => {
            let mut lines = Lines::new(&mut conn.reader);
            let line = lines.next_line();
            return Err(no_server(line, &lines));
        }
        Err(NoHandshake::WrongKey | NoHandshake::OtherPort | NoHandshake::Recorded) => {
            return Err(NoSession::BadHandshake);
        }
        Err(NoHandshake::Io(error)) => return Err(error.into()),
    };
    conn.reader.set_deadline(None)?;
    Ok(bond)
}

/// What this line says instead of what was expected of a server.
pub fn no_server<R: io::Read>(line: io::Result<Line>, lines: &Lines<R>) -> NoSession {
    match line {
        Ok(Line::Bye { reason }) => NoSession::Bye(reason),
        Ok(Line::Hello { proto, .. }) if proto != PROTO => NoSession::Version(proto),
        Err(error) if lines.foreign().is_none() => error.into(),
        _ => NoSession::NotServer(lines.foreign()),
    }
}
