//! Bytes arrive: all of them, unchanged, in order, whoever speaks first.

use std::io::{Read, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use crate::support::{
    Protection, Service, Tunnel, assert_echo, assert_ended, expect_pattern, plain_and_sealed,
    send_pattern, unnamed, with,
};
use std::net::Shutdown;

plain_and_sealed! {
    one_byte_each_way,
    sixty_four_kib_each_way,
    sixty_four_mib_each_way,
    two_hundred_connections_at_once,
    the_service_speaks_first_with_a_pool,
    the_service_speaks_first_without_a_pool,
    ipv6_and_names_work,
}

/// Sends `size` bytes each way at once through one connection.
fn both_ways(protection: Protection, size: usize) {
    const UP: u64 = 1;
    const DOWN: u64 = 2;
    let service = Service::start(move |socket| {
        thread::scope(|scope| {
            scope.spawn(|| {
                send_pattern(&socket, DOWN, size);
                socket.shutdown(Shutdown::Write).unwrap();
            });
            expect_pattern(&socket, UP, size);
            assert_ended(&socket);
        });
    });
    let tunnel = Tunnel::start(protection, service.addr, 8);
    let visitor = tunnel.visit();
    thread::scope(|scope| {
        scope.spawn(|| {
            send_pattern(&visitor, UP, size);
            visitor.shutdown(Shutdown::Write).unwrap();
        });
        expect_pattern(&visitor, DOWN, size);
        // This end comes only if the service has found every byte of the other direction.
        assert_ended(&visitor);
    });
}

fn one_byte_each_way(protection: Protection) {
    both_ways(protection, 1);
}

fn sixty_four_kib_each_way(protection: Protection) {
    both_ways(protection, 64 * 1024);
}

fn sixty_four_mib_each_way(protection: Protection) {
    both_ways(protection, 64 * 1024 * 1024);
}

fn two_hundred_connections_at_once(protection: Protection) {
    const VISITORS: u64 = 200;
    const SIZE: usize = 100_000;
    let service = Service::echo();
    let tunnel = Tunnel::start(protection, service.addr, 8);
    let visitors: Vec<_> = (0..VISITORS)
        .map(|number| {
            let visitor = tunnel.visit();
            assert_echo(&visitor, &format!("visitor {number} is here"));
            visitor
        })
        .collect();
    thread::scope(|scope| {
        for (seed, visitor) in (100..).zip(&visitors) {
            scope.spawn(move || send_pattern(visitor, seed, SIZE));
            scope.spawn(move || expect_pattern(visitor, seed, SIZE));
        }
    });
}

/// The service greets before the visitor has sent anything, and not before there is a visitor.
fn server_first(protection: Protection, pool: usize) {
    const GREETING: &str = "SSH-2.0-service\r\n";
    let greeted = Arc::new(AtomicUsize::new(0));
    let count = greeted.clone();
    let service = Service::start(move |mut socket| {
        count.fetch_add(1, Ordering::SeqCst);
        socket.write_all(GREETING.as_bytes()).unwrap();
        let mut answer = [0; 6];
        socket.read_exact(&mut answer).unwrap();
        socket.write_all(&answer).unwrap();
    });
    let tunnel = Tunnel::start(protection, service.addr, pool);
    for visits in 1..=20 {
        let mut visitor = tunnel.visit();
        let mut greeting = [0; GREETING.len()];
        visitor.read_exact(&mut greeting).unwrap();
        assert_eq!(greeting, GREETING.as_bytes());
        assert_echo(&visitor, "answer");
        assert_ended(&visitor);
        assert_eq!(greeted.load(Ordering::SeqCst), visits);
    }
}

fn the_service_speaks_first_with_a_pool(protection: Protection) {
    server_first(protection, 8);
}

fn the_service_speaks_first_without_a_pool(protection: Protection) {
    server_first(protection, 0);
}

fn ipv6_and_names_work(protection: Protection) {
    use crate::support::{RunningClient, RunningServer, client_options, server_options};
    use tunnel_proxy::Address;

    let service = Service::echo();
    let server = RunningServer::start(with!(server_options(protection);
            public: unnamed(Address::new("::", 0)),
            tunnel: Address::new("::1", 0),
            control: Address::new("::1", 0),
    ));
    let _client = RunningClient::start(with!(client_options(&server, service.addr);
            // The client tries both addresses of the name: the service has only one of them.
            local: unnamed(Address::new("localhost", service.addr.port())),
    ));
    let port = server.public.port();
    for host in ["[::1]", "127.0.0.1"] {
        let address = format!("{host}:{port}").parse().unwrap();
        assert_echo(&crate::support::connect(address), host);
    }
}
