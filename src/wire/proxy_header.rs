//! The header of the PROXY protocol: what a proxy says first on a connection, so that the far side
//! learns the addresses of the connection that the proxy took. HAProxy's
//! [specification](https://github.com/haproxy/haproxy/blob/master/doc/proxy-protocol.txt) has two
//! versions, a line of text and a block of bytes.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;

/// The longest header of version 1, with its CR LF.
const MAX_V1: usize = 107;

/// The longest header of version 2 that is read: the smallest segment that every host takes, in which
/// the specification wants the whole header to fit.
pub const MAX_V2: usize = 536;

/// What version 1 begins with.
const V1: &[u8] = b"PROXY ";

/// What version 2 begins with.
const V2: &[u8] = b"\r\n\r\n\0\r\nQUIT\n";

/// The part of version 2 that every header has: what it begins with, version and command, family and
/// transport, and the length of the rest.
const V2_FIXED: usize = V2.len() + 4;

/// Version 2 in the higher half of a byte, with the command LOCAL in the lower one: the proxy itself
/// has something to ask.
const V2_LOCAL: u8 = 0x20;

/// The same with the command PROXY: the connection is that of somebody else.
const V2_PROXY: u8 = 0x21;

/// TCP over IPv4: the family in the higher half of a byte, the transport in the lower one.
const TCP4: u8 = 0x11;

/// TCP over IPv6.
const TCP6: u8 = 0x21;

/// A version of the PROXY protocol's header, which tells a service where its visitor comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProxyVersion {
    /// A line of text.
    V1,
    /// A block of bytes.
    V2,
}

/// The two ends of the connection that a proxy took.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Addresses {
    /// Where the connection comes from.
    pub source: SocketAddr,
    /// What the connection was made to.
    pub destination: SocketAddr,
}

impl Addresses {
    /// Returns both hosts in one family, as a header has one for both: IPv4 if both are, also if they
    /// are written as IPv6, and otherwise IPv6.
    fn hosts(&self) -> (IpAddr, IpAddr) {
        let source = self.source.ip().to_canonical();
        let destination = self.destination.ip().to_canonical();
        match source.is_ipv4() && destination.is_ipv4() {
            true => (source, destination),
            false => (as_ipv6(source), as_ipv6(destination)),
        }
    }
}

/// Returns an IPv4 address as the IPv6 one that stands for it.
fn as_ipv6(host: IpAddr) -> IpAddr {
    match host {
        IpAddr::V4(host) => host.to_ipv6_mapped().into(),
        IpAddr::V6(_) => host,
    }
}

impl ProxyVersion {
    /// Returns a header for these addresses, or the one that says that they are not known.
    pub(crate) fn header(self, addresses: Option<Addresses>) -> Vec<u8> {
        let Some(addresses) = addresses else {
            return match self {
                Self::V1 => b"PROXY UNKNOWN\r\n".to_vec(),
                Self::V2 => [V2, &[V2_LOCAL, 0, 0, 0]].concat(),
            };
        };
        let (source, destination) = addresses.hosts();
        let ports = [addresses.source.port(), addresses.destination.port()];
        match self {
            Self::V1 => {
                let family = if source.is_ipv4() { "TCP4" } else { "TCP6" };
                let [from, to] = ports;
                format!("PROXY {family} {source} {destination} {from} {to}\r\n").into_bytes()
            }
            Self::V2 => {
                let mut block = Vec::new();
                for host in [source, destination] {
                    match host {
                        IpAddr::V4(host) => block.extend(host.octets()),
                        IpAddr::V6(host) => block.extend(host.octets()),
                    }
                }
                block.extend(ports.iter().flat_map(|port| port.to_be_bytes()));
                let family = if source.is_ipv4() { TCP4 } else { TCP6 };
                // 12 or 36 bytes.
                let fixed = [V2_PROXY, family, 0, block.len() as u8];
                [V2, &fixed, &block].concat()
            }
        }
    }
}

impl FromStr for ProxyVersion {
    type Err = NotProxyVersion;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "v1" => Ok(Self::V1),
            "v2" => Ok(Self::V2),
            _ => Err(NotProxyVersion),
        }
    }
}

/// Neither `v1` nor `v2`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NotProxyVersion;

impl fmt::Display for NotProxyVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the PROXY protocol has v1 (text) and v2 (binary) only")
    }
}

impl std::error::Error for NotProxyVersion {}

/// What the first bytes of a connection are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parsed {
    /// The beginning of a header. The rest is to be read and all of it parsed again.
    Incomplete,
    /// A whole header, and perhaps bytes of the stream behind it.
    Header {
        /// The length of the header.
        length: usize,
        /// What the header tells. None: the connection's own addresses are the right ones.
        addresses: Option<Addresses>,
    },
}

/// Reads a header of either version from the first bytes of a connection. As many as the longest
/// header has are never incomplete. An IPv4 address that is written as an IPv6 one is an IPv4 address.
///
/// # Errors
/// No header can begin like that, or a longer one than is read. The connection is to be aborted.
pub fn parse(bytes: &[u8]) -> Result<Parsed, BadHeader> {
    if begins_alike(bytes, V1) {
        parse_v1(bytes)
    } else if begins_alike(bytes, V2) {
        parse_v2(bytes)
    } else {
        Err(BadHeader::Missing)
    }
}

/// Returns true if one begins with the other.
fn begins_alike(one: &[u8], other: &[u8]) -> bool {
    one.iter().zip(other).all(|(one, other)| one == other)
}

fn parse_v1(bytes: &[u8]) -> Result<Parsed, BadHeader> {
    let bytes = &bytes[..bytes.len().min(MAX_V1)];
    let rest = bytes.get(V1.len()..).unwrap_or_default();
    let proxied = begins_alike(rest, b"TCP4 ") || begins_alike(rest, b"TCP6 ");
    if !(proxied || begins_alike(rest, b"UNKNOWN ") || begins_alike(rest, b"UNKNOWN\r\n")) {
        return Err(BadHeader::Protocol);
    }
    let Some(end) = rest.windows(2).position(|two| two == b"\r\n") else {
        let line = rest.strip_suffix(b"\r").unwrap_or(rest);
        // Behind UNKNOWN everything but CR LF is ignored.
        let broken = proxied && line.iter().any(|byte| b"\r\n".contains(byte));
        return match broken || bytes.len() == MAX_V1 {
            true => Err(BadHeader::NoLine),
            false => Ok(Parsed::Incomplete),
        };
    };
    let addresses = match proxied {
        true => Some(parse_line(&rest[..end])?),
        false => None,
    };
    Ok(Parsed::Header {
        length: V1.len() + end + 2,
        addresses,
    })
}

/// Reads what stands between `PROXY ` and the end of the line.
fn parse_line(line: &[u8]) -> Result<Addresses, BadHeader> {
    let line = str::from_utf8(line).map_err(|_| BadHeader::Address)?;
    let parts: Vec<_> = line.split(' ').collect();
    let [family, source, destination, source_port, destination_port] = parts[..] else {
        return Err(BadHeader::Parts);
    };
    let host = |text: &str| match family {
        "TCP4" => text.parse().map(IpAddr::V4),
        _ => text.parse().map(IpAddr::V6),
    };
    let port = |text: &str| {
        let port: u16 = text.parse().map_err(|_| BadHeader::Port)?;
        // Neither `+80` nor `080`.
        match port.to_string() == text {
            true => Ok(port),
            false => Err(BadHeader::Port),
        }
    };
    let end = |text: &str, port| {
        let host = host(text).map_err(|_| BadHeader::Address)?;
        Ok(SocketAddr::new(host.to_canonical(), port))
    };
    Ok(Addresses {
        source: end(source, port(source_port)?)?,
        destination: end(destination, port(destination_port)?)?,
    })
}

fn parse_v2(bytes: &[u8]) -> Result<Parsed, BadHeader> {
    // What no further byte can mend is refused at once.
    let command = bytes.get(V2.len()).copied();
    match command {
        None | Some(V2_LOCAL | V2_PROXY) => (),
        Some(byte) if byte >> 4 != 2 => return Err(BadHeader::Version(byte >> 4)),
        Some(byte) => return Err(BadHeader::Command(byte & 0xf)),
    }
    let Some((fixed, rest)) = bytes.split_first_chunk::<V2_FIXED>() else {
        return Ok(Parsed::Incomplete);
    };
    let [.., command, family, high, low] = *fixed;
    let rest_length = usize::from(u16::from_be_bytes([high, low]));
    let length = V2_FIXED + rest_length;
    if length > MAX_V2 {
        return Err(BadHeader::TooLong(length));
    }
    let needed = match (command, family) {
        // Whatever a LOCAL header says is ignored.
        (V2_LOCAL, _) => 0,
        (_, TCP4) => 12,
        (_, TCP6) => 36,
        // Known, but not TCP over IP: unspecified, IP, Unix; unspecified, stream, datagram.
        _ if family >> 4 <= 3 && family & 0xf <= 2 => 0,
        _ => return Err(BadHeader::Family(family)),
    };
    if rest_length < needed {
        return Err(BadHeader::TooShort(rest_length));
    }
    let Some(rest) = rest.get(..rest_length) else {
        return Ok(Parsed::Incomplete);
    };
    let addresses = match needed {
        12 => addresses::<4>(rest),
        36 => addresses::<16>(rest),
        _ => None,
    };
    Ok(Parsed::Header { length, addresses })
}

/// Reads two hosts of `N` bytes each, then their ports. None if there are fewer bytes.
fn addresses<const N: usize>(bytes: &[u8]) -> Option<Addresses>
where
    IpAddr: From<[u8; N]>,
{
    let (source, bytes) = bytes.split_first_chunk::<N>()?;
    let (destination, bytes) = bytes.split_first_chunk::<N>()?;
    let (ports, _) = bytes.split_first_chunk::<4>()?;
    let end = |host: &[u8; N], port| {
        let host = IpAddr::from(*host).to_canonical();
        SocketAddr::new(host, u16::from_be_bytes(port))
    };
    Some(Addresses {
        source: end(source, [ports[0], ports[1]]),
        destination: end(destination, [ports[2], ports[3]]),
    })
}

/// Why the first bytes of a connection are no header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BadHeader {
    /// They begin as neither version does.
    Missing,
    /// Version 1 with another protocol than TCP over IPv4 or IPv6, or an unknown one.
    Protocol,
    /// Version 1 without CR LF where the line must have ended.
    NoLine,
    /// Version 1 with more or fewer parts than two hosts and two ports, one space before each.
    Parts,
    /// Version 1 with a host that is no address of its family.
    Address,
    /// Version 1 with a port that is no number from 0 to 65535 without leading zeros.
    Port,
    /// This version, written as version 2 is.
    Version(u8),
    /// Version 2 with a command that nobody knows.
    Command(u8),
    /// Version 2 with a family or a transport that nobody knows.
    Family(u8),
    /// Version 2 with fewer bytes than its addresses have.
    TooShort(usize),
    /// Version 2 with more bytes than are read.
    TooLong(usize),
}

/// Behind "refused visitor through …: ".
impl fmt::Display for BadHeader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("its PROXY protocol header ")?;
        match self {
            Self::Missing => f.write_str(
                "is missing: tell the proxy to send one (HAProxy: send-proxy-v2, nginx: \
                 proxy_protocol on)",
            ),
            Self::Protocol => f.write_str("(v1) has another protocol than TCP4, TCP6 and UNKNOWN"),
            Self::NoLine => write!(
                f,
                "(v1) has no CR LF at the end, or more than {MAX_V1} bytes"
            ),
            Self::Parts => f.write_str("(v1) has not two addresses and two ports"),
            Self::Address => f.write_str("(v1) has an address that is none of its family"),
            Self::Port => f.write_str("(v1) has a port that is not written as 0 to 65535"),
            Self::Version(version) => write!(f, "has version {version}, which is unknown"),
            Self::Command(command) => write!(f, "(v2) has command {command}, which is unknown"),
            Self::Family(family) => write!(f, "(v2) has family {family:#04x}, which is unknown"),
            Self::TooShort(length) => write!(
                f,
                "(v2) has only {length} bytes behind its length, too few for its addresses"
            ),
            Self::TooLong(length) => write!(
                f,
                "(v2) has {length} bytes, and at most {MAX_V2} are read: let the proxy send fewer \
                 TLVs"
            ),
        }
    }
}

impl std::error::Error for BadHeader {}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{fuzz, seeded};
    use BadHeader::{
        Address, Command, Family, Missing, NoLine, Parts, Port, Protocol, TooLong, TooShort,
    };

    /// Behind all that version 2 begins with.
    fn v2(rest: &[u8]) -> Vec<u8> {
        [V2, rest].concat()
    }

    fn addresses(source: &str, destination: &str) -> Option<Addresses> {
        Some(Addresses {
            source: source.parse().unwrap(),
            destination: destination.parse().unwrap(),
        })
    }

    /// Reads a header that has nothing behind it.
    fn whole(bytes: &[u8]) -> Option<Addresses> {
        match parse(bytes) {
            Ok(Parsed::Header { length, addresses }) if length == bytes.len() => addresses,
            other => panic!("{}: {other:?}", bytes.escape_ascii()),
        }
    }

    fn assert_text(source: &str, destination: &str, text: &str) {
        let header = ProxyVersion::V1.header(addresses(source, destination));
        assert_eq!(String::from_utf8(header).unwrap(), text);
    }

    fn assert_block(source: &str, destination: &str, block: &[u8]) {
        let header = ProxyVersion::V2.header(addresses(source, destination));
        assert_eq!(header, v2(block));
    }

    const MAPPED: [u8; 12] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff];
    const DOC: [u8; 15] = [0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

    #[test]
    fn ipv4_is_written() {
        let text = "PROXY TCP4 192.0.2.1 203.0.113.9 51034 443\r\n";
        assert_text("192.0.2.1:51034", "203.0.113.9:443", text);
        let mut block = vec![0x21, 0x11, 0, 12, 192, 0, 2, 1, 203, 0, 113, 9];
        block.extend([0xc7, 0x5a, 1, 0xbb]);
        assert_block("192.0.2.1:51034", "203.0.113.9:443", &block);
    }

    #[test]
    fn ipv6_is_written() {
        let text = "PROXY TCP6 2001:db8::1 2001:db8::2 1 65535\r\n";
        assert_text("[2001:db8::1]:1", "[2001:db8::2]:65535", text);
        let fixed = [0x21, 0x21, 0, 36];
        let block = [&fixed[..], &DOC, &[1], &DOC, &[2], &[0, 1], &[255, 255]];
        assert_block("[2001:db8::1]:1", "[2001:db8::2]:65535", &block.concat());
    }

    #[test]
    fn mapped_ipv4_is_written_as_ipv4() {
        let text = "PROXY TCP4 192.0.2.1 203.0.113.9 1 2\r\n";
        let block = [0x21, 0x11, 0, 12, 192, 0, 2, 1, 203, 0, 113, 9, 0, 1, 0, 2];
        for (source, destination) in [
            ("[::ffff:192.0.2.1]:1", "[::ffff:203.0.113.9]:2"),
            ("[::ffff:192.0.2.1]:1", "203.0.113.9:2"),
            ("192.0.2.1:1", "[::ffff:203.0.113.9]:2"),
        ] {
            assert_text(source, destination, text);
            assert_block(source, destination, &block);
        }
    }

    #[test]
    fn mixed_families_are_written_as_ipv6() {
        let text = "PROXY TCP6 ::ffff:192.0.2.1 2001:db8::2 1 2\r\n";
        let fixed = [0x21, 0x21, 0, 36];
        let host = [192, 0, 2, 1];
        let block = [&fixed[..], &MAPPED, &host, &DOC, &[2], &[0, 1, 0, 2]].concat();
        for source in ["192.0.2.1:1", "[::ffff:192.0.2.1]:1"] {
            assert_text(source, "[2001:db8::2]:2", text);
            assert_block(source, "[2001:db8::2]:2", &block);
        }
        let text = "PROXY TCP6 2001:db8::2 ::ffff:192.0.2.1 1 2\r\n";
        let block = [&fixed[..], &DOC, &[2], &MAPPED, &host, &[0, 1, 0, 2]].concat();
        for destination in ["192.0.2.1:2", "[::ffff:192.0.2.1]:2"] {
            assert_text("[2001:db8::2]:1", destination, text);
            assert_block("[2001:db8::2]:1", destination, &block);
        }
    }

    #[test]
    fn a_scope_is_not_written() {
        let text = "PROXY TCP6 fe80::1 fe80::2 1 2\r\n";
        assert_text("[fe80::1%7]:1", "[fe80::2%7]:2", text);
    }

    #[test]
    fn unknown_addresses_are_written() {
        assert_eq!(ProxyVersion::V1.header(None), b"PROXY UNKNOWN\r\n");
        assert_eq!(ProxyVersion::V2.header(None), v2(&[0x20, 0, 0, 0]));
    }

    #[test]
    fn what_is_written_is_read() {
        let ends = [
            "192.0.2.1:0",
            "255.255.255.255:65535",
            "[::]:1",
            "[::1]:80",
            "[ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff]:65535",
        ];
        for version in [ProxyVersion::V1, ProxyVersion::V2] {
            assert_eq!(whole(&version.header(None)), None);
            for (source, destination) in ends.iter().flat_map(|one| ends.map(|two| (*one, two))) {
                let addresses = addresses(source, destination);
                let header = version.header(addresses);
                assert!(header.len() <= MAX_V1);
                assert_eq!(whole(&header), addresses);
            }
        }
    }

    /// Headers as others write them, and what they tell.
    fn headers() -> Vec<(Vec<u8>, Option<Addresses>)> {
        let ipv4 = addresses("192.0.2.1:1", "203.0.113.9:2");
        let hosts = [192, 0, 2, 1, 203, 0, 113, 9, 0, 1, 0, 2];
        let proxied = |family, length, rest: &[u8]| {
            let [high, low] = u16::to_be_bytes(length);
            v2(&[&[0x21, family, high, low], rest].concat())
        };
        let tlvs = [4, 0, 1, 0, 2, 0, 3, b'a', b'.', b'b'];
        let unknown = [&b"PROXY UNKNOWN "[..], &[b'f'; MAX_V1 - 16], b"\r\n"].concat();
        assert_eq!(unknown.len(), MAX_V1);
        vec![
            (b"PROXY TCP4 192.0.2.1 203.0.113.9 1 2\r\n".to_vec(), ipv4),
            (
                b"PROXY TCP6 2001:DB8::1 2001:0db8:0:0:0:0:0:2 0 65535\r\n".to_vec(),
                addresses("[2001:db8::1]:0", "[2001:db8::2]:65535"),
            ),
            (
                b"PROXY TCP6 ::ffff:192.0.2.1 ::ffff:cb00:7109 1 2\r\n".to_vec(),
                ipv4,
            ),
            (b"PROXY UNKNOWN\r\n".to_vec(), None),
            (b"PROXY UNKNOWN \r\n".to_vec(), None),
            (b"PROXY UNKNOWN a\rb\nc\0\xff\r\r\n".to_vec(), None),
            (unknown, None),
            (proxied(0x11, 12, &hosts), ipv4),
            (proxied(0x11, 22, &[&hosts[..], &tlvs].concat()), ipv4),
            // Nobody looks at TLVs.
            (proxied(0x11, 13, &[&hosts[..], &[9]].concat()), ipv4),
            (proxied(0x11, 520, &[&hosts[..], &[0; 508]].concat()), ipv4),
            (
                proxied(
                    0x21,
                    36,
                    &[&[0; 15][..], &[1], &DOC, &[2], &[0, 1, 0, 2]].concat(),
                ),
                addresses("[::1]:1", "[2001:db8::2]:2"),
            ),
            // Unspecified, datagrams, Unix.
            (proxied(0x00, 0, &[]), None),
            (proxied(0x00, 12, &hosts), None),
            (proxied(0x01, 12, &hosts), None),
            (proxied(0x10, 12, &hosts), None),
            (proxied(0x12, 12, &hosts), None),
            (proxied(0x22, 36, &[1; 36]), None),
            (proxied(0x31, 216, &[b'/'; 216]), None),
            (proxied(0x32, 216, &[b'/'; 216]), None),
            // LOCAL, with whatever else it says.
            (v2(&[0x20, 0, 0, 0]), None),
            (v2(&[&[0x20, 0x11, 0, 12], &hosts[..]].concat()), None),
            (v2(&[0x20, 0x11, 0, 0]), None),
            (v2(&[0x20, 0x21, 0, 3, 1, 2, 3]), None),
            (v2(&[0x20, 0xff, 0, 1, 0]), None),
        ]
    }

    #[test]
    fn a_header_is_read_wherever_it_is_split() {
        for (header, addresses) in headers() {
            let name = header.escape_ascii();
            for split in 0..header.len() {
                let part = parse(&header[..split]);
                assert_eq!(part, Ok(Parsed::Incomplete), "{split} bytes of {name}");
            }
            assert_eq!(whole(&header), addresses, "{name}");
        }
    }

    #[test]
    fn what_follows_a_header_is_not_read() {
        for (header, addresses) in headers() {
            let length = header.len();
            for more in [&b"G"[..], b"\r\n", b"PROXY ", &[0; 600]] {
                let read = parse(&[&header, more].concat());
                let name = header.escape_ascii();
                assert_eq!(read, Ok(Parsed::Header { length, addresses }), "{name}");
            }
        }
    }

    #[test]
    fn bad_headers_are_refused() {
        let line = |line: &str| [b"PROXY ", line.as_bytes()].concat();
        let overlong = [&b"PROXY UNKNOWN "[..], &[b'f'; MAX_V1 - 15], b"\r\n"].concat();
        for (bytes, why) in [
            (b"GET / HTTP/1.1\r\n".to_vec(), Missing),
            (
                b"proxy TCP4 192.0.2.1 203.0.113.9 1 2\r\n".to_vec(),
                Missing,
            ),
            (b"PROXYTCP4 192.0.2.1 203.0.113.9 1 2\r\n".to_vec(), Missing),
            (b" PROXY UNKNOWN\r\n".to_vec(), Missing),
            (b"\r\n\r\n\0\r\nQUIT\r\n".to_vec(), Missing),
            (line("tcp4 192.0.2.1 203.0.113.9 1 2\r\n"), Protocol),
            (line("UDP4 192.0.2.1 203.0.113.9 1 2\r\n"), Protocol),
            (line(" TCP4 192.0.2.1 203.0.113.9 1 2\r\n"), Protocol),
            (line("UNKNOWNS\r\n"), Protocol),
            (line("UNKNOWN\n"), Protocol),
            (line("\r\n"), Protocol),
            (line("TCP4 192.0.2.1 203.0.113.9 1 2\n"), NoLine),
            (line("TCP4 192.0.2.1 203.0.113.9 1 2\rG"), NoLine),
            (line("TCP4 192.0.2.1 203.0.113.9 1 2\r\r"), NoLine),
            (overlong, NoLine),
            (line("TCP4 192.0.2.1 203.0.113.9 1\r\n"), Parts),
            (line("TCP4 192.0.2.1 203.0.113.9 1 2 \r\n"), Parts),
            (line("TCP4 192.0.2.1 203.0.113.9 1  2\r\n"), Parts),
            (line("TCP4 \r\n"), Parts),
            (line("TCP4 192.0.2.1  1 2\r\n"), Address),
            (line("TCP4 192.0.2.01 203.0.113.9 1 2\r\n"), Address),
            (line("TCP4 192.0.2.256 203.0.113.9 1 2\r\n"), Address),
            (line("TCP4 192.0.2 203.0.113.9 1 2\r\n"), Address),
            (line("TCP4 192.0.2.1 ::1 1 2\r\n"), Address),
            (line("TCP4 ::1 ::1 1 2\r\n"), Address),
            (line("TCP6 192.0.2.1 203.0.113.9 1 2\r\n"), Address),
            (line("TCP6 ::1 2001:db8::1::2 1 2\r\n"), Address),
            (line("TCP6 fe80::1%7 fe80::2 1 2\r\n"), Address),
            (line("TCP6 [::1] ::1 1 2\r\n"), Address),
            (b"PROXY TCP4 \xff 203.0.113.9 1 2\r\n".to_vec(), Address),
            (line("TCP4 192.0.2.1 203.0.113.9 65536 2\r\n"), Port),
            (line("TCP4 192.0.2.1 203.0.113.9 1 65536\r\n"), Port),
            (line("TCP4 192.0.2.1 203.0.113.9 01 2\r\n"), Port),
            (line("TCP4 192.0.2.1 203.0.113.9 1 00\r\n"), Port),
            (line("TCP4 192.0.2.1 203.0.113.9 +1 2\r\n"), Port),
            (line("TCP4 192.0.2.1 203.0.113.9 -1 2\r\n"), Port),
            (line("TCP4 192.0.2.1 203.0.113.9 1\r2 2\r\n"), Port),
            // At once, before the rest has come.
            (v2(&[0x11]), BadHeader::Version(1)),
            (v2(&[0x31]), BadHeader::Version(3)),
            (v2(&[0x22]), Command(2)),
            (v2(&[0x2f]), Command(15)),
            (v2(&[0x21, 0x41, 0, 12]), Family(0x41)),
            (v2(&[0x21, 0x13, 0, 12]), Family(0x13)),
            (v2(&[0x21, 0x03, 0, 0]), Family(0x03)),
            (v2(&[0x21, 0x11, 0, 11]), TooShort(11)),
            (v2(&[0x21, 0x21, 0, 35]), TooShort(35)),
            (v2(&[0x21, 0x11, 0, 0]), TooShort(0)),
            (v2(&[0x21, 0x11, 2, 9]), TooLong(537)),
            (v2(&[0x20, 0x00, 255, 255]), TooLong(65551)),
        ] {
            assert_eq!(parse(&bytes), Err(why), "{}", bytes.escape_ascii());
        }
    }

    #[test]
    fn a_stranger_is_refused_at_the_first_byte_that_does_not_fit() {
        assert_eq!(parse(b""), Ok(Parsed::Incomplete));
        for bytes in [&b"G"[..], b"PR0", b"\r\nX", b"\n", b"\0", b"\x16\x03\x01"] {
            assert_eq!(parse(bytes), Err(Missing));
        }
        assert_eq!(parse(b"PROXY TCP5"), Err(Protocol));
    }

    #[test]
    fn no_version_waits_beyond_its_longest_header() {
        for begin in [&b"PROXY UNKNOWN "[..], b"PROXY TCP4 ", b"PROXY TCP6 "] {
            let mut bytes = [begin, &[b'1'; MAX_V1]].concat();
            assert_eq!(parse(&bytes), Err(NoLine));
            bytes.truncate(MAX_V1 - 1);
            assert_eq!(parse(&bytes), Ok(Parsed::Incomplete));
        }
        for length in 0..=u16::MAX {
            let [high, low] = length.to_be_bytes();
            let read = parse(&v2(&[0x20, 0, high, low]));
            let longest = MAX_V2 - V2_FIXED;
            match usize::from(length) {
                0 => assert!(matches!(read, Ok(Parsed::Header { .. }))),
                length if length <= longest => assert_eq!(read, Ok(Parsed::Incomplete)),
                length => assert_eq!(read, Err(TooLong(V2_FIXED + length))),
            }
        }
    }

    #[test]
    fn a_reason_says_what_to_do() {
        let said = Missing.to_string();
        assert!(said.contains("send-proxy-v2") && said.contains("proxy_protocol on"));
        let said = TooLong(600).to_string();
        assert!(said.contains("600 bytes") && said.contains("536"), "{said}");
        assert!(Family(0x03).to_string().contains("0x03"));
    }

    #[test]
    fn a_version_has_a_name() {
        assert_eq!("v1".parse(), Ok(ProxyVersion::V1));
        assert_eq!("v2".parse(), Ok(ProxyVersion::V2));
        for text in ["", "1", "V1", "v3", "v1 "] {
            assert_eq!(text.parse::<ProxyVersion>(), Err(NotProxyVersion));
        }
    }

    /// A seeded walk over headers with a few bytes changed, put in, left out or cut off. Nothing
    /// panics, what was refused or read stays so when more bytes come, and nothing that is as long as
    /// the longest header is waited for.
    #[test]
    fn malformed_headers_never_panic() {
        let headers = headers();
        let mut random = seeded::below();
        let (mut read, mut refused, mut incomplete) = (0, 0, 0);
        for _ in 0..100_000 {
            let mut bytes = headers[random(headers.len())].0.clone();
            for _ in 0..1 + random(4) {
                let at = random(bytes.len());
                let byte = match random(2) {
                    0 => random(256) as u8,
                    _ => b"\r\n 0:.\0\xff"[random(8)],
                };
                match random(4) {
                    0 => bytes[at] = byte,
                    1 => bytes.insert(at, byte),
                    2 if bytes.len() > 1 => drop(bytes.remove(at)),
                    _ => bytes[at] ^= 1 << random(8),
                }
            }
            if random(8) == 0 {
                bytes.truncate(random(bytes.len() + 1));
            }
            fuzz::proxy_header(&bytes);
            match parse(&bytes) {
                Ok(Parsed::Incomplete) => {
                    incomplete += 1;
                    bytes.resize(MAX_V2, b'x');
                    assert_ne!(parse(&bytes), Ok(Parsed::Incomplete));
                }
                Ok(Parsed::Header { .. }) => read += 1,
                Err(_) => refused += 1,
            }
        }
        // The walk has been everywhere.
        assert!(read > 1000 && refused > 1000 && incomplete > 1000);
    }
}
