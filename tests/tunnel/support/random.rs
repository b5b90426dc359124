//! Bytes and numbers that look random, and are the same ones for the same seed.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

/// Bytes that differ from those of every other seed, and from place to place.
pub struct Pattern(u64);

impl Pattern {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn fill(&mut self, buffer: &mut [u8]) {
        for chunk in buffer.chunks_mut(8) {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            chunk.copy_from_slice(&self.0.to_le_bytes()[..chunk.len()]);
        }
    }
}

/// Writes the first `size` bytes of a pattern.
pub fn send_pattern(mut to: &TcpStream, seed: u64, size: usize) {
    let mut pattern = Pattern::new(seed);
    let mut buffer = vec![0; 64 * 1024];
    let mut left = size;
    while left > 0 {
        let piece = left.min(buffer.len());
        pattern.fill(&mut buffer[..piece]);
        to.write_all(&buffer[..piece]).unwrap();
        left -= piece;
    }
}

/// Reads the first `size` bytes of a pattern, and compares each.
pub fn expect_pattern(mut from: &TcpStream, seed: u64, size: usize) {
    let mut pattern = Pattern::new(seed);
    let (mut got, mut wanted) = (vec![0; 64 * 1024], vec![0; 64 * 1024]);
    let mut left = size;
    while left > 0 {
        let piece = left.min(got.len());
        from.read_exact(&mut got[..piece]).unwrap();
        pattern.fill(&mut wanted[..piece]);
        assert!(
            got[..piece] == wanted[..piece],
            "changed bytes, {left} before the end"
        );
        left -= piece;
    }
}

/// The first bytes of a pattern.
pub fn pattern(seed: u64, size: usize) -> Vec<u8> {
    let mut bytes = vec![0; size];
    Pattern::new(seed).fill(&mut bytes);
    bytes
}

/// Numbers that look random, the same ones for the same seed.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        // Without this, zero would stay zero, and small seeds would begin alike.
        Self((seed ^ 0x5851_f42d_4c95_7f2d).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub fn below(&mut self, limit: usize) -> usize {
        // The lowest bits are the least random ones.
        ((self.next() >> 11) % limit as u64) as usize
    }

    /// A time between these.
    pub fn time(&mut self, least: u64, most: u64) -> Duration {
        Duration::from_millis(least + self.below((most - least + 1) as usize) as u64)
    }
}

/// A seed that is another one each time.
pub fn fresh_seed() -> u64 {
    getrandom::u64().unwrap()
}
