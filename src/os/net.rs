//! Everything that is set on a socket, and how sockets come to be and are ended.

use std::io;
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use socket2::{Domain, SockRef, Socket, TcpKeepalive, Type};

use crate::address::Address;

/// Each address of a name gets this long to answer a dial: two lost SYNs (1 s, then 2 s) and some.
pub const DIAL_TIMEOUT: Duration = Duration::from_secs(5);

/// A silent connection is probed after this long: well below the 30 s after which the most
/// impatient NATs forget one.
const KEEPALIVE_TIME: Duration = Duration::from_secs(20);

/// And again this often, as long as the probes stay unanswered.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(8);

/// That many unanswered probes end it: 44 s in all.
#[cfg(target_os = "linux")]
const KEEPALIVE_PROBES: u32 = 3;

/// Connections that the kernel completes while a program is busy: Linux' own upper limit
/// (`net.core.somaxconn`) since 5.4.
const BACKLOG: i32 = 4096;

/// What to do when the system has no address for this side of a dial.
const NO_PORT: &str = "; most likely every local port for it is in use, or was within the last minute: \
    allow more (net.ipv4.ip_local_port_range) or their use again at once (net.ipv4.tcp_tw_reuse=1), \
    or have fewer visits";

/// Listens on this address, and returns the real one, too. `[::]` takes IPv4 as well, whatever the
/// system's default is.
pub fn listen_on(address: SocketAddr) -> io::Result<(TcpListener, SocketAddr)> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    if address.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    // Without it a restarted server cannot have its port back for a minute. On Windows the option
    // means something else: it would let two programs share the port.
    #[cfg(unix)]
    socket.set_reuse_address(true)?;
    tune(&socket, None)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    let listener = TcpListener::from(socket);
    let address = listener.local_addr()?;
    Ok((listener, address))
}

/// Lets nobody begin a connection to a listener any more, while those that are under way are completed:
/// a listener that is closed resets what is in its queue, and whatever comes between a last look at the
/// queue and the close. Who comes now is not answered, tries again after a second, and is refused then.
#[cfg(target_os = "linux")]
pub fn let_nobody_begin(listener: &TcpListener) -> io::Result<()> {
    use socket2::SockFilter;
    // Classic BPF. The byte at 13 of a TCP header has the flags, and 2 is that of a beginning, SYN.
    const LOAD_BYTE: u16 = 0x30;
    const SKIP_UNLESS_SET: u16 = 0x45;
    const RETURN: u16 = 0x06;
    let filter = [
        SockFilter::new(LOAD_BYTE, 0, 0, 13),
        SockFilter::new(SKIP_UNLESS_SET, 0, 1, 2),
        SockFilter::new(RETURN, 0, 0, 0),
        SockFilter::new(RETURN, 0, 0, u32::MAX),
    ];
    SockRef::from(listener).attach_filter(&filter)
}

/// Takes a listener's next connection. A peer of IPv4 has an IPv4 address, also where the listener
/// has an IPv6 one: logs and filters of addresses name it as its owner does.
pub fn accept(listener: &TcpListener) -> io::Result<(TcpStream, SocketAddr)> {
    let (socket, mut from) = listener.accept()?;
    from.set_ip(from.ip().to_canonical());
    // Linux hands on what is set on the listener: five system calls less for each connection.
    #[cfg(not(target_os = "linux"))]
    tune(&SockRef::from(&socket), Some(from.ip()))?;
    Ok((socket, from))
}

/// Dials every address of a name in turn, looked up anew each time, until one answers. The connection
/// [resets on close](reset_on_close) from its first moment on if it is to: a program that is killed just
/// then would end it otherwise. The error names the address, and the one of its numbers that was tried
/// last.
pub fn dial(address: &Address, reset: bool) -> io::Result<TcpStream> {
    let named = |kind, error: io::Error| {
        let text = error.to_string();
        let name = address.to_string();
        let text = match text.starts_with(&name) {
            true => text,
            false => format!("{name}: {text}"),
        };
        io::Error::new(kind, text)
    };
    let mut failed = io::Error::from(io::ErrorKind::NotFound);
    let found = address.resolve();
    for number in found.map_err(|error| named(io::ErrorKind::NotFound, error))? {
        match dial_one(number, reset) {
            Ok(socket) => return Ok(socket),
            Err(error) => failed = error,
        }
    }
    Err(named(failed.kind(), failed))
}

/// Dials one address, as [`dial`] does; the error names it.
pub fn dial_one(address: SocketAddr, reset: bool) -> io::Result<TcpStream> {
    let dial = || {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
        if reset {
            socket.set_linger(Some(Duration::ZERO))?;
        }
        tune(&socket, Some(address.ip()))?;
        socket.connect_timeout(&address.into(), DIAL_TIMEOUT)?;
        Ok(socket.into())
    };
    dial().map_err(|error: io::Error| {
        let hint = match error.kind() {
            io::ErrorKind::AddrNotAvailable => NO_PORT,
            _ => "",
        };
        io::Error::new(error.kind(), format!("{address}: {error}{hint}"))
    })
}

/// What all four kinds of connections want: nothing held back for company (a lone keystroke goes
/// out at once), and a dead peer found although nothing is sent. On this host no peer dies unnoticed:
/// that saves four system calls for each dial of a local service.
fn tune(socket: &Socket, peer: Option<IpAddr>) -> io::Result<()> {
    socket.set_tcp_nodelay(true)?;
    if peer.is_some_and(|peer| peer.is_loopback()) {
        return Ok(());
    }
    let keepalive = TcpKeepalive::new()
        .with_time(KEEPALIVE_TIME)
        .with_interval(KEEPALIVE_INTERVAL);
    #[cfg(target_os = "linux")]
    let keepalive = keepalive.with_retries(KEEPALIVE_PROBES);
    socket.set_tcp_keepalive(&keepalive)
}

/// Ends a connection that is written to and never read from when what was written stays
/// unacknowledged for this long. Not for a visitor's bytes: it would end a connection whose reader
/// pauses, too.
pub fn end_when_unacknowledged(socket: &TcpStream, after: Duration) -> io::Result<()> {
    #[cfg(target_os = "linux")]
    SockRef::from(socket).set_tcp_user_timeout(Some(after))?;
    #[cfg(not(target_os = "linux"))]
    let _ = (socket, after);
    Ok(())
}

/// True if an idle connection is open and has nothing to read. Never waits.
pub fn is_quiet(socket: &TcpStream) -> bool {
    #[cfg(target_os = "linux")]
    let peeked = {
        use rustix::net::{RecvFlags, recv};
        recv(socket, &mut [0], RecvFlags::PEEK | RecvFlags::DONTWAIT).map_err(io::Error::from)
    };
    #[cfg(not(target_os = "linux"))]
    let peeked = without_waiting(socket, |socket| socket.peek(&mut [0]));
    peeked.is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock)
}

/// Writes all of this, or fails: with `WriteZero` if there is too little room now. Never waits.
pub fn write_now(socket: &TcpStream, bytes: &[u8]) -> io::Result<()> {
    #[cfg(target_os = "linux")]
    let written = {
        use rustix::net::{SendFlags, send};
        send(socket, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL)?
    };
    #[cfg(not(target_os = "linux"))]
    let written = without_waiting(socket, |mut socket| io::Write::write(&mut socket, bytes))?;
    match written == bytes.len() {
        true => Ok(()),
        false => Err(io::ErrorKind::WriteZero.into()),
    }
}

/// Does something with a connection that no other thread uses just now, and does not wait there.
#[cfg(not(target_os = "linux"))]
fn without_waiting<T>(
    socket: &TcpStream,
    call: impl FnOnce(&TcpStream) -> io::Result<T>,
) -> io::Result<T> {
    socket.set_nonblocking(true)?;
    let result = call(socket);
    socket.set_nonblocking(false)?;
    result
}

/// True if bytes have come that nobody has read yet. Never on systems that cannot tell without
/// waiting.
pub fn has_unread(socket: &TcpStream) -> bool {
    peek_now(socket, &mut [0]) > 0
}

/// Copies what has come and nobody has read yet, and returns how many bytes that is. Always 0 on
/// systems that cannot tell without waiting.
pub fn peek_now(socket: &TcpStream, buffer: &mut [u8]) -> usize {
    #[cfg(target_os = "linux")]
    {
        use rustix::net::{RecvFlags, recv};
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        recv(socket, buffer, flags).map_or(0, |(count, _)| count)
    }
    #[cfg(not(target_os = "linux"))]
    {
        let _ = (socket, buffer);
        0
    }
}

/// True if a read would return at once: bytes have come, the end, or an error. Always true on systems
/// that cannot tell without waiting.
pub fn has_input(socket: &TcpStream) -> bool {
    #[cfg(target_os = "linux")]
    {
        use rustix::event::PollFlags;
        polls(socket, PollFlags::IN | PollFlags::HUP | PollFlags::ERR)
    }
    #[cfg(not(target_os = "linux"))]
    {
        let _ = socket;
        true
    }
}

/// True if one of these events is there now.
#[cfg(target_os = "linux")]
fn polls(socket: &TcpStream, events: rustix::event::PollFlags) -> bool {
    use rustix::event::{PollFd, Timespec, poll};
    let mut polled = [PollFd::new(socket, events)];
    let told = poll(&mut polled, Some(&Timespec::default()));
    told.is_ok() && polled[0].revents().intersects(events)
}

/// True if the far side has finished or reset a connection, whatever is still to be read before
/// that. Never on systems that cannot tell without reading.
pub fn has_hung_up(socket: &TcpStream) -> bool {
    #[cfg(target_os = "linux")]
    {
        use rustix::event::PollFlags;
        polls(socket, PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR)
    }
    #[cfg(not(target_os = "linux"))]
    {
        let _ = socket;
        false
    }
}

/// Whether a close of this connection, by whomever and for whatever reason, sends RST instead of
/// FIN.
pub fn reset_on_close(socket: &TcpStream, reset: bool) {
    // Fails on a connection that has been reset already, where it means nothing.
    let _ = SockRef::from(socket).set_linger(reset.then_some(Duration::ZERO));
}

/// Ends a connection with RST, so that the far end cannot take what it got for all there was, and
/// wakes every thread that waits on it.
pub fn abort(socket: &TcpStream) {
    reset_on_close(socket, true);
    // A shutdown would wake the threads, but send FIN first, which reads like a proper end. To
    // "connect" to nowhere sends RST right away, with other threads still at work on the socket.
    #[cfg(target_os = "linux")]
    if rustix::net::connect_unspec(socket).is_ok() {
        return;
    }
    let _ = socket.shutdown(Shutdown::Both);
}

/// From now on a read that waits longer ends with an error that says so: it [paused]. Only on
/// systems where such an error cannot be taken for a dead peer's.
pub fn limit_pause(socket: &TcpStream, limit: Option<Duration>) -> io::Result<()> {
    #[cfg(unix)]
    socket.set_read_timeout(limit)?;
    #[cfg(not(unix))]
    let _ = (socket, limit);
    Ok(())
}

/// From now on a write that waits for room comes back after this time, with what it has written by
/// then: nothing, an error that says so, is not the end, see [`paused`].
pub fn limit_write(socket: &TcpStream, limit: Duration) {
    // Fails on a connection that has been reset already, where it means nothing.
    #[cfg(unix)]
    let _ = socket.set_write_timeout(Some(limit));
    #[cfg(not(unix))]
    let _ = (socket, limit);
}

/// Waits until the last byte that was written to a connection has left, but not longer than that: a
/// reset takes those with it that have not. Returns at once for a connection that has ended.
pub fn wait_until_sent(socket: &TcpStream, limit: Duration) {
    #[cfg(target_os = "linux")]
    {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        // Now it has room for more only when nothing is left.
        let asked = SockRef::from(socket).set_tcp_notsent_lowat(1);
        if let (Ok(()), Ok(limit)) = (asked, Timespec::try_from(limit)) {
            let _ = poll(&mut [PollFd::new(socket, PollFlags::OUT)], Some(&limit));
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = (socket, limit);
}

/// See [`limit_pause`] and [`limit_write`].
pub fn paused(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::WouldBlock
}

/// True if an error says that a socket's read or write time-out has passed.
pub fn timed_out(error: &io::Error) -> bool {
    // Unix calls it the first, Windows the second.
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Nothing but the system's word says that what is set on a listener holds for its connections.
    #[test]
    fn both_ends_of_a_connection_are_tuned() {
        let any = Address::new("127.0.0.1", 0);
        let any = any.resolve().unwrap()[0];
        let (listener, address) = listen_on(any).unwrap();
        let dialled = dial_one(address, true).unwrap();
        let linger = SockRef::from(&dialled).linger().unwrap();
        assert_eq!(linger, Some(Duration::ZERO));
        let far = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        tune(&far, "192.0.2.1".parse().ok()).unwrap();
        let near = SockRef::from(&dialled);
        assert!(near.tcp_nodelay().unwrap() && !near.keepalive().unwrap());
        for socket in [far, accept(&listener).unwrap().0.into()] {
            assert!(socket.tcp_nodelay().unwrap() && socket.keepalive().unwrap());
            assert_eq!(socket.tcp_keepalive_time().unwrap(), KEEPALIVE_TIME);
            let interval = socket.tcp_keepalive_interval().unwrap();
            assert_eq!(interval, KEEPALIVE_INTERVAL);
        }
    }

    #[test]
    fn a_failed_dial_names_its_address_once() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let open = listener.local_addr().unwrap();
        assert_eq!(
            dial(&open.into(), false).unwrap().peer_addr().unwrap(),
            open
        );
        // Nobody listens there any more, not even a program that another test starts just now and that
        // has the listener, too, until it is executed.
        #[cfg(target_os = "linux")]
        SockRef::from(&listener).shutdown(Shutdown::Both).unwrap();
        drop(listener);
        let error = dial(&open.into(), false).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
        assert!(
            error.to_string().starts_with(&format!("{open}: C")),
            "{error}"
        );
        let name = Address::new("localhost", open.port());
        let error = dial(&name, false).unwrap_err().to_string();
        assert!(error.starts_with(&format!("{name}: ")), "{error}");
        assert!(error.contains(&open.to_string()), "{error}");
    }
}
