//! The two programs as a person at a terminal meets them.

use std::net::TcpListener;
use std::process::{Command, Output, Stdio};

use crate::support::{Program, Protection, connect};

const SERVER: &str = env!("CARGO_BIN_EXE_tpserver");
const CLIENT: &str = env!("CARGO_BIN_EXE_tpclient");

/// Runs a program that ends by itself.
fn run(program: &str, line: &str) -> Output {
    Command::new(program)
        .args(line.split_whitespace())
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

fn text(bytes: &[u8]) -> &str {
    str::from_utf8(bytes).unwrap()
}

#[test]
fn help_and_version_go_to_stdout() {
    for (program, name) in [(SERVER, "tpserver"), (CLIENT, "tpclient")] {
        for line in ["-h", "--help"] {
            let output = run(program, line);
            assert_eq!(output.status.code(), Some(0));
            assert_eq!(text(&output.stderr), "");
            let help = text(&output.stdout);
            assert!(help.starts_with(&format!("Usage: {name} ")), "{help}");
            for part in ["127.0.0.1", "(600)", "Examples:", "RUST_LOG", "--version"] {
                assert!(help.contains(part), "{part}: {help}");
            }
            assert!(help.lines().all(|line| line.len() <= 100), "{help}");
        }
        for line in ["-V", "--version"] {
            let output = run(program, line);
            assert_eq!(output.status.code(), Some(0));
            let version = format!("{name} {}\n", env!("CARGO_PKG_VERSION"));
            assert_eq!(text(&output.stdout), version);
        }
    }
}

/// Asserts a one-line error with this code that names the program and all of `named`.
fn assert_error(program: &str, line: &str, code: i32, named: &[&str]) {
    let output = run(program, line);
    let errors = text(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{line}: {errors}");
    assert_eq!(text(&output.stdout), "", "{line}");
    assert_eq!(errors.lines().count(), 1, "{line}: {errors}");
    assert!(!errors.contains("panicked"), "{line}: {errors}");
    let name = program.rsplit('/').next().unwrap();
    for part in named.iter().chain([&name]) {
        assert!(errors.contains(part), "{line}: {part} is not in {errors}");
    }
}

#[test]
fn bad_usage_is_exit_code_2() {
    for (line, named) in [
        ("--nonsense", &["nonsense", "--help"][..]),
        ("--public", &["public", "--help"]),
        ("--public 127.0.0.1", &["--public '127.0.0.1'", "HOST:PORT"]),
        ("--public ::1:80", &["--public", "brackets"]),
        ("--tunnel host:99999", &["--tunnel 'host:99999'", "65535"]),
        ("--control /etc/passwd:1", &["--control", "host name"]),
        ("--max-conns 0", &["--max-conns '0'"]),
        ("--pair-timeout soon", &["--pair-timeout 'soon'"]),
        ("--linger -5", &["linger"]),
        ("one two", &["'one'"]),
        ("-v -q", &["-v and -q"]),
        ("-p 127.0.0.1:0 -p 127.0.0.1:0", &["'public'"]),
    ] {
        assert_error(SERVER, line, 2, named);
    }
    for (line, named) in [
        ("--pool -1", &["pool"][..]),
        ("--pool=-1", &["--pool '-1'"]),
        ("--pool", &["pool"]),
        ("--local 8000", &["--local '8000'"]),
        ("--server host:80", &["--server 'host:80'"]),
        ("--control-port 70000", &["--control-port '70000'"]),
        ("one two", &["'one'"]),
        ("-x", &["x"]),
    ] {
        assert_error(CLIENT, line, 2, named);
    }
}

#[cfg(unix)]
#[test]
fn words_that_are_not_utf8_are_bad_usage() {
    use std::os::unix::ffi::OsStrExt;
    let word = std::ffi::OsStr::from_bytes(b"\xff\xfe");
    let output = Command::new(SERVER).arg(word).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(!text(&output.stderr).contains("panicked"));
}

#[test]
fn ports_without_protection_need_insecure() {
    for (line, option) in [
        ("--bind 0.0.0.0", "--control"),
        ("--bind ::", "--control"),
        ("--tunnel 0.0.0.0:0 --control 127.0.0.1:0", "--tunnel"),
    ] {
        assert_error(SERVER, line, 2, &[option, "loopback", "--insecure"]);
    }
}

#[test]
fn what_the_machine_refuses_is_exit_code_1() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = taken.local_addr().unwrap().to_string();
    let free = "--public 127.0.0.1:0 --tunnel 127.0.0.1:0 --control 127.0.0.1:0";
    for option in ["--public", "--tunnel", "--control"] {
        let keep = free.replace(&format!("{option} 127.0.0.1:0"), "");
        let cases = [
            (format!("{keep} {option} {taken}"), taken.as_str(), "in use"),
            (
                format!("{keep} {option} 192.0.2.1:0 --insecure"),
                "192.0.2.1:0",
                "not an address of this host",
            ),
            (
                format!("{keep} {option} does-not-exist.invalid:80"),
                "does-not-exist.invalid:80",
                "could not find",
            ),
        ];
        for (line, address, why) in cases {
            assert_error(SERVER, &line, 1, &[option, address, why]);
        }
    }
}

#[test]
fn the_level_follows_the_options_and_rust_log_rules() {
    let start = |arguments: &[&str], rust_log| {
        let (server, addresses) = Program::server_with_log(Protection::Plain, arguments, rust_log);
        drop(connect(addresses[0]));
        server
    };
    start(&["-v"], None).wait_for_line("DEBUG");
    start(&["-q"], Some("debug")).wait_for_line("DEBUG");
    // Its last line is one of level info, and by then the one of level debug would be there.
    let server = start(&["-v", "--pair-timeout", "1"], Some("info"));
    server.wait_for_line("after 1s: no client is connected");
    assert_eq!(server.lines_with("DEBUG"), Vec::<String>::new());
}
