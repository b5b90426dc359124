//! A port that is listened on: opened, accepted from, and closed or handed over.

use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
#[cfg(target_os = "linux")]
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::address::Address;
use crate::error::Error;
use crate::hand_over::Inherited;
use crate::net;
use crate::stop::Stop;

/// A port of the server's.
pub struct Listener {
    /// The option that says where it is.
    pub option: &'static str,
    /// Where it really is.
    pub addr: SocketAddr,
    /// None once nobody accepts from it here any more.
    socket: Mutex<Option<Arc<TcpListener>>>,
    closed: Stop,
    /// Wakes the thread that waits for a connection. To shut the socket down would wake it, too, but
    /// end the port for a server that has taken it over.
    #[cfg(target_os = "linux")]
    wake: OwnedFd,
}

impl Listener {
    /// See [`net::listen`].
    pub fn open(
        option: &'static str,
        address: &Address,
        anywhere: bool,
        patience: Instant,
        inherited: &mut Inherited,
    ) -> Result<Self, Error> {
        let (socket, addr) = net::listen(option, address, anywhere, patience, inherited)?;
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
            closed: Stop::new(),
            #[cfg(target_os = "linux")]
            wake,
        })
    }

    /// The next connection, or why there is none at the moment. None once the listener is taken, or
    /// closed and its queue is empty.
    pub fn accept(&self) -> Option<io::Result<(TcpStream, SocketAddr)>> {
        let socket = self.socket()?;
        loop {
            let waited = self.wait(&socket);
            // Taken meanwhile?
            self.socket()?;
            let closed = self.closed.stopped();
            match waited.and_then(|()| net::accept(&socket)) {
                // Most likely it is the one that was to wake this thread.
                Ok(_) if closed && cfg!(not(target_os = "linux")) => return None,
                Ok(accepted) => return Some(Ok(accepted)),
                Err(_) if closed => return None,
                Err(error) => match error.kind() {
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => {}
                    _ => return Some(Err(error)),
                },
            }
        }
    }

    /// The socket, as long as connections are accepted from it here.
    pub fn socket(&self) -> Option<Arc<TcpListener>> {
        self.socket.lock().clone()
    }

    /// Takes no more connections than those that are in the queue.
    pub fn close(&self) {
        if self.closed.stop() {
            self.wake();
        }
    }

    /// Takes no connection any more. Those in the queue are reset, unless another program has this
    /// socket, too.
    pub fn take(&self) {
        let socket = self.socket.lock().take();
        self.close();
        drop(socket);
    }

    /// Waits after a failed accept; false if the listener was closed meanwhile.
    pub fn pause(&self, time: Duration) -> bool {
        self.closed.sleep(time)
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

    #[cfg(target_os = "linux")]
    fn wake(&self) {
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
    }

    #[cfg(not(target_os = "linux"))]
    fn wake(&self) {
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
