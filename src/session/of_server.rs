//! The session with the client that is live, on the server.

use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::Arc;

use crossbeam_channel::{Receiver, Sender, unbounded};
use parking_lot::Mutex;

use crate::door::Link;
use crate::os::net;
use crate::session::{Ended, Proto};
use crate::wire::conn::{Reader, Writer};
use crate::wire::control::{Lines, write_lines};
use crate::wire::handshake::Bond;
use crate::wire::line::{Failure, Line, Reason};

/// Two sessions are the same only if they are one.
impl PartialEq for Session {
    fn eq(&self, other: &Self) -> bool {
        std::ptr::eq(self, other)
    }
}

/// A session, from the registration of a client's control link to its end.
pub struct Session {
    /// Where the client's control link comes from.
    pub client: SocketAddr,
    /// What was agreed.
    pub proto: Proto,
    /// What the tunnels of this session are tied to. None without a key.
    pub bond: Option<Bond>,
    /// Which of the server's services the client offers.
    serves: Vec<bool>,
    socket: Arc<TcpStream>,
    /// What is to be written to the client. Unbounded, so that a send never waits: each visitor
    /// adds a few lines at the most, and a writer that is stuck ends with its link. None once the
    /// session has ended: that ends the writer, and with it the link.
    to_client: Mutex<Option<Sender<Line>>>,
}

impl Session {
    /// The session that a control link is to begin; and what is to be written to its client. `serves`
    /// says of each of the server's services whether the client offers it.
    pub fn new(link: &Link, client: SocketAddr, serves: Vec<bool>) -> (Arc<Self>, Receiver<Line>) {
        let (to_client, to_write) = unbounded();
        let session = Self {
            client,
            proto: link.proto,
            bond: link.bond.clone(),
            serves,
            socket: link.socket.clone(),
            to_client: Mutex::new(Some(to_client)),
        };
        (Arc::new(session), to_write)
    }

    /// True if the client offers this one of the server's services.
    pub fn serves(&self, service: usize) -> bool {
        self.serves[service]
    }

    /// How many tunnels of the client's may be idle, if there are this many visitors at a time: each
    /// of them may leave one behind. The tunnels of an original client come on demand.
    pub fn most_idle(&self, max_conns: usize) -> usize {
        match self.proto {
            Proto::Original => 0,
            Proto::Tp2 { pool, .. } => pool + max_conns,
        }
    }

    /// Hands a line to the thread that writes to the client. If that has just ended, the session is
    /// about to, and the line is lost.
    pub fn send(&self, line: Line) {
        if let Some(to_client) = &*self.to_client.lock() {
            let _ = to_client.send(line);
        }
    }

    /// Ends the control link, once all lines are written that were handed over before.
    pub fn end(&self) {
        self.to_client.lock().take();
    }

    /// True if the client has closed its control link, whether or not a thread has noticed.
    pub fn has_hung_up(&self) -> bool {
        net::has_hung_up(&self.socket)
    }

    /// Writes what the client is [sent](Self::send), and heartbeats, until the session has ended or
    /// nothing can be written any more: then calls `failed`.
    pub fn write_lines(
        &self,
        writer: Writer,
        to_write: &Receiver<Line>,
        failed: impl FnOnce(&Ended),
    ) {
        if let Err(error) = write_lines(writer, to_write, || ()) {
            // Before the thread that reads is woken: all that it finds is a closed connection.
            failed(&Ended::Writing(error));
        }
        let _ = self.socket.shutdown(Shutdown::Both);
    }

    /// Reads the client's lines until there are no more, and returns why. Calls
    /// `failed` for each visitor that the client could not serve.
    pub fn read_lines(
        &self,
        lines: &mut Lines<Reader>,
        failed: impl Fn(SocketAddr, &Failure),
    ) -> Ended {
        loop {
            match lines.next_line_alive() {
                Ok(Line::Bye { reason }) => return Ended::Bye(reason),
                Ok(Line::Hello { .. }) if self.proto == Proto::Original => {
                    // The client never was an original one. It comes back, and is asked again.
                    let reason = Reason::Late;
                    self.send(Line::Bye { reason });
                    return Ended::LateHello;
                }
                Ok(Line::Failed { visitor, reason }) => failed(visitor, &reason),
                Ok(_) => {}
                Err(error) => return error.into(),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::conn::Conn;
    use std::collections::BTreeMap;
    use std::net::TcpListener;
    use std::time::Duration;

    #[test]
    fn why_nothing_can_be_written_is_told_before_the_link_is_closed() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let _client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (socket, from) = listener.accept().unwrap();
        let socket = Arc::new(socket);
        let Conn { reader, writer } = Conn::new(socket.clone());
        let link = Link {
            socket: socket.clone(),
            lines: Lines::new(reader),
            writer: Conn::new(socket.clone()).writer,
            proto: Proto::Original,
            offers: BTreeMap::new(),
            bond: None,
        };
        let (session, to_write) = Session::new(&link, from, Vec::new());
        session.send(Line::Hi);
        socket.shutdown(Shutdown::Write).unwrap();
        let patience = Duration::from_millis(10);
        socket.set_read_timeout(Some(patience)).unwrap();
        let mut told = None;
        session.write_lines(writer, &to_write, |ended| {
            let closed = socket.peek(&mut [0]).is_ok();
            told = Some((matches!(ended, Ended::Writing(_)), closed));
        });
        assert_eq!(told, Some((true, false)));
        assert_eq!(socket.peek(&mut [0]).unwrap(), 0);
    }
}
