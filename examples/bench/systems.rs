//! The systems that are compared, each started as processes of its own, the way a user would.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::{self, Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use System::{Bore, Direct, Haproxy, Key, Plain, Rathole, RatholeNoise};
use tempfile::TempDir;

use crate::load::first_byte;
use crate::run::{Fallible, rest};
use crate::service::{self, Counts};

/// Where the search for free ports begins: below those that Linux gives to outgoing connections,
/// which a run makes by the ten thousand.
const FIRST_PORT: u16 = 20_000;

/// The one port that bore's server takes clients on; it has no option for another.
const BORE_CONTROL: u16 = 7835;

/// How long a system may take until a visitor is served, and how often one tries.
const START_DEADLINE: Duration = Duration::from_secs(10);
const START_PAUSE: Duration = Duration::from_millis(20);

/// What `/proc/PID/stat` counts processor time in: 1/100 s, whatever the kernel itself uses.
const TICKS_PER_SEC: f64 = 100.0;

/// Half of a far round trip, such as from Europe to the east of America.
const FAR_DELAY: Duration = Duration::from_millis(50);

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum System {
    /// No tunnel: visitors go straight to the service.
    Direct,
    /// Our programs, without a key and with one.
    Plain,
    Key,
    Rathole,
    RatholeNoise,
    Bore,
    /// No tunnel, but two of the fastest relays in a row.
    Haproxy,
}

impl System {
    pub const ALL: &[Self] = &[Direct, Plain, Key, Rathole, RatholeNoise, Bore, Haproxy];
    pub const TUNNELS: &[Self] = &[Plain, Key, Rathole, RatholeNoise, Bore, Haproxy];
    pub const OWN: &[Self] = &[Plain, Key];
    const RATHOLE: &[Self] = &[Rathole, RatholeNoise];

    pub fn name(self) -> &'static str {
        let peers = ["rathole", "rathole+noise", "bore", "haproxy ×2"];
        [&["direct", "plain", "key"], &peers[..]].concat()[self as usize]
    }
}

/// What the systems are started from, and the service that all of them lead to.
pub struct Programs {
    /// The server and the client of each system that is here.
    programs: BTreeMap<System, [PathBuf; 2]>,
    /// The version of each program, or why a peer is left out.
    pub notes: Vec<String>,
    /// Where they run: in here are the key, and the peers' configurations.
    folder: TempDir,
    local: SocketAddr,
    counts: Arc<Counts>,
}

impl Programs {
    /// Our programs in this folder, and the peers under these names or paths.
    pub fn find(bins: &Path, rathole: &str, bore: &str) -> Fallible<Self> {
        let bins = path::absolute(bins)?;
        let own = [bins.join("tpserver"), bins.join("tpclient")];
        let (folder, (local, counts)) = (tempfile::tempdir()?, service::start()?);
        let key = output(&own[0], "--generate-key")?;
        fs::write(folder.path().join("tp.key"), key)?;
        let mut notes = vec![output(&own[0], "--version")?.trim().to_owned()];
        let mut programs = BTreeMap::from([(Plain, own.clone()), (Key, own)]);
        for (name, path, word, before, systems) in [
            (
                "rathole",
                rathole,
                "--version",
                "Build Version:",
                System::RATHOLE,
            ),
            ("bore", bore, "--version", "bore-cli ", &[Bore]),
            ("haproxy", "haproxy", "-v", "HAProxy version ", &[Haproxy]),
        ] {
            let mut path = PathBuf::from(path);
            if path.components().count() > 1 {
                path = path::absolute(path)?;
            }
            match output(&path, word) {
                Ok(said) => {
                    let version = said.lines().find_map(|line| line.strip_prefix(before));
                    let version = version.and_then(|it| it.split_whitespace().next());
                    notes.push(format!("{name} {}", version.unwrap_or_default()));
                    programs.extend(systems.iter().map(|it| (*it, [path.clone(), path.clone()])));
                }
                Err(error) => notes.push(format!("without {name}: {error}")),
            }
        }
        Ok(Self {
            programs,
            notes,
            folder,
            local,
            counts,
        })
    }

    pub fn has(&self, system: System) -> bool {
        system == Direct || self.programs.contains_key(&system)
    }

    /// Fresh processes, ready for visitors. With words for our client, our two programs are far from
    /// each other.
    pub fn start(&self, system: System, far: Option<&str>) -> Fallible<Tunnel> {
        let (local, mut control, tunnel) = (self.local, free_port()?, free_port()?);
        let mut public = free_port()?;
        if system == Direct {
            public = local;
        }
        let [server, client] = match system {
            Direct => Default::default(),
            Plain | Key => {
                let key = ["", "--key-file tp.key"][usize::from(system == Key)];
                let ends = match far {
                    Some(_) => [delaying_relay(control)?, delaying_relay(tunnel)?],
                    None => [control, tunnel],
                };
                let ([c, t], far) = (ends.map(|addr| addr.port()), far.unwrap_or_default());
                [
                    format!("--public {public} --control {control} --tunnel {tunnel} {key}"),
                    format!("--control-port {c} --tunnel-port {t} --local {local} {key} {far}"),
                ]
            }
            Rathole | RatholeNoise => {
                self.configure_rathole([public, control], system == RatholeNoise)?;
                ["server", "client"].map(|side| format!("--{side} {side}.toml"))
            }
            Bore => {
                control.set_port(BORE_CONTROL);
                let (host, from, to) = ("127.0.0.1", local.port(), public.port());
                let client = format!("local {from} --local-host {host} --to {host} --port {to}");
                [format!("server --bind-addr {host}"), client]
            }
            Haproxy => {
                for (name, from, to) in [("far", control, local), ("near", public, control)] {
                    let text = format!(
                        "defaults\n mode tcp\n timeout connect 5s\n timeout client 1h\n timeout server 1h\n\
                         listen {name}\n bind {from}\n server next {to}\n"
                    );
                    fs::write(self.folder.path().join(format!("{name}.cfg")), text)?;
                }
                ["far", "near"].map(|name| format!("-q -db -f {name}.cfg"))
            }
        };
        let (processes, counts) = (Vec::new(), self.counts.clone());
        let mut tunnel = Tunnel {
            processes,
            public,
            counts,
        };
        if let Some([server_program, client_program]) = self.programs.get(&system) {
            tunnel.run(server_program, &server, self.folder.path())?;
            tunnel.wait(|| TcpStream::connect(control).map(drop))?;
            tunnel.run(client_program, &client, self.folder.path())?;
        }
        tunnel.wait(|| first_byte(public).map(drop))?;
        Ok(tunnel)
    }

    fn configure_rathole(&self, [public, control]: [SocketAddr; 2], noise: bool) -> Fallible<()> {
        // "Private Key:", a line with it, "", "Public Key:", a line with it.
        let keys = output(&self.programs[&Rathole][0], "--genkey")?;
        let keys: Vec<_> = keys.lines().collect();
        let own_key = format!("local_private_key = '{}'", keys.get(1).unwrap_or(&""));
        let its_key = format!("remote_public_key = '{}'", keys.last().unwrap_or(&""));
        for (side, control_name, name, addr, key) in [
            ("server", "bind_addr", "bind_addr", public, own_key),
            ("client", "remote_addr", "local_addr", self.local, its_key),
        ] {
            let mut text = format!(
                "[{side}]\ndefault_token = 'bench'\n{control_name} = '{control}'\n\
                 [{side}.services.bench]\n{name} = '{addr}'\n"
            );
            if noise {
                text += &format!("[{side}.transport]\ntype = 'noise'\n");
                text += &format!("[{side}.transport.noise]\n{key}\n");
            }
            fs::write(self.folder.path().join(format!("{side}.toml")), text)?;
        }
        Ok(())
    }
}

/// Returns what a program prints.
fn output(program: &Path, word: &str) -> Fallible<String> {
    let output = Command::new(program).arg(word).output();
    let output = output.map_err(|error| format!("{}: {error}", program.display()))?;
    match output.status.success() {
        true => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
        false => Err(format!("{} {word}: {}", program.display(), output.status).into()),
    }
}

/// Returns a loopback address that nobody listens on, and another one at each call.
fn free_port() -> Fallible<SocketAddr> {
    static NEXT: AtomicU16 = AtomicU16::new(FIRST_PORT);
    let ports = (FIRST_PORT..u16::MAX).map(|_| NEXT.fetch_add(1, Ordering::SeqCst));
    let mut listeners = ports.flat_map(|port| TcpListener::bind(("127.0.0.1", port)));
    Ok(listeners.next().ok_or("no free port")?.local_addr()?)
}

/// A system that runs, until it is dropped.
pub struct Tunnel {
    processes: Vec<Child>,
    /// Where visitors go to.
    pub public: SocketAddr,
    /// What has got through.
    pub counts: Arc<Counts>,
}

impl Tunnel {
    /// Seconds of processor time so far of both processes together; none if there are none.
    pub fn cpu(&self) -> Fallible<Option<f64>> {
        self.sum("stat", |stat| {
            // Behind the name, which may hold spaces and parentheses: state, then 10 more, then
            // user and system time.
            let fields = stat.rsplit(") ").next()?.split(' ');
            let ticks = fields.skip(11).take(2).map(str::parse::<f64>);
            Some(ticks.sum::<Result<f64, _>>().ok()? / TICKS_PER_SEC)
        })
    }

    /// KiB of memory of both processes together; none if there are none.
    pub fn pss_kib(&self) -> Fallible<Option<f64>> {
        self.sum("smaps_rollup", |text| {
            let pss = text.lines().find_map(|line| line.strip_prefix("Pss:"))?;
            pss.trim().strip_suffix(" kB")?.parse().ok()
        })
    }

    /// What a file of `/proc` tells about all processes together; none if there are none.
    fn sum(&self, file: &str, value: impl Fn(&str) -> Option<f64>) -> Fallible<Option<f64>> {
        let mut sum = None;
        for process in &self.processes {
            let path = format!("/proc/{}/{file}", process.id());
            let text = fs::read_to_string(&path).map_err(|error| format!("{path}: {error}"))?;
            let value = value(&text).ok_or_else(|| format!("{path} is not as expected"))?;
            sum = Some(sum.unwrap_or(0.0) + value);
        }
        Ok(sum)
    }

    /// Starts one more. Why it ends, if it does, stands between the lines of progress; its log
    /// would tell of each end of a row.
    fn run(&mut self, program: &Path, words: &str, folder: &Path) -> Fallible<()> {
        let mut command = Command::new(program);
        command.current_dir(folder).args(words.split_whitespace());
        command.env_remove("TP_KEY").env("RUST_LOG", "off");
        let child = command.stdin(Stdio::null()).stdout(io::stderr()).spawn();
        let child = child.map_err(|error| format!("{}: {error}", program.display()))?;
        self.processes.push(child);
        Ok(())
    }

    /// Tries until it works, all processes being alive.
    fn wait(&mut self, attempt: impl Fn() -> io::Result<()>) -> Fallible<()> {
        let start = Instant::now();
        while let Err(error) = attempt() {
            for process in &mut self.processes {
                if let Some(status) = process.try_wait()? {
                    return Err(format!("a program ended: {status}").into());
                }
            }
            if start.elapsed() > START_DEADLINE {
                return Err(format!("not ready in {START_DEADLINE:?}: {error}").into());
            }
            rest(START_PAUSE)?;
        }
        Ok(())
    }
}

impl Drop for Tunnel {
    fn drop(&mut self) {
        for process in &mut self.processes {
            // What cannot be killed has ended already.
            let _ = process.kill().and_then(|()| process.wait());
        }
    }
}

/// Returns an address from where connections go on to `target`, delayed each way as between two
/// hosts far from each other. It listens until the process ends: a run has eight of them.
fn delaying_relay(target: SocketAddr) -> io::Result<SocketAddr> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let addr = listener.local_addr()?;
    thread::spawn(move || {
        for near in listener.incoming().flatten() {
            // If the target cannot be reached, the near end sees a close.
            let _ = TcpStream::connect(target).and_then(|far| {
                carry(near.try_clone()?, far.try_clone()?)?;
                carry(far, near)
            });
        }
    });
    Ok(addr)
}

/// Starts one direction. One thread reads, the other one writes each piece when it is due.
fn carry(mut from: TcpStream, mut to: TcpStream) -> io::Result<()> {
    to.set_nodelay(true)?;
    let (queue, pieces) = mpsc::channel();
    thread::spawn(move || {
        let mut buffer = vec![0; 64 * 1024];
        while let Ok(count @ 1..) = from.read(&mut buffer) {
            let _ = queue.send((Instant::now() + FAR_DELAY, buffer[..count].to_vec()));
        }
    });
    thread::spawn(move || {
        for (due, piece) in pieces {
            thread::sleep(due.saturating_duration_since(Instant::now()));
            let _ = to.write_all(&piece);
        }
        let _ = to.shutdown(Shutdown::Write);
    });
    Ok(())
}
