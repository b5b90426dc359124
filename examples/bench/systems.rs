//! The systems that are compared, each started as processes of its own, the way a user would.

use std::error::Error;
use std::fs;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use tempfile::TempDir;

use crate::tunnel::Tunnel;

pub type Fallible<T> = Result<T, Box<dyn Error + Send + Sync>>;

/// Where the search for free ports begins: below those that Linux gives to outgoing connections,
/// which a run makes by the ten thousand.
const FIRST_PORT: u16 = 20_000;

/// The one port that bore's server takes clients on; it has no option for another.
const BORE_CONTROL: u16 = 7835;

const KEY_FILE: &str = "tp.key";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum System {
    /// No tunnel: visitors go straight to the service.
    Direct,
    /// Our programs without a key.
    Plain,
    /// Our programs with one.
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
    /// The key, and the peers' configurations.
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
        let mut tunnel = Tunnel::new(free_port()?)?;
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
        let words = ["--public", &p, "--control", &c, "--tunnel", &t];
        tunnel.run(&self.tpserver, &[&words, both].concat())?;
        tunnel.wait_for_listener(control)?;
        if let Some(delay) = link.delay {
            for addr in [&mut control, &mut tunnels] {
                tunnel.delay(addr, delay)?;
            }
        }
        let [c, t] = [control, tunnels].map(|it| it.port().to_string());
        let local = tunnel.service.addr.to_string();
        let words = ["--control-port", &c, "--tunnel-port", &t];
        let pool = link.pool.map(|pool| ["--pool", pool]);
        let pool = pool.as_ref().map_or(&[][..], |words| words);
        let words = [&words[..], &["--local", &local], pool, both].concat();
        tunnel.run(&self.tpclient, &words)
    }

    /// With these additions to the configurations of its server and its client.
    fn start_rathole(&self, tunnel: &mut Tunnel, transports: [&str; 2]) -> Fallible<()> {
        let program = &self.rathole.as_ref().map_err(String::as_str)?.path;
        let (control, public, local) = (free_port()?, tunnel.public, tunnel.service.addr);
        let [server_transport, client_transport] = transports;
        let server = format!(
            "[server]\nbind_addr = '{control}'\ndefault_token = 'bench'\n\
             [server.services.bench]\nbind_addr = '{public}'\n{server_transport}"
        );
        let client = format!(
            "[client]\nremote_addr = '{control}'\ndefault_token = 'bench'\n\
             [client.services.bench]\nlocal_addr = '{local}'\n{client_transport}"
        );
        let (server_file, client_file) = (self.file("server.toml"), self.file("client.toml"));
        fs::write(&server_file, server)?;
        fs::write(&client_file, client)?;
        tunnel.run(program, &["--server", &server_file])?;
        tunnel.wait_for_listener(control)?;
        tunnel.run(program, &["--client", &client_file])
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
        tunnel.run(program, &["server", "--bind-addr", "127.0.0.1"])?;
        tunnel.wait_for_listener(([127, 0, 0, 1], BORE_CONTROL).into())?;
        let local = tunnel.service.addr.port().to_string();
        let public = tunnel.public.port().to_string();
        let host = "127.0.0.1";
        let words = ["local", &local, "--local-host", host];
        let words = [&words[..], &["--to", host, "--port", &public]].concat();
        tunnel.run(program, &words)
    }

    fn file(&self, name: &str) -> String {
        self.folder.path().join(name).to_string_lossy().into_owned()
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
