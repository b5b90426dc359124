//! A TCP tunnel: visitors of a host with a public address reach a service that has none.
//!
//! ```text
//!  visitor ──TCP──▶ 8007 public ┐                                ┌──▶ 127.0.0.1:8000 local service
//!                               │ tpserver            tpclient   │
//!                   8009 control│◀══ one control link, kept open ═│   hi both ways; new = dial one more
//!                   8008 tunnel │◀── one connection a visitor ────┘   dialled by the client
//! ```
//!
//! [`Server`] and [`Client`] are the two halves; the programs `tpserver` and `tpclient` are little
//! more than their command lines. Both can run in one process, as often as wanted: nothing is
//! global. Sockets that carry bytes block, with a thread for each direction; an idle tunnel takes
//! no thread on the server.
//!
//! # Glossary
//!
//! - **visitor**: who connects to the public port. Its connection is an **accept**.
//! - **local service**: what the visitor reaches, seen from the client's host.
//! - **control link**: the one connection that a client keeps open to the server. It carries
//!   short lines, never a visitor's bytes.
//! - **tunnel**: a connection from the client to the server, **idle** until it is paired with an
//!   accept; then it carries that visitor's bytes.
//! - **pair**, **join**: an accept and a tunnel put together, bytes copied both ways until both
//!   directions have ended.
//! - **session**: the time from a control link's registration to its end. Tunnels belong to one
//!   session.
//!
//! # Protocol
//!
//! Lines are ASCII, end with LF, and have at most 256 bytes, LF included: a word, then `key=value`
//! arguments, one space before each. Unknown words and keys are ignored. An overlong line, a NUL,
//! a byte above 127 or a known key without a valid value ends the link.
//!
//! The control link:
//!
//! 1. The client dials the control port and says `hello proto=1 pool=8`: it wants eight idle
//!    tunnels. Who says something else is closed, who says nothing for 1 s is an original client
//!    (see below).
//! 2. The server answers `hello proto=1 session=<32 hex digits> pool=8`: the session's id, and the
//!    idle tunnels that it grants, at most 64. Or `bye reason=busy` if another client is live.
//! 3. Both write `hi` every 2 s. A link without a byte for 6 s is dead: it is closed, with every
//!    idle tunnel of its session. Visitors that are joined go on.
//! 4. The server writes `new` when a visitor waits and no idle tunnel is left: the client dials
//!    one more.
//! 5. Either says `bye reason=…` before an end that it wants.
//!
//! A tunnel:
//!
//! 1. The client dials the tunnel port and says `tunnel session=<id>`, within 5 s. A tunnel of
//!    another session, or of none, is closed.
//! 2. The tunnel is idle until the server writes `new visitor=<ip:port>`. Raw bytes follow in both
//!    directions; the visitor's first ones may stand right behind the LF.
//! 3. Only now does the client dial the local service, so a service that speaks first speaks to
//!    its visitor. If that fails, the client aborts the tunnel, and the server the visitor.
//!
//! The client dials a tunnel whenever fewer than the granted number are idle. The server hands out
//! the newest one that is still open, and closes the oldest one beyond those it granted.
//!
//! # The original
//!
//! Both programs also work with the other half of the program that this one follows. It knows
//! `hi` and `new` on the control link, both from the server, and its tunnels are raw bytes from
//! the first one; its client writes nothing. An original server is recognised by a first line that
//! is no hello.
//!
//! # Limits
//!
//! One client at a time; one public port. At most [`ServerOptions::max_conns`] visitors at a time,
//! further ones wait in the kernel's backlog. At most 64 connections a port that have not proved
//! themselves; the oldest makes room. What a stranger can cause to be logged is logged at most
//! once a second for each kind of line, visitors that were served at most a hundred times.
//!
//! # Out of scope
//!
//! Encryption and a proof of who the client is: without `insecure` the control and tunnel ports
//! are therefore for loopback addresses only, to be reached through ssh or a VPN. UDP, several
//! services on one server, and anything that would have to understand a visitor's bytes.

#![forbid(unsafe_code)]
#![warn(missing_docs)]

mod address;
mod client;
mod conn;
mod conn_match;
mod control;
mod error;
mod key;
mod limits;
mod net;
// For the two programs; not part of the library's interface.
#[doc(hidden)]
pub mod options;
#[doc(hidden)]
pub mod program;
mod protocol;
mod relay;
mod secure;
mod server;
mod stop;
mod workers;

pub use address::Address;
pub use client::Client;
pub use error::Error;
pub use key::Key;
pub use options::{ClientOptions, ServerOptions};
pub use server::Server;
pub use stop::Handle;
