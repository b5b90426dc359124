//! The two programs as a person at a terminal meets them.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::process::{Command, Output, Stdio};
use std::thread;

use tunnel_proxy::{Address, Error, Key, Server, ServerOptions};

use crate::programs::{Launch, Program};
use crate::support::{Protection, connect, server_options};

const SERVER: &str = env!("CARGO_BIN_EXE_tpserver");
const CLIENT: &str = env!("CARGO_BIN_EXE_tpclient");

/// Runs a program that ends by itself.
fn run(program: &str, line: &str) -> Output {
    command(program, line).output().unwrap()
}

fn command(program: &str, line: &str) -> Command {
    let mut command = Command::new(program);
    command
        .args(line.split_whitespace())
        .env_remove("TP_KEY")
        .stdin(Stdio::null());
    command
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
    assert_error_of(&run(program, line), program, line, code, named);
}

fn assert_error_of(output: &Output, program: &str, line: &str, code: i32, named: &[&str]) {
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
        ("--server host:80:80", &["--server 'host:80:80'"]),
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
fn a_fresh_key_is_one_line_and_no_other_is_the_same() {
    let keys = ["-g", "--generate-key"].map(|line| {
        let output = run(SERVER, line);
        assert_eq!(output.status.code(), Some(0));
        assert_eq!(text(&output.stderr), "");
        text(&output.stdout).to_owned()
    });
    for key in &keys {
        assert_eq!(key.strip_suffix('\n').unwrap().len(), 44, "{key:?}");
        key.parse::<Key>().unwrap();
    }
    assert_ne!(keys[0], keys[1]);
}

#[cfg(target_os = "linux")]
#[test]
fn a_key_that_cannot_be_written_is_an_error() {
    let full = std::fs::File::options().write(true).open("/dev/full");
    let output = command(SERVER, "-g")
        .stdout(full.unwrap())
        .output()
        .unwrap();
    assert_error_of(&output, SERVER, "-g", 1, &["stdout", "space"]);
}

/// A file with this text, gone when dropped.
fn file(text: &str) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(text.as_bytes()).unwrap();
    file
}

#[test]
fn a_key_that_is_none_is_named_and_not_shown() {
    let secret = "c2VjcmV0IGJ1dCB0b28g";
    let long = secret.repeat(4);
    let odd = format!("{secret}!");
    let hint = "tpserver --generate-key";
    for (content, why) in [
        ("", "no key"),
        (" \n", "no key"),
        (secret, "fewer than 32"),
        (&long, "more than 32"),
        (&odd, "not one key in base64"),
    ] {
        let file = file(content);
        let path = file.path().to_str().unwrap();
        for program in [SERVER, CLIENT] {
            let line = format!("--key-file {path}");
            let output = run(program, &line);
            assert_error_of(&output, program, &line, 2, &["--key-file", path, why, hint]);
            assert!(!text(&output.stderr).contains(&secret[..8]));
            let output = command(program, "")
                .env("TP_KEY", content)
                .output()
                .unwrap();
            assert_error_of(&output, program, "TP_KEY", 2, &["TP_KEY", why, hint]);
            assert!(!text(&output.stderr).contains(&secret[..8]));
        }
    }
    for program in [SERVER, CLIENT] {
        for (path, why) in [
            ("/does/not/exist", "No such file"),
            ("/", "directory"),
            ("/dev/zero", "not one key"),
        ] {
            let line = format!("--key-file {path}");
            assert_error(program, &line, 2, &["--key-file", path, why, hint]);
        }
    }
}

#[cfg(unix)]
#[test]
fn a_key_file_that_others_can_read_is_warned_about() {
    use std::os::unix::fs::PermissionsExt;
    let file = file(&Key::generate().unwrap().to_base64());
    let path = file.path().to_str().unwrap();
    let start = |mode| {
        let permissions = std::fs::Permissions::from_mode(mode);
        file.as_file().set_permissions(permissions).unwrap();
        // The file's key, in the place of the one in the environment.
        Program::server(Protection::Sealed, &["--key-file", path]).0
    };
    start(0o644).wait_for_line(&format!("--key-file {path}: other users"));
    assert_eq!(start(0o600).lines_with("other users"), [""; 0]);
}

#[cfg(target_os = "linux")]
#[test]
fn a_program_with_a_key_leaves_no_core() {
    use std::os::unix::process::ExitStatusExt;
    let folder = tempfile::tempdir().unwrap();
    let dumps_core = |program: &str, key: Option<Key>| {
        let ports = match program {
            SERVER => "-p 127.0.0.1:0 -t 127.0.0.1:0 -c 127.0.0.1:0",
            _ => "-c 9",
        };
        let mut running = Command::new("sh")
            .args([
                "-c",
                &format!("ulimit -c unlimited; exec {program} {ports}"),
            ])
            .env_remove("TP_KEY")
            .envs(key.map(|key| ("TP_KEY", key.to_base64())))
            .current_dir(&folder)
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut log = BufReader::new(running.stderr.take().unwrap()).lines();
        // It runs: the key was read before.
        log.next().unwrap().unwrap();
        let limits = std::fs::read_to_string(format!("/proc/{}/limits", running.id())).unwrap();
        let pid = rustix::process::Pid::from_child(&running);
        rustix::process::kill_process(pid, rustix::process::Signal::ABORT).unwrap();
        let dumped = running.wait().unwrap().core_dumped();
        let limit = limits.lines().find(|line| line.contains("core file"));
        (dumped, limit.unwrap().to_owned())
    };
    for program in [SERVER, CLIENT] {
        let (_, limit) = dumps_core(program, None);
        assert!(limit.contains("unlimited"), "{limit}");
        let (dumped, limit) = dumps_core(program, Some(Key::generate().unwrap()));
        assert!(!dumped);
        assert!(!limit.contains("unlimited"), "{limit}");
    }
}

#[test]
fn a_key_opens_the_ports_to_other_hosts() {
    let anywhere = Address::new("0.0.0.0", 0);
    let options = |protection| ServerOptions {
        tunnel: anywhere.clone(),
        control: anywhere.clone(),
        ..server_options(protection)
    };
    assert!(Server::bind(options(Protection::Sealed)).is_ok());
    let error = Server::bind(options(Protection::Plain)).err().unwrap();
    assert!(
        matches!(error, Error::NotLoopback("--control", _)),
        "{error}"
    );
}

#[test]
fn ports_without_protection_need_insecure() {
    for (line, option) in [
        ("--bind 0.0.0.0", "--control"),
        ("--bind ::", "--control"),
        ("--tunnel 0.0.0.0:0 --control 127.0.0.1:0", "--tunnel"),
    ] {
        assert_error(
            SERVER,
            line,
            2,
            &[option, "loopback", "--key-file", "--insecure"],
        );
    }
}

#[test]
fn what_the_machine_refuses_is_exit_code_1() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = taken.local_addr().unwrap().to_string();
    let free = "--public 127.0.0.1:0 --tunnel 127.0.0.1:0 --control 127.0.0.1:0";
    let refused = |option: &str| {
        let keep = free.replace(&format!("{option} 127.0.0.1:0"), "");
        let cases = [
            // Waited for a while, which is said unless it is to be quiet.
            (
                format!("-q {keep} {option} {taken}"),
                taken.as_str(),
                "in use",
            ),
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
    };
    thread::scope(|scope| {
        for option in ["--public", "--tunnel", "--control"] {
            let refused = &refused;
            scope.spawn(move || refused(option));
        }
    });
}

#[test]
fn the_level_follows_the_options_and_rust_log_rules() {
    let start = |arguments: &[&str], rust_log| {
        let launch = Launch::new(Protection::Plain).rust_log(rust_log);
        let server = launch.server(arguments);
        drop(connect(server.addresses()[0]));
        server
    };
    start(&["-v"], None).wait_for_line("DEBUG");
    start(&["-q"], Some("debug")).wait_for_line("DEBUG");
    // Its last line is one of level info, and by then the one of level debug would be there.
    let server = start(&["-v", "--pair-timeout", "1"], Some("info"));
    server.wait_for_line("after 1s: no client is connected");
    assert_eq!(server.lines_with("DEBUG"), Vec::<String>::new());
}
