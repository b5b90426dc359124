//! What crosses the network.

pub mod conn;
pub mod control;
pub mod frame;
pub mod handshake;
pub mod line;
// Nothing reads the header yet.
#[cfg_attr(not(test), expect(dead_code))]
pub mod proxy_header;
