//! Peers made by hand, on control links and on tunnels. They speak the protocol's bytes, plain or
//! sealed, and share no code with the two programs.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use snow::{Builder, HandshakeState, TransportState};
use tunnel_proxy::Key;

use super::{Protection, RunningClient, RunningServer, accept, connect};

const PATTERN: &str = "Noise_NNpsk0_25519_AESGCM_SHA256";

/// What the two messages of a handshake have, without a payload: an ephemeral key and a tag.
const HANDSHAKE_MESSAGE: usize = 48;

/// The kinds of frames, and what a sealed frame has besides its payload: the kind, and a tag.
pub const DATA: u8 = 0;
pub const END: u8 = 1;
pub const LINE: u8 = 2;
pub const RAW: u8 = 3;
pub const OVERHEAD: usize = 17;

/// The longest frame is the longest line at first, and then what the length can say.
pub const FIRST_FRAME: usize = 256 + OVERHEAD;
pub const MAX_FRAME: usize = 65535;

/// What a handshake is for; a tunnel's is bound to one control link besides.
pub const CONTROL: &[u8] = b"tp/2 control";
pub const TUNNEL: &[u8] = b"tp/2 tunnel";

/// The session of a server made by hand.
const SESSION: &str = "00112233445566778899aabbccddeeff";

/// A peer on a control link or a tunnel: writes and reads bytes and lines.
pub struct Peer {
    pub socket: TcpStream,
    seal: Option<Seal>,
    carries: Carries,
    /// Bytes that have come, and that nobody has asked for yet.
    unread: Vec<u8>,
}

/// What a peer's connection carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Carries {
    /// Bytes as they are, or with a key lines.
    Link,
    /// Frames: a line, and then a visitor's stream to its end.
    Tunnel {
        /// The next thing that this peer writes is a line.
        line_out: bool,
        /// The next thing that comes is a line.
        line_in: bool,
        /// The far side has said that the rest comes without frames.
        raw_in: bool,
    },
}

/// What comes from the other side.
#[derive(Debug, PartialEq, Eq)]
enum Came {
    Bytes(Vec<u8>),
    /// The stream is complete.
    End,
    /// The connection ended before the stream did: only a sealed one shows that.
    Cut,
}

impl Peer {
    /// A peer that never has a key.
    pub fn plain(socket: TcpStream) -> Self {
        Self {
            socket,
            seal: None,
            carries: Carries::Link,
            unread: Vec::new(),
        }
    }

    /// A peer with this key; `dials` tells which half of the handshake is its own.
    pub fn sealed(socket: TcpStream, key: &Key, dials: bool, prologue: &[u8]) -> io::Result<Self> {
        let seal = Some(Seal::agree(&socket, key, dials, prologue)?);
        Ok(Self {
            socket,
            seal,
            carries: Carries::Link,
            unread: Vec::new(),
        })
    }

    fn new(socket: TcpStream, key: Option<&Key>, dials: bool, prologue: &[u8]) -> Self {
        match key {
            Some(key) => Self::sealed(socket, key, dials, prologue).unwrap(),
            None => Self::plain(socket),
        }
    }

    /// A client's control link.
    pub fn dial_control(server: &RunningServer) -> Self {
        let socket = connect(server.control);
        Self::new(socket, server.key.as_ref(), true, CONTROL)
    }

    /// A server's end of a control link.
    pub fn accept_control(listener: &TcpListener, protection: Protection) -> Self {
        let socket = accept(listener);
        Self::new(socket, protection.key().as_ref(), false, CONTROL)
    }

    /// A client's tunnel, which belongs to this control link.
    pub fn dial_tunnel(server: &RunningServer, control: &Peer) -> Self {
        control.dial_tunnel_to(server.tunnel)
    }

    pub fn dial_tunnel_to(&self, address: SocketAddr) -> Self {
        self.tunnel(connect(address), true)
    }

    /// A server's end of a tunnel, which belongs to this control link.
    pub fn accept_tunnel(listener: &TcpListener, control: &Peer) -> Self {
        control.tunnel(accept(listener), false)
    }

    fn tunnel(&self, socket: TcpStream, dials: bool) -> Self {
        let mut tunnel = match &self.seal {
            Some(seal) => Self::new(socket, Some(&seal.key), dials, &self.prologue_of_tunnels()),
            None => Self::plain(socket),
        };
        tunnel.is_tunnel();
        tunnel
    }

    /// From now on it carries what a tunnel does.
    pub fn is_tunnel(&mut self) {
        self.carries = Carries::Tunnel {
            line_out: true,
            line_in: true,
            raw_in: false,
        };
    }

    /// The prologue of the handshakes of those tunnels that belong to this sealed control link.
    pub fn prologue_of_tunnels(&self) -> Vec<u8> {
        [TUNNEL, &self.seal.as_ref().unwrap().hash].concat()
    }

    pub fn write(&mut self, bytes: impl AsRef<[u8]>) {
        let wire = self.wire(bytes);
        self.socket.write_all(&wire).unwrap();
    }

    /// What these bytes are on the wire, where they have to come next.
    pub fn wire(&mut self, bytes: impl AsRef<[u8]>) -> Vec<u8> {
        let mut bytes = bytes.as_ref();
        let mut wire = Vec::new();
        match &mut self.carries {
            Carries::Link if self.seal.is_none() => return bytes.to_vec(),
            Carries::Link => return self.frame(LINE, bytes),
            Carries::Tunnel { line_out, .. } => {
                if std::mem::take(line_out) {
                    let end = bytes.iter().position(|byte| *byte == b'\n');
                    let (line, rest) = bytes.split_at(end.map_or(bytes.len(), |end| end + 1));
                    wire = self.frame(LINE, line);
                    bytes = rest;
                }
            }
        }
        // In as few frames as possible.
        for piece in bytes.chunks(MAX_FRAME - OVERHEAD) {
            wire.extend(self.frame(DATA, piece));
        }
        wire
    }

    /// A frame as it goes on the wire, where it has to come next.
    pub fn frame(&mut self, kind: u8, payload: &[u8]) -> Vec<u8> {
        let text = [&[kind], payload].concat();
        match &mut self.seal {
            Some(seal) => seal.seal(&text),
            None => with_length(&text),
        }
    }

    /// Says on an asked tunnel that the local service has refused its visitor: the tunnel is idle again.
    pub fn fail(&mut self, visitor: SocketAddr) {
        let line = format!("failed visitor={visitor} reason=refused\n");
        let frame = self.frame(LINE, line.as_bytes());
        self.socket.write_all(&frame).unwrap();
        self.is_tunnel();
    }

    /// Writes bytes of a visitor's stream: on the client's side of a tunnel, all after the first line.
    pub fn write_data(&mut self, bytes: impl AsRef<[u8]>) {
        let frame = self.frame(DATA, bytes.as_ref());
        self.socket.write_all(&frame).unwrap();
    }

    /// Ends what it writes, as a half-close does.
    pub fn end(&mut self) {
        match &mut self.carries {
            Carries::Tunnel { line_out, .. } => {
                *line_out = true;
                let end = self.frame(END, &[]);
                self.socket.write_all(&end).unwrap();
            }
            Carries::Link => self.socket.shutdown(Shutdown::Write).unwrap(),
        }
    }

    /// The next line with its LF; empty at the end.
    pub fn line(&mut self) -> String {
        loop {
            if let Some(end) = self.unread.iter().position(|byte| *byte == b'\n') {
                let line = self.unread.drain(..=end).collect();
                return String::from_utf8(line).unwrap();
            }
            match self.receive().unwrap() {
                Came::Bytes(bytes) => self.unread.extend(bytes),
                Came::End | Came::Cut => return String::from_utf8(self.rest()).unwrap(),
            }
        }
    }

    /// Asserts that this tunnel is given to a visitor, with `more` behind what is said of every visitor.
    /// Returns the number of the visit.
    pub fn assert_given(&mut self, visitor: &TcpStream, more: &str) -> u64 {
        self.assert_given_from(visitor.local_addr().unwrap(), more)
    }

    /// The same for a visitor that is said to come from this address.
    pub fn assert_given_from(&mut self, visitor: SocketAddr, more: &str) -> u64 {
        let line = self.line();
        let words = line.strip_prefix(&format!("new visitor={visitor} visit="));
        let number = words.and_then(|it| it.strip_suffix(&format!("{more}\n")));
        let number = number.and_then(|it| it.parse().ok());
        number.unwrap_or_else(|| panic!("{line:?} is not for {visitor}{more}"))
    }

    /// The next line that is not a heartbeat.
    pub fn line_after_hi(&mut self) -> String {
        loop {
            let line = self.line();
            if line != "hi\n" {
                return line;
            }
        }
    }

    /// The next bytes, as many as that.
    pub fn read(&mut self, count: usize) -> Vec<u8> {
        while self.unread.len() < count {
            match self.receive().unwrap() {
                Came::Bytes(bytes) => self.unread.extend(bytes),
                end => panic!("{end:?} after {} of {count} bytes", self.unread.len()),
            }
        }
        self.unread.drain(..count).collect()
    }

    fn rest(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.unread)
    }

    /// Asserts that nothing comes any more but a proper end.
    pub fn assert_ended(&mut self) {
        assert_eq!(self.rest(), b"", "bytes where the end was due");
        assert_eq!(self.receive().unwrap(), Came::End);
    }

    /// Asserts that the tunnel is aborted, and how long that took at most.
    pub fn assert_aborted(&mut self, within: Duration) {
        let start = Instant::now();
        loop {
            match self.receive() {
                Ok(Came::Bytes(_)) => {}
                Ok(Came::End) => panic!("a proper end in the place of an abort"),
                Ok(Came::Cut) => break,
                Err(error) => {
                    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
                    break;
                }
            }
        }
        assert!(start.elapsed() < within, "after {:?}", start.elapsed());
    }

    /// Reads until the connection is closed, and returns what came before. A reset counts as a
    /// close: it comes if bytes of this peer were left unread.
    pub fn read_until_closed(&mut self) -> Vec<u8> {
        let mut bytes = self.rest();
        loop {
            match self.receive() {
                Ok(Came::Bytes(more)) => bytes.extend(more),
                Ok(Came::End | Came::Cut) => return bytes,
                Err(error) => {
                    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
                    return bytes;
                }
            }
        }
    }

    fn receive(&mut self) -> io::Result<Came> {
        let in_frames = match self.carries {
            Carries::Link => self.seal.is_some(),
            Carries::Tunnel { raw_in, .. } => !raw_in,
        };
        if in_frames {
            return self.receive_frame();
        }
        let mut bytes = vec![0; 4096];
        let count = loop {
            match self.socket.read(&mut bytes) {
                // A read that has a deadline is not begun again by itself.
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                read => break read?,
            }
        };
        bytes.truncate(count);
        Ok(match count {
            0 => Came::End,
            _ => Came::Bytes(bytes),
        })
    }

    fn receive_frame(&mut self) -> io::Result<Came> {
        let mut length = [0; 2];
        if self.socket.read(&mut length[..1])? == 0 {
            return Ok(Came::Cut);
        }
        self.socket.read_exact(&mut length[1..])?;
        let mut frame = vec![0; u16::from_be_bytes(length).into()];
        self.socket.read_exact(&mut frame)?;
        if let Some(seal) = &mut self.seal {
            frame = seal.open(&frame);
        }
        let payload = frame.split_off(1);
        match (&mut self.carries, frame[0], payload.len()) {
            (Carries::Link, LINE, _) => Ok(Came::Bytes(payload)),
            (Carries::Tunnel { line_in, .. }, LINE, _) if *line_in => {
                *line_in = false;
                Ok(Came::Bytes(payload))
            }
            (Carries::Tunnel { line_in: false, .. }, DATA, _) => Ok(Came::Bytes(payload)),
            (Carries::Tunnel { line_in, .. }, END, 0) if !*line_in => {
                *line_in = true;
                Ok(Came::End)
            }
            (
                Carries::Tunnel {
                    line_in, raw_in, ..
                },
                RAW,
                0,
            ) if !*line_in => {
                *raw_in = true;
                self.receive()
            }
            (carries, kind, size) => panic!("{carries:?}: frame {kind} of {size} bytes"),
        }
    }

    /// Says hello as a client, and returns the session id that the server gives.
    pub fn say_hello(&mut self, pool: usize) -> String {
        self.write(format!("hello proto=2 pool={pool}\n"));
        session_in(&self.line())
    }
}

/// The session id in a server's hello.
pub fn session_in(hello: &str) -> String {
    let session = hello.split("session=").nth(1);
    let session = session.unwrap_or_else(|| panic!("{hello:?}"));
    session.split(' ').next().unwrap().to_owned()
}

/// A server made by hand, with a client that has said hello to it.
pub struct HandMadeServer {
    pub controls: TcpListener,
    pub tunnels: TcpListener,
    pub control: Peer,
    pub client: RunningClient,
}

impl HandMadeServer {
    pub fn start(protection: Protection, local: SocketAddr, pool: usize) -> Self {
        let controls = TcpListener::bind("127.0.0.1:0").unwrap();
        let tunnels = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = RunningClient::of(protection, &controls, &tunnels, local, pool);
        let mut control = Peer::accept_control(&controls, protection);
        assert_eq!(
            control.line(),
            format!("hello proto=2 pool={pool} linger=600000\n")
        );
        control.write(format!("hello proto=2 session={SESSION} pool={pool}\n"));
        Self {
            controls,
            tunnels,
            control,
            client,
        }
    }

    /// The next tunnel, after its first line.
    pub fn tunnel(&self) -> Peer {
        let mut tunnel = Peer::accept_tunnel(&self.tunnels, &self.control);
        assert_eq!(tunnel.line(), format!("tunnel session={SESSION}\n"));
        tunnel
    }
}

/// What a peer with a key does to its bytes.
struct Seal {
    key: Key,
    transport: TransportState,
    /// The handshake's hash: no two handshakes have the same.
    hash: Vec<u8>,
}

impl Seal {
    /// Both messages of the handshake.
    fn agree(socket: &TcpStream, key: &Key, dials: bool, prologue: &[u8]) -> io::Result<Self> {
        let mut noise = handshake(key, dials, prologue);
        for writes in [dials, !dials] {
            if writes {
                write_message(&mut noise, socket)?;
            } else {
                read_message(&mut noise, socket)?;
            }
        }
        Ok(Self {
            key: key.clone(),
            hash: noise.get_handshake_hash().to_vec(),
            transport: noise.into_transport_mode().unwrap(),
        })
    }

    fn seal(&mut self, text: &[u8]) -> Vec<u8> {
        let mut sealed = vec![0; MAX_FRAME];
        let length = self.transport.write_message(text, &mut sealed).unwrap();
        with_length(&sealed[..length])
    }

    fn open(&mut self, sealed: &[u8]) -> Vec<u8> {
        let mut text = vec![0; sealed.len()];
        let length = self.transport.read_message(sealed, &mut text).unwrap();
        text.truncate(length);
        text
    }
}

fn handshake(key: &Key, dials: bool, prologue: &[u8]) -> HandshakeState {
    let key = STANDARD.decode(key.to_base64()).unwrap();
    let key = key.try_into().unwrap();
    let noise = Builder::new(PATTERN.parse().unwrap());
    let noise = noise.psk(0, &key).unwrap().prologue(prologue).unwrap();
    if dials {
        noise.build_initiator().unwrap()
    } else {
        noise.build_responder().unwrap()
    }
}

fn write_message(noise: &mut HandshakeState, mut socket: &TcpStream) -> io::Result<()> {
    let mut message = [0; HANDSHAKE_MESSAGE];
    let length = noise.write_message(&[], &mut message).unwrap();
    assert_eq!(length, HANDSHAKE_MESSAGE);
    socket.write_all(&with_length(&message))
}

fn read_message(noise: &mut HandshakeState, mut socket: &TcpStream) -> io::Result<()> {
    let mut message = [0; 2 + HANDSHAKE_MESSAGE];
    socket.read_exact(&mut message)?;
    let (length, message) = message.split_at(2);
    assert_eq!(length, [0, 48]);
    let payload = noise.read_message(message, &mut [0; HANDSHAKE_MESSAGE]);
    assert_eq!(payload, Ok(0), "a handshake that does not fit");
    Ok(())
}

fn with_length(bytes: &[u8]) -> Vec<u8> {
    let length = u16::try_from(bytes.len()).unwrap();
    [&length.to_be_bytes(), bytes].concat()
}
