//! What can go wrong before a tunnel runs, in words that a person can act on.

use std::fmt;
use std::io;
use std::io::ErrorKind::{AddrInUse, AddrNotAvailable, PermissionDenied};
use std::net::SocketAddr;

use crate::address::Address;
use crate::service::{MAX_SERVICES, Service};

/// Why a [`Server`](crate::Server) or a [`Client`](crate::Client) did not start. What fails later is
/// logged and tried again.
#[derive(Debug)]
#[non_exhaustive]
pub enum Error {
    /// The host in an option has no address.
    Resolve(&'static str, Address, io::Error),
    /// An option's address could not be listened on.
    Listen(&'static str, SocketAddr, io::Error),
    /// Two options give two of the server's ports the same address.
    SameAddress(&'static str, &'static str, Address),
    /// The server would take no visitor at all.
    NoVisitors,
    /// The server would take no client at all.
    NoClients,
    /// The client has no server to connect to.
    NoServers,
    /// This option asks for what a client of the original program cannot do.
    NotOriginal(&'static str),
    /// The option names so many services.
    Services(&'static str, usize),
    /// The option names a service that this server or client does not have.
    UnknownService(&'static str, Service),
    /// The system has no random source to make a key from.
    Random(getrandom::Error),
    /// The option would open the tunnel or control port to other hosts without a key, or the status page.
    NotLoopback(&'static str, SocketAddr),
    /// The system refused one of the threads that the program consists of.
    Thread(io::Error),
}

impl Error {
    /// Returns true if the options are to blame, and not the machine.
    pub fn is_usage(&self) -> bool {
        matches!(
            self,
            Self::SameAddress(..)
                | Self::NoVisitors
                | Self::NoClients
                | Self::NoServers
                | Self::NotOriginal(_)
                | Self::Services(..)
                | Self::UnknownService(..)
                | Self::NotLoopback(..)
        )
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::SameAddress(one, other, address) => write!(
                f,
                "{one}: {other} listens on {address} already; give each a port of its own"
            ),
            Self::NoVisitors => write!(f, "--max-conns 0: no visitor could ever be served"),
            Self::NoClients => write!(f, "--clients 0: no visitor could ever be served"),
            Self::NoServers => write!(f, "--server: no server to connect to"),
            Self::NotOriginal(option) => write!(
                f,
                "--original: there is one client of the original program at a time, and its tunnels \
                 need a port of their own; leave out --original or {option}"
            ),
            Self::Services(option, count) => write!(
                f,
                "{option}: there are {count} services; give 1 to {MAX_SERVICES}"
            ),
            Self::UnknownService(option, service) if service.has_name() => {
                write!(f, "{option} {service}: there is no service of that name")
            }
            Self::UnknownService(option, _) => write!(
                f,
                "{option}: there is no service without a name; put a service's NAME= before the value"
            ),
            Self::Random(_) => write!(f, "could not make a key"),
            Self::Resolve(option, address, _) => {
                write!(f, "{option}: could not find the host of {address}")
            }
            Self::Listen(option, address, error) => {
                let hint = match error.kind() {
                    AddrInUse => " (is tpserver running already? if not, give another port)",
                    AddrNotAvailable => " (not an address of this host)",
                    PermissionDenied => " (ports below 1024 need a privilege)",
                    _ => "",
                };
                write!(f, "{option}: could not listen on {address}{hint}")
            }
            Self::NotLoopback(option @ "--status", address) => write!(
                f,
                "{option}: {address} is not a loopback address, and whoever reaches that port sees \
                 who comes, and the log. Let those who look come through ssh or a proxy that asks \
                 who they are; or add --insecure-status if the network in between is trusted"
            ),
            Self::NotLoopback(option, address) => write!(
                f,
                "{option}: {address} is not a loopback address, and whoever reaches that port can \
                 become the client or read along. Give both programs the same --key-file; or open \
                 the visitors' port alone, with --public in the place of --bind, and let the \
                 client come through ssh or a VPN; or add --insecure if the network in between is \
                 trusted"
            ),
            Self::Thread(_) => write!(f, "a thread did not start, or panicked"),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Random(error) => Some(error),
            Self::Resolve(_, _, error) | Self::Listen(_, _, error) | Self::Thread(error) => {
                Some(error)
            }
            _ => None,
        }
    }
}
