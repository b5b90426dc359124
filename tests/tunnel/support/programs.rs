//! The two programs in processes of their own, alone or together.

use std::io::{BufRead, BufReader};
use std::net::{SocketAddr, TcpStream};
use std::process::{Child, ChildStderr, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
#[cfg(unix)]
use rustix::process::{Pid, Signal, kill_process};

use super::{DEADLINE, Protection, connect, eventually, once_settled};

/// What a fault has taken must be given back after this time: a tunnel beyond the pool stays idle for
/// 10 s, and its threads stay parked for 5 s.
const RECOVERY: Duration = Duration::from_secs(25);

/// How a program is started.
#[derive(Clone, Copy)]
pub struct Launch<'a> {
    protection: Protection,
    under: &'a [&'a str],
    rust_log: Option<&'a str>,
    ports: Option<[SocketAddr; 3]>,
    unread: bool,
    names: Option<[&'a str; 2]>,
}

impl<'a> Launch<'a> {
    pub fn new(protection: Protection) -> Self {
        Self {
            protection,
            under: &[],
            rust_log: None,
            ports: None,
            unread: false,
            names: None,
        }
    }

    /// Starts the program by way of this command, which is to become the program: the program and
    /// its words follow.
    pub fn under(mut self, command: &'a [&'a str]) -> Self {
        self.under = command;
        self
    }

    /// Sets `RUST_LOG`.
    pub fn rust_log(mut self, value: Option<&'a str>) -> Self {
        self.rust_log = value;
        self
    }

    /// Gives a server these ports in the place of any free ones.
    pub fn on(mut self, ports: [SocketAddr; 3]) -> Self {
        self.ports = Some(ports);
        self
    }

    /// Gives a client these names for its server and its local service, in the place of their
    /// numbers.
    pub fn named(mut self, server: &'a str, local: &'a str) -> Self {
        self.names = Some([server, local]);
        self
    }

    /// Leaves the log [unread](Program::unread_log), in a pipe that holds little.
    pub fn unread(mut self) -> Self {
        self.unread = true;
        self
    }

    /// `tpserver`, with these options besides.
    pub fn server(self, arguments: &[&str]) -> Program {
        let ports = match self.ports {
            Some(ports) => ports.map(|port| port.to_string()),
            None => [(); 3].map(|()| "127.0.0.1:0".to_owned()),
        };
        let [public, tunnel, control] = &ports;
        let ports = ["-p", public, "-t", tunnel, "-c", control];
        let all: Vec<_> = ports.iter().chain(arguments).copied().collect();
        self.start(env!("CARGO_BIN_EXE_tpserver"), &all)
    }

    /// `tpclient` for a server on these ports and this local service, with these options besides.
    pub fn client(self, server: [SocketAddr; 3], local: SocketAddr, arguments: &[&str]) -> Program {
        let [_, tunnel, control] = server.map(|address| address.port().to_string());
        let (host, local) = match self.names {
            Some([host, name]) => (host.to_owned(), format!("{name}:{}", local.port())),
            None => (server[2].ip().to_string(), local.to_string()),
        };
        let to = ["-s", &host, "-t", &tunnel, "-c", &control, "-l", &local];
        let all: Vec<_> = to.iter().chain(arguments).copied().collect();
        self.start(env!("CARGO_BIN_EXE_tpclient"), &all)
    }

    /// `tpserver` with these options and no others.
    pub fn bare_server(self, arguments: &[&str]) -> Program {
        self.start(env!("CARGO_BIN_EXE_tpserver"), arguments)
    }

    /// `tpclient` with these options and no others.
    pub fn bare_client(self, arguments: &[&str]) -> Program {
        self.start(env!("CARGO_BIN_EXE_tpclient"), arguments)
    }

    fn start(self, program: &str, arguments: &[&str]) -> Program {
        let words: Vec<_> = self.under.iter().copied().chain([program]).collect();
        let mut command = Command::new(words[0]);
        command
            .args(&words[1..])
            .args(arguments)
            .env_remove("RUST_LOG")
            .envs(self.rust_log.map(|value| ("RUST_LOG", value)))
            .env_remove("TP_KEY")
            .envs(self.protection.key().map(|key| ("TP_KEY", key.to_base64())))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        Program::start(command, self.unread)
    }
}

/// Three ports of this loopback host that are free now, and stay so if no other test uses it: for a
/// server that comes back, or that cannot tell where it listens.
pub fn ports_of(host: &str) -> [SocketAddr; 3] {
    use socket2::{Domain, Socket, Type};
    let any = SocketAddr::new(host.parse().unwrap(), 0);
    // The sockets are bound, but do not listen: a program that another test starts in this moment
    // has all sockets of this process for a while, and whoever is in the queue of a listener that
    // ends then is reset. They stay bound as long as this process lives: otherwise a test that listens
    // at all addresses might be given one of these ports before the server has it.
    static BOUND: Mutex<Vec<Socket>> = Mutex::new(Vec::new());
    let sockets =
        [(); 3].map(|()| Socket::new(Domain::for_address(any), Type::STREAM, None).unwrap());
    let ports = sockets.each_ref().map(|socket| {
        socket.set_reuse_address(true).unwrap();
        socket.bind(&any.into()).unwrap();
        socket.local_addr().unwrap().as_socket().unwrap()
    });
    BOUND.lock().extend(sockets);
    ports
}

/// One of the two programs in a process of its own, killed when dropped.
pub struct Program {
    child: Child,
    log: Arc<(Mutex<Vec<String>>, Condvar)>,
    unread: Option<ChildStderr>,
}

impl Program {
    fn start(mut command: Command, unread: bool) -> Self {
        let mut child = command.spawn().unwrap();
        let log = Arc::new((Mutex::new(Vec::new()), Condvar::new()));
        let stderr = child.stderr.take();
        let mut program = Self {
            child,
            log,
            unread: stderr,
        };
        if unread {
            #[cfg(target_os = "linux")]
            rustix::pipe::fcntl_setpipe_size(program.unread_log(), 4096).unwrap();
        } else {
            program.read_log();
        }
        program
    }

    /// The log of a program that was [started so](Launch::unread).
    pub fn unread_log(&self) -> &ChildStderr {
        self.unread.as_ref().unwrap()
    }

    /// Reads the log from now on.
    pub fn read_log(&mut self) {
        let (stderr, shared) = (self.unread.take().unwrap(), self.log.clone());
        thread::spawn(move || read_log(stderr, &shared));
    }

    /// `tpserver` on free ports, with these options besides; and the addresses of its three ports.
    pub fn server(protection: Protection, arguments: &[&str]) -> (Self, [SocketAddr; 3]) {
        let server = Launch::new(protection).server(arguments);
        let addresses = server.addresses();
        (server, addresses)
    }

    /// `tpclient` for that server and this local service, with these options besides.
    pub fn client(
        protection: Protection,
        server: [SocketAddr; 3],
        local: SocketAddr,
        arguments: &[&str],
    ) -> Self {
        Launch::new(protection).client(server, local, arguments)
    }

    /// Where a server listens, by its log.
    pub fn addresses(&self) -> [SocketAddr; 3] {
        ["visitors", "tunnels", "the control link"].map(|whom| self.address(whom))
    }

    /// Where a server listens for this, by its log.
    pub fn address(&self, whom: &str) -> SocketAddr {
        let end = format!(" for {whom}");
        let (lines, more) = &*self.log;
        let mut lines = lines.lock();
        let deadline = Instant::now() + DEADLINE;
        loop {
            if let Some(line) = lines.iter().find(|line| line.ends_with(&end)) {
                let address = line.split("listening on ").nth(1).unwrap();
                return address.split(' ').next().unwrap().parse().unwrap();
            }
            let late = more.wait_until(&mut lines, deadline).timed_out();
            assert!(!late, "{whom:?} not in the log: {lines:#?}");
        }
    }

    /// The first line of the log that contains this text, now or in time.
    pub fn wait_for_line(&self, text: &str) -> String {
        self.wait_for_lines(text, 1)
    }

    /// The same for the last of so many lines.
    pub fn wait_for_lines(&self, text: &str, count: usize) -> String {
        let (lines, more) = &*self.log;
        let mut lines = lines.lock();
        let deadline = Instant::now() + DEADLINE;
        loop {
            let mut found = lines.iter().filter(|line| line.contains(text));
            if let Some(line) = found.nth(count - 1) {
                return line.clone();
            }
            let late = more.wait_until(&mut lines, deadline).timed_out();
            assert!(!late, "not {count} {text:?} in the log: {lines:#?}");
        }
    }

    /// Every line of the log so far that contains this text.
    pub fn lines_with(&self, text: &str) -> Vec<String> {
        let lines = self.log.0.lock();
        let found = lines.iter().filter(|line| line.contains(text));
        found.cloned().collect()
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal. One that stops the program is sent to one of its threads, and until that one runs,
    /// the others may go on: this waits until all stand still.
    #[cfg(unix)]
    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
        #[cfg(target_os = "linux")]
        if signal == Signal::STOP {
            eventually("the program stands still", || self.stands_still());
        }
    }

    /// Ends the program at once, as a lack of memory would.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// How the program ended, if it has.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().unwrap()
    }

    /// Waits until the program has ended by itself.
    pub fn wait_for_end(&mut self) -> ExitStatus {
        eventually("the program ends", || self.ended().is_some());
        self.child.wait().unwrap()
    }
}

/// What `/proc` tells about a program.
#[cfg(target_os = "linux")]
impl Program {
    /// How many descriptors the process has.
    pub fn descriptors(&self) -> usize {
        self.visible_descriptors().unwrap()
    }

    /// The same; an error where a program with a key shows them to root only.
    fn visible_descriptors(&self) -> std::io::Result<usize> {
        let path = format!("/proc/{}/fd", self.pid());
        std::fs::read_dir(path).map(Iterator::count)
    }

    /// How many threads the process has.
    pub fn threads(&self) -> usize {
        let path = format!("/proc/{}/task", self.pid());
        std::fs::read_dir(path).unwrap().count()
    }

    /// True if none of its threads runs, as it was stopped.
    fn stands_still(&self) -> bool {
        let path = format!("/proc/{}/task", self.pid());
        let tasks = std::fs::read_dir(path).unwrap().flatten();
        let mut stats = tasks.filter_map(|it| std::fs::read_to_string(it.path().join("stat")).ok());
        // The state stands behind the name, which may contain anything.
        stats.all(|stat| {
            stat.rsplit_once(") ")
                .is_some_and(|(_, it)| it.starts_with('T'))
        })
    }

    /// How many of its threads have something to do, or wait for it at a certain place.
    pub fn busy_threads(&self) -> usize {
        let path = format!("/proc/{}/task", self.pid());
        let tasks = std::fs::read_dir(path).unwrap().flatten();
        let names = tasks.filter_map(|it| std::fs::read_to_string(it.path().join("comm")).ok());
        names.filter(|name| name.trim_end() != "parked").count()
    }

    /// How many of the process's descriptors are ends of pipes.
    pub fn pipe_ends(&self) -> usize {
        let path = format!("/proc/{}/fd", self.pid());
        let files = std::fs::read_dir(path).unwrap().flatten();
        let targets = files.filter_map(|file| std::fs::read_link(file.path()).ok());
        targets
            .filter(|it| it.to_string_lossy().starts_with("pipe:"))
            .count()
    }

    /// The process's own share of memory in KiB: `Pss` is all of it, `Pss_Anon` what it has besides
    /// its code, whose share depends on how often the program runs just now.
    pub fn memory(&self, kind: &str) -> usize {
        let path = format!("/proc/{}/smaps_rollup", self.pid());
        let text = std::fs::read_to_string(path).unwrap();
        let mut lines = text.lines().filter_map(|line| line.split_once(':'));
        let (_, value) = lines.find(|(name, _)| *name == kind).unwrap();
        value.trim().trim_end_matches(" kB").parse().unwrap()
    }

    /// The share of one processor that the process takes during this time, in percent.
    pub fn processor_share(&self, time: Duration) -> f64 {
        let before = self.processor_ticks();
        thread::sleep(time);
        // A tick is a hundredth of a second.
        (self.processor_ticks() - before) as f64 / time.as_secs_f64()
    }

    fn processor_ticks(&self) -> u64 {
        let path = format!("/proc/{}/stat", self.pid());
        let text = std::fs::read_to_string(path).unwrap();
        // The name may contain anything. User and system time are the 12th and 13th field behind
        // it.
        let (_, fields) = text.rsplit_once(')').unwrap();
        let fields = fields.split_ascii_whitespace().skip(11).take(2);
        fields.map(|field| field.parse::<u64>().unwrap()).sum()
    }
}

/// Both programs, and what they hold at rest.
#[cfg(target_os = "linux")]
pub struct Both {
    pub server: Program,
    pub client: Program,
    pub addresses: [SocketAddr; 3],
    at_rest: Holdings,
}

/// Descriptors and threads of the server, and of the client. Of a program with a key, only root sees
/// the descriptors: to others they are none, before a test as well as after it.
#[cfg(target_os = "linux")]
type Holdings = [(Option<usize>, usize); 2];

#[cfg(target_os = "linux")]
impl Both {
    /// Starts both for this local service, with these options for the server and the client.
    pub fn start(protection: Protection, local: SocketAddr, options: [&[&str]; 2]) -> Self {
        let launch = Launch::new(protection);
        let server = launch.server(options[0]);
        let addresses = server.addresses();
        let client = launch.client(addresses, local, options[1]);
        Self::at_rest(server, client, addresses)
    }

    /// These two, once they have a session and are at rest.
    pub fn at_rest(server: Program, client: Program, addresses: [SocketAddr; 3]) -> Self {
        client.wait_for_line("connected to");
        let mut both = Self {
            server,
            client,
            addresses,
            at_rest: Holdings::default(),
        };
        let (what, time) = ("the programs are at rest", Duration::from_millis(500));
        both.at_rest = once_settled(what, time, || both.holdings(Program::busy_threads));
        both
    }

    /// Waits until no more threads are at work than at rest.
    pub fn wait_for_rest(&self) {
        eventually("the programs are at rest again", || {
            let programs = [&self.server, &self.client].into_iter();
            let mut rest = programs.zip(self.at_rest);
            rest.all(|(program, (_, threads))| program.busy_threads() <= threads)
        });
    }

    /// A visitor's connection.
    pub fn visit(&self) -> TcpStream {
        connect(self.addresses[0])
    }

    /// Asserts that a fault has left nothing: `fresh` succeeds with a new visitor, descriptors and
    /// threads are what they were, nobody panicked, and nothing goes on.
    pub fn assert_recovered(&self, fresh: impl FnOnce(&TcpStream)) {
        fresh(&self.visit());
        let (start, mut now) = (Instant::now(), Holdings::default());
        while now != self.at_rest {
            let late = start.elapsed() > RECOVERY;
            assert!(!late, "{now:?}, but at rest {:?}", self.at_rest);
            thread::sleep(Duration::from_millis(50));
            now = self.holdings(Program::threads);
        }
        thread::scope(|scope| {
            for program in [&self.server, &self.client] {
                assert_eq!(program.lines_with("panicked"), [""; 0]);
                scope.spawn(|| {
                    let share = program.processor_share(Duration::from_secs(2));
                    assert!(share < 2.0, "{share} % of a processor at rest");
                });
            }
        });
    }

    fn holdings(&self, threads: impl Fn(&Program) -> usize) -> Holdings {
        [&self.server, &self.client].map(|it| (it.visible_descriptors().ok(), threads(it)))
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        self.kill();
        if thread::panicking() {
            eprintln!("{:#?}", self.lines_with(""));
        }
    }
}

fn read_log(stderr: ChildStderr, log: &(Mutex<Vec<String>>, Condvar)) {
    for line in BufReader::new(stderr).lines().map_while(Result::ok) {
        log.0.lock().push(line);
        log.1.notify_all();
    }
}
