//! How many tunnels a client dials, and when.

use std::io::{self, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use crate::address::Address;
use crate::client::Shared;
use crate::door::NoSession;
use crate::os::net::timed_out;
use crate::relay::Visitor;
use crate::service::Service;
use crate::session::of_client::{LocalError, NoVisitor, Session, Spare};
use crate::stop::Phase;
use crate::wire::conn::Conn;
use crate::wire::line::Failure;

/// Tunnels that wait for a visitor or are being dialled. A server never has more visitors waiting
/// than it serves at a time, 4096 by default.
const MAX_SPARE: usize = 8192;

/// Between the dials of a tunnel that failed. The first one at once: a server that is flooded may
/// have pushed it out.
const REDIALS: [Duration; 3] = [
    Duration::ZERO,
    Duration::from_millis(100),
    Duration::from_millis(300),
];

impl Shared {
    /// Dials tunnels until the pool is full.
    pub(super) fn refill(self: &Arc<Self>, session: &Arc<Session>) {
        let pool = session.proto.pool();
        // Not for ever: dials that fail at once make room as fast as this adds to them.
        for _ in 0..pool {
            let Some(spare) = self.one_spare(session, pool) else {
                return;
            };
            if !self.start_combine(spare) {
                return;
            }
        }
    }

    /// Dials tunnels where those in use leave too few, or one has ended with its visitor.
    pub(super) fn refill_if_low(self: &Arc<Self>, session: &Arc<Session>) {
        if session.is_low() {
            self.refill(session);
        }
    }

    /// Dials a tunnel for a visitor that waits.
    pub(super) fn one_more(self: &Arc<Self>, session: &Arc<Session>) {
        match self.one_spare(session, MAX_SPARE) {
            Some(spare) => _ = self.start_combine(spare),
            None if session.is_live() => self.journal.no_descriptors(),
            // The client stops, and the server does not know yet.
            None => {}
        }
    }

    /// One more spare tunnel, if there are fewer than `most`, and descriptors for its visitor.
    fn one_spare(&self, session: &Arc<Session>, most: usize) -> Option<Spare> {
        session.one_spare(most, self.slots.try_take()?)
    }

    /// Combines on a worker; false if there is none.
    fn start_combine(self: &Arc<Self>, spare: Spare) -> bool {
        let client = self.clone();
        let started = self.workers.start("tunnel", move || client.combine(spare));
        if let Err(error) = &started {
            self.journal.no_thread("tunnel", error);
        }
        started.is_ok()
    }

    /// Dials until it works, as long as the session lives, but only so often: a visitor may wait for
    /// this tunnel.
    pub(super) fn dial_again(
        &self,
        session: &Session,
        dial: impl Fn() -> Result<Conn, NoSession>,
    ) -> Result<Conn, NoVisitor> {
        let mut pauses = REDIALS.into_iter();
        loop {
            if !session.is_live() {
                return Err(NoVisitor::SessionEnded);
            }
            let why = match dial() {
                Ok(remote) => return Ok(remote),
                Err(why) => why,
            };
            let again = pauses.next();
            if !again.is_some_and(|pause| self.stop.sleep(pause, Phase::Draining)) {
                return Err(NoVisitor::Dial(why));
            }
        }
    }

    /// True if a visitor is one of this client's connections to the local service. Behind a NAT the
    /// server sees another address, but most often the same port.
    pub(super) fn is_own_dial(&self, session: &Session, visitor: &Visitor, local: u16) -> bool {
        let Some(from) = visitor.address().filter(|_| session.may_loop(local)) else {
            return false;
        };
        let own_dials = self.own_dials.lock();
        own_dials.contains(&from)
            || (session.seen_as == Some(from.ip())
                && own_dials
                    .iter()
                    .any(|own| own.port() == from.port() && !own.ip().is_loopback()))
    }

    /// Says first on a connection to the local service whose it is, if that is asked for.
    pub(super) fn say_whose(
        &self,
        visitor: &Visitor,
        mut local: &TcpStream,
        address: &Address,
    ) -> io::Result<()> {
        let Some(version) = self.options.proxy_protocol.get(visitor.service()) else {
            return Ok(());
        };
        let header = version.header(visitor.addresses());
        local.write_all(&header).map_err(|error| {
            let what = format!("{address}: writing its PROXY protocol header: {error}");
            io::Error::new(error.kind(), what)
        })
    }

    /// Remembers where a connection to the local service comes from, if it may lead back here.
    pub(super) fn own_dial(
        self: &Arc<Self>,
        session: &Session,
        local: &TcpStream,
        port: u16,
    ) -> io::Result<Option<OwnDial>> {
        if !session.may_loop(port) {
            return Ok(None);
        }
        let from = local.local_addr()?;
        self.own_dials.lock().insert(from);
        Ok(Some(OwnDial(self.clone(), from)))
    }
}

/// Where a connection to the local service comes from, remembered as long as this lives.
pub struct OwnDial(Arc<Shared>, SocketAddr);

impl Drop for OwnDial {
    fn drop(&mut self) {
        self.0.own_dials.lock().remove(&self.1);
    }
}

impl LocalError {
    /// The visitor's service is none of those that this client offers.
    pub fn no_service(service: &Service) -> Self {
        let option = service.option();
        let why = format!("it is not offered here (--local {option}HOST:PORT)");
        let reason = Failure::NoService;
        Self { reason, why }
    }
}

/// Why a dial of the local service failed, for the server.
impl From<io::Error> for LocalError {
    fn from(error: io::Error) -> Self {
        use io::ErrorKind::{
            AddrNotAvailable, ConnectionRefused, HostUnreachable, NetworkUnreachable, NotFound,
        };
        let reason = match error.kind() {
            ConnectionRefused => Failure::Refused,
            NotFound => Failure::UnknownHost,
            HostUnreachable | NetworkUnreachable => Failure::Unreachable,
            AddrNotAvailable => Failure::Exhausted,
            _ if timed_out(&error) => Failure::TimedOut,
            _ => Failure::Error,
        };
        let why = error.to_string();
        Self { reason, why }
    }
}
