//! A TCP tunnel: visitors of a host with a public address reach a service that has none.
//!
//! ```text
//!  visitor ──TCP──▶ 8080 web ┐                                ┌──▶ 127.0.0.1:8000
//!  visitor ──TCP──▶ 2222 ssh │ tpserver            tpclient   ├──▶ nas:22
//!                8009 control│◀══ one control link, kept open ═│   hi both ways; new = dial one more
//!                8008 tunnel │◀── tunnels, used again and again┘   dialled by the client
//! ```
//!
//! [`Server`] and [`Client`] are the two halves. The programs `tpserver` and `tpclient` are little
//! more than their command lines, which stand behind the feature `cli`: a program that embeds the
//! tunnel can leave it out. Both halves can run in one process, as often as wanted: nothing is
//! global. Both can show what goes on over HTTP: see [`ServerOptions::status`]. Sockets that carry
//! bytes block, with a thread for each direction; an idle tunnel takes no thread on the server.
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
//! use tunnel_proxy::{Address, Client, ClientOptions, Key, Server, ServerOptions, Service};
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
//! options.public = [(Service::default(), any.clone())].into();
//! (options.tunnel, options.control) = (any.clone(), any);
//! options.keys = vec![key.clone()];
//! let server = Server::bind(options)?;
//! let (public, control) = (server.public_addr(), server.control_addr());
//! let server = server.spawn()?;
//!
//! let mut options = ClientOptions::new();
//! options.servers = vec![control.into()];
//! options.local = [(Service::default(), local.into())].into();
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
//! A server may have several services and several clients, and a client several servers:
//! [`ServerOptions`] and [`ClientOptions`] say how.
//!
//! # Glossary
//!
//! - **visitor**: who connects to the public port. Its connection is an **accept**.
//! - **service**: what a port for visitors leads to, by name. The original's one has none.
//! - **local service**: what the visitor reaches, seen from the client's host.
//! - **control link**: the one connection that a client keeps open to a server. It carries
//!   short lines, never a visitor's bytes.
//! - **tunnel**: a connection from the client to the server, **idle** until it is paired with an
//!   accept; then it carries that visitor's bytes, and is idle again afterwards.
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
//! 1. The client dials the control port and says `hello proto=2 pool=8 linger=600000`: it wants eight
//!    idle tunnels, and aborts a visit that stands still for so many milliseconds once one end has
//!    finished. A connection that says something else, or nothing for 5 s, is closed.
//! 2. The server answers `hello proto=2 pool=8 linger=600000 session=<32 hex digits> tunnel=8008
//!    public=8007 client=<ip:port>`: the idle tunnels that it grants, at most 64, its own `linger`, the
//!    session's id, its two other ports, and where it sees the client come from. The shorter `linger`
//!    holds for both sides, and each looks after its own end. Or it says `bye reason=…`: `busy` if
//!    there are as many clients as it takes, `wants-key` or `no-key` if only one side has a key,
//!    `wrong-key`, `version` if the client speaks another version than `proto=2`, `draining` if the
//!    server is about to stop, `error` if the server could not begin a session, and logs why.
//!    `control-port`, `tunnel-port` or `public-port` is the port that the client has come to by
//!    mistake.
//! 3. A side with services that have names says `offers=N` in its hello, and names each of them behind
//!    it: `offer service=web` from the client, `offer service=web port=8080` from the server, without
//!    `service=` for the one that has no name. Without `offers`, that is the only one. Up to 64 other
//!    lines may stand among the offers: they are left out.
//! 4. Both sides write `hi` every 2 s. A link without a line for 6 s is dead: it is reset, and every
//!    idle tunnel of its session ends. So is a link whose far side is heard, but takes no line for
//!    30 s. Visitors who are joined go on.
//! 5. The server writes `new` when a visitor waits and no idle tunnel is left: the client dials
//!    one more.
//! 6. The client writes `failed visitor=<ip:port> reason=…` when it aborts a tunnel because it
//!    could not reach the local service: `refused`, `timed-out`, `unknown-host`, `unreachable`,
//!    `exhausted`, `loop`, `no-service` or `error`.
//! 7. Once a side has passed on the whole stream of its end of a visit, it soon writes `finished
//!    visit=7`, with the visit's number, and repeats the line ever more rarely. With such a line the
//!    other side begins to count `linger`, even if it has not read that stream's end yet: bytes that
//!    nobody takes may lie before it. Both sides write the same line with `moved=1` when something has
//!    moved on their side: then the count begins anew.
//! 8. A side says `bye reason=…` before it ends the link on purpose. A server that stops says so when
//!    no visitor waits for a tunnel any more; the client then waits for it to close the idle ones.
//!
//! A tunnel carries frames, with a key or without. A frame is a length of two bytes, the higher one
//! first, and that many bytes: one for its kind, and a payload. A frame with a line has at most 257
//! bytes, others have up to 65,535.
//!
//! | kind | payload | may come |
//! |---|---|---|
//! | 0, data | bytes of a visitor's stream | while a visitor is served |
//! | 1, end | none: the stream in this direction has ended | while a visitor is served |
//! | 2, line | a whole line | while no visitor is |
//! | 3, raw | none: the rest of the stream follows without frames, to the end of the connection | without a key, while a visitor is served |
//!
//! 1. The client dials the tunnel port and says `tunnel session=<id>`, within 5 s. A tunnel of
//!    another session, or of none, is closed.
//! 2. The tunnel is idle until the server writes `new visitor=<ip:port> visit=7`, where no two visits
//!    to a server have the same number, with `service=web` if the visitor comes for a service that has
//!    a name, and with `to=<ip:port>`, the public address that the visitor came to, if the client's
//!    hello had `to=1`. Frames of that visitor's stream follow in both directions.
//! 3. Only now does the client dial the local service, so a service that speaks first speaks to its
//!    visitor. If that fails, the client aborts the tunnel, and the server the visitor. A server that
//!    has another client for this visitor says `answer=1` in step 2. Then the client first says
//!    `ready`, and the frames follow; or it says `failed` with a visitor and a reason, and the tunnel
//!    is idle again.
//! 4. Each side writes an end when the stream that it writes has ended. A client that has written one
//!    and read one, and has passed on all that came, says `idle`: only then may the server give the
//!    tunnel to the next visitor. Anything else than two ends aborts the tunnel with RST. So does a
//!    frame that must not come now: no byte of one visitor can reach another.
//! 5. A direction without a key that has shown itself to be bulk says raw, so that the kernel can move
//!    the rest. Such a tunnel ends with its visitor.
//! 6. When the session has ended, the server closes idle tunnels, and others once their visitor has
//!    gone.
//!
//! The client keeps the granted number of tunnels: it dials more when half of them are in use, or some
//! are lost. The server hands out the one that has become idle last. Those beyond the granted number
//! stay as long as they are needed, and one that was idle for 10 s is closed. So a steady load dials
//! nothing.
//!
//! Control links and tunnels may share one port. Without a key, the first frame of a tunnel begins with
//! the byte 0, and no line does. With one, the prologue below tells them apart.
//!
//! With a key, every control link and every tunnel is sealed from its first byte:
//!
//! 1. The client begins a handshake, `Noise_NNpsk0_25519_AESGCM_SHA256` of the Noise framework
//!    with the key as its PSK. The prologue is `tp/2 control` on a control link; on a tunnel
//!    `tp/2 tunnel`, followed by the handshake hash of its session's control link. So a tunnel
//!    belongs to one session, and what was recorded of one connection fits no other.
//! 2. Neither message of the handshake has a payload. Each has 48 bytes and stands behind its length,
//!    two bytes with the higher one first. A client with another key is told so in plain and closed.
//! 3. Frames follow, on a control link those of lines. What is behind the length is sealed by AES-GCM,
//!    whose tag takes 16 bytes more. Each side counts its frames from 0, through all visitors of a
//!    tunnel, and the count is the nonce.
//! 4. After every 2^24 frames a direction changes its key, as `Rekey()` of the Noise framework
//!    does: the next key is the first 32 bytes of what the old one makes of 32 zeros with the nonce
//!    2^64 - 1. Both sides do so by their count of that direction's frames, which goes on. The
//!    directions know nothing of each other.
//! 5. The client has proved itself once its first frame has opened: before, nothing is registered,
//!    replaced or paired. Handshake and first line have 5 s in all.
//! 6. A frame that does not open, or an end of the connection before that of the stream, aborts
//!    what the connection was joined with, or ends the link. A frame is waited for until all of it
//!    is there: one whose length was changed fails when later bytes have filled it up.
//!
//! With `--original` and without a key, both programs also speak [the original's
//! protocol](docs::original).
//!
//! # Limits
//!
//! The tunnel carries TCP only. Everything that a stranger can cause is bounded: [limits](docs::limits)
//! lists visitors, strangers, buffers, log lines and ports.
//!
//! On Linux, bulk without a key is spliced, and a splice into a connection that was reset raises
//! SIGPIPE. Rust programs ignore that signal, and a program that uses this library must leave it so.

#![forbid(unsafe_code)]
#![warn(missing_docs)]

mod address;
mod cidr;
#[cfg(feature = "cli")]
pub mod cli;
mod client;
mod conn_match;
mod door;
mod error;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod handle;
mod journal;
mod key;
mod options;
mod os;
mod relay;
#[cfg(test)]
mod seeded;
mod server;
mod service;
mod session;
mod status;
mod stop;
mod wire;

pub use address::Address;
pub use cidr::{Cidr, CidrError};
pub use client::Client;
pub use error::Error;
pub use handle::{Handle, Running};
pub use journal::{ServiceStatus, Status};
pub use key::{Key, KeyError};
pub use options::{ClientOptions, ServerOptions};
pub use server::Server;
pub use service::Service;
pub use wire::proxy_header::{NotProxyVersion, ProxyVersion};

/// Pages about the program, beside what its interface says.
#[cfg(doc)]
pub mod docs {
    #[doc = include_str!("docs/chinese.md")]
    pub mod chinese {}
    #[doc = include_str!("docs/faults.md")]
    pub mod faults {}
    #[doc = include_str!("docs/limits.md")]
    pub mod limits {}
    #[doc = include_str!("docs/operation.md")]
    pub mod operation {}
    #[doc = include_str!("docs/options.md")]
    pub mod options {}
    #[doc = include_str!("docs/original.md")]
    pub mod original {}
    #[doc = include_str!("docs/others.md")]
    pub mod others {}
    #[doc = include_str!("docs/rooms.md")]
    pub mod rooms {}
    #[doc = include_str!("docs/security.md")]
    pub mod security {}
    #[doc = include_str!("docs/speed.md")]
    pub mod speed {}
    #[doc = include_str!("docs/tests.md")]
    pub mod tests {}
}
