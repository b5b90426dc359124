//! What a fuzzer tries. Each function takes any bytes, and panics if they lead to what must never be.
//! The targets in `tests/fuzz` call them, and so do the tests here, with what the fuzzer found worth
//! keeping.

use std::collections::VecDeque;
use std::io::{self, Read};
#[cfg(feature = "cli")]
use std::path::Path;

#[cfg(feature = "cli")]
use crate::cli::command_line;
use crate::status::http;
use crate::wire::frame::{Cipher, FRONT, Flow, Kind, LENGTH, Opener, SMALL_BUFFER, Sealer, TAG};
use crate::wire::line::{Line, MAX_LINE};
use crate::wire::proxy_header::{self, Parsed};

/// A line without its LF: what is understood survives being printed and read again.
pub fn line(bytes: &[u8]) {
    if let Ok(parsed) = Line::parse(bytes)
        && parsed != Line::Unknown
    {
        let printed = parsed.to_string();
        let line = printed.strip_suffix('\n');
        let again = line.map(|line| Line::parse(line.as_bytes()));
        assert_eq!(again, Some(Ok(parsed)), "{printed:?}");
    }
}

/// What comes out of a tunnel, read in pieces and batches whose sizes the first bytes choose, as lines
/// or as a visitor's stream: nothing but what its frames carry, and no memory for more than one frame.
/// Sealed ones carry nothing, as nobody without the key can make one.
pub fn frame(bytes: &[u8]) {
    let [kind, piece, batch, wire @ ..] = bytes else {
        return;
    };
    let is_sealed = kind % 2 == 1;
    let mut opener = Opener::new(cipher(is_sealed));
    let mut pieces = Pieces(wire, 1 + usize::from(*piece));
    if kind / 2 % 2 == 1 {
        while let Ok(line) = opener.open_one(&mut pieces) {
            assert!(!is_sealed && line.len() <= MAX_LINE && line.back() == Some(&b'\n'));
        }
        return assert!(opener.memory() <= SMALL_BUFFER);
    }
    opener.begin_stream();
    let (got, end) = drain(&mut opener, &mut pieces, 1 + 4 * usize::from(*batch));
    let (wanted, ended) = match is_sealed {
        false => carried(wire),
        true => (Vec::new(), false),
    };
    assert_eq!(end.is_ok(), ended);
    assert!(wanted.starts_with(&got));
    assert!(!ended || got == wanted, "a part is lost");
    assert!(opener.memory() <= LENGTH + usize::from(u16::MAX));
}

/// Reads plain frames of a stream in the simplest way. Returns what they carry, and whether the stream
/// ends properly.
fn carried(mut wire: &[u8]) -> (Vec<u8>, bool) {
    let mut carried = Vec::new();
    while let Some((length, rest)) = wire.split_first_chunk() {
        let size = usize::from(u16::from_be_bytes(*length));
        let Some(([kind, content @ ..], next)) = rest.split_at_checked(size) else {
            break;
        };
        match (*kind, content) {
            (0, _) => carried.extend_from_slice(content),
            (1 | 3, []) => return (carried, true),
            _ => break,
        }
        wire = next;
    }
    (carried, false)
}

/// Both ends of a tunnel, as the programs use them. The bytes choose who writes, reads, begins or ends
/// a visit next, and how much of it arrives: every byte is read by the visitor whom it was written for.
/// Returns how many visits there were.
pub fn tunnel(bytes: &[u8]) -> usize {
    let mut choices = bytes.iter().copied();
    let Some(sealed) = choices.next() else {
        return 0;
    };
    let mut visits = 0;
    let mut ends = [(); 2].map(|()| Half::new(sealed % 2 == 1));
    while let Some(choice) = choices.next() {
        let mut below = |most: usize| {
            let [low, high] = [(); 2].map(|()| usize::from(choices.next().unwrap_or(0)));
            (low + 256 * high) % most
        };
        let is_client = choice % 2 == 1;
        let [server, client] = &mut ends;
        let (near, far) = match is_client {
            false => (server, client),
            true => (client, server),
        };
        let is_done = near.writes.is_none() && near.reads.is_none();
        match (choice / 2 % 4, near.writes) {
            (0, None) if is_client && is_done && !near.idle => {
                near.idle = true;
                far.receive(near.sealer.frame(Kind::Line, b".\n"));
            }
            (0, None) if !is_client && is_done && near.idle => {
                let visitor = b'a' + (visits % 26) as u8;
                visits += 1;
                near.begin(visitor);
                far.receive(near.sealer.frame(Kind::Line, &[visitor, b'\n']));
            }
            (1, Some(visitor)) => {
                let mut batch = vec![visitor; FRONT + 1 + below(400)];
                let written = near.sealer.write_data(&mut batch, &mut far.wire);
                assert!(written.is_ok());
            }
            (2, Some(_)) => {
                near.writes = None;
                far.receive(near.sealer.frame(Kind::End, b""));
            }
            _ => {
                let most = below(near.wire.len() + 1);
                near.read(most);
            }
        }
    }
    visits
}

/// One end of a tunnel.
struct Half {
    sealer: Sealer,
    opener: Opener,
    /// On the way to this end.
    wire: VecDeque<u8>,
    /// Whose stream is written here, and whose is read.
    writes: Option<u8>,
    reads: Option<u8>,
    /// Of the client: it has said that it is idle. Of the server: it has been told so.
    idle: bool,
}

impl Half {
    fn new(sealed: bool) -> Self {
        Self {
            sealer: Sealer::new(cipher(sealed)),
            opener: Opener::new(cipher(sealed)),
            wire: VecDeque::new(),
            writes: None,
            reads: None,
            idle: true,
        }
    }

    fn receive(&mut self, frame: io::Result<&[u8]>) {
        match frame {
            Ok(bytes) => self.wire.extend(bytes),
            Err(error) => panic!("no frame was made: {error}"),
        }
    }

    fn begin(&mut self, visitor: u8) {
        let others = (self.writes, self.reads);
        assert_eq!(others, (None, None), "still with another");
        self.opener.begin_stream();
        (self.writes, self.reads) = (Some(visitor), Some(visitor));
        self.idle = false;
    }

    /// Takes so many bytes of what is on the way, and looks whose they are.
    fn read(&mut self, most: usize) {
        let piece: Vec<u8> = self.wire.drain(..most).collect();
        let mut piece = &piece[..];
        loop {
            let result = match self.reads {
                None => self.opener.open_one(&mut piece).map(|line| match line[0] {
                    b'.' => self.idle = true,
                    visitor => self.begin(visitor),
                }),
                Some(visitor) => {
                    let mut batch = [0; 500];
                    let read = self.opener.read_batch(&mut piece, &mut batch);
                    read.map(|count| match count {
                        Some(0) => self.reads = None,
                        Some(count) => {
                            assert_eq!(batch[FRONT..FRONT + count], vec![visitor; count]);
                        }
                        None => panic!("a frame that is larger than any that was written"),
                    })
                }
            };
            if let Err(error) = result {
                // Nothing more has come.
                return assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
            }
        }
    }
}

/// The beginning of a visitor's connection behind a proxy: what was refused or read stays so when more
/// bytes come, and nothing that is as long as the longest header is waited for.
pub fn proxy_header(bytes: &[u8]) {
    let bytes = &bytes[..bytes.len().min(2 * proxy_header::MAX_V2)];
    let whole = proxy_header::parse(bytes);
    for cut in 0..bytes.len() {
        match proxy_header::parse(&bytes[..cut]) {
            Ok(Parsed::Incomplete) => assert!(cut < proxy_header::MAX_V2),
            Err(_) => assert!(whole.is_err(), "refused at {cut}"),
            read => assert_eq!(read, whole, "read at {cut}"),
        }
    }
    match whole {
        Ok(Parsed::Incomplete) => assert!(bytes.len() < proxy_header::MAX_V2),
        Ok(Parsed::Header { length, .. }) => {
            assert!(length <= bytes.len() && length <= proxy_header::MAX_V2);
        }
        Err(why) => assert!(why.to_string().is_ascii()),
    }
}

/// A request to the status page, in pieces of a size that the first byte chooses, for a page that only
/// this host or any other may see: it gets a short response, or there is more of its head to come.
pub fn request(bytes: &[u8]) {
    let [first, request @ ..] = bytes else {
        return;
    };
    let mut pieces = Pieces(request, 1 + usize::from(first / 2));
    match http::response_to(&mut pieces, first % 2 == 1, &|_: &str| None) {
        Ok(response) => {
            assert!(response.starts_with(b"HTTP/1.1 ") && response.len() < 400);
        }
        Err(error) => {
            assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
            assert!(request.len() < http::MAX_HEAD);
        }
    }
}

/// A file of options for either program: it is taken, or refused in words.
#[cfg(feature = "cli")]
pub fn config(bytes: &[u8]) {
    let Ok(text) = str::from_utf8(bytes) else {
        return;
    };
    // The name of the file is its text.
    let words = || vec![format!("--config={text}").into()];
    let read = |path: &Path| Ok(path.to_string_lossy().into_owned());
    let server = command_line::server(words(), read).map(drop);
    let client = command_line::client(words(), read).map(drop);
    for error in [server, client].into_iter().filter_map(Result::err) {
        assert!(!error.to_string().is_empty());
    }
}

fn cipher(sealed: bool) -> Option<Cipher> {
    let cipher = || Cipher::new(&[0x33; 32], 100).ok();
    sealed.then(cipher).flatten()
}

/// Bytes that arrive in pieces of at most this size.
pub(crate) struct Pieces<'a>(pub &'a [u8], pub usize);

impl Read for Pieces<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = self.1.min(buffer.len());
        self.0.read(&mut buffer[..most])
    }
}

/// Reads a stream in batches of this size until its end or an error; and what came before.
pub(crate) fn drain(
    opener: &mut Opener,
    from: &mut impl Read,
    size: usize,
) -> (Vec<u8>, io::Result<Flow>) {
    let (mut got, mut batch) = (Vec::new(), vec![0; FRONT + size + TAG]);
    while opener.flow() == Flow::Stream {
        let read = match opener.read_batch(from, &mut batch) {
            Ok(Some(count)) => Ok(batch[FRONT..FRONT + count].to_vec()),
            Ok(None) => opener.open_one(from).map(Vec::from),
            Err(error) => Err(error),
        };
        match read {
            Ok(bytes) => got.extend(bytes),
            Err(error) => return (got, Err(error)),
        }
    }
    (got, Ok(opener.flow()))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    /// Gives a function what the fuzzer found worth keeping for it, a file each.
    fn each_kept(name: &str, mut try_it: impl FnMut(&[u8])) {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/kept");
        let files = fs::read_dir(folder.join(name)).unwrap();
        let files: Vec<_> = files.map(|file| file.unwrap().path()).collect();
        assert!(!files.is_empty(), "{name}");
        for file in files {
            try_it(&fs::read(file).unwrap());
        }
    }

    macro_rules! kept {
        ($($name:ident),+) => {
            $(#[test]
            fn $name() {
                each_kept(stringify!($name), |bytes| _ = super::$name(bytes));
            })+
        };
    }

    kept!(line, frame, tunnel, proxy_header, request);
    #[cfg(feature = "cli")]
    kept!(config);
}
