//! Several services through one client: each visitor reaches the one whose port it came to.
#![cfg(target_os = "linux")]

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::support::peer::{HandMadeServer, Peer, session_in};
use crate::support::programs::{Launch, Program};
use crate::support::{
    DEADLINE, Protection, RunningClient, RunningServer, Service, any, assert_echo, assert_ended,
    assert_reset, client_options, closed_port, connect, eventually, plain_and_sealed,
    raise_descriptors, server_options, take_turn, with,
};
use tunnel_proxy::Address;

plain_and_sealed! {
    each_service_has_its_port_and_its_target,
    two_thousand_visitors_of_64_services_are_not_crossed,
    a_service_that_nobody_offers_is_named_in_both_logs_and_its_visitors_wait,
    logs_and_status_name_services,
    a_client_that_offers_too_many_services_or_talks_for_ever_is_refused,
    a_visitor_of_an_unknown_service_is_reset,
    a_stop_waits_for_the_visitors_of_all_services,
}

/// A service that says its name to each visitor, and then sends everything back.
fn named(name: &str) -> Service {
    let name = name.to_owned();
    Service::start(move |mut socket| {
        let mut buffer = [0; 64];
        if socket.write_all(name.as_bytes()).is_err() {
            return;
        }
        while let Ok(count @ 1..) = socket.read(&mut buffer) {
            if socket.write_all(&buffer[..count]).is_err() {
                return;
            }
        }
    })
}

fn assert_name(mut visitor: &TcpStream, name: &str) {
    let mut said = vec![0; name.len()];
    visitor.read_exact(&mut said).unwrap();
    assert_eq!(String::from_utf8(said).unwrap(), name);
}

type Services<A> = BTreeMap<tunnel_proxy::Service, A>;

/// A name, or none for an empty one.
fn service(name: &str) -> tunnel_proxy::Service {
    name.parse().unwrap_or_default()
}

/// A server with a free port for each of these services.
fn server(protection: Protection, names: &[&str]) -> (RunningServer, Services<SocketAddr>) {
    let public = names.iter().map(|name| (service(name), any())).collect();
    let options = with!(server_options(protection);
            public,
    );
    let server = RunningServer::start(options);
    let public = server.public_addrs.clone();
    (server, public)
}

fn each_service_has_its_port_and_its_target(protection: Protection) {
    let names = ["", "web", "ssh-2"];
    let (server, public) = server(protection, &names);
    let services = names.map(named);
    let local = names.iter().zip(&services);
    let local = local.map(|(name, it)| (service(name), Address::from(it.addr)));
    let options = with!(client_options(&server, services[0].addr);
            local: local.collect(),
    );
    let _client = RunningClient::start(options);
    // More than the pool has, so that tunnels that were idle and new ones serve each of them.
    for number in 0..20 {
        for name in names {
            let visitor = connect(public[&service(name)]);
            assert_name(&visitor, name);
            assert_echo(&visitor, &format!("{number} for {name}"));
        }
    }
}

fn two_thousand_visitors_of_64_services_are_not_crossed(protection: Protection) {
    const SERVICES: usize = 64;
    const VISITORS: usize = 2000;
    raise_descriptors();
    let turn = take_turn();
    let names: Vec<_> = (0..SERVICES)
        .map(|number| format!("service-{number:02}"))
        .collect();
    let services: Vec<_> = names.iter().map(|name| named(name)).collect();
    let public: Vec<_> = names.iter().map(|name| format!("-p{name}=0")).collect();
    let public: Vec<_> = public.iter().map(String::as_str).collect();
    let launch = Launch::new(protection);
    let server = launch.bare_server(&[&public[..], &["-t", "0", "-c", "0"]].concat());
    let control = server.address("the control link").to_string();
    let local = names.iter().zip(&services);
    let local: Vec<_> = local
        .map(|(name, it)| format!("-l{name}={}", it.addr))
        .collect();
    let local: Vec<_> = local.iter().map(String::as_str).collect();
    let client = launch.bare_client(&[&["-s", &control], &local[..]].concat());
    client.wait_for_line("connected to");
    let ports: Vec<_> = names
        .iter()
        .map(|name| server.address(&format!("visitors of {name}")))
        .collect();
    thread::scope(|scope| {
        // A thread for each service would come to one port only at a time.
        for first in 0..20 {
            let (names, ports) = (&names, &ports);
            scope.spawn(move || {
                let numbers = || (first..VISITORS).step_by(20);
                let visitors: Vec<_> = numbers().map(|it| connect(ports[it % SERVICES])).collect();
                for (visitor, number) in visitors.iter().zip(numbers()) {
                    assert_name(visitor, &names[number % SERVICES]);
                }
                for (visitor, number) in visitors.iter().zip(numbers()) {
                    assert_echo(visitor, &format!("visitor {number}"));
                }
            });
        }
    });
    drop(turn);
}

fn a_service_that_nobody_offers_is_named_in_both_logs_and_its_visitors_wait(
    protection: Protection,
) {
    let launch = Launch::new(protection);
    let server = launch.bare_server(&["-pweb=0", "-pssh=0", "-t0", "-c0", "-w5"]);
    let control = server.address("the control link").to_string();
    let ssh = server.address("visitors of ssh");
    let web = named("web");
    let web_addr = format!("-lweb={}", web.addr);
    let client = launch.bare_client(&["-s", &control, &web_addr, "-lmail=127.0.0.1:25"]);
    server.wait_for_line("no client serves visitors of ssh (--local ssh=HOST:PORT of tpclient)");
    client.wait_for_line("visitors of ssh, which this client does not serve (--local ssh=");
    client.wait_for_line("no port for visitors of mail (--public mail=PORT of tpserver)");
    assert_ended(&connect(ssh));
    server.wait_for_line(" of ssh after 5s: no client offers it (--local ssh=HOST:PORT");
    // One that comes in time serves those who wait.
    let visitor = connect(ssh);
    drop(client);
    let late = named("late");
    let _client = launch.bare_client(&["-s", &control, &format!("-lssh={}", late.addr)]);
    assert_name(&visitor, "late");
    server.signal(Signal::USR1);
    let status = server.wait_for_line("joined=1 ");
    assert!(status.contains(" timed_out=1"), "{status}");
}

fn logs_and_status_name_services(protection: Protection) {
    let launch = Launch::new(protection);
    let server = launch.bare_server(&["-p", "0", "-pweb=0", "-t0", "-c0"]);
    let control = server.address("the control link").to_string();
    let [plain, web] = [named(""), named("web")];
    let web_addr = format!("-lweb={}", web.addr);
    let client = launch.bare_client(&["-s", &control, "-l", &plain.addr.to_string(), &web_addr]);
    let ports = ["visitors", "visitors of web"].map(|whom| server.address(whom));
    client.wait_for_line(&format!("{} → {}", ports[0], plain.addr));
    client.wait_for_line(&format!("{} → {} (web)", ports[1], web.addr));
    let visitors = ports.map(connect);
    for (visitor, name) in visitors.iter().zip(["", "web"]) {
        assert_name(visitor, name);
        assert_echo(visitor, "hello");
    }
    for program in [&server, &client] {
        let parts = [
            " joined=2 ",
            " bytes_down=13 ",
            " web.joined=1 web.joined_total=1 web.waiting=0 web.bytes_up=5 web.bytes_down=8",
        ];
        // A byte is counted when it has been passed on, and a visitor may have it a moment before.
        eventually("all is counted", || {
            program.signal(Signal::USR1);
            let lines = program.lines_with("uptime=");
            let last = lines.last().map_or("", String::as_str);
            parts.iter().all(|part| last.contains(part))
        });
    }
    let from = visitors.each_ref().map(|it| it.local_addr().unwrap());
    drop(visitors);
    for program in [&server, &client] {
        program.wait_for_line(&format!("visitor {}: 5 bytes up", from[0]));
        program.wait_for_line(&format!("visitor {} of web: 5 bytes up", from[1]));
    }
}

fn a_client_that_offers_too_many_services_or_talks_for_ever_is_refused(protection: Protection) {
    let server = RunningServer::start(server_options(protection));
    let mut client = Peer::dial_control(&server);
    client.write("hello proto=2 pool=8 offers=65\n");
    assert_eq!(client.read_until_closed(), b"");
    // Fewer lines than it has told end with the time for its hello.
    let mut client = Peer::dial_control(&server);
    client.write("hello proto=2 pool=8 offers=2\noffer service=web\n");
    assert_eq!(client.read_until_closed(), b"");
    // One that talks of other things for ever would not even end then.
    let (mut client, start) = (Peer::dial_control(&server), Instant::now());
    client.write("hello proto=2 pool=8 offers=1\n");
    for _ in 0..65 {
        client.write("later versions may say this\n");
    }
    assert_eq!(client.read_until_closed(), b"");
    let took = start.elapsed();
    assert!(
        took < Duration::from_secs(4),
        "as long as any hello: {took:?}"
    );
}

fn a_visitor_of_an_unknown_service_is_reset(protection: Protection) {
    let (server, public) = server(protection, &["web"]);
    // A client that offers everything, and serves what it pleases.
    let mut client = Peer::dial_control(&server);
    client.write("hello proto=2 pool=0 offers=2\noffer\noffer service=web\n");
    let hello = client.line();
    assert!(hello.contains(" offers=1"), "{hello}");
    let session = session_in(&hello);
    let port = public[&service("web")].port();
    assert_eq!(client.line(), format!("offer service=web port={port}\n"));
    let visitor = connect(public[&service("web")]);
    assert_eq!(client.line_after_hi(), "new\n");
    let mut tunnel = Peer::dial_tunnel(&server, &client);
    tunnel.write(format!("tunnel session={session}\n"));
    tunnel.assert_given(&visitor, " service=web");
    drop(tunnel);
    assert_reset(&visitor, DEADLINE);
    // And a server whose visitors want what the client has not.
    let closed = closed_port();
    let mut by_hand = HandMadeServer::start(protection, closed.addr, 1);
    by_hand
        .tunnel()
        .write("new visitor=192.0.2.1:5 service=web\n");
    let line = by_hand.control.line_after_hi();
    assert_eq!(line, "failed visitor=192.0.2.1:5 reason=no-service\n");
}

fn a_stop_waits_for_the_visitors_of_all_services(protection: Protection) {
    let names = ["a", "b"];
    let (mut server, public) = server(protection, &names);
    let services = names.map(named);
    let local = names.iter().zip(&services);
    let local = local.map(|(name, it)| (service(name), Address::from(it.addr)));
    let _client = RunningClient::start(with!(client_options(&server, services[0].addr);
            local: local.collect(),
    ));
    let visitors = names.map(|name| connect(public[&service(name)]));
    for (visitor, name) in visitors.iter().zip(names) {
        assert_name(visitor, name);
    }
    server.handle().stop(DEADLINE);
    thread::sleep(Duration::from_millis(500));
    for visitor in &visitors {
        assert_echo(visitor, "still here");
    }
    drop(visitors);
    server.wait_for_end();
}

/// Named services only: nothing listens where the original's service would be.
#[test]
fn the_port_without_a_name_is_there_only_if_it_is_asked_for() {
    let launch = Launch::new(Protection::Plain);
    let server: Program = launch.bare_server(&["-pweb=0", "-t0", "-c0"]);
    server.wait_for_line("for the control link");
    assert_eq!(server.lines_with("listening on").len(), 3);
}
