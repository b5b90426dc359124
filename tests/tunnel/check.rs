//! `tpclient --check`: each thing that can be wrong is named as what it is.

use std::net::SocketAddr;
use std::process::{Command, Output, Stdio};

use crate::support::programs::Program;
use crate::support::{Protection, Service, closed_port, plain_and_sealed};

plain_and_sealed! {
    a_client_that_has_all_it_needs_is_told_so,
    what_fails_is_named_with_what_to_do,
}

fn check(protection: Protection, server: SocketAddr, local: SocketAddr) -> Output {
    check_with(protection, server, local, &[])
}

fn check_with(
    protection: Protection,
    server: SocketAddr,
    local: SocketAddr,
    more: &[&str],
) -> Output {
    let (server, local) = (server.to_string(), local.to_string());
    Command::new(env!("CARGO_BIN_EXE_tpclient"))
        .args(["--check", "-s", &server, "-l", &local])
        .args(more)
        .env_remove("TP_KEY")
        .envs(protection.key().map(|key| ("TP_KEY", key.to_base64())))
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

fn a_client_that_has_all_it_needs_is_told_so(protection: Protection) {
    let (server, [public, _, control]) = Program::server(protection, &[]);
    let service = Service::echo();
    let output = check(protection, control, service.addr);
    let said = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(0), "{said}");
    assert!(said.lines().all(|line| line.starts_with("ok ")), "{said}");
    for part in [
        "name 127.0.0.1",
        "control port",
        "session ",
        "it takes tunnels",
        &format!("they come to {public}"),
        &format!("local service {}: it takes connections", service.addr),
    ] {
        assert!(said.contains(part), "{part}: {said}");
    }
    server.wait_for_line("it said bye, draining");
}

fn what_fails_is_named_with_what_to_do(protection: Protection) {
    let (_server, [public, tunnel, control]) = Program::server(protection, &[]);
    let (other, refused) = match protection {
        Protection::Plain => (Protection::Sealed, "it has no key"),
        Protection::Sealed => (Protection::Plain, "it wants a key (--key-file)"),
    };
    let (service, nowhere) = (Service::echo(), closed_port());
    let assert_fails = |output: Output, why: &str| {
        let said = String::from_utf8(output.stdout).unwrap();
        assert_eq!(output.status.code(), Some(1), "{said}");
        let failed = said.lines().find(|line| line.starts_with("FAILED "));
        assert!(failed.is_some_and(|line| line.contains(why)), "{said}");
    };
    let output = check(protection, control, nowhere.addr);
    assert_fails(output, "nobody listens there: start the service");
    let output = check(protection, nowhere.addr, service.addr);
    assert_fails(output, "is tpserver running, with --bind ::");
    assert_fails(check(other, control, service.addr), refused);
    let output = check(protection, tunnel, service.addr);
    assert_fails(output, "this is its tunnel port, not its control port");
    let port = public.port().to_string();
    let output = check_with(protection, control, service.addr, &["-t", &port]);
    assert_fails(output, "is its port for visitors: leave the option out");
    let client = Program::client(protection, [tunnel, tunnel, control], service.addr, &[]);
    client.wait_for_line("connected to");
    let output = check(protection, control, service.addr);
    assert_fails(output, "it has as many clients as it takes");
}
