//! A seeded mix of faults between many short transfers: whatever goes wrong, and when, nobody takes
//! a cut or changed stream for a whole one, and nothing is left of it afterwards.
//!
//! `TP_SOAK_SECS` says how long, `TP_SOAK_SEED` repeats a draw; threads and the network are as they
//! are, so that a repeated one need not end the same.
#![cfg(target_os = "linux")]

use std::io::Write;
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::support::faulty_relay::{Fault, FaultyRelay};
use crate::support::programs::{Both, Launch, Program, ports_of};
use crate::support::random::Random;
use crate::support::visits::{COMPANIONS, MAGIC, Soak, Visit, seconds_and_seed};
use crate::support::{Protection, Service, pattern, plain_and_sealed, share_turn};

plain_and_sealed! {
    soak (sealed as root),
}

/// So many seconds are long enough for faults that take their time.
const LONG: u64 = 60;

/// Threads that visit one tunnel.
const VISITORS: u64 = 8;

/// In KiB, of each program: when all is over, and while every direction of every visit carries bulk.
const MEMORY: usize = 24 * 1024;
const MOST_MEMORY: usize = VISITORS as usize * (1 + COMPANIONS) * 2 * 1024;

/// Whole visits of each tunnel, far below the seventy or more that two idle cores see to.
const LEAST_A_SECOND: usize = 1;

fn soak(protection: Protection) {
    let host = match protection {
        Protection::Plain => "127.0.78.61",
        Protection::Sealed => "127.0.78.62",
    };
    let (seconds, seed) = seconds_and_seed();
    soak_tunnel(protection, host, seconds, seed);
}

/// One tunnel, with its visitors, its service, and what goes wrong.
fn soak_tunnel(protection: Protection, host: &str, seconds: u64, seed: u64) {
    let soak = Arc::new(Soak::new(seed, protection));
    let serving = soak.clone();
    let service = Service::start(move |socket| serving.serve(&socket));
    let turn = share_turn();
    let mut chaos = Chaos::start(&soak, host, service.addr, seconds > LONG);
    let public = chaos.both.addresses[0];
    let end = Instant::now() + Duration::from_secs(seconds);
    thread::scope(|scope| {
        for number in 1..=VISITORS {
            let soak = &soak;
            scope.spawn(move || soak.keep_visiting(public, number, end));
        }
        chaos.reign(end);
    });
    drop(turn);
    soak.assert_nothing_wrong();
    chaos.assert_recovered();
    soak.assert_all_ended();
    eprintln!("{protection:?}: {}; {}", soak.summary(), chaos.summary());
    let (whole, least) = (soak.whole.get(), LEAST_A_SECOND * seconds as usize);
    assert!(whole >= least, "no more than {whole} whole, seed {seed}");
}

/// What goes wrong. The last two only where there is a key: without one, nothing tells a stream that
/// was changed or cut between the programs from one that was not.
#[derive(Clone, Copy, Debug)]
enum Trouble {
    Delay,
    Slices,
    BlackHole,
    Reset,
    Kill,
    Freeze,
    Terminate,
    Garbage,
    LocalRefuses,
    LocalIsSilent,
    Flip,
    Truncate,
}

const TROUBLES: [Trouble; 12] = [
    Trouble::Delay,
    Trouble::Slices,
    Trouble::BlackHole,
    Trouble::Reset,
    Trouble::Kill,
    Trouble::Freeze,
    Trouble::Terminate,
    Trouble::Garbage,
    Trouble::LocalRefuses,
    Trouble::LocalIsSilent,
    Trouble::Flip,
    Trouble::Truncate,
];

#[derive(Clone, Copy, Debug)]
enum Side {
    Server,
    Client,
}

/// Both programs, and all that can be done to them.
struct Chaos<'a> {
    soak: &'a Soak,
    random: Random,
    both: Both,
    control: FaultyRelay,
    tunnel: FaultyRelay,
    /// Before the local service. None while nobody listens there.
    local: Option<FaultyRelay>,
    local_addr: SocketAddr,
    service: SocketAddr,
    /// Whether there is time for a fault that ends sessions.
    long: bool,
    /// Programs that have ended.
    past: Vec<Program>,
    /// Connections that have sent garbage and stay for a while.
    strangers: Vec<TcpStream>,
    counts: [usize; TROUBLES.len()],
    /// The most that one program had, in KiB.
    most_memory: usize,
}

impl<'a> Chaos<'a> {
    fn start(soak: &'a Soak, host: &str, service: SocketAddr, long: bool) -> Self {
        let launch = Launch::new(soak.protection);
        let [public, tunnel, control] = ports_of(host);
        let [local_addr, ..] = ports_of(host);
        let local = FaultyRelay::start_on(local_addr, service);
        let server = launch.on([public, tunnel, control]).server(&[]);
        server.addresses();
        let [to_tunnel, to_control] = [tunnel, control].map(FaultyRelay::start);
        let ways = [public, to_tunnel.addr, to_control.addr];
        let client = launch.client(ways, local.addr, &[]);
        Self {
            soak,
            random: Random::new(soak.seed ^ soak.protection as u64),
            both: Both::at_rest(server, client, [public, tunnel, control]),
            control: to_control,
            tunnel: to_tunnel,
            local_addr,
            local: Some(local),
            service,
            long,
            past: Vec::new(),
            strangers: Vec::new(),
            counts: [0; TROUBLES.len()],
            most_memory: 0,
        }
    }

    /// Causes one trouble after another, and none at the end.
    fn reign(&mut self, end: Instant) {
        let kinds = match self.soak.protection {
            Protection::Plain => TROUBLES.len() - 2,
            Protection::Sealed => TROUBLES.len(),
        };
        while self.soak.lasts(end) {
            self.pause(50, 500);
            let kind = self.random.below(kinds);
            self.counts[kind] += 1;
            self.cause(TROUBLES[kind]);
            for side in [Side::Server, Side::Client] {
                let program = self.program(side);
                let ended = program.ended();
                assert!(ended.is_none(), "{side:?}: {:#?}", program.lines_with(""));
                self.most_memory = program.memory("Pss_Anon").max(self.most_memory);
            }
        }
        self.strangers.clear();
    }

    fn pause(&mut self, least: u64, most: u64) {
        thread::sleep(self.random.time(least, most));
    }

    /// A while, and now and then one that no session outlives.
    fn while_silent(&mut self) -> Duration {
        match self.long && self.random.below(8) == 0 {
            true => Duration::from_secs(8),
            false => self.random.time(100, 1000),
        }
    }

    fn cause(&mut self, trouble: Trouble) {
        let bytes = self.random.below(100_000) as u64;
        let short = self.random.time(50, 500);
        match trouble {
            Trouble::Delay => {
                let delay = self.random.time(1, 200);
                self.spoil(Fault::Delay(delay), short);
            }
            Trouble::Slices => {
                let most = 1 + self.random.below(1000);
                self.spoil(Fault::Slices(most), short);
            }
            Trouble::BlackHole => {
                let time = self.while_silent();
                self.spoil(Fault::BlackHole, time);
            }
            Trouble::Reset => match bytes % 2 {
                0 => self.relays().for_each(FaultyRelay::reset_all),
                _ => self.spoil(Fault::Reset(bytes), short),
            },
            Trouble::Truncate => match bytes % 2 {
                0 => self.relays().for_each(FaultyRelay::end_all),
                _ => self.spoil(Fault::Truncate(bytes), short),
            },
            Trouble::Flip => {
                self.spoil(Fault::Flip(bytes), short);
                // If the changed byte was a length, somebody waits for what never comes.
                self.control.reset_all();
                self.tunnel.reset_all();
            }
            Trouble::Kill => {
                let side = self.side();
                self.program(side).kill();
                self.restart(side);
            }
            Trouble::Freeze => self.freeze(),
            Trouble::Terminate => self.terminate(),
            Trouble::Garbage => self.send_garbage(),
            Trouble::LocalRefuses => {
                self.local = None;
                thread::sleep(short);
                self.local = Some(FaultyRelay::start_on(self.local_addr, self.service));
            }
            Trouble::LocalIsSilent => {
                let time = self.while_silent();
                self.spoil_local(Fault::BlackHole, time);
            }
        }
    }

    /// One of the two relays between the programs, or both.
    fn relays(&mut self) -> impl Iterator<Item = &FaultyRelay> + use<'_, 'a> {
        let which = 1 + self.random.below(3);
        let both = [(1, &self.control), (2, &self.tunnel)];
        let chosen = both.into_iter().filter(move |(bit, _)| which & bit != 0);
        chosen.map(|(_, relay)| relay)
    }

    fn spoil(&mut self, fault: Fault, time: Duration) {
        self.relays().for_each(|relay| relay.set(fault));
        thread::sleep(time);
        self.control.set(Fault::Pass);
        self.tunnel.set(Fault::Pass);
    }

    fn spoil_local(&mut self, fault: Fault, time: Duration) {
        let local = self.local.as_ref().unwrap();
        local.set(fault);
        thread::sleep(time);
        local.set(Fault::Pass);
    }

    fn side(&mut self) -> Side {
        [Side::Server, Side::Client][self.random.below(2)]
    }

    fn program(&mut self, side: Side) -> &mut Program {
        match side {
            Side::Server => &mut self.both.server,
            Side::Client => &mut self.both.client,
        }
    }

    /// Starts another program in the place of one that has ended.
    fn restart(&mut self, side: Side) {
        let launch = Launch::new(self.soak.protection);
        let ports @ [public, ..] = self.both.addresses;
        let ways = [public, self.tunnel.addr, self.control.addr];
        let next = match side {
            Side::Server => launch.on(ports).server(&[]),
            Side::Client => launch.client(ways, self.local_addr, &[]),
        };
        // Before that, a signal to end might find no handler.
        next.wait_for_line(match side {
            Side::Server => "for the control link",
            Side::Client => "connecting to",
        });
        let past = std::mem::replace(self.program(side), next);
        self.past.push(past);
    }

    fn freeze(&mut self) {
        let (side, time) = (self.side(), self.while_silent());
        self.program(side).signal(Signal::STOP);
        thread::sleep(time);
        self.program(side).signal(Signal::CONT);
    }

    fn terminate(&mut self) {
        let side = self.side();
        self.program(side).signal(Signal::TERM);
        let status = self.program(side).wait_for_end();
        assert!(status.success(), "{side:?}: {status}");
        self.restart(side);
    }

    /// Sends garbage to all three ports, from strangers of whom some stay.
    fn send_garbage(&mut self) {
        self.strangers.truncate(16);
        let [public, tunnel, control] = self.both.addresses;
        for port in [public, tunnel, control] {
            let Ok(mut stranger) = TcpStream::connect(port) else {
                continue;
            };
            let mut garbage = pattern(self.random.next(), 1 + self.random.below(500));
            if self.random.below(2) == 0 {
                // A handshake begins like this.
                garbage.splice(..0, [0, 48]);
            }
            if garbage[0] == MAGIC[0] {
                garbage[0] = 0;
            }
            let _ = stranger.write_all(&garbage);
            if self.random.below(4) == 0 {
                self.strangers.insert(0, stranger);
            }
        }
    }

    /// Asserts that all is as if nothing had happened.
    fn assert_recovered(&mut self) {
        let (soak, public) = (self.soak, self.both.addresses[0]);
        soak.assert_recovered(public, &mut self.random);
        let last = Visit::whole(&mut self.random);
        self.both
            .assert_recovered(|visitor| assert!(soak.visit_on(visitor, &last)));
        let programs = [&self.both.server, &self.both.client];
        for program in self.past.iter().chain(programs) {
            assert_eq!(program.lines_with("panicked"), [""; 0]);
        }
        for program in programs {
            let memory = program.memory("Pss_Anon");
            assert!(memory < MEMORY, "{memory} KiB at rest");
        }
        assert!(self.most_memory < MOST_MEMORY, "{} KiB", self.most_memory);
    }

    fn summary(&self) -> String {
        let counts: Vec<_> = TROUBLES
            .iter()
            .zip(self.counts)
            .map(|(trouble, count)| format!("{count} {trouble:?}"))
            .collect();
        let programs = [&self.both.server, &self.both.client];
        let [server, client] = programs.map(|program| program.memory("Pss_Anon"));
        let (most, counts) = (self.most_memory, counts.join(", "));
        format!("{most} KiB at most, {server} and {client} in the end; {counts}")
    }
}
