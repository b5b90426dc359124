//! The frames that a tunnel's bytes travel in, and with a key those of a control link, too. No
//! sockets: what is read comes out of a `Read`.
//!
//! A frame is a length of two bytes, the highest first, and that many bytes: one for the frame's
//! kind, and what is carried. With a key these are sealed by AES-GCM, whose tag takes 16 bytes more.
//! Both sides count their frames, from 0, and the count is the nonce: a frame that was changed,
//! dropped, repeated or moved does not open. After every 2^24 frames a direction gets a new key, made
//! of the old one.

use std::collections::VecDeque;
use std::fmt;
use std::io::{self, Read, Write};

use ring::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, Tag, UnboundKey};
use zeroize::Zeroizing;

use crate::wire::line::MAX_LINE;

/// A frame's length field.
pub const LENGTH: usize = 2;

/// The end of a sealed frame: with the key, and only with it, it can be told that nothing was changed.
pub const TAG: usize = 16;

/// What stands in front of a plain frame's bytes: a batch leaves this much room for it.
pub const FRONT: usize = LENGTH + 1;

/// The most bytes that are put into one sealed frame; any size up to 65,518 is understood. AES-GCM is
/// fastest about here, and the far side need not wait long for the end of a frame.
const SEALED_SIZE: usize = 16 * 1024;

/// The most bytes that are put into one plain frame; any size up to 65,534 is understood.
const PLAIN_SIZE: usize = 32 * 1024;

/// The buffer for frames that are opened one by one: most of them are lines.
pub const SMALL_BUFFER: usize = 512;

/// A key seals this many frames, and then makes place for the next one: 256 GiB if they are full.
/// TLS 1.3 lets AES-GCM seal 2^24.5 of the same size with one key, RFC 8446 section 5.5.
pub const REKEY_AFTER: u64 = 1 << 24;

/// The kinds of frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// Bytes of a visitor's stream.
    Data = 0,
    /// The end of the stream, in this direction.
    End = 1,
    /// A line of the protocol.
    Line = 2,
    /// The visitor's own bytes follow, to the end of the connection. Not with a key.
    Raw = 3,
}

impl Kind {
    fn of(byte: u8) -> Option<Self> {
        [Self::Data, Self::End, Self::Line, Self::Raw]
            .into_iter()
            .find(|kind| *kind as u8 == byte)
    }
}

/// What one direction of a tunnel carries at the moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flow {
    /// Lines. Nobody is served.
    Lines,
    /// A visitor's stream, frame by frame.
    Stream,
    /// A visitor's stream without frames. Nothing comes after it.
    Raw,
}

impl Flow {
    /// What a direction carries behind a frame of this kind, with so many bytes in it. None if no such
    /// frame may come now: then the two sides disagree about whom the tunnel serves.
    pub fn after(self, kind: Kind, carried: usize, sealed: bool) -> Option<Self> {
        match (self, kind, carried) {
            (Self::Lines, Kind::Line, 1..=MAX_LINE) => Some(Self::Lines),
            (Self::Stream, Kind::Data, _) => Some(Self::Stream),
            (Self::Stream, Kind::End, 0) => Some(Self::Lines),
            (Self::Stream, Kind::Raw, 0) if !sealed => Some(Self::Raw),
            _ => None,
        }
    }
}

/// True if a plain frame with a line begins like that. No line without a frame does, nor a handshake.
pub fn begins_with_line(bytes: &[u8]) -> bool {
    matches!(bytes, [0 | 1, _, kind, ..] if *kind == Kind::Line as u8)
}

/// The cipher of one direction. Both of its ends count the frames, and change the key after the
/// same ones.
pub struct Cipher {
    /// In a box, as it has half a kilobyte, and moves with the halves of a connection.
    key: Box<LessSafeKey>,
    /// The frames so far; the nonce of the next one. It goes on counting when the key changes.
    count: u64,
    rekey_after: u64,
}

impl Cipher {
    /// A cipher that changes its key after so many frames.
    pub fn new(key: &[u8; 32], rekey_after: u64) -> io::Result<Self> {
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
    /// None: the frames are plain.
    cipher: Option<Cipher>,
    frames: Vec<u8>,
}

impl Sealer {
    /// Frames that are sealed, if there is a cipher.
    pub fn new(cipher: Option<Cipher>) -> Self {
        Self {
            cipher,
            frames: Vec::new(),
        }
    }

    /// True if there is a key.
    pub fn is_sealed(&self) -> bool {
        self.cipher.is_some()
    }

    /// Writes `batch[FRONT..]`. The bytes in front are lost, and so are others: what belongs in front of
    /// a frame takes their place, so that nothing has to be moved.
    pub fn write_data(&mut self, batch: &mut [u8], mut to: impl Write) -> io::Result<()> {
        let most = match self.cipher {
            None => PLAIN_SIZE,
            Some(_) => SEALED_SIZE,
        };
        let (mut at, mut filled) = (FRONT, 0);
        while at < batch.len() {
            let end = batch.len().min(at + most);
            batch[at - 1] = Kind::Data as u8;
            if self.cipher.is_some() {
                filled = self.seal(&batch[at - 1..end], filled)?;
            } else {
                let size = length(end - at + 1)?;
                batch[at - FRONT..at - 1].copy_from_slice(&size);
                to.write_all(&batch[at - FRONT..end])?;
            }
            at = end;
        }
        to.write_all(&self.frames[..filled])
    }

    /// A frame of another kind.
    pub fn frame(&mut self, kind: Kind, carried: &[u8]) -> io::Result<&[u8]> {
        self.frames(&[(kind, carried)])
    }

    /// Several such frames, one behind another.
    pub fn frames(&mut self, frames: &[(Kind, &[u8])]) -> io::Result<&[u8]> {
        let mut filled = 0;
        for (kind, carried) in frames {
            let content = [&[*kind as u8], *carried].concat();
            filled = self.seal(&content, filled)?;
        }
        Ok(&self.frames[..filled])
    }

    /// Gives the memory back that a large batch has taken.
    pub fn release(&mut self) {
        self.frames = Vec::new();
    }

    /// Adds a frame with this content behind those that are there, and returns where it ends.
    fn seal(&mut self, content: &[u8], start: usize) -> io::Result<usize> {
        let tag = self.cipher.as_ref().map_or(0, |_| TAG);
        let (body, size) = (start + LENGTH, content.len() + tag);
        if self.frames.len() < body + size {
            self.frames.resize(body + size, 0);
        }
        self.frames[start..body].copy_from_slice(&length(size)?);
        let (sealed, tag) = self.frames[body..body + size].split_at_mut(content.len());
        sealed.copy_from_slice(content);
        if let Some(cipher) = &mut self.cipher {
            tag.copy_from_slice(cipher.seal(sealed)?.as_ref());
        }
        Ok(body + size)
    }
}

fn length(size: usize) -> io::Result<[u8; LENGTH]> {
    let size = u16::try_from(size).map_err(io::Error::other)?;
    Ok(size.to_be_bytes())
}

/// Takes bytes out of frames.
pub struct Opener {
    /// None: the frames are plain.
    cipher: Option<Cipher>,
    flow: Flow,
    /// Frames as they came; from `start` to `end` they are not opened yet.
    sealed: Vec<u8>,
    start: usize,
    end: usize,
}

impl Opener {
    /// Frames that are sealed, if there is a cipher. Lines come first.
    pub fn new(cipher: Option<Cipher>) -> Self {
        Self {
            cipher,
            flow: Flow::Lines,
            sealed: Vec::new(),
            start: 0,
            end: 0,
        }
    }

    /// Plain frames, whose first bytes are these.
    pub fn plain(began: Vec<u8>) -> Self {
        Self {
            end: began.len(),
            sealed: began,
            ..Self::new(None)
        }
    }

    /// True if there is a key.
    pub fn is_sealed(&self) -> bool {
        self.cipher.is_some()
    }

    /// True if nothing was read that is not opened yet.
    pub fn is_empty(&self) -> bool {
        self.start == self.end
    }

    /// What is carried at the moment.
    pub fn flow(&self) -> Flow {
        self.flow
    }

    /// Gives the memory back that a stream has taken, if nothing has come behind its end.
    pub fn release(&mut self) {
        if self.is_empty() {
            self.sealed = Vec::new();
            (self.start, self.end) = (0, 0);
        }
    }

    /// A visitor's stream comes next. What the last one has taken of memory is given back, also if the
    /// line between the two came together with the end of that one.
    pub fn begin_stream(&mut self) {
        self.release();
        self.flow = Flow::Stream;
    }

    /// How many bytes of memory the frames take.
    #[cfg(any(test, fuzzing))]
    pub fn memory(&self) -> usize {
        self.sealed.len()
    }

    /// True if the next frame is there.
    pub fn has_frame(&self) -> bool {
        matches!(self.whole_frame(), Ok(Some(_)))
    }

    /// What was read and not opened: after [`Flow::Raw`] the visitor's own bytes, or what a side has
    /// sent that makes no frames.
    pub fn unopened(&self) -> &[u8] {
        &self.sealed[self.start..self.end]
    }

    /// Opens as many frames of a stream as are there and fit, after reading if need be, and puts what
    /// they carry into `batch[FRONT..]`; the bytes in front are lost. Returns how much that is, 0 once
    /// the direction does not carry frames of a stream any more. None if not even one frame fits:
    /// [`open_one`](Self::open_one) takes it.
    ///
    /// # Errors
    /// `InvalidData` for a frame that does not open or must not come now; `UnexpectedEof` for an end
    /// that is not the stream's own.
    pub fn read_batch(
        &mut self,
        from: &mut impl Read,
        batch: &mut [u8],
    ) -> io::Result<Option<usize>> {
        let mut at = FRONT;
        while at == FRONT && self.flow == Flow::Stream {
            while let Some(size) = self.whole_frame()? {
                let space = at - 1..at - 1 + size;
                if space.end > batch.len() {
                    return Ok(Some(at - FRONT).filter(|count| *count > 0));
                }
                // The kind lands on the last byte of the frame before.
                let before = batch[at - 1];
                let carried = self.open(size, &mut batch[space])?;
                batch[at - 1] = before;
                at += carried;
                if self.flow != Flow::Stream {
                    break;
                }
            }
            if at == FRONT && self.flow == Flow::Stream {
                // What a far side like this one makes of a full batch.
                let frames = batch.len().div_ceil(SEALED_SIZE);
                self.fill(from, batch.len() + frames * (FRONT + TAG))?;
            }
        }
        Ok(Some(at - FRONT))
    }

    /// Opens one frame, after reading if need be, whatever its size: a line, or a piece of a stream.
    /// Returns what it carries: nothing once the stream has ended.
    ///
    /// # Errors
    /// Those of [`read_batch`](Self::read_batch).
    pub fn open_one(&mut self, from: &mut impl Read) -> io::Result<VecDeque<u8>> {
        let before = self.flow;
        loop {
            if self.flow != before {
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
        let size = self.frame_size()?;
        Ok(size.filter(|size| self.unopened().len() >= LENGTH + size))
    }

    /// The size of the next frame without its length field, if that is there.
    fn frame_size(&self) -> io::Result<Option<usize>> {
        let Some(&length) = self.unopened().first_chunk() else {
            return Ok(None);
        };
        let size = usize::from(u16::from_be_bytes(length));
        let least = 1 + self.cipher.as_ref().map_or(0, |_| TAG);
        // Nothing larger than a line gets memory from a side that may not have proved itself.
        if size < least || (self.flow == Flow::Lines && size > least + MAX_LINE) {
            return Err(invalid("a frame of an impossible size"));
        }
        Ok(Some(size))
    }

    /// Opens the next frame, of this size, into a space that is as large. The kind comes first there.
    /// Returns how many bytes are behind it.
    fn open(&mut self, size: usize, space: &mut [u8]) -> io::Result<usize> {
        let body = self.start + LENGTH;
        let mut content: &[u8] = &self.sealed[body..body + size];
        let sealed = self.cipher.is_some();
        if let Some(cipher) = &mut self.cipher {
            content = cipher.open(&mut self.sealed[body..body + size])?;
        }
        space[..content.len()].copy_from_slice(content);
        let (kind, carried) = (Kind::of(content[0]), content.len() - 1);
        // What begins without a key may be no frame at all, but what another protocol begins with.
        let is_text = content[1..].is_ascii() && content.ends_with(b"\n");
        let misfit = || invalid("a frame that must not come now");
        let kind = kind.ok_or_else(misfit)?;
        if kind == Kind::Line && !is_text {
            return Err(misfit());
        }
        self.flow = self.flow.after(kind, carried, sealed).ok_or_else(misfit)?;
        self.start = body + size;
        Ok(carried)
    }

    /// Reads once, into a buffer of `wanted` bytes, or as many as the next frame needs.
    fn fill(&mut self, from: &mut impl Read, wanted: usize) -> io::Result<()> {
        let needed = self
            .frame_size()?
            .map_or(wanted, |size| wanted.max(LENGTH + size));
        let there = self.start..self.end;
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

fn invalid(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

/// What only a fault in this program or a system without a random source leads to.
pub fn broken(error: impl fmt::Display) -> io::Error {
    io::Error::other(format!("could not encrypt: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fuzz::{self, drain};

    /// One direction that carries a stream, with a key: what it is written with, and what it is read
    /// with.
    fn pair() -> (Sealer, Opener) {
        rekeying_pair(REKEY_AFTER, REKEY_AFTER)
    }

    /// The same, where the two ends change the key after so many frames.
    fn rekeying_pair(sealer: u64, opener: u64) -> (Sealer, Opener) {
        let cipher = |rekey_after| Cipher::new(&[0x33; 32], rekey_after).ok();
        streaming(Sealer::new(cipher(sealer)), Opener::new(cipher(opener)))
    }

    fn plain_pair() -> (Sealer, Opener) {
        streaming(Sealer::new(None), Opener::new(None))
    }

    fn streaming(sealer: Sealer, mut opener: Opener) -> (Sealer, Opener) {
        opener.begin_stream();
        (sealer, opener)
    }

    fn seal(sealer: &mut Sealer, bytes: &[u8]) -> Vec<u8> {
        let mut wire = Vec::new();
        let batch = &mut [&[0; FRONT], bytes].concat();
        sealer.write_data(batch, &mut wire).unwrap();
        wire
    }

    fn end(sealer: &mut Sealer) -> Vec<u8> {
        sealer.frame(Kind::End, b"").unwrap().to_vec()
    }

    fn cipher(opener: &mut Opener) -> &mut Cipher {
        opener.cipher.as_mut().unwrap()
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

    #[test]
    fn bytes_survive_however_they_are_cut_and_batched() {
        let mut numbers = Numbers(7);
        let sizes = [1, 100, SEALED_SIZE, SEALED_SIZE + 1, PLAIN_SIZE, 64 * 1024];
        for (size, new_pair) in sizes
            .into_iter()
            .flat_map(|size| [(size, pair as fn() -> _), (size, plain_pair)])
        {
            let (mut sealer, mut opener) = new_pair();
            let (mut sent, mut wire) = (Vec::new(), Vec::new());
            for _ in 0..8 {
                let bytes = vec![numbers.below(256) as u8; 1 + numbers.below(100_000)];
                wire.extend(seal(&mut sealer, &bytes));
                sent.extend(bytes);
            }
            wire.extend(end(&mut sealer));
            let piece = 1 + numbers.below(100_000);
            let mut pieces = Pieces(&wire, piece, &mut numbers);
            let (got, end) = drain(&mut opener, &mut pieces, size);
            assert!(got == sent, "batches of {size}, pieces of {piece}");
            assert_eq!(end.unwrap(), Flow::Lines);
        }
    }

    #[test]
    fn streams_survive_new_keys() {
        let mut numbers = Numbers(11);
        for rekey_after in [1, 2, 7, 64] {
            let (mut sealer, mut opener) = rekeying_pair(rekey_after, rekey_after);
            let (mut sent, mut wire) = (Vec::new(), Vec::new());
            for _ in 0..8 {
                let count = 1 + numbers.below(300_000);
                let bytes = numbers.bytes(count);
                wire.extend(seal(&mut sealer, &bytes));
                sent.extend(bytes);
            }
            wire.extend(end(&mut sealer));
            let count = sealer.cipher.as_ref().unwrap().count;
            assert!(count > 3 * rekey_after.min(16));
            let mut pieces = Pieces(&wire, 50_000, &mut numbers);
            let (got, end) = drain(&mut opener, &mut pieces, 64 * 1024);
            assert!(got == sent, "rekeyed after {rekey_after}");
            assert_eq!(end.unwrap(), Flow::Lines);
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
            cipher(&mut opener).rekey().unwrap();
            cipher(&mut opener).count = replayed as u64;
            let error = opener.open_one(&mut &frames[replayed][..]).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        }
    }

    #[test]
    fn an_end_counts_only_in_its_frame() {
        for new_pair in [pair, plain_pair] {
            let (mut sealer, mut opener) = new_pair();
            let mut wire = seal(&mut sealer, b"hi\n");
            wire.extend(end(&mut sealer));
            for cut in 0..wire.len() {
                let (_, end) = drain(&mut new_pair().1, &mut &wire[..cut], 100);
                assert_eq!(end.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
            }
            wire.extend(b"for the next visitor");
            let (got, end) = drain(&mut opener, &mut &wire[..], 100);
            assert_eq!((got.as_slice(), end.unwrap()), (&b"hi\n"[..], Flow::Lines));
            assert_eq!(opener.unopened(), b"for the next visitor");
            assert_eq!(
                opener.read_batch(&mut io::empty(), &mut []).unwrap(),
                Some(0)
            );
        }
    }

    #[test]
    fn a_frame_for_a_line_is_no_longer_than_a_line() {
        for sealed in [false, true] {
            let cipher = || {
                Cipher::new(&[0x33; 32], REKEY_AFTER)
                    .ok()
                    .filter(|_| sealed)
            };
            let (mut sealer, mut opener) = (Sealer::new(cipher()), Opener::new(cipher()));
            let line = |length| [vec![b'x'; length - 1], b"\n".to_vec()].concat();
            let longest = sealer.frame(Kind::Line, &line(MAX_LINE)).unwrap();
            assert_eq!(opener.open_one(&mut &*longest).unwrap(), line(MAX_LINE));
            let longer = sealer.frame(Kind::Line, &line(MAX_LINE + 1)).unwrap();
            let error = opener.open_one(&mut &*longer).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData);
            assert!(opener.memory() <= SMALL_BUFFER);
        }
    }

    #[test]
    fn what_was_no_frame_is_there_to_be_read_otherwise() {
        let line_of_noise = [0, 8, 2, 200, 1, 2, 3, 4, 5, 6];
        for began in [&b"SSH-2.0-x\r\n"[..], &line_of_noise, b"\0\x02\x02x\n"] {
            let mut opener = Opener::new(None);
            let error = opener.open_one(&mut &began[..]).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{began:?}");
            assert_eq!(opener.unopened(), began);
        }
    }

    /// Random interleavings of visits, bytes, ends, delays and cuts: every byte is read by whom it was
    /// written for.
    #[test]
    fn no_byte_of_a_visitor_reaches_another() {
        let mut numbers = Numbers(5);
        let mut visits = 0;
        for round in 0..400 {
            let mut choices = numbers.bytes(3_000);
            choices[0] = u8::from(round % 2 == 0);
            visits += fuzz::tunnel(&choices);
        }
        assert!(visits > 2_000, "{visits} visits");
    }

    /// Every frame in every flow.
    #[test]
    fn a_frame_fits_its_flow_or_ends_the_tunnel() {
        use Flow::{Lines, Raw, Stream};
        for flow in [Lines, Stream, Raw] {
            for kind in [Kind::Data, Kind::End, Kind::Line, Kind::Raw] {
                for (carried, sealed) in [0, 1, MAX_LINE, MAX_LINE + 1, 65_534]
                    .into_iter()
                    .flat_map(|carried| [(carried, false), (carried, true)])
                {
                    let fits = match (flow, kind) {
                        (Lines, Kind::Line) if (1..=MAX_LINE).contains(&carried) => Some(Lines),
                        (Stream, Kind::Data) => Some(Stream),
                        (Stream, Kind::End) if carried == 0 => Some(Lines),
                        (Stream, Kind::Raw) if carried == 0 && !sealed => Some(Raw),
                        _ => None,
                    };
                    let what = format!("{flow:?} {kind:?} {carried} {sealed}");
                    assert_eq!(flow.after(kind, carried, sealed), fits, "{what}");
                }
            }
        }
        assert!((4..=255).all(|byte| Kind::of(byte).is_none()));
    }

    #[test]
    fn lengths_that_no_frame_has_are_refused() {
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
            assert!(opener.memory() <= LENGTH + usize::from(u16::MAX));
        }
    }
}
