//! What crosses the network between the two programs.

pub mod conn;
pub mod control;
pub mod frame;
pub mod handshake;
pub mod line;
