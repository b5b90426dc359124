//! Programs that are asked to end: what could finish is not cut, and what could not does not keep
//! them.
#![cfg(target_os = "linux")]

use std::io::Read;
use std::net::SocketAddr;
use std::os::unix::process::ExitStatusExt;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::support::load::under_load;
use crate::support::peer::Peer;
use crate::support::programs::{Both, Launch, Program};
use crate::support::{
    DEADLINE, Protection, RunningServer, Service, assert_echo, assert_ended, assert_reset, connect,
    echo, eventually, expect_pattern, plain_and_sealed, send_pattern, server_options,
};

plain_and_sealed! {
    a_signal_ends_idle_programs_at_once,
    a_signal_lets_transfers_finish,
    a_signal_cuts_what_takes_longer_than_the_drain,
    a_signal_that_comes_twice_ends_at_once,
    a_signal_that_comes_early_is_obeyed,
    a_signal_to_hang_up_is_obeyed_unless_it_was_ignored_before,
    visitors_that_wait_are_served_before_a_stop,
    visitors_that_nobody_can_serve_do_not_keep_a_stop,
    a_signal_under_load_cuts_nobody_who_was_joined,
    a_client_is_replaced_without_losing_a_visitor,
}

/// A program that waits for nothing ends within this time, even if the machine is busy.
const AT_ONCE: Duration = Duration::from_secs(2);

/// Runs the test for a server that is asked to end, and for a client, at the same time.
fn each_asked_to_end(protection: Protection, options: &[&str], test: impl Fn(Both, &str) + Sync) {
    let service = Service::echo_or_bulk();
    thread::scope(|scope| {
        for asked in ["tpserver", "tpclient"] {
            let (service, test) = (service.addr, &test);
            scope.spawn(move || test(Both::start(protection, service, [options; 2]), asked));
        }
    });
}

fn program<'a>(both: &'a mut Both, name: &str) -> &'a mut Program {
    match name {
        "tpserver" => &mut both.server,
        _ => &mut both.client,
    }
}

/// A machine that is busy holds up some of several ends, but neither the fastest of them nor most of
/// them for long.
fn a_signal_ends_idle_programs_at_once(protection: Protection) {
    const ENDS: usize = 5;
    let service = Service::echo();
    for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
        for asked in ["tpserver", "tpclient"] {
            let mut took: Vec<_> = (0..ENDS)
                .map(|_| time_to_end(protection, service.addr, asked, signal))
                .collect();
            took.sort();
            let (fastest, median) = (took[0], took[ENDS / 2]);
            // A server serves on for 0.3 s, and lets nobody begin for 0.1 s. Its last words would take
            // 0.25 s more if it waited for them in vain.
            assert!(
                fastest < Duration::from_millis(640) && median < AT_ONCE,
                "{asked}, {signal:?}: {took:?}"
            );
        }
    }
}

/// How long one of the two programs takes to end after a signal, when it has served a visitor.
fn time_to_end(protection: Protection, local: SocketAddr, asked: &str, signal: Signal) -> Duration {
    let (server, addresses) = Program::server(protection, &[]);
    let client = Program::client(protection, addresses, local, &[]);
    echo(&connect(addresses[0]));
    for program in [&server, &client] {
        program.wait_for_line("bytes down");
    }
    let (mut program, _other) = match asked {
        "tpserver" => (server, client),
        _ => (client, server),
    };
    program.signal(signal);
    let start = Instant::now();
    assert!(program.wait_for_end().success());
    start.elapsed()
}

/// There is bulk both ways, of which most comes after the signal, and a visitor that is silent for
/// a while.
fn a_signal_lets_transfers_finish(protection: Protection) {
    const SIZE: usize = 16 * 1024 * 1024;
    each_asked_to_end(protection, &[], |mut both, asked| {
        let [transfer, silent] = [both.visit(), both.visit()];
        echo(&silent);
        echo(&transfer);
        program(&mut both, asked).signal(Signal::TERM);
        program(&mut both, asked).wait_for_line("stopping");
        let other = match asked {
            "tpserver" => &both.client,
            _ => &both.server,
        };
        let told = other.wait_for_line("it said bye, draining");
        // The line is no warning, as nothing is wrong.
        assert!(told.contains(" INFO "), "{told}");
        thread::scope(|scope| {
            scope.spawn(|| send_pattern(&transfer, 1, SIZE));
            expect_pattern(&transfer, 1, SIZE);
        });
        drop(transfer);
        assert!(program(&mut both, asked).ended().is_none());
        assert_echo(&silent, "still there");
        drop(silent);
        let start = Instant::now();
        assert!(program(&mut both, asked).wait_for_end().success());
        assert!(start.elapsed() < AT_ONCE, "{:?}", start.elapsed());
    });
}

fn a_signal_cuts_what_takes_longer_than_the_drain(protection: Protection) {
    each_asked_to_end(protection, &["--drain", "1"], |mut both, asked| {
        let visitor = both.visit();
        echo(&visitor);
        let program = program(&mut both, asked);
        let start = Instant::now();
        program.signal(Signal::INT);
        assert!(program.wait_for_end().success());
        let bounds = Duration::from_millis(950)..Duration::from_millis(4000);
        assert!(bounds.contains(&start.elapsed()), "{:?}", start.elapsed());
        assert_reset(&visitor, AT_ONCE);
        program.wait_for_line("aborted: cut off by the stop");
    });
}

fn a_signal_that_comes_twice_ends_at_once(protection: Protection) {
    each_asked_to_end(protection, &[], |mut both, asked| {
        let visitor = both.visit();
        echo(&visitor);
        let program = program(&mut both, asked);
        program.signal(Signal::TERM);
        program.wait_for_line("for those that are there; again to end now");
        program.signal(Signal::INT);
        let start = Instant::now();
        let ended = program.wait_for_end().signal();
        assert_eq!(ended, Some(Signal::INT.as_raw()));
        program.wait_for_line("stopping now");
        assert!(start.elapsed() < AT_ONCE, "{:?}", start.elapsed());
        assert_reset(&visitor, AT_ONCE);
    });
}

/// The signal comes while the server waits for a port that another program has.
fn a_signal_that_comes_early_is_obeyed(protection: Protection) {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = taken.local_addr().unwrap();
    let free = SocketAddr::from(([127, 0, 0, 1], 0));
    let launch = Launch::new(protection).on([free, free, taken]);
    let mut server = launch.server(&[]);
    server.wait_for_line("is in use, waiting for it for up to 6 s");
    server.signal(Signal::USR1);
    server.wait_for_line("status: starting");
    server.signal(Signal::TERM);
    let start = Instant::now();
    assert!(server.wait_for_end().success());
    assert!(start.elapsed() < AT_ONCE, "{:?}", start.elapsed());
}

/// `nohup` ignores HUP before the program starts.
fn a_signal_to_hang_up_is_obeyed_unless_it_was_ignored_before(protection: Protection) {
    for (trap, obeyed) in [("", true), ("trap '' HUP;", false)] {
        let script = format!(r#"{trap} exec "$0" "$@""#);
        let under = ["sh", "-c", &script];
        let mut server = Launch::new(protection).under(&under).server(&[]);
        server.addresses();
        server.signal(Signal::USR1);
        server.wait_for_line("status: ");
        server.signal(Signal::HUP);
        match obeyed {
            // A program that the signal killed would have no code.
            true => assert_eq!(server.wait_for_end().code(), Some(0)),
            false => {
                server.signal(Signal::USR1);
                server.wait_for_lines("status: ", 2);
                assert_eq!(server.lines_with("stopping"), [""; 0]);
            }
        }
    }
}

fn visitors_that_wait_are_served_before_a_stop(protection: Protection) {
    let mut server = RunningServer::start(server_options(protection));
    let mut control = Peer::dial_control(&server);
    let session = control.say_hello(0);
    let mut visitor = server.visit();
    assert_eq!(control.line_after_hi(), "new\n");
    server.handle().stop(DEADLINE);
    // The client is not told of the stop yet, but asked again.
    assert_eq!(control.line_after_hi(), "new\n");
    let mut tunnel = Peer::dial_tunnel(&server, &control);
    tunnel.write(format!("tunnel session={session}\n"));
    tunnel.assert_given(&visitor, "");
    let mut line = control.line_after_hi();
    while line == "new\n" {
        line = control.line_after_hi();
    }
    assert_eq!(line, "bye reason=draining\n");
    tunnel.write("late, but served");
    tunnel.end();
    let mut got = String::new();
    visitor.read_to_string(&mut got).unwrap();
    assert_eq!(got, "late, but served");
    drop(visitor);
    server.wait_for_end();
}

fn visitors_that_nobody_can_serve_do_not_keep_a_stop(protection: Protection) {
    let mut server = RunningServer::start(server_options(protection));
    let waiting = server.visit();
    eventually("it waits", || {
        server.handle().status().is_some_and(|it| it.waiting == 1)
    });
    let start = Instant::now();
    server.handle().stop(Duration::from_secs(1));
    assert_ended(&waiting);
    server.wait_for_end();
    let bounds = Duration::from_millis(950)..Duration::from_millis(2500);
    assert!(bounds.contains(&start.elapsed()), "{:?}", start.elapsed());
}

fn a_signal_under_load_cuts_nobody_who_was_joined(protection: Protection) {
    each_asked_to_end(protection, &[], |mut both, asked| {
        under_load(both.addresses[0], 20, |whole| {
            eventually("some visits", || whole.load(Ordering::SeqCst) > 50);
            match asked {
                "tpserver" => both.server.signal(Signal::TERM),
                _ => both.client.signal(Signal::TERM),
            }
        });
        assert!(program(&mut both, asked).wait_for_end().success());
        let cut = program(&mut both, asked).lines_with("aborted");
        assert_eq!(cut, [""; 0]);
    });
}

fn a_client_is_replaced_without_losing_a_visitor(protection: Protection) {
    const TIMES: usize = 5;
    let service = Service::echo();
    let both = Both::start(protection, service.addr, [&[], &[]]);
    let mut clients = Vec::new();
    let [_, refused] = under_load(both.addresses[0], 20, |whole| {
        for _ in 0..TIMES {
            let so_far = whole.load(Ordering::SeqCst);
            eventually("visits", || whole.load(Ordering::SeqCst) > so_far + 20);
            clients.last().unwrap_or(&both.client).signal(Signal::TERM);
            clients.push(Program::client(
                protection,
                both.addresses,
                service.addr,
                &[],
            ));
        }
    });
    assert_eq!(refused, 0);
}
