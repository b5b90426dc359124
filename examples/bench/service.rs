//! The local service: the first byte that a visitor sends says what it is to do.

use std::collections::HashMap;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustix::buffer::spare_capacity;
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};

/// Large enough that bulk bytes cost the service few system calls: it shares the cores with what is
/// measured.
pub const BULK_BUFFER: usize = 256 * 1024;

/// More than the longest message.
const ECHO_BUFFER: usize = 16 * 1024;

/// What comes out of one wait at most; the rest comes out of the next.
const EVENTS: usize = 256;

/// The listener's key among the events; a descriptor is never as large.
const LISTENER: u64 = u64::MAX;

/// What a visitor wants. Messages that are to come back consist of this byte alone, so that a part
/// of one tells it as well.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Work {
    /// Everything back, by the one thread that serves all such visitors.
    Echo,
    /// Everything back, by a thread of its own.
    EchoAlone,
    /// Bytes to the visitor, as fast as it takes them.
    Source,
    /// Bytes from the visitor, as fast as it sends them.
    Sink,
    /// Both at once.
    Both,
}

impl Work {
    pub const fn byte(self) -> u8 {
        match self {
            Self::Echo => b'e',
            Self::EchoAlone => b'a',
            Self::Source => b's',
            Self::Sink => b'k',
            Self::Both => b'b',
        }
    }

    fn of(byte: u8) -> Option<Self> {
        let all = [
            Self::Echo,
            Self::EchoAlone,
            Self::Source,
            Self::Sink,
            Self::Both,
        ];
        all.into_iter().find(|work| work.byte() == byte)
    }
}

/// What has reached the service, and bulk bytes that have reached either end.
#[derive(Default)]
pub struct Counts {
    pub accepted: AtomicUsize,
    pub received: AtomicU64,
}

/// Runs until dropped.
pub struct Service {
    pub addr: SocketAddr,
    pub counts: Arc<Counts>,
    stopped: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Service {
    pub fn start() -> io::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        listener.set_nonblocking(true)?;
        let addr = listener.local_addr()?;
        let poll = epoll::create(CreateFlags::CLOEXEC)?;
        epoll::add(
            &poll,
            &listener,
            EventData::new_u64(LISTENER),
            EventFlags::IN,
        )?;
        let (counts, stopped) = (Arc::<Counts>::default(), Arc::<AtomicBool>::default());
        let mut visitors = Visitors {
            poll,
            listener,
            sockets: HashMap::new(),
            buffer: vec![0; ECHO_BUFFER],
            counts: counts.clone(),
        };
        let stop = stopped.clone();
        let thread = thread::spawn(move || {
            let mut events = Vec::with_capacity(EVENTS);
            while !stop.load(Ordering::SeqCst) {
                let waited = epoll::wait(&visitors.poll, spare_capacity(&mut events), None);
                for event in events.drain(..waited.unwrap_or(0)) {
                    visitors.serve(event.data.u64());
                }
            }
        });
        Ok(Self {
            addr,
            counts,
            stopped,
            thread: Some(thread),
        })
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        self.stopped.store(true, Ordering::SeqCst);
        // Wakes the thread.
        let _ = TcpStream::connect(self.addr);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// All visitors but those that have a thread of their own.
struct Visitors {
    poll: OwnedFd,
    listener: TcpListener,
    sockets: HashMap<u64, TcpStream>,
    buffer: Vec<u8>,
    counts: Arc<Counts>,
}

impl Visitors {
    fn serve(&mut self, key: u64) {
        let served = match key {
            LISTENER => self.accept(),
            _ => self.read(key),
        };
        match served {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            // Such as no descriptor left: not a matter of this visitor, and still so at once.
            Err(_) if key == LISTENER => thread::sleep(Duration::from_millis(10)),
            Err(_) => drop(self.sockets.remove(&key)),
        }
    }

    fn accept(&mut self) -> io::Result<()> {
        let (socket, _) = self.listener.accept()?;
        socket.set_nonblocking(true)?;
        socket.set_nodelay(true)?;
        let key = socket.as_raw_fd() as u64;
        epoll::add(&self.poll, &socket, EventData::new_u64(key), EventFlags::IN)?;
        self.sockets.insert(key, socket);
        self.counts.accepted.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    /// Reads what has come from a visitor, once, and does what it says.
    fn read(&mut self, key: u64) -> io::Result<()> {
        let Some(mut socket) = self.sockets.get(&key) else {
            return Ok(());
        };
        let count = socket.read(&mut self.buffer)?;
        let read = &self.buffer[..count];
        let work = read.first().and_then(|&byte| Work::of(byte));
        let work = work.ok_or(ErrorKind::UnexpectedEof)?;
        if matches!(work, Work::Echo | Work::EchoAlone) {
            socket.write_all(read)?;
        }
        if work != Work::Echo
            && let Some(socket) = self.sockets.remove(&key)
        {
            epoll::delete(&self.poll, &socket)?;
            socket.set_nonblocking(false)?;
            let counts = self.counts.clone();
            // It ends with its connection, and nobody waits for it.
            thread::spawn(move || serve_alone(&socket, work, &counts));
        }
        Ok(())
    }
}

fn serve_alone(socket: &TcpStream, work: Work, counts: &Counts) {
    match work {
        Work::Echo | Work::EchoAlone => drop(echo(socket)),
        Work::Source => drop(pour(socket)),
        Work::Sink => drop(drain(socket, counts)),
        Work::Both => drain_and_pour(socket, counts),
    }
}

fn echo(mut socket: &TcpStream) -> io::Result<()> {
    let mut buffer = vec![0; ECHO_BUFFER];
    while let count @ 1.. = socket.read(&mut buffer)? {
        socket.write_all(&buffer[..count])?;
    }
    Ok(())
}

/// Writes for as long as somebody takes it: the error is that nobody does any more.
pub fn pour(mut socket: &TcpStream) -> io::Error {
    let buffer = vec![0; BULK_BUFFER];
    loop {
        if let Err(error) = socket.write_all(&buffer) {
            return error;
        }
    }
}

/// Counts all that comes until the end.
pub fn drain(mut socket: &TcpStream, counts: &Counts) -> io::Result<()> {
    let mut buffer = vec![0; BULK_BUFFER];
    while let count @ 1.. = socket.read(&mut buffer)? {
        counts.received.fetch_add(count as u64, Ordering::Relaxed);
    }
    Ok(())
}

/// Both at once, until both have ended.
pub fn drain_and_pour(socket: &TcpStream, counts: &Counts) {
    thread::scope(|threads| {
        threads.spawn(|| pour(socket));
        let _ = drain(socket, counts);
        // One direction is of no use alone; without this, the other one could wait for ever.
        let _ = socket.shutdown(Shutdown::Both);
    });
}
