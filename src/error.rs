//! What can go wrong before a tunnel runs, in words that a person can act on.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;

use crate::address::Address;
use crate::key::KeyError;

/// Why a program or a [`Server`](crate::Server) did not start. What goes wrong later is logged and
/// tried again.
#[derive(Debug)]
#[non_exhaustive]
pub enum Error {
    /// The command line makes no sense; the text names the option. Only the programs see this.
    Usage(String),
    /// The host of an option's address has no address.
    Resolve(&'static str, Address, io::Error),
    /// An option's address could not be listened on.
    Listen(&'static str, SocketAddr, io::Error),
    /// Two of the server's ports would have one address: those of these options.
    SameAddress(&'static str, &'static str, Address),
    /// No key is where one was to be read. The text: an option with its file, or `TP_KEY`. Only the
    /// programs see this.
    Key(String, KeyError),
    /// A key file could not be read. Only the programs see this.
    KeyFile(PathBuf, io::Error),
    /// The system has no random source, for a key.
    Random(getrandom::Error),
    /// What was asked for could not be printed. Only the programs see this.
    Print(io::Error),
    /// The option would open a port without any proof of identity to other hosts.
    NotLoopback(&'static str, SocketAddr),
    /// The system refused one of the threads that the program consists of.
    Thread(io::Error),
    /// The system lets no signal be obeyed. Only the programs see this.
    Signals(io::Error),
}

impl Error {
    /// The exit code of a program that ends because of this: 2 where the options are to blame, 1
    /// where the machine is.
    pub fn exit_code(&self) -> u8 {
        match self {
            Error::Usage(_)
            | Error::SameAddress(..)
            | Error::Key(..)
            | Error::KeyFile(..)
            | Error::NotLoopback(..) => 2,
            Error::Resolve(..)
            | Error::Listen(..)
            | Error::Random(_)
            | Error::Print(_)
            | Error::Thread(_)
            | Error::Signals(_) => 1,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Usage(what) => write!(f, "{what}"),
            Error::SameAddress(one, other, address) => write!(
                f,
                "{one}: {other} listens on {address} already; give each a port of its own"
            ),
            Error::Key(
                place,
                why @ (KeyError::Missing | KeyError::Malformed | KeyError::Short | KeyError::Long),
            ) => write!(
                f,
                "{place}: {why}. Make a key with: (umask 077; tpserver --generate-key > tp.key), \
                 and give it to both programs"
            ),
            // The key is there, and something else beside it.
            Error::Key(place, why) => write!(f, "{place}: {why}"),
            Error::KeyFile(path, _) => write!(f, "--key-file: could not read {}", path.display()),
            Error::Random(_) => write!(f, "could not make a key"),
            Error::Print(_) => write!(f, "could not write to stdout"),
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
            Error::Signals(_) => write!(f, "could not prepare for signals"),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Error::Usage(_) | Error::SameAddress(..) | Error::Key(..) | Error::NotLoopback(..) => {
                None
            }
            Error::Random(error) => Some(error),
            Error::Resolve(_, _, error)
            | Error::Listen(_, _, error)
            | Error::KeyFile(_, error)
            | Error::Print(error)
            | Error::Thread(error)
            | Error::Signals(error) => Some(error),
        }
    }
}
