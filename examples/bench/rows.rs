//! What is measured: the rows of the table, each with one or more figures.

use std::time::Duration;

use crate::load::{CPU_EACH, MEDIAN, Message, P99, PER_SEC, bulk, crowd, first_byte, hold};
use crate::run::{Fallible, rest};
use crate::service::{BOTH, DOWN, UP};
use crate::systems::{Programs, System, Tunnel};

/// One small packet, and next to nothing where connect and close are what is measured.
const PINGS: Message = (1024, false);
const VISITS: Message = (64, true);

/// Silent connections: enough to tell the memory of one, and about as many as a server takes.
const HELD: usize = 500;
const GROWN: usize = 4000;

/// How long processes take to come to rest after a start, or after the last connection.
const SETTLE: Duration = Duration::from_millis(500);

/// Enough for a median: the delay leaves little room for anything else.
pub const FAR_VISITORS: usize = 10;

/// The pause before each far visitor, some round trips, in which the pool fills up again.
const FAR_PAUSE: Duration = Duration::from_millis(500);

/// What it is, its unit, and whether more (↑) or less (↓) is better.
pub type Figure = (&'static str, &'static str);

/// Values for the figures of a row, as far as a system has them.
pub type Sample = Vec<Option<f64>>;

/// The name of each figure of processor time.
pub const CPU: &str = "processor time";

const BULK: &[Figure] = &[("throughput", "Gbit/s ↑"), (CPU, "s/GB ↓")];
const PING_1: &[Figure] = &[("round trip, median", "µs ↓")];
const PING_32: &[Figure] = &[("round trips", "/s ↑")];
const CLOSE_1: &[Figure] = &[("visit, median", "µs ↓")];
const CLOSE_16: &[Figure] = &[
    ("visits", "/s ↑"),
    ("visit, 99th percentile", "µs ↓"),
    (CPU, "µs a visit ↓"),
];
const MEMORY: &[Figure] = &[
    ("memory, idle", "KiB ↓"),
    ("memory, each held connection", "KiB ↓"),
];
const GROWTH: &[Figure] = &[("ping-1 beside 4,000 held, to beside 1", "× ↓")];
const FIRST_BYTE: &[Figure] = &[
    ("first byte, 50 ms each way", "ms ↓"),
    ("the same, `--pool 0`", "ms ↓"),
];

const RATE_P99_CPU: &[usize] = &[PER_SEC, P99, CPU_EACH];

enum Load {
    /// Work, and connections at a time.
    Bulk(u8, usize),
    /// Visitors at a time, their messages, and which of the tally are the figures.
    Crowd(usize, Message, &'static [usize]),
    /// Memory while connections are held.
    Held,
    /// The round trip while connections are held.
    Growth,
    /// The first byte between hosts that are far from each other.
    Wan,
}

pub struct Row {
    pub name: &'static str,
    pub figures: &'static [Figure],
    load: Load,
}

const fn row(name: &'static str, figures: &'static [Figure], load: Load) -> Row {
    Row {
        name,
        figures,
        load,
    }
}

pub const ROWS: &[Row] = &[
    row("bulk-down", BULK, Load::Bulk(DOWN, 1)),
    row("bulk-up", BULK, Load::Bulk(UP, 1)),
    row("bulk-8", BULK, Load::Bulk(BOTH, 8)),
    row("ping-1", PING_1, Load::Crowd(1, PINGS, &[MEDIAN])),
    row("ping-32", PING_32, Load::Crowd(32, PINGS, &[PER_SEC])),
    row("close-1", CLOSE_1, Load::Crowd(1, VISITS, &[MEDIAN])),
    row("close-16", CLOSE_16, Load::Crowd(16, VISITS, RATE_P99_CPU)),
    row("held", MEMORY, Load::Held),
    row("growth", GROWTH, Load::Growth),
    row("wan", FIRST_BYTE, Load::Wan),
];

impl Row {
    pub fn systems(&self) -> &'static [System] {
        match self.load {
            Load::Bulk(..) | Load::Crowd(..) => System::ALL,
            Load::Held | Load::Growth => System::TUNNELS,
            Load::Wan => System::OWN,
        }
    }

    /// True if the first round is enough: it takes long, and varies little.
    pub fn is_once(&self) -> bool {
        matches!(self.load, Load::Wan)
    }

    pub fn measure(&self, programs: &Programs, system: System, span: Duration) -> Fallible<Sample> {
        let tunnel = || programs.start(system, None);
        match self.load {
            Load::Bulk(work, visitors) => bulk(&tunnel()?, work, visitors, span),
            Load::Crowd(visitors, message, figures) => {
                let tally = crowd(&tunnel()?, visitors, message, span)?;
                Ok(figures.iter().map(|figure| tally[*figure]).collect())
            }
            Load::Held => measure_held(&tunnel()?),
            Load::Growth => measure_growth(&tunnel()?, span),
            Load::Wan => measure_wan(programs, system),
        }
    }
}

fn measure_held(tunnel: &Tunnel) -> Fallible<Sample> {
    rest(SETTLE)?;
    let idle = tunnel.pss_kib()?;
    let _held = hold(tunnel, HELD)?;
    rest(SETTLE)?;
    let held = tunnel.pss_kib()?.zip(idle);
    let each = held.map(|(held, idle)| (held - idle) / HELD as f64);
    Ok(vec![idle, each])
}

fn measure_growth(tunnel: &Tunnel, span: Duration) -> Fallible<Sample> {
    let _one = hold(tunnel, 1)?;
    let few = crowd(tunnel, 1, PINGS, span)?[MEDIAN];
    let _others = hold(tunnel, GROWN - 1)?;
    rest(SETTLE)?;
    let many = crowd(tunnel, 1, PINGS, span)?[MEDIAN];
    Ok(vec![many.zip(few).map(|(many, few)| many / few)])
}

fn measure_wan(programs: &Programs, system: System) -> Fallible<Sample> {
    let mut values = Vec::new();
    for client_words in ["", "--pool 0"] {
        let tunnel = programs.start(system, Some(client_words))?;
        let mut millis = Vec::with_capacity(FAR_VISITORS);
        for _ in 0..FAR_VISITORS {
            rest(FAR_PAUSE)?;
            millis.push(first_byte(tunnel.public)?.as_secs_f64() * 1e3);
        }
        values.push(middle(&mut millis));
    }
    Ok(values)
}

/// Returns the median: the middle one, or the mean of the two that are. None has none.
pub fn middle(values: &mut [f64]) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let last = values.len().checked_sub(1)?;
    Some(f64::midpoint(values[last / 2], values[last.div_ceil(2)]))
}
