//! A port that is listened on: opened, accepted from, and closed or handed over.

use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
#[cfg(target_os = "linux")]
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::address::Address;
use crate::error::Error;
use crate::os::net;
use crate::stop::{Phase, Stop};

/// A port in use is looked at again this often, and so several times while a server that stops
/// waits for the next one.
const PORT_PAUSE: Duration = Duration::from_millis(20);

/// After a failed accept: short for a visitor, long for a processor.
const ACCEPT_PAUSE: Duration = Duration::from_millis(75);

/// What is to be known while a port is opened.
pub enum Opening {
    /// The port is in use, and waited for, this long at the most.
    InUse(Address, Duration),
    /// The server that has it hands it over.
    HandedOver(SocketAddr),
    /// The server that has handed it over still has visitors who wait, and accepts here, too.
    Shared(SocketAddr),
}

/// A port of the server's.
pub struct Listener {
    /// The option that says where it is.
    pub option: &'static str,
    /// Where it really is.
    pub addr: SocketAddr,
    /// None once nobody accepts from it here any more.
    socket: Mutex<Option<Arc<TcpListener>>>,
    stop: Arc<Stop>,
    /// From this phase on, it takes no more connections than those that are in the queue.
    closes_at: Phase,
    /// Wakes the thread that waits for a connection. To shut the socket down would wake it, too, but
    /// end the port for a server that has taken it over.
    #[cfg(target_os = "linux")]
    wake: OwnedFd,
}

impl Listener {
    /// Listens on the first address of a name that works. A port in use may be that of a server that
    /// is about to end: it is waited for until `patience` ends, or until that server hands it over, and
    /// `taken` returns it. Unless `anywhere`, every address of the name must be a loopback one.
    pub fn find(
        option: &'static str,
        address: &Address,
        anywhere: bool,
        patience: Instant,
        taken: &mut dyn FnMut(SocketAddr) -> Option<TcpListener>,
        told: &dyn Fn(Opening),
    ) -> Result<(TcpListener, SocketAddr), Error> {
        let unknown = |error| Error::Resolve(option, address.clone(), error);
        let found = address.resolve().map_err(unknown)?;
        let open = found.iter().find(|found| !found.ip().is_loopback());
        if let (false, Some(open)) = (anywhere, open) {
            return Err(Error::NotLoopback(option, *open));
        }
        let mut said = false;
        loop {
            let mut failed = unknown(io::ErrorKind::NotFound.into());
            let mut in_use = false;
            for address in &found {
                match net::listen_on(*address) {
                    Ok(listener) => return Ok(listener),
                    Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                        if let Some(listener) = taken(*address) {
                            told(Opening::HandedOver(*address));
                            return Ok((listener, *address));
                        }
                        in_use = true;
                        failed = Error::Listen(option, *address, error);
                    }
                    Err(error) => failed = Error::Listen(option, *address, error),
                }
            }
            let left = patience.saturating_duration_since(Instant::now());
            if !in_use || left.is_zero() {
                return Err(failed);
            }
            if !std::mem::replace(&mut said, true) {
                told(Opening::InUse(address.clone(), left));
            }
            thread::sleep(PORT_PAUSE);
        }
    }

    /// A port that was [found](Self::find).
    pub fn new(
        option: &'static str,
        (socket, addr): (TcpListener, SocketAddr),
        stop: Arc<Stop>,
        closes_at: Phase,
    ) -> Result<Self, Error> {
        let failed = |error| Error::Listen(option, addr, error);
        #[cfg(target_os = "linux")]
        let wake = {
            use rustix::event::{EventfdFlags, eventfd};
            socket.set_nonblocking(true).map_err(failed)?;
            eventfd(0, EventfdFlags::CLOEXEC).map_err(|error| failed(error.into()))?
        };
        #[cfg(not(target_os = "linux"))]
        let _ = failed;
        Ok(Self {
            option,
            addr,
            socket: Mutex::new(Some(Arc::new(socket))),
            stop,
            closes_at,
            #[cfg(target_os = "linux")]
            wake,
        })
    }

    /// The next connection and its place. None once the listener is taken, or closed and its queue is
    /// empty, or no place is left. Where the system can tell, `place` is called when somebody has come, so
    /// that no port keeps a place that another one needs. `failed` is told why an accept has failed.
    pub fn accept<P>(
        &self,
        place: impl Fn() -> Option<P>,
        failed: impl Fn(&io::Error),
    ) -> Option<(TcpStream, SocketAddr, P)> {
        let mut kept = None;
        loop {
            let socket = self.socket()?;
            let waited = self.wait(&socket);
            // Taken meanwhile?
            self.socket()?;
            let closed = self.stop.reached(self.closes_at);
            // It comes first: a connection that was accepted without one would be in nobody's hands.
            let taken = match kept.take() {
                Some(taken) => taken,
                None => place()?,
            };
            match waited.and_then(|()| net::accept(&socket)) {
                // Most likely it is the one that was to wake this thread.
                Ok(_) if closed && cfg!(not(target_os = "linux")) => return None,
                Ok((accepted, from)) => return Some((accepted, from, taken)),
                Err(_) if closed => return None,
                Err(error) => match error.kind() {
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => kept = Some(taken),
                    // Out of descriptors or memory, or the connection was reset in the backlog. All
                    // pass; to end, or to try again at once, would make them worse.
                    _ => {
                        failed(&error);
                        // Meanwhile another port may need the place, and the next program this one.
                        drop((taken, socket));
                        self.stop.sleep(ACCEPT_PAUSE, self.closes_at);
                    }
                },
            }
        }
    }

    /// The socket, as long as connections are accepted from it here.
    pub fn socket(&self) -> Option<Arc<TcpListener>> {
        self.socket.lock().clone()
    }

    /// Takes no connection any more. Those in the queue are reset, unless another program has this
    /// socket, too.
    pub fn take(&self) {
        let socket = self.socket.lock().take();
        self.wake();
        drop(socket);
    }

    /// Lets nobody begin a connection any more, where the system can do that, while those that are under
    /// way still come.
    pub fn let_nobody_begin(&self) {
        #[cfg(target_os = "linux")]
        if let Some(socket) = self.socket() {
            // Without it, a visitor may be reset when the listener is closed.
            let _ = net::let_nobody_begin(&socket);
        }
    }

    /// Waits until there is a connection, or the listener is closed.
    #[cfg(target_os = "linux")]
    fn wait(&self, socket: &TcpListener) -> io::Result<()> {
        use rustix::event::{PollFd, PollFlags, poll};
        let both = [
            PollFd::new(socket, PollFlags::IN),
            PollFd::new(&self.wake, PollFlags::IN),
        ];
        Ok(poll(&mut { both }, None).map(drop)?)
    }

    /// Elsewhere, the accept itself waits.
    #[cfg(not(target_os = "linux"))]
    fn wait(&self, _: &TcpListener) -> io::Result<()> {
        Ok(())
    }

    /// Lets the thread that waits for a connection look whether the port is closed.
    #[cfg(target_os = "linux")]
    pub fn wake(&self) {
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
    }

    /// Lets the thread that waits for a connection look whether the port is closed.
    #[cfg(not(target_os = "linux"))]
    pub fn wake(&self) {
        let mut address = self.addr;
        if address.ip().is_unspecified() {
            address.set_ip(match address {
                SocketAddr::V4(_) => std::net::Ipv4Addr::LOCALHOST.into(),
                SocketAddr::V6(_) => std::net::Ipv6Addr::LOCALHOST.into(),
            });
        }
        let _ = TcpStream::connect_timeout(&address, Duration::from_secs(1));
    }
}
