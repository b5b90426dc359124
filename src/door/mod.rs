//! The door: what a connection says before it is trusted, on both sides.

use std::io;
use std::net::TcpStream;
use std::slice::from_ref;
use std::sync::Arc;
use std::time::Instant;

use crate::key::Key;
use crate::os::net::{self, timed_out};
use crate::session::Proto;
use crate::wire::conn::{Conn, Reader, Writer};
use crate::wire::control::{Lines, send};
use crate::wire::frame::begins_with_line;
use crate::wire::handshake::{Bond, NoHandshake, OPENING, Purpose};
use crate::wire::line::{
    HANDSHAKE_TIMEOUT, HELLO_TIMEOUT, Line, MAX_POOL, PROTO, SILENCE, SessionId, Welcome,
};

mod lobby;
pub mod openings;
mod refusal;

pub use lobby::{Lobby, Place};
pub use refusal::{NoSession, Port, Refusal, Step};

use openings::Openings;

/// A control link on the server that has said what it speaks, and with a key has proved itself.
pub struct Link {
    /// The socket below.
    pub socket: Arc<TcpStream>,
    /// What the client says.
    pub lines: Lines<Reader>,
    /// What the server says.
    pub writer: Writer,
    /// What the session that begins with it speaks.
    pub proto: Proto,
    /// What its tunnels will be tied to. None without a key.
    pub bond: Option<Bond>,
}

/// What a server asks of whoever comes to its control and tunnel ports.
pub struct Door {
    /// The keys that a client may have. None: nothing is sealed.
    keys: Vec<Key>,
    /// A client that says nothing is taken for an original one.
    original: bool,
    /// The handshakes that have been at the control port before. Among those of tunnels, of which a
    /// busy client makes thousands, they would soon be forgotten.
    link_openings: Openings,
    /// The handshakes that have been at the tunnel port before.
    tunnel_openings: Openings,
    /// Who waits at the control port, and who at the tunnel port: a flood of one is no trouble to the
    /// other.
    pub links: Arc<Lobby>,
    /// See `links`.
    pub tunnels: Arc<Lobby>,
}

impl Door {
    /// For clients with one of these keys. An original client has none.
    pub fn new(keys: Vec<Key>, original: bool) -> Self {
        Self {
            original: original && keys.is_empty(),
            keys,
            link_openings: Openings::new(),
            tunnel_openings: Openings::new(),
            links: Lobby::new(),
            tunnels: Lobby::new(),
        }
    }

    /// Sends everybody away who waits.
    pub fn close(&self) {
        self.links.clear();
        self.tunnels.clear();
    }

    /// Which of the keys a client has, counted from 1, and how many there are: whoever changes keys
    /// sees when the old one can go.
    pub fn key_of(&self, bond: &Bond) -> Option<(usize, usize)> {
        let place = self.keys.iter().position(|key| bond.key_is(key))?;
        Some((place + 1, self.keys.len()))
    }

    /// What a control link begins with: the handshake, if there is a key, and hello. `live` is what
    /// the tunnels of the live session are tied to.
    ///
    /// # Errors
    /// The client has been told, where it helps.
    pub fn admit_link(&self, place: Place, live: Option<&Bond>) -> Result<Link, Refusal> {
        let link = self.open_link(&place, live);
        match place.leave() {
            true => link,
            false => Err(Refusal::CrowdedOut),
        }
    }

    fn open_link(&self, place: &Place, live: Option<&Bond>) -> Result<Link, Refusal> {
        let start = Instant::now();
        place.socket.set_write_timeout(Some(SILENCE))?;
        let mut conn = Conn::new(place.socket.clone());
        let bond = match self.keys.is_empty() {
            true => None,
            false => {
                let handshake = Handshake {
                    port: Port::Control,
                    due: Some(Purpose::Control(&self.keys)),
                    elsewhere: live.map(Purpose::Tunnel),
                    no_match: Refusal::WrongKey,
                };
                Some(self.handshake(&mut conn, place, handshake, start)?)
            }
        };
        self.hear_hello(conn, bond, start)
    }

    /// What follows the handshake of a control link. Apart from it, as what this function holds has no
    /// place on the stack of a thread that waits for a stranger.
    #[inline(never)]
    fn hear_hello(&self, conn: Conn, bond: Option<Bond>, start: Instant) -> Result<Link, Refusal> {
        let socket = conn.socket().clone();
        let (mut lines, mut writer) = (Lines::new(conn.reader), conn.writer);
        let patience = match self.original {
            true => HELLO_TIMEOUT,
            false => HANDSHAKE_TIMEOUT,
        };
        let proto = match lines.next_line_by(start + patience) {
            Ok(Line::Hello {
                proto: PROTO, pool, ..
            }) => {
                // From now on its silence means something.
                lines.limit_silence();
                Proto::Tp2 {
                    id: SessionId::random().map_err(io::Error::other)?,
                    pool: pool.min(MAX_POOL),
                }
            }
            Err(error) if self.original && timed_out(&error) && lines.rest().is_empty() => {
                // An original client never writes, so its silence means nothing.
                net::end_when_unacknowledged(&socket, SILENCE)?;
                Proto::Original
            }
            Ok(Line::Hello { proto, .. }) => return Err(Refusal::Version(proto).tell(&mut writer)),
            other => return Err(stranger(other, &lines, Port::Control).tell(&mut writer)),
        };
        Ok(Link {
            socket,
            lines,
            writer,
            proto,
            bond,
        })
    }

    /// What a tunnel begins with: the handshake, if there is a key, and the line that names its
    /// session. The client says no more before it is told a visitor. `live` is as above.
    ///
    /// # Errors
    /// The client has been told, where it helps.
    pub fn admit_tunnel(
        &self,
        place: Place,
        live: Option<&Bond>,
    ) -> Result<(Conn, SessionId), Refusal> {
        let tunnel = self.open_tunnel(&place, live);
        match place.leave() {
            true => tunnel,
            false => Err(Refusal::CrowdedOut),
        }
    }

    fn open_tunnel(
        &self,
        place: &Place,
        live: Option<&Bond>,
    ) -> Result<(Conn, SessionId), Refusal> {
        let start = Instant::now();
        let mut conn = Conn::new(place.socket.clone());
        if !self.keys.is_empty() {
            let no_match = match live {
                Some(_) => Refusal::WrongKeyOrSession,
                None => Refusal::NoSession,
            };
            let handshake = Handshake {
                port: Port::Tunnel,
                due: live.map(Purpose::Tunnel),
                elsewhere: Some(Purpose::Control(&self.keys)),
                no_match,
            };
            self.handshake(&mut conn, place, handshake, start)?;
        }
        Self::hear_session(conn, start)
    }

    /// What follows the handshake of a tunnel, apart from it as above.
    #[inline(never)]
    fn hear_session(mut conn: Conn, start: Instant) -> Result<(Conn, SessionId), Refusal> {
        conn.begin_frames();
        let (mut lines, mut writer) = (Lines::new(conn.reader), conn.writer);
        let first = lines.next_line_by(start + HANDSHAKE_TIMEOUT);
        if !lines.in_frames() {
            writer.end_frames();
        }
        match first {
            Ok(Line::Tunnel { session }) if lines.nothing_behind() && lines.in_frames() => {
                let reader = lines.into_reader();
                Ok((Conn { reader, writer }, session))
            }
            // A client says no more before it has a visitor.
            Ok(Line::Tunnel { .. }) if lines.in_frames() => Err(Refusal::NotClient(None)),
            other => Err(stranger(other, &lines, Port::Tunnel).tell(&mut writer)),
        }
    }

    /// The server's half of a handshake, in time.
    fn handshake(
        &self,
        conn: &mut Conn,
        place: &Place,
        handshake: Handshake,
        start: Instant,
    ) -> Result<Bond, Refusal> {
        let Handshake {
            port,
            due,
            elsewhere,
            no_match,
        } = handshake;
        conn.reader.set_deadline(Some(start + HANDSHAKE_TIMEOUT))?;
        let openings = match port {
            Port::Control => &self.link_openings,
            Port::Tunnel => &self.tunnel_openings,
        };
        let known = || place.extend();
        let bond = conn.respond(due.as_ref(), elsewhere.as_ref(), openings, known);
        let refusal = match bond {
            Ok(bond) => return Ok(bond),
            Err(NoHandshake::WrongKey) => no_match,
            Err(NoHandshake::OtherPort) => Refusal::OtherPort(port),
            Err(NoHandshake::Recorded) => Refusal::Recorded,
            Err(NoHandshake::NotNoise(_)) => {
                let mut lines = Lines::new(&mut conn.reader);
                let line = lines.next_line();
                match (port, &line) {
                    (Port::Control, Ok(Line::Hello { .. })) => Refusal::NoKey,
                    (Port::Tunnel, Err(_)) if begins_with_line(lines.rest()) => Refusal::NoKey,
                    _ => stranger(line, &lines, port),
                }
            }
            Err(NoHandshake::Io(error)) => Refusal::of(error, Step::Handshake),
        };
        Err(refusal.tell(&mut conn.writer))
    }
}

/// Which handshake is due at a port.
struct Handshake<'a> {
    port: Port,
    /// None at the tunnel port without a session.
    due: Option<Purpose<'a>>,
    /// Which one is due at the other port.
    elsewhere: Option<Purpose<'a>>,
    /// What it means if the client's half fits neither.
    no_match: Refusal,
}

/// What is wrong with a connection that did not begin as it should at this port.
fn stranger<R: io::Read>(line: io::Result<Line>, lines: &Lines<R>, port: Port) -> Refusal {
    match (line, port) {
        (Ok(Line::Hello { .. }), Port::Tunnel) => Refusal::OtherPort(port),
        (Err(_), Port::Control) if begins_with_line(lines.rest()) => Refusal::OtherPort(port),
        // The first version of the protocol had no frames.
        (Ok(Line::Tunnel { .. }), _) => Refusal::Version(1),
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

/// A control link on the client to a server that has answered.
pub struct Answered {
    /// What the server says.
    pub lines: Lines<Reader>,
    /// What the client says.
    pub writer: Writer,
    /// The server's first line, which may be a `new` of an original one.
    pub first: Line,
    /// What the session speaks.
    pub proto: Proto,
    /// What the server's hello told besides. None from an original one.
    pub welcome: Option<Welcome>,
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
    // Longer than a visitor waits for a tunnel by default. A server's port for visitors takes a client
    // for one that long, and tells it then.
    let deadline = Instant::now() + SILENCE;
    let bond = match key {
        None => None,
        Some(key) => {
            let purpose = Purpose::Control(from_ref(key));
            Some(initiate(&mut conn, &purpose, deadline)?)
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
    let (proto, welcome) = match first.as_ref().ok() {
        Some(Line::Hello {
            proto: PROTO,
            pool: granted,
            welcome: Some(welcome),
        }) => {
            let (id, pool) = (welcome.session, pool.min(*granted));
            (Proto::Tp2 { id, pool }, Some(welcome.clone()))
        }
        // The original has no key.
        Some(Line::Hi | Line::New { visitor: None }) if bond.is_none() => match original {
            true => (Proto::Original, None),
            false => return Err(NoSession::Original),
        },
        _ => return Err(no_server(first, &lines)),
    };
    lines.limit_silence();
    Ok(Answered {
        lines,
        writer,
        first: first?,
        proto,
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::PAIR_TIMEOUT;
    use std::io::Read;
    use std::net::TcpListener;
    use std::thread;

    /// A client that is taken for a visitor is told so after the pair timeout, and its way takes time.
    #[test]
    fn a_client_with_a_key_waits_longer_than_a_visitor() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (client, mut server) = (Arc::new(client), listener.accept().unwrap().0);
        let (conn, key) = (Conn::new(client.clone()), Key::generate().unwrap());
        let opening = thread::spawn(move || open_link(conn, Some(&key), 0, false).map(drop));
        server.set_read_timeout(Some(SILENCE)).unwrap();
        server.read_exact(&mut OPENING.clone()).unwrap();
        while client.read_timeout().unwrap().is_none() {
            thread::yield_now();
        }
        let patience = client.read_timeout().unwrap();
        drop(server);
        assert!(matches!(opening.join().unwrap(), Err(NoSession::Closed)));
        assert!(patience > Some(PAIR_TIMEOUT), "{patience:?}");
    }
}
