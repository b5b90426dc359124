//! A relay that spoils what passes through it, as bad networks do, and as a test says while it runs.
//! It knows bytes and the ends of connections, and nothing of messages.
#![cfg(target_os = "linux")]

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use parking_lot::{Condvar, Mutex};
use rustix::event::{PollFd, PollFlags, poll};

use super::random::Random;
use super::{DEADLINE, reset_on_close};

/// What the relay does to connections, those of now and new ones. Bytes are counted in each
/// direction of each connection, from when the fault was set.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Fault {
    /// None: bytes, ends and resets pass.
    Pass,
    /// All passes, each chunk so much later.
    Delay(Duration),
    /// All passes, in slices of one byte up to so many, written one by one.
    Slices(usize),
    /// Nothing passes, and nobody is told. All of it does when the hole has gone, as it would be
    /// sent again on a network.
    BlackHole,
    /// After so many bytes both sides are reset.
    Reset(u64),
    /// After so many bytes both sides see a proper end, and what they still send is lost.
    Truncate(u64),
    /// A bit of the byte that comes after so many is another one.
    Flip(u64),
}

/// Stands before a server, and ends with all its connections when dropped.
pub struct FaultyRelay {
    pub addr: SocketAddr,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    to: SocketAddr,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    fault: Fault,
    /// How often a fault was set.
    turn: u64,
    stopped: bool,
    relayed: Vec<Weak<Relayed>>,
}

/// Two connections that are one for those at their ends.
struct Relayed {
    client: TcpStream,
    server: OnceLock<TcpStream>,
    /// Both sides were told that it has ended.
    truncated: AtomicBool,
    /// How many directions have ended well.
    ended: AtomicUsize,
}

/// What one direction has carried since a fault was set.
struct Count {
    turn: u64,
    bytes: u64,
}

impl FaultyRelay {
    /// On any port, to this server.
    pub fn start(to: SocketAddr) -> Self {
        Self::start_on(([127, 0, 0, 1], 0).into(), to)
    }

    /// On this port.
    pub fn start_on(addr: SocketAddr, to: SocketAddr) -> Self {
        let listener = TcpListener::bind(addr).unwrap();
        let addr = listener.local_addr().unwrap();
        let shared = Arc::new(Shared {
            to,
            state: Mutex::new(State {
                fault: Fault::Pass,
                turn: 0,
                stopped: false,
                relayed: Vec::new(),
            }),
            changed: Condvar::new(),
        });
        let accepting = shared.clone();
        Self {
            addr,
            shared,
            thread: Some(thread::spawn(move || accepting.accept(&listener))),
        }
    }

    /// Sets the fault from now on.
    pub fn set(&self, fault: Fault) {
        let mut state = self.shared.state.lock();
        state.fault = fault;
        state.turn += 1;
        self.shared.changed.notify_all();
    }

    /// Resets both sides of every connection, even in a black hole.
    pub fn reset_all(&self) {
        self.shared.all().iter().for_each(|it| it.abort());
    }

    /// Shows both sides of every connection a proper end, even in a black hole.
    pub fn end_all(&self) {
        self.shared.all().iter().for_each(|it| it.truncate());
    }
}

impl Drop for FaultyRelay {
    fn drop(&mut self) {
        self.shared.state.lock().stopped = true;
        self.shared.changed.notify_all();
        self.reset_all();
        // Wakes the thread that accepts.
        let _ = TcpStream::connect(self.addr);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn all(&self) -> Vec<Arc<Relayed>> {
        let state = self.state.lock();
        state.relayed.iter().filter_map(Weak::upgrade).collect()
    }

    /// Ends when all that was accepted has ended.
    fn accept(&self, listener: &TcpListener) {
        thread::scope(|scope| {
            while let Ok((client, _)) = listener.accept() {
                let relayed = Arc::new(Relayed {
                    client,
                    server: OnceLock::new(),
                    truncated: AtomicBool::new(false),
                    ended: AtomicUsize::new(0),
                });
                let mut state = self.state.lock();
                if state.stopped {
                    return relayed.abort();
                }
                state.relayed.retain(|it| it.strong_count() > 0);
                state.relayed.push(Arc::downgrade(&relayed));
                drop(state);
                scope.spawn(move || self.relay(&relayed));
            }
        });
    }

    fn relay(&self, relayed: &Relayed) {
        self.hold();
        let Ok(server) = TcpStream::connect_timeout(&self.to, DEADLINE) else {
            return relayed.abort();
        };
        let (client, server) = (&relayed.client, relayed.server.get_or_init(|| server));
        for socket in [client, server] {
            // Without this the kernel would put slices together again.
            let _ = socket.set_nodelay(true);
        }
        if relayed.truncated.load(Ordering::SeqCst) {
            // The end was shown to the client before this side was there.
            relayed.truncate();
        }
        thread::scope(|scope| {
            scope.spawn(|| self.carry(relayed, client, server));
            self.carry(relayed, server, client);
        });
    }

    /// Waits until something may pass, and says what is to become of it.
    fn hold(&self) -> (Fault, u64) {
        let mut delayed = false;
        loop {
            let mut state = self.state.lock();
            let held = |state: &mut State| state.fault == Fault::BlackHole && !state.stopped;
            self.changed.wait_while(&mut state, held);
            match state.fault {
                Fault::Delay(delay) if !delayed && !state.stopped => {
                    drop(state);
                    thread::sleep(delay);
                    // A hole may have come meanwhile.
                    delayed = true;
                }
                fault => return (fault, state.turn),
            }
        }
    }

    /// Carries one direction until it ends.
    fn carry(&self, relayed: &Relayed, mut from: &TcpStream, to: &TcpStream) {
        let mut buffer = vec![0; 64 * 1024];
        let mut count = Count { turn: 0, bytes: 0 };
        loop {
            let got = from.read(&mut buffer);
            let (fault, turn) = self.hold();
            if turn != count.turn {
                count = Count { turn, bytes: 0 };
            }
            let lost = relayed.truncated.load(Ordering::SeqCst);
            let passed = match got {
                Ok(0) if lost || relayed.is_end(from) => break,
                Ok(1..) if lost => true,
                Ok(size @ 1..) => relayed.pass(fault, &mut count, &mut buffer[..size], to),
                _ => false,
            };
            if !passed && !relayed.truncated.load(Ordering::SeqCst) {
                return relayed.abort();
            }
            if got.is_err() {
                return;
            }
        }
        relayed.end(from, to);
    }
}

impl Relayed {
    /// Passes a chunk on as the fault wants it. Returns false if that is not possible.
    fn pass(&self, fault: Fault, count: &mut Count, mut chunk: &mut [u8], to: &TcpStream) -> bool {
        let before = count.bytes;
        count.bytes += chunk.len() as u64;
        let is_in = |at: u64| (before..count.bytes).contains(&at);
        match fault {
            Fault::Slices(most) => return write_sliced(chunk, most, before, to).is_ok(),
            Fault::Flip(at) if is_in(at) => chunk[(at - before) as usize] ^= 1 << (at % 8),
            Fault::Reset(at) | Fault::Truncate(at) if at <= count.bytes => {
                chunk = &mut chunk[..at.saturating_sub(before) as usize];
            }
            _ => {}
        }
        let written = { to }.write_all(chunk).is_ok();
        match fault {
            Fault::Reset(at) if at <= count.bytes => self.abort(),
            Fault::Truncate(at) if at <= count.bytes => self.truncate(),
            _ => {}
        }
        written
    }

    /// Whether an end of input is no reset. The kernel reports a reset once, and it may have told
    /// the other direction. A connection that has ended both ways looks like one that was reset.
    fn is_end(&self, from: &TcpStream) -> bool {
        self.ended.load(Ordering::SeqCst) > 0 || from.peer_addr().is_ok()
    }

    /// Passes an end on, and looks out for a reset: the other direction need not meet it.
    fn end(&self, from: &TcpStream, to: &TcpStream) {
        self.ended.fetch_add(1, Ordering::SeqCst);
        let _ = to.shutdown(Shutdown::Write);
        // The kernel reports this in any case: a reset, or that the other direction has ended, too.
        let mut hung_up = [PollFd::new(from, PollFlags::empty())];
        let _ = poll(&mut hung_up, None);
        if self.ended.load(Ordering::SeqCst) < 2 && !self.truncated.load(Ordering::SeqCst) {
            self.abort();
        }
    }

    fn sockets(&self) -> impl Iterator<Item = &TcpStream> {
        [&self.client].into_iter().chain(self.server.get())
    }

    fn abort(&self) {
        for socket in self.sockets() {
            reset_on_close(socket);
            // This sends RST right away, whoever is at work on the socket.
            let _ = rustix::net::connect_unspec(socket);
        }
    }

    fn truncate(&self) {
        self.truncated.store(true, Ordering::SeqCst);
        for socket in self.sockets() {
            let _ = socket.shutdown(Shutdown::Write);
        }
    }
}

/// Writes a chunk in slices. `seed` makes their sizes.
fn write_sliced(
    mut chunk: &[u8],
    most: usize,
    seed: u64,
    mut to: &TcpStream,
) -> std::io::Result<()> {
    let mut random = Random::new(seed);
    while !chunk.is_empty() {
        let size = 1 + random.below(most.min(chunk.len()));
        to.write_all(&chunk[..size])?;
        chunk = &chunk[size..];
    }
    Ok(())
}
