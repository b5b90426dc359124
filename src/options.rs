//! The options of a server and of a client, and their defaults.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::time::Duration;

use crate::address::Address;
use crate::cidr::Cidr;
use crate::error::Error;
use crate::key::Key;
use crate::service::{MAX_SERVICES, Service};
use crate::wire::proxy_header::ProxyVersion;

/// The original's ports: visitors, tunnels, the control link, and its example of a local service.
const PUBLIC_PORT: u16 = 8007;
pub const TUNNEL_PORT: u16 = 8008;
const CONTROL_PORT: u16 = 8009;
const LOCAL_PORT: u16 = 8000;

pub const LOOPBACK: &str = "127.0.0.1";

/// The original's time.
pub const PAIR_TIMEOUT: Duration = Duration::from_secs(5);

/// Each visitor needs two descriptors on the server, and few hosts let a program have more than ten
/// thousand.
const MAX_CONNS: usize = 4096;

/// Long enough for a reply that takes its time, and short enough that no forgotten half stays for
/// ever.
const LINGER: Duration = Duration::from_secs(600);

/// A page of a browser fetches six things at a time; two more for the next visitor.
const POOL: usize = 8;

/// What a [`Server`](crate::Server) is to do.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ServerOptions {
    /// The address that the visitors of each service connect to; at least one, and at most 64.
    pub public: BTreeMap<Service, Address>,
    /// The address for the clients' tunnels, which may be that of the control port; without a key a
    /// loopback address, unless `insecure`.
    pub tunnel: Address,
    /// The address for the clients' control links; without a key a loopback address, unless
    /// `insecure`.
    pub control: Address,
    /// How long the server waits for a port in use, which a server that is about to end may have. On
    /// Linux a server of the same user that is stopped in this time, with some time to drain, hands
    /// its listeners over.
    pub port_patience: Duration,
    /// How long a visitor waits for a tunnel before it is closed.
    pub pair_timeout: Duration,
    /// The addresses of proxies, whose header of the PROXY protocol says where each visitor comes from. With
    /// one or more, visitors from elsewhere are reset.
    pub accept_proxy: Vec<Cidr>,
    /// The networks that visitors of a service, or of all with None, may come from. With none of them,
    /// visitors may come from everywhere.
    pub allow: Vec<(Option<Service>, Cidr)>,
    /// The networks that visitors of a service, or of all with None, may not come from, whatever `allow`
    /// says.
    pub deny: Vec<(Option<Service>, Cidr)>,
    /// The most visitors at a time from one IPv4 address or IPv6 network of 64 bits; further ones are reset.
    pub max_per_source: Option<NonZeroUsize>,
    /// Whether to log at level info, and not debug, that a visitor has come.
    pub log_visits: bool,
    /// The most clients at a time; the original has one. With more, a visitor goes to the one with the
    /// fewest, and the client says whether it reaches the local service before any byte moves.
    pub clients: usize,
    /// The most visitors at a time; further ones wait in the kernel's backlog. The server lowers it
    /// if the process has not two descriptors for each.
    pub max_conns: usize,
    /// How long a direction may stand still once the other one has ended, if the other program does not
    /// ask for less. Both are then aborted, at most 2 s and a quarter of this time (at most 20 s) later:
    /// so long it may take to see that nothing moves, and to tell the other program so.
    pub linger: Duration,
    /// The keys, any of which the client may have: two while one takes the place of the other.
    /// Without one, nothing is sealed, and nobody has to prove anything.
    pub keys: Vec<Key>,
    /// Whether to open the tunnel and control ports to other hosts without a key, although nothing
    /// protects them.
    pub insecure: bool,
    /// Where to show a page for people, metrics and health checks over HTTP, if anywhere: a loopback
    /// address, unless `insecure_status`.
    pub status: Option<Address>,
    /// Whether to show the page to other hosts, although nothing protects it.
    pub insecure_status: bool,
    /// Whether to take, without a key, a client that says nothing for 1 s for an original one, whose
    /// tunnels prove nothing.
    pub original: bool,
}

impl Default for ServerOptions {
    fn default() -> Self {
        Self::new()
    }
}

impl ServerOptions {
    /// Returns what tpserver does without an option.
    pub fn new() -> Self {
        Self {
            public: [(Service::default(), Address::new(LOOPBACK, PUBLIC_PORT))].into(),
            tunnel: Address::new(LOOPBACK, TUNNEL_PORT),
            control: Address::new(LOOPBACK, CONTROL_PORT),
            port_patience: Duration::ZERO,
            pair_timeout: PAIR_TIMEOUT,
            accept_proxy: Vec::new(),
            allow: Vec::new(),
            deny: Vec::new(),
            max_per_source: None,
            log_visits: false,
            clients: 1,
            max_conns: MAX_CONNS,
            linger: LINGER,
            keys: Vec::new(),
            insecure: false,
            status: None,
            insecure_status: false,
            original: false,
        }
    }

    /// True if control links and tunnels come to one port. Port 0 stands for two different ones.
    pub(crate) fn has_one_port(&self) -> bool {
        self.tunnel == self.control && self.tunnel.port != 0
    }
}

/// An error if there are no services, or too many.
pub fn check_services(
    option: &'static str,
    services: &BTreeMap<Service, Address>,
) -> Result<(), Error> {
    match services.len() {
        1..=MAX_SERVICES => Ok(()),
        count => Err(Error::Services(option, count)),
    }
}

/// An error if an option names a service that is none of these.
pub fn check_known<'a>(
    option: &'static str,
    names: impl IntoIterator<Item = &'a Service>,
    services: &BTreeMap<Service, Address>,
) -> Result<(), Error> {
    let mut names = names.into_iter();
    match names.find(|name| !services.contains_key(name)) {
        Some(name) => Err(Error::UnknownService(option, name.clone())),
        None => Ok(()),
    }
}

/// What a [`Client`](crate::Client) is to do.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ClientOptions {
    /// The hosts of the servers, and their control ports; at least one. The client has a session with
    /// each, side by side.
    pub servers: Vec<Address>,
    /// The servers' tunnel port. With None, the client takes the one that a server tells, or 8008 if it
    /// is an original one.
    pub tunnel_port: Option<u16>,
    /// Where each of the local services is; at least one, and at most 64.
    pub local: BTreeMap<Service, Address>,
    /// Which of the local services get, first on each connection, a header of the PROXY protocol with the
    /// visitor's address and the public address that it came to.
    pub proxy_protocol: BTreeMap<Service, ProxyVersion>,
    /// How many idle tunnels to keep ready for each server; it grants at most 64. With 0, the client dials a
    /// tunnel when a visitor comes.
    pub pool: usize,
    /// How long a direction may stand still once the other one has ended, if the other program does not
    /// ask for less. Both are then aborted, at most 2 s and a quarter of this time (at most 20 s) later:
    /// so long it may take to see that nothing moves, and to tell the other program so.
    pub linger: Duration,
    /// A key of the servers'. Without one, nothing is sealed, and no server must have one either.
    pub key: Option<Key>,
    /// Where to show a page for people, metrics and health checks over HTTP, if anywhere: a loopback
    /// address, unless `insecure_status`.
    pub status: Option<Address>,
    /// Whether to show the page to other hosts, although nothing protects it.
    pub insecure_status: bool,
    /// Whether to serve, without a key, a server that speaks the original's protocol, too.
    pub original: bool,
}

impl Default for ClientOptions {
    fn default() -> Self {
        Self::new()
    }
}

impl ClientOptions {
    /// Returns what tpclient does without an option.
    pub fn new() -> Self {
        Self {
            servers: vec![Address::new(LOOPBACK, CONTROL_PORT)],
            tunnel_port: None,
            local: [(Service::default(), Address::new(LOOPBACK, LOCAL_PORT))].into(),
            proxy_protocol: BTreeMap::new(),
            pool: POOL,
            linger: LINGER,
            key: None,
            status: None,
            insecure_status: false,
            original: false,
        }
    }
}
