//! What the tests share: a tunnel in this process, local services, and bytes that can be told
//! apart. Every wait has a deadline.

use std::collections::BTreeMap;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock, mpsc};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use tunnel_proxy::{Address, Client, ClientOptions, Handle, Key, Server, ServerOptions};

pub mod between;
pub mod faulty_relay;
pub mod load;
pub mod peer;
pub mod programs;
#[cfg(target_os = "linux")]
pub mod proxies;
pub mod random;
#[cfg(target_os = "linux")]
pub mod visits;

pub use random::{Pattern, expect_pattern, pattern, send_pattern};

/// How long a test waits before it fails: generous, as both cores may be busy with other things.
pub const DEADLINE: Duration = Duration::from_secs(20);

/// Whether the two halves of a tunnel share a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protection {
    Plain,
    Sealed,
}

static KEY: LazyLock<Key> = LazyLock::new(|| Key::generate().unwrap());

impl Protection {
    pub fn key(self) -> Option<Key> {
        (self == Self::Sealed).then(|| KEY.clone())
    }

    pub fn keys(self) -> Vec<Key> {
        self.key().into_iter().collect()
    }
}

/// These options with other values in some of their fields.
macro_rules! with {
    ($options:expr; $($field:ident $(: $value:expr)?),+ $(,)?) => {{
        let mut options = $options;
        $($crate::support::with!(@set options $field $($value)?);)+
        options
    }};
    (@set $options:ident $field:ident $value:expr) => { $options.$field = $value };
    (@set $options:ident $field:ident) => { $options.$field = $field };
}
pub(crate) use with;

/// Makes two tests of each of these functions, in a module of its name: `plain` without a key, and
/// `sealed` with one. A function behind which stands `(sealed as root)` looks into `/proc` at what a
/// program with a key shows to nobody but root.
macro_rules! plain_and_sealed {
    ($($(#[$attribute:meta])* $name:ident $(($($sealed:ident)+))?,)*) => {
        $(
            mod $name {
                $(#[$attribute])*
                #[test]
                fn plain() {
                    super::$name($crate::support::Protection::Plain);
                }

                $crate::support::plain_and_sealed! {
                    @sealed $name $(($($sealed)+))? $(#[$attribute])*
                }
            }
        )*
    };
    (@sealed $name:ident (sealed as root) $(#[$attribute:meta])*) => {
        $crate::support::plain_and_sealed! {
            @sealed $name
            $(#[$attribute])*
            #[ignore = "needs root, as the programs have a key: cargo test -- --include-ignored"]
        }
    };
    (@sealed $name:ident $(#[$attribute:meta])*) => {
        $(#[$attribute])*
        #[test]
        fn sealed() {
            super::$name($crate::support::Protection::Sealed);
        }
    };
}
pub(crate) use plain_and_sealed;

/// A test's turn, which ends when this is dropped, best before the test waits for what the programs give
/// back.
#[must_use]
pub struct Turn {
    is_shared: bool,
}

/// Who has a turn.
struct Turns {
    is_alone: bool,
    sharing: usize,
    waiting_to_share: usize,
}

static TURNS: Mutex<Turns> = Mutex::new(Turns {
    is_alone: false,
    sharing: 0,
    waiting_to_share: 0,
});
static TURN_ENDED: Condvar = Condvar::new();

/// Waits for the turn of a test that measures rates, or what a crowd takes. Such tests run one at a
/// time: two of them would share the processors, and the memory that the kernel allows all sockets
/// together, and measure each other.
pub fn take_turn() -> Turn {
    let mut turns = TURNS.lock();
    TURN_ENDED.wait_while(&mut turns, |it| {
        it.is_alone || it.sharing + it.waiting_to_share > 0
    });
    turns.is_alone = true;
    Turn { is_shared: false }
}

/// Waits until no test has a turn alone, and lets none have one until dropped: for a test whose load would
/// spoil what others measure, or that counts on the buffers that the kernel gives a connection, which
/// are small beside a crowd. Several such tests run at a time. They go first: those that would wait behind
/// one that takes its turn alone would miss the others, and run later by themselves.
pub fn share_turn() -> Turn {
    let mut turns = TURNS.lock();
    turns.waiting_to_share += 1;
    TURN_ENDED.wait_while(&mut turns, |it| it.is_alone);
    turns.waiting_to_share -= 1;
    turns.sharing += 1;
    Turn { is_shared: true }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let mut turns = TURNS.lock();
        match self.is_shared {
            true => turns.sharing -= 1,
            false => turns.is_alone = false,
        }
        TURN_ENDED.notify_all();
    }
}

/// Any free port on the loopback address.
pub fn any() -> Address {
    Address::new("127.0.0.1", 0)
}

/// A port that nobody listens on, and that nobody else gets as long as this lives.
pub struct ClosedPort {
    pub addr: SocketAddr,
    _bound: socket2::Socket,
}

pub fn closed_port() -> ClosedPort {
    let any: SocketAddr = ([127, 0, 0, 1], 0).into();
    let bound = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    bound.bind(&any.into()).unwrap();
    ClosedPort {
        addr: bound.local_addr().unwrap().as_socket().unwrap(),
        _bound: bound,
    }
}

/// The server's options for tests: the defaults on free ports.
pub fn server_options(protection: Protection) -> ServerOptions {
    with!(ServerOptions::default();
            public: unnamed(any()),
            tunnel: any(),
            control: any(),
            keys: protection.keys(),
    )
}

/// The client's options for this server, its key included, and this local service.
pub fn client_options(server: &RunningServer, local: SocketAddr) -> ClientOptions {
    with!(ClientOptions::default();
            servers: vec![server.control.into()],
            local: unnamed(local),
            key: server.key.clone(),
    )
}

/// The one service without a name, at this address.
pub fn unnamed(address: impl Into<Address>) -> BTreeMap<tunnel_proxy::Service, Address> {
    [(tunnel_proxy::Service::default(), address.into())].into()
}

/// Lets this process have as many descriptors as its user may, for a test that needs thousands.
#[cfg(target_os = "linux")]
pub fn raise_descriptors() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let maximum = getrlimit(Resource::Nofile).maximum;
    let current = maximum;
    setrlimit(Resource::Nofile, Rlimit { current, maximum }).unwrap();
}

/// Connects, with a deadline on every later read and write.
pub fn connect(address: SocketAddr) -> TcpStream {
    try_connect(address).unwrap()
}

/// The same where the other side may close at once.
pub fn try_connect(address: SocketAddr) -> std::io::Result<TcpStream> {
    TcpStream::connect_timeout(&address, DEADLINE).map(with_deadline)
}

/// Opens a connection from another loopback address, without waiting for the far side: what is said
/// at once may be lost.
#[cfg(target_os = "linux")]
pub fn open_from(source: [u8; 4], to: SocketAddr) -> TcpStream {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    let source = SocketAddr::from((source, 0));
    socket.bind(&source.into()).unwrap();
    socket.set_nonblocking(true).unwrap();
    // The connection is under way, or was refused: then a write says so.
    let _ = socket.connect(&to.into());
    socket.into()
}

/// Connects from another address of this host.
#[cfg(target_os = "linux")]
pub fn connect_from(source: &str, to: SocketAddr) -> TcpStream {
    try_connect_from(source, to).unwrap()
}

#[cfg(target_os = "linux")]
pub fn try_connect_from(source: &str, to: SocketAddr) -> std::io::Result<TcpStream> {
    let domain = socket2::Domain::for_address(to);
    let socket = socket2::Socket::new(domain, socket2::Type::STREAM, None).unwrap();
    let source = SocketAddr::new(source.parse().unwrap(), 0);
    socket.bind(&source.into()).unwrap();
    socket.connect(&to.into())?;
    Ok(with_deadline(socket.into()))
}

/// Asserts that whoever comes from this address of this host is reset, perhaps before its connect
/// returns.
#[cfg(target_os = "linux")]
pub fn assert_refused(source: &str, to: SocketAddr) {
    assert_was_reset(try_connect_from(source, to));
}

/// Asserts that a visitor is reset, perhaps before its connect returns.
pub fn assert_was_reset(connected: std::io::Result<TcpStream>) {
    match connected {
        Ok(visitor) => assert_reset(&visitor, DEADLINE),
        Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionReset),
    }
}

fn with_deadline(socket: TcpStream) -> TcpStream {
    socket.set_read_timeout(Some(DEADLINE)).unwrap();
    socket.set_write_timeout(Some(DEADLINE)).unwrap();
    socket.set_nodelay(true).unwrap();
    socket
}

/// Accepts one connection, or fails at the deadline.
pub fn accept(listener: &TcpListener) -> TcpStream {
    listener.set_nonblocking(true).unwrap();
    let start = Instant::now();
    loop {
        match listener.accept() {
            Ok((socket, _)) => {
                socket.set_nonblocking(false).unwrap();
                return with_deadline(socket);
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                assert!(start.elapsed() < DEADLINE, "nobody connected");
                thread::sleep(Duration::from_millis(1));
            }
            Err(error) => panic!("accept: {error}"),
        }
    }
}

/// Polls until the condition holds, or fails at the deadline.
pub fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < DEADLINE, "not in time: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// Looks until what is seen has stayed the same for this time, and returns that.
pub fn once_settled<T: PartialEq>(what: &str, time: Duration, look: impl Fn() -> T) -> T {
    let (mut seen, mut settled, mut last) = (look(), Duration::ZERO, Instant::now());
    eventually(what, || {
        let (now, pause) = (look(), last.elapsed());
        last = Instant::now();
        // While this thread was held up, so may have been what it looks at.
        settled += pause.min(Duration::from_millis(20));
        if now != seen {
            (seen, settled) = (now, Duration::ZERO);
        }
        settled > time
    });
    seen
}

/// Returns the code and the body of what a status page has at a path; an error if that is not all of it.
pub fn try_get(page: SocketAddr, path: &str) -> std::io::Result<(u16, String)> {
    let mut socket = try_connect(page)?;
    let request = format!("GET {path} HTTP/1.1\r\nHost: {page}\r\n\r\n");
    socket.write_all(request.as_bytes())?;
    let mut text = String::new();
    socket.read_to_string(&mut text)?;
    let (head, body) = text
        .split_once("\r\n\r\n")
        .ok_or(ErrorKind::UnexpectedEof)?;
    Ok((head[9..12].parse().unwrap(), body.to_owned()))
}

/// Sets a flag when dropped: what goes on until then ends however the test does.
pub struct SetOnDrop<'a>(pub &'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// Sets a socket to end with RST instead of FIN.
pub fn reset_on_close(socket: &TcpStream) {
    let zero = Some(Duration::ZERO);
    socket2::SockRef::from(socket).set_linger(zero).unwrap();
}

/// Asserts that the next read is a reset, and how long that took at most.
pub fn assert_reset(mut socket: &TcpStream, within: Duration) {
    let start = Instant::now();
    let mut buffer = [0; 4096];
    let error = loop {
        match socket.read(&mut buffer) {
            Ok(0) => panic!("a proper end in the place of a reset"),
            Ok(_) => {}
            // A pause of the machine interrupts a read.
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => break error,
        }
    };
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    assert!(start.elapsed() < within, "after {:?}", start.elapsed());
}

/// Asserts that nothing comes any more but the end.
pub fn assert_ended(mut socket: &TcpStream) {
    let mut rest = Vec::new();
    socket.read_to_end(&mut rest).unwrap();
    assert_eq!(rest, b"", "bytes where the end was due");
}

/// Sends a line's worth of bytes, and asserts that the same come back.
pub fn assert_echo(mut socket: &TcpStream, text: &str) {
    socket.write_all(text.as_bytes()).unwrap();
    let mut back = vec![0; text.len()];
    socket.read_exact(&mut back).unwrap();
    assert_eq!(String::from_utf8_lossy(&back), text);
}

/// What an echo service owes a new visitor.
pub fn echo(visitor: &TcpStream) {
    assert_echo(visitor, "hello");
}

/// A listener on any port that can be dialled a thousand times before it takes the first
/// connection.
fn roomy_listener() -> TcpListener {
    let any: SocketAddr = ([127, 0, 0, 1], 0).into();
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    socket.bind(&any.into()).unwrap();
    socket.listen(4096).unwrap();
    socket.into()
}

/// A local service: a thread for each connection, until dropped.
pub struct Service {
    pub addr: SocketAddr,
    stopped: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Service {
    pub fn start(serve: impl Fn(TcpStream) + Send + Sync + 'static) -> Self {
        let listener = roomy_listener();
        let addr = listener.local_addr().unwrap();
        let stopped = Arc::new(AtomicBool::new(false));
        let (serve, stop) = (Arc::new(serve), stopped.clone());
        let thread = thread::spawn(move || {
            while let Ok((socket, _)) = listener.accept() {
                if stop.load(Ordering::SeqCst) {
                    return;
                }
                let serve = serve.clone();
                thread::spawn(move || serve(with_deadline(socket)));
            }
        });
        Self {
            addr,
            stopped,
            thread: Some(thread),
        }
    }

    /// Sends everything back until a `?` comes. Then it says nothing more, and stays for a while.
    pub fn echo_or_silent() -> Self {
        Self::start(|mut socket| {
            let mut buffer = [0; 1024];
            while let Ok(count @ 1..) = socket.read(&mut buffer) {
                if buffer[count - 1] == b'?' {
                    return thread::sleep(DEADLINE / 2);
                }
                let _ = socket.write_all(&buffer[..count]);
            }
        })
    }

    /// Hands out the record of each connection once it has ended.
    pub fn recording() -> (Self, mpsc::Receiver<Record>) {
        let (sender, records) = mpsc::channel();
        let service = Self::start(move |socket| {
            let _ = sender.send(Record::of(&socket));
        });
        (service, records)
    }

    /// Sends everything back.
    pub fn echo() -> Self {
        Self::start(|socket| send_back(&socket))
    }

    /// Sends everything back; to a visitor that begins with `!`, sends bulk without end.
    pub fn echo_or_bulk() -> Self {
        Self::start(|mut socket| {
            let mut first = [0];
            if socket.peek(&mut first).is_err() || &first != b"!" {
                return send_back(&socket);
            }
            let piece = vec![7; 64 * 1024];
            while socket.write_all(&piece).is_ok() {}
        })
    }
}

/// Ends when the visitor does, or when it cuts the connection as it has seen enough.
fn send_back(mut socket: &TcpStream) {
    let mut buffer = [0; 16 * 1024];
    while let Ok(count @ 1..) = socket.read(&mut buffer) {
        if socket.write_all(&buffer[..count]).is_err() {
            return;
        }
    }
}

/// All that a connection brought, and the error that it ended with, if it did not end well.
#[derive(Debug, PartialEq, Eq)]
pub struct Record {
    pub bytes: Vec<u8>,
    pub error: Option<ErrorKind>,
}

impl Record {
    /// These bytes and a proper end.
    pub fn whole(bytes: &[u8]) -> Self {
        Self {
            bytes: bytes.to_vec(),
            error: None,
        }
    }

    pub fn of(mut socket: &TcpStream) -> Self {
        let mut bytes = Vec::new();
        let end = socket.read_to_end(&mut bytes);
        Self {
            bytes,
            error: end.err().map(|error| error.kind()),
        }
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        self.stopped.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect(self.addr);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A server in this process, until dropped.
pub struct RunningServer {
    pub public: SocketAddr,
    pub public_addrs: BTreeMap<tunnel_proxy::Service, SocketAddr>,
    pub tunnel: SocketAddr,
    pub control: SocketAddr,
    /// The first one of its keys, if it has any.
    pub key: Option<Key>,
    running: Running,
}

impl RunningServer {
    pub fn start(options: ServerOptions) -> Self {
        let key = options.keys.first().cloned();
        let server = Server::bind(options).unwrap();
        Self {
            key,
            public: server.public_addr(),
            public_addrs: server.public_addrs(),
            tunnel: server.tunnel_addr(),
            control: server.control_addr(),
            running: Running::start(server.handle(), move || server.run()),
        }
    }

    /// A visitor's connection.
    pub fn visit(&self) -> TcpStream {
        connect(self.public)
    }

    pub fn handle(&self) -> &Handle {
        &self.running.handle
    }

    pub fn wait_for_end(&mut self) {
        self.running.wait_for_end();
    }
}

/// A client in this process, until dropped.
pub struct RunningClient {
    running: Running,
}

impl RunningClient {
    pub fn start(options: ClientOptions) -> Self {
        let client = Client::new(options);
        Self {
            running: Running::start(client.handle(), move || client.run()),
        }
    }

    /// A client of a server made by hand, which listens there.
    pub fn of(
        protection: Protection,
        controls: &TcpListener,
        tunnels: &TcpListener,
        local: SocketAddr,
        pool: usize,
    ) -> Self {
        Self::start(with!(ClientOptions::default();
                    servers: vec![controls.local_addr().unwrap().into()],
                    tunnel_port: Some(tunnels.local_addr().unwrap().port()),
                    local: unnamed(local),
                    pool,
                    key: protection.key(),
        ))
    }

    pub fn handle(&self) -> &Handle {
        &self.running.handle
    }

    pub fn wait_for_end(&mut self) {
        self.running.wait_for_end();
    }
}

struct Running {
    handle: Handle,
    thread: Option<JoinHandle<Result<(), tunnel_proxy::Error>>>,
}

impl Running {
    fn start(
        handle: Handle,
        run: impl FnOnce() -> Result<(), tunnel_proxy::Error> + Send + 'static,
    ) -> Self {
        Self {
            handle,
            thread: Some(thread::spawn(run)),
        }
    }

    fn wait_for_end(&mut self) {
        let Some(thread) = self.thread.take() else {
            return;
        };
        eventually("run() returns", || thread.is_finished());
        thread.join().unwrap().unwrap();
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.handle.stop(Duration::ZERO);
        if !thread::panicking() {
            self.wait_for_end();
        }
    }
}

/// A server and its client in this process.
pub struct Tunnel {
    pub client: RunningClient,
    pub server: RunningServer,
}

impl Tunnel {
    /// Starts both for this local service, with that many idle tunnels.
    pub fn start(protection: Protection, local: SocketAddr, pool: usize) -> Self {
        let server = RunningServer::start(server_options(protection));
        let client = RunningClient::start(with!(client_options(&server, local);
                    pool,
        ));
        Self { client, server }
    }

    pub fn visit(&self) -> TcpStream {
        self.server.visit()
    }
}
