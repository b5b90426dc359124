//! Somebody who sits between the two programs: sees all that passes, and can change it, message by
//! message. Handshake messages and frames both stand behind their length, so that they are found
//! without the key.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use parking_lot::Mutex;
use tunnel_proxy::{ClientOptions, Key};

use super::{DEADLINE, RunningServer, Service, connect, unnamed, with};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Port {
    Control,
    Tunnel,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    ToServer,
    ToClient,
}

/// Which message it is.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    pub port: Port,
    pub way: Way,
    /// The connection, and the message in its direction, counted from 0.
    pub conn: usize,
    pub index: usize,
}

/// What becomes of a message.
pub enum Verdict {
    /// These bytes go on in its place.
    Pass(Vec<u8>),
    /// The same, one by one with this pause between them.
    Drip(Vec<u8>, Duration),
    /// The same, so much later.
    Late(Vec<u8>, Duration),
    /// These bytes go on, and then both sides see the end of the connection.
    Cut(Vec<u8>),
    /// These bytes go on, and those go back to where the message came from.
    Reflect(Vec<u8>, Vec<u8>),
}

/// Decides about each message.
type Judge = dyn FnMut(Place, Vec<u8>) -> Verdict + Send;

/// All that was seen of one connection: to the server, and to the client.
pub type Seen = [Vec<u8>; 2];

pub struct Between {
    control: Service,
    tunnel: Service,
    shared: Arc<Shared>,
}

struct Shared {
    judge: Mutex<Box<Judge>>,
    /// For each port, its connections.
    seen: [Mutex<Vec<Seen>>; 2],
}

impl Between {
    /// Between this server and whoever has [`options`](Self::options).
    pub fn start(
        server: &RunningServer,
        judge: impl FnMut(Place, Vec<u8>) -> Verdict + Send + 'static,
    ) -> Self {
        let shared = Arc::new(Shared {
            judge: Mutex::new(Box::new(judge)),
            seen: Default::default(),
        });
        Self {
            control: shared.between(Port::Control, server.control),
            tunnel: shared.between(Port::Tunnel, server.tunnel),
            shared,
        }
    }

    /// A judge that changes nothing.
    pub fn listen(_: Place, message: Vec<u8>) -> Verdict {
        Verdict::Pass(message)
    }

    /// The options of a client that gets to the server only through here.
    pub fn options(&self, local: SocketAddr, key: Option<&Key>) -> ClientOptions {
        with!(ClientOptions::default();
                    servers: vec![self.control.addr.into()],
                    tunnel_port: Some(self.tunnel.addr.port()),
                    local: unnamed(local),
                    key: key.cloned(),
        )
    }

    /// What was seen so far at this port, connection by connection.
    pub fn seen(&self, port: Port) -> Vec<Seen> {
        self.shared.seen[port as usize].lock().clone()
    }
}

impl Shared {
    fn between(self: &Arc<Self>, port: Port, server: SocketAddr) -> Service {
        let shared = self.clone();
        Service::start(move |client| {
            let server = connect(server);
            let conn = {
                let mut seen = shared.seen[port as usize].lock();
                seen.push(Seen::default());
                seen.len() - 1
            };
            thread::scope(|scope| {
                scope.spawn(|| shared.carry(port, conn, Way::ToServer, &client, &server));
                shared.carry(port, conn, Way::ToClient, &server, &client);
            });
        })
    }

    /// Carries one direction, message by message. However it ends, both sides see a proper end:
    /// nothing but what was inside can tell them that there was more to come.
    fn carry(&self, port: Port, conn: usize, way: Way, from: &TcpStream, to: &TcpStream) {
        from.set_read_timeout(Some(3 * DEADLINE)).unwrap();
        for index in 0.. {
            let Some(message) = read_message(from) else {
                break;
            };
            self.seen[port as usize].lock()[conn][way as usize].extend_from_slice(&message);
            let place = Place {
                port,
                way,
                conn,
                index,
            };
            let verdict = (self.judge.lock())(place, message);
            if !verdict.carry_out(from, to) {
                let _ = from.shutdown(Shutdown::Both);
                break;
            }
        }
        let _ = to.shutdown(Shutdown::Both);
    }
}

impl Verdict {
    /// Returns false if the connection is to end, or has ended.
    fn carry_out(self, mut from: &TcpStream, mut to: &TcpStream) -> bool {
        match self {
            Verdict::Pass(bytes) => to.write_all(&bytes).is_ok(),
            Verdict::Drip(bytes, pause) => bytes.iter().all(|byte| {
                thread::sleep(pause);
                to.write_all(&[*byte]).is_ok()
            }),
            Verdict::Late(bytes, delay) => {
                thread::sleep(delay);
                to.write_all(&bytes).is_ok()
            }
            Verdict::Cut(bytes) => {
                let _ = to.write_all(&bytes);
                false
            }
            Verdict::Reflect(bytes, back) => {
                to.write_all(&bytes).is_ok() && from.write_all(&back).is_ok()
            }
        }
    }
}

/// Returns a message with its length, or what there is of a plain connection; None at the end.
fn read_message(mut from: &TcpStream) -> Option<Vec<u8>> {
    let mut message = vec![0; 2];
    from.read_exact(&mut message).ok()?;
    if message.is_ascii() && message[0] >= b' ' {
        // This is the beginning of a line: as a length it would be longer than any frame of a test.
        message.resize(64 * 1024, 0);
        let count = from.read(&mut message[2..]).ok()?;
        message.truncate(2 + count);
        return Some(message);
    }
    let size = u16::from_be_bytes([message[0], message[1]]);
    message.resize(2 + usize::from(size), 0);
    from.read_exact(&mut message[2..]).ok()?;
    Some(message)
}
