//! Everything that is set on a socket, and how sockets come to be and are ended.

use std::io;
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use socket2::{Domain, SockRef, Socket, TcpKeepalive, Type};

use crate::address::Address;
use crate::error::Error;

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

/// Listens on the first address of a name that works. `[::]` takes IPv4 too, whatever the system's
/// default is. Unless `anywhere`, every address of the name must be a loopback one.
pub fn listen(
    option: &'static str,
    address: &Address,
    anywhere: bool,
) -> Result<TcpListener, Error> {
    let found = address
        .resolve()
        .map_err(|error| Error::Resolve(option, address.clone(), error))?;
    let open = found.iter().find(|found| !found.ip().is_loopback());
    if let (false, Some(open)) = (anywhere, open) {
        return Err(Error::NotLoopback(option, *open));
    }
    let mut failed = None;
    for address in found {
        match listen_on(address) {
            Ok(listener) => return Ok(listener),
            Err(error) => failed = Some(Error::Listen(option, address, error)),
        }
    }
    Err(failed
        .unwrap_or_else(|| Error::Resolve(option, address.clone(), io::ErrorKind::NotFound.into())))
}

fn listen_on(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    if address.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    // Without it a restarted server cannot have its port back for a minute. On Windows the option
    // means something else: it would let two programs share the port.
    #[cfg(unix)]
    socket.set_reuse_address(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// Wakes the thread that waits in `accept` on this listener, for good.
pub fn unblock(listener: &TcpListener) {
    // Elsewhere than on Linux a listener does not take a shutdown, but a connection wakes it too.
    let woken = SockRef::from(listener).shutdown(Shutdown::Both).is_ok();
    if let (false, Ok(mut address)) = (woken, listener.local_addr()) {
        if address.ip().is_unspecified() {
            address.set_ip(match address {
                SocketAddr::V4(_) => std::net::Ipv4Addr::LOCALHOST.into(),
                SocketAddr::V6(_) => std::net::Ipv6Addr::LOCALHOST.into(),
            });
        }
        let _ = TcpStream::connect_timeout(&address, Duration::from_secs(1));
    }
}

/// Dials every address in turn until one answers; the error is that of the last one, and names it.
pub fn dial(addresses: &[SocketAddr]) -> io::Result<TcpStream> {
    let mut failed = io::Error::from(io::ErrorKind::NotFound);
    for address in addresses {
        match TcpStream::connect_timeout(address, DIAL_TIMEOUT).and_then(tune) {
            Ok(socket) => return Ok(socket),
            Err(error) => failed = io::Error::new(error.kind(), format!("{address}: {error}")),
        }
    }
    Err(failed)
}

/// What all four kinds of connections want: nothing held back for company (a lone keystroke goes
/// out at once), and a dead peer found although nothing is sent.
pub fn tune(socket: TcpStream) -> io::Result<TcpStream> {
    socket.set_nodelay(true)?;
    let keepalive = TcpKeepalive::new()
        .with_time(KEEPALIVE_TIME)
        .with_interval(KEEPALIVE_INTERVAL);
    #[cfg(target_os = "linux")]
    let keepalive = keepalive.with_retries(KEEPALIVE_PROBES);
    SockRef::from(&socket).set_tcp_keepalive(&keepalive)?;
    Ok(socket)
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

/// True if an idle, non-blocking connection is open and has nothing to read.
pub fn is_quiet(socket: &TcpStream) -> bool {
    let peeked = socket.peek(&mut [0]);
    peeked.is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock)
}

/// Ends a connection with RST, so that the far end cannot take what it got for all there was, and
/// wakes every thread that waits on it.
pub fn abort(socket: &TcpStream) {
    let _ = SockRef::from(socket).set_linger(Some(Duration::ZERO));
    // A shutdown would wake the threads, but send FIN first, which reads like a proper end. To
    // "connect" to nowhere sends RST right away, with other threads still at work on the socket.
    #[cfg(target_os = "linux")]
    if rustix::net::connect_unspec(socket).is_ok() {
        return;
    }
    let _ = socket.shutdown(Shutdown::Both);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dial_tries_every_address_and_names_the_last() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let open = listener.local_addr().unwrap();
        // A port that was just given back: nobody listens there.
        let dead = TcpListener::bind("127.0.0.1:0").unwrap();
        let closed = dead.local_addr().unwrap();
        drop(dead);
        let socket = dial(&[closed, open]).unwrap();
        assert_eq!(socket.peer_addr().unwrap(), open);
        let error = dial(&[closed]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
        assert!(error.to_string().contains(&closed.to_string()), "{error}");
    }
}
