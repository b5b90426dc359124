//! A system that runs: its processes, and what they use.

use std::fs::{self, File};
use std::io::{Read, Seek, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::service::{Service, Work};
use crate::stop::rest;
use crate::systems::Fallible;
use crate::wan::Relay;

/// How long a system may take until its first visitor is served.
const START_DEADLINE: Duration = Duration::from_secs(10);

/// How often a system that starts is looked at.
const START_PAUSE: Duration = Duration::from_millis(20);

/// What `/proc/PID/stat` counts processor time in: 1/100 s for every program, whatever the kernel
/// itself uses.
const TICKS_PER_SEC: f64 = 100.0;

/// A system that runs. Dropped, its processes are gone before what they are connected to.
pub struct Tunnel {
    processes: Vec<Process>,
    relays: Vec<Relay>,
    /// Where visitors go to.
    pub public: SocketAddr,
    pub service: Service,
}

impl Tunnel {
    /// Of no process yet, for visitors of `public`, and with a service of its own.
    pub fn new(public: SocketAddr) -> Fallible<Self> {
        Ok(Self {
            processes: Vec::new(),
            relays: Vec::new(),
            public,
            service: Service::start()?,
        })
    }

    /// Starts one more process.
    pub fn run(&mut self, program: &Path, words: &[&str]) -> Fallible<()> {
        let log = tempfile::tempfile()?;
        let child = Command::new(program)
            .args(words)
            .env_remove("TP_KEY")
            .env("RUST_LOG", "error")
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log.try_clone()?)
            .spawn()
            .map_err(|error| format!("{}: {error}", program.display()))?;
        self.processes.push(Process {
            program: program.to_owned(),
            child,
            log,
        });
        Ok(())
    }

    /// A connection to this address takes that long each way, for as long as the tunnel lives.
    pub fn delay(&mut self, addr: &mut SocketAddr, delay: Duration) -> Fallible<()> {
        let relay = Relay::start(*addr, delay)?;
        *addr = relay.addr;
        self.relays.push(relay);
        Ok(())
    }

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

    pub fn wait_for_listener(&mut self, addr: SocketAddr) -> Fallible<()> {
        self.wait(&format!("a listener on {addr}"), |_| {
            TcpStream::connect(addr).map(drop)
        })
    }

    pub fn wait_until_it_serves(&mut self) -> Fallible<()> {
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
    log: File,
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
        let mut log = String::new();
        self.log.rewind()?;
        self.log.read_to_string(&mut log)?;
        let said = log.lines().last().unwrap_or_default();
        Err(format!("{} ended: {status} {said}", self.program.display()).into())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
