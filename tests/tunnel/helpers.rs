//! What the other tests rely on: the relay that spoils connections, and ports that nobody else gets.
#![cfg(target_os = "linux")]

use std::io::{ErrorKind, Read};
use std::net::{Shutdown, TcpStream};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use crate::support::faulty_relay::{Fault, FaultyRelay};
use crate::support::programs::ports_of;
use crate::support::{
    DEADLINE, Record, Service, assert_ended, assert_reset, connect, eventually, expect_pattern,
    pattern, reset_on_close, send_pattern,
};

/// A connection through a relay: its end here, and the one at a service.
struct Through {
    relay: FaultyRelay,
    near: TcpStream,
    far: TcpStream,
    _service: (Service, mpsc::Receiver<TcpStream>),
}

impl Through {
    fn start() -> Self {
        let (service, sockets) = handing_out();
        let relay = FaultyRelay::start(service.addr);
        let near = connect(relay.addr);
        let far = sockets.recv_timeout(DEADLINE).unwrap();
        Self {
            relay,
            near,
            far,
            _service: (service, sockets),
        }
    }
}

/// A service that hands its connections out.
fn handing_out() -> (Service, mpsc::Receiver<TcpStream>) {
    let (sender, sockets) = mpsc::channel();
    let service = Service::start(move |socket| {
        let _ = sender.send(socket);
    });
    (service, sockets)
}

/// Sends this many bytes both ways at once, and expects them.
fn exchange(near: &TcpStream, far: &TcpStream, size: usize) {
    thread::scope(|scope| {
        scope.spawn(|| send_pattern(near, 1, size));
        scope.spawn(|| send_pattern(far, 2, size));
        scope.spawn(|| expect_pattern(far, 1, size));
        expect_pattern(near, 2, size);
    });
}

#[test]
fn the_relay_passes_bytes_ends_and_resets() {
    let Through {
        relay,
        near,
        far,
        _service,
    } = Through::start();
    exchange(&near, &far, 1_000_000);
    near.shutdown(Shutdown::Write).unwrap();
    assert_ended(&far);
    send_pattern(&far, 3, 1000);
    expect_pattern(&near, 3, 1000);
    reset_on_close(&near);
    drop(near);
    // Nothing is sent here that could meet the reset.
    eventually("the reset has passed", || far.peer_addr().is_err());

    let near = connect(relay.addr);
    assert_silent(&near);
    drop(relay);
    assert_reset(&near, DEADLINE);
}

fn assert_silent(near: &TcpStream) {
    near.set_read_timeout(Some(Duration::from_millis(100)))
        .unwrap();
    let error = { near }.read(&mut [0]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::WouldBlock);
    near.set_read_timeout(Some(DEADLINE)).unwrap();
}

#[test]
fn the_relay_delays_and_slices() {
    const DELAY: Duration = Duration::from_millis(200);
    let Through {
        relay, near, far, ..
    } = &Through::start();
    relay.set(Fault::Delay(DELAY));
    let start = Instant::now();
    exchange(near, far, 1000);
    assert!(start.elapsed() >= DELAY);
    relay.set(Fault::Slices(3));
    exchange(near, far, 10_000);
    // Slices that nobody has read yet are put together again, but not a hundred thousand of them: whole
    // chunks would be four reads.
    thread::scope(|scope| {
        scope.spawn(|| send_pattern(near, 1, 200_000));
        let reads = count_reads(far, 200_000);
        assert!(reads > 100, "{reads} reads");
    });
}

/// How many reads it takes to get so many bytes.
fn count_reads(mut from: &TcpStream, size: usize) -> usize {
    let mut buffer = vec![0; size];
    let (mut filled, mut reads) = (0, 0);
    while filled < size {
        let count = from.read(&mut buffer[filled..]).unwrap();
        assert!(count > 0, "an end after {filled} bytes");
        filled += count;
        reads += 1;
    }
    reads
}

#[test]
fn the_relays_black_hole_holds_all_back() {
    let Through {
        relay, near, far, ..
    } = &Through::start();
    relay.set(Fault::BlackHole);
    let during = connect(relay.addr);
    send_pattern(&during, 1, 1000);
    send_pattern(near, 1, 1000);
    near.shutdown(Shutdown::Write).unwrap();
    assert_silent(far);
    assert_silent(&during);
    relay.set(Fault::Pass);
    expect_pattern(far, 1, 1000);
    assert_ended(far);
    relay.set(Fault::BlackHole);
    relay.reset_all();
    assert_reset(near, DEADLINE);
    assert_reset(&during, DEADLINE);
    // The other side has had its end already, and reads no reset.
    eventually("the other side is reset", || far.peer_addr().is_err());
}

#[test]
fn the_relay_cuts_and_changes_where_it_is_told() {
    const AT: u64 = 1234;
    for fault in [Fault::Reset(AT), Fault::Truncate(AT), Fault::Flip(AT)] {
        let Through {
            relay, near, far, ..
        } = &Through::start();
        exchange(near, far, 100);
        relay.set(fault);
        send_pattern(near, 1, 5000);
        // It may have been reset already.
        let _ = near.shutdown(Shutdown::Write);
        let Record { mut bytes, error } = Record::of(far);
        let (whole, cut) = (5000, AT as usize);
        let wanted = match fault {
            Fault::Reset(_) => (cut, Some(ErrorKind::ConnectionReset)),
            Fault::Truncate(_) => (cut, None),
            _ => {
                bytes[cut] ^= 1 << (AT % 8);
                (whole, None)
            }
        };
        assert_eq!((bytes.len(), error), wanted, "{fault:?}");
        assert_eq!(bytes, pattern(1, 5000)[..bytes.len()], "{fault:?}");
        match fault {
            Fault::Reset(_) => assert_reset(near, DEADLINE),
            Fault::Truncate(_) => assert_ended(near),
            _ => {}
        }
    }
}

#[test]
fn the_relay_ends_all_connections_properly() {
    let Through {
        relay, near, far, ..
    } = &Through::start();
    relay.end_all();
    assert_ended(near);
    assert_ended(far);
}

/// Nobody listens on such a port, not even for the moment in which another test starts a program.
#[test]
fn ports_to_come_refuse_who_comes_early() {
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                while !over.load(Ordering::SeqCst) {
                    // The program prints a line and ends.
                    let mut program = Command::new(env!("CARGO_BIN_EXE_tpserver"));
                    let version = program.arg("--version").stdout(Stdio::null());
                    assert!(version.status().unwrap().success());
                }
            });
        }
        let early = (0..1000).filter(|_| {
            let [public, ..] = ports_of("127.0.80.1");
            TcpStream::connect(public).is_ok()
        });
        let early = early.count();
        over.store(true, Ordering::SeqCst);
        assert_eq!(early, 0);
    });
}
