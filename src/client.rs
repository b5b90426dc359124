//! The client, in the original's functions and in their order: the control link, and a tunnel and a
//! connection to the local service for each visitor. What they need lives in the other modules; how the
//! client begins and ends, in `run`, and how tunnels are kept ready, in `pool`.

mod backoff;
mod pool;
mod run;
mod shown;

use std::collections::HashSet;
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::Instant;

use parking_lot::Mutex;

use crate::door::{NoSession, open_link, seal_tunnel};
use crate::error::Error;
use crate::handle::{Handle, Running};
use crate::journal::Journal;
use crate::options::ClientOptions;
use crate::os::limits::Slots;
use crate::os::net;
use crate::os::workers::{Workers, set_name};
use crate::relay::{End, Pairs, Peer, Visitor};
use crate::session::of_client::{LocalError, NoVisitor, Session, Spare, Tunnel};
use crate::session::{Ended, Proto};
use crate::status::port::{self, StatusPort};
use crate::stop::Stop;
use crate::wire::conn::Conn;
use crate::wire::control::send;
use crate::wire::line::{Failure, Line};
use pool::OwnDial;
use run::Upstream;
use shown::Unreached;

/// The half of the tunnel that runs in the LAN.
///
/// ```no_run
/// use tunnel_proxy::{Address, Client, ClientOptions};
///
/// let mut options = ClientOptions::new();
/// options.servers = vec![Address::new("tunnel.example.org", 8009)];
/// Client::new(options).run()?;
/// # Ok::<(), tunnel_proxy::Error>(())
/// ```
pub struct Client {
    shared: Arc<Shared>,
}

struct Shared {
    options: ClientOptions,
    workers: Workers,
    pairs: Arc<Pairs>,
    /// Two descriptors each: a tunnel is of no use if none is left for its local service.
    slots: Arc<Slots>,
    servers: Vec<Upstream>,
    /// Where this client's own connections to the local service come from: a visitor from there
    /// would come again and again.
    own_dials: Mutex<HashSet<SocketAddr>>,
    /// Which local services could not be reached when they were dialled last.
    unreached: Unreached,
    status: StatusPort,
    stop: Arc<Stop>,
    journal: Arc<Journal>,
}

impl Client {
    /// A client that does nothing before [`run`](Client::run). Options that lead nowhere show in
    /// the log then, as they may lead somewhere later.
    pub fn new(options: ClientOptions) -> Self {
        Self {
            shared: Arc::new(Shared::new(options)),
        }
    }

    /// Looks whether a client could [run](Client::run) with these options.
    ///
    /// # Errors
    /// Those of [`run`](Client::run).
    pub fn check(options: &ClientOptions) -> Result<(), Error> {
        run::check_options(options)?;
        port::check(options.status.as_ref(), options.insecure_status)
    }

    /// What stops this client.
    pub fn handle(&self) -> Handle {
        Handle::new(&self.shared)
    }

    /// Serves until it is stopped through its [`handle`](Client::handle). A server that is away
    /// is dialled again for ever. A dial under way when the client stops ends by itself, within
    /// 5 s for each address of the server's name.
    ///
    /// # Errors
    /// There is no server or no service, or the system refuses the first threads, one for each server.
    pub fn run(self) -> Result<(), Error> {
        self.shared.run()
    }

    /// [Runs](Client::run) on a thread of its own.
    ///
    /// # Errors
    /// The system refuses that thread.
    pub fn spawn(self) -> Result<Running, Error> {
        Running::spawn("client", self.handle(), move || self.run())
    }
}

impl Shared {
    /// Dials a server's control port, and does what the server says until it says no more. Returns why,
    /// and whether the session was of use.
    fn connect_control(self: &Arc<Self>, server: &Upstream) -> Result<(Ended, bool), NoSession> {
        let options = &self.options;
        let control = net::dial(&server.address, false).map_err(NoSession::Unreachable)?;
        let control = Arc::new(control);
        self.warn_without_key(server, &control);
        let mut link = open_link(Conn::new(control.clone()), options)?;
        let (session, to_write) = Session::new(&link, control.clone(), options.tunnel_port)?;
        self.begin_session(server, &session);
        if let Err(error) = self.start_writer(&session, link.writer, to_write) {
            // Without a writer nobody else ends the link, and the server would take no other client.
            let _ = control.shutdown(Shutdown::Both);
            return Ok(self.end_session(&session, Ended::NoThread(error)));
        }
        self.refill(&session);
        let mut line = Ok(link.first);
        let ended = loop {
            match line {
                Ok(Line::New(_)) => self.one_more(&session),
                Ok(Line::Bye { reason }) => break Ended::Bye(reason),
                Ok(Line::Finished { visit, moved }) => {
                    self.pairs.finished_elsewhere(&*session, visit, moved);
                }
                Ok(_) => {}
                Err(error) => break Ended::from(error),
            }
            line = link.lines.next_line_alive();
        };
        Ok(self.end_session(&session, ended))
    }

    /// One tunnel: dials it, so that a visitor finds it ready, and serves visitors through it.
    fn combine(self: &Arc<Self>, spare: Spare) {
        let session = spare.session.clone();
        match self.connect_remote(spare) {
            Ok((tunnel, spare)) => self.serve(tunnel, spare),
            Err(why) => self.no_visitor(&session, &why),
        }
    }

    /// Serves one visitor after another: waits for one, dials the local service only then, as a service that
    /// speaks first must speak to its own visitor, and joins both. Ends with the tunnel, or when the other
    /// copy thread of a visitor goes on with it.
    fn serve(self: &Arc<Self>, mut tunnel: Tunnel, mut spare: Spare) {
        let session = spare.session.clone();
        loop {
            set_name("tunnel");
            let (visitor, answers) = match spare.wait_for_visitor(&mut tunnel) {
                Ok(came) => came,
                Err(why) => return self.no_visitor(&session, &why),
            };
            let came = Instant::now();
            let dialled = self.connect_local(&session, &visitor);
            self.take_note(&visitor, dialled.as_ref().err());
            let reached = dialled.as_ref().map(drop);
            let reached = reached.map_err(|error| error.reason.clone());
            let is_told = answers && tunnel.answer(&visitor, reached).is_ok();
            let (local, own_dial) = match dialled {
                Ok(dialled) if is_told || !answers => dialled,
                Err(_) if is_told => {
                    spare = session.spare_again();
                    continue;
                }
                failed => {
                    net::abort(tunnel.conn.socket());
                    if let Err(error) = failed
                        && !answers
                    {
                        session.tell_failed(&visitor, error.reason);
                    }
                    drop(tunnel);
                    return self.refill_if_low(&session);
                }
            };
            let Some(again) = self.join_conn(&session, local, tunnel, visitor, came) else {
                return self.refill_if_low(&session);
            };
            drop(own_dial);
            (tunnel, spare) = (again, session.spare_again());
        }
    }

    /// Joins a tunnel with the local service: two copy threads, of which this is one. The one that ends
    /// last has the tunnel for the next visitor.
    fn join_conn(
        self: &Arc<Self>,
        session: &Arc<Session>,
        local: TcpStream,
        tunnel: Tunnel,
        visitor: Visitor,
        came: Instant,
    ) -> Option<Tunnel> {
        let Tunnel { conn, held } = tunnel;
        let (up, down) = self.pairs.join(
            visitor,
            came,
            End(Peer::Server, conn),
            End(Peer::LocalService, Conn::new(Arc::new(local))),
            session.linger(self.options.linger),
        );
        let (client, session, held_too) = (self.clone(), session.clone(), held.clone());
        let work = move || {
            // On this thread the refill does not delay the visitor's first bytes, which the other one
            // passes on.
            client.refill_if_low(&session);
            let held = held_too;
            match down.copy() {
                Some(conn) => client.serve(Tunnel { conn, held }, session.spare_again()),
                None => {
                    drop(held);
                    client.refill_if_low(&session);
                }
            }
        };
        if let Err(error) = self.workers.start("down", work) {
            self.journal.no_thread("down", &error);
        }
        set_name("up");
        up.copy().map(|conn| Tunnel { conn, held })
    }

    /// Dials the local service, unless that leads back to the server.
    fn connect_local(
        self: &Arc<Self>,
        session: &Session,
        visitor: &Visitor,
    ) -> Result<(TcpStream, Option<OwnDial>), LocalError> {
        let service = visitor.service();
        let address = self.options.local.get(service);
        let address = address.ok_or_else(|| LocalError::no_service(service))?;
        if self.is_own_dial(session, visitor, address.port) {
            let why = format!(
                "this visitor is this client's own connection to {address}: --local leads back to \
                 the server's port for visitors"
            );
            let reason = Failure::Loop;
            return Err(LocalError { reason, why });
        }
        // The connection resets on close until it is joined and has ended well: the service would take a
        // plain end for a complete visit.
        let local = net::dial(address, true)?;
        let own_dial = self.own_dial(session, &local, address.port)?;
        self.say_whose(visitor, &local, address)?;
        Ok((local, own_dial))
    }

    /// Dials the tunnel port and names the session, after the handshake if there is a key.
    fn connect_remote(&self, mut spare: Spare) -> Result<(Tunnel, Spare), NoVisitor> {
        let session = spare.session.clone();
        let mut conn = self.dial_again(&session, || {
            // An end would be taken for a complete and empty answer where nothing frames it.
            let is_original = session.proto == Proto::Original;
            let remote = net::dial_one(session.tunnel_addr, is_original)?;
            let mut remote = Conn::new(Arc::new(remote));
            if let Some(bond) = &session.bond {
                seal_tunnel(&mut remote, bond)?;
            }
            Ok(remote)
        })?;
        // Once the tunnel has named its session, the server may give it a visitor, whom a client that
        // stops must not forget.
        let held = spare.hold(&self.pairs)?;
        if let Proto::Tp2 { id, .. } = session.proto {
            conn.begin_frames();
            let named = send(&mut conn.writer, &Line::Tunnel { session: id });
            named.map_err(|error| NoVisitor::Dial(error.into()))?;
        }
        self.journal.tunnel_dialled(&session.dialled);
        session.note_dial(true);
        Ok((Tunnel { conn, held }, spare))
    }

    fn no_visitor(&self, session: &Session, why: &NoVisitor) {
        if matches!(why, NoVisitor::Dial(_) | NoVisitor::NotServer(_)) {
            session.note_dial(false);
        }
        if session.is_live() {
            self.journal.no_visitor(session.tunnel_addr, why);
        }
    }
}
