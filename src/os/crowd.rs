//! How many visitors of one source are there at a time.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::os::source::Source;

/// The visitors who are there, by source. It never holds more sources than there are visitors.
#[derive(Debug)]
pub struct Crowd {
    /// As many as there may be of each source.
    pub most: NonZeroUsize,
    visitors: Mutex<HashMap<Source, usize>>,
}

impl Crowd {
    /// A place for at most this many visitors of each source.
    pub fn new(most: NonZeroUsize) -> Arc<Self> {
        Arc::new(Self {
            most,
            visitors: Mutex::default(),
        })
    }

    /// Counts a visitor until what is returned is dropped. None if there are as many of the visitor's
    /// source as may be.
    pub fn enter(self: &Arc<Self>, from: SocketAddr) -> Option<Counted> {
        let source = Source::from(from);
        let mut visitors = self.visitors.lock();
        let there = visitors.get(&source).copied().unwrap_or(0);
        if there >= self.most.get() {
            return None;
        }
        visitors.insert(source, there + 1);
        Some(Counted {
            crowd: self.clone(),
            source,
        })
    }
}

/// A visitor who counts as one of its source until this is dropped.
#[derive(Debug)]
pub struct Counted {
    crowd: Arc<Crowd>,
    source: Source,
}

impl Drop for Counted {
    fn drop(&mut self) {
        let mut visitors = self.crowd.visitors.lock();
        if let Some(there) = visitors.get_mut(&self.source) {
            *there -= 1;
            if *there == 0 {
                visitors.remove(&self.source);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn crowd(most: usize) -> Arc<Crowd> {
        Crowd::new(NonZeroUsize::new(most).unwrap())
    }

    fn enter(crowd: &Arc<Crowd>, from: &str) -> Option<Counted> {
        crowd.enter(from.parse().unwrap())
    }

    #[test]
    fn a_source_has_so_many_places_and_gets_them_back() {
        let crowd = crowd(2);
        let one = enter(&crowd, "192.0.2.1:1").unwrap();
        let _two = enter(&crowd, "[::ffff:192.0.2.1]:2").unwrap();
        assert!(enter(&crowd, "[::ffff:192.0.2.1]:3").is_none());
        assert!(enter(&crowd, "192.0.2.1:4").is_none());
        let _other = enter(&crowd, "192.0.2.2:1").unwrap();
        drop(one);
        let _three = enter(&crowd, "192.0.2.1:5").unwrap();
        assert!(enter(&crowd, "192.0.2.1:6").is_none());
    }

    #[test]
    fn an_ipv6_source_is_a_network_of_64_bits() {
        let crowd = crowd(1);
        let _one = enter(&crowd, "[2001:db8::1]:1").unwrap();
        assert!(enter(&crowd, "[2001:db8::2]:1").is_none());
        let _other = enter(&crowd, "[2001:db8:0:1::1]:1").unwrap();
    }

    #[test]
    fn who_has_left_is_forgotten() {
        let crowd = crowd(3);
        let hosts = 0..=255_u8;
        let enter_all = || {
            hosts
                .clone()
                .map(|host| crowd.enter(([192, 0, 2, host], 1).into()))
        };
        let there: Vec<_> = enter_all().chain(enter_all()).map(Option::unwrap).collect();
        assert_eq!(crowd.visitors.lock().len(), 256);
        drop(there);
        assert!(crowd.visitors.lock().is_empty());
    }
}
