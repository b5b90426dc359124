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

    /// Every address of the name, asked for anew each time; at least one.
    ///
    /// # Errors
    /// The name has none, or its name service does not answer.
    pub fn resolve(&self) -> io::Result<Vec<SocketAddr>> {
        let found: Vec<_> = (self.host.as_str(), self.port).to_socket_addrs()?.collect();
        if found.is_empty() {
            return Err(io::Error::new(
                io::ErrorKind::NotFound,
                "the name has no address",
            ));
        }
        Ok(found)
    }
}

impl From<SocketAddr> for Address {
    fn from(address: SocketAddr) -> Self {
        Self::new(address.ip().to_string(), address.port())
    }
}

impl FromStr for Address {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (host, port) = text
            .rsplit_once(':')
            .ok_or("no port: HOST:PORT is needed")?;
        let host = match host.strip_prefix('[').and_then(|it| it.strip_suffix(']')) {
            Some(inside) => parse_host(inside).and_then(|host| match host.parse::<IpAddr>() {
                Ok(IpAddr::V6(_)) => Ok(host),
                _ => Err("only an IPv6 address stands in brackets"),
            })?,
            None if host.contains(':') => return Err("an IPv6 address needs brackets: [::1]:80"),
            None => parse_host(host)?,
        };
        // parse() alone would let a sign pass.
        if !port.bytes().all(|byte| byte.is_ascii_digit()) {
            return Err("the port is not a number");
        }
        let port = port
            .parse()
            .map_err(|_| "the port is not from 0 to 65535")?;
        Ok(Self { host, port })
    }
}

/// A host alone, without port or brackets.
pub fn parse_host(text: &str) -> Result<String, &'static str> {
    let literal = text.parse::<IpAddr>().is_ok();
    let name = |byte: u8| byte.is_ascii_alphanumeric() || b"-._".contains(&byte);
    match text {
        "" => Err("no host"),
        _ if literal || text.bytes().all(name) => Ok(text.to_owned()),
        _ => Err("neither an IP address nor a host name"),
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
    fn bad_addresses_are_refused() {
        for (text, why) in [
            ("", "no port"),
            ("127.0.0.1", "no port"),
            (":80", "no host"),
            ("[]:80", "no host"),
            ("::1:80", "brackets"),
            ("[127.0.0.1]:80", "brackets"),
            ("[::1:80", "brackets"),
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
