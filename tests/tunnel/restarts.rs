//! Programs that are killed, stopped and restarted, as their hosts do it to them.
#![cfg(target_os = "linux")]

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr as LocalAddr, UnixListener};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::support::programs::{Both, Launch, Program, ports_of};
use crate::support::{
    DEADLINE, Protection, RunningClient, RunningServer, Service, assert_ended, assert_reset,
    client_options, connect, echo, eventually, plain_and_sealed, server_options, share_turn, with,
};

plain_and_sealed! {
    a_killed_client_makes_room_at_once,
    a_stopped_client_is_dropped_and_comes_back,
    a_stopped_server_is_left_and_found_again,
    a_server_that_restarts_under_load_is_back_each_time,
    a_server_hands_over_to_the_next_one_without_losing_a_visitor,
    a_server_that_takes_over_late_waits_for_those_before_it,
    a_tunnel_that_is_lost_costs_no_visitor,
}

/// What is not noticed at once is noticed after 6 s of silence.
const AT_ONCE: Duration = Duration::from_secs(4);
const NOTICED: Duration = Duration::from_secs(8);
const BACK: Duration = Duration::from_secs(10);

/// Visitors whose bulk is under way.
fn in_mid_transfer(both: &Both) -> Vec<TcpStream> {
    let visit = |_| {
        let mut visitor = both.visit();
        visitor.write_all(b"!").unwrap();
        visitor.read_exact(&mut [0; 100_000]).unwrap();
        visitor
    };
    (0..8).map(visit).collect()
}

fn a_killed_client_makes_room_at_once(protection: Protection) {
    let service = Service::echo_or_bulk();
    let mut both = Both::start(protection, service.addr, [&[], &[]]);
    // The reset comes behind the megabytes that the kernel has taken from the client before. Beside a crowd
    // that fills the memory that the kernel allows all sockets together, they crawl for 20 s and more.
    let turn = share_turn();
    let visitors = in_mid_transfer(&both);
    both.client.kill();
    for visitor in &visitors {
        assert_reset(visitor, AT_ONCE);
    }
    drop(turn);
    let start = Instant::now();
    both.client = Program::client(protection, both.addresses, service.addr, &[]);
    echo(&both.visit());
    assert!(start.elapsed() < AT_ONCE, "{:?}", start.elapsed());
    both.assert_recovered(echo);
}

fn a_stopped_client_is_dropped_and_comes_back(protection: Protection) {
    let service = Service::echo_or_bulk();
    let both = Both::start(protection, service.addr, [&[], &[]]);
    let patient = both.visit();
    echo(&patient);
    both.client.signal(Signal::STOP);
    let start = Instant::now();
    both.server.wait_for_line(" left: ");
    assert!(start.elapsed() < NOTICED, "{:?}", start.elapsed());
    assert_ended(&both.visit());
    goes_on(&both, &both.client, patient);
}

fn goes_on(both: &Both, stopped: &Program, patient: TcpStream) {
    stopped.signal(Signal::CONT);
    let start = Instant::now();
    both.client.wait_for_lines("connected to", 2);
    echo(&both.visit());
    assert!(start.elapsed() < BACK, "{:?}", start.elapsed());
    echo(&patient);
    drop(patient);
    both.assert_recovered(echo);
}

/// The server is stopped for so long that the client dials more than once. It finds all of that
/// when it goes on.
fn a_stopped_server_is_left_and_found_again(protection: Protection) {
    let service = Service::echo_or_bulk();
    let both = Both::start(protection, service.addr, [&[], &[]]);
    let patient = both.visit();
    echo(&patient);
    both.server.signal(Signal::STOP);
    let start = Instant::now();
    both.client.wait_for_line("lost the server");
    assert!(start.elapsed() < NOTICED, "{:?}", start.elapsed());
    both.client.wait_for_lines("no session with the server", 2);
    goes_on(&both, &both.server, patient);
}

/// The servers are killed and asked to end by turns. One that was asked still has visitors while
/// the next one takes over its ports.
fn a_server_that_restarts_under_load_is_back_each_time(protection: Protection) {
    const RESTARTS: usize = 20;
    const UP: Duration = Duration::from_secs(3);
    let host = match protection {
        Protection::Plain => "127.0.78.1",
        Protection::Sealed => "127.0.78.2",
    };
    let service = Service::echo_or_bulk();
    let launch = Launch::new(protection).on(ports_of(host));
    let server = launch.server(&[]);
    let addresses = server.addresses();
    let client = launch.client(addresses, service.addr, &[]);
    let mut both = Both::at_rest(server, client, addresses);
    let (over, visits) = (AtomicBool::new(false), AtomicUsize::new(0));
    let (mut draining, began) = (Vec::new(), Instant::now());
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                // The visitors end, too, if the test has failed.
                while !over.load(Ordering::SeqCst) && began.elapsed() < 6 * DEADLINE {
                    visits.fetch_add(usize::from(was_served(addresses[0])), Ordering::SeqCst);
                }
            });
        }
        for restart in 0..RESTARTS {
            let served = visits.load(Ordering::SeqCst);
            eventually("visitors are served", || {
                visits.load(Ordering::SeqCst) > served + 10
            });
            if restart % 2 == 0 {
                both.server.kill();
            } else {
                both.server.signal(Signal::TERM);
                both.server.wait_for_line("stopping");
            }
            let server = launch.server(&[]);
            let start = Instant::now();
            eventually("it is up and serves", || was_served(addresses[0]));
            assert!(start.elapsed() < UP, "{restart}: {:?}", start.elapsed());
            // A server that was asked to end serves for a moment more: this may have been that one.
            server.wait_for_line("listening on");
            draining.push(std::mem::replace(&mut both.server, server));
        }
        over.store(true, Ordering::SeqCst);
    });
    for asked in draining.iter_mut().skip(1).step_by(2) {
        assert!(asked.wait_for_end().success());
    }
    both.assert_recovered(echo);
}

/// The next server waits for the ports when the first one is asked to end.
fn a_server_hands_over_to_the_next_one_without_losing_a_visitor(protection: Protection) {
    const HAND_OVERS: usize = 20;
    // A machine that is paused for some seconds is no reason to close a visitor.
    const PATIENT: &[&str] = &["--pair-timeout", "20"];
    let host = match protection {
        Protection::Plain => "127.0.78.3",
        Protection::Sealed => "127.0.78.4",
    };
    let service = Service::echo_or_bulk();
    let launch = Launch::new(protection).on(ports_of(host));
    let server = launch.server(PATIENT);
    let addresses = server.addresses();
    let client = launch.client(addresses, service.addr, &[]);
    let mut both = Both::at_rest(server, client, addresses);
    let patient = both.visit();
    echo(&patient);
    let (over, visits) = (AtomicBool::new(false), AtomicUsize::new(0));
    let began = Instant::now();
    thread::scope(|scope| {
        for _ in 0..16 {
            scope.spawn(|| {
                while !over.load(Ordering::SeqCst) && began.elapsed() < 6 * DEADLINE {
                    let visit = visit(addresses[0]);
                    assert!(visit.is_ok(), "{visit:?} after {:?}", began.elapsed());
                    visits.fetch_add(1, Ordering::SeqCst);
                }
            });
        }
        for hand_over in 0..HAND_OVERS {
            let served = visits.load(Ordering::SeqCst);
            eventually("visitors are served", || {
                visits.load(Ordering::SeqCst) > served + 32
            });
            let next = launch.server(PATIENT);
            next.wait_for_line("is in use, waiting for it");
            both.server.signal(Signal::TERM);
            next.wait_for_line(" came: session");
            let mut before = std::mem::replace(&mut both.server, next);
            if hand_over == 0 {
                // The server before still has a visitor.
                assert!(before.ended().is_none());
                echo(&patient);
                patient.shutdown(Shutdown::Both).unwrap();
            }
            assert!(before.wait_for_end().success());
        }
        over.store(true, Ordering::SeqCst);
    });
    both.assert_recovered(echo);
}

/// A visitor without a client keeps the old server longer than the new one has waited for its ports
/// until then.
fn a_server_that_takes_over_late_waits_for_those_before_it(protection: Protection) {
    // A server waits for its ports for a second more.
    const TIMEOUT: &[&str] = &["--pair-timeout", "5"];
    let host = match protection {
        Protection::Plain => "127.0.78.5",
        Protection::Sealed => "127.0.78.6",
    };
    let service = Service::echo();
    let launch = Launch::new(protection).on(ports_of(host));
    let mut before = launch.server(TIMEOUT);
    let addresses = before.addresses();
    let next = launch.server(TIMEOUT);
    next.wait_for_line("is in use, waiting for it");
    thread::sleep(Duration::from_secs(2));
    let waiting = connect(addresses[0]);
    before.signal(Signal::TERM);
    assert_ended(&waiting);
    assert!(before.wait_for_end().success());
    let client = launch.client(addresses, service.addr, &[]);
    let both = Both::at_rest(next, client, addresses);
    echo(&both.visit());
}

/// Someone else has the local name that the next server would look for.
#[test]
fn a_server_says_that_it_cannot_hand_over() {
    let mut server = Launch::new(Protection::Plain).server(&[]);
    let [_, _, control] = server.addresses();
    // In its first moment a program ends without a word.
    eventually("it obeys", || {
        server.signal(Signal::USR1);
        !server.lines_with("status: uptime=").is_empty()
    });
    let name = LocalAddr::from_abstract_name(format!("tunnel-proxy {control}")).unwrap();
    let _taken = UnixListener::bind_addr(&name).unwrap();
    server.signal(Signal::TERM);
    server.wait_for_line("WARN  tpserver] could not offer the ports to a next server");
    assert!(server.wait_for_end().success());
}

/// Every third connection to the tunnel port ends at once, and no tunnel is idle.
fn a_tunnel_that_is_lost_costs_no_visitor(protection: Protection) {
    let service = Service::echo();
    let server = RunningServer::start(server_options(protection));
    let (tunnel, dialled) = (server.tunnel, AtomicUsize::new(0));
    let lossy = Service::start(move |near| {
        if dialled.fetch_add(1, Ordering::SeqCst) % 3 == 0 {
            return;
        }
        let far = connect(tunnel);
        thread::scope(|scope| {
            scope.spawn(|| carry(&near, &far));
            carry(&far, &near);
        });
    });
    let _client = RunningClient::start(with!(client_options(&server, service.addr);
            tunnel_port: Some(lossy.addr.port()),
            pool: 0,
    ));
    let visitors: Vec<_> = (0..12).map(|_| server.visit()).collect();
    visitors.iter().for_each(echo);
}

fn carry(mut from: &TcpStream, mut to: &TcpStream) {
    let _ = std::io::copy(&mut from, &mut to);
    let _ = to.shutdown(Shutdown::Write);
}

/// Whether a visit was what it should be, at this moment of a server's life.
fn was_served(public: SocketAddr) -> bool {
    visit(public).is_ok()
}

fn visit(public: SocketAddr) -> std::io::Result<()> {
    let mut visitor = TcpStream::connect(public)?;
    visitor.set_read_timeout(Some(DEADLINE))?;
    visitor.write_all(b"hello")?;
    let mut back = [0; 5];
    visitor.read_exact(&mut back)?;
    assert_eq!(&back, b"hello");
    Ok(())
}
