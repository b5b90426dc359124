//! The local service: the first byte that a visitor sends says what it wants.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use rustix::buffer::spare_capacity;
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};

/// What a visitor wants: everything back, bulk bytes from the service, to it, or both at once.
/// Messages to be echoed consist of this byte alone, so that each part of one tells it too.
pub const ECHO: u8 = b'e';
pub const DOWN: u8 = b'd';
pub const UP: u8 = b'u';
pub const BOTH: u8 = b'b';

/// Bytes a system call: so many that bulk costs this process little, which shares the cores with
/// what is measured.
const BULK_BUFFER: usize = 256 * 1024;

/// More bytes than the longest message has.
const ECHO_BUFFER: usize = 16 * 1024;

/// The listener's key among the events. Other keys are descriptors, which are small.
const LISTENER: u64 = u64::MAX;

/// How long the service waits when it has no descriptor left to accept with.
const ACCEPT_PAUSE: Duration = Duration::from_millis(10);

/// What has reached the service, and the bulk bytes that have reached either end.
#[derive(Default)]
pub struct Counts {
    pub accepted: AtomicUsize,
    pub received: AtomicU64,
}

/// Starts the service. It lives as long as the process: all systems lead to it, one by one.
pub fn start() -> io::Result<(SocketAddr, Arc<Counts>)> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let (addr, counts) = (listener.local_addr()?, Arc::<Counts>::default());
    let poll = epoll::create(CreateFlags::CLOEXEC)?;
    watch(&poll, &listener, LISTENER)?;
    let service_counts = counts.clone();
    thread::spawn(move || serve(&listener, &poll, &service_counts));
    Ok((addr, counts))
}

fn watch(poll: &OwnedFd, socket: impl AsFd, key: u64) -> io::Result<()> {
    let key = EventData::new_u64(key);
    Ok(epoll::add(poll, socket, key, EventFlags::IN)?)
}

/// Serves all visitors but those of bulk, which have threads of their own. Sockets block, but each
/// is only read when there is something to read.
fn serve(listener: &TcpListener, poll: &OwnedFd, counts: &Arc<Counts>) {
    let (mut events, mut buffer) = (Vec::with_capacity(256), vec![0; ECHO_BUFFER]);
    let mut visitors = HashMap::new();
    loop {
        // An error is a signal, and the next wait is a new one.
        let _ = epoll::wait(poll, spare_capacity(&mut events), None);
        for key in events.drain(..).map(|event| event.data.u64()) {
            if key == LISTENER {
                match accept(listener, poll, counts) {
                    Ok(visitor) => drop(visitors.insert(visitor.as_raw_fd() as u64, visitor)),
                    Err(_) => thread::sleep(ACCEPT_PAUSE),
                }
            } else if let Some(mut visitor) = visitors.remove(&key) {
                match visitor.read(&mut buffer).map(|count| &buffer[..count]) {
                    Ok(message @ [ECHO, ..]) if visitor.write_all(message).is_ok() => {
                        visitors.insert(key, visitor);
                    }
                    Ok(&[work @ (DOWN | UP | BOTH), ..]) => {
                        let _ = epoll::delete(poll, &visitor);
                        let counts = counts.clone();
                        thread::spawn(move || stream(&visitor, &counts, work != UP, work != DOWN));
                    }
                    // Who has ended is gone with this.
                    _ => {}
                }
            }
        }
    }
}

fn accept(listener: &TcpListener, poll: &OwnedFd, counts: &Counts) -> io::Result<TcpStream> {
    let (visitor, _) = listener.accept()?;
    visitor.set_nodelay(true)?;
    watch(poll, &visitor, visitor.as_raw_fd() as u64)?;
    counts.accepted.fetch_add(1, Ordering::SeqCst);
    Ok(visitor)
}

/// One end of a bulk connection: sends, or counts what is received, or both, until the end.
pub fn stream(socket: &TcpStream, counts: &Counts, sends: bool, receives: bool) {
    let (mut sender, mut receiver, buffer) = (socket, socket, vec![0; BULK_BUFFER]);
    thread::scope(|threads| {
        if sends {
            threads.spawn(move || while sender.write_all(&buffer).is_ok() {});
        }
        if receives {
            let mut buffer = vec![0; BULK_BUFFER];
            while let Ok(count @ 1..) = receiver.read(&mut buffer) {
                counts.received.fetch_add(count as u64, Ordering::Relaxed);
            }
            // Without this, the other direction could wait for ever.
            let _ = socket.shutdown(Shutdown::Both);
        }
    });
}
