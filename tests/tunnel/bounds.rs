//! What the programs hold on to: bounded while connections live, nothing after they have ended.
//! The two programs run as processes of their own, so that `/proc` tells about them alone.
#![cfg(target_os = "linux")]

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::support::programs::{Both, Program};
use crate::support::{
    Protection, Service, assert_echo, assert_ended, connect, echo, eventually, expect_pattern,
    open_from, plain_and_sealed, raise_descriptors, reset_on_close, send_pattern, take_turn,
};

plain_and_sealed! {
    connections_that_have_ended_leave_nothing (sealed as root),
    a_visitor_that_never_reads_does_not_fill_the_memory (sealed as root),
    bulk_that_pauses_holds_nothing (sealed as root),
    what_strangers_cause_is_logged_once_a_second,
    a_loud_stranger_hides_no_other_one,
    silent_strangers_take_neither_time_nor_memory (sealed as root),
    both_programs_have_less_than_four_mib_besides_their_code (sealed as root),
    visits_leave_the_client_its_ports,
}

/// A visitor costs no connection between the programs, whoever ends first: after fifty of them, the
/// tunnels of the pool are the same connections as before.
fn visits_leave_the_client_its_ports(protection: Protection) {
    const VISITS: usize = 50;
    const POOL: usize = 8;
    let service = Service::start(|mut socket| {
        let mut first = [0];
        socket.read_exact(&mut first).unwrap();
        socket.write_all(b"answer").unwrap();
        if &first == b"?" {
            assert_ended(&socket);
        }
    });
    let both = Both::start(protection, service.addr, [&[], &[]]);
    // On a busy host a thread that has said how a visit went may be held up before its tunnel is idle.
    let wait_until_idle = |visits: usize| {
        let at_rest = format!(" joined_total={visits} waiting=0 idle={POOL} ");
        eventually("all tunnels are idle", || {
            both.server.signal(Signal::USR1);
            !both.server.lines_with(&at_rest).is_empty()
        });
    };
    wait_until_idle(0);
    let mut before = BTreeSet::new();
    eventually("all tunnels are open", || {
        before = ports_of_tunnels(both.addresses[1]);
        before.len() == POOL
    });
    for number in 1..=VISITS {
        let mut visitor = both.visit();
        let visitor_first = number % 2 == 0;
        visitor
            .write_all(if visitor_first { b"?" } else { b"!" })
            .unwrap();
        visitor.read_exact(&mut [0; 6]).unwrap();
        if !visitor_first {
            assert_ended(&visitor);
        }
        drop(visitor);
        wait_until_idle(number);
    }
    eventually("the same tunnels are open", || {
        ports_of_tunnels(both.addresses[1]) == before
    });
}

/// The client's ports of the connections that are open at a server's port for tunnels. While other
/// connections come and go, the kernel may list one twice, or leave one out.
fn ports_of_tunnels(tunnel: SocketAddr) -> BTreeSet<String> {
    let (here, established) = (format!("0100007F:{:04X}", tunnel.port()), "01");
    let table = std::fs::read_to_string("/proc/net/tcp").unwrap();
    let lines = table.lines().map(|line| line.split_whitespace().collect());
    let open = lines.filter(|line: &Vec<_>| line[1] == here && line[3] == established);
    open.map(|line| line[2].to_owned()).collect()
}

fn connections_that_have_ended_leave_nothing(protection: Protection) {
    let service = Service::echo();
    let both = Both::start(protection, service.addr, [&[], &[]]);
    let before = both.server.descriptors();
    let visitors: Vec<_> = (0..100).map(|_| both.visit()).collect();
    for (number, visitor) in visitors.iter().enumerate() {
        assert_echo(visitor, &format!("visitor {number}"));
        // Every way to end is used.
        match number % 3 {
            0 => visitor.shutdown(std::net::Shutdown::Write).unwrap(),
            1 => reset_on_close(visitor),
            _ => {}
        }
    }
    let during = both.server.descriptors();
    assert!(during >= before + 100, "{during} after {before}");
    drop(visitors);
    both.assert_recovered(echo);
}

/// Without a key, bulk goes through a pipe in each program, as long as it is bulk; with a key it has
/// two buffers of 448 KiB.
fn bulk_that_pauses_holds_nothing(protection: Protection) {
    const SIZE: usize = 32 * 1024 * 1024;
    // KiB of both programs; half of it is there before any bulk.
    const RESTED: usize = 3 * 1024;
    let service = Service::start(|mut socket| {
        for seed in 1..=2 {
            socket.read_exact(&mut [0]).unwrap();
            send_pattern(&socket, seed, SIZE);
        }
    });
    let (server, addresses) = Program::server(protection, &[]);
    let client = Program::client(protection, addresses, service.addr, &[]);
    let pipe_ends = || [&server, &client].map(Program::pipe_ends);
    let before = pipe_ends();
    let during = match protection {
        Protection::Plain => before.map(|ends| ends + 2),
        Protection::Sealed => before,
    };
    let mut visitor = connect(addresses[0]);
    for seed in 1..=2 {
        visitor.write_all(b"!").unwrap();
        thread::scope(|scope| {
            scope.spawn(|| expect_pattern(&visitor, seed, SIZE));
            eventually("bulk has what it needs", || pipe_ends() == during);
        });
        eventually("it is given back", || {
            let memory = server.memory("Pss_Anon") + client.memory("Pss_Anon");
            pipe_ends() == before && memory < RESTED
        });
    }
    assert_ended(&visitor);
}

/// The memory that both programs have besides their code is compared: before the visitor, and while
/// it does not read.
fn a_visitor_that_never_reads_does_not_fill_the_memory(protection: Protection) {
    const GIB: usize = 1024 * 1024 * 1024;
    const PIECE: usize = 64 * 1024;
    let sent = Arc::new(AtomicUsize::new(0));
    let progress = sent.clone();
    let service = Service::start(move |mut socket| {
        let mut word = [0; 4];
        socket.read_exact(&mut word).unwrap();
        if &word == b"ping" {
            return socket.write_all(b"pong").unwrap();
        }
        // This ends when the visitor has gone away, with most of it unread.
        let piece = vec![7; PIECE];
        while progress.load(Ordering::SeqCst) < GIB && socket.write_all(&piece).is_ok() {
            progress.fetch_add(PIECE, Ordering::SeqCst);
        }
    });
    let (server, addresses) = Program::server(protection, &[]);
    let client = Program::client(protection, addresses, service.addr, &[]);
    let ping = || {
        let mut other = connect(addresses[0]);
        other.write_all(b"ping").unwrap();
        let mut answer = [0; 4];
        other.read_exact(&mut answer).unwrap();
        assert_eq!(&answer, b"pong");
    };
    ping();
    let memory = || server.memory("Pss_Anon") + client.memory("Pss_Anon");
    let before = memory();
    let mut visitor = connect(addresses[0]);
    visitor.write_all(b"1GiB").unwrap();
    let (mut last, mut since) = (0, Instant::now());
    eventually("the service is held back", || {
        let now = sent.load(Ordering::SeqCst);
        if now != last {
            (last, since) = (now, Instant::now());
        }
        now > 0 && since.elapsed() > Duration::from_secs(1)
    });
    // The kernel's buffers of three connections hold less than that.
    assert!(last < GIB / 8, "{last} bytes were taken from the service");
    let grown = memory().saturating_sub(before);
    assert!(grown < 4 * 1024, "{grown} KiB more");
    let start = Instant::now();
    ping();
    assert!(start.elapsed() < Duration::from_secs(4), "others wait");
}

fn what_strangers_cause_is_logged_once_a_second(protection: Protection) {
    let (server, addresses) = Program::server(protection, &["--pair-timeout", "1"]);
    let start = Instant::now();
    for _ in 0..300 {
        for address in addresses {
            let mut stranger = connect(address);
            stranger.write_all(b"garbage\n").unwrap();
        }
    }
    server.wait_for_line("after 1s: no client is connected");
    server.wait_for_line("refused control link");
    server.wait_for_line("refused tunnel");
    // There are three kinds of lines, with one of each a second at the most, and three lines at the
    // start.
    let lines = server.lines_with("").len();
    let seconds = start.elapsed().as_secs() as usize + 1;
    assert!(lines <= 3 + 3 * seconds, "{lines} lines in {seconds} s");
    // The first line of a later second tells how many lines were left out.
    eventually("the count of those left out", || {
        let _ = connect(addresses[2]).write_all(b"garbage\n");
        !server.lines_with("more like this before").is_empty()
    });
}

/// The log must name each of many strangers: programs that ban addresses read it.
fn a_loud_stranger_hides_no_other_one(protection: Protection) {
    let (server, [_, tunnel, control]) = Program::server(protection, &[]);
    let probe = |host: u8, port| {
        let mut stranger = open_from([127, 0, 0, host], port);
        let _ = stranger.write_all(b"garbage\n");
        stranger
    };
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut loud = Vec::new();
            while !over.load(Ordering::SeqCst) && loud.len() < 2_000 {
                loud.extend([tunnel, control].map(|port| probe(5, port)));
                thread::sleep(Duration::from_secs(1) / 30);
            }
        });
        for (port, kind) in [(tunnel, "tunnel"), (control, "control link")] {
            server.wait_for_line(&format!("refused {kind} from 127.0.0.5:"));
            let _quiet = probe(66, port);
            eventually("the quiet one's line", || {
                let line = format!("refused {kind} from 127.0.0.66:");
                !server.lines_with(&line).is_empty()
            });
        }
        over.store(true, Ordering::SeqCst);
    });
}

fn both_programs_have_less_than_four_mib_besides_their_code(protection: Protection) {
    let service = Service::echo();
    let (server, addresses) = Program::server(protection, &[]);
    let client = Program::client(protection, addresses, service.addr, &[]);
    let visitor = connect(addresses[0]);
    assert_echo(&visitor, "up");
    send_pattern(&visitor, 1, 1);
    drop(visitor);
    let kib = server.memory("Pss_Anon") + client.memory("Pss_Anon");
    assert!(kib < 4 * 1024, "{kib} KiB");
}

fn silent_strangers_take_neither_time_nor_memory(protection: Protection) {
    raise_descriptors();
    let service = Service::echo();
    let (server, [public, tunnel, control]) = Program::server(protection, &[]);
    let _turn = take_turn();
    let before = server.memory("Pss_Anon");
    let crowd = |address| -> Vec<_> { (0..500).map(|_| connect(address)).collect() };
    let strangers = [crowd(control), crowd(tunnel)];
    let start = Instant::now();
    let _client = Program::client(protection, [public, tunnel, control], service.addr, &[]);
    assert_echo(&connect(public), "through the first crowd");
    let first = start.elapsed();
    // Only now is there a session that a tunnel could belong to.
    let more_strangers = crowd(tunnel);
    let start = Instant::now();
    assert_echo(&connect(public), "through the second");
    // A stranger that is waited for has 5 s.
    for served in [first, start.elapsed()] {
        assert!(served < Duration::from_millis(4500), "after {served:?}");
    }
    let grown = server.memory("Pss_Anon").saturating_sub(before);
    assert!(grown < 4 * 1024, "{grown} KiB more");
    drop((strangers, more_strangers));
}
