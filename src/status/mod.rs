//! What is to be seen of a running program over HTTP.

pub mod http;
mod metrics;
pub mod process;
pub mod snapshot;
