//! Visitors and a client that comes back, while a stranger opens connections as fast as it can.
#![cfg(target_os = "linux")]

use std::collections::VecDeque;
use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::between::{Between, Place, Port, Verdict, Way};
use crate::support::*;

/// What is measured in peace and under attack takes turns, in pieces this long, so that a machine
/// with other work is no unfairer to one than to the other.
const PIECE: Duration = Duration::from_millis(250);
const PIECES: usize = 4;

/// Between two visits of a visitor.
const PAUSE: Duration = Duration::from_millis(10);

/// What the flooder does.
#[derive(Clone, Copy, Debug)]
struct Flood {
    port: Port,
    /// Openings a second.
    rate: u32,
    /// Says what the client said first; or nothing.
    recorded: bool,
    /// Of the flooder. The client comes from 127.0.0.1.
    source: [u8; 4],
    /// Between the two programs.
    round_trip: Duration,
}

const STRANGER: [u8; 4] = [127, 0, 0, 2];
const NEIGHBOUR: [u8; 4] = [127, 0, 0, 1];

/// A server and its client, with somebody between them who hears the openings, and can end the
/// session.
struct Watched {
    client: RunningClient,
    between: Between,
    server: RunningServer,
    end_session: Arc<AtomicBool>,
    _service: Service,
}

impl Watched {
    fn start(protection: Protection, round_trip: Duration) -> Self {
        let service = Service::echo();
        let server = RunningServer::start(server_options(protection));
        let end_session = Arc::new(AtomicBool::new(false));
        let end = end_session.clone();
        let between = Between::start(&server, move |place: Place, message| {
            let heartbeat = place.port == Port::Control && place.index > 2;
            match (place.way, place.index) {
                _ if heartbeat && end.swap(false, Ordering::SeqCst) => Verdict::Cut(Vec::new()),
                // The answer to a handshake, or to hello.
                (Way::ToClient, 0) if !round_trip.is_zero() => Verdict::Late(message, round_trip),
                _ => Verdict::Pass(message),
            }
        });
        let options = between.options(service.addr, server.key.as_ref());
        let client = RunningClient::start(options);
        assert_echo(&server.visit(), "the client is there");
        Self {
            client,
            between,
            server,
            end_session,
            _service: service,
        }
    }

    /// How long the visits of a piece of time took. Each is served.
    fn visits(&self) -> Vec<Duration> {
        let start = Instant::now();
        let one_after_another = || {
            let mut took = Vec::new();
            while start.elapsed() < PIECE {
                let before = Instant::now();
                echo(&self.server.visit());
                took.push(before.elapsed());
                thread::sleep(PAUSE);
            }
            took
        };
        thread::scope(|scope| {
            let visitors: Vec<_> = (0..2).map(|_| scope.spawn(one_after_another)).collect();
            let took = visitors.into_iter().map(|it| it.join().unwrap());
            took.flatten().collect()
        })
    }

    /// What the client said first at this port, on each of its connections so far.
    fn openings(&self, port: Port) -> Vec<Vec<u8>> {
        let seen = self.between.seen(port).into_iter();
        let said = seen.map(|[said, _]| said[..said.len().min(50)].to_vec());
        said.filter(|it| it.len() == 50).collect()
    }

    fn session(&self) -> Option<String> {
        self.client.handle().status().unwrap().session
    }
}

/// Opens connections as long as the attack goes on, and keeps the latest ones.
fn flood(watched: &Watched, what: Flood, attack: &AtomicBool, over: &AtomicBool) {
    const HELD: usize = 200;
    let to = match what.port {
        Port::Control => watched.server.control,
        Port::Tunnel => watched.server.tunnel,
    };
    let mut held = VecDeque::new();
    while !over.load(Ordering::SeqCst) {
        let (openings, start) = (watched.openings(what.port), Instant::now());
        let mut count = 0;
        while attack.load(Ordering::SeqCst) && !over.load(Ordering::SeqCst) {
            if start.elapsed() < count * Duration::from_secs(1) / what.rate {
                thread::sleep(Duration::from_micros(500));
                continue;
            }
            let mut stranger = open_from(what.source, to);
            // Nothing of it is left in the system.
            reset_on_close(&stranger);
            if what.recorded {
                let _ = stranger.write_all(&openings[count as usize % openings.len()]);
            }
            held.push_back(stranger);
            if held.len() > HELD {
                held.pop_front();
            }
            count += 1;
        }
        held.clear();
        thread::sleep(Duration::from_millis(1));
    }
}

fn median(mut durations: Vec<Duration>) -> Duration {
    durations.sort();
    durations[durations.len() / 2]
}

/// Asserts that each visitor is served, and that a visit takes little longer.
fn withstands(protection: Protection, what: Flood) {
    raise_descriptors();
    let watched = Watched::start(protection, what.round_trip);
    let (attack, over) = (AtomicBool::new(false), AtomicBool::new(false));
    let (mut quiet, mut attacked) = (Vec::new(), Vec::new());
    let before = watched.session();
    thread::scope(|scope| {
        let _over = Over(&over);
        scope.spawn(|| flood(&watched, what, &attack, &over));
        for piece in 0..PIECES {
            quiet.extend(watched.visits());
            attack.store(true, Ordering::SeqCst);
            if piece == PIECES / 2 {
                watched.end_session.store(true, Ordering::SeqCst);
                eventually("the client is back", || {
                    echo(&watched.server.visit());
                    watched.session().is_some_and(|it| Some(it) != before)
                });
            }
            attacked.extend(watched.visits());
            attack.store(false, Ordering::SeqCst);
        }
    });
    let (quiet, attacked) = (median(quiet), median(attacked));
    eprintln!("{protection:?}, {what:?}: {attacked:?} in the place of {quiet:?}");
    // Not twice as long on a machine of its own; where nothing is done it takes seconds.
    assert!(
        attacked < 5 * quiet,
        "{what:?}: {attacked:?} in the place of {quiet:?}"
    );
}

/// Ends the flood however a test ends.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// What was recorded of the client's handshakes opens as often as it is said, but keeps nobody out.
#[test]
fn recorded_openings_lock_nobody_out() {
    let floods = [(Port::Control, NEIGHBOUR), (Port::Tunnel, STRANGER)];
    for (port, source) in floods {
        withstands(
            Protection::Sealed,
            Flood {
                port,
                source,
                rate: 200,
                recorded: true,
                round_trip: Duration::from_millis(100),
            },
        );
    }
}

/// More than a backlog can hold for a second.
#[test]
fn thousands_of_openings_a_second_hold_nobody_up() {
    let floods = [
        (Protection::Plain, Port::Control),
        (Protection::Sealed, Port::Tunnel),
    ];
    for (protection, port) in floods {
        withstands(
            protection,
            Flood {
                port,
                source: STRANGER,
                rate: 5_000,
                recorded: false,
                round_trip: Duration::ZERO,
            },
        );
    }
}
