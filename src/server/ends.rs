//! The two connections that the server joins: a visitor's, and a tunnel.

use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::conn_match::Client;
use crate::os::crowd::Counted;
use crate::os::limits::Slot;
use crate::os::listener::Listener;
use crate::os::net;
use crate::service::Service;
use crate::session::of_server::Session;
use crate::wire::conn::Conn;
use crate::wire::control::{Lines, send};
use crate::wire::frame::begins_with_line;
use crate::wire::handshake::OPENING;
use crate::wire::line::{Arrival, Failure, Line, Reason, SessionId};

/// A thread waits this long for a client that has something left of a visitor who has gone.
const IDLE_TIMEOUT: Duration = Duration::from_secs(10);

/// A client has this long to reach a local service, which may have two addresses that do not answer.
pub const ANSWER_TIMEOUT: Duration = Duration::from_secs(12);

/// What a client has answered to a visitor.
pub enum Answer {
    /// It has reached the local service: the visitor's bytes follow.
    Ready(Tunnel),
    /// It has not, and its tunnel is idle again. None if it has said nothing at all in time.
    Failed(Failure, Option<Tunnel>),
    /// The tunnel has died, and nothing of the visitor has reached the client.
    Dead,
}

/// A visitor who waits for a client's answer.
pub struct Asked {
    pub client: Arc<Session>,
    pub tunnel: Arc<TcpStream>,
    /// Which of the server's services the visitor came for.
    pub service: usize,
}

/// A port for visitors.
pub struct Public {
    pub service: Service,
    pub listener: Listener,
}

impl Public {
    /// What the thread is called that accepts here. Linux shows 15 bytes of it.
    pub fn thread_name(&self) -> String {
        match self.service.has_name() {
            true => format!("accept {}", self.service),
            false => "make_accept".to_owned(),
        }
    }
}

/// A visitor's connection.
pub struct Accept {
    /// The visitor's place among those of its source, if these are counted. Of one who is not joined, it
    /// is given back before the socket is closed: who is told so may come again at once.
    pub counted: Option<Counted>,
    pub socket: Arc<TcpStream>,
    pub visitor: SocketAddr,
    /// When it was accepted.
    pub came: Instant,
    /// What the visitor's connection was made to, if that is not this end of the socket.
    pub to: Option<SocketAddr>,
    /// Which of the server's services the visitor came for, counted from 0.
    pub service: usize,
    /// A client that could not reach its local service for this visitor.
    pub failed_by: Option<Arc<Session>>,
    /// The visitor's place among those that are served at a time.
    pub slot: Slot,
}

impl Accept {
    /// A visitor who has just come.
    pub fn new(socket: TcpStream, visitor: SocketAddr, service: usize, slot: Slot) -> Self {
        Self {
            socket: Arc::new(socket),
            visitor,
            came: Instant::now(),
            to: None,
            service,
            failed_by: None,
            slot,
            counted: None,
        }
    }

    /// What the visitor's connection was made to.
    pub fn to(&self) -> Option<SocketAddr> {
        self.to.or_else(|| {
            let mut near = self.socket.local_addr().ok()?;
            near.set_ip(near.ip().to_canonical());
            Some(near)
        })
    }

    /// True if it is no visitor but a client, which has come to the wrong port; and tells the client.
    pub fn is_client(&self) -> bool {
        let mut began = [0; 12];
        let count = net::peek_now(&self.socket, &mut began);
        let began = &began[..count];
        let is_client = began.starts_with(&OPENING)
            || began.starts_with(b"hello proto=")
            || begins_with_line(began);
        if is_client && self.socket.set_nonblocking(true).is_ok() {
            let reason = Reason::PublicPort;
            let _ = send(&*self.socket, &Line::Bye { reason });
        }
        is_client
    }
}

impl Client<Accept> for Arc<Session> {
    fn rank(&self, accept: &Accept) -> Option<(bool, usize)> {
        let serves = self.serves(accept.service) && accept.failed_by.as_ref() != Some(self);
        serves.then(|| (self.is_failing(accept.service), self.visitors()))
    }

    fn pool(&self) -> usize {
        self.proto.pool()
    }
}

/// A tunnel of a live session.
pub struct Tunnel {
    pub conn: Conn,
    pub from: SocketAddr,
    /// The session that the tunnel has named. None from an original client, which understands no line
    /// and whose tunnels serve one visitor each.
    pub session: Option<SessionId>,
    /// What the client was told to call the visit that this tunnel carries.
    pub visit: Option<u64>,
    /// The tunnel was given to a visitor before: it is no newly dialled one, and is not counted again.
    pub has_served: bool,
}

impl Tunnel {
    /// A tunnel that nobody has come through yet.
    pub fn new(conn: Conn, from: SocketAddr, session: Option<SessionId>) -> Self {
        Self {
            conn,
            from,
            session,
            visit: None,
            has_served: false,
        }
    }

    /// Waits until nothing of the last visitor is left on the client's side either. A tunnel where that
    /// takes long is closed: the client still gets what is on its way.
    pub fn wait_until_idle(mut self) -> Option<Self> {
        let reader = &mut self.conn.reader;
        // Most often the client has said so together with the end of its stream.
        let waits = !reader.has_frame();
        if waits {
            let deadline = Some(Instant::now() + IDLE_TIMEOUT);
            reader.set_deadline(deadline).ok()?;
        }
        let line = Lines::new(&mut *reader).next_line();
        // A line that came together with the end of bulk has kept the large buffer of that.
        reader.release();
        if waits {
            reader.set_deadline(None).ok()?;
        }
        matches!(line, Ok(Line::Idle)).then_some(self)
    }

    /// Waits until the client has answered whether it has reached the local service.
    pub fn wait_until_ready(mut self) -> Answer {
        let reader = &mut self.conn.reader;
        let line = reader.set_deadline(Some(Instant::now() + ANSWER_TIMEOUT));
        let line = line.and_then(|()| Lines::new(&mut *reader).next_line());
        match (line, reader.set_deadline(None)) {
            (Ok(Line::Ready), Ok(())) => {
                reader.begin_stream();
                Answer::Ready(self)
            }
            (Ok(Line::Failed { reason, .. }), Ok(())) => {
                self.has_served = true;
                Answer::Failed(reason, Some(self))
            }
            (line, _) => {
                net::abort(self.conn.socket());
                match line.is_err_and(|error| net::timed_out(&error)) {
                    true => Answer::Failed(Failure::TimedOut, None),
                    false => Answer::Dead,
                }
            }
        }
    }

    /// Tells the client, if the client understands that, whose bytes follow, or come
    /// [when it is ready](Self::wait_until_ready) if that is asked for. None if the tunnel is dead; the
    /// visitor may wait for another one then.
    pub fn greet(mut self, accept: &Accept, arrival: Arrival) -> Option<Self> {
        let socket = self.conn.socket().clone();
        // From here on an end would be taken for a complete and empty answer.
        net::reset_on_close(&accept.socket, true);
        if self.session.is_none() {
            net::reset_on_close(&socket, true);
            return Some(self);
        }
        let is_quiet = self.conn.reader.is_empty() && net::is_quiet(&socket);
        self.visit = arrival.visit;
        let asks = arrival.answer;
        let new = Line::New(Some(arrival));
        if is_quiet && self.conn.writer.write_now(&new).is_ok() {
            if !asks {
                self.conn.reader.begin_stream();
            }
            return Some(self);
        }
        // A part of the line may be on its way.
        net::abort(&socket);
        // The visitor waits on, and may be closed without a word.
        net::reset_on_close(&accept.socket, false);
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;
    use std::sync::atomic::AtomicU64;

    #[test]
    fn an_idle_tunnel_keeps_nothing_of_the_bulk_before() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (server, from) = listener.accept().unwrap();
        let [mut client, mut server] = [client, server].map(|it| Conn::new(Arc::new(it)));
        client.begin_frames();
        server.begin_frames();
        server.reader.begin_stream();
        // The last bytes, their end and the line after them, all of which the server reads at once.
        client.writer.batch(1);
        client.writer.write_batch(1, &AtomicU64::new(0)).unwrap();
        client.writer.write_end(true).unwrap();
        let mut batch = vec![0; 448 * 1024];
        let mut read = || server.reader.read_batch(&mut batch).unwrap();
        assert_eq!([read(), read()], [1, 0]);
        server.reader.release();
        assert!(server.reader.memory() >= batch.len());
        let tunnel = Tunnel::new(server, from, None).wait_until_idle();
        assert_eq!(tunnel.unwrap().conn.reader.memory(), 0);
    }
}
