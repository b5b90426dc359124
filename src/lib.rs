//! lib
#![forbid(unsafe_code)]
#![warn(missing_docs)]

mod client;
mod conn_match;
mod control;
mod error;
mod limits;
mod net;
pub mod options;
pub mod program;
mod protocol;
mod relay;
mod server;
mod stop;
mod workers;

pub use client::Client;
pub use error::Error;
pub use net::Address;
pub use options::{ClientOptions, ServerOptions};
pub use server::Server;
pub use stop::Handle;
