//! A connection in two halves, one for each thread that works on it: in frames if it is a tunnel, which
//! are sealed if there is a key, or in bytes as they are. The relay need not know which.

use std::collections::VecDeque;
use std::io::ErrorKind::InvalidData;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::door::openings::Openings;
use crate::os::net;
use crate::wire::frame::{FRONT, Flow, Kind, Opener, Sealer, TAG};
use crate::wire::handshake::{self, Bond, NoHandshake, Purpose, Secured};
use crate::wire::line::Line;

/// The shortest read time-out that is set: 0 would mean none at all.
const LEAST_TIMEOUT: Duration = Duration::from_millis(1);

/// A connection.
pub struct Conn {
    /// What is read from it.
    pub reader: Reader,
    /// What is written to it.
    pub writer: Writer,
}

impl Conn {
    /// A connection that carries bytes as they are.
    pub fn new(socket: Arc<TcpStream>) -> Self {
        Self {
            reader: Reader {
                socket: socket.clone(),
                deadline: None,
                opener: None,
                rest: VecDeque::new(),
            },
            writer: Writer {
                socket,
                sealer: None,
                batch: Vec::new(),
                said_idle: true,
            },
        }
    }

    /// From now on it carries plain frames, unless it carries sealed ones already. What was given back to
    /// be read again is the first of them.
    pub fn begin_frames(&mut self) {
        let Reader { opener, rest, .. } = &mut self.reader;
        opener.get_or_insert_with(|| Opener::plain(std::mem::take(rest).into()));
        self.writer.sealer.get_or_insert_with(|| Sealer::new(None));
    }

    /// The socket below.
    pub fn socket(&self) -> &Arc<TcpStream> {
        self.reader.socket()
    }

    /// The client's handshake; it must be over by the reader's deadline.
    pub fn initiate(&mut self, purpose: &Purpose) -> Result<Bond, NoHandshake> {
        let secured = handshake::initiate(&mut self.reader, &mut self.writer, purpose);
        self.seal(secured)
    }

    /// The server's handshake; it must be over by the reader's deadline. `due` and `elsewhere` are what
    /// comes to this port and to the server's other one. `known` is called when the client has begun as
    /// if it had the key, with an opening that is not remembered. Also returns which of `due` it is.
    pub fn respond(
        &mut self,
        due: &[(Purpose, &Openings)],
        elsewhere: &[Purpose],
        known: impl FnOnce(),
    ) -> Result<(Bond, usize), NoHandshake> {
        let (reader, writer) = (&mut self.reader, &mut self.writer);
        let secured = handshake::respond(reader, writer, due, elsewhere, known);
        let (secured, place) = match secured {
            Ok((secured, place)) => (Ok(secured), place),
            Err(error) => (Err(error), 0),
        };
        Ok((self.seal(secured)?, place))
    }

    /// After a handshake: frames from now on. Where the other side makes none, its bytes are to be
    /// read again.
    fn seal(&mut self, secured: Result<Secured, NoHandshake>) -> Result<Bond, NoHandshake> {
        if let Err(NoHandshake::NotNoise(began)) = &secured {
            self.reader.put_back(began);
        }
        let secured = secured?;
        self.reader.opener = Some(secured.opener);
        self.writer.sealer = Some(secured.sealer);
        Ok(secured.bond)
    }
}

/// The half of a connection that is read.
pub struct Reader {
    socket: Arc<TcpStream>,
    deadline: Option<Instant>,
    opener: Option<Opener>,
    /// What comes before everything else: it was read already.
    rest: VecDeque<u8>,
}

impl Reader {
    /// From now on a read fails with `TimedOut` when this instant has come, however slowly bytes
    /// drip. None: a read may take its time.
    pub fn set_deadline(&mut self, deadline: Option<Instant>) -> io::Result<()> {
        self.deadline = deadline;
        match deadline {
            // Set by each read.
            Some(_) => Ok(()),
            None => self.socket.set_read_timeout(None),
        }
    }

    /// The socket below.
    pub fn socket(&self) -> &Arc<TcpStream> {
        &self.socket
    }

    /// The socket, if it gives a stream's bytes as they are, and nothing was read ahead.
    pub fn plain(&self) -> Option<Arc<TcpStream>> {
        (self.opener.is_none() && self.rest.is_empty()).then(|| self.socket.clone())
    }

    /// Whether what is read comes in frames: then an end of the connection is none of a stream.
    pub fn has_frames(&self) -> bool {
        self.opener.is_some()
    }

    /// True if a frame can be read without waiting for it.
    pub fn has_frame(&self) -> bool {
        self.opener.as_ref().is_some_and(Opener::has_frame)
    }

    /// Gives back the memory that a stream has taken.
    pub fn release(&mut self) {
        if let Some(opener) = &mut self.opener {
            opener.release();
        }
    }

    /// How many bytes of memory a stream has taken.
    #[cfg(test)]
    pub fn memory(&self) -> usize {
        self.opener.as_ref().map_or(0, Opener::memory)
    }

    /// A visitor's stream comes next.
    pub fn begin_stream(&mut self) {
        if let Some(opener) = &mut self.opener {
            opener.begin_stream();
        }
    }

    fn end_frames(&mut self) {
        if let Some(opener) = self.opener.take() {
            self.put_back(opener.unopened());
        }
    }

    /// Gives bytes back, to be read again.
    pub fn put_back(&mut self, bytes: &[u8]) {
        let behind = std::mem::take(&mut self.rest);
        self.rest.extend(bytes);
        self.rest.extend(behind);
    }

    /// True if nothing was read that nobody has asked for yet.
    pub fn is_empty(&self) -> bool {
        self.rest.is_empty() && self.opener.as_ref().is_none_or(Opener::is_empty)
    }

    /// Waits until there is something to read, and takes no memory for it.
    pub fn wait(&self) -> io::Result<()> {
        if self.is_empty() {
            Source(&self.socket, None).again(|socket| socket.peek(&mut [0]))?;
        }
        Ok(())
    }

    /// Reads into a [`batch`](Writer::batch), as much as the socket gives at once. Returns how
    /// many bytes that is, 0 at the end.
    pub fn read_batch(&mut self, batch: &mut [u8]) -> io::Result<usize> {
        let mut source = Source(&self.socket, self.deadline);
        let space = FRONT..batch.len() - TAG;
        if let Some(opener) = self.opener.as_mut().filter(|_| self.rest.is_empty()) {
            match opener.read_batch(&mut source, batch)? {
                Some(0) if opener.flow() == Flow::Raw => {
                    net::reset_on_close(&self.socket, true);
                    self.end_frames();
                    return self.read_batch(batch);
                }
                Some(count) => return Ok(count),
                None => self.rest = opener.open_one(&mut source)?,
            }
        }
        match self.rest.is_empty() {
            true => source.read(&mut batch[space]),
            false => self.take_rest(&mut batch[space]),
        }
    }

    fn take_rest(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.rest.read(buffer)?;
        if self.rest.is_empty() {
            // A frame of 64 KiB may have been in it.
            self.rest = VecDeque::new();
        }
        Ok(count)
    }
}

/// For lines: frame by frame. What comes where plain frames are due and is none is read as it came: a
/// side that makes no frames may say what it is.
impl Read for Reader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut source = Source(&self.socket, self.deadline);
        if let Some(opener) = self.opener.as_mut().filter(|_| self.rest.is_empty()) {
            match opener.open_one(&mut source) {
                Err(error) if error.kind() == InvalidData && !opener.is_sealed() => {
                    self.end_frames();
                }
                opened => self.rest = opened?,
            }
        } else if self.rest.is_empty() {
            return source.read(buffer);
        }
        self.take_rest(buffer)
    }
}

/// A socket that is read until a deadline.
struct Source<'a>(&'a TcpStream, Option<Instant>);

impl Source<'_> {
    /// Repeats a call that a signal has interrupted.
    fn again(&self, mut call: impl FnMut(&TcpStream) -> io::Result<usize>) -> io::Result<usize> {
        loop {
            if let Some(deadline) = self.1 {
                let left = deadline.saturating_duration_since(Instant::now());
                // At the deadline a read takes what has come, and waits no longer: on a busy host
                // the bytes may have been in time, and this thread late.
                if left.is_zero() && !net::has_input(self.0) {
                    return Err(io::ErrorKind::TimedOut.into());
                }
                self.0.set_read_timeout(Some(left.max(LEAST_TIMEOUT)))?;
            }
            match call(self.0) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                result => return result,
            }
        }
    }
}

impl Read for Source<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.again(|mut socket| socket.read(buffer))
    }
}

/// The half of a connection that is written.
pub struct Writer {
    socket: Arc<TcpStream>,
    sealer: Option<Sealer>,
    batch: Vec<u8>,
    /// The far side knows that nothing of the last visitor is left here.
    said_idle: bool,
}

impl Writer {
    /// A buffer for a [reader](Reader::read_batch) to put `size` bytes into. The room in front, and a
    /// tag's room behind, are for bytes that come in frames or leave in some: so none is moved.
    pub fn batch(&mut self, size: usize) -> &mut [u8] {
        let size = FRONT + size + TAG;
        if self.batch.len() != size {
            self.batch = vec![0; size];
            if let Some(sealer) = &mut self.sealer {
                sealer.release();
            }
        }
        &mut self.batch
    }

    /// Writes no plain frames any more: the other side makes none either.
    pub fn end_frames(&mut self) {
        self.sealer.take_if(|sealer| !sealer.is_sealed());
    }

    /// The socket, if bytes can go to it as they are, see [`write_raw`](Self::write_raw).
    pub fn plain(&self) -> Option<Arc<TcpStream>> {
        let sealed = self.sealer.as_ref().is_some_and(Sealer::is_sealed);
        (!sealed).then(|| self.socket.clone())
    }

    /// Gives the batch's memory back.
    pub fn release(&mut self) {
        self.batch = Vec::new();
        if let Some(sealer) = &mut self.sealer {
            sealer.release();
        }
    }

    /// Writes a line, all of it and at once, or fails.
    pub fn write_now(&mut self, line: &Line) -> io::Result<()> {
        let line = line.to_string();
        let bytes = match &mut self.sealer {
            None => line.as_bytes(),
            Some(sealer) => sealer.frame(Kind::Line, line.as_bytes())?,
        };
        net::write_now(&self.socket, bytes)
    }

    /// True if what is written goes out in frames.
    pub fn has_frames(&self) -> bool {
        self.sealer.is_some()
    }

    /// Says, where there are plain frames, that the rest of the stream comes as it is. From then on a
    /// close is its end, and one that is none is a reset.
    pub fn write_raw(&mut self) -> io::Result<()> {
        if let Some(mut sealer) = self.sealer.take() {
            net::reset_on_close(&self.socket, true);
            (&*self.socket).write_all(sealer.frame(Kind::Raw, &[])?)?;
        }
        Ok(())
    }

    /// Writes the first `count` bytes that were put into the batch, and adds them to `moved`: those
    /// that travel as they are with each step, however long the far side takes for the rest.
    pub fn write_batch(&mut self, count: usize, moved: &AtomicU64) -> io::Result<()> {
        let batch = &mut self.batch[..FRONT + count];
        if let Some(sealer) = &mut self.sealer {
            sealer.write_data(batch, &*self.socket)?;
            moved.fetch_add(count as u64, Ordering::Relaxed);
            return Ok(());
        }
        let mut left = &batch[FRONT..];
        while !left.is_empty() {
            match (&*self.socket).write(left) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => {
                    moved.fetch_add(written as u64, Ordering::Relaxed);
                    left = &left[written..];
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if net::paused(&error) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Writes the frame that ends the stream, if there are frames, and with it the line `idle`, if this
    /// side is [done](Self::write_idle) with the visitor. Who has no frames learns of the end by
    /// [`shutdown`](Self::shutdown).
    pub fn write_end(&mut self, done: bool) -> io::Result<()> {
        let Some(sealer) = &mut self.sealer else {
            return Ok(());
        };
        let idle = Line::Idle.to_string();
        let frames = [(Kind::End, &b""[..]), (Kind::Line, idle.as_bytes())];
        self.said_idle = done;
        let frames = sealer.frames(&frames[..1 + usize::from(done)])?;
        (&*self.socket).write_all(frames)
    }

    /// Says that nothing of the last visitor is left on this side, unless the end of its stream has
    /// said so.
    pub fn write_idle(&mut self) -> io::Result<()> {
        match std::mem::replace(&mut self.said_idle, true) {
            true => Ok(()),
            false => self.write_all(Line::Idle.to_string().as_bytes()),
        }
    }

    /// Ends the stream below, unless its frames have said so already.
    pub fn shutdown(&self) -> io::Result<()> {
        match self.sealer {
            None => self.socket.shutdown(Shutdown::Write),
            Some(_) => Ok(()),
        }
    }
}

/// For lines: each in a frame of its own.
impl Write for Writer {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match &mut self.sealer {
            None => (&*self.socket).write(bytes),
            Some(sealer) => {
                (&*self.socket).write_all(sealer.frame(Kind::Line, bytes)?)?;
                Ok(bytes.len())
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
