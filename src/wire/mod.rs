//! What crosses the network.

pub mod conn;
pub mod control;
pub mod frame;
pub mod handshake;
pub mod line;
pub mod proxy_header;
