//! How a server that stops leaves its ports to the next one without a gap: it gives it the very
//! listeners. What waits in their queues waits on, and nobody is refused or reset in between.
//!
//! 1. A server that is told to stop waits for a moment at a local socket that is named after the address
//!    of its control port. A stranger who has that name already prevents the hand-over, and nothing else.
//! 2. A server that finds its control port in use dials that socket, again and again. Both make sure
//!    that the other one runs as the same user.
//! 3. The old server sends its listeners and accepts no more visitors. The new one keeps visitors in
//!    the queue.
//! 4. Once nobody waits for a tunnel at the old server any more, it closes the local socket, and
//!    ends its sessions. The new one accepts from all ports from now on.

use std::io;
use std::net::{SocketAddr, TcpListener};
#[cfg(target_os = "linux")]
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

#[cfg(target_os = "linux")]
use crate::service::MAX_SERVICES;

/// The server that takes over; dropped, it may accept from all ports.
#[cfg(target_os = "linux")]
pub struct Successor(#[expect(dead_code, reason = "its drop is all that is needed")] UnixStream);

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

    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    use rustix::net::sockopt::socket_peercred;
    use rustix::net::{
        RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
        SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
    };
    use socket2::{Domain, SockAddr, Socket, Type};

    /// Both programs answer without waiting for anything; one that does not is no server.
    const ANSWER: Duration = Duration::from_secs(1);

    /// A server waits for the next one in so many pieces: a host that was paused for seconds, as
    /// virtual ones are, takes one of them at the most. Between two pieces the server looks whether
    /// it has ended meanwhile.
    const SLICES: u32 = 6;

    /// One server asks for the listeners. The rest is room for strangers.
    const BACKLOG: i32 = 128;

    /// What room the listeners take in a message: the control and the tunnel port, and one for each
    /// service.
    const SPACE: usize = rustix::cmsg_space!(ScmRights(2 + MAX_SERVICES));

    /// A local socket, and the name that belongs to this control address. The name is in no file
    /// system, and known only to the programs of the same network namespace, which is where a port
    /// can be in use.
    pub fn socket(control: SocketAddr) -> io::Result<(Socket, SockAddr)> {
        let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
        // A name that begins with a NUL is in no file system.
        Ok((socket, SockAddr::unix(format!("\0tunnel-proxy {control}"))?))
    }

    /// Connects to the server with this control address, if it offers its listeners. A stranger who has
    /// taken the name and accepts nobody is not waited for.
    pub fn connect(control: SocketAddr) -> io::Result<UnixStream> {
        let (socket, name) = socket(control)?;
        socket.set_write_timeout(Some(ANSWER))?;
        socket.connect(&name)?;
        Ok(socket.into())
    }

    fn is_same_user(peer: &UnixStream) -> bool {
        socket_peercred(peer).is_ok_and(|peer| peer.uid == rustix::process::geteuid())
    }

    impl Successor {
        /// Gives the listeners of a server with this control address to the one that asks for them
        /// within this time, if one does before the server has `ended`. Others who connect, however
        /// many, take nothing but the time that passes.
        pub fn find(
            control: SocketAddr,
            listeners: &[&TcpListener],
            within: Duration,
            ended: impl Fn() -> bool,
        ) -> io::Result<Option<Self>> {
            let (offer, name) = socket(control)?;
            offer.bind(&name)?;
            offer.listen(BACKLOG)?;
            let offer = UnixListener::from(offer);
            offer.set_nonblocking(true)?;
            let slice = within / SLICES;
            let timeout = Timespec::try_from(slice).map_err(io::Error::other)?;
            let mut left = within;
            while !left.is_zero() && !ended() {
                let start = Instant::now();
                let mut polled = [PollFd::new(&offer, PollFlags::IN)];
                match poll(&mut polled, Some(&timeout)) {
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
                left = left.saturating_sub(start.elapsed().min(slice));
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
        /// Takes the listener of this server's control address, if a server that stops leaves it to
        /// this one. That server's other listeners can be [taken](Self::take) then.
        pub fn take_control(&mut self, control: SocketAddr) -> Option<TcpListener> {
            let mut inherited = Self::receive(control).ok()?;
            let listener = inherited.take(control)?;
            *self = inherited;
            Some(listener)
        }

        /// Takes the listener of this address, if it was left together with that of the control port.
        /// Nobody is asked for it: a server that has this address as its control one is another one.
        pub fn take(&mut self, address: SocketAddr) -> Option<TcpListener> {
            let is_it = |it: &TcpListener| it.local_addr().is_ok_and(|it| it == address);
            let found = self.listeners.iter().position(is_it)?;
            Some(self.listeners.swap_remove(found))
        }

        /// Closes the listeners at addresses that are not wanted.
        pub fn keep(&mut self, wanted: impl Fn(SocketAddr) -> bool) {
            let is_wanted = |it: &TcpListener| it.local_addr().is_ok_and(&wanted);
            self.listeners.retain(is_wanted);
        }

        fn receive(control: SocketAddr) -> io::Result<Self> {
            let from = connect(control)?;
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
        pub fn find(
            _: SocketAddr,
            _: &[&TcpListener],
            _: Duration,
            _: impl Fn() -> bool,
        ) -> io::Result<Option<Self>> {
            Ok(None)
        }
    }

    #[derive(Default)]
    pub struct Inherited;

    impl Inherited {
        pub fn take_control(&mut self, _: SocketAddr) -> Option<TcpListener> {
            None
        }

        pub fn take(&mut self, _: SocketAddr) -> Option<TcpListener> {
            None
        }

        pub fn keep(&mut self, _: impl Fn(SocketAddr) -> bool) {}

        pub fn wait(self, _: Instant) -> bool {
            true
        }
    }
}

#[cfg(not(target_os = "linux"))]
pub use elsewhere::*;

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;
    use crossbeam_channel::bounded;
    use std::io::Read;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::thread;

    const DEADLINE: Duration = Duration::from_secs(10);

    fn listener() -> (TcpListener, SocketAddr) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        (listener, address)
    }

    /// Does this while a server with this control address offers these listeners, and returns whether
    /// a successor has got them.
    fn while_offered(control: SocketAddr, listeners: &[&TcpListener], work: impl FnOnce()) -> bool {
        let over = AtomicBool::new(false);
        let (looks, looking) = bounded(1);
        let ended = || {
            let _ = looks.try_send(());
            over.load(Ordering::SeqCst)
        };
        thread::scope(|scope| {
            let offer = scope.spawn(|| Successor::find(control, listeners, DEADLINE, ended));
            looking.recv_timeout(DEADLINE).unwrap();
            work();
            over.store(true, Ordering::SeqCst);
            // Wakes the server, if it still waits.
            let _ = linux::connect(control);
            offer.join().unwrap().unwrap().is_some()
        })
    }

    #[test]
    fn those_who_get_nothing_do_not_end_the_offer() {
        let (listener, control) = listener();
        // More than a message has room for, so that nobody can be given these.
        let given = while_offered(control, &[&listener; 80], || {
            for _ in 0..20 {
                let mut refused = linux::connect(control).unwrap();
                refused.set_read_timeout(Some(DEADLINE)).unwrap();
                assert_eq!(refused.read(&mut [0]).unwrap(), 0);
            }
        });
        assert!(!given);
    }

    #[test]
    fn another_servers_control_port_is_nobodys_control_port() {
        let ((listener, control), (other, tunnel)) = (listener(), listener());
        let given = while_offered(control, &[&listener, &other], || {
            let mut inherited = Inherited::default();
            assert!(inherited.take(control).is_none());
            assert!(inherited.take_control(control).is_some());
            inherited.keep(|address| address == tunnel);
            assert!(inherited.take(tunnel).is_some());
        });
        assert!(given);
    }

    #[test]
    fn a_stranger_who_has_the_name_and_accepts_nobody_is_not_waited_for() {
        let (_listener, control) = listener();
        let (deaf, name) = linux::socket(control).unwrap();
        deaf.bind(&name).unwrap();
        deaf.listen(0).unwrap();
        let _in_its_queue = linux::connect(control).unwrap();
        let (tell, told) = bounded(1);
        thread::spawn(move || tell.send(linux::connect(control).is_err()));
        assert_eq!(told.recv_timeout(DEADLINE), Ok(true));
    }
}
