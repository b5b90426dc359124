//! What a program shows of itself at one moment: plain data without a rule about its looks.

use std::collections::BTreeMap;
use std::time::Duration;

use log::Level;

use super::process::Process;

/// The log lines that are shown.
pub const LOG_LINES: usize = 50;

/// The upper bounds of the [join times](JoinTimes) that are counted apart, in seconds: from a visitor
/// who finds an idle tunnel on a fast host to one who waits for as long as is allowed.
pub const JOIN_BOUNDS: [f64; 12] = [
    0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0,
];

/// Bytes, or bytes a second: from the visitors to the local service, and back.
pub type UpDown = [u64; 2];

/// Which of the two programs this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    Server,
    Client,
}

/// What a program does at one moment and has done until then.
pub struct Snapshot {
    pub side: Side,
    pub version: &'static str,
    pub uptime: Duration,
    /// Why a visitor who came now would not be served. Empty if it would.
    pub not_ready: Vec<String>,
    /// Where visitors come to, or what they reach. No two have the same name.
    pub services: Vec<Service>,
    /// On the server, its clients of now. On the client, its servers, those that it has lost included;
    /// no two have the same address.
    pub sessions: Vec<Session>,
    /// The visitors who are joined now, in any order.
    pub visitors: Vec<Visitor>,
    /// The most visitors at a time.
    pub max_visitors: usize,
    /// What was refused since the start. The reasons are words of the program's own: a stranger cannot
    /// invent one.
    pub refused: BTreeMap<String, u64>,
    /// Visitors who were not joined in time since the start.
    pub timed_out: u64,
    /// Tunnels that were dialled since the start.
    pub dialled: u64,
    pub join_times: JoinTimes,
    pub process: Process,
    /// The last [`LOG_LINES`] lines of the log, the oldest first.
    pub log: Vec<LogLine>,
    /// Log lines that a limit has left out since the start.
    pub log_left_out: u64,
}

/// A line of the log.
pub struct LogLine {
    /// The time since it was logged.
    pub age: Duration,
    pub level: Level,
    pub text: String,
}

/// A public port on the server, a local service on the client.
pub struct Service {
    /// None for the original's service.
    pub name: Option<String>,
    /// The public address on the server, that of the local service on the client.
    pub address: String,
    /// On the server, a client offers it. On the client, a server takes visitors for it.
    pub offered: bool,
    /// The visitors who are joined now.
    pub joined: usize,
    /// The visitors who wait now. None on the client, which does not know.
    pub waiting: Option<usize>,
    /// The visitors who were joined since the start, those of now included.
    pub visits: u64,
    /// The bytes that were moved since the start.
    pub moved: UpDown,
}

/// The session with a client or a server.
pub struct Session {
    /// The address of the client, or that of the server as the command line has it.
    pub peer: String,
    /// The time since it began. None on a client that has no session with this server.
    pub age: Option<Duration>,
    /// The place of its key, counted from 1, and the number of keys. None without a key.
    pub key: Option<(usize, usize)>,
    /// The idle tunnels that were agreed on.
    pub pool: usize,
    /// The idle tunnels of now.
    pub idle: usize,
    /// The tunnels that were dialled in this session.
    pub dialled: u64,
}

/// A visitor who is joined.
pub struct Visitor {
    /// None on the client of an original server, which does not tell it.
    pub address: Option<String>,
    /// The name of its service.
    pub service: Option<String>,
    /// The time since it was joined.
    pub age: Duration,
    /// The bytes that were moved for it.
    pub moved: UpDown,
    /// The bytes a second over the last 10 s.
    pub rate: UpDown,
}

/// How long visitors took from their accept to a tunnel, since the start.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct JoinTimes {
    /// How many took as long as each of [`JOIN_BOUNDS`] at the most, but longer than the one before.
    /// The last count is that of visitors who took longer than all.
    pub counts: [u64; JOIN_BOUNDS.len() + 1],
    pub sum: Duration,
}

impl JoinTimes {
    /// Counts a visitor.
    pub fn add(&mut self, time: Duration) {
        let seconds = time.as_secs_f64();
        self.counts[JOIN_BOUNDS.partition_point(|bound| *bound < seconds)] += 1;
        self.sum = self.sum.saturating_add(time);
    }
}

impl Snapshot {
    /// Returns the name of the program.
    pub fn program(&self) -> &'static str {
        match self.side {
            Side::Server => "tpserver",
            Side::Client => "tpclient",
        }
    }

    /// Returns the sessions that are live now.
    pub fn live(&self) -> impl Iterator<Item = &Session> {
        self.sessions.iter().filter(|it| it.age.is_some())
    }
}

#[cfg(test)]
impl Snapshot {
    /// A server with a little of everything, and a guest who tries to put markup on its page.
    pub fn invented() -> Self {
        let mut join_times = JoinTimes::default();
        for micros in [300, 400, 900, 30_000, 7_000_000] {
            join_times.add(Duration::from_micros(micros));
        }
        let service = |name: Option<&str>, address: &str, offered| Service {
            name: name.map(str::to_owned),
            address: address.to_owned(),
            offered,
            joined: 2,
            waiting: Some(1),
            visits: 1_234,
            moved: [56_789, 1_234_567_890],
        };
        let line = |level, text: &str| LogLine {
            age: Duration::from_secs(200),
            level,
            text: text.to_owned(),
        };
        let visitor = |address: &str, seconds, rate| Visitor {
            address: Some(address.to_owned()),
            service: Some("web".to_owned()),
            age: Duration::from_secs(seconds),
            moved: [1_000, 2_000_000],
            rate: [0, rate],
        };
        Self {
            side: Side::Server,
            version: "0.1.0",
            uptime: Duration::from_millis(93_784_500),
            not_ready: vec!["no client offers \"ssh\"".to_owned()],
            services: vec![
                service(None, "[::]:8007", true),
                service(Some("ssh"), "0.0.0.0:2222", false),
            ],
            sessions: vec![Session {
                peer: "192.0.2.7:40112".to_owned(),
                age: Some(Duration::from_secs(7_384)),
                key: Some((2, 3)),
                pool: 8,
                idle: 7,
                dialled: 19,
            }],
            visitors: vec![
                visitor("198.51.100.1:50001", 5, 10),
                visitor("<script>alert('1')</script>\"&", 4_000, 2_500_000),
            ],
            max_visitors: 4_000,
            refused: [("wrong-key", 3), ("busy", 1)]
                .map(|(word, count)| (word.to_owned(), count))
                .into(),
            timed_out: 2,
            dialled: 24,
            join_times,
            process: Process {
                descriptors: Some(31),
                descriptor_limit: Some(20_000),
                threads: Some(9),
                cpu: Some(Duration::from_millis(1_500)),
                memory: Some(6_291_456),
            },
            log: vec![
                line(Level::Info, "listening on [::]:8007 for visitors"),
                line(Level::Warn, "refused control link from <b>&</b>: wrong key"),
            ],
            log_left_out: 4,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_join_time_counts_up_to_its_bound() {
        let mut times = JoinTimes::default();
        for micros in [0, 500, 501, 5_000_000, 5_000_001] {
            times.add(Duration::from_micros(micros));
        }
        let last = JOIN_BOUNDS.len();
        assert_eq!(times.counts[..2], [2, 1]);
        assert_eq!(times.counts[last - 1..], [1, 1]);
        assert_eq!(times.counts.iter().sum::<u64>(), 5);
        assert_eq!(times.sum, Duration::from_micros(10_001_002));
    }
}
