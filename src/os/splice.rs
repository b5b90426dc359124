//! Bulk that nobody copies: Linux moves a socket's pages into a pipe, and from there into another
//! socket.

use std::io::{self, PipeReader, PipeWriter, Read, Write, pipe};
use std::os::fd::AsFd;

use rustix::io::{Errno, retry_on_intr};
use rustix::pipe::{SpliceFlags, fcntl_getpipe_size, fcntl_setpipe_size, splice};

use crate::os::limits::Slot;
use crate::os::net::paused;

/// What a pipe is enlarged to: the most that an ordinary user may have (`fs.pipe-max-size`).
const PIPE_SIZE: usize = 1024 * 1024;

/// Less is not worth it. Who has many large pipes gets small ones from the system
/// (`fs.pipe-user-pages-soft`).
const LEAST_SIZE: usize = 64 * 1024;

/// A pipe between two sockets.
pub struct Pipe {
    output: PipeReader,
    input: PipeWriter,
    size: usize,
    filled: usize,
    _slot: Slot,
}

impl Pipe {
    /// None if the system has no descriptors or no room for it. The slot is given back with it.
    pub fn open(slot: Slot) -> Option<Self> {
        let (output, input) = pipe().ok()?;
        let size = fcntl_setpipe_size(&input, PIPE_SIZE).or_else(|_| fcntl_getpipe_size(&input));
        let size = size.ok().filter(|size| *size >= LEAST_SIZE)?;
        Some(Self {
            output,
            input,
            size,
            filled: 0,
            _slot: slot,
        })
    }

    /// Moves into the empty pipe what is there to be read, after waiting if need be. Returns how much
    /// that is, 0 at the end. After an error the pipe is still empty.
    pub fn fill(&mut self, from: impl AsFd) -> io::Result<usize> {
        self.filled = step(from, &self.input, self.size)?;
        Ok(self.filled)
    }

    /// Nothing is left in it.
    pub fn is_empty(&self) -> bool {
        self.filled == 0
    }

    /// Moves out of the pipe as much as there is room for, after waiting if need be, and tells how
    /// much that is. An error that says that there [was none](crate::os::net::limit_write) is not the end.
    /// Where the system does not splice, all of it is copied: nothing is lost.
    pub fn drain(&mut self, mut to: impl AsFd + Write) -> io::Result<usize> {
        let count = match step(&self.output, &to, self.filled) {
            Err(error) if refused(&error) => self.copy(&mut to)?,
            // Not to be tried for ever.
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            moved => moved?,
        };
        self.filled -= count;
        Ok(count)
    }

    /// Not inlined: its buffer has no place on the stack of a thread that never comes here.
    #[cold]
    #[inline(never)]
    fn copy(&mut self, to: &mut impl Write) -> io::Result<usize> {
        let mut buffer = vec![0; self.filled];
        self.output.read_exact(&mut buffer)?;
        let mut left = &buffer[..];
        while !left.is_empty() {
            match to.write(left) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => left = &left[written..],
                // The bytes are in no pipe any more: they wait for room here.
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if paused(&error) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(buffer.len())
    }
}

/// Never with `SPLICE_F_MORE`: the kernel would hold back what may be the last for 200 ms.
fn step(from: impl AsFd, to: impl AsFd, size: usize) -> io::Result<usize> {
    let flags = SpliceFlags::empty();
    Ok(retry_on_intr(|| {
        splice(&from, None, &to, None, size, flags)
    })?)
}

/// True if the system does not splice such files at all, which says nothing about them.
pub fn refused(error: &io::Error) -> bool {
    let refusals = [Errno::INVAL, Errno::NOSYS, Errno::PERM];
    let code = Errno::from_io_error(error);
    code.is_some_and(|code| refusals.contains(&code))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::os::limits::Slots;
    use std::fs::File;
    use std::io::{Seek, Write};

    fn open() -> Pipe {
        Pipe::open(Slots::new(1).try_take().unwrap()).unwrap()
    }

    fn file(content: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(content).unwrap();
        file.rewind().unwrap();
        file
    }

    /// What is in the pipe when the system refuses to splice it out arrives all the same.
    #[test]
    fn what_cannot_be_spliced_out_is_copied() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("appended");
        // Linux does not splice into a file that is only appended to.
        let to = File::options().create(true).append(true).open(&path);
        let to = to.unwrap();
        let content: Vec<u8> = (0..100_000_u32).map(|number| number as u8).collect();
        let mut pipe = open();
        assert_eq!(pipe.fill(file(&content)).unwrap(), content.len());
        assert!(refused(&step(&pipe.output, &to, 1).unwrap_err()));
        assert_eq!(pipe.drain(&to).unwrap(), content.len());
        assert!(pipe.is_empty());
        assert_eq!(std::fs::read(path).unwrap(), content);
    }

    #[test]
    fn what_cannot_be_spliced_in_is_left_alone() {
        let mut pipe = open();
        let folder = File::open("/").unwrap();
        assert!(refused(&pipe.fill(folder).unwrap_err()));
        assert!(pipe.is_empty());
    }
}
