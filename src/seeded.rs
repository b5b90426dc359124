//! Numbers for tests that look random, and are the same in each run.

/// Returns a walk over all 64-bit numbers but 0 that begins at the same one each time.
pub fn numbers() -> impl FnMut() -> u64 {
    let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
    move || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    }
}

/// Returns a walk over numbers below a bound, which each call names.
pub fn below() -> impl FnMut(usize) -> usize {
    let mut numbers = numbers();
    move |below| (numbers() % below as u64) as usize
}
