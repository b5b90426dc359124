//! What a key does to a connection: the handshake, and the frames that everything travels in
//! afterwards. No sockets: what is read comes out of a `Read`.
//!
//! The handshake is `Noise_NNpsk0_25519_AESGCM_SHA256`, the client its initiator. Both of its
//! messages are empty, and stand behind their length, as the frames do. A frame is a length of two
//! bytes, the highest first, and that many bytes of AES-GCM with 16 of them its tag; in it are a
//! type byte and what is carried. Both sides count their frames, from 0, and the count is the
//! nonce: a frame that was changed, dropped, repeated or moved does not open.

use std::io::{self, Read};
use std::sync::Arc;

use snow::{Builder, HandshakeState, StatelessTransportState};

use crate::key::Key;
use crate::protocol::MAX_LINE;

const PATTERN: &str = "Noise_NNpsk0_25519_AESGCM_SHA256";

/// A frame's length field, and that of a handshake message.
const LENGTH: usize = 2;

const TAG: usize = 16;

/// A handshake message: an ephemeral public key of 32 bytes, and the tag of nothing.
const MESSAGE: usize = 32 + TAG;

/// What a side that has a key begins with. No line of the protocol begins with a NUL.
pub const OPENING: [u8; LENGTH] = (MESSAGE as u16).to_be_bytes();

/// What a frame adds to the bytes that it carries, its length field not counted.
pub const OVERHEAD: usize = 1 + TAG;

/// The most bytes that are put into one frame; any size up to 65,518 is understood. AES-GCM is
/// fastest about here, and the far side need not wait long for the end of a frame.
const DATA_SIZE: usize = 16 * 1024;

/// The first frame of a side is a line, and nothing larger gets memory before it has opened.
const FIRST_FRAME: usize = MAX_LINE + OVERHEAD;

/// The buffer for frames that are lines.
const SMALL_BUFFER: usize = 512;

/// Types of frames.
const DATA: u8 = 0;
const END: u8 = 1;

/// What ties a tunnel to the control link of its session.
#[derive(Clone)]
pub struct Bond {
    key: Key,
    /// The hash of all that went over the wire in the control link's handshake.
    hash: [u8; 32],
}

/// A handshake's part in the protocol: one that was made for another part fails.
pub enum Purpose<'a> {
    /// A control link, with one of these keys.
    Control(&'a [Key]),
    /// A tunnel of this session.
    Tunnel(&'a Bond),
}

impl Purpose<'_> {
    fn keys(&self) -> &[Key] {
        match self {
            Purpose::Control(keys) => keys,
            Purpose::Tunnel(bond) => std::slice::from_ref(&bond.key),
        }
    }

    fn prologue(&self) -> Vec<u8> {
        match self {
            Purpose::Control(_) => b"tp/1 control".to_vec(),
            Purpose::Tunnel(bond) => [b"tp/1 tunnel".as_slice(), &bond.hash].concat(),
        }
    }
}

/// What a handshake leads to. The peer has proved nothing yet: only its first frame does that.
pub struct Secured {
    /// For what is written.
    pub sealer: Sealer,
    /// For what is read.
    pub opener: Opener,
    /// For the tunnels, if this was a control link.
    pub bond: Bond,
}

/// The client's half of a handshake: its own message, and then the server's. Only the first key
/// counts.
pub fn initiate<S: Read + io::Write>(mut socket: S, purpose: &Purpose) -> io::Result<Secured> {
    let prologue = purpose.prologue();
    let [key, ..] = purpose.keys() else {
        return Err(io::Error::other("there is no key"));
    };
    let mut state = begin(key, &prologue)?.build_initiator().map_err(broken)?;
    socket.write_all(&write_message(&mut state)?)?;
    let silent = match purpose {
        Purpose::Control(_) => "it closed the connection: most likely it has another key",
        Purpose::Tunnel(_) => "it closed the connection",
    };
    let message = read_message(&mut socket, silent)?
        .ok_or_else(|| io::Error::other("it answered without a key: it has none (--key-file)"))?;
    let opened = state.read_message(&message, &mut []);
    opened.map_err(|_| io::Error::other("its half of the handshake is not valid"))?;
    Secured::new(state, key)
}

/// The server's half of a handshake. What was recorded of another one gets an answer, too: only
/// the first frame shows that the client is there.
pub fn respond<S: Read + io::Write>(mut socket: S, purpose: &Purpose) -> io::Result<Secured> {
    let silent = "it closed the connection";
    let message = read_message(&mut socket, silent)?
        .ok_or_else(|| io::Error::other("it came without a key (--key-file)"))?;
    let prologue = purpose.prologue();
    for key in purpose.keys() {
        let mut state = begin(key, &prologue)?.build_responder().map_err(broken)?;
        if state.read_message(&message, &mut []).is_ok() {
            socket.write_all(&write_message(&mut state)?)?;
            return Secured::new(state, key);
        }
    }
    Err(io::Error::other(match purpose {
        Purpose::Control(_) => "its key is another one",
        Purpose::Tunnel(_) => "its key is another one, or its session is not the live one",
    }))
}

fn begin<'a>(key: &'a Key, prologue: &'a [u8]) -> io::Result<Builder<'a>> {
    let pattern = PATTERN.parse().map_err(broken)?;
    Builder::new(pattern)
        .psk(0, key.bytes())
        .and_then(|builder| builder.prologue(prologue))
        .map_err(broken)
}

fn write_message(state: &mut HandshakeState) -> io::Result<[u8; LENGTH + MESSAGE]> {
    let mut bytes = [0; LENGTH + MESSAGE];
    bytes[..LENGTH].copy_from_slice(&OPENING);
    state
        .write_message(&[], &mut bytes[LENGTH..])
        .map_err(broken)?;
    Ok(bytes)
}

/// The far side's message; None as soon as it is clear that this is none. `silent` is what to say
/// if nothing comes.
fn read_message(socket: &mut impl Read, silent: &str) -> io::Result<Option<[u8; MESSAGE]>> {
    let (mut opening, mut message) = (OPENING, [0; MESSAGE]);
    let mut read = |buffer: &mut [u8]| {
        socket
            .read_exact(buffer)
            .map_err(|error| match error.kind() {
                io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset => {
                    io::Error::other(silent.to_owned())
                }
                _ => error,
            })
    };
    read(&mut opening)?;
    if opening != OPENING {
        return Ok(None);
    }
    read(&mut message)?;
    Ok(Some(message))
}

/// What only a fault in this program or a system without a random source leads to.
fn broken(error: snow::Error) -> io::Error {
    io::Error::other(format!("could not encrypt: {error}"))
}

impl Secured {
    fn new(state: HandshakeState, key: &Key) -> io::Result<Self> {
        let mut hash = [0; 32];
        hash.copy_from_slice(state.get_handshake_hash());
        let cipher = Arc::new(state.into_stateless_transport_mode().map_err(broken)?);
        Ok(Self {
            sealer: Sealer::new(cipher.clone()),
            opener: Opener::new(cipher),
            bond: Bond {
                key: key.clone(),
                hash,
            },
        })
    }
}

/// Puts bytes into frames.
pub struct Sealer {
    /// Shared with the opener; neither changes it, so both work at the same time.
    cipher: Arc<StatelessTransportState>,
    nonce: u64,
    frames: Vec<u8>,
}

impl Sealer {
    fn new(cipher: Arc<StatelessTransportState>) -> Self {
        Self {
            cipher,
            nonce: 0,
            frames: Vec::new(),
        }
    }

    /// The frames for `batch[1..]`. The byte in front is lost, and so are others: type bytes take
    /// their place, so that nothing has to be moved.
    pub fn seal(&mut self, batch: &mut [u8]) -> io::Result<&[u8]> {
        let (mut at, mut filled) = (1, 0);
        while at < batch.len() {
            let end = batch.len().min(at + DATA_SIZE);
            batch[at - 1] = DATA;
            filled = self.frame(&batch[at - 1..end], filled)?;
            at = end;
        }
        Ok(&self.frames[..filled])
    }

    /// The frame that ends the stream.
    pub fn seal_end(&mut self) -> io::Result<&[u8]> {
        let filled = self.frame(&[END], 0)?;
        Ok(&self.frames[..filled])
    }

    /// Gives the memory back that a large batch has taken.
    pub fn shrink(&mut self) {
        self.frames = Vec::new();
    }

    /// Adds a frame with this content behind those that are there; the answer is where it ends.
    fn frame(&mut self, content: &[u8], start: usize) -> io::Result<usize> {
        let (body, size) = (start + LENGTH, content.len() + TAG);
        if self.frames.len() < body + size {
            self.frames.resize(body + size, 0);
        }
        let length = u16::try_from(size).map_err(io::Error::other)?;
        self.frames[start..body].copy_from_slice(&length.to_be_bytes());
        self.cipher
            .write_message(self.nonce, content, &mut self.frames[body..body + size])
            .map_err(broken)?;
        self.nonce += 1;
        Ok(body + size)
    }
}

/// Takes bytes out of frames.
pub struct Opener {
    cipher: Arc<StatelessTransportState>,
    nonce: u64,
    /// Frames as they came; from `start` to `end` they are not opened yet.
    sealed: Vec<u8>,
    start: usize,
    end: usize,
    /// The end of the stream was among them.
    ended: bool,
}

impl Opener {
    fn new(cipher: Arc<StatelessTransportState>) -> Self {
        Self {
            cipher,
            nonce: 0,
            sealed: Vec::new(),
            start: 0,
            end: 0,
            ended: false,
        }
    }

    /// True if nothing was read that is not opened yet.
    pub fn is_empty(&self) -> bool {
        self.start == self.end
    }

    /// Opens as many frames as are there and fit, after reading if need be, and puts what they
    /// carry into `batch[1..]`; the byte in front is lost. The answer is how much that is, 0 at the
    /// end of the stream. None if not even one frame fits: [`open_one`](Self::open_one) takes it.
    ///
    /// # Errors
    /// `InvalidData` for a frame that does not open; `UnexpectedEof` for an end that is not the
    /// stream's own.
    pub fn read_batch(
        &mut self,
        from: &mut impl Read,
        batch: &mut [u8],
    ) -> io::Result<Option<usize>> {
        let mut at = 1;
        while at == 1 && !self.ended {
            while let Some(size) = self.whole_frame()? {
                let space = at - 1..at - 1 + size;
                if space.end > batch.len() {
                    return Ok(Some(at - 1).filter(|count| *count > 0));
                }
                // The type byte lands on the last byte of the frame before.
                let before = batch[at - 1];
                let carried = self.open(size, &mut batch[space])?;
                batch[at - 1] = before;
                at += carried;
                if self.ended {
                    break;
                }
            }
            if at == 1 && !self.ended {
                self.fill(from, batch.len() + LENGTH * 8)?;
            }
        }
        Ok(Some(at - 1))
    }

    /// Opens one frame, after reading if need be, whatever its size. The answer is what it carries:
    /// nothing at the end of the stream.
    ///
    /// # Errors
    /// As above.
    pub fn open_one(&mut self, from: &mut impl Read) -> io::Result<Vec<u8>> {
        loop {
            if self.ended {
                return Ok(Vec::new());
            }
            let Some(size) = self.whole_frame()? else {
                self.fill(from, SMALL_BUFFER)?;
                continue;
            };
            let mut content = vec![0; size];
            let carried = self.open(size, &mut content)?;
            if carried > 0 {
                content.truncate(1 + carried);
                content.remove(0);
                return Ok(content);
            }
        }
    }

    /// The size of the next frame without its length field, if all of it is there.
    fn whole_frame(&self) -> io::Result<Option<usize>> {
        let there = &self.sealed[self.start..self.end];
        let size = frame_size(there, self.nonce)?;
        Ok(size.filter(|size| there.len() >= LENGTH + size))
    }

    /// Opens the next frame, of this size, into a space that is as large. The type byte comes first
    /// there; the answer is how many bytes are behind it.
    fn open(&mut self, size: usize, space: &mut [u8]) -> io::Result<usize> {
        let body = self.start + LENGTH;
        let frame = &self.sealed[body..body + size];
        let opened = self.cipher.read_message(self.nonce, frame, space);
        let carried = opened.map_err(|_| invalid("a frame that does not open"))? - 1;
        self.nonce += 1;
        self.start = body + size;
        match (space[0], carried) {
            (DATA, _) => {}
            (END, 0) => self.ended = true,
            _ => return Err(invalid("a frame of an unknown kind")),
        }
        Ok(carried)
    }

    /// Reads once, into a buffer of `wanted` bytes, or as many as the next frame needs.
    fn fill(&mut self, from: &mut impl Read, wanted: usize) -> io::Result<()> {
        let there = self.start..self.end;
        let size = frame_size(&self.sealed[there.clone()], self.nonce)?;
        let needed = size.map_or(wanted, |size| wanted.max(LENGTH + size));
        if there.is_empty() && self.sealed.len() != needed {
            self.sealed = vec![0; needed];
        } else {
            self.sealed.copy_within(there.clone(), 0);
            if self.sealed.len() < needed {
                self.sealed.resize(needed, 0);
            }
        }
        (self.start, self.end) = (0, there.len());
        match from.read(&mut self.sealed[self.end..])? {
            0 => Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "it was cut off",
            )),
            count => {
                self.end += count;
                Ok(())
            }
        }
    }
}

/// The size of the frame that these bytes begin with, if its length field is there.
fn frame_size(bytes: &[u8], nonce: u64) -> io::Result<Option<usize>> {
    let Some(&length) = bytes.first_chunk() else {
        return Ok(None);
    };
    let size = usize::from(u16::from_be_bytes(length));
    if size < OVERHEAD || (nonce == 0 && size > FIRST_FRAME) {
        return Err(invalid("a frame of an impossible size"));
    }
    Ok(Some(size))
}

fn invalid(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}
