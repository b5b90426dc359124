//! The door: what a connection says before it is trusted, on both sides.

use std::collections::BTreeMap;
use std::io;
use std::net::TcpStream;
use std::slice::from_ref;
use std::sync::Arc;
use std::time::Instant;

use crate::key::Key;
use crate::options::{ClientOptions, ServerOptions, TUNNEL_PORT};
use crate::os::limits::MAX_HEADERLESS;
use crate::os::net::{self, timed_out};
use crate::service::{MAX_SERVICES, Service};
use crate::session::Proto;
use crate::wire::conn::{Conn, Reader, Writer};
use crate::wire::control::{Lines, send};
use crate::wire::frame::begins_with_line;
use crate::wire::handshake::{Bond, NoHandshake, OPENING, Purpose};
use crate::wire::line::{
    HANDSHAKE_TIMEOUT, HELLO_TIMEOUT, Line, MAX_POOL, PROTO, SILENCE, SessionId, Welcome,
};

mod lists;
mod lobby;
pub mod openings;
mod proxied;
mod refusal;

pub use lists::{Lists, Networks, Rule, Unwelcome};
pub use lobby::{Lobby, Place};
pub use proxied::{NoHeader, hear_addresses};
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
    /// The services that the client offers.
    pub offers: Offers,
    /// The client wants to know which address each visitor came to.
    pub wants_to: bool,
    /// What its tunnels will be tied to. None without a key.
    pub bond: Option<Bond>,
}

impl Link {
    /// A link that has said nothing yet. On the heap, see [`Admitted`].
    #[inline(never)]
    fn new(conn: Conn, bond: Option<Bond>) -> Box<Self> {
        Box::new(Self {
            socket: conn.socket().clone(),
            lines: Lines::new(conn.reader),
            writer: conn.writer,
            proto: Proto::Original,
            offers: unnamed(),
            wants_to: false,
            bond,
        })
    }

    /// What was taken for a link is a tunnel without a key, as one port takes both.
    #[inline(never)]
    fn into_tunnel(self, start: Instant) -> Result<Admitted, Refusal> {
        let is_tunnel = begins_with_line(self.lines.rest());
        let (reader, writer) = (self.lines.into_reader(), self.writer);
        match hear_session(Conn { reader, writer }, None, start) {
            Ok((conn, id)) => Ok(Admitted::Tunnel(Box::new(conn), id)),
            Err(why) if is_tunnel => Err(why.of_tunnel()),
            Err(why) => Err(why),
        }
    }
}

/// Services, each with the server's port for its visitors if a server tells of them.
pub type Offers = BTreeMap<Service, Option<u16>>;

/// What has come to a port. Not on the stack: each thread that waits for a stranger would have room for
/// it there.
pub enum Admitted {
    Link(Box<Link>),
    Tunnel(Box<Conn>, SessionId),
}

/// A session that is live, as its tunnels see it: they name its id, and with a key are tied to it.
type Live = (SessionId, Option<Bond>);

/// What a server asks of whoever comes to its control and tunnel ports.
pub struct Door {
    /// The keys that a client may have. None: nothing is sealed.
    keys: Vec<Key>,
    /// A client that says nothing is taken for an original one.
    original: bool,
    /// Tunnels come to the control port, too.
    one_port: bool,
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
    /// Visitors whose proxy has not said yet where they come from.
    pub visitors: Arc<Lobby>,
}

impl Door {
    /// For clients whose links and tunnels come to `one_port` or to two. An original client has no key.
    pub fn new(options: &ServerOptions, one_port: bool) -> Self {
        let keys = options.keys.clone();
        Self {
            original: options.original && keys.is_empty(),
            keys,
            one_port,
            link_openings: Openings::new(),
            tunnel_openings: Openings::new(),
            links: Lobby::new(),
            tunnels: Lobby::new(),
            visitors: Lobby::of((options.max_conns / 2).clamp(1, MAX_HEADERLESS)),
        }
    }

    /// Sends everybody away who waits.
    pub fn close(&self) {
        self.links.clear();
        self.tunnels.clear();
        self.visitors.clear();
    }

    /// Which of the keys a client has, counted from 1, and how many there are: whoever changes keys
    /// sees when the old one can go.
    pub fn key_of(&self, bond: &Bond) -> Option<(usize, usize)> {
        let place = self.keys.iter().position(|key| bond.key_is(key))?;
        Some((place + 1, self.keys.len()))
    }

    /// What a control link begins with: the handshake, if there is a key, and hello. If there is one
    /// port, it may be a tunnel of one of the `live` sessions.
    ///
    /// # Errors
    /// The client has been told, where it helps.
    pub fn admit_link(&self, place: Place, live: &[Live]) -> Result<Admitted, Refusal> {
        let admitted = self.open_link(&place, live);
        place.leave()?;
        admitted
    }

    fn open_link(&self, place: &Place, live: &[Live]) -> Result<Admitted, Refusal> {
        let start = Instant::now();
        place.socket.set_write_timeout(Some(SILENCE))?;
        let mut conn = Conn::new(place.socket.clone());
        if self.keys.is_empty() {
            return self.hear_hello(Link::new(conn, None), start);
        }
        match self.handshake(&mut conn, place, Port::Control, live, start)? {
            (bond, 0) => self.hear_hello(Link::new(conn, Some(bond)), start),
            (_, tunnel) => {
                let heard = hear_session(conn, Some(live[tunnel - 1].0), start);
                let (conn, id) = heard.map_err(Refusal::of_tunnel)?;
                Ok(Admitted::Tunnel(Box::new(conn), id))
            }
        }
    }

    /// What follows the handshake of a control link. Apart from it, as what this function holds has no
    /// place on the stack of a thread that waits for a stranger.
    #[inline(never)]
    fn hear_hello(&self, mut link: Box<Link>, start: Instant) -> Result<Admitted, Refusal> {
        let patience = match self.original {
            true => HELLO_TIMEOUT,
            false => HANDSHAKE_TIMEOUT,
        };
        match link.lines.next_line_by(start + patience) {
            Ok(Line::Hello {
                proto: PROTO,
                pool,
                linger,
                offers,
                wants_to,
                ..
            }) => {
                link.wants_to = wants_to;
                let heard = hear_offers(&mut link.lines, offers, start + HANDSHAKE_TIMEOUT);
                link.offers = heard.map_err(|error| Refusal::of(error, Step::Hello))?;
                // From now on its silence means something.
                link.lines.limit_silence();
                link.proto = Proto::Tp2 {
                    id: SessionId::random().map_err(io::Error::other)?,
                    pool: pool.min(MAX_POOL),
                    linger,
                };
            }
            Err(error) if self.original && timed_out(&error) && link.lines.rest().is_empty() => {
                // An original client never writes, so its silence means nothing.
                net::end_when_unacknowledged(&link.socket, SILENCE)?;
            }
            // No line begins like that, but a frame does.
            Err(_)
                if self.one_port && link.bond.is_none() && link.lines.rest().starts_with(&[0]) =>
            {
                return link.into_tunnel(start);
            }
            Ok(Line::Hello { proto, .. }) => {
                return Err(Refusal::Version(proto).tell(&mut link.writer));
            }
            other => {
                return Err(stranger(other, &link.lines, Port::Control).tell(&mut link.writer));
            }
        }
        Ok(Admitted::Link(link))
    }

    /// What a tunnel begins with: the handshake, if there is a key, and the line that names its
    /// session, one of those that are `live`. The client says no more before it is told a visitor.
    ///
    /// # Errors
    /// The client has been told, where it helps.
    pub fn admit_tunnel(&self, place: Place, live: &[Live]) -> Result<(Conn, SessionId), Refusal> {
        let tunnel = self.open_tunnel(&place, live);
        place.leave()?;
        tunnel
    }

    fn open_tunnel(&self, place: &Place, live: &[Live]) -> Result<(Conn, SessionId), Refusal> {
        let start = Instant::now();
        let mut conn = Conn::new(place.socket.clone());
        if self.keys.is_empty() {
            return hear_session(conn, None, start);
        }
        let (_, tunnel) = self.handshake(&mut conn, place, Port::Tunnel, live, start)?;
        hear_session(conn, Some(live[tunnel].0), start)
    }

    /// The server's half of a handshake, in time. Also returns an index into what is due at this port. At
    /// the control port 0 is a link, and with one port for both, n is a tunnel of `live[n - 1]`. At the
    /// tunnel port n is a tunnel of `live[n]`.
    fn handshake(
        &self,
        conn: &mut Conn,
        place: &Place,
        port: Port,
        live: &[Live],
        start: Instant,
    ) -> Result<(Bond, usize), Refusal> {
        let (mut due, mut elsewhere) = (Vec::new(), Vec::new());
        let link = Purpose::Control(&self.keys);
        match port {
            Port::Control => due.push((link, &self.link_openings)),
            Port::Tunnel => elsewhere.push(link),
        }
        let tunnels = live.iter().filter_map(|(_, bond)| bond.as_ref());
        let tunnels = tunnels.map(Purpose::Tunnel);
        match port == Port::Tunnel || self.one_port {
            true => due.extend(tunnels.map(|tunnel| (tunnel, &self.tunnel_openings))),
            false => elsewhere.extend(tunnels),
        }
        conn.reader.set_deadline(Some(start + HANDSHAKE_TIMEOUT))?;
        let refusal = match conn.respond(&due, &elsewhere, || place.extend()) {
            Ok(bond) => return Ok(bond),
            Err(NoHandshake::WrongKey) => match port {
                Port::Control if self.one_port => Refusal::WrongKeyOrTunnel,
                Port::Control => Refusal::WrongKey,
                Port::Tunnel if live.is_empty() => Refusal::NoSession,
                Port::Tunnel => Refusal::WrongKeyOrSession,
            },
            Err(NoHandshake::OtherPort) => Refusal::OtherPort(port),
            Err(NoHandshake::Recorded) => Refusal::Recorded,
            Err(NoHandshake::NotNoise(_)) => {
                let mut lines = Lines::new(&mut conn.reader);
                let line = lines.next_line();
                match (port, &line) {
                    (Port::Control, Ok(Line::Hello { .. })) => Refusal::NoKey,
                    (Port::Tunnel, Err(_)) if begins_with_line(lines.rest()) => Refusal::NoKey,
                    (_, Err(_)) if self.one_port && begins_with_line(lines.rest()) => {
                        Refusal::NoKey.of_tunnel()
                    }
                    _ => stranger(line, &lines, port),
                }
            }
            Err(NoHandshake::Io(error)) => Refusal::of(error, Step::Handshake),
        };
        Err(refusal.tell(&mut conn.writer))
    }
}

/// What follows the handshake of a tunnel, apart from it for the stack's sake like
/// [that of a link](Door::hear_hello). With a key, the tunnel is tied to a session, and must name that
/// one.
#[inline(never)]
fn hear_session(
    mut conn: Conn,
    tied_to: Option<SessionId>,
    start: Instant,
) -> Result<(Conn, SessionId), Refusal> {
    // At one port, it was taken for a control link.
    conn.socket().set_write_timeout(None)?;
    conn.begin_frames();
    let (mut lines, mut writer) = (Lines::new(conn.reader), conn.writer);
    let first = lines.next_line_by(start + HANDSHAKE_TIMEOUT);
    if !lines.in_frames() {
        writer.end_frames();
    }
    match first {
        Ok(Line::Tunnel { session }) if tied_to.is_some_and(|tied_to| tied_to != session) => {
            Err(Refusal::OldSession)
        }
        Ok(Line::Tunnel { session }) if lines.nothing_behind() && lines.in_frames() => {
            let reader = lines.into_reader();
            Ok((Conn { reader, writer }, session))
        }
        // A client says no more before it has a visitor.
        Ok(Line::Tunnel { .. }) if lines.in_frames() => Err(Refusal::NotClient(None)),
        other => Err(stranger(other, &lines, Port::Tunnel).tell(&mut writer)),
    }
}

/// The service of a side that offers no others.
fn unnamed() -> Offers {
    [(Service::default(), None)].into()
}

/// The services that a side offers behind its hello, which has told their number. As many lines as that
/// and [`MAX_SERVICES`] more are heard: a stranger who never stops to talk could hold a place for ever.
fn hear_offers(
    lines: &mut Lines<Reader>,
    count: Option<usize>,
    deadline: Instant,
) -> io::Result<Offers> {
    let Some(count) = count else {
        return Ok(unnamed());
    };
    if count > MAX_SERVICES {
        let what = format!("an offer of {count} services, and {MAX_SERVICES} are allowed");
        return Err(io::Error::new(io::ErrorKind::InvalidData, what));
    }
    let (mut offers, mut left) = (Offers::new(), count);
    for _ in 0..count + MAX_SERVICES {
        if left == 0 {
            break;
        }
        if let Line::Offer { service, port } = lines.next_line_by(deadline)? {
            offers.insert(service, port);
            left -= 1;
        }
    }
    if left > 0 {
        let what = format!("more than {MAX_SERVICES} other lines among {count} offers of services");
        return Err(io::Error::new(io::ErrorKind::InvalidData, what));
    }
    Ok(offers)
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
    /// The services that the server has a port for, as far as it told.
    pub offers: Offers,
    /// What its tunnels will be tied to. None without a key.
    pub bond: Option<Bond>,
}

impl Answered {
    /// Returns where tunnels go to: the port that was asked for, or else the one that the server told.
    ///
    /// # Errors
    /// The port that was asked for is the server's port for visitors. The one that the server told may
    /// have the same number, on another address.
    pub fn tunnel_port(&self, asked: Option<u16>) -> Result<u16, NoSession> {
        let told = self.welcome.as_ref().and_then(|welcome| welcome.tunnel);
        match asked {
            Some(port) if told != asked && self.offers.values().any(|public| *public == asked) => {
                Err(NoSession::TunnelPortIsPublic(port))
            }
            _ => Ok(asked.or(told).unwrap_or(TUNNEL_PORT)),
        }
    }
}

/// What a client begins a control link with: the handshake, if there is a key, and a line each way.
/// A server that speaks as the original one is taken only if that was asked for.
pub fn open_link(mut conn: Conn, options: &ClientOptions) -> Result<Answered, NoSession> {
    conn.socket().set_write_timeout(Some(SILENCE))?;
    // Longer than a visitor waits for a tunnel by default. A server's port for visitors takes a client
    // for one that long, and tells it then.
    let deadline = Instant::now() + SILENCE;
    let bond = match &options.key {
        None => None,
        Some(key) => {
            let purpose = Purpose::Control(from_ref(key));
            Some(initiate(&mut conn, &purpose, deadline)?)
        }
    };
    let (mut lines, mut writer) = (Lines::new(conn.reader), conn.writer);
    let (pool, services) = (options.pool, &options.local);
    let has_names = services.keys().any(Service::has_name);
    let hello = Line::Hello {
        proto: PROTO,
        pool,
        linger: Some(options.linger),
        offers: has_names.then_some(services.len()),
        wants_to: !options.proxy_protocol.is_empty(),
        welcome: None,
    };
    send(&mut writer, &hello)?;
    for service in services.keys().filter(|_| has_names) {
        let (service, port) = (service.clone(), None);
        send(&mut writer, &Line::Offer { service, port })?;
    }
    let first = lines.next_line_by(deadline);
    let mut offers = unnamed();
    let (proto, welcome) = match first.as_ref().ok() {
        Some(Line::Hello {
            proto: PROTO,
            pool: granted,
            linger,
            offers: count,
            welcome: Some(welcome),
            ..
        }) => {
            offers.insert(Service::default(), welcome.public);
            if count.is_some() {
                offers = hear_offers(&mut lines, *count, deadline)?;
            }
            let proto = Proto::Tp2 {
                id: welcome.session,
                pool: pool.min(*granted),
                linger: *linger,
            };
            (proto, Some(welcome.clone()))
        }
        // The original has no key.
        Some(Line::Hi | Line::New(None)) if bond.is_none() => match options.original {
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
        offers,
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
        let (conn, mut options) = (Conn::new(client.clone()), ClientOptions::new());
        options.key = Some(Key::generate().unwrap());
        let opening = thread::spawn(move || open_link(conn, &options).map(drop));
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
