//! A TCP tunnel: visitors of a host with a public address reach a service that has none.
//!
//! ```text
//!  visitor ──TCP──▶ 8007 public ┐                                ┌──▶ 127.0.0.1:8000 local service
//!                               │ tpserver            tpclient   │
//!                   8009 control│◀══ one control link, kept open ═│   hi both ways; new = dial one more
//!                   8008 tunnel │◀── one connection a visitor ────┘   dialled by the client
//! ```
//!
//! [`Server`] and [`Client`] are the two halves. The programs `tpserver` and `tpclient` are little
//! more than their command lines, which stand behind the feature `cli`: a program that embeds the
//! tunnel can leave it out. Both halves can run in one process, as often as wanted: nothing is
//! global. Sockets that carry bytes block, with a thread for each direction; an idle tunnel takes
//! no thread on the server.
//!
//! With a [`Key`] on both sides, nobody without it becomes the client, reads along, or changes or
//! cuts a stream unnoticed. Without one, nothing is protected, and the control and tunnel ports are
//! for loopback addresses only, unless `insecure` says otherwise.
//!
//! ```
//! use std::io::{Read, Write};
//! use std::net::{TcpListener, TcpStream};
//! use std::thread;
//! use std::time::Duration;
//! use tunnel_proxy::{Address, Client, ClientOptions, Key, Server, ServerOptions};
//!
//! // The local service: it sends back what the first visitor says.
//! let service = TcpListener::bind("127.0.0.1:0")?;
//! let local = service.local_addr()?;
//! thread::spawn(move || {
//!     let (mut visitor, _) = service.accept()?;
//!     std::io::copy(&mut visitor.try_clone()?, &mut visitor)
//! });
//!
//! let key = Key::generate()?;
//! let any = Address::new("127.0.0.1", 0);
//! let mut options = ServerOptions::new();
//! (options.public, options.tunnel, options.control) = (any.clone(), any.clone(), any);
//! options.keys = vec![key.clone()];
//! let server = Server::bind(options)?;
//! let (public, control) = (server.public_addr(), server.control_addr());
//! let server = server.spawn()?;
//!
//! let mut options = ClientOptions::new();
//! (options.server, options.local) = (control.into(), local.into());
//! options.key = Some(key);
//! let client = Client::new(options).spawn()?;
//! assert!(client.handle().wait_for_session(Duration::from_secs(10)));
//!
//! let mut visitor = TcpStream::connect(public)?;
//! visitor.write_all(b"hello")?;
//! let mut back = [0; 5];
//! visitor.read_exact(&mut back)?;
//! assert_eq!(&back, b"hello");
//! drop(visitor);
//!
//! for half in [client, server] {
//!     half.handle().stop(Duration::from_secs(1));
//!     half.join()?;
//! }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
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
//!    tunnels. A connection that says something else, or nothing for 5 s, is closed.
//! 2. The server answers `hello proto=1 pool=8 session=<32 hex digits> tunnel=8008 public=8007
//!    client=<ip:port>`: the idle tunnels that it grants, at most 64, the session's id, its two other
//!    ports, and where it sees the client come from. Or it says `bye reason=…`: `busy` if another
//!    client is live, `wants-key` or `no-key` if only one side has a key, `wrong-key`, `draining` if
//!    the server is about to stop. `control-port`, `tunnel-port` or `public-port` is the port that the
//!    client has come to by mistake.
//! 3. Both sides write `hi` every 2 s. A link without a line for 6 s is dead: it is reset, and every
//!    idle tunnel of its session ends. So is a link whose far side is heard, but takes no line for
//!    30 s. Visitors who are joined go on.
//! 4. The server writes `new` when a visitor waits and no idle tunnel is left: the client dials
//!    one more.
//! 5. The client writes `failed visitor=<ip:port> reason=…` when it aborts a tunnel because it
//!    could not reach the local service: `refused`, `timed-out`, `unknown-host`, `unreachable`,
//!    `exhausted`, `loop` or `error`.
//! 6. A side says `bye reason=…` before it ends the link on purpose. A server that stops says so when
//!    no visitor waits for a tunnel any more; the client then waits for it to close the idle ones.
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
//! The client keeps the granted number idle: it dials more when half of them are gone, one when a
//! visitor has left, and what is missing every 2 s. The server hands out the newest one that is
//! still open, and closes the oldest one beyond those it granted.
//!
//! With a key, every control link and every tunnel is sealed from its first byte:
//!
//! 1. The client begins a handshake, `Noise_NNpsk0_25519_AESGCM_SHA256` of the Noise framework
//!    with the key as its PSK. The prologue is `tp/1 control` on a control link; on a tunnel
//!    `tp/1 tunnel`, followed by the handshake hash of its session's control link. So a tunnel
//!    belongs to one session, and what was recorded of one connection fits no other.
//! 2. Neither message of the handshake has a payload. Each has 48 bytes and stands behind its length,
//!    two bytes with the higher one first. A client with another key is told so in plain and closed.
//! 3. Frames follow: such a length, and as many bytes of AES-GCM, which seal a type byte and a
//!    payload. Each side counts its frames from 0, and the count is the nonce. The first frame of a
//!    side has at most 273 bytes, later ones 65,535.
//! 4. The payload of type 0 is data: the lines above, and behind them on a tunnel a visitor's bytes.
//!    Where a frame ends means nothing. Type 1 has no payload and ends the stream; the connection
//!    below stays open for the other direction.
//! 5. After every 2^24 frames a direction changes its key, as `Rekey()` of the Noise framework
//!    does: the next key is the first 32 bytes of what the old one makes of 32 zeros with the nonce
//!    2^64 - 1. Both sides do so by their count of that direction's frames, which goes on. The
//!    directions know nothing of each other.
//! 6. The client has proved itself once its first frame has opened: before, nothing is registered,
//!    replaced or paired. Handshake and first line have 5 s in all.
//! 7. A frame that does not open, or an end of the connection before that of the stream, aborts
//!    what the connection was joined with, or ends the link. A frame is waited for until all of it
//!    is there: one whose length was changed fails when later bytes have filled it up.
//! 8. When both directions of a tunnel have ended, the client waits for up to 1 s for the server to
//!    close it first, so that the kernel keeps the port on the server's side (`TIME_WAIT`).
//!
//! With `--original` and without a key, both programs also speak [the original's
//! protocol](docs::original).
//!
//! # Limits
//!
//! A server has one client at a time and one public port, and carries TCP only. Everything that a
//! stranger can cause is bounded: [limits](docs::limits) lists visitors, strangers, buffers, log
//! lines and ports.
//!
//! On Linux, bulk without a key is spliced, and a splice into a connection that was reset raises
//! SIGPIPE. Rust programs ignore that signal, and a program that uses this library must leave it so.

#![forbid(unsafe_code)]
#![warn(missing_docs)]

mod address;
#[cfg(feature = "cli")]
pub mod cli;
mod client;
mod conn_match;
mod door;
mod error;
mod handle;
mod journal;
mod key;
mod options;
mod os;
mod relay;
mod server;
mod session;
mod stop;
mod wire;

pub use address::Address;
pub use client::Client;
pub use error::Error;
pub use handle::{Handle, Running};
pub use journal::Status;
pub use key::{Key, KeyError};
pub use options::{ClientOptions, ServerOptions};
pub use server::Server;

/// Pages about the program, beside what its interface says.
#[cfg(doc)]
pub mod docs {
    #[doc = include_str!("docs/faults.md")]
    pub mod faults {}
    #[doc = include_str!("docs/limits.md")]
    pub mod limits {}
    #[doc = include_str!("docs/original.md")]
    pub mod original {}
    #[doc = include_str!("docs/rooms.md")]
    pub mod rooms {}
    #[doc = include_str!("docs/security.md")]
    pub mod security {}
    #[doc = include_str!("docs/speed.md")]
    pub mod speed {}
    #[doc = include_str!("docs/tests.md")]
    pub mod tests {}
}
