//! Visitors beside many that are slow, silent or hostile.
#![cfg(target_os = "linux")]

use std::io::Write;
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::support::programs::Both;
use crate::support::{
    DEADLINE, Pattern, Protection, Service, SetOnDrop, assert_echo, connect, echo, eventually,
    plain_and_sealed, take_turn,
};

plain_and_sealed! {
    slow_visitors_take_little_from_others (sealed as root),
    strangers_at_all_ports_take_little_from_visitors (sealed as root),
}

/// Measurements without a crowd and with one take turns, in pieces this long: a machine with other work
/// is no unfairer to one than to the other.
const PIECE: Duration = Duration::from_millis(100);
const PIECES: usize = 14;

/// How long visits with strangers and without take turns: long enough for thousands of visits of
/// each kind, or for hundreds on a machine with other work.
const TURNS: Duration = Duration::from_secs(5);

/// A hundred visitors that do not read leave a GB in the kernel's buffers, and the kernel allows
/// little more.
fn slow_visitors_take_little_from_others(protection: Protection) {
    const EACH: usize = 100;
    const LAST: usize = 20;
    let turn = take_turn();
    let service = Service::echo_or_bulk();
    let start = || Both::start(protection, service.addr, [&[], &[]]);
    let (quiet, crowded) = (start(), start());
    let memory = || crowded.server.memory("Pss_Anon") + crowded.client.memory("Pss_Anon");
    let before = memory();
    let visit = |first: &[u8]| {
        let mut visitor = crowded.visit();
        visitor.write_all(first).unwrap();
        visitor
    };
    let never_writing: Vec<_> = (0..EACH).map(|_| visit(b"")).collect();
    let held = || {
        let (mut last, mut looks) = (0, 0);
        let at_work = || crowded.client.processor_share(Duration::from_millis(500)) > 5.0;
        // A machine that is busy with other things may hold up what is still to come.
        eventually("what is not read fills all buffers", || {
            let now = if at_work() { 0 } else { memory() };
            looks = if now == last { looks + 1 } else { 0 };
            last = now;
            now > 0 && looks == 2
        });
        last
    };
    let silent = held();
    let never_reading: Vec<_> = (0..EACH).map(|_| visit(b"!")).collect();
    let with_each = held();
    let last_ones: Vec<_> = (0..LAST).map(|_| visit(b"!")).collect();
    let with_all = held();
    // What any visitor takes is left out: it depends on how the programs were built.
    let any = silent.saturating_sub(before) / EACH;
    let [each, all] = [(with_each, EACH), (with_all, EACH + LAST)]
        .map(|(held, visitors)| held.saturating_sub(silent + visitors * any));
    eprintln!("KiB: {any} any visitor, {each} more {EACH} stopped ones, {all} with {LAST} others");
    assert!(each <= EACH * 300, "{each} KiB for {EACH}");
    // One of the first may pause, and leave its large buffers to one of the last: only the sum is
    // bounded.
    assert!(all <= EACH * 300 + LAST * 64, "{all} KiB with the last");
    let dripping: Vec<_> = (0..EACH).map(|_| crowded.visit()).collect();
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let _over = SetOnDrop(&over);
        scope.spawn(|| {
            while !over.load(Ordering::SeqCst) {
                for visitor in &dripping {
                    assert_echo(visitor, "x");
                    thread::sleep(Duration::from_secs(1) / EACH as u32);
                }
            }
        });
        let kept = rate_kept(&crowded, &quiet);
        assert!(kept >= 0.8, "others keep {kept:.2} of their rate");
    });
    let grown = memory().saturating_sub(before) / (3 * EACH);
    assert!(grown < 1024, "{grown} KiB a pair");
    drop((never_writing, never_reading, last_ones, dripping, turn));
    crowded.assert_recovered(echo);
}

/// Which share of their rate others keep: the median of all turns, as a machine with other work spoils
/// some of them.
fn rate_kept(crowded: &Both, quiet: &Both) -> f64 {
    let turn = |_| {
        // Each of the two is first and last by turns: the machine may get busier meanwhile, or less.
        let [a, b, c, d] = [crowded, quiet, quiet, crowded].map(round_trips);
        (a + d) as f64 / (b + c) as f64
    };
    let mut kept: Vec<_> = (0..PIECES).map(turn).collect();
    kept.sort_by(f64::total_cmp);
    eprintln!("{kept:.2?} of the rate without the crowd");
    kept[PIECES / 2]
}

/// What four visitors get done in a piece of time: each comes, and says something ten times.
fn round_trips(both: &Both) -> usize {
    let (start, count) = (Instant::now(), AtomicUsize::new(0));
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                while start.elapsed() < PIECE {
                    let visitor = both.visit();
                    for _ in 0..10 {
                        echo(&visitor);
                        count.fetch_add(1, Ordering::Relaxed);
                    }
                }
            });
        }
    });
    count.into_inner()
}

/// The strangers send garbage, scan, and drip a byte now and then, at each port.
fn strangers_at_all_ports_take_little_from_visitors(protection: Protection) {
    let turn = take_turn();
    let service = Service::echo();
    let both = Both::start(protection, service.addr, [&[], &[]]);
    let (attack, over) = (AtomicBool::new(false), AtomicBool::new(false));
    let (mut quiet, mut attacked) = (Vec::new(), Vec::new());
    thread::scope(|scope| {
        let _over = SetOnDrop(&over);
        for address in both.addresses {
            let (attack, over) = (&attack, &over);
            scope.spawn(move || send_garbage(address, attack, over));
            scope.spawn(move || drip(address, attack, over));
        }
        let start = Instant::now();
        while start.elapsed() < TURNS {
            quiet.push(percentile_99(visits(&both)));
            attack.store(true, Ordering::SeqCst);
            attacked.push(percentile_99(visits(&both)));
            attack.store(false, Ordering::SeqCst);
        }
    });
    drop(turn);
    for times in [&mut quiet, &mut attacked] {
        times.sort();
    }
    eprintln!("99th percentiles, quiet: {quiet:.1?}, attacked: {attacked:.1?}");
    // A moment in which the machine is busy with other things spoils one turn, quiet or not, and hardly the
    // median or the slowest quarter of all. It would decide the ratio of its own turn.
    for part in [2, 4] {
        let [quiet, attacked] = [&quiet, &attacked]
            .map(|times| times[times.len() - 1 - times.len() / part].as_secs_f64());
        let times = attacked / quiet;
        assert!(times < 2.5, "{times:.2} times the quiet 99th percentile");
    }
    both.assert_recovered(echo);
}

/// How long the visits of 16 visitors took in a piece of time.
fn visits(both: &Both) -> Vec<Duration> {
    let start = Instant::now();
    let one_after_another = || {
        let mut took = Vec::new();
        // One visit at the least: a machine that pauses may take longer to start this thread.
        loop {
            let before = Instant::now();
            echo(&both.visit());
            took.push(before.elapsed());
            if start.elapsed() >= PIECE {
                return took;
            }
        }
    };
    thread::scope(|scope| {
        let visitors: Vec<_> = (0..16).map(|_| scope.spawn(one_after_another)).collect();
        let took = visitors.into_iter().map(|it| it.join().unwrap());
        took.flatten().collect()
    })
}

fn percentile_99(mut durations: Vec<Duration>) -> Duration {
    durations.sort();
    durations[durations.len() * 99 / 100]
}

/// Two hundred connections a second: noise of any length, or nothing.
fn send_garbage(address: SocketAddr, attack: &AtomicBool, over: &AtomicBool) {
    let mut noise = Pattern::new(address.port().into());
    let mut buffer = [0; 4096];
    for number in 0.. {
        if over.load(Ordering::SeqCst) {
            return;
        }
        if attack.load(Ordering::SeqCst)
            && let Ok(mut stranger) = TcpStream::connect_timeout(&address, DEADLINE)
        {
            let size = [0, 1, 100, 300, 4096][number % 5];
            noise.fill(&mut buffer[..size]);
            let _ = stranger.write_all(&buffer[..size]);
        }
        thread::sleep(Duration::from_millis(5));
    }
}

/// A hundred connections, each with a byte every now and then, and a new one for each that is closed.
fn drip(address: SocketAddr, attack: &AtomicBool, over: &AtomicBool) {
    let mut dripping: Vec<TcpStream> = Vec::new();
    while !over.load(Ordering::SeqCst) {
        if attack.load(Ordering::SeqCst) {
            dripping.retain(|mut it| it.write_all(b"h").is_ok());
            if dripping.len() < 100 {
                dripping.push(connect(address));
            }
        }
        thread::sleep(Duration::from_millis(10));
    }
}
