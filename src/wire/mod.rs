//! What crosses the network between the two programs.

pub mod conn;
pub mod control;
pub mod line;
pub mod secure;
