//! The systems that are compared, each started as processes of its own, the way a user would.

use std::error::Error;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::service::{Service, Work};
use crate::stop::rest;
use crate::wan::Relay;

pub type Fallible<T> = Result<T, Box<dyn Error + Send + Sync>>;

/// How long a system may take until its first visitor is served.
const START_DEADLINE: Duration = Duration::from_secs(10);

/// How often a system that starts is looked at.
const START_PAUSE: Duration = Duration::from_millis(20);

/// Where the search for free ports begins: below those that Linux gives to outgoing connections,
/// which a run makes by the ten thousand.
const FIRST_PORT: u16 = 20_000;

/// The one port that bore's server takes clients on; it has no option for another.
const BORE_CONTROL: u16 = 7835;

const KEY_FILE: &str = "tp.key";

/// What `/proc/PID/stat` counts processor time in: 1/100 s for every program, whatever the kernel
/// itself uses.
const TICKS_PER_SEC: f64 = 100.0;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum System {
    Direct,
    Plain,
    Key,
    Rathole,
    RatholeNoise,
    Bore,
}

impl System {
    pub const ALL: [Self; 6] = [
        Self::Direct,
        Self::Plain,
        Self::Key,
        Self::Rathole,
        Self::RatholeNoise,
        Self::Bore,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Plain => "plain",
            Self::Key => "key",
            Self::Rathole => "rathole",
            Self::RatholeNoise => "rathole+noise",
            Self::Bore => "bore",
        }
    }
}

/// Another tunnel's program.
struct Peer {
    path: PathBuf,
    version: String,
}

/// What lies between our two programs.
#[derive(Default)]
pub struct Link {
    /// Each way, on the control link and on tunnels.
    pub delay: Option<Duration>,
    /// The client's `--pool`, if not the default.
    pub pool: Option<&'static str>,
}

/// What the systems are started from.
pub struct Programs {
    tpserver: PathBuf,
    tpclient: PathBuf,
    pub version: String,
    /// In place of a peer, why it is missing.
    rathole: Result<Peer, String>,
    bore: Result<Peer, String>,
    /// The key, the peers' configurations, and logs.
    folder: TempDir,
}

impl Programs {
    /// Our programs in this folder, and the peers under these names or paths.
    pub fn find(bins: &Path, rathole: &str, bore: &str) -> Fallible<Self> {
        let (tpserver, tpclient) = (bins.join("tpserver"), bins.join("tpclient"));
        let key = output(&tpserver, &["--generate-key"])?;
        let folder = tempfile::tempdir()?;
        fs::write(folder.path().join(KEY_FILE), key)?;
        let mut bore = peer(bore, "bore-cli ");
        if let Err(error) = TcpListener::bind(("127.0.0.1", BORE_CONTROL)) {
            bore = bore.and(Err(format!(
                "its only control port, {BORE_CONTROL}: {error}"
            )));
        }
        Ok(Self {
            version: output(&tpserver, &["--version"])?.trim().to_owned(),
            tpserver,
            tpclient,
            rathole: peer(rathole, "Build Version:"),
            bore,
            folder,
        })
    }

    /// The other tunnels: the version of each, or why it is missing.
    pub fn peers(&self) -> [(&str, Result<&str, &str>); 2] {
        [("rathole", &self.rathole), ("bore", &self.bore)].map(|(name, peer)| {
            let version = peer.as_ref().map(|it| &*it.version);
            (name, version.map_err(|why| &**why))
        })
    }

    pub fn has(&self, system: System) -> bool {
        match system {
            System::Direct | System::Plain | System::Key => true,
            System::Rathole | System::RatholeNoise => self.rathole.is_ok(),
            System::Bore => self.bore.is_ok(),
        }
    }

    /// Fresh processes, and a service of their own, ready for visitors.
    pub fn start(&self, system: System) -> Fallible<Tunnel> {
        self.start_with(system, &Link::default())
    }

    /// The same, with another link between our two programs; the peers' is as it is.
    pub fn start_with(&self, system: System, link: &Link) -> Fallible<Tunnel> {
        let mut tunnel = Tunnel {
            processes: Vec::new(),
            relays: Vec::new(),
            public: free_port()?,
            service: Service::start()?,
        };
        let key = ["--key-file", &self.file(KEY_FILE)];
        match system {
            System::Direct => tunnel.public = tunnel.service.addr,
            System::Plain => self.start_own(&mut tunnel, link, &[])?,
            System::Key => self.start_own(&mut tunnel, link, &key)?,
            System::Rathole => self.start_rathole(&mut tunnel, ["", ""])?,
            System::RatholeNoise => {
                let [server, client] = self.noise()?;
                self.start_rathole(&mut tunnel, [&server, &client])?;
            }
            System::Bore => self.start_bore(&mut tunnel)?,
        }
        tunnel.wait_until_it_serves()?;
        Ok(tunnel)
    }

    /// With these words for both programs besides.
    fn start_own(&self, tunnel: &mut Tunnel, link: &Link, both: &[&str]) -> Fallible<()> {
        let [public, mut control, mut tunnels] = [tunnel.public, free_port()?, free_port()?];
        let [p, c, t] = [public, control, tunnels].map(|it| it.to_string());
        let words = ["-q", "--public", &p, "--control", &c, "--tunnel", &t];
        self.run(tunnel, &self.tpserver, &[&words, both].concat())?;
        tunnel.wait_for_listener(control)?;
        if let Some(delay) = link.delay {
            for addr in [&mut control, &mut tunnels] {
                let relay = Relay::start(*addr, delay)?;
                *addr = relay.addr;
                tunnel.relays.push(relay);
            }
        }
        let [c, t] = [control, tunnels].map(|it| it.port().to_string());
        let local = tunnel.service.addr.to_string();
        let words = ["-q", "--control-port", &c, "--tunnel-port", &t];
        let pool = link.pool.map(|pool| ["--pool", pool]);
        let pool = pool.as_ref().map_or(&[][..], |words| words);
        let words = [&words[..], &["--local", &local], pool, both].concat();
        self.run(tunnel, &self.tpclient, &words)
    }

    /// With these additions to the configurations of its server and its client.
    fn start_rathole(&self, tunnel: &mut Tunnel, transports: [&str; 2]) -> Fallible<()> {
        let program = &self.rathole.as_ref().map_err(String::as_str)?.path;
        let (control, public, local) = (free_port()?, tunnel.public, tunnel.service.addr);
        let service = "default_token = 'bench'\n[server.services.bench]\nbind_addr";
        let server = format!("[server]\nbind_addr = '{control}'\n{service} = '{public}'\n");
        let service = "default_token = 'bench'\n[client.services.bench]\nlocal_addr";
        let client = format!("[client]\nremote_addr = '{control}'\n{service} = '{local}'\n");
        let (server_file, client_file) = (self.file("server.toml"), self.file("client.toml"));
        fs::write(&server_file, server + transports[0])?;
        fs::write(&client_file, client + transports[1])?;
        self.run(tunnel, program, &["--server", &server_file])?;
        tunnel.wait_for_listener(control)?;
        self.run(tunnel, program, &["--client", &client_file])
    }

    /// A fresh key pair, as the transports of rathole's server and client.
    fn noise(&self) -> Fallible<[String; 2]> {
        let program = &self.rathole.as_ref().map_err(String::as_str)?.path;
        // "Private Key:", a line with it, "", "Public Key:", a line with it.
        let keys = output(program, &["--genkey"])?;
        let keys: Vec<_> = keys.lines().collect();
        let [_, private, .., public] = keys[..] else {
            return Err(format!("{} --genkey said {keys:?}", program.display()).into());
        };
        let transport = |side: &str, key: &str| {
            format!("[{side}.transport]\ntype = 'noise'\n[{side}.transport.noise]\n{key}\n")
        };
        Ok([
            transport("server", &format!("local_private_key = '{private}'")),
            transport("client", &format!("remote_public_key = '{public}'")),
        ])
    }

    fn start_bore(&self, tunnel: &mut Tunnel) -> Fallible<()> {
        let program = &self.bore.as_ref().map_err(String::as_str)?.path;
        self.run(tunnel, program, &["server", "--bind-addr", "127.0.0.1"])?;
        tunnel.wait_for_listener(([127, 0, 0, 1], BORE_CONTROL).into())?;
        let local = tunnel.service.addr.port().to_string();
        let public = tunnel.public.port().to_string();
        let host = "127.0.0.1";
        let words = ["local", &local, "--local-host", host];
        let words = [&words[..], &["--to", host, "--port", &public]].concat();
        self.run(tunnel, program, &words)
    }

    fn file(&self, name: &str) -> String {
        self.folder.path().join(name).to_string_lossy().into_owned()
    }

    /// One more process of this tunnel.
    fn run(&self, tunnel: &mut Tunnel, program: &Path, words: &[&str]) -> Fallible<()> {
        let log = self.folder.path().join(tunnel.public.to_string());
        let log = log.with_extension(format!("{}.log", tunnel.processes.len()));
        let file = File::create(&log).map_err(|error| format!("{}: {error}", log.display()))?;
        let child = Command::new(program)
            .args(words)
            .env_remove("TP_KEY")
            // The peers have no -q. Ours do, and obey it if this is not set.
            .envs((!words.contains(&"-q")).then_some(("RUST_LOG", "error")))
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .spawn()
            .map_err(|error| format!("{}: {error}", program.display()))?;
        tunnel.processes.push(Process {
            program: program.to_owned(),
            child,
            log,
        });
        Ok(())
    }
}

/// What a program prints.
fn output(program: &Path, words: &[&str]) -> Fallible<String> {
    let command = || format!("{} {}", program.display(), words.join(" "));
    let output = Command::new(program)
        .args(words)
        .output()
        .map_err(|error| format!("{}: {error}", command()))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(format!("{}: {} {}", command(), output.status, said.trim()).into());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Asks a program for its version, which stands behind these words.
fn peer(path: &str, before: &str) -> Result<Peer, String> {
    let path = PathBuf::from(path);
    let said = output(&path, &["--version"]).map_err(|error| error.to_string())?;
    let version = said.lines().find_map(|line| line.strip_prefix(before));
    Ok(Peer {
        version: version.unwrap_or("of unknown version").trim().to_owned(),
        path,
    })
}

/// A port of the loopback address that nobody listens on; each call tells another one.
fn free_port() -> Fallible<SocketAddr> {
    static NEXT: AtomicU16 = AtomicU16::new(FIRST_PORT);
    loop {
        let port = NEXT.fetch_add(1, Ordering::SeqCst);
        if port < FIRST_PORT {
            return Err("no free port".into());
        }
        if let Ok(listener) = TcpListener::bind(("127.0.0.1", port)) {
            return Ok(listener.local_addr()?);
        }
    }
}

/// A system that runs. Dropped, its processes are gone before what they are connected to.
pub struct Tunnel {
    processes: Vec<Process>,
    relays: Vec<Relay>,
    /// Where visitors go to.
    pub public: SocketAddr,
    pub service: Service,
}

impl Tunnel {
    /// Seconds of processor time so far of both processes together; none if there are none.
    pub fn cpu(&self) -> Fallible<Option<f64>> {
        self.sum(|process| {
            let stat = process.proc("stat")?;
            // Behind the name, which may hold spaces and parentheses: state, then 10 more, then
            // user and system time.
            let fields = stat.rsplit(") ").next().unwrap_or_default().split(' ');
            let ticks: Result<Vec<f64>, _> = fields.skip(11).take(2).map(str::parse).collect();
            Ok(ticks?.iter().sum::<f64>() / TICKS_PER_SEC)
        })
    }

    /// KiB of memory of both processes together; none if there are none.
    pub fn pss_kib(&self) -> Fallible<Option<f64>> {
        self.sum(|process| {
            let text = process.proc("smaps_rollup")?;
            let line = text.lines().find_map(|line| line.strip_prefix("Pss:"));
            let number = line.and_then(|line| line.trim().strip_suffix(" kB"));
            Ok(number.ok_or("no Pss in smaps_rollup")?.parse()?)
        })
    }

    /// Descriptors, threads, and KiB of memory of both processes together.
    pub fn usage(&self) -> Fallible<[f64; 3]> {
        let entries = |folder: &'static str| {
            self.sum(move |process| Ok(fs::read_dir(process.path(folder))?.count() as f64))
        };
        let usage = [entries("fd")?, entries("task")?, self.pss_kib()?];
        Ok(usage.map(Option::unwrap_or_default))
    }

    fn sum(&self, figure: impl Fn(&Process) -> Fallible<f64>) -> Fallible<Option<f64>> {
        let figures: Result<Vec<_>, _> = self.processes.iter().map(figure).collect();
        Ok(Some(figures?.iter().sum()).filter(|_| !self.processes.is_empty()))
    }

    fn wait_for_listener(&mut self, addr: SocketAddr) -> Fallible<()> {
        self.wait(&format!("a listener on {addr}"), |_| {
            TcpStream::connect(addr).map(drop)
        })
    }

    fn wait_until_it_serves(&mut self) -> Fallible<()> {
        self.wait("an answer to a visitor", |public| {
            let mut socket = TcpStream::connect(public)?;
            socket.set_read_timeout(Some(Duration::from_secs(2)))?;
            socket.write_all(&[Work::Echo.byte()])?;
            socket.read_exact(&mut [0])
        })
    }

    /// Tries until it works, all processes being alive.
    fn wait(
        &mut self,
        what: &str,
        attempt: impl Fn(SocketAddr) -> std::io::Result<()>,
    ) -> Fallible<()> {
        let start = Instant::now();
        while let Err(error) = attempt(self.public) {
            for process in &mut self.processes {
                process.check_alive()?;
            }
            if start.elapsed() > START_DEADLINE {
                return Err(format!("no {what} in {START_DEADLINE:?}: {error}").into());
            }
            rest(START_PAUSE)?;
        }
        Ok(())
    }
}

/// Killed when dropped.
struct Process {
    program: PathBuf,
    child: Child,
    log: PathBuf,
}

impl Process {
    fn path(&self, name: &str) -> PathBuf {
        format!("/proc/{}/{name}", self.child.id()).into()
    }

    fn proc(&self, name: &str) -> Fallible<String> {
        let path = self.path(name);
        fs::read_to_string(&path).map_err(|error| format!("{}: {error}", path.display()).into())
    }

    fn check_alive(&mut self) -> Fallible<()> {
        let Some(status) = self.child.try_wait()? else {
            return Ok(());
        };
        let log = fs::read_to_string(&self.log).unwrap_or_default();
        let said = log.lines().last().unwrap_or_default();
        Err(format!("{} ended: {status} {said}", self.program.display()).into())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = fs::remove_file(&self.log);
    }
}
