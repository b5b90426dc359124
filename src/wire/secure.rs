//! What a key does to a connection: the handshake, and the frames that everything travels in
//! afterwards. No sockets: what is read comes out of a `Read`.
//!
//! The handshake is `Noise_NNpsk0_25519_AESGCM_SHA256`, the client its initiator. Both of its
//! messages are empty, and stand behind their length, as the frames do. A frame is a length of two
//! bytes, the highest first, and that many bytes of AES-GCM with 16 of them its tag; in it are a
//! type byte and what is carried. Both sides count their frames, from 0, and the count is the
//! nonce: a frame that was changed, dropped, repeated or moved does not open. After every 2^24
//! frames a direction gets a new key, made of the old one.

use std::collections::VecDeque;
use std::fmt;
use std::io::{self, Read, Write};

use ring::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, Tag, UnboundKey};
use snow::{Builder, HandshakeState};
use zeroize::Zeroizing;

use crate::door::openings::{OpeningId, Openings};
use crate::key::Key;
use crate::wire::line::MAX_LINE;

const PATTERN: &str = "Noise_NNpsk0_25519_AESGCM_SHA256";

/// A frame's length field, and that of a handshake message.
const LENGTH: usize = 2;

/// The end of a frame: with the key, and only with it, it can be told that nothing was changed.
pub const TAG: usize = 16;

/// A handshake message: an ephemeral public key of 32 bytes, and the tag of nothing.
const MESSAGE: usize = 32 + TAG;

/// What a side that has a key begins with. No line of the protocol begins with a NUL.
pub const OPENING: [u8; LENGTH] = (MESSAGE as u16).to_be_bytes();

/// What a frame adds to the bytes that it carries, its length field not counted.
const OVERHEAD: usize = 1 + TAG;

/// The most bytes that are put into one frame; any size up to 65,518 is understood. AES-GCM is
/// fastest about here, and the far side need not wait long for the end of a frame.
const DATA_SIZE: usize = 16 * 1024;

/// The first frame of a side is a line, and nothing larger gets memory before it has opened.
const FIRST_FRAME: usize = MAX_LINE + OVERHEAD;

/// The buffer for frames that are opened one by one: most of them are lines.
const SMALL_BUFFER: usize = 512;

/// A key seals this many frames, and then makes place for the next one: 256 GiB if they are full.
/// TLS 1.3 lets AES-GCM seal 2^24.5 of the same size with one key, RFC 8446 section 5.5.
const REKEY_AFTER: u64 = 1 << 24;

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

impl Bond {
    /// True if it was made with this key.
    pub fn key_is(&self, key: &Key) -> bool {
        self.key == *key
    }
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

/// Why a handshake led to nothing.
pub enum NoHandshake {
    /// The other side begins with these bytes, and nobody who has a key does.
    NotNoise([u8; LENGTH]),
    /// The other side's message was made with another key.
    WrongKey,
    /// The other side's message was made for another of the server's ports.
    OtherPort,
    /// The other side's message has been here before: it was recorded.
    Recorded,
    /// The connection failed, or this side could not do its part.
    Io(io::Error),
}

impl From<io::Error> for NoHandshake {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

/// The client's half of a handshake: its own message, and then the server's. Only the first key
/// counts.
pub fn initiate(
    reader: &mut impl Read,
    writer: &mut impl Write,
    purpose: &Purpose,
) -> Result<Secured, NoHandshake> {
    let prologue = purpose.prologue();
    let [key, ..] = purpose.keys() else {
        return Err(io::Error::other("there is no key").into());
    };
    let mut state = begin(key, &prologue)?.build_initiator().map_err(broken)?;
    writer.write_all(&write_message(&mut state)?)?;
    let message = read_message(reader)?;
    let opened = state.read_message(&message, &mut []);
    opened.map_err(|_| NoHandshake::WrongKey)?;
    Ok(Secured::new(state, key)?)
}

/// The server's half of a handshake. What was recorded of another one may get an answer, too: only
/// the first frame shows that the client is there. It gets none if `openings` remember it.
/// `elsewhere` is what comes to the server's other port.
///
/// `known` is called once the client's message has opened for the first time.
pub fn respond(
    reader: &mut impl Read,
    writer: &mut impl Write,
    purpose: &Purpose,
    elsewhere: Option<&Purpose>,
    openings: &Openings,
    known: impl FnOnce(),
) -> Result<Secured, NoHandshake> {
    let message = read_message(reader)?;
    let mut id = OpeningId::default();
    id.copy_from_slice(&message[..size_of::<OpeningId>()]);
    if openings.knows(id) {
        return Err(NoHandshake::Recorded);
    }
    let Some((answer, secured)) = answer(&message, purpose)? else {
        let other = elsewhere.map_or(Ok(None), |elsewhere| answer(&message, elsewhere));
        return Err(match other? {
            Some(_) => NoHandshake::OtherPort,
            None => NoHandshake::WrongKey,
        });
    };
    if !openings.remember(id) {
        return Err(NoHandshake::Recorded);
    }
    known();
    writer.write_all(&answer)?;
    Ok(secured)
}

/// The server's message, and what it leads to; None if the client's does not open. Not inlined: kilobytes of a handshake's state have
/// no place on the stack of a thread that waits for a stranger.
#[inline(never)]
fn answer(
    message: &[u8; MESSAGE],
    purpose: &Purpose,
) -> io::Result<Option<([u8; LENGTH + MESSAGE], Secured)>> {
    let prologue = purpose.prologue();
    for key in purpose.keys() {
        let mut state = begin(key, &prologue)?.build_responder().map_err(broken)?;
        if state.read_message(message, &mut []).is_ok() {
            return Ok(Some((
                write_message(&mut state)?,
                Secured::new(state, key)?,
            )));
        }
    }
    Ok(None)
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

/// The far side's message. Whoever begins with something else is not waited for.
fn read_message(reader: &mut impl Read) -> Result<[u8; MESSAGE], NoHandshake> {
    let (mut opening, mut message) = (OPENING, [0; MESSAGE]);
    reader.read_exact(&mut opening)?;
    if opening != OPENING {
        return Err(NoHandshake::NotNoise(opening));
    }
    reader.read_exact(&mut message)?;
    Ok(message)
}

/// What only a fault in this program or a system without a random source leads to.
fn broken(error: impl fmt::Display) -> io::Error {
    io::Error::other(format!("could not encrypt: {error}"))
}

impl Secured {
    fn new(mut state: HandshakeState, key: &Key) -> io::Result<Self> {
        let mut hash = [0; 32];
        hash.copy_from_slice(state.get_handshake_hash());
        // The keys of the two directions, the initiator's first. They are taken out of snow, which
        // could only rekey both directions under one lock.
        let (first, second) = state.dangerously_get_raw_split();
        let (first, second) = (Zeroizing::new(first), Zeroizing::new(second));
        let (out, into) = match state.is_initiator() {
            true => (first, second),
            false => (second, first),
        };
        Ok(Self {
            sealer: Sealer::new(Cipher::new(&out, REKEY_AFTER)?),
            opener: Opener::new(Cipher::new(&into, REKEY_AFTER)?),
            bond: Bond {
                key: key.clone(),
                hash,
            },
        })
    }
}

/// The cipher of one direction. Both of its ends count the frames, and change the key after the
/// same ones.
struct Cipher {
    /// In a box, as it has half a kilobyte, and moves with the halves of a connection.
    key: Box<LessSafeKey>,
    /// The frames so far; the nonce of the next one. It goes on counting when the key changes.
    count: u64,
    rekey_after: u64,
}

impl Cipher {
    fn new(key: &[u8; 32], rekey_after: u64) -> io::Result<Self> {
        Ok(Self {
            key: Box::new(aes(key)?),
            count: 0,
            rekey_after,
        })
    }

    /// Seals a frame in place, and returns the tag that belongs behind it.
    fn seal(&mut self, content: &mut [u8]) -> io::Result<Tag> {
        let sealed = self
            .key
            .seal_in_place_separate_tag(nonce(self.count), Aad::empty(), content);
        self.count_frame()?;
        sealed.map_err(broken)
    }

    /// Opens a frame in place, and returns its content.
    fn open<'a>(&mut self, frame: &'a mut [u8]) -> io::Result<&'a [u8]> {
        let opened = self
            .key
            .open_in_place(nonce(self.count), Aad::empty(), frame)
            .map_err(|_| invalid("a frame that does not open"))?;
        self.count_frame()?;
        Ok(opened)
    }

    fn count_frame(&mut self) -> io::Result<()> {
        self.count += 1;
        if self.count.is_multiple_of(self.rekey_after) {
            self.rekey()?;
        }
        Ok(())
    }

    /// Noise's `Rekey()`: the next key is what this one makes of 32 zeros, with a nonce that no
    /// frame has.
    fn rekey(&mut self) -> io::Result<()> {
        let mut next = Zeroizing::new([0; 32]);
        // The tag of that is of no use.
        let _tag = self
            .key
            .seal_in_place_separate_tag(nonce(u64::MAX), Aad::empty(), &mut *next)
            .map_err(broken)?;
        *self.key = aes(&next)?;
        Ok(())
    }
}

fn aes(key: &[u8; 32]) -> io::Result<LessSafeKey> {
    let key = UnboundKey::new(&AES_256_GCM, key).map_err(broken)?;
    Ok(LessSafeKey::new(key))
}

/// As Noise has it for AES-GCM: four zeros, and the count with its highest byte first.
fn nonce(count: u64) -> Nonce {
    let mut bytes = [0; NONCE_LEN];
    bytes[4..].copy_from_slice(&count.to_be_bytes());
    Nonce::assume_unique_for_key(bytes)
}

/// Puts bytes into frames.
pub struct Sealer {
    cipher: Cipher,
    frames: Vec<u8>,
}

impl Sealer {
    fn new(cipher: Cipher) -> Self {
        Self {
            cipher,
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
    pub fn release(&mut self) {
        self.frames = Vec::new();
    }

    /// Adds a frame with this content behind those that are there, and returns where it ends.
    fn frame(&mut self, content: &[u8], start: usize) -> io::Result<usize> {
        let (body, size) = (start + LENGTH, content.len() + TAG);
        if self.frames.len() < body + size {
            self.frames.resize(body + size, 0);
        }
        let length = u16::try_from(size).map_err(io::Error::other)?;
        self.frames[start..body].copy_from_slice(&length.to_be_bytes());
        let (sealed, tag) = self.frames[body..body + size].split_at_mut(content.len());
        sealed.copy_from_slice(content);
        tag.copy_from_slice(self.cipher.seal(sealed)?.as_ref());
        Ok(body + size)
    }
}

/// Takes bytes out of frames.
pub struct Opener {
    cipher: Cipher,
    /// Frames as they came; from `start` to `end` they are not opened yet.
    sealed: Vec<u8>,
    start: usize,
    end: usize,
    /// The end of the stream was among them.
    ended: bool,
}

impl Opener {
    fn new(cipher: Cipher) -> Self {
        Self {
            cipher,
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
    /// carry into `batch[1..]`; the byte in front is lost. Returns how much that is, 0 at the
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
                // What a far side like this one makes of a full batch.
                let frames = batch.len().div_ceil(DATA_SIZE);
                self.fill(from, batch.len() + frames * (LENGTH + OVERHEAD))?;
            }
        }
        Ok(Some(at - 1))
    }

    /// Opens one frame, after reading if need be, whatever its size. Returns what it carries:
    /// nothing at the end of the stream.
    ///
    /// # Errors
    /// As above.
    pub fn open_one(&mut self, from: &mut impl Read) -> io::Result<VecDeque<u8>> {
        loop {
            if self.ended {
                return Ok(VecDeque::new());
            }
            let Some(size) = self.whole_frame()? else {
                self.fill(from, SMALL_BUFFER)?;
                continue;
            };
            let mut content = vec![0; size];
            let carried = self.open(size, &mut content)?;
            if carried > 0 {
                content.truncate(1 + carried);
                let mut carried = VecDeque::from(content);
                carried.pop_front();
                return Ok(carried);
            }
        }
    }

    /// The size of the next frame without its length field, if all of it is there.
    fn whole_frame(&self) -> io::Result<Option<usize>> {
        let there = &self.sealed[self.start..self.end];
        let size = frame_size(there, self.cipher.count)?;
        Ok(size.filter(|size| there.len() >= LENGTH + size))
    }

    /// Opens the next frame, of this size, into a space that is as large. The type byte comes first
    /// there. Returns how many bytes are behind it.
    fn open(&mut self, size: usize, space: &mut [u8]) -> io::Result<usize> {
        let body = self.start + LENGTH;
        let content = self.cipher.open(&mut self.sealed[body..body + size])?;
        space[..content.len()].copy_from_slice(content);
        let carried = content.len() - 1;
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
        let size = frame_size(&self.sealed[there.clone()], self.cipher.count)?;
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
fn frame_size(bytes: &[u8], count: u64) -> io::Result<Option<usize>> {
    let Some(&length) = bytes.first_chunk() else {
        return Ok(None);
    };
    let size = usize::from(u16::from_be_bytes(length));
    if size < OVERHEAD || (count == 0 && size > FIRST_FRAME) {
        return Err(invalid("a frame of an impossible size"));
    }
    Ok(Some(size))
}

fn invalid(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a handshake with everything fixed leads to: the two messages, and both sides.
    fn fixed_handshake(purpose: &Purpose) -> ([Vec<u8>; 2], [Secured; 2]) {
        let (key, prologue) = (&purpose.keys()[0], purpose.prologue());
        let begin = || begin(key, &prologue).unwrap();
        let mut client = begin()
            .fixed_ephemeral_key_for_testing_only(&[0x11; 32])
            .build_initiator()
            .unwrap();
        let mut server = begin()
            .fixed_ephemeral_key_for_testing_only(&[0x22; 32])
            .build_responder()
            .unwrap();
        let first = write_message(&mut client).unwrap();
        server.read_message(&first[LENGTH..], &mut []).unwrap();
        let second = write_message(&mut server).unwrap();
        client.read_message(&second[LENGTH..], &mut []).unwrap();
        let sides = [client, server].map(|state| Secured::new(state, key).unwrap());
        ([first.to_vec(), second.to_vec()], sides)
    }

    fn fixed_key() -> Key {
        let key = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=";
        key.parse().unwrap()
    }

    /// One direction: what it is written with, and what it is read with.
    fn pair() -> (Sealer, Opener) {
        rekeying_pair(REKEY_AFTER, REKEY_AFTER)
    }

    /// The same, where the two ends change the key after so many frames.
    fn rekeying_pair(sealer: u64, opener: u64) -> (Sealer, Opener) {
        let cipher = |rekey_after| Cipher::new(&[0x33; 32], rekey_after).unwrap();
        (Sealer::new(cipher(sealer)), Opener::new(cipher(opener)))
    }

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    fn seal(sealer: &mut Sealer, bytes: &[u8]) -> Vec<u8> {
        sealer.seal(&mut [&[0], bytes].concat()).unwrap().to_vec()
    }

    /// A small seeded source of numbers.
    struct Numbers(u64);

    impl Numbers {
        fn below(&mut self, below: usize) -> usize {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            (self.0 % below as u64) as usize
        }

        fn bytes(&mut self, count: usize) -> Vec<u8> {
            (0..count).map(|_| self.below(256) as u8).collect()
        }
    }

    /// Hands bytes out in pieces of random sizes.
    struct Pieces<'a>(&'a [u8], usize, &'a mut Numbers);

    impl Read for Pieces<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let most = (1 + self.2.below(self.1)).min(buffer.len());
            self.0.read(&mut buffer[..most])
        }
    }

    /// Reads with batches of this size until an end or an error; and what came before.
    fn drain(
        opener: &mut Opener,
        from: &mut impl Read,
        size: usize,
    ) -> (Vec<u8>, io::Result<usize>) {
        let (mut got, mut batch) = (Vec::new(), vec![0; 1 + size + TAG]);
        loop {
            match opener.read_batch(from, &mut batch) {
                Ok(Some(0)) => return (got, Ok(0)),
                Ok(Some(count)) => got.extend_from_slice(&batch[1..1 + count]),
                Ok(None) => match opener.open_one(from) {
                    Ok(bytes) => got.extend(bytes),
                    error => return (got, error.map(|_| 0)),
                },
                error => return (got, error.map(|_| 0)),
            }
        }
    }

    /// From an implementation of its own, written after the Noise specification alone.
    #[test]
    fn the_wire_format_is_what_it_was() {
        let key = fixed_key();
        let control = Purpose::Control(std::slice::from_ref(&key));
        let (messages, [mut client, mut server]) = fixed_handshake(&control);
        assert_eq!(
            messages.map(|message| hex(&message)),
            [
                "00307b4e909bbe7ffe44c465a220037d608ee35897d31ef972f07f74892cb0f73f13\
                 b3f339e5ceb4be1e2726df51b596900b",
                "00300faa684ed28867b97f4a6a2dee5df8ce974e76b7018e3f22a1c4cf2678570f20\
                 aba7d47fad56ad23dc2e2c4f83653954",
            ]
        );
        assert_eq!(
            hex(&client.bond.hash),
            "4aa3e376b8a00dbe2821facf480354b5e18d6658e31475c161bd734fe10d3125"
        );
        let hello = seal(&mut client.sealer, b"hello proto=1 pool=8\n");
        assert_eq!(
            hex(&hello) + &hex(client.sealer.seal_end().unwrap()),
            "0026e9b38a3f3c6f37be1897fa1b0619fd3a0eca5e3955a295b745b35ee6084fdfda3625e3ade150\
             0011cb696958f416525489f2fd74ff31cd7c25"
        );
        let hi = seal(&mut server.sealer, b"hi\n");
        assert_eq!(hex(&hi), "001430bc307079ce948459eb8afdb2f18b2fa8df1a67");

        let bond = client.bond;
        let (messages, _) = fixed_handshake(&Purpose::Tunnel(&bond));
        assert_eq!(
            messages.map(|message| hex(&message)),
            [
                "00307b4e909bbe7ffe44c465a220037d608ee35897d31ef972f07f74892cb0f73f13\
                 089585d862ea5057fee9f3e025075dc4",
                "00300faa684ed28867b97f4a6a2dee5df8ce974e76b7018e3f22a1c4cf2678570f20\
                 cbf0885fe969791c5ba998accb065665",
            ]
        );
    }

    #[test]
    fn bytes_survive_however_they_are_cut_and_batched() {
        let mut numbers = Numbers(7);
        for size in [1, 100, 8 * 1024, DATA_SIZE, DATA_SIZE + 1, 64 * 1024] {
            let (mut sealer, mut opener) = pair();
            // The first frame is a line.
            let mut sent = b"hi\n".to_vec();
            let mut wire = seal(&mut sealer, b"hi\n");
            for _ in 0..8 {
                let bytes = vec![numbers.below(256) as u8; 1 + numbers.below(100_000)];
                wire.extend(seal(&mut sealer, &bytes));
                sent.extend(bytes);
            }
            wire.extend(sealer.seal_end().unwrap());
            let piece = 1 + numbers.below(100_000);
            let mut pieces = Pieces(&wire, piece, &mut numbers);
            let (got, end) = drain(&mut opener, &mut pieces, size);
            assert!(got == sent, "batches of {size}, pieces of {piece}");
            assert_eq!(end.unwrap(), 0);
        }
    }

    /// Snow has a rekey of its own, which knows nothing of this one.
    #[test]
    fn a_new_key_is_what_noise_says() {
        let key = fixed_key();
        let prologue = Purpose::Control(std::slice::from_ref(&key)).prologue();
        let mut client = begin(&key, &prologue).unwrap().build_initiator().unwrap();
        let mut server = begin(&key, &prologue).unwrap().build_responder().unwrap();
        let first = write_message(&mut client).unwrap();
        server.read_message(&first[LENGTH..], &mut []).unwrap();
        let second = write_message(&mut server).unwrap();
        client.read_message(&second[LENGTH..], &mut []).unwrap();

        let (out, into) = client.dangerously_get_raw_split();
        let mut sealer = Sealer::new(Cipher::new(&out, 3).unwrap());
        let mut opener = Opener::new(Cipher::new(&into, 2).unwrap());
        let mut server = server.into_transport_mode().unwrap();
        let mut buffer = [0; 100];
        for count in 1..=10 {
            let frame = seal(&mut sealer, b"up");
            let length = server.read_message(&frame[LENGTH..], &mut buffer).unwrap();
            assert_eq!(buffer[..length], *b"\0up", "frame {count}");
            let length = server.write_message(b"\0down", &mut buffer).unwrap();
            let frame = [&(length as u16).to_be_bytes(), &buffer[..length]].concat();
            assert_eq!(opener.open_one(&mut &frame[..]).unwrap(), b"down");
            if count % 3 == 0 {
                server.rekey_incoming();
            }
            if count % 2 == 0 {
                server.rekey_outgoing();
            }
        }
    }

    #[test]
    fn streams_survive_new_keys() {
        let mut numbers = Numbers(11);
        for rekey_after in [1, 2, 7, 64] {
            let (mut sealer, mut opener) = rekeying_pair(rekey_after, rekey_after);
            let mut sent = b"hi\n".to_vec();
            let mut wire = seal(&mut sealer, b"hi\n");
            for _ in 0..8 {
                let count = 1 + numbers.below(300_000);
                let bytes = numbers.bytes(count);
                wire.extend(seal(&mut sealer, &bytes));
                sent.extend(bytes);
            }
            wire.extend(sealer.seal_end().unwrap());
            assert!(sealer.cipher.count > 3 * rekey_after.min(16));
            let mut pieces = Pieces(&wire, 50_000, &mut numbers);
            let (got, end) = drain(&mut opener, &mut pieces, 64 * 1024);
            assert!(got == sent, "rekeyed after {rekey_after}");
            assert_eq!(end.unwrap(), 0);
        }
    }

    #[test]
    fn a_side_that_keeps_its_key_is_noticed() {
        for (sealer, opener) in [(4, REKEY_AFTER), (REKEY_AFTER, 4), (4, 5)] {
            let (mut sealer, mut opener) = rekeying_pair(sealer, opener);
            let mut next = || opener.open_one(&mut &seal(&mut sealer, b"hi\n")[..]);
            for _ in 0..4 {
                assert_eq!(next().unwrap(), b"hi\n");
            }
            assert_eq!(next().unwrap_err().kind(), io::ErrorKind::InvalidData);
        }
    }

    #[test]
    fn what_an_old_key_has_sealed_does_not_open_later() {
        let wire = |sealer: &mut Sealer| seal(sealer, b"hi\n");
        for replayed in 0..4 {
            let (mut sealer, mut opener) = rekeying_pair(4, 4);
            let frames: Vec<_> = (0..4).map(|_| wire(&mut sealer)).collect();
            let (got, _) = drain(&mut opener, &mut &frames.concat()[..], 100);
            assert_eq!(got, b"hi\n".repeat(4));
            let error = opener.open_one(&mut &frames[replayed][..]).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData);
            // Not even at its own place in the count.
            let (_, mut opener) = rekeying_pair(4, 4);
            opener.cipher.rekey().unwrap();
            opener.cipher.count = replayed as u64;
            let error = opener.open_one(&mut &frames[replayed][..]).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        }
    }

    #[test]
    fn an_end_counts_only_in_its_frame() {
        let (mut sealer, mut opener) = pair();
        let mut wire = seal(&mut sealer, b"hi\n");
        wire.extend(sealer.seal_end().unwrap());
        let whole = wire.len();
        for cut in 0..whole {
            let (_, end) = drain(&mut pair().1, &mut &wire[..cut], 100);
            assert_eq!(end.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        }
        wire.extend(b"what nobody reads");
        let (got, end) = drain(&mut opener, &mut &wire[..], 100);
        assert_eq!((got.as_slice(), end.unwrap()), (&b"hi\n"[..], 0));
        assert_eq!(opener.open_one(&mut io::empty()).unwrap(), b"");
    }

    #[test]
    fn a_first_frame_is_no_longer_than_a_line() {
        let (mut sealer, mut opener) = pair();
        let longest = seal(&mut sealer, &[b'x'; MAX_LINE]);
        assert_eq!(opener.open_one(&mut &longest[..]).unwrap().len(), MAX_LINE);
        let later = seal(&mut sealer, &[b'x'; MAX_LINE + 1]);
        let opened = opener.open_one(&mut &later[..]).unwrap();
        assert_eq!(opened.len(), MAX_LINE + 1);

        let (mut sealer, mut opener) = pair();
        let longer = seal(&mut sealer, &[b'x'; MAX_LINE + 1]);
        let error = opener.open_one(&mut &longer[..]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        assert!(opener.sealed.len() <= SMALL_BUFFER);
    }

    #[test]
    fn impossible_frames_are_refused() {
        for (content, valid) in [
            (&[DATA][..], true),
            (&[END], true),
            (&[END, 0], false),
            (&[2], false),
            (&[255, 1, 2, 3], false),
        ] {
            let (mut sealer, mut opener) = pair();
            let size = sealer.frame(content, 0).unwrap();
            let mut wire = sealer.frames[..size].to_vec();
            wire.extend(sealer.seal_end().unwrap());
            let (_, end) = drain(&mut opener, &mut &wire[..], 100);
            assert_eq!(end.is_ok(), valid, "{content:?}");
        }
        for length in [0_u16, 1, 15, 16, 17, 274, 65_535] {
            let wire = [&length.to_be_bytes()[..], &[0x5a; 65_535]].concat();
            let (got, end) = drain(&mut pair().1, &mut &wire[..], 100);
            assert_eq!(end.unwrap_err().kind(), io::ErrorKind::InvalidData);
            assert_eq!(got, b"", "{length}");
        }
    }

    /// Until the bytes are there that it asks for, it is no fault; and then it does not open.
    #[test]
    fn a_longer_length_is_waited_for_and_does_not_open() {
        for added in [1, 21, 256, 10_000] {
            let (mut sealer, mut opener) = pair();
            let line = seal(&mut sealer, b"hi\n");
            assert_eq!(opener.open_one(&mut &line[..]).unwrap(), b"hi\n");
            let mut wire = seal(&mut sealer, b"some bytes");
            let length = (wire.len() - LENGTH + added) as u16;
            wire[..LENGTH].copy_from_slice(&length.to_be_bytes());
            let more = seal(&mut sealer, &vec![0; added]);
            for (bytes, kind) in [
                (wire, io::ErrorKind::UnexpectedEof),
                (more, io::ErrorKind::InvalidData),
            ] {
                let (got, end) = drain(&mut opener, &mut &bytes[..], 1000);
                assert_eq!(got, b"", "{added} bytes longer");
                assert_eq!(end.unwrap_err().kind(), kind, "{added} bytes longer");
            }
        }
    }

    /// 100,000 inputs that are random, or right up to a place: nothing panics, no byte comes out
    /// that was not put in, and no memory is taken beyond a frame.
    #[test]
    fn random_frames_never_panic_nor_deliver() {
        let mut numbers = Numbers(3);
        for _ in 0..100_000 {
            let (mut sealer, mut opener) = pair();
            let mut sent = numbers.bytes(100);
            let mut wire = seal(&mut sealer, &sent);
            let more = numbers.bytes(50);
            wire.extend(seal(&mut sealer, &more));
            sent.extend(more);
            let place = numbers.below(wire.len());
            match numbers.below(4) {
                0 => wire.truncate(place),
                1 => wire[place] ^= 1 << numbers.below(8),
                2 => drop(wire.drain(place..wire.len().min(place + 40))),
                _ => wire = numbers.bytes(place),
            }
            let size = 1 + numbers.below(200);
            let (got, end) = drain(&mut opener, &mut &wire[..], size);
            assert!(end.is_err());
            assert!(sent.starts_with(&got));
            assert!(opener.sealed.len() <= LENGTH + usize::from(u16::MAX));
        }
    }
}
