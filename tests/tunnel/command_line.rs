//! The two programs as a person at a terminal meets them.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::process::{Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use tunnel_proxy::{Address, Error, Key, Server};

use crate::support::programs::{Launch, Program};
use crate::support::{Protection, connect, server_options, with};

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
        (
            "-p 127.0.0.1:0 -p 127.0.0.1:0",
            &["a second service needs a name"],
        ),
        ("--public http://h:80", &["leave out http://"]),
        ("--control [::1]", &["--control '[::1]'", "no port"]),
        ("--public :8080", &["for all addresses: [::]:8080"]),
        ("-version", &["did you mean --version?"]),
        ("--clients 0", &["--clients '0'", "1 to 64"]),
        ("--status host", &["--status 'host'", "no port"]),
        ("--insecure-status", &["--insecure-status", "no --status"]),
        (
            "-q -p 127.0.0.1:9 --status localhost:9",
            &["--status: --public", "127.0.0.1:9"],
        ),
        ("--ready 0", &["--ready '0'", "the port is 0"]),
        (
            "--accept-proxy 10.0.0.1/8",
            &["--accept-proxy '10.0.0.1/8'", "is written 10.0.0.0/8"],
        ),
        ("--accept-proxy host", &["--accept-proxy 'host'", "no name"]),
        ("--allow ::1/129", &["--allow '::1/129'", "from 0 to 128"]),
        ("--deny web=", &["--deny 'web='", "not an IP address"]),
        ("--max-per-source 0", &["--max-per-source '0'", "from 1"]),
        (
            "-q --deny web=::1",
            &["--deny web: there is no service of that name"],
        ),
        (
            "-q --allow web=::1",
            &["--allow web: there is no service of that name"],
        ),
        ("-q --original --clients 2", &["--original", "--clients"]),
        (
            "-q --original -t 127.0.0.1:9 -c 127.0.0.1:9",
            &["--original", "leave out --original or --tunnel"],
        ),
    ] {
        assert_error(SERVER, line, 2, named);
    }
    for (line, named) in [
        ("--pool -1", &["pool"][..]),
        ("--pool=-1", &["--pool '-1'"]),
        ("--pool", &["pool"]),
        ("--server host:80:80", &["--server 'host:80:80'"]),
        ("--local http://127.0.0.1:8000", &["leave out http://"]),
        ("--local :8000", &["for this host: 127.0.0.1:8000"]),
        ("--pool 65", &["--pool '65'", "0 to 64"]),
        ("--status :9", &["--status", "for this host: 127.0.0.1:9"]),
        ("--insecure-status", &["--insecure-status", "no --status"]),
        ("--ready", &["ready"]),
        (
            "--proxy-protocol v3",
            &["--proxy-protocol 'v3'", "v1 (text)"],
        ),
        ("--proxy-protocol Web=v1", &["'Web=v1'", "a service's name"]),
        (
            "-q --proxy-protocol web=v1",
            &["--proxy-protocol web: there is no service of that name"],
        ),
        (
            "-q -l web=80 --proxy-protocol v1",
            &[
                "--proxy-protocol: there is no service without a name",
                "NAME=",
            ],
        ),
        ("-version", &["did you mean --version?"]),
        ("--control-port 70000", &["--control-port '70000'"]),
        ("one two", &["'one'"]),
        ("-x", &["x"]),
    ] {
        assert_error(CLIENT, line, 2, named);
    }
}

#[test]
fn a_file_has_what_a_command_line_has() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tpserver.conf");
    let config = path.to_str().unwrap();
    let write = |text: &str| std::fs::write(&path, text).unwrap();
    write("# The ports.\npublic web=0\ntunnel 0\ncontrol 0\nverbose\n");
    let server = Launch::new(Protection::Plain).bare_server(&["--config", config]);
    let web = server.address("visitors of web");
    let _visitor = connect(web);
    server.wait_for_line(" of web came");
    write("control 0\n\npublic web=a:99999\n");
    let named = [config, "line 3: public 'web=a:99999'", "0 to 65535"];
    assert_error(SERVER, &format!("--config {config}"), 2, &named);
    write("local web=127.0.0.1:80\n");
    let named = [config, "line 1: there is no option local"];
    assert_error(SERVER, &format!("--config {config}"), 2, &named);
    let named = ["--config: could not read", "No such file"];
    assert_error(CLIENT, "--config /does/not/exist", 2, &named);
    let named = ["--config: could not read /dev/zero"];
    assert_error(CLIENT, "--config /dev/zero", 2, &named);
}

#[test]
fn two_ports_at_one_address_are_refused_at_once() {
    for (line, named) in [
        (
            "-p 127.0.0.1:9 -t 127.0.0.1:9",
            ["--tunnel: --public", "127.0.0.1:9"],
        ),
        (
            "-p 127.0.0.1:9 -c localhost:9",
            ["--control: --public", "127.0.0.1:9"],
        ),
        (
            "-c 127.0.0.1:9 -t localhost:9",
            ["--tunnel: --control", "127.0.0.1:9"],
        ),
        (
            "-i -p [::]:9 -t 127.0.0.1:9",
            ["--tunnel: --public", "[::]:9"],
        ),
    ] {
        let start = Instant::now();
        assert_error(SERVER, &format!("-q {line}"), 2, &named);
        // Another program's port would be waited for for 6 s.
        assert!(start.elapsed() < Duration::from_secs(5), "{line}");
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
            assert_error(program, &line, 2, &["--key-file", path, why]);
        }
        // The message says where the file was looked for, and does not advise to make a fresh key.
        let output = command(program, "-k no.key")
            .current_dir("/")
            .output()
            .unwrap();
        assert_error_of(&output, program, "-k", 2, &["--key-file", " /no.key: No"]);
        assert!(!text(&output.stderr).contains(hint));
    }
}

#[test]
fn a_key_with_something_beside_it_is_told_what() {
    let key = Key::generate().unwrap().to_base64();
    for (content, why) in [
        (format!("\u{feff}{key}\n"), "byte order mark"),
        (format!("\"{key}\"\n"), "quotes are around the key"),
        (format!("{key}\n{key}\n"), "several keys are in it"),
        (format!("TP_KEY={key}\n"), "TP_KEY= is in it"),
        (format!("# of the server\n{key}\n"), "a # comment is in it"),
    ] {
        let file = file(&content);
        let path = file.path().to_str().unwrap();
        let line = format!("--key-file {path}");
        let output = run(CLIENT, &line);
        assert_error_of(&output, CLIENT, &line, 2, &["--key-file", path, why]);
        // The message does not advise to make another key.
        assert!(!text(&output.stderr).contains("--generate-key"), "{why}");
        assert!(!text(&output.stderr).contains(&key[..8]), "{why}");
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
        Program::server(Protection::Plain, &["--key-file", path]).0
    };
    for mode in [0o644, 0o640] {
        start(mode).wait_for_line(&format!("--key-file {path}: other users"));
    }
    assert_eq!(start(0o600).lines_with("other users"), [""; 0]);

    // The mode of systemd's credentials says nothing about who can read them.
    let permissions = std::fs::Permissions::from_mode(0o440);
    file.as_file().set_permissions(permissions).unwrap();
    for (folder, warned) in [
        (file.path().parent().unwrap(), false),
        ("/run".as_ref(), true),
    ] {
        let set = format!("CREDENTIALS_DIRECTORY={}", folder.display());
        let under = ["env", &set];
        let launch = Launch::new(Protection::Plain).under(&under);
        let server = launch.server(&["--key-file", path]);
        server.addresses();
        assert_eq!(!server.lines_with("other users").is_empty(), warned);
    }
}

#[test]
fn a_key_that_is_not_used_is_warned_about() {
    let start = |key: &Key| {
        let file = file(&key.to_base64());
        let path = file.path().to_str().unwrap();
        let (server, _) = Program::server(Protection::Sealed, &["--key-file", path]);
        server.lines_with("TP_KEY is set too, and not used")
    };
    assert_eq!(start(&Key::generate().unwrap()).len(), 1);
    assert_eq!(start(&Protection::Sealed.key().unwrap()), [""; 0]);
}

#[cfg(target_os = "linux")]
#[test]
fn a_program_with_a_key_belongs_to_root_alone() {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};
    // The program runs as a user who is not root: root's own programs show no difference.
    let folder = tempfile::tempdir().unwrap();
    std::fs::set_permissions(&folder, PermissionsExt::from_mode(0o755)).unwrap();
    let program = folder.path().join("program").display().to_string();
    let user = match rustix::process::geteuid().is_root() {
        true => "setpriv --reuid=65534 --regid=65534 --clear-groups ",
        false => "",
    };
    let script = format!(r#"cp "$0" {program} && exec {user}{program} "$@""#);
    for protection in [Protection::Plain, Protection::Sealed] {
        let under = ["sh", "-c", &script];
        let server = Launch::new(protection).under(&under).server(&[]);
        server.addresses();
        let path = format!("/proc/{}/environ", server.pid());
        let owner = std::fs::metadata(path).unwrap().uid();
        assert_eq!(owner == 0, protection == Protection::Sealed, "{owner}");
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a_program_with_a_key_leaves_no_core() {
    use std::os::unix::process::ExitStatusExt;
    let folder = tempfile::tempdir().unwrap();
    let dumps_core = |program: &str, key: Key| {
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
            .env("TP_KEY", key.to_base64())
            .current_dir(&folder)
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut log = BufReader::new(running.stderr.take().unwrap()).lines();
        // A program that logs has read its key.
        log.next().unwrap().unwrap();
        let pid = rustix::process::Pid::from_child(&running);
        rustix::process::kill_process(pid, rustix::process::Signal::ABORT).unwrap();
        running.wait().unwrap().core_dumped()
    };
    for program in [SERVER, CLIENT] {
        assert!(!dumps_core(program, Key::generate().unwrap()));
    }
}

#[test]
fn a_key_opens_the_ports_to_other_hosts() {
    let anywhere = Address::new("0.0.0.0", 0);
    let options = |protection| {
        with!(server_options(protection);
                tunnel: anywhere.clone(),
                control: anywhere.clone(),
        )
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
        ("-q --bind 0.0.0.0", "--control"),
        ("-q --bind ::", "--control"),
        ("-q --tunnel 0.0.0.0:0 --control 127.0.0.1:0", "--tunnel"),
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
fn a_page_for_other_hosts_needs_insecure_status() {
    for program in [SERVER, CLIENT] {
        for host in ["0.0.0.0", "[::]", "192.0.2.1"] {
            let line = format!("-q --status {host}:0 -c 1");
            let named = ["--status", "loopback", "--insecure-status"];
            assert_error(program, &line, 2, &named);
        }
        let line = "-q --status 192.0.2.1:0 --insecure-status -c 0";
        let line = if program == CLIENT {
            line.replace(" -c 0", "")
        } else {
            format!("{line} -p 0 -t 0")
        };
        assert_error(
            program,
            &line,
            1,
            &["--status", "192.0.2.1:0", "not an address"],
        );
        let line = line.replace("192.0.2.1", "does-not-exist.invalid");
        assert_error(program, &line, 1, &["--status", "could not find"]);
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
            // The server waits for this port for a while.
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
            // Without -q there would be lines before the error.
            assert_error(SERVER, &format!("-q {line}"), 1, &[option, address, why]);
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
    // The last line that the server logs is one of level info: a line of level debug would have
    // come before it.
    for (arguments, rust_log) in [(&["-v"][..], "info"), (&[], "myapp=debug"), (&[], "")] {
        let arguments = [arguments, &["--pair-timeout", "1"]].concat();
        let server = start(&arguments, Some(rust_log));
        server.wait_for_line("after 1s: no client is connected");
        assert_eq!(server.lines_with("DEBUG"), Vec::<String>::new());
        assert_ne!(server.lines_with("INFO"), Vec::<String>::new());
    }
    // A level that is set for another program does not apply to this one.
    start(&["-v"], Some("myapp=error")).wait_for_line("DEBUG");
}
