//! What is measured: the rows of the table, each with one or two figures.

use std::time::Duration;

use crate::load::{self, Crowd, Tally, bulk, hold, median, ping, visit};
use crate::service::Work;
use crate::stop::{check, rest};
use crate::systems::{Fallible, Link, Programs, System};
use crate::tunnel::Tunnel;

const PING_SIZE: usize = 1024;
const VISIT_SIZE: usize = 64;

/// Silent connections: enough to tell the memory of one, and about as many as a server takes by
/// default.
const HELD: usize = 500;
const GROWN: usize = 4000;

/// Descriptors of this process that the most connections need: the visitor's end and the
/// service's of each, and some for everything else.
pub const DESCRIPTORS: u64 = 2 * GROWN as u64 + 500;

/// How long processes take to come to rest after a start, or after the last connection.
const SETTLE: Duration = Duration::from_millis(500);

/// Half of a far round trip, such as from Europe to the east of America.
const DELAY: Duration = Duration::from_millis(50);

/// Visitors of the delayed tunnel, and the pause in which its pool has to fill up again: some round
/// trips.
pub const FAR_VISITORS: usize = 10;
const FAR_PAUSE: Duration = Duration::from_millis(500);

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Better {
    Higher,
    Lower,
}

pub struct Figure {
    pub what: &'static str,
    pub unit: &'static str,
    pub better: Better,
}

const fn figure(what: &'static str, unit: &'static str, better: Better) -> Figure {
    Figure { what, unit, better }
}

type Measure = fn(&Programs, System, Duration) -> Fallible<Sample>;

pub struct Row {
    pub name: &'static str,
    pub figures: &'static [Figure],
    pub systems: &'static [System],
    /// In the first round only: it takes long, and varies little.
    pub once: bool,
    /// How long it takes: seconds, and times `--secs` besides.
    pub nominal: (f64, f64),
    pub measure: Measure,
}

/// One measurement: a value for each figure, if the system has one.
pub struct Sample {
    pub values: Vec<Option<f64>>,
    pub lost: u64,
    pub no_port: u64,
}

impl Sample {
    fn of(values: impl Into<Vec<Option<f64>>>) -> Self {
        Self {
            values: values.into(),
            lost: 0,
            no_port: 0,
        }
    }

    fn with(values: impl IntoIterator<Item = f64>, tally: &Tally) -> Self {
        Self {
            values: values.into_iter().map(Some).collect(),
            lost: tally.lost,
            no_port: tally.no_port,
        }
    }
}

const SPEED: Figure = figure("throughput", "Gbit/s", Better::Higher);
pub const COST: Figure = figure("processor time", "s/GB", Better::Lower);

/// All that have processes to look at.
const TUNNELS: &[System] = &[
    System::Plain,
    System::Key,
    System::Rathole,
    System::RatholeNoise,
    System::Bore,
];

pub const ROWS: &[Row] = &[
    load_row("bulk-down", &[SPEED, COST], |programs, system, span| {
        measure_bulk(programs, system, Work::Source, 1, span)
    }),
    load_row("bulk-up", &[SPEED, COST], |programs, system, span| {
        measure_bulk(programs, system, Work::Sink, 1, span)
    }),
    load_row("bulk-8", &[SPEED, COST], |programs, system, span| {
        measure_bulk(programs, system, Work::Both, 8, span)
    }),
    load_row(
        "ping-1",
        &[figure("round trip, median", "µs", Better::Lower)],
        |programs, system, span| {
            let tunnel = programs.start(system)?;
            let mut tally = ping(tunnel.public, PING_SIZE, span)?;
            Ok(Sample::with([tally.percentile(50.0)], &tally))
        },
    ),
    load_row(
        "ping-32",
        &[figure("round trips", "/s", Better::Higher)],
        |programs, system, span| {
            let tunnel = programs.start(system)?;
            let tally = PINGS.run(tunnel.public, span)?;
            Ok(Sample::with([rate(&tally, span)], &tally))
        },
    ),
    load_row(
        "close-1",
        &[figure("visit, median", "µs", Better::Lower)],
        |programs, system, span| {
            let tunnel = programs.start(system)?;
            let mut tally = visit(tunnel.public, VISIT_SIZE, span)?;
            Ok(Sample::with([tally.percentile(50.0)], &tally))
        },
    ),
    load_row(
        "close-16",
        &[
            figure("visits", "/s", Better::Higher),
            figure("visit, 99th percentile", "µs", Better::Lower),
        ],
        |programs, system, span| {
            let tunnel = programs.start(system)?;
            let mut tally = VISITS.run(tunnel.public, span)?;
            let values = [rate(&tally, span), tally.percentile(99.0)];
            Ok(Sample::with(values, &tally))
        },
    ),
    Row {
        name: "held",
        figures: &[
            figure("memory, idle", "KiB", Better::Lower),
            figure("memory, each held connection", "KiB", Better::Lower),
        ],
        systems: TUNNELS,
        once: false,
        nominal: (1.2, 0.0),
        measure: |programs, system, _| measure_held(programs, system),
    },
    Row {
        name: "growth",
        figures: &[figure(
            "ping-1 beside 4,000 held, to beside 1",
            "×",
            Better::Lower,
        )],
        systems: TUNNELS,
        once: false,
        nominal: (2.0, 2.0),
        measure: measure_growth,
    },
    Row {
        name: "wan",
        figures: &[
            figure("first byte, 50 ms each way", "ms", Better::Lower),
            figure("the same, `--pool 0`", "ms", Better::Lower),
        ],
        systems: &[System::Plain, System::Key],
        once: true,
        nominal: (15.0, 0.0),
        measure: |programs, system, _| measure_far(programs, system),
    },
];

/// A row that every system is measured in, in every round, under one load.
const fn load_row(name: &'static str, figures: &'static [Figure], measure: Measure) -> Row {
    Row {
        name,
        figures,
        systems: &System::ALL,
        once: false,
        // Its warm-up, a start and an end besides.
        nominal: (0.4, 1.0),
        measure,
    }
}

fn rate(tally: &Tally, span: Duration) -> f64 {
    tally.micros.len() as f64 / span.as_secs_f64()
}

const PINGS: Crowd = Crowd {
    connections: 32,
    size: PING_SIZE,
    close: false,
};

pub const VISITS: Crowd = Crowd {
    connections: 16,
    size: VISIT_SIZE,
    close: true,
};

fn measure_bulk(
    programs: &Programs,
    system: System,
    work: Work,
    connections: usize,
    span: Duration,
) -> Fallible<Sample> {
    let tunnel = programs.start(system)?;
    let bulk = bulk(&tunnel, work, connections, span)?;
    let speed = bulk.bytes * 8.0 / 1e9 / bulk.secs;
    let cost = bulk.cpu.map(|secs| secs / (bulk.bytes / 1e9));
    Ok(Sample::of([Some(speed), cost]))
}

fn measure_held(programs: &Programs, system: System) -> Fallible<Sample> {
    let tunnel = programs.start(system)?;
    let settled = |tunnel: &Tunnel| {
        rest(SETTLE)?;
        tunnel.pss_kib()
    };
    let idle = settled(&tunnel)?;
    let _held = hold(&tunnel, HELD)?;
    let each = settled(&tunnel)?
        .zip(idle)
        .map(|(held, idle)| (held - idle) / HELD as f64);
    Ok(Sample::of([idle, each]))
}

fn measure_growth(programs: &Programs, system: System, span: Duration) -> Fallible<Sample> {
    let tunnel = programs.start(system)?;
    let p50 = || ping(tunnel.public, PING_SIZE, span).map(|mut tally| tally.percentile(50.0));
    let _one = hold(&tunnel, 1)?;
    let few = p50()?;
    let _rest = hold(&tunnel, GROWN - 1)?;
    rest(SETTLE)?;
    Ok(Sample::of([Some(p50()? / few)]))
}

fn measure_far(programs: &Programs, system: System) -> Fallible<Sample> {
    let delay = Some(DELAY);
    let medians: Result<Vec<_>, _> = [None, Some("0")]
        .map(|pool| far_first_byte(programs, system, &Link { delay, pool }))
        .into_iter()
        .map(|median| median.map(Some))
        .collect();
    Ok(Sample::of(medians?))
}

/// The median of some visitors, in milliseconds.
fn far_first_byte(programs: &Programs, system: System, link: &Link) -> Fallible<f64> {
    let tunnel = programs.start_with(system, link)?;
    let mut millis = Vec::with_capacity(FAR_VISITORS);
    for _ in 0..FAR_VISITORS {
        rest(FAR_PAUSE)?;
        let took = load::first_byte(tunnel.public, VISIT_SIZE)?;
        millis.push(took.as_secs_f64() * 1e3);
        check()?;
    }
    Ok(median(&mut millis))
}
