//! How a server that stops leaves its ports to the next one without a gap: it gives it the very
//! listeners. What waits in their queues waits on, and nobody is refused or reset in between.
//!
//! 1. A server that is told to stop waits for a moment at a local socket that is named after its
//!    public address. No other program can, before that: a port in use is in use.
//! 2. A server that finds its public port in use dials that socket, again and again. Both make sure
//!    that the other one runs as the same user.
//! 3. The old server sends its listeners and accepts no more visitors. The new one keeps visitors in
//!    the queue.
//! 4. Once nobody waits for a tunnel at the old server any more, it closes the local socket, and
//!    ends its session. The new one accepts from all three ports from now on.

use std::io;
use std::net::{SocketAddr, TcpListener};
#[cfg(target_os = "linux")]
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

/// The server that takes over; dropped, it may accept from all ports.
#[cfg(target_os = "linux")]
pub struct Successor(#[expect(dead_code)] UnixStream);

/// The listeners that a server left to this one.
#[cfg(target_os = "linux")]
#[derive(Default)]
pub struct Inherited {
    listeners: Vec<TcpListener>,
    from: Option<UnixStream>,
}

#[cfg(target_os = "linux")]
mod linux {
    use super::*;
    use std::io::{IoSlice, IoSliceMut, Read};
    use std::mem::MaybeUninit;
    use std::os::fd::AsFd;
    use std::os::linux::net::SocketAddrExt;

    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    use rustix::net::sockopt::socket_peercred;
    use rustix::net::{
        RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
        SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
    };

    /// Both programs answer without waiting for anything; one that does not is no server.
    const ANSWER: Duration = Duration::from_secs(1);

    /// A server waits for the next one in so many pieces: a host that was paused for seconds, as
    /// virtual ones are, takes one of them at the most.
    const SLICES: u32 = 6;

    /// What room the three listeners take in a message.
    const SPACE: usize = rustix::cmsg_space!(ScmRights(3));

    /// The name is in no file system, and known only to the programs of the same network namespace,
    /// which is where a port can be in use.
    fn name(public: SocketAddr) -> io::Result<std::os::unix::net::SocketAddr> {
        let name = format!("tunnel-proxy {public}");
        std::os::unix::net::SocketAddr::from_abstract_name(name)
    }

    fn is_same_user(peer: &UnixStream) -> bool {
        socket_peercred(peer).is_ok_and(|peer| peer.uid == rustix::process::geteuid())
    }

    impl Successor {
        /// Gives the listeners of a server with this public address to the one that asks for them
        /// within this time, if one does.
        pub fn find(
            public: SocketAddr,
            listeners: &[&TcpListener],
            within: Duration,
        ) -> io::Result<Option<Self>> {
            let offer = UnixListener::bind_addr(&name(public)?)?;
            offer.set_nonblocking(true)?;
            let slice = Timespec::try_from(within / SLICES).map_err(io::Error::other)?;
            for _ in 0..SLICES {
                let mut polled = [PollFd::new(&offer, PollFlags::IN)];
                match poll(&mut polled, Some(&slice)) {
                    Ok(_) | Err(rustix::io::Errno::INTR) => {}
                    Err(error) => return Err(error.into()),
                }
                match offer.accept() {
                    Ok((asks, _)) if is_same_user(&asks) => {
                        if give(&asks, listeners).is_ok() {
                            return Ok(Some(Self(asks)));
                        }
                    }
                    // A stranger's.
                    Ok(_) => {}
                    // None yet.
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    Err(error) => return Err(error),
                }
            }
            Ok(None)
        }
    }

    fn give(to: &UnixStream, listeners: &[&TcpListener]) -> io::Result<()> {
        to.set_write_timeout(Some(ANSWER))?;
        let descriptors: Vec<_> = listeners.iter().map(|it| it.as_fd()).collect();
        let mut space = [MaybeUninit::uninit(); SPACE];
        let mut message = SendAncillaryBuffer::new(&mut space);
        if !message.push(SendAncillaryMessage::ScmRights(&descriptors)) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        // Descriptors travel with a byte only.
        sendmsg(to, &[IoSlice::new(&[0])], &mut message, SendFlags::NOSIGNAL)?;
        Ok(())
    }

    impl Inherited {
        /// The listener of this address, if a server that stops has left it to this one.
        pub fn take(&mut self, address: SocketAddr) -> Option<TcpListener> {
            if self.from.is_none()
                && let Ok(inherited) = Self::receive(address)
            {
                *self = inherited;
            }
            let is_it = |it: &TcpListener| it.local_addr().is_ok_and(|it| it == address);
            let found = self.listeners.iter().position(is_it)?;
            Some(self.listeners.swap_remove(found))
        }

        fn receive(public: SocketAddr) -> io::Result<Self> {
            let from = UnixStream::connect_addr(&name(public)?)?;
            if !is_same_user(&from) {
                return Err(io::ErrorKind::PermissionDenied.into());
            }
            from.set_read_timeout(Some(ANSWER))?;
            let mut space = [MaybeUninit::uninit(); SPACE];
            let mut messages = RecvAncillaryBuffer::new(&mut space);
            let mut byte = [0];
            let mut bytes = [IoSliceMut::new(&mut byte)];
            recvmsg(&from, &mut bytes, &mut messages, RecvFlags::CMSG_CLOEXEC)?;
            let mut listeners = Vec::new();
            for message in messages.drain() {
                if let RecvAncillaryMessage::ScmRights(descriptors) = message {
                    listeners.extend(descriptors.map(TcpListener::from));
                }
            }
            Ok(Self {
                listeners,
                from: Some(from),
            })
        }

        /// Waits until the server that left the listeners accepts from none of them any more; false
        /// if that takes too long.
        pub fn wait(self, patience: Instant) -> bool {
            let Some(mut from) = self.from else {
                return true;
            };
            let left = patience.saturating_duration_since(Instant::now());
            let limited = from.set_read_timeout(Some(left.max(Duration::from_millis(1))));
            // Nothing is sent any more: what comes is the end, or nothing in time.
            let read = limited.and_then(|()| from.read_exact(&mut [0]));
            read.is_err_and(|error| error.kind() == io::ErrorKind::UnexpectedEof)
        }
    }
}

/// Elsewhere a port is free when the old server has closed it.
#[cfg(not(target_os = "linux"))]
mod elsewhere {
    use super::*;

    pub enum Successor {}

    impl Successor {
        pub fn find(_: SocketAddr, _: &[&TcpListener], _: Duration) -> io::Result<Option<Self>> {
            Ok(None)
        }
    }

    #[derive(Default)]
    pub struct Inherited;

    impl Inherited {
        pub fn take(&mut self, _: SocketAddr) -> Option<TcpListener> {
            None
        }

        pub fn wait(self, _: Instant) -> bool {
            true
        }
    }
}

#[cfg(not(target_os = "linux"))]
pub use elsewhere::*;
