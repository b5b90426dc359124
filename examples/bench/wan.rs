//! A relay that hands bytes on after a delay, as a long line between two hosts would.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// What is read at a time.
const BUFFER: usize = 64 * 1024;

/// Takes connections until dropped; those that it has end with their ends.
pub struct Relay {
    pub addr: SocketAddr,
    stopped: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Relay {
    /// Connections to its address go on to `target`, with that delay each way.
    pub fn start(target: SocketAddr, delay: Duration) -> io::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let addr = listener.local_addr()?;
        let stopped = Arc::new(AtomicBool::new(false));
        let stop = stopped.clone();
        let thread = thread::spawn(move || {
            for near in listener.incoming().flatten() {
                if stop.load(Ordering::SeqCst) {
                    return;
                }
                // If the target cannot be reached, the near end sees a close.
                let _ = TcpStream::connect(target).and_then(|far| join(&near, &far, delay));
            }
        });
        Ok(Self {
            addr,
            stopped,
            thread: Some(thread),
        })
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.stopped.store(true, Ordering::SeqCst);
        // Wakes the thread.
        let _ = TcpStream::connect(self.addr);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Starts both directions.
fn join(near: &TcpStream, far: &TcpStream, delay: Duration) -> io::Result<()> {
    for (from, to) in [(near, far), (far, near)] {
        to.set_nodelay(true)?;
        let (mut from, to) = (from.try_clone()?, to.try_clone()?);
        let (queue, due) = mpsc::channel();
        thread::spawn(move || {
            let mut buffer = vec![0; BUFFER];
            while let Ok(count @ 1..) = from.read(&mut buffer) {
                let piece = (Instant::now() + delay, buffer[..count].to_vec());
                if queue.send(piece).is_err() {
                    return;
                }
            }
        });
        thread::spawn(move || hand_on(&due, &to));
    }
    Ok(())
}

/// Writes each piece when it is due, and ends the direction behind the last one.
fn hand_on(pieces: &Receiver<(Instant, Vec<u8>)>, mut to: &TcpStream) {
    for (due, piece) in pieces {
        thread::sleep(due.saturating_duration_since(Instant::now()));
        if to.write_all(&piece).is_err() {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Write);
}
