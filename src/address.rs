//! A host and a port, as a person writes them.

use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::str::FromStr;

/// A host, by name or by number, and a port: `example.org:80`, `192.0.2.1:80`, `[2001:db8::1]:80`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address {
    /// A name, an IPv4 address, or an IPv6 address without its brackets.
    pub host: String,
    /// The port; 0 lets the system choose one to listen on.
    pub port: u16,
}

impl Address {
    /// The address of a host and a port.
    pub fn new(host: impl Into<String>, port: u16) -> Self {
        Self {
            host: host.into(),
            port,
        }
    }

    /// Returns every address of the host, at least one. A name is looked up anew each time.
    ///
    /// # Errors
    /// The name has none, or its name service does not answer.
    pub fn resolve(&self) -> io::Result<Vec<SocketAddr>> {
        let found: Vec<_> = (self.host.as_str(), self.port).to_socket_addrs()?.collect();
        if found.is_empty() {
            let kind = io::ErrorKind::NotFound;
            return Err(io::Error::new(kind, "the name has no address"));
        }
        Ok(found)
    }

    /// Returns true if two sockets could not listen at both addresses. At port 0 they always can.
    pub(crate) fn overlaps(&self, other: &Self) -> bool {
        if self.port != other.port || self.port == 0 {
            return false;
        }
        // Whoever listens reports a name without an address.
        let [ours, theirs] = [self, other].map(|it| it.resolve().unwrap_or_default());
        let overlap = |one: IpAddr, other: IpAddr| {
            let covers = |all: IpAddr, one: IpAddr| {
                // `[::]` takes IPv4 too.
                all.is_unspecified() && (all.is_ipv6() || one.is_ipv4())
            };
            one == other || covers(one, other) || covers(other, one)
        };
        let ip = |it: &SocketAddr| it.ip().to_canonical();
        ours.iter()
            .any(|one| theirs.iter().any(|other| overlap(ip(one), ip(other))))
    }
}

impl From<SocketAddr> for Address {
    fn from(address: SocketAddr) -> Self {
        Self::new(address.ip().to_string(), address.port())
    }
}

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        refuse_scheme(text)?;
        let (host, port) = match text.rsplit_once(':') {
            Some(parts) if !text.ends_with(']') => parts,
            _ => return Err("no port: HOST:PORT is needed".to_owned()),
        };
        let host = match host.strip_prefix('[').and_then(|it| it.strip_suffix(']')) {
            Some(inside) => match parse_host(inside)? {
                host if matches!(host.parse(), Ok(IpAddr::V6(_))) => host,
                _ => return Err("only an IPv6 address stands in brackets".to_owned()),
            },
            None if host.contains(':') => {
                return Err("an IPv6 address needs brackets: [::1]:80".to_owned());
            }
            None => parse_host(host)?,
        };
        let port = parse_port(port)?;
        Ok(Self { host, port })
    }
}

/// Reads a host alone, without port or brackets.
pub fn parse_host(text: &str) -> Result<String, String> {
    refuse_scheme(text)?;
    let literal = text.parse::<IpAddr>().is_ok();
    let name = |byte: u8| byte.is_ascii_alphanumeric() || b"-._".contains(&byte);
    match text {
        "" => Err("no host".to_owned()),
        _ if literal || text.bytes().all(name) => Ok(text.to_owned()),
        _ => Err("neither an IP address nor a host name".to_owned()),
    }
}

/// Reads a port alone.
pub fn parse_port(text: &str) -> Result<u16, String> {
    // `parse` alone would accept `+80`.
    if !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err("the port is not a number".to_owned());
    }
    let port = text.parse();
    port.map_err(|_| "the port is not from 0 to 65535".to_owned())
}

/// Refuses what was copied from a browser's address bar, and says what to leave out.
fn refuse_scheme(text: &str) -> Result<(), String> {
    match text.split_once("://") {
        Some((scheme, _)) => Err(format!("leave out {scheme}://")),
        None => Ok(()),
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_and_printed() {
        for (text, host, port) in [
            ("127.0.0.1:8007", "127.0.0.1", 8007),
            ("[::1]:0", "::1", 0),
            ("[::]:65535", "::", 65535),
            ("example.org:80", "example.org", 80),
            ("my_host-1:80", "my_host-1", 80),
        ] {
            let address: Address = text.parse().unwrap();
            assert_eq!(address, Address::new(host, port));
            assert_eq!(address.to_string(), text);
        }
    }

    #[test]
    fn addresses_overlap_where_only_one_can_be_listened_on() {
        for (one, other, overlap) in [
            ("127.0.0.1:80", "127.0.0.1:80", true),
            ("127.0.0.1:80", "127.0.0.1:81", false),
            ("127.0.0.1:80", "127.0.0.2:80", false),
            ("127.0.0.1:0", "127.0.0.1:0", false),
            ("0.0.0.0:80", "127.0.0.1:80", true),
            ("0.0.0.0:80", "[::1]:80", false),
            ("[::]:80", "127.0.0.1:80", true),
            ("[::]:80", "0.0.0.0:80", true),
            ("[::]:80", "[::1]:80", true),
            ("localhost:80", "127.0.0.1:80", true),
            ("does-not-exist.invalid:80", "127.0.0.1:80", false),
        ] {
            let addresses = [one, other].map(|text| text.parse::<Address>().unwrap());
            assert_eq!(
                addresses[0].overlaps(&addresses[1]),
                overlap,
                "{one} {other}"
            );
            assert_eq!(
                addresses[1].overlaps(&addresses[0]),
                overlap,
                "{other} {one}"
            );
        }
    }

    #[test]
    fn bad_addresses_are_refused() {
        for (text, why) in [
            ("", "no port"),
            ("127.0.0.1", "no port"),
            ("[::1]", "no port"),
            ("http://h:80", "leave out http://"),
            ("https://[::1]:80/", "leave out https://"),
            ("tcp://h", "leave out tcp://"),
            (":80", "no host"),
            ("[]:80", "no host"),
            ("::1:80", "brackets"),
            ("[127.0.0.1]:80", "brackets"),
            ("[::1:80", "brackets"),
            ("::1", "brackets"),
            ("host:", "0 to 65535"),
            ("host:65536", "0 to 65535"),
            ("host:+80", "not a number"),
            ("host:http", "not a number"),
            ("a b:80", "neither"),
            ("a/b:80", "neither"),
        ] {
            let error = text.parse::<Address>().unwrap_err();
            assert!(error.contains(why), "{text:?}: {error}");
        }
    }
}
