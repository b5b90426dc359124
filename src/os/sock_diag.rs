//! What the system knows of a connection, and tells by netlink: see sock_diag(7).

use std::net::{IpAddr, SocketAddr, TcpStream};

use rustix::io::Result;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink};
use rustix::net::{recv, send, socket_with};

/// The kind of the question, and of its answer: one connection.
const SOCK_DIAG_BY_FAMILY: u16 = 20;

/// Every message begins with its length, its kind, and ten bytes more.
const HEADER: usize = 16;

/// Where the question has the two ports and the two addresses. Of a connection, the near one comes first.
const ASKED: usize = HEADER + 8;

/// Where the answer has what is asked for: behind four bytes, the 48 that tell the connection from all
/// others, and two numbers.
const QUEUED: usize = HEADER + 4 + 48 + 8;

/// How many bytes that were written to a connection have not arrived at its far side yet. None if the
/// system does not tell: it has no such interface, or a sandbox refuses it.
pub fn not_arrived(socket: &TcpStream) -> Option<u32> {
    let answer = ask(&question(
        socket.local_addr().ok()?,
        socket.peer_addr().ok()?,
    ))
    .ok()?;
    let kind = u16::from_ne_bytes(*answer[4..].first_chunk()?);
    let queued = u32::from_ne_bytes(*answer[QUEUED..].first_chunk()?);
    (kind == SOCK_DIAG_BY_FAMILY).then_some(queued)
}

fn question(near: SocketAddr, far: SocketAddr) -> [u8; ASKED + 48] {
    // The program asks for something, and of TCP.
    const REQUEST: u16 = 1;
    const TCP: u8 = 6;
    let mut question = [0; ASKED + 48];
    let mut put = |at: usize, bytes: &[u8]| question[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &(ASKED as u32 + 48).to_ne_bytes());
    put(4, &SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    put(6, &REQUEST.to_ne_bytes());
    // In any state.
    put(HEADER + 4, &u32::MAX.to_ne_bytes());
    let ends = [near, far].map(|it| (it.port(), it.ip().to_canonical()));
    for (place, (port, ip)) in ends.into_iter().enumerate() {
        put(ASKED + 2 * place, &port.to_be_bytes());
        let (family, at) = (HEADER, ASKED + 4 + 16 * place);
        match ip {
            IpAddr::V4(ip) => {
                put(family, &[AddressFamily::INET.as_raw() as u8, TCP]);
                put(at, &ip.octets());
            }
            IpAddr::V6(ip) => {
                put(family, &[AddressFamily::INET6.as_raw() as u8, TCP]);
                put(at, &ip.octets());
            }
        }
    }
    if let SocketAddr::V6(near) = near {
        // The interface of an address that only its link knows.
        put(ASKED + 36, &near.scope_id().to_ne_bytes());
    }
    // Whatever the number that the kernel itself gave the connection.
    put(ASKED + 40, &u64::MAX.to_ne_bytes());
    question
}

/// The system has answered when the question is sent.
fn ask(question: &[u8]) -> Result<[u8; 256]> {
    let (family, kind) = (AddressFamily::NETLINK, SocketType::DGRAM);
    let protocol = Some(netlink::SOCK_DIAG);
    let system = socket_with(family, kind, SocketFlags::CLOEXEC, protocol)?;
    send(&system, question, SendFlags::DONTWAIT)?;
    let mut answer = [0; 256];
    recv(&system, &mut answer, RecvFlags::DONTWAIT)?;
    Ok(answer)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::os::net::{accept, listen_on};
    use std::io::{Read, Write};

    #[test]
    fn the_system_tells_what_has_not_arrived() {
        // A visitor of IPv4 at a listener for all addresses, and one of IPv6.
        for (listen, visit) in [
            ("127.0.0.1", "127.0.0.1"),
            ("::", "127.0.0.1"),
            ("::1", "::1"),
        ] {
            let (listener, at) = listen_on((listen.parse::<IpAddr>().unwrap(), 0).into()).unwrap();
            let mut far = TcpStream::connect((visit, at.port())).unwrap();
            let (mut near, _) = accept(&listener).unwrap();
            near.set_nonblocking(true).unwrap();
            let mut written = 0;
            while let Ok(count) = near.write(&[7; 1 << 16]) {
                written += count;
            }
            let queued = not_arrived(&near).unwrap() as usize;
            assert!((1..written).contains(&queued), "{queued} of {written}");
            far.read_exact(&mut vec![0; written]).unwrap();
            let start = std::time::Instant::now();
            while not_arrived(&near) != Some(0) {
                assert!(start.elapsed().as_secs() < 10);
            }
        }
    }
}
