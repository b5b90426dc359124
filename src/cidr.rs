//! A network of addresses, as a person writes it.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

/// The addresses that begin with the same bits: `192.0.2.0/24`, `2001:db8::/32`, or one address alone.
///
/// IPv4 addresses that are written as IPv6 ones are IPv4 addresses, so no IPv6 network has any.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Cidr {
    // In this order, so that a network is sorted before the networks inside it.
    first: IpAddr,
    prefix: u8,
}

impl Cidr {
    /// Returns true if the address is in the network.
    pub fn contains(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        address.is_ipv4() == self.first.is_ipv4() && begin(address, self.prefix) == self.first
    }

    /// Returns the network's lowest address.
    pub(crate) fn first(&self) -> IpAddr {
        self.first
    }
}

/// Returns the address with only the first bits left.
fn begin(address: IpAddr, prefix: u8) -> IpAddr {
    let prefix = u32::from(prefix);
    match address {
        IpAddr::V4(address) => {
            let mask = u32::MAX.checked_shl(32 - prefix).unwrap_or(0);
            IpAddr::V4((u32::from(address) & mask).into())
        }
        IpAddr::V6(address) => {
            let mask = u128::MAX.checked_shl(128 - prefix).unwrap_or(0);
            IpAddr::V6((u128::from(address) & mask).into())
        }
    }
}

/// Returns how many bits an address of this family has.
fn bits(address: IpAddr) -> u8 {
    match address {
        IpAddr::V4(_) => 32,
        IpAddr::V6(_) => 128,
    }
}

impl FromStr for Cidr {
    type Err = CidrError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (address, prefix) = match text.split_once('/') {
            Some((address, prefix)) => (address, Some(prefix)),
            None => (text, None),
        };
        let written: IpAddr = address.parse().map_err(|_| CidrError::NotAddress)?;
        let most = bits(written);
        let prefix = match prefix {
            None => most,
            Some(text) => {
                let prefix = text.parse().ok();
                // Neither `+24` nor `024`.
                let prefix = prefix.filter(|it: &u8| *it <= most && it.to_string() == text);
                prefix.ok_or(CidrError::NotPrefix(most))?
            }
        };
        let first = begin(written, prefix);
        if first != written {
            return Err(CidrError::BitsBehind(Self { first, prefix }));
        }
        // What is written as IPv6 and stands for IPv4 has one of its first 96 bits set.
        let first = first.to_canonical();
        let prefix = prefix - (most - bits(first));
        Ok(Self { first, prefix })
    }
}

/// One address is printed without the number of its bits.
impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.prefix == bits(self.first) {
            true => self.first.fmt(f),
            false => write!(f, "{}/{}", self.first, self.prefix),
        }
    }
}

/// Why a text is no network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CidrError {
    /// What stands before the `/`, or alone, is no IP address.
    NotAddress,
    /// What stands behind the `/` is no number of bits up to this one.
    NotPrefix(u8),
    /// The address has bits set behind those that make the network, which is this one.
    BitsBehind(Cidr),
}

impl fmt::Display for CidrError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotAddress => f.write_str(
                "not an IP address or network, such as 192.0.2.1, 192.0.2.0/24 or 2001:db8::/32 \
                 (no name, port or brackets)",
            ),
            Self::NotPrefix(most) => write!(
                f,
                "behind the / stands the number of bits that the network's addresses begin with, \
                 from 0 to {most}"
            ),
            Self::BitsBehind(network) => write!(
                f,
                "the network is written {network}, and one address has no / behind it"
            ),
        }
    }
}

impl std::error::Error for CidrError {}

#[cfg(test)]
mod tests {
    use super::*;

    fn cidr(text: &str) -> Cidr {
        text.parse().unwrap()
    }

    #[test]
    fn networks_are_read_and_printed() {
        for (text, printed) in [
            ("192.0.2.0/24", "192.0.2.0/24"),
            ("192.0.2.1", "192.0.2.1"),
            ("192.0.2.1/32", "192.0.2.1"),
            ("0.0.0.0/0", "0.0.0.0/0"),
            ("128.0.0.0/1", "128.0.0.0/1"),
            ("2001:DB8::/32", "2001:db8::/32"),
            ("2001:db8::1", "2001:db8::1"),
            ("::1/128", "::1"),
            ("::/0", "::/0"),
            ("::ffff:192.0.2.1", "192.0.2.1"),
            ("::ffff:192.0.2.0/120", "192.0.2.0/24"),
            ("::ffff:0:0/96", "0.0.0.0/0"),
        ] {
            assert_eq!(cidr(text).to_string(), printed);
            assert_eq!(cidr(printed), cidr(text));
        }
    }

    #[test]
    fn a_network_contains_what_begins_with_its_bits() {
        for (network, address, inside) in [
            ("192.0.2.0/24", "192.0.2.0", true),
            ("192.0.2.0/24", "192.0.2.255", true),
            ("192.0.2.0/24", "192.0.3.0", false),
            ("192.0.2.0/24", "192.0.1.255", false),
            ("192.0.2.0/24", "::ffff:192.0.2.7", true),
            ("::ffff:192.0.2.0/120", "192.0.2.7", true),
            ("192.0.2.4/31", "192.0.2.5", true),
            ("192.0.2.4/31", "192.0.2.6", false),
            ("192.0.2.1", "192.0.2.1", true),
            ("192.0.2.1", "192.0.2.2", false),
            ("0.0.0.0/0", "255.255.255.255", true),
            ("0.0.0.0/0", "::1", false),
            ("2001:db8::/32", "2001:db8:ffff::1", true),
            ("2001:db8::/32", "2001:db9::", false),
            ("2001:db8::/33", "2001:db8:8000::", false),
            ("::1", "::1", true),
            ("::1", "::2", false),
            ("::/0", "ffff::", true),
            ("::/0", "192.0.2.1", false),
            ("::/0", "::ffff:192.0.2.1", false),
        ] {
            let contains = cidr(network).contains(address.parse().unwrap());
            assert_eq!(contains, inside, "{network} {address}");
        }
    }

    #[test]
    fn bad_networks_are_refused() {
        for (text, why) in [
            ("", CidrError::NotAddress),
            ("/24", CidrError::NotAddress),
            ("example.org", CidrError::NotAddress),
            ("192.0.2", CidrError::NotAddress),
            ("192.0.2.1:80", CidrError::NotAddress),
            ("[2001:db8::1]", CidrError::NotAddress),
            ("fe80::%eth0/64", CidrError::NotAddress),
            ("192.0.2.0-192.0.2.9", CidrError::NotAddress),
            (" 192.0.2.1", CidrError::NotAddress),
            ("192.0.2.0/", CidrError::NotPrefix(32)),
            ("192.0.2.0/33", CidrError::NotPrefix(32)),
            ("192.0.2.0/-1", CidrError::NotPrefix(32)),
            ("192.0.2.0/+24", CidrError::NotPrefix(32)),
            ("192.0.2.0/024", CidrError::NotPrefix(32)),
            ("192.0.2.0/24/8", CidrError::NotPrefix(32)),
            ("192.0.2.0/255.255.255.0", CidrError::NotPrefix(32)),
            ("2001:db8::/129", CidrError::NotPrefix(128)),
            ("2001:db8::/256", CidrError::NotPrefix(128)),
            ("192.0.2.1/24", CidrError::BitsBehind(cidr("192.0.2.0/24"))),
            (
                "2001:db8::1/32",
                CidrError::BitsBehind(cidr("2001:db8::/32")),
            ),
            (
                "::ffff:0:0/95",
                CidrError::BitsBehind(cidr("::fffe:0:0/95")),
            ),
        ] {
            assert_eq!(text.parse::<Cidr>(), Err(why), "{text:?}");
        }
    }

    #[test]
    fn a_reason_says_what_to_write() {
        let said = |text: &str| text.parse::<Cidr>().unwrap_err().to_string();
        assert!(said("192.0.2.1/24").contains("is written 192.0.2.0/24"));
        assert!(said("192.0.2.0/33").contains("from 0 to 32"));
        assert!(said("::/x").contains("from 0 to 128"));
        assert!(said("example.org").contains("no name"));
    }
}
