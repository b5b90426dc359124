//! What can go wrong before a tunnel runs, in words that a person can act on.

use std::fmt;
use std::io;
use std::net::SocketAddr;

use crate::address::Address;

/// Why a [`Server`](crate::Server) or a [`Client`](crate::Client) did not start. What goes wrong later is logged and
/// tried again.
#[derive(Debug)]
#[non_exhaustive]
pub enum Error {
    /// The host of an option's address has no address.
    Resolve(&'static str, Address, io::Error),
    /// An option's address could not be listened on.
    Listen(&'static str, SocketAddr, io::Error),
    /// Two of the server's ports would have one address: those of these options.
    SameAddress(&'static str, &'static str, Address),
    /// The server would take no visitor at all.
    NoVisitors,
    /// The system has no random source, for a key.
    Random(getrandom::Error),
    /// The option would open a port without any proof of identity to other hosts.
    NotLoopback(&'static str, SocketAddr),
    /// The system refused one of the threads that the program consists of.
    Thread(io::Error),
}

impl Error {
    /// True if the options are to blame, and not the machine.
    pub fn is_usage(&self) -> bool {
        match self {
            Error::SameAddress(..) | Error::NoVisitors | Error::NotLoopback(..) => true,
            Error::Resolve(..) | Error::Listen(..) | Error::Random(_) | Error::Thread(_) => false,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::SameAddress(one, other, address) => write!(
                f,
                "{one}: {other} listens on {address} already; give each a port of its own"
            ),
            Error::NoVisitors => write!(f, "--max-conns 0: no visitor could ever be served"),
            Error::Random(_) => write!(f, "could not make a key"),
            Error::Resolve(option, address, _) => {
                write!(f, "{option}: could not find the host of {address}")
            }
            Error::Listen(option, address, error) => {
                write!(f, "{option}: could not listen on {address}")?;
                match error.kind() {
                    io::ErrorKind::AddrInUse => {
                        write!(
                            f,
                            " (is tpserver running already? if not, give another port)"
                        )
                    }
                    io::ErrorKind::AddrNotAvailable => write!(f, " (not an address of this host)"),
                    io::ErrorKind::PermissionDenied => {
                        write!(f, " (ports below 1024 need a privilege)")
                    }
                    _ => Ok(()),
                }
            }
            Error::NotLoopback(option, address) => write!(
                f,
                "{option}: {address} is not a loopback address, and whoever reaches that port can \
                 become the client or read along. Give both programs the same --key-file; or open \
                 the visitors' port alone, with --public in the place of --bind, and let the \
                 client come through ssh or a VPN; or add --insecure if the network in between is \
                 trusted"
            ),
            Error::Thread(_) => write!(f, "could not start a thread"),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Error::SameAddress(..) | Error::NoVisitors | Error::NotLoopback(..) => None,
            Error::Random(error) => Some(error),
            Error::Resolve(_, _, error) | Error::Listen(_, _, error) | Error::Thread(error) => {
                Some(error)
            }
        }
    }
}
