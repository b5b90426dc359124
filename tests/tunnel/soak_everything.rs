//! Everything at once: two servers, two clients that serve both, three services, visitors' addresses,
//! and status pages that are read all the time, while programs are killed, stopped, frozen and told to
//! read their options again. Every byte is looked at. `TP_SOAK_SECS` and `TP_SOAK_SEED` are those of the
//! soak.
#![cfg(target_os = "linux")]

use std::io::{self, Read};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use tempfile::TempDir;

use crate::support::programs::{Launch, Program, ports_of};
use crate::support::random::Random;
use crate::support::visits::{Soak, seconds_and_seed};
use crate::support::{
    Protection, Service, eventually, once_settled, plain_and_sealed, share_turn, try_get,
};

plain_and_sealed! {
    soak_everything (sealed as root),
}

const SERVICES: [&str; 3] = ["mail", "ssh", "web"];

/// The service that is told where its visitors come from.
const TOLD: &str = "mail";

/// Whole visits in all, far below what two idle cores see to.
const LEAST_A_SECOND: usize = 1;

/// In KiB, of each program, when all is over.
const MEMORY: usize = 32 * 1024;

/// What is idle beyond the pool is closed after 10 s, and parked threads end after 5 s.
const REST: Duration = Duration::from_secs(25);

fn soak_everything(protection: Protection) {
    let (seconds, seed) = seconds_and_seed();
    let soaks = SERVICES.map(|_| Arc::new(Soak::new(seed, protection)));
    let services: Vec<_> = SERVICES.iter().zip(&soaks).map(serve).collect();
    let mut house = House::start(protection, &services);
    let at_rest = house.holdings_at_rest();
    let turn = share_turn();
    let end = Instant::now() + Duration::from_secs(seconds);
    let pages = AtomicUsize::new(0);
    thread::scope(|scope| {
        for (number, (soak, public)) in house.ways(&soaks).into_iter().enumerate() {
            scope.spawn(move || soak.keep_visiting(public, number as u64, end));
        }
        let (status, pages) = (house.status, &pages);
        scope.spawn(move || keep_reading(&status, end, pages));
        house.trouble(&mut Random::new(seed), end);
    });
    drop(turn);
    let mut random = Random::new(!seed);
    for (soak, public) in house.ways(&soaks) {
        soak.assert_recovered(public, &mut random);
    }
    for status in house.status {
        eventually("ready again", || {
            try_get(status, "/readyz").is_ok_and(|(code, _)| code == 200)
        });
    }
    soaks.iter().for_each(|soak| soak.assert_all_ended());
    let rest = Instant::now() + REST;
    while house.holdings() != at_rest {
        let now = house.holdings();
        assert!(Instant::now() < rest, "{now:?}, but at rest {at_rest:?}");
        thread::sleep(Duration::from_millis(100));
    }
    for program in house.programs.iter().chain(&house.past) {
        assert_eq!(program.lines_with("panicked"), [""; 0]);
    }
    let memory = house.programs.each_ref().map(|it| it.memory("Pss_Anon"));
    assert!(memory.iter().all(|it| *it < MEMORY), "{memory:?} KiB");
    let pages = pages.load(Ordering::SeqCst);
    assert!(pages > 0, "no status was read");
    for (name, soak) in SERVICES.iter().zip(&soaks) {
        eprintln!("{protection:?}, {name}: {}", soak.summary());
    }
    let counts = house.counts;
    eprintln!("{protection:?}: {counts:?} of {TROUBLES:?}, {pages} pages, {memory:?} KiB");
    let whole: usize = soaks.iter().map(|soak| soak.whole.get()).sum();
    let least = LEAST_A_SECOND * seconds as usize;
    assert!(whole >= least, "no more than {whole} whole, seed {seed}");
}

fn serve((name, soak): (&&'static str, &Arc<Soak>)) -> Service {
    let (is_told, soak) = (*name == TOLD, soak.clone());
    Service::start(move |socket| {
        // A client that is killed meanwhile leaves a part of a header.
        if !is_told || hear_address(&socket).is_ok() {
            soak.serve(&socket);
        }
    })
}

/// Reads a header of the PROXY protocol, version 2, for IPv4.
fn hear_address(mut socket: &TcpStream) -> io::Result<()> {
    let mut header = [0; 28];
    socket.read_exact(&mut header)?;
    assert_eq!(&header[..16], b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c");
    assert_eq!([header[16], header[20]], [127; 2], "{header:?}");
    Ok(())
}

/// Reads the status of all programs all the time. One that is down, or dies meanwhile, has none.
fn keep_reading(status: &[SocketAddr], end: Instant, pages: &AtomicUsize) {
    while Instant::now() < end {
        for (at, path) in status.iter().zip(["/metrics", "/", "/readyz", "/metrics"]) {
            let Ok((code, body)) = try_get(*at, path) else {
                continue;
            };
            let is_fine = code == 200 || (code == 503 && path == "/readyz");
            assert!(is_fine, "{path}: {code} {body}");
            pages.fetch_add(1, Ordering::SeqCst);
        }
        thread::sleep(Duration::from_millis(250));
    }
}

/// What happens to one of the programs.
#[derive(Clone, Copy, Debug)]
enum Trouble {
    Kill,
    Terminate,
    Freeze,
    Reload,
}

const TROUBLES: [Trouble; 4] = [
    Trouble::Kill,
    Trouble::Terminate,
    Trouble::Freeze,
    Trouble::Reload,
];

/// Two servers, then two clients.
struct House {
    protection: Protection,
    /// Of each server, where the visitors of each service come to.
    public: [[SocketAddr; 3]; 2],
    status: [SocketAddr; 4],
    /// The options of each program.
    files: [String; 4],
    _folder: TempDir,
    programs: [Program; 4],
    /// Programs that have ended.
    past: Vec<Program>,
    counts: [usize; TROUBLES.len()],
}

impl House {
    fn start(protection: Protection, services: &[Service]) -> Self {
        let net = match protection {
            Protection::Plain => 81,
            Protection::Sealed => 82,
        };
        let ports = |host: usize| ports_of(&format!("127.0.{net}.{host}"));
        let public = [ports(1), ports(2)];
        let [inner, other] = [ports(3), ports(4)];
        let [of_clients, _] = [ports(5), ports(6)];
        let status = [inner[2], other[2], of_clients[0], of_clients[1]];
        let control = [inner[0], other[0]];
        let tunnel = [inner[1], other[1]];
        let folder = tempfile::tempdir().unwrap();
        let files = std::array::from_fn(|number| {
            let of_services = |option: &str, addresses: &[SocketAddr]| -> String {
                let pairs = SERVICES.iter().zip(addresses);
                pairs
                    .map(|(name, address)| format!("{option} {name}={address}\n"))
                    .collect()
            };
            let own = match number {
                0 | 1 => format!(
                    "{}tunnel {}\ncontrol {}\nclients 2\n",
                    of_services("public", &public[number]),
                    tunnel[number],
                    control[number],
                ),
                _ => {
                    let local: Vec<_> = services.iter().map(|it| it.addr).collect();
                    let [one, two] = control;
                    let local = of_services("local", &local);
                    format!("server {one}\nserver {two}\n{local}proxy-protocol {TOLD}=v2\n")
                }
            };
            let path = folder.path().join(format!("{number}.conf"));
            let text = format!("{own}status {}\ndrain 5\n", status[number]);
            std::fs::write(&path, text).unwrap();
            path.to_str().unwrap().to_owned()
        });
        let programs = std::array::from_fn(|number| launch(protection, number, &files));
        for client in &programs[2..] {
            client.wait_for_lines("] connected to", 2);
        }
        Self {
            protection,
            public,
            status,
            files,
            _folder: folder,
            programs,
            past: Vec::new(),
            counts: [0; TROUBLES.len()],
        }
    }

    /// Each service at each server.
    fn ways<'a>(&self, soaks: &'a [Arc<Soak>]) -> Vec<(&'a Soak, SocketAddr)> {
        let ways = self
            .public
            .iter()
            .flat_map(|public| soaks.iter().zip(public));
        ways.map(|(soak, public)| (&**soak, *public)).collect()
    }

    fn trouble(&mut self, random: &mut Random, end: Instant) {
        while Instant::now() < end {
            thread::sleep(random.time(100, 1500));
            let number = random.below(self.programs.len());
            let kind = random.below(TROUBLES.len());
            self.counts[kind] += 1;
            let program = &mut self.programs[number];
            let ended = program.ended();
            assert!(ended.is_none(), "{number}: {:#?}", program.lines_with(""));
            match TROUBLES[kind] {
                Trouble::Kill => {
                    program.kill();
                    self.restart(number);
                }
                Trouble::Terminate => {
                    program.signal(Signal::TERM);
                    let status = program.wait_for_end();
                    assert!(status.success(), "{number}: {status}");
                    self.restart(number);
                }
                Trouble::Freeze => {
                    program.signal(Signal::STOP);
                    thread::sleep(random.time(100, 1500));
                    program.signal(Signal::CONT);
                }
                Trouble::Reload => program.signal(Signal::HUP),
            }
        }
    }

    fn restart(&mut self, number: usize) {
        let next = launch(self.protection, number, &self.files);
        let past = std::mem::replace(&mut self.programs[number], next);
        self.past.push(past);
    }

    /// Descriptors and threads of each program.
    fn holdings(&self) -> [(usize, usize); 4] {
        let programs = self.programs.each_ref();
        programs.map(|it| (it.descriptors(), it.threads()))
    }

    /// The same, once they do not change any more.
    fn holdings_at_rest(&self) -> [(usize, usize); 4] {
        let time = Duration::from_secs(7);
        once_settled("the programs are at rest", time, || self.holdings())
    }
}

/// Starts a program, and waits until it obeys signals.
fn launch(protection: Protection, number: usize, files: &[String; 4]) -> Program {
    let (launch, options) = (Launch::new(protection), ["--config", &files[number]]);
    match number {
        0 | 1 => {
            let server = launch.bare_server(&options);
            server.wait_for_line("for the control link");
            server
        }
        _ => {
            let client = launch.bare_client(&options);
            client.wait_for_lines("connecting to", 2);
            client
        }
    }
}
