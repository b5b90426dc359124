//! What is to be seen of a running program over HTTP.

pub mod http;
mod metrics;
mod page;
pub mod process;
pub mod snapshot;
