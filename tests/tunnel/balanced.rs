//! Two servers behind HAProxy, as `examples/balanced` has them, with one client of both.
//!
//! `TP_BALANCED_SECS` is how long visitors come in each test: 6 s without it.
#![cfg(target_os = "linux")]

use std::io::{Read, Write};
use std::net::SocketAddr;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::support::load::{assert_whole, assert_whole_after, sixteen_at_a_time};
use crate::support::programs::{Launch, Program, ports_of};
use crate::support::proxies::Proxy;
use crate::support::{
    Protection, Service, assert_echo, eventually, plain_and_sealed, share_turn, take_turn,
    try_connect,
};

plain_and_sealed! {
    #[ignore = "needs haproxy: cargo test -- --include-ignored"]
    a_server_that_restarts_costs_no_visit,
    #[ignore = "needs haproxy: cargo test -- --include-ignored"]
    a_server_that_is_killed_costs_only_visits_in_flight,
    #[ignore = "needs haproxy: cargo test -- --include-ignored"]
    a_client_that_restarts_lets_visits_wait,
}

/// HAProxy with the configuration of the example.
fn balancer(publics: [SocketAddr; 2], host: &str) -> Proxy {
    balancer_with(EXAMPLE, publics, host)
}

const EXAMPLE: &str = include_str!("../../examples/balanced/haproxy.cfg");

fn balancer_with(text: &str, publics: [SocketAddr; 2], host: &str) -> Proxy {
    Proxy::haproxy_with(host, |address| {
        let mut text = text.replace("bind :8080", &format!("bind {address}"));
        for (name, public) in ["one", "two"].into_iter().zip(publics) {
            text = text.replace(&format!("{name}.example:8007\n"), &format!("{public}\n"));
        }
        text
    })
}

struct Balanced {
    launches: [Launch<'static>; 2],
    servers: [Program; 2],
    controls: [SocketAddr; 2],
    client: Program,
    balancer: Proxy,
    service: Service,
}

impl Balanced {
    fn start(protection: Protection, number: usize) -> Self {
        let low = 3 * (2 * number + usize::from(protection == Protection::Sealed));
        let host = |place: usize| format!("127.0.87.{}", low + place + 1);
        let launches = [0, 1].map(|place| Launch::new(protection).on(ports_of(&host(place))));
        let servers = launches.map(server);
        let addresses = servers.each_ref().map(Program::addresses);
        let controls = addresses.map(|[.., control]| control);
        let balancer = balancer(addresses.map(|[public, ..]| public), &host(2));
        let service = Service::echo();
        let client = client(protection, controls, &service);
        client.wait_for_lines("connected to", 2);
        assert_echo(&try_connect(balancer.address).unwrap(), "through it");
        Self {
            launches,
            servers,
            controls,
            client,
            balancer,
            service,
        }
    }
}

fn server(launch: Launch) -> Program {
    launch.server(&["--accept-proxy", "127.0.0.1"])
}

fn client(protection: Protection, controls: [SocketAddr; 2], service: &Service) -> Program {
    let [one, two] = controls.map(|control| control.to_string());
    let local = service.addr.to_string();
    Launch::new(protection).bare_client(&["-s", &one, "-s", &two, "-l", &local])
}

/// How long visitors come.
fn time() -> Duration {
    let seconds = std::env::var("TP_BALANCED_SECS").ok();
    Duration::from_secs(seconds.map_or(6, |seconds| seconds.parse().unwrap()))
}

fn a_server_that_restarts_costs_no_visit(protection: Protection) {
    let _turn = share_turn();
    let mut all = Balanced::start(protection, 0);
    let (time, address) = (time(), all.balancer.address);
    let made = sixteen_at_a_time(address, time, || {
        thread::sleep(time / 3);
        let [one, _] = &mut all.servers;
        one.signal(Signal::TERM);
        assert!(one.wait_for_end().success());
        thread::sleep(time / 6);
        *one = server(all.launches[0]);
        all.client.wait_for_lines("connected to", 3);
    });
    assert_whole(&made);
    // The balancer looks at both twice a second, and none of that is a visit.
    for server in &all.servers {
        let nothing = server.lines_with(": 0 bytes up, 0 bytes down");
        assert!(nothing.len() <= 1, "{nothing:#?}");
    }
    let [one, two] = all
        .servers
        .each_ref()
        .map(|it| it.lines_with("bytes up").len());
    assert!(one > 0 && two > 0, "{one} and {two} visits");
}

fn a_server_that_is_killed_costs_only_visits_in_flight(protection: Protection) {
    let _turn = take_turn();
    let mut all = Balanced::start(protection, 1);
    let (time, address) = (time(), all.balancer.address);
    let mut killed = None;
    let made = sixteen_at_a_time(address, time, || {
        thread::sleep(time / 3);
        all.servers[0].kill();
        killed = Some(Instant::now());
    });
    let killed = killed.unwrap();
    assert_whole_after(&made, killed);
    // Until the balancer has noticed, visitors of the dead server are given to the other one.
    let rate = |from: Instant, to: Instant| {
        let within = made.iter().filter(|it| it.ended >= from && it.ended < to);
        within.count() as f64 / (to - from).as_secs_f64()
    };
    let before = rate(killed - time / 4, killed);
    // All that is left: a busy machine lets nobody have a turn for most of a second now and then.
    let after = rate(killed + time / 3, killed + time * 2 / 3);
    assert!(
        after > before / 3.0,
        "{before:.0}/s before, {after:.0}/s after"
    );
}

fn a_client_that_restarts_lets_visits_wait(protection: Protection) {
    let _turn = share_turn();
    let mut all = Balanced::start(protection, 2);
    let (time, address) = (time(), all.balancer.address);
    let mut killed = None;
    let made = sixteen_at_a_time(address, time, || {
        thread::sleep(time / 3);
        all.client.kill();
        killed = Some(Instant::now());
        thread::sleep(Duration::from_secs(1));
        all.client = client(protection, all.controls, &all.service);
    });
    assert_whole_after(&made, killed.unwrap());
}

/// As comments in the example say.
#[test]
#[ignore = "needs haproxy: cargo test -- --include-ignored"]
fn a_server_without_a_client_can_be_left_out() {
    let page = ports_of("127.0.81.1")[0];
    let servers = [1, 2].map(|number| {
        let host = format!("127.0.81.{number}");
        let status = SocketAddr::new(host.parse().unwrap(), page.port()).to_string();
        let launch = Launch::new(Protection::Plain).on(ports_of(&host));
        launch.server(&["--accept-proxy", "127.0.0.1", "--status", &status])
    });
    let service = Service::echo();
    let [public, _, control] = servers[0].addresses();
    let other = servers[1].address("visitors");
    let (server, local) = (control.to_string(), service.addr.to_string());
    let client = Launch::new(Protection::Plain).bare_client(&["-s", &server, "-l", &local]);
    client.wait_for_line("connected to");
    let (text, checked) = EXAMPLE.rsplit_once("    default-server").unwrap();
    let (_, checked) = checked.split_once('\n').unwrap();
    let text = text.replace("    #option", "    option");
    let text = text.replace("    #default-server", "    default-server");
    let text = text.replace("port 9090", &format!("port {}", page.port()));
    let balancer = balancer_with(&(text + checked), [public, other], "127.0.81.3");
    eventually("the balancer has noticed", || {
        let statuses = [(); 8].map(|()| {
            let visitor = try_connect(balancer.address)?;
            visitor.set_read_timeout(Some(Duration::from_secs(1)))?;
            (&visitor).write_all(b"?")?;
            (&visitor).read_exact(&mut [0])
        });
        statuses.iter().all(Result::is_ok)
    });
    for _ in 0..8 {
        assert_echo(
            &try_connect(balancer.address).unwrap(),
            "the one that has a client",
        );
    }
}
