//! What the programs tell, and that nobody has to listen.
#![cfg(target_os = "linux")]

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use rustix::io::ioctl_fionread;
use rustix::process::Signal;

use crate::support::programs::{Both, Launch, Program, ports_of};
use crate::support::{
    Protection, Service, Tunnel, assert_echo, closed_port, connect, echo, eventually,
    plain_and_sealed,
};

plain_and_sealed! {
    both_programs_serve_with_stderr_closed,
    both_programs_serve_when_the_logs_disk_is_full,
    both_programs_serve_when_the_logs_reader_has_gone,
    both_programs_serve_when_the_logs_reader_has_stopped,
    lines_name_the_program_and_the_first_the_version,
    lines_name_a_visitor_of_ipv4_by_its_address,
    a_status_counts_what_goes_on,
    a_status_is_logged_on_a_signal,
}

fn both_programs_serve_with_stderr_closed(protection: Protection) {
    serves_with_log(protection, "2>&-");
}

fn both_programs_serve_when_the_logs_disk_is_full(protection: Protection) {
    serves_with_log(protection, "2> /dev/full");
}

fn both_programs_serve_when_the_logs_reader_has_gone(protection: Protection) {
    serves_with_log(protection, "2> >(exec true)");
}

/// Lets both programs log there, serve, and end.
fn serves_with_log(protection: Protection, redirection: &str) {
    let shell = format!(r#"exec "$0" "$@" {redirection}"#);
    let under = ["bash", "-c", &shell];
    for mut program in serve(Launch::new(protection).under(&under)) {
        end(&mut program);
    }
}

/// Both programs after hundreds of visits, on ports that are known without the log.
fn serve(launch: Launch) -> [Program; 2] {
    static HOSTS: AtomicUsize = AtomicUsize::new(1);
    let host = HOSTS.fetch_add(1, Ordering::Relaxed);
    let addresses = ports_of(&format!("127.0.79.{host}"));
    let service = Service::echo();
    let server = launch.on(addresses).server(&["-v"]);
    let client = launch.client(addresses, service.addr, &["-v"]);
    eventually("the server is up", || {
        std::net::TcpStream::connect(addresses[0]).is_ok()
    });
    // So many visits for so long, at a hundred lines a second of either kind, fill all that holds
    // lines.
    let (start, mut visits) = (Instant::now(), 0);
    while visits < 300 || start.elapsed() < Duration::from_secs(3) {
        echo(&connect(addresses[0]));
        visits += 1;
    }
    [client, server]
}

fn end(program: &mut Program) {
    program.signal(Signal::TERM);
    assert!(program.wait_for_end().success());
}

fn both_programs_serve_when_the_logs_reader_has_stopped(protection: Protection) {
    let [mut client, mut server] = serve(Launch::new(protection).unread());
    for program in [&client, &server] {
        let held = ioctl_fionread(program.unread_log()).unwrap();
        assert!(held > 3500, "{held} bytes: the log was not full");
    }
    end(&mut client);
    // A reader that comes back is told what it has missed.
    server.read_log();
    end(&mut server);
    server.wait_for_line("lines left out, as nobody read them: ");
}

fn lines_name_the_program_and_the_first_the_version(protection: Protection) {
    let service = Service::echo();
    let both = Both::start(protection, service.addr, [&[], &[]]);
    let version = env!("CARGO_PKG_VERSION");
    let key = match protection {
        Protection::Plain => "no key",
        Protection::Sealed => "the key",
    };
    let server = format!(" INFO  tpserver] version {version}, a client needs {key}");
    let client = format!(" INFO  tpclient] version {version}");
    for (program, first) in [(&both.server, server), (&both.client, client)] {
        let lines = program.lines_with("");
        assert!(
            lines[0].starts_with('[') && lines[0].ends_with(&first),
            "{lines:#?}"
        );
        let (_, name) = first.split_once("  ").unwrap();
        let name = name.split_inclusive(']').next().unwrap();
        assert!(lines.iter().all(|line| line.contains(name)), "{lines:#?}");
    }
    let lines = both.client.lines_with("connect");
    let to = both.addresses[2];
    assert!(
        lines[0].ends_with(&format!("connecting to {to}")),
        "{lines:#?}"
    );
    assert!(
        lines[1].contains(&format!("connected to {to}: ")),
        "{lines:#?}"
    );
}

/// The listener is one of IPv6, to which an address of IPv4 is a longer one.
/// The journal has the time and the program itself.
#[test]
fn lines_for_systemds_journal_have_a_priority_and_no_time() {
    let closed = closed_port();
    let start = |stream: &str| {
        let shell = format!(r#"JOURNAL_STREAM={stream} exec "$0" "$@""#);
        let under = ["sh", "-c", &shell];
        let launch = Launch::new(Protection::Plain).under(&under);
        let server = launch.bare_server(&["-v", "-p0", "-t0", "-c0"]);
        let client = launch.bare_client(&["-s", &closed.addr.to_string()]);
        server.wait_for_line("listening on 127.0.0.1:");
        client.wait_for_line("could not reach the server");
        (server, client)
    };
    let (mut server, client) = start("$(stat -Lc %d:%i /proc/self/fd/2)");
    drop(connect(server.address("visitors")));
    let version = env!("CARGO_PKG_VERSION");
    for (program, line) in [
        (
            &server,
            format!("<6>version {version}, a client needs no key"),
        ),
        (&server, "<6>listening on 127.0.0.1:".to_owned()),
        (&server, "<7>visitor 127.0.0.1:".to_owned()),
        (
            &client,
            "<4>could not reach the server: 127.0.0.1:".to_owned(),
        ),
    ] {
        let found = program.wait_for_line(line.trim_start_matches(|it| it != '>'));
        assert!(found.starts_with(&line), "{found}");
    }
    server.signal(Signal::TERM);
    assert!(server.wait_for_end().success());
    // It names another file, as that of the service which started a shell that has its own stderr.
    let (server, _client) = start("1:2");
    assert_eq!(server.lines_with("<6>"), [""; 0]);
    assert_ne!(server.lines_with(" INFO  tpserver] "), [""; 0]);
    // The error that ends a program.
    let output = std::process::Command::new("sh")
        .args([
            "-c",
            r#"JOURNAL_STREAM=$(stat -Lc %d:%i /proc/self/fd/2) exec "$0" --local x"#,
        ])
        .arg(env!("CARGO_BIN_EXE_tpclient"))
        .output()
        .unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.starts_with("<3>tpclient: --local 'x': "), "{said}");
}

fn lines_name_a_visitor_of_ipv4_by_its_address(protection: Protection) {
    let any = ["[::]:0", "127.0.0.1:0", "127.0.0.1:0"].map(|any| any.parse().unwrap());
    let launch = Launch::new(protection);
    let server = launch.on(any).server(&["-v"]);
    let (service, addresses) = (Service::echo(), server.addresses());
    let client = launch.client(addresses, service.addr, &[]);
    let visitor = connect(([127, 0, 0, 1], addresses[0].port()).into());
    echo(&visitor);
    let name = visitor.local_addr().unwrap();
    drop(visitor);
    server.wait_for_line(&format!("visitor {name} came"));
    for program in [&server, &client] {
        program.wait_for_line(&format!("{name}: "));
        assert_eq!(program.lines_with("::ffff:"), [""; 0]);
    }
}

fn a_status_counts_what_goes_on(protection: Protection) {
    let service = Service::echo();
    let tunnel = Tunnel::start(protection, service.addr, 8);
    let statuses = || [tunnel.server.handle(), tunnel.client.handle()].map(|it| it.status());
    for _ in 0..3 {
        assert_echo(&tunnel.visit(), "1234567890");
    }
    let stays = tunnel.visit();
    assert_echo(&stays, "12345");
    let mut last = statuses();
    // Bytes are counted when they have been passed on, and may be seen before that. What the client
    // still dials waits, too.
    eventually("all is counted and dialled", || {
        last = statuses();
        last.iter().flatten().all(|it| {
            (it.joined, it.bytes_up, it.bytes_down) == (1, 35, 35)
                && it.idle >= 7
                && it.waiting == 0
        })
    });
    let [server, client] = last.map(Option::unwrap);
    assert_eq!(server.sessions, client.sessions);
    assert_eq!(
        server.sessions.iter().map(String::len).collect::<Vec<_>>(),
        [8]
    );
    for status in [&server, &client] {
        assert_eq!(status.joined_total, 4);
        // The visitor who is there uses one of the eight, and for each of the four one more may have been
        // dialled before the eight were there.
        assert!(status.idle <= 12, "{} idle", status.idle);
        assert_eq!((status.refused, status.timed_out), (0, 0));
    }
    drop(stays);
    eventually("it has left", || {
        statuses().iter().flatten().all(|it| it.joined == 0)
    });
}

fn a_status_is_logged_on_a_signal(protection: Protection) {
    let service = Service::echo();
    let both = Both::start(protection, service.addr, [&[], &[]]);
    let visitor = both.visit();
    for times in 1..=10 {
        assert_echo(&visitor, "12345");
        for program in [&both.server, &both.client] {
            program.signal(Signal::USR1);
            let line = program.wait_for_lines("status: uptime=", times);
            assert!(line.contains(" joined_total=1 waiting="), "{line}");
            assert!(line.ends_with(" refused=0 timed_out=0"), "{line}");
        }
    }
    // Bytes are counted when they have been passed on, and may be seen before that.
    eventually("all bytes are counted", || {
        both.client.signal(Signal::USR1);
        let counted = both.client.lines_with(" bytes_up=50 bytes_down=50 ");
        !counted.is_empty()
    });
}
