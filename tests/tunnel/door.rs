//! Who may come in: `--allow`, `--deny`, `--max-per-source`, and what the log says of visitors. Each
//! visitor comes from an address of its own.
#![cfg(target_os = "linux")]

use std::io::Write;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpStream};
use std::time::Instant;

use rustix::process::Signal;

use crate::support::programs::{Both, Launch, Program};
use crate::support::{
    DEADLINE, Protection, Service, assert_echo, assert_ended, assert_refused, assert_reset,
    connect_from, eventually, plain_and_sealed, try_connect_from,
};

plain_and_sealed! {
    who_is_denied_is_reset,
    with_an_allow_list_others_are_reset,
    a_rule_of_one_service_is_no_rule_of_another,
    addresses_of_both_families_have_rules,
    a_hundred_thousand_networks_are_read_from_a_file,
    a_source_has_so_many_visitors_at_a_time,
    who_waits_for_a_tunnel_counts_too,
    behind_a_proxy_its_header_decides,
    many_who_are_refused_fill_no_log_and_keep_nobody_out,
    an_arrival_is_news_if_that_is_asked_for,
}

/// Both programs, with these options of the server.
fn both(protection: Protection, options: &[&str]) -> (Service, Both) {
    let service = Service::echo();
    let both = Both::start(protection, service.addr, [options, &[]]);
    (service, both)
}

fn assert_served(source: &str, to: SocketAddr) -> TcpStream {
    let visitor = connect_from(source, to);
    assert_echo(&visitor, "hello");
    visitor
}

/// Asserts what the server says of its visitors in all.
fn assert_status(server: &Program, part: &str) {
    let before = server.lines_with("uptime=").len();
    server.signal(Signal::USR1);
    let status = server.wait_for_lines("uptime=", before + 1);
    assert!(status.contains(part), "{status}");
}

fn who_is_denied_is_reset(protection: Protection) {
    let (_service, both) = both(
        protection,
        &["--deny", "127.0.90.0/29", "--deny", "127.0.90.12"],
    );
    let public = both.addresses[0];
    for source in ["127.0.90.1", "127.0.90.7"] {
        assert_refused(source, public);
        let line = format!("WARN  tpserver] refused visitor from {source}: deny 127.0.90.0/29");
        both.server.wait_for_line(&line);
    }
    assert_refused("127.0.90.12", public);
    let line = "refused visitor from 127.0.90.12: deny 127.0.90.12";
    both.server.wait_for_line(line);
    for source in ["127.0.90.8", "127.0.90.11", "127.0.90.13"] {
        assert_served(source, public);
    }
    assert_status(&both.server, " joined_total=3 ");
    both.assert_recovered(|visitor| assert_echo(visitor, "hello"));
    assert_status(&both.server, " refused=3 ");
}

fn with_an_allow_list_others_are_reset(protection: Protection) {
    let options = ["--allow", "127.0.90.16/28", "--deny", "127.0.90.17"];
    let (_service, both) = both(protection, &options);
    let public = both.addresses[0];
    for (source, why) in [
        ("127.0.90.15", "not on the allow list"),
        ("127.0.90.32", "not on the allow list"),
        // Who is on both lists may not come.
        ("127.0.90.17", "deny 127.0.90.17"),
    ] {
        assert_refused(source, public);
        let line = format!("refused visitor from {source}: {why}");
        both.server.wait_for_line(&line);
    }
    assert_served("127.0.90.16", public);
    assert_served("127.0.90.31", public);
}

fn a_rule_of_one_service_is_no_rule_of_another(protection: Protection) {
    let service = Service::echo();
    let launch = Launch::new(protection);
    let ports = ["-pweb=0", "-pssh=0", "-t0", "-c0"];
    let rules = [
        "--deny=web=127.0.90.40",
        "--deny=127.0.90.41",
        "--allow=ssh=127.0.90.40",
        "--allow=ssh=127.0.90.41",
    ];
    let server = launch.bare_server(&[&ports[..], &rules].concat());
    let [web, ssh] = ["web", "ssh"].map(|name| server.address(&format!("visitors of {name}")));
    let control = server.address("the control link").to_string();
    let local = ["web", "ssh"].map(|name| format!("-l{name}={}", service.addr));
    let client = launch.bare_client(&["-s", &control, &local[0], &local[1]]);
    client.wait_for_line("connected to");
    assert_refused("127.0.90.40", web);
    assert_served("127.0.90.40", ssh);
    for public in [web, ssh] {
        assert_refused("127.0.90.41", public);
    }
    assert_served("127.0.90.42", web);
    assert_refused("127.0.90.42", ssh);
}

fn addresses_of_both_families_have_rules(protection: Protection) {
    let service = Service::echo();
    let launch = Launch::new(protection);
    for (rule, v6_may, v4_may) in [
        ("--deny=::1", false, true),
        ("--deny=::/0", false, true),
        // An IPv4 visitor is one of IPv4, also at a port that takes both.
        ("--deny=0.0.0.0/0", true, false),
        ("--deny=::ffff:127.0.90.44", true, false),
        ("--allow=::1", true, false),
        ("--allow=127.0.90.44", false, true),
    ] {
        let server = launch.bare_server(&["-p[::]:0", "-t0", "-c0", rule]);
        let port = server.address("visitors").port();
        let control = server.address("the control link").to_string();
        let local = service.addr.to_string();
        let client = launch.bare_client(&["-s", &control, "-l", &local]);
        client.wait_for_line("connected to");
        let v6 = SocketAddr::new(Ipv6Addr::LOCALHOST.into(), port);
        let v4 = SocketAddr::from(([127, 0, 0, 1], port));
        for (source, to, may) in [("::1", v6, v6_may), ("127.0.90.44", v4, v4_may)] {
            if may {
                assert_served(source, to);
            } else {
                assert_refused(source, to);
                server.wait_for_line(&format!("refused visitor from {source}: "));
            }
        }
    }
}

/// Every other network of 256 addresses, more than a command line has room for.
fn a_hundred_thousand_networks_are_read_from_a_file(protection: Protection) {
    let networks = (0..100_000_u32).map(|it| std::net::Ipv4Addr::from_bits((11 << 24) + (it << 9)));
    let mut lines: String = networks.map(|it| format!("deny {it}/24\n")).collect();
    lines += "deny 127.0.90.46\n";
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), lines).unwrap();
    let path = file.path().to_str().unwrap();
    let (_service, both) = both(protection, &["--config", path]);
    let public = both.addresses[0];
    assert_served("127.0.90.45", public);
    assert_refused("127.0.90.46", public);
    both.server
        .wait_for_line("refused visitor from 127.0.90.46: deny 127.0.90.46");
}

fn a_source_has_so_many_visitors_at_a_time(protection: Protection) {
    let (_service, both) = both(protection, &["--max-per-source", "2"]);
    let public = both.addresses[0];
    let [one, _two] = [(); 2].map(|()| assert_served("127.0.90.50", public));
    assert_refused("127.0.90.50", public);
    let line = "refused visitor from 127.0.90.50: more than 2 at a time";
    both.server.wait_for_line(line);
    let _others = [(); 2].map(|()| assert_served("127.0.90.51", public));
    drop(one);
    both.server.wait_for_line("bytes up");
    // The place is given back in the moment after that.
    let mut three = None;
    eventually("a place is free again", || {
        let Ok(mut visitor) = try_connect_from("127.0.90.50", public) else {
            return false;
        };
        let served = visitor.write_all(b"hello").is_ok() && visitor.peek(&mut [0]).is_ok();
        three = Some(visitor).filter(|_| served);
        served
    });
    assert_refused("127.0.90.50", public);
    // A visit that fails gives its place back, too.
    drop(three);
}

fn who_waits_for_a_tunnel_counts_too(protection: Protection) {
    let (server, [public, ..]) = Program::server(protection, &["--max-per-source", "1", "-w", "2"]);
    let waiting = connect_from("127.0.90.54", public);
    assert_refused("127.0.90.54", public);
    // It gives its place back when it is closed.
    assert_ended(&waiting);
    server.wait_for_line("after 2s: no client is connected");
    let waiting = connect_from("127.0.90.54", public);
    assert_ended(&waiting);
    server.wait_for_lines("after 2s: no client is connected", 2);
}

fn behind_a_proxy_its_header_decides(protection: Protection) {
    let options = [
        "--accept-proxy=127.0.90.56",
        "--deny=192.0.2.0/24",
        "--max-per-source=1",
    ];
    let (_service, both) = both(protection, &options);
    let visit = |from: &str| {
        let mut visitor = connect_from("127.0.90.56", both.addresses[0]);
        let header = format!("PROXY TCP4 {from} 203.0.113.9 5 443\r\n");
        visitor.write_all(header.as_bytes()).unwrap();
        visitor
    };
    assert_reset(&visit("192.0.2.7"), DEADLINE);
    both.server
        .wait_for_line("refused visitor from 192.0.2.7: deny 192.0.2.0/24");
    let _one = visit("198.51.100.7");
    assert_echo(&_one, "hello");
    assert_reset(&visit("198.51.100.7"), DEADLINE);
    both.server
        .wait_for_line("refused visitor from 198.51.100.7: more than 1 at a time");
    assert_echo(&visit("198.51.100.8"), "hello");
}

fn many_who_are_refused_fill_no_log_and_keep_nobody_out(protection: Protection) {
    const MANY: usize = 1000;
    let (_service, both) = both(protection, &["--deny", "127.0.90.60"]);
    let public = both.addresses[0];
    let start = Instant::now();
    for number in 0..MANY {
        assert_refused("127.0.90.60", public);
        if number % 100 == 0 {
            assert_served("127.0.90.61", public);
        }
    }
    let seconds = start.elapsed().as_secs() as usize;
    both.assert_recovered(|visitor| assert_echo(visitor, "hello"));
    let lines = both.server.lines_with("refused visitor").len();
    assert!((1..=seconds + 2).contains(&lines), "{lines} lines");
    assert_status(&both.server, &format!(" refused={MANY} "));
}

fn an_arrival_is_news_if_that_is_asked_for(protection: Protection) {
    for (options, is_news) in [(&[][..], false), (&["--log-visits"], true)] {
        let (_service, both) = both(protection, options);
        let visitor = assert_served("127.0.90.70", both.addresses[0]);
        let from = visitor.local_addr().unwrap();
        drop(visitor);
        both.server
            .wait_for_line(&format!("INFO  tpserver] visitor {from}: 5 bytes up"));
        let came = format!("INFO  tpserver] visitor {from} came");
        assert_eq!(both.server.lines_with(&came).len(), usize::from(is_news));
    }
}

/// True if the line fits the pattern of the filter that README shows for fail2ban, which looks for it
/// anywhere in the line; and the address that it finds there.
fn found_by(pattern: &str, line: &str) -> Option<IpAddr> {
    let (before, behind) = pattern.split_once("<ADDR>: ").unwrap();
    let address = line.split_once(before)?.1;
    let (address, why) = address.split_once(": ")?;
    let reasons = behind.trim_matches(['(', ')']).split('|');
    let digits = |text: &str| text.find(|it: char| !it.is_ascii_digit());
    let fits = |reason: &str| match reason.split_once(r"\d+") {
        None => why.starts_with(reason),
        Some((start, end)) => why.strip_prefix(start).is_some_and(|number| {
            digits(number).is_some_and(|at| at > 0 && number[at..].starts_with(end))
        }),
    };
    reasons
        .into_iter()
        .any(fits)
        .then(|| address.parse().unwrap())
}

#[test]
fn the_filter_for_fail2ban_finds_who_was_refused() {
    let readme = include_str!("../../README.md");
    let pattern = readme
        .lines()
        .find_map(|it| it.trim().strip_prefix("failregex = "));
    let pattern = pattern.unwrap();
    let options = [
        "--allow=127.0.90.80/29",
        "--deny=127.0.90.80",
        "--max-per-source=1",
        "--accept-proxy=127.0.0.1",
    ];
    let (_service, both) = both(Protection::Sealed, &options);
    let visit = |from: &str| {
        let mut visitor = connect_from("127.0.0.1", both.addresses[0]);
        let header = format!("PROXY {from} 5 443\r\n");
        visitor.write_all(header.as_bytes()).unwrap();
        visitor
    };
    let _one = visit("TCP4 127.0.90.81 127.0.0.1");
    assert_echo(&_one, "hello");
    let refused = ["127.0.90.80", "2001:db8::1", "127.0.90.81"];
    for from in refused {
        let family = if from.contains('.') { 4 } else { 6 };
        let to = if from.contains('.') {
            "127.0.0.1"
        } else {
            "::1"
        };
        let visitor = visit(&format!("TCP{family} {from} {to}"));
        assert_reset(&visitor, DEADLINE);
        let line = both
            .server
            .wait_for_line(&format!("refused visitor from {from}:"));
        assert_eq!(found_by(pattern, &line), from.parse().ok(), "{line}");
    }
    // Not what befalls a proxy, or anybody who was served.
    assert_reset(&visit("TCP5 ::1 ::1"), DEADLINE);
    let line = both
        .server
        .wait_for_line("refused visitor through 127.0.0.1:");
    assert_eq!(found_by(pattern, &line), None, "{line}");
    for line in both.server.lines_with("") {
        let found = found_by(pattern, &line).map(|it| it.to_string());
        assert!(found.is_none_or(|it| refused.contains(&&*it)), "{line}");
    }
}
