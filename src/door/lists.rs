//! Which addresses visitors may come from.

use std::fmt;
use std::net::IpAddr;
use std::num::NonZeroUsize;

use crate::cidr::Cidr;

/// Networks of which no two overlap, in ascending order: one binary search finds the network
/// that an address is in.
#[derive(Debug)]
pub struct Networks(Vec<Cidr>);

impl Networks {
    /// All addresses of these networks.
    pub fn new(mut networks: Vec<Cidr>) -> Self {
        networks.sort_unstable();
        // A network is inside another one or apart from it, and stands behind the one that it is in.
        networks.dedup_by(|next, kept| kept.contains(next.first()));
        networks.shrink_to_fit();
        Self(networks)
    }

    /// Returns true if one of the networks has this address.
    pub fn contain(&self, address: IpAddr) -> bool {
        self.find(address.to_canonical()).is_some()
    }

    /// Returns the widest network that has this address.
    fn find(&self, address: IpAddr) -> Option<Cidr> {
        let behind = self.0.partition_point(|it| it.first() <= address);
        let found = self.0.get(behind.checked_sub(1)?)?;
        found.contains(address).then_some(*found)
    }
}

/// The addresses that may come, and those that may not.
#[derive(Debug)]
pub struct Lists {
    allow: Networks,
    deny: Networks,
}

impl Lists {
    /// Lists that let everybody in who is on `allow`, or everybody if that is empty, and nobody who is
    /// on `deny`.
    pub fn new(allow: Vec<Cidr>, deny: Vec<Cidr>) -> Self {
        Self {
            allow: Networks::new(allow),
            deny: Networks::new(deny),
        }
    }

    /// Looks a visitor's address up.
    ///
    /// # Errors
    /// The visitor is to be sent away.
    pub fn check(&self, address: IpAddr) -> Result<(), Unwelcome> {
        let address = address.to_canonical();
        let rule = match self.deny.find(address) {
            Some(network) => Rule::Denied(network),
            None if self.allow.0.is_empty() || self.allow.find(address).is_some() => return Ok(()),
            None => Rule::NotAllowed,
        };
        Err(Unwelcome { address, rule })
    }
}

/// Who may not come in, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unwelcome {
    /// Where the visitor comes from.
    pub address: IpAddr,
    /// What is against it.
    pub rule: Rule,
}

/// Why a visitor may not come in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rule {
    /// The address is in this network of the deny list.
    Denied(Cidr),
    /// There is an allow list, and the address is not on it.
    NotAllowed,
    /// As many visitors of the same source are there as may be.
    TooMany(NonZeroUsize),
    /// Visitors come through proxies only, and this is none of them.
    NotProxy,
}

impl Rule {
    /// Every [word](Rule::word).
    pub const WORDS: [&str; 4] = ["denied", "not-allowed", "too-many", "no-proxy"];

    /// Returns the word under which it is counted.
    pub fn word(self) -> &'static str {
        match self {
            Self::Denied(_) => "denied",
            Self::NotAllowed => "not-allowed",
            Self::TooMany(_) => "too-many",
            Self::NotProxy => "no-proxy",
        }
    }
}

/// Behind "refused visitor from ". Programs read it too: the address alone, then a colon.
impl fmt::Display for Unwelcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.address, self.rule)
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Denied(network) => write!(f, "deny {network}"),
            Self::NotAllowed => f.write_str("not on the allow list"),
            Self::TooMany(most) => write!(f, "more than {most} at a time"),
            Self::NotProxy => f.write_str("none of the proxies (--accept-proxy)"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cidr::CidrError;
    use crate::seeded;
    #[cfg(target_os = "linux")]
    use std::time::Duration;

    fn networks(texts: &[&str]) -> Vec<Cidr> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    /// What the log says of a visitor. Nothing if the visitor may come in.
    fn said(lists: &Lists, address: &str) -> String {
        let checked = lists.check(address.parse().unwrap());
        checked.err().map_or_else(String::new, |it| it.to_string())
    }

    #[test]
    fn without_a_list_everybody_may_come() {
        let lists = Lists::new(Vec::new(), Vec::new());
        for address in ["192.0.2.1", "::1", "255.255.255.255"] {
            assert_eq!(said(&lists, address), "");
        }
    }

    #[test]
    fn who_is_denied_may_not_come() {
        let lists = Lists::new(
            Vec::new(),
            networks(&["192.0.2.0/24", "2001:db8::/32", "198.51.100.7"]),
        );
        for (address, line) in [
            ("192.0.2.0", "192.0.2.0: deny 192.0.2.0/24"),
            ("192.0.2.255", "192.0.2.255: deny 192.0.2.0/24"),
            ("::ffff:192.0.2.9", "192.0.2.9: deny 192.0.2.0/24"),
            ("2001:db8:1::1", "2001:db8:1::1: deny 2001:db8::/32"),
            ("198.51.100.7", "198.51.100.7: deny 198.51.100.7"),
            ("192.0.1.255", ""),
            ("192.0.3.0", ""),
            ("198.51.100.6", ""),
            ("198.51.100.8", ""),
            ("0.0.0.0", ""),
            ("::", ""),
            ("2001:db9::", ""),
        ] {
            assert_eq!(said(&lists, address), line);
        }
    }

    #[test]
    fn with_an_allow_list_nobody_else_may_come() {
        let lists = Lists::new(networks(&["192.0.2.0/24", "2001:db8::/32"]), Vec::new());
        for address in ["192.0.2.9", "::ffff:192.0.2.9", "2001:db8::1"] {
            assert_eq!(said(&lists, address), "");
        }
        for address in ["192.0.3.1", "2001:db9::1"] {
            let line = format!("{address}: not on the allow list");
            assert_eq!(said(&lists, address), line);
        }
    }

    #[test]
    fn who_is_on_both_lists_may_not_come() {
        let lists = Lists::new(networks(&["192.0.2.7"]), networks(&["192.0.2.0/24"]));
        assert_eq!(said(&lists, "192.0.2.7"), "192.0.2.7: deny 192.0.2.0/24");
        assert_eq!(
            said(&lists, "192.0.3.7"),
            "192.0.3.7: not on the allow list"
        );
    }

    #[test]
    fn a_network_of_ipv6_has_no_ipv4_address() {
        let lists = Lists::new(networks(&["::/0"]), Vec::new());
        assert_eq!(said(&lists, "2001:db8::1"), "");
        for address in ["192.0.2.1", "::ffff:192.0.2.1"] {
            assert_eq!(said(&lists, address), "192.0.2.1: not on the allow list");
        }
    }

    #[test]
    fn the_widest_of_overlapping_networks_counts() {
        let deny = [
            "10.1.0.0/16",
            "10.1.2.3",
            "10.0.0.0/8",
            "10.0.0.0/8",
            "11.0.0.0/9",
        ];
        let lists = Lists::new(Vec::new(), networks(&deny));
        assert_eq!(lists.deny.0, networks(&["10.0.0.0/8", "11.0.0.0/9"]));
        assert_eq!(said(&lists, "10.1.2.3"), "10.1.2.3: deny 10.0.0.0/8");
    }

    /// How much processor time this thread has taken: a busy machine does not add to it.
    #[cfg(target_os = "linux")]
    fn processor_time() -> Duration {
        use rustix::time::{ClockId, clock_gettime};
        clock_gettime(ClockId::ThreadCPUTime).try_into().unwrap()
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_hundred_thousand_entries_are_looked_up_in_microseconds() {
        const COUNT: u32 = 100_000;
        // Every other network of 256 addresses.
        let address = |number: u32| IpAddr::V4((number << 9).into());
        let deny = (0..COUNT).map(|it| format!("{}/24", address(it)).parse().unwrap());
        let lists = Lists::new(Vec::new(), deny.collect());
        assert_eq!(lists.deny.0.len(), COUNT as usize);
        let start = processor_time();
        for number in 0..COUNT {
            assert!(lists.check(address(number)).is_err());
        }
        // It takes a tenth of this without optimisation.
        assert!(processor_time() - start < Duration::from_micros(20) * COUNT);
    }

    /// Networks of a seeded walk, close to each other so that many are inside others, are found as if
    /// each of them had been looked at.
    #[test]
    fn a_lookup_finds_what_looking_at_each_finds() {
        let mut random = seeded::numbers();
        let address = |bits: u64| -> IpAddr {
            let (high, low) = ((bits >> 8) as u8 & 15, (bits >> 16) as u8);
            match bits & 1 {
                0 => [10, 0, high, low].into(),
                _ => [0x2001, 0xdb8, 0, 0, 0, 0, high.into(), low.into()].into(),
            }
        };
        let mut network = || {
            let first = address(random());
            let prefix = if first.is_ipv4() { 32 } else { 128 } - random() % 8;
            match format!("{first}/{prefix}").parse() {
                Ok(network) | Err(CidrError::BitsBehind(network)) => network,
                Err(why) => panic!("{why}"),
            }
        };
        let all: Vec<_> = (0..300).map(|_| network()).collect();
        let lists = Lists::new(Vec::new(), all.clone());
        let mut denied = 0;
        for _ in 0..2_000 {
            let address = address(random());
            // The widest is the first in order.
            let widest = all.iter().filter(|it| it.contains(address)).min().copied();
            assert_eq!(lists.deny.find(address), widest, "{address}");
            denied += usize::from(widest.is_some());
        }
        assert!((200..1_800).contains(&denied), "{denied}");
    }
}
