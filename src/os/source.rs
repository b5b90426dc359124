//! Where a connection comes from, as far as its address proves it.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

/// One IPv4 address, or one IPv6 network of 64 bits: who has one address of such a network usually
/// has all of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Source {
    /// An IPv4 address, also if it came as an IPv6 one to a port that takes both.
    V4(Ipv4Addr),
    /// The first half of an IPv6 address.
    V6(u64),
}

impl From<SocketAddr> for Source {
    fn from(from: SocketAddr) -> Self {
        match from.ip().to_canonical() {
            IpAddr::V4(address) => Self::V4(address),
            IpAddr::V6(address) => Self::V6((u128::from(address) >> 64) as u64),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_is_an_ipv4_address_or_half_an_ipv6_one() {
        let source = |text: &str| Source::from(text.parse::<SocketAddr>().unwrap());
        assert_eq!(source("192.0.2.1:1"), source("192.0.2.1:2"));
        assert_eq!(source("192.0.2.1:1"), source("[::ffff:192.0.2.1]:1"));
        assert_ne!(source("192.0.2.1:1"), source("192.0.2.2:1"));
        assert_eq!(
            source("[2001:db8::1]:1"),
            source("[2001:db8::ffff:0:0:2]:1")
        );
        assert_ne!(source("[2001:db8::1]:1"), source("[2001:db8:0:1::1]:1"));
    }
}
