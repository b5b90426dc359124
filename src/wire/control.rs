//! Lines on a socket, as both sides read and write them: on the control link, and on a tunnel
//! while it serves no visitor.

use std::borrow::BorrowMut;
use std::io::{self, Read, Write};
use std::time::Instant;

use crossbeam_channel::{Receiver, RecvTimeoutError};

use crate::os::net::{self, timed_out};
use crate::wire::conn::Reader;
use crate::wire::line::{HEARTBEAT, Line, LineError, MAX_LINE, SILENCE, STUCK};

/// How other protocols begin.
const FOREIGN: [(&[u8], &str); 9] = [
    (b"HTTP", "HTTP"),
    (b"GET ", "HTTP"),
    (b"HEAD", "HTTP"),
    (b"POST", "HTTP"),
    (b"PUT ", "HTTP"),
    (b"OPTI", "HTTP"),
    (b"SSH-", "ssh"),
    (b"220 ", "FTP or SMTP"),
    (b"\x16\x03", "TLS"),
];

/// Reads lines, and keeps what came behind them.
pub struct Lines<R> {
    from: R,
    /// Whether the next line may take no longer than [`SILENCE`].
    limited: bool,
    buffer: [u8; MAX_LINE],
    filled: usize,
    /// What the first line began with.
    began: Option<[u8; 4]>,
}

impl<R: Read> Lines<R> {
    /// Lines out of `from`.
    pub fn new(from: R) -> Self {
        Self {
            from,
            limited: false,
            buffer: [0; MAX_LINE],
            filled: 0,
            began: None,
        }
    }

    /// The protocol that the other side speaks, if its first bytes are those of another one that
    /// people take these ports for.
    pub fn foreign(&self) -> Option<&'static str> {
        let began = self.began.as_ref().map_or(self.rest(), |began| began);
        FOREIGN
            .iter()
            .find(|(bytes, _)| began.starts_with(bytes))
            .map(|(_, name)| *name)
    }

    /// The next line. `UnexpectedEof` at the end, `InvalidData` for a line that is not one; a read
    /// time-out of the source means that the other side is dead.
    pub fn next_line(&mut self) -> io::Result<Line> {
        loop {
            if let Some(line) = self.take()? {
                return Ok(line);
            }
            match self.from.read(&mut self.buffer[self.filled..]) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => self.filled += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// What was read behind the last line: it belongs to whoever reads on.
    pub fn rest(&self) -> &[u8] {
        &self.buffer[..self.filled]
    }

    fn take(&mut self) -> io::Result<Option<Line>> {
        let filled = &self.buffer[..self.filled];
        let Some(end) = filled.iter().position(|byte| *byte == b'\n') else {
            if self.filled == MAX_LINE {
                return Err(invalid(LineError::Overlong));
            }
            // No need to wait for the end: what a side with a key sends may have none. The third byte
            // tells what kind of frame it is, if it is one.
            if filled.len() > 2 && filled.contains(&0) {
                return Err(invalid(LineError::Nul));
            }
            return Ok(None);
        };
        let line = Line::parse(&filled[..end]).map_err(invalid)?;
        self.began = self.began.or_else(|| self.buffer.first_chunk().copied());
        self.buffer.copy_within(end + 1..self.filled, 0);
        self.filled -= end + 1;
        Ok(Some(line))
    }
}

impl<R: BorrowMut<Reader>> Lines<R> {
    /// True if the lines come in frames.
    pub fn in_frames(&self) -> bool {
        self.from.borrow().has_frames()
    }
}

impl Lines<Reader> {
    /// The next line, if all of it is there in time: otherwise an error that is a
    /// [time-out](timed_out), however slowly its bytes drip. Later lines may take their time.
    pub fn next_line_by(&mut self, deadline: Instant) -> io::Result<Line> {
        self.from.set_deadline(Some(deadline))?;
        let line = self.next_line();
        self.from.set_deadline(None)?;
        line
    }

    /// From now on, a silent link is a dead one. So whoever writes to it can be patient: as long as
    /// the far side is heard, a line that finds no room may wait until the link is [`STUCK`].
    pub fn limit_silence(&mut self) {
        self.limited = true;
        // If that fails, the shorter limit from before stays.
        let _ = self.from.socket().set_write_timeout(Some(STUCK));
    }

    /// The next line of a link, which may be [limited](Self::limit_silence): whole lines count, as
    /// bytes that never become one are no sign of life. A dead link is reset: a proper end would wait
    /// behind what a deaf far side has not confirmed, and keep it in the dark as long.
    pub fn next_line_alive(&mut self) -> io::Result<Line> {
        if !self.limited {
            return self.next_line();
        }
        let line = self.next_line_by(Instant::now() + SILENCE);
        line.inspect_err(|error| {
            if timed_out(error) {
                net::abort(self.from.socket());
            }
        })
    }

    /// True if nothing came behind the last line.
    pub fn nothing_behind(&self) -> bool {
        self.filled == 0 && self.from.is_empty()
    }

    /// The reader again, for what comes behind the last line.
    pub fn into_reader(mut self) -> Reader {
        self.from.put_back(&self.buffer[..self.filled]);
        self.from
    }
}

fn invalid(error: LineError) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

/// Writes a line in one piece.
pub fn send(mut to: impl Write, line: &Line) -> io::Result<()> {
    to.write_all(line.to_string().as_bytes())
}

/// The writing side of a control link: what comes out of the channel, and a heartbeat at its time,
/// after which `at_heartbeat` is called. Ends well when the channel's senders are gone and all that
/// they sent is written.
pub fn write_lines(
    mut to: impl Write,
    lines: &Receiver<Line>,
    at_heartbeat: impl Fn(),
) -> io::Result<()> {
    let mut heartbeat = Instant::now() + HEARTBEAT;
    loop {
        match lines.recv_deadline(heartbeat) {
            Ok(line) => send(&mut to, &line)?,
            Err(RecvTimeoutError::Disconnected) => return Ok(()),
            Err(RecvTimeoutError::Timeout) => {
                send(&mut to, &Line::Hi)?;
                at_heartbeat();
                heartbeat = Instant::now() + HEARTBEAT;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::service::Service;
    use crate::wire::conn::Conn;
    use crate::wire::line::Arrival;
    use std::net::{TcpListener, TcpStream};
    use std::sync::Arc;
    use std::time::Duration;

    /// Hands out at most `piece` bytes at a time.
    struct Pieces<'a>(&'a [u8], usize);

    impl Read for Pieces<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let most = self.1.min(buffer.len());
            self.0.read(&mut buffer[..most])
        }
    }

    #[test]
    fn lines_are_found_however_they_are_split() {
        let bytes = b"hi\nwhat is this\nnew visitor=127.0.0.1:9\nGET /";
        for piece in 1..=bytes.len() {
            let mut lines = Lines::new(Pieces(bytes, piece));
            assert_eq!(lines.next_line().unwrap(), Line::Hi);
            assert_eq!(lines.next_line().unwrap(), Line::Unknown);
            let new = Line::New(Some(Arrival {
                visitor: "127.0.0.1:9".parse().unwrap(),
                visit: None,
                to: None,
                service: Service::default(),
                answer: false,
            }));
            assert_eq!(lines.next_line().unwrap(), new);
            let behind = [lines.rest(), lines.from.0].concat();
            assert_eq!(behind, b"GET /");
            let error = lines.next_line().unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        }
    }

    #[test]
    fn the_longest_line_is_256_bytes() {
        let mut longest = vec![b'x'; MAX_LINE - 1];
        longest.extend_from_slice(b"\nhi\n");
        for piece in [1, 255, 256, 300] {
            let mut lines = Lines::new(Pieces(&longest, piece));
            assert_eq!(lines.next_line().unwrap(), Line::Unknown);
            assert_eq!(lines.next_line().unwrap(), Line::Hi);
        }
        longest.insert(0, b'x');
        for piece in [1, 255, 256, 300] {
            let error = Lines::new(Pieces(&longest, piece)).next_line().unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData);
            assert!(error.to_string().contains("more than 256 bytes"));
        }
    }

    /// Where silence tells whether the far side lives, a line that finds no room need not. How long
    /// a write waits then is the kernel's part.
    #[test]
    fn lines_may_wait_for_room_for_longer_than_a_silence() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let _far = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let near = Arc::new(listener.accept().unwrap().0);
        near.set_write_timeout(Some(SILENCE)).unwrap();
        Lines::new(Conn::new(near.clone()).reader).limit_silence();
        assert_eq!(near.write_timeout().unwrap(), Some(STUCK));
        assert!(STUCK > SILENCE);
    }

    #[test]
    fn dripping_bytes_do_not_stretch_the_deadline() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut far = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (near, _) = listener.accept().unwrap();
        let dripping = std::thread::spawn(move || {
            // Until the reader has gone away.
            while far.write_all(b"x").is_ok() {
                std::thread::sleep(Duration::from_millis(5));
            }
        });
        let start = Instant::now();
        let mut lines = Lines::new(Conn::new(Arc::new(near)).reader);
        let error = lines
            .next_line_by(start + Duration::from_millis(200))
            .unwrap_err();
        assert!(timed_out(&error), "{error}");
        assert!(start.elapsed() < Duration::from_secs(2));
        drop(lines);
        dripping.join().unwrap();
    }
}
