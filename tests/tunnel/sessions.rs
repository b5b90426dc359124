//! Clients come, go, fall silent and come back; visitors wait for them, and strangers are not
//! taken for them.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use crate::support::peer::Peer;
use crate::support::programs::ports_of;
use crate::support::{
    DEADLINE, Protection, RunningClient, RunningServer, Service, Tunnel, assert_echo, assert_ended,
    client_options, closed_port, connect, plain_and_sealed, server_options, unnamed, with,
};
use tunnel_proxy::{Address, ClientOptions};

plain_and_sealed! {
    without_a_client_the_visitor_is_closed_at_the_pair_timeout,
    a_client_that_comes_in_time_serves_the_visitors_that_wait,
    a_client_dials_for_ever_even_if_the_first_dial_fails,
    a_silent_client_is_dropped_and_the_next_one_taken,
    a_silent_server_is_left_and_dialled_again,
    a_client_that_only_sends_heartbeats_lives,
    a_visitor_may_be_silent_for_longer_than_any_handshake,
    the_dials_of_a_client_come_further_and_further_apart,
    a_port_scanner_never_gets_a_visitor,
    a_second_client_is_refused_and_the_first_is_undisturbed,
    a_session_outlives_a_thousand_refused_ones,
    a_server_that_restarts_on_its_ports_serves_within_three_seconds,
    visitors_are_served_through_a_crowd_of_silent_strangers,
}

fn without_a_client_the_visitor_is_closed_at_the_pair_timeout(protection: Protection) {
    let server = RunningServer::start(server_options(protection));
    let start = Instant::now();
    let early = server.visit();
    let late = thread::scope(|scope| {
        let late = scope.spawn(|| {
            thread::sleep(Duration::from_millis(1700));
            let start = Instant::now();
            assert_ended(&server.visit());
            start.elapsed()
        });
        assert_ended(&early);
        assert_pair_timeout(start.elapsed());
        late.join().unwrap()
    });
    assert_pair_timeout(late);
}

fn assert_pair_timeout(waited: Duration) {
    let bounds = Duration::from_millis(4500)..Duration::from_millis(7500);
    assert!(bounds.contains(&waited), "{waited:?}");
}

fn a_client_that_comes_in_time_serves_the_visitors_that_wait(protection: Protection) {
    for pool in [0, 8] {
        let service = Service::echo();
        let server = RunningServer::start(server_options(protection));
        let visitors: Vec<_> = (0..20).map(|_| server.visit()).collect();
        thread::sleep(Duration::from_secs(1));
        let _client = RunningClient::start(with!(client_options(&server, service.addr);
                    pool,
        ));
        for visitor in &visitors {
            assert_echo(visitor, "after a second");
        }
    }
}

fn a_client_dials_for_ever_even_if_the_first_dial_fails(protection: Protection) {
    let service = Service::echo();
    let [control, ..] = ports_of(match protection {
        Protection::Plain => "127.0.77.3",
        Protection::Sealed => "127.0.77.4",
    });
    let later = RunningServer::start(with!(server_options(protection);
            control: control.into(),
    ));
    let options = client_options(&later, service.addr);
    drop(later);
    let _client = RunningClient::start(options);
    // Several dials of the client find nobody meanwhile.
    thread::sleep(Duration::from_millis(1200));
    let listener = TcpListener::bind(control).unwrap();
    let mut peer = Peer::accept_control(&listener, protection);
    assert_eq!(peer.line(), "hello proto=2 pool=8 linger=600000\n");
}

fn a_second_client_is_refused_and_the_first_is_undisturbed(protection: Protection) {
    let service = Service::echo();
    let tunnel = Tunnel::start(protection, service.addr, 8);
    let visitor = tunnel.visit();
    assert_echo(&visitor, "before");
    for number in 0..1000 {
        let mut second = Peer::dial_control(&tunnel.server);
        second.write("hello proto=2 pool=8\n");
        assert_eq!(second.line(), "bye reason=busy\n");
        assert_eq!(second.line(), "");
        if number % 100 == 0 {
            assert_echo(&visitor, "meanwhile");
            assert_echo(&tunnel.visit(), "a new one");
        }
    }
}

fn a_session_outlives_a_thousand_refused_ones(protection: Protection) {
    let server = RunningServer::start(server_options(protection));
    let mut first = Peer::dial_control(&server);
    let session = first.say_hello(0);
    for number in 0..1000 {
        let mut second = Peer::dial_control(&server);
        second.write("hello proto=2 pool=8\n");
        if number % 10 == 0 {
            // A thousand handshakes may take longer than a session lives in silence.
            first.write("hi\n");
        }
    }
    // The same session still gets its visitors.
    let visitor = server.visit();
    assert_eq!(first.line_after_hi(), "new\n");
    let mut tunnel = Peer::dial_tunnel(&server, &first);
    tunnel.write(format!("tunnel session={session}\n"));
    tunnel.assert_given(&visitor, "");
}

fn a_server_that_restarts_on_its_ports_serves_within_three_seconds(protection: Protection) {
    // An address that no other test uses, whose connections might take a port of the server's.
    let any = match protection {
        Protection::Plain => Address::new("127.0.77.1", 0),
        Protection::Sealed => Address::new("127.0.77.2", 0),
    };
    let service = Service::echo();
    let mut options = with!(server_options(protection);
            public: unnamed(any.clone()),
            tunnel: any.clone(),
            control: any,
            // A program that another test starts has this process's listeners for a moment. What the kernel
            // keeps of connections that have ended, it keeps for a minute.
            port_patience: Duration::from_secs(5),
    );
    let mut server = RunningServer::start(options.clone());
    options.public = unnamed(server.public);
    options.tunnel = server.tunnel.into();
    options.control = server.control.into();
    let _client = RunningClient::start(client_options(&server, service.addr));
    for _ in 0..3 {
        let visitor = server.visit();
        assert_echo(&visitor, "before");
        drop(server);
        server = RunningServer::start(options.clone());
        let start = Instant::now();
        assert_echo(&server.visit(), "after");
        assert!(
            start.elapsed() < Duration::from_secs(3),
            "{:?}",
            start.elapsed()
        );
    }
}

const SILENCE_NOTICED: std::ops::Range<Duration> =
    Duration::from_millis(5500)..Duration::from_millis(10_000);

fn a_silent_client_is_dropped_and_the_next_one_taken(protection: Protection) {
    let server = RunningServer::start(server_options(protection));
    let start = Instant::now();
    let mut silent = Peer::dial_control(&server);
    let session = silent.say_hello(8);
    let mut idle = Peer::dial_tunnel(&server, &silent);
    idle.write(format!("tunnel session={session}\n"));
    silent.assert_aborted(DEADLINE);
    assert!(
        SILENCE_NOTICED.contains(&start.elapsed()),
        "{:?}",
        start.elapsed()
    );
    assert_eq!(idle.line(), "", "its idle tunnels end with it");
    let service = Service::echo();
    let _client = RunningClient::start(client_options(&server, service.addr));
    assert_echo(&server.visit(), "served by the next");
}

fn a_client_that_only_sends_heartbeats_lives(protection: Protection) {
    let server = RunningServer::start(server_options(protection));
    let mut peer = Peer::dial_control(&server);
    peer.say_hello(0);
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(7) {
        assert_eq!(peer.line(), "hi\n");
        peer.write("hi\n");
    }
}

fn a_visitor_may_be_silent_for_longer_than_any_handshake(protection: Protection) {
    let service = Service::echo();
    for_each_pool(|pool| {
        let tunnel = Tunnel::start(protection, service.addr, pool);
        let visitor = tunnel.visit();
        assert_echo(&visitor, "before");
        thread::sleep(Duration::from_millis(6500));
        assert_echo(&visitor, "after");
    });
}

fn for_each_pool(test: impl Fn(usize) + Sync) {
    thread::scope(|scope| {
        for pool in [0, 8] {
            let test = &test;
            scope.spawn(move || test(pool));
        }
    });
}

fn a_silent_server_is_left_and_dialled_again(protection: Protection) {
    let refusing = closed_port();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let _client = RunningClient::start(with!(ClientOptions::default();
            servers: vec![listener.local_addr().unwrap().into()],
            tunnel_port: Some(refusing.addr.port()),
            key: protection.key(),
    ));
    let mut silent = Peer::accept_control(&listener, protection);
    assert_eq!(silent.line(), "hello proto=2 pool=8 linger=600000\n");
    let start = Instant::now();
    silent.write("hello proto=2 session=00112233445566778899aabbccddeeff pool=0\n");
    silent.assert_aborted(DEADLINE);
    assert!(
        SILENCE_NOTICED.contains(&start.elapsed()),
        "{:?}",
        start.elapsed()
    );
    let mut again = Peer::accept_control(&listener, protection);
    assert_eq!(again.line(), "hello proto=2 pool=8 linger=600000\n");
}

fn the_dials_of_a_client_come_further_and_further_apart(protection: Protection) {
    thread::scope(|scope| {
        // Refused, and taken by a server that ends at once.
        for answer in [
            "bye reason=busy\n",
            "hello proto=2 session=00112233445566778899aabbccddeeff pool=0\n",
        ] {
            scope.spawn(move || dials_come_further_apart(protection, answer));
        }
    });
}

fn dials_come_further_apart(protection: Protection, answer: &str) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let _client = RunningClient::start(with!(ClientOptions::default();
            servers: vec![listener.local_addr().unwrap().into()],
            key: protection.key(),
    ));
    let mut times = Vec::new();
    for _ in 0..6 {
        let mut peer = Peer::accept_control(&listener, protection);
        times.push(Instant::now());
        assert_eq!(peer.line(), "hello proto=2 pool=8 linger=600000\n");
        peer.write(answer);
    }
    // The pause is 0.2 s, doubled each time, and at least half of that: 3.1 to 6.2 s in all. Without that
    // it would be 1 s. A dial that is seen late makes the next pause look shorter, and not their sum.
    let bounds = Duration::from_secs(2)..Duration::from_secs(12);
    assert!(bounds.contains(&(times[5] - times[0])), "{times:?}");
}

/// What a port scanner sends to the tunnel port.
fn scan(server: &RunningServer) -> Vec<TcpStream> {
    let wrong = b"tunnel session=00112233445566778899aabbccddeeff\n";
    let long = [b'x'; 300];
    let messages: [&[u8]; 7] = [
        b"",
        b"GET / HTTP/1.0\r\n\r\n",
        b"\x16\x03\x01\x00\xff\x01\x00",
        b"tunnel\n",
        b"tunnel session=1\n",
        wrong,
        &long,
    ];
    let scanners = messages.map(|message| {
        let mut scanner = connect(server.tunnel);
        scanner.write_all(message).unwrap();
        scanner
    });
    scanners.into()
}

fn a_port_scanner_never_gets_a_visitor(protection: Protection) {
    for_each_pool(|pool| scan_a_tunnel(protection, pool));
}

fn scan_a_tunnel(protection: Protection, pool: usize) {
    let service = Service::echo();
    let tunnel = Tunnel::start(protection, service.addr, pool);
    assert_echo(&tunnel.visit(), "the client is there");
    let scanners = scan(&tunnel.server);
    let start = Instant::now();
    assert_echo(&tunnel.visit(), "served at once");
    let served = start.elapsed();
    // Long before the scanners are closed.
    assert!(served < Duration::from_secs(3), "{served:?}");
    for mut scanner in scanners {
        // The scanner is closed by an end, or by a reset where its bytes were left unread.
        let mut got = Vec::new();
        let _ = scanner.read_to_end(&mut got);
        // A scanner that looks like a client of the first version is told that it is one.
        assert!(got == b"" || got == b"bye reason=version\n", "{got:?}");
    }
    let closed = start.elapsed();
    assert!(closed < Duration::from_secs(7), "{closed:?}");
}

fn visitors_are_served_through_a_crowd_of_silent_strangers(protection: Protection) {
    let service = Service::echo();
    let server = RunningServer::start(server_options(protection));
    let strangers: Vec<_> = (0..150)
        .flat_map(|_| [connect(server.tunnel), connect(server.control)])
        .collect();
    let _client = RunningClient::start(client_options(&server, service.addr));
    for _ in 0..20 {
        assert_echo(&server.visit(), "through the crowd");
    }
    drop(strangers);
}

#[test]
fn a_client_whose_host_name_does_not_resolve_goes_on_and_can_be_stopped() {
    let mut client = RunningClient::start(with!(ClientOptions::default();
            servers: vec![Address::new("does-not-exist.invalid", 8009)],
    ));
    thread::sleep(Duration::from_millis(500));
    let start = Instant::now();
    client.handle().stop(Duration::from_secs(3600));
    client.wait_for_end();
    assert!(start.elapsed() < DEADLINE / 10);
}
