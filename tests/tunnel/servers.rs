//! One client of several servers: it has a session with each, and none takes anything from another.
#![cfg(target_os = "linux")]

use std::net::SocketAddr;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::support::programs::{Launch, Program, ports_of};
use crate::support::{
    DEADLINE, Protection, Service, assert_echo, closed_port, connect, eventually, plain_and_sealed,
};

plain_and_sealed! {
    a_client_serves_the_visitors_of_all_its_servers,
    servers_that_are_away_take_nothing_from_the_others,
    a_server_with_another_key_takes_nothing_from_the_others,
    a_server_that_is_killed_is_found_again_and_the_other_serves_on,
    a_client_that_stops_says_bye_to_all_its_servers,
    two_servers_and_their_client_are_small,
}

/// A client of these servers, by their control ports.
fn client(protection: Protection, controls: &[SocketAddr], local: SocketAddr) -> Program {
    let mut words = vec!["-l".to_owned(), local.to_string()];
    for control in controls {
        words.extend(["-s".to_owned(), control.to_string()]);
    }
    let words: Vec<_> = words.iter().map(String::as_str).collect();
    let client = Launch::new(protection).bare_client(&words);
    client.wait_for_line("connecting to");
    client
}

/// Two servers: the programs, and their ports for visitors and for clients.
fn two_servers(protection: Protection) -> ([Program; 2], [SocketAddr; 2], [SocketAddr; 2]) {
    let servers = [(); 2].map(|()| Program::server(protection, &[]));
    let publics = servers.each_ref().map(|(_, [public, ..])| *public);
    let controls = servers.each_ref().map(|(_, [.., control])| *control);
    (servers.map(|(server, _)| server), publics, controls)
}

fn a_client_serves_the_visitors_of_all_its_servers(protection: Protection) {
    let service = Service::echo();
    let (_servers, publics, controls) = two_servers(protection);
    let client = client(protection, &controls, service.addr);
    client.wait_for_lines("connected to", 2);
    let visitors: Vec<_> = (0..20).map(|number| connect(publics[number % 2])).collect();
    for (number, visitor) in visitors.iter().enumerate() {
        assert_echo(visitor, &format!("visitor {number}"));
    }
    client.signal(Signal::USR1);
    let status = client.wait_for_line("uptime=");
    assert!(status.contains(" joined=20 "), "{status}");
    let (_, sessions) = status.split_once(" session=").unwrap();
    let sessions = sessions.split(' ').next().unwrap();
    assert_eq!(sessions.split(',').count(), 2, "{status}");
}

fn servers_that_are_away_take_nothing_from_the_others(protection: Protection) {
    let service = Service::echo();
    let (_servers, publics, controls) = two_servers(protection);
    // One that refuses, and one that answers nothing at all.
    let refuses = closed_port();
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let all = [
        refuses.addr,
        controls[0],
        silent.local_addr().unwrap(),
        controls[1],
    ];
    let start = Instant::now();
    let client = client(protection, &all, service.addr);
    for public in publics {
        assert_echo(&connect(public), "hello");
    }
    // Nobody has waited for a dial of another server, which has 5 s.
    assert!(start.elapsed() < Duration::from_millis(4500));
    client.wait_for_lines(&format!("{}: Connection refused", refuses.addr), 3);
    assert_eq!(client.lines_with("lost the server"), [""; 0]);
}

fn a_server_with_another_key_takes_nothing_from_the_others(protection: Protection) {
    let service = Service::echo();
    let other = match protection {
        Protection::Plain => Protection::Sealed,
        Protection::Sealed => Protection::Plain,
    };
    let (_own, [public, _, control]) = Program::server(protection, &[]);
    let (_other, [_, _, wrong]) = Program::server(other, &[]);
    let client = client(protection, &[wrong, control], service.addr);
    assert_echo(&connect(public), "hello");
    client.wait_for_lines(&format!("no session with the server at {wrong}"), 3);
    assert_eq!(client.lines_with("lost the server"), [""; 0]);
}

fn a_server_that_is_killed_is_found_again_and_the_other_serves_on(protection: Protection) {
    let service = Service::echo();
    let host = match protection {
        Protection::Plain => "127.0.86.1",
        Protection::Sealed => "127.0.86.2",
    };
    let (stays, [public, _, control]) = Program::server(protection, &[]);
    let launch = Launch::new(protection).on(ports_of(host));
    let mut killed = launch.server(&["--pair-timeout", "20"]);
    let ports = killed.addresses();
    let client = client(protection, &[control, ports[2]], service.addr);
    client.wait_for_lines("connected to", 2);
    let patient = connect(public);
    assert_echo(&patient, "before");
    killed.kill();
    client.wait_for_line(&format!("lost the server at {}", ports[2]));
    for number in 0..10 {
        assert_echo(&connect(public), &format!("meanwhile {number}"));
    }
    let _again = launch.server(&["--pair-timeout", "20"]);
    eventually("it is found again", || {
        std::panic::catch_unwind(|| connect(ports[0])).is_ok()
    });
    assert_echo(&connect(ports[0]), "again");
    assert_echo(&patient, "after");
    assert_eq!(stays.lines_with(" left: "), [""; 0]);
}

fn a_client_that_stops_says_bye_to_all_its_servers(protection: Protection) {
    let service = Service::echo();
    let (servers, publics, controls) = two_servers(protection);
    let mut client = client(protection, &controls, service.addr);
    client.wait_for_lines("connected to", 2);
    let patient = publics.map(connect);
    for visitor in &patient {
        assert_echo(visitor, "before");
    }
    client.signal(Signal::TERM);
    for server in &servers {
        server.wait_for_line("it said bye, draining");
    }
    for visitor in &patient {
        assert_echo(visitor, "after");
    }
    drop(patient);
    let start = Instant::now();
    assert!(client.wait_for_end().success());
    assert!(start.elapsed() < DEADLINE / 2);
}

fn two_servers_and_their_client_are_small(protection: Protection) {
    let service = Service::echo();
    let (servers, publics, controls) = two_servers(protection);
    let client = client(protection, &controls, service.addr);
    for public in publics {
        assert_echo(&connect(public), "hello");
    }
    // The threads that the visits no longer need end after 5 s.
    thread::sleep(Duration::from_secs(6));
    // Only a release build's code is small: `cargo test --release` looks at all memory.
    let field = if cfg!(debug_assertions) {
        "Pss_Anon"
    } else {
        "Pss"
    };
    let programs = [&client, &servers[0], &servers[1]];
    let kib: usize = programs.map(|it| it.memory(field)).iter().sum();
    assert!(kib < 5 * 1024, "{field}: {kib} KiB");
}
